"""Teachers: from a specification (a string, mostly) to something that labels every token in every state."""

from __future__ import annotations

import inspect
import math
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import PyTorchObs
from stable_baselines3.common.utils import get_device
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

from opd_gym import ranks
from opd_gym.algorithms.losses import hermite_nodes, smoothed_labels
from opd_gym.algorithms.randomness import preserved_rng
from opd_gym.algorithms.teacher_inputs import (
    Normalisation,
    check_action_spaces,
    check_statistics,
    hides_raw_observations,
    key_selector,
    observation_adapter,
    raw_observation_space,
    raw_observations,
    unchanged,
)
from opd_gym.checkpoints import find_teacher, resolve_checkpoint, teachers_for_some_tasks
from opd_gym.checks import check_range
from opd_gym.envs.make import env_id_of
from opd_gym.envs.wrappers import ActionTokens, EpisodeControl
from opd_gym.observations import map_obs
from opd_gym.policies.loading import check_device, find_vec_normalize, load_policy, read_vec_normalize
from opd_gym.tokens import (
    CategoricalTokens,
    GaussianTokens,
    TokenSpec,
    TokenView,
    action_distribution,
    check_starts,
    is_autoregressive,
    token_spec,
    token_view,
)


class Teacher(ABC):
    """
    A frozen source of token distributions in the student's own token space.

    A privileged teacher needs more than the student's observation, the simulator for instance: it is asked for a label
    in every state before the step is taken, and its distribution is made from the label.
    """

    privileged: bool = False
    #: Numbers of a label; None: one for each token
    label_size: int | None = None
    #: Which observations it sees, where that needs saying
    sees: str | None = None
    #: Whether all ranks ask it together, because each has a part of its weights
    sharded: bool = False
    #: How many batches it may be asked before the answer to the first is looked at
    asked_ahead: int = 0

    @abstractmethod
    def distribution(self, observations: PyTorchObs, labels: th.Tensor, actions: th.Tensor | None = None) -> TokenView:
        """
        :param observations: Observations of the student's env
        :param labels: Labels of a privileged teacher in these states, (batch, ``label_size``); NaN for any other
        :param actions: The student's actions in these states, (batch, T): an autoregressive teacher is asked for each
            token after the student's own tokens before it
        :return: The teacher's distribution, without gradient
        """

    def ask(
        self, observations: PyTorchObs, labels: th.Tensor, actions: th.Tensor | None = None
    ) -> Callable[[], TokenView]:
        """
        :meth:`distribution` in two steps, for a teacher that thinks elsewhere.

        :param observations: See there, as for the others
        :param labels: Labels of a privileged teacher
        :param actions: The student's actions
        :return: Gives the teacher's distribution
        """
        return lambda: self.distribution(observations, labels, actions)

    def label(self, env: VecEnv, indices: np.ndarray) -> np.ndarray:
        """
        Labels of a privileged teacher for the present states.

        :param env: The student's env
        :param indices: Numbers of the envs to ask
        :return: (len(indices), ``label_size``)
        """
        raise NotImplementedError

    def shard(self, device: th.device) -> None:
        """
        Of a sharded teacher: before a training, keep a part of the weights from here on. All ranks call it together.

        :param device: The student's
        """
        raise NotImplementedError

    def keep_pace(self) -> None:
        """Of a sharded teacher: after the states of a rollout, wait for the ranks that have more of them."""
        raise NotImplementedError


class PolicyTeacher(Teacher):
    """
    A frozen policy of Stable-Baselines3, sb3-contrib or this library.

    - Actor-critic policies and SAC-like actors give their own distribution.
    - Q-networks (DQN, QR-DQN) give ``softmax(Q / temperature)``.
    - Deterministic policies (TD3, DDPG, ARS) give their action, smoothed as a privileged teacher's label is.

    An autoregressive policy gives its distribution of each token after the student's own tokens before it, also where
    it would not have chosen those tokens itself. The student may be autoregressive or not.

    A student that does not squash its Gaussian gets a squashed teacher as the Gaussian of the same mean and variance,
    the standard deviation at least ``std``: near a bound the tanh leaves hardly any, and since the divergence of means
    counts by its inverse square, a few such states would outweigh all others.

    It sees observations as it was trained on them: raw, or normalised by its own statistics. Where the student's env is
    a ``VecNormalize``, or keeps keys from the student (``PrivilegedObservation``), it is privileged, for the raw
    observation is known only until the next step: its label is its flattened distribution.

    A teacher that was trained with action masks (MaskablePPO) rules out what the env's ``action_masks()`` does. The
    student acts without masks, as it will later, and learns to leave those actions alone; the mask is the label.

    :param policy: The policy
    :param env: The student's env
    :param student: The student's policy
    :param temperature: Of the softmax over Q-values
    :param std: Standard deviation given to deterministic continuous actions, and the smallest that a squashed teacher
        keeps for a student that does not squash; as a fraction of half the action's range
    :param smoothing: See :class:`LabelSmoothing`
    :param floor: See :class:`LabelSmoothing`
    :param obs_keys: Keys of the env's Dict observation that it sees. A teacher of a plain observation gets the value of
        one key, or those of several, flattened, one after the other. None: the keys that the teacher knows
    :param vec_normalize: The ``VecNormalize`` that the teacher was trained behind; None: none
    :param shard: Spread the weights of a VLA over all ranks, see :func:`make_teacher`
    """

    def __init__(
        self,
        policy: BasePolicy,
        env: VecEnv,
        student: BasePolicy,
        temperature: float = 1.0,
        std: float = 0.1,
        smoothing: float = 1.0,
        floor: float = 0.01,
        obs_keys: str | Sequence[str] | None = None,
        vec_normalize: Any = None,
        shard: bool = False,
    ):
        if policy is student:
            raise ValueError("The teacher is the student's own policy: there is nothing to distil. Give a frozen copy.")
        check_range("(0, inf)", temperature=temperature)
        check_starts("teacher's observation space", policy.observation_space)
        check_starts("teacher's action space", policy.action_space)
        check_action_spaces(policy.action_space, env.action_space)
        check_statistics(policy, env, student)
        maskable = "action_masks" in inspect.signature(policy.forward).parameters
        self._masked = maskable and env.has_attr("action_masks")
        if maskable and not self._masked:
            warnings.warn(
                "The teacher is a MaskablePPO, and the env has no action_masks(): it teaches without masks. If it was "
                "trained with them, wrap each env in sb3_contrib.common.wrappers.ActionMasker.",
                stacklevel=2,
            )
        space = raw_observation_space(env)
        select: Callable[[Any], Any] = unchanged
        if obs_keys is not None:
            select, space = key_selector(obs_keys, space, isinstance(policy.observation_space, spaces.Dict))
        normalise: Callable[[Any], Any] = unchanged
        if vec_normalize is not None and vec_normalize.norm_obs:
            normalise = Normalisation(vec_normalize, space)
            space = normalise.space
        adapt = observation_adapter(policy.observation_space, space)
        self._adapt = lambda obs: adapt(normalise(select(obs)))
        self.sees_raw = hides_raw_observations(env)
        self.privileged = self.sees_raw or self._masked
        if shard and not hasattr(policy, "shard_weights"):
            raise ValueError(f'teacher_kwargs={{"shard": True}} is for a VLA, got a {type(policy).__name__}.')
        if shard and self.privileged:
            raise ValueError(
                'With teacher_kwargs={"shard": True} all ranks ask the teacher together, after a rollout. This one is '
                "asked in each step, since it sees raw observations (of a VecNormalize or a PrivilegedObservation) or "
                "action masks: leave out shard, or use the env without."
            )
        self.sharded = shard
        if self.sees_raw and is_autoregressive(policy):
            raise ValueError(
                "An autoregressive teacher cannot label the states of a VecNormalize or a PrivilegedObservation: use "
                "the env without."
            )
        seen = []
        if normalise is not unchanged or self.sees_raw:
            own = "observations normalised by its own statistics"
            seen.append("raw observations" if normalise is unchanged else own)
        if self._masked:
            seen.append("the env's action masks")
        self.sees = " and ".join(seen) or None
        self.policy = policy
        self.temperature = temperature
        self.std = std
        self.action_space = env.action_space
        self.spec = token_spec(env.action_space, squashed=student.squash_output)
        self._smooth = LabelSmoothing(self.spec, env.action_space, False, std, smoothing, floor)
        if self.sees_raw:
            self.label_size = self.spec.flat_size
        elif self._masked:
            self.label_size = self._n_masks
        self._read = self._reader()
        if student.squash_output and not policy.squash_output:
            raise ValueError(
                "The student squashes its actions by a tanh and the teacher does not: a Gaussian over all numbers has "
                "no counterpart inside the bounds. Use a student without squash_output, or a squashed teacher (SAC)."
            )

    def shard(self, device: th.device) -> None:
        policy: Any = self.policy
        if policy.sharding is None:
            policy.shard_weights(device, force=True)

    def keep_pace(self) -> None:
        self.policy.keep_pace()  # type: ignore[operator]

    @property
    def _n_masks(self) -> int:
        """Numbers of an action mask: one for each bin of each token."""
        assert self._smooth.n_bins is not None  # MaskablePPO has no continuous actions
        return int(self._smooth.n_bins.sum())

    def _reader(self) -> Callable[[PyTorchObs, th.Tensor | None, np.ndarray | None], TokenView]:
        policy: Any = self.policy
        if hasattr(policy, "lstm_actor"):
            raise ValueError(
                "The teacher is recurrent (RecurrentPPO): its labels depend on the history, and states are labelled "
                "one by one. Use a teacher without memory."
            )
        if self._masked:
            return self._read_masked
        if hasattr(policy, "get_distribution"):
            return lambda obs, actions, _: token_view(action_distribution(policy, obs, actions))
        if hasattr(getattr(policy, "actor", None), "get_action_dist_params"):
            return lambda obs, *_: self._read_squashed_actor(obs)
        if hasattr(policy, "q_net"):
            return lambda obs, *_: self._softmax(policy.q_net(obs))
        if hasattr(policy, "quantile_net"):
            return lambda obs, *_: self._softmax(policy.quantile_net(obs).mean(dim=1))
        return lambda obs, *_: self._read_deterministic(obs)

    def _read_masked(self, obs: PyTorchObs, actions: th.Tensor | None, masks: np.ndarray | None) -> TokenView:
        policy: Any = self.policy
        view = token_view(policy.get_distribution(obs, action_masks=masks))
        assert isinstance(view, CategoricalTokens)
        # sb3-contrib gives -1e8 to what is ruled out
        return CategoricalTokens(view.log_probs.masked_fill(view.log_probs < -1e7, -math.inf))

    def _softmax(self, q_values: th.Tensor) -> TokenView:
        return CategoricalTokens(th.log_softmax(q_values / self.temperature, dim=-1).unsqueeze(1))

    def _read_squashed_actor(self, obs: PyTorchObs) -> TokenView:
        actor: Any = self.policy.actor
        mean, log_std, kwargs = actor.get_action_dist_params(obs)
        return token_view(actor.action_dist.proba_distribution(mean, log_std, **kwargs))

    def _read_deterministic(self, obs: PyTorchObs) -> TokenView:
        actions = self.policy._predict(obs, deterministic=True)
        actions = actions.reshape(len(actions), -1).float()
        if isinstance(self.action_space, spaces.Box) and self.policy.squash_output:
            low, high = (
                actions.new_tensor(bound).flatten() for bound in (self.action_space.low, self.action_space.high)
            )
            actions = low + 0.5 * (actions + 1.0) * (high - low)
        return self._smooth(actions)

    def label(self, env: VecEnv, indices: np.ndarray) -> np.ndarray:
        masks = self._action_masks(env, indices) if self._masked else None
        if not self.sees_raw:
            assert masks is not None
            return masks.astype(np.float32)
        observations = map_obs(th.as_tensor, raw_observations(env, indices))
        return self.opinion(observations, None, masks).flatten().cpu().numpy()

    def _action_masks(self, env: VecEnv, indices: np.ndarray) -> np.ndarray:
        masks = np.stack(env.env_method("action_masks", indices=[int(index) for index in indices]))
        masks = masks.reshape(len(masks), -1).astype(bool)
        if masks.shape[1] != self._n_masks:
            raise ValueError(
                f"action_masks() returned {masks.shape[1]} values, {self.action_space} has {self._n_masks} choices."
            )
        return masks

    def distribution(self, observations: PyTorchObs, labels: th.Tensor, actions: th.Tensor | None = None) -> TokenView:
        if self.sees_raw:
            return self.spec.from_flat(labels)
        masks = labels.cpu().numpy() > 0 if self._masked else None
        return self.opinion(observations, actions, masks).to(labels.device)

    @th.no_grad()
    def opinion(self, observations: PyTorchObs, actions: th.Tensor | None, masks: np.ndarray | None) -> TokenView:
        """
        :param observations: Raw observations
        :param actions: The student's actions there, for an autoregressive policy
        :param masks: Action masks, for a policy that was trained with them
        :return: The policy's distribution, on its own device
        """
        self.policy.set_training_mode(False)
        try:
            # A large teacher may have a device of its own
            observations = self._adapt(map_obs(lambda x: x.to(self.policy.device), observations))
            actions = None if actions is None else actions.to(self.policy.device)
            view = self._read(observations, actions, masks)
        except (ValueError, FloatingPointError) as error:
            # How torch's and the VLA's distributions refuse NaN
            if "nan" not in str(error).lower():
                raise
            raise _nan_teacher() from error
        if isinstance(view, GaussianTokens) and view.squashed and not self.spec.squashed:
            return unsquash(view, self.action_space, self.std)
        return view.detach()


def check_finite(view: TokenView) -> None:
    """
    :param view: A teacher's opinion
    :raises FloatingPointError: It is NaN, or a Gaussian without a finite mean and a positive standard deviation
    """
    flat = view.flatten()
    if bool(th.isnan(flat).any()) or (isinstance(view, GaussianTokens) and not bool(th.isfinite(flat).all())):
        raise _nan_teacher()


def check_answer(view: TokenView, spec: TokenSpec, n_states: int) -> None:
    """
    :param view: What a teacher, which others may have written, says of some states
    :param spec: The student's tokens
    :param n_states: Number of the states
    :raises ValueError: It is another kind of distribution, of another shape, or not normalised
    """
    kind: type = CategoricalTokens if spec.n_bins else GaussianTokens
    shape = (n_states, spec.n_tokens, spec.n_bins) if spec.n_bins else (n_states, spec.n_tokens)
    found = view.log_probs if isinstance(view, CategoricalTokens) else getattr(view, "mean", th.empty(0))
    if not isinstance(view, kind) or tuple(found.shape) != shape:
        raise ValueError(
            f"The teacher's distribution() has to return {kind.__name__} of shape {shape} for the student's action "
            f"space, got {type(view).__name__} of shape {tuple(found.shape)}."
        )
    if isinstance(view, CategoricalTokens):
        total = view.log_probs.float().logsumexp(-1)
        if bool((total.abs() > 0.05).any()):
            raise ValueError(
                "The teacher's distribution() has to return log-probabilities, whose exponentials sum to 1; here the "
                f"sum is up to {float(total.max().exp()):.3g}. Of logits: CategoricalTokens(logits.log_softmax(-1))."
            )


def _nan_teacher() -> FloatingPointError:
    return FloatingPointError(
        "The teacher's outputs are NaN or infinite. Check its weights, and that its observations look like those it "
        "was trained on (stable_baselines3's VecCheckNan finds NaN in observations)."
    )


class ExpertTeacher(Teacher):
    """
    A scripted expert that sees the simulator's state: ``expert_action()`` of the env.

    Its label of a token does not depend on the student's tokens before it. An autoregressive student learns the
    expert's value of each action dimension even after a token that the expert would not have chosen.

    :param env: The student's env
    :param student: The student's policy
    :param std: Standard deviation given to continuous labels, as a fraction of half the action's range
    :param smoothing: See :class:`LabelSmoothing`
    :param floor: See :class:`LabelSmoothing`
    """

    privileged = True

    def __init__(self, env: VecEnv, student: BasePolicy, std: float = 0.1, smoothing: float = 1.0, floor: float = 0.01):
        if not all(env.get_attr("has_expert") if env.has_attr("has_expert") else [env.has_attr("expert_action")]):
            raise ValueError(
                'teacher="expert" needs an env with a scripted expert: a method expert_action() that returns the '
                "action to take in the present state, or, for chunks of more than one action, a method "
                "expert_chunk(chunk_size) that returns that many of them. "
                f"{env_id_of(env) or 'This env'} has none."
            )
        # Only our wrappers bring a label through others, which may change actions
        ours = [env.env_is_wrapped(wrapper) for wrapper in (EpisodeControl, ActionTokens)]
        if any(env.env_is_wrapped(gym.ActionWrapper)) and not all(map(any, zip(*ours, strict=True))):
            raise ValueError(
                'teacher="expert": a wrapper of the envs changes actions. Wrap each env in '
                "opd_gym.envs.wrappers.EpisodeControl, outermost, which brings the expert's actions through it."
            )
        self.action_space = env.action_space
        self.spec = token_spec(env.action_space, squashed=student.squash_output)
        # Bins of a tokenised number have neighbours; the values of any other discrete action are only names
        ordered = self.spec.n_bins > 0 and all(env.env_is_wrapped(ActionTokens))
        self._smooth = LabelSmoothing(self.spec, env.action_space, ordered, std, smoothing, floor)

    def label(self, env: VecEnv, indices: np.ndarray) -> np.ndarray:
        try:
            actions = env.env_method("expert_action", indices=[int(index) for index in indices])
        except AttributeError as error:
            raise ValueError(
                f'teacher="expert": the env has no scripted expert ({error}). Use another teacher.'
            ) from error
        labels = np.asarray(actions, dtype=np.float32).reshape(len(actions), -1)
        if labels.shape[1] != self.spec.n_tokens:
            raise ValueError(
                f"expert_action() returned {labels.shape[1]} numbers, the action space has {self.spec.n_tokens} tokens."
            )
        bins = self._smooth.n_bins
        if not np.isfinite(labels).all():
            wrong = "NaN or infinity"
        elif bins is not None and not ((labels == np.floor(labels)) & (labels >= 0) & (labels < bins)).all():
            wrong = f"what is no action of {self.action_space}"
        else:
            return labels
        raise ValueError(f"expert_action() returned {wrong}: {np.asarray(actions).tolist()!s:.200}.")

    @th.no_grad()
    def distribution(self, observations: PyTorchObs, labels: th.Tensor, actions: th.Tensor | None = None) -> TokenView:
        return self._smooth(labels)


class LabelSmoothing:
    """
    From one action to a distribution around it.

    Categorical tokens get ``floor`` spread over all bins (a reverse KL needs some probability everywhere) and the rest
    on the label: on the label alone, or, where bins are ordered, in the shape of a Gaussian over its neighbours.
    Continuous tokens get a Gaussian.

    :param spec: Token specification
    :param action_space: The env's action space
    :param ordered: Whether neighbouring bins are similar actions
    :param std: Standard deviation for continuous actions, as a fraction of half the action's range
    :param smoothing: Standard deviation over ordered bins, in bins
    :param floor: Probability spread over all bins
    """

    def __init__(
        self,
        spec: TokenSpec,
        action_space: spaces.Space,
        ordered: bool,
        std: float = 0.1,
        smoothing: float = 1.0,
        floor: float = 0.01,
    ):
        check_range("(0, inf)", std=std)
        check_range("[0, inf)", smoothing=smoothing)
        check_range("(0, 1)", floor=floor)
        self.spec = spec
        #: Number of bins of each token; None for continuous tokens
        self.n_bins: np.ndarray | None = None
        if spec.n_bins:
            self.n_bins = np.full(spec.n_tokens, spec.n_bins)
            if isinstance(action_space, spaces.MultiDiscrete):
                self.n_bins = action_space.nvec.flatten()
            self.log_probs = th.as_tensor(
                np.stack([self._table(n, spec.n_bins, ordered * smoothing, floor) for n in self.n_bins])
            )
        else:
            assert isinstance(action_space, spaces.Box)
            self.low, self.high = (th.as_tensor(b.flatten()).float() for b in (action_space.low, action_space.high))
            self.std = std

    @staticmethod
    def _table(n_bins: int, width: int, sigma: float, floor: float) -> np.ndarray:
        """Log-probabilities of every bin for every label, (width, width), -inf where a token has fewer bins."""
        table = np.full((width, width), -np.inf, dtype=np.float32)
        table[:n_bins, :n_bins] = np.log(smoothed_labels(n_bins, sigma, floor))
        return table

    def __call__(self, labels: th.Tensor) -> TokenView:
        """
        :param labels: Actions, (batch, T)
        :return: Distributions around them
        """
        if self.spec.n_bins:
            tables = self.log_probs.to(labels.device)
            return CategoricalTokens(tables[th.arange(self.spec.n_tokens, device=labels.device), labels.long()])
        low, high = self.low.to(labels.device), self.high.to(labels.device)
        half_range = 0.5 * (high - low)
        if not self.spec.squashed:
            return GaussianTokens(labels, (self.std * half_range).log().expand_as(labels))
        # In the coordinates before the tanh; an action on the bound itself would lie at infinity
        squashed = ((labels - low) / half_range - 1.0).clamp(-1.0 + self.std**2, 1.0 - self.std**2)
        return GaussianTokens(th.atanh(squashed), (self.std / (1.0 - squashed**2)).log(), squashed=True)


def unsquash(view: GaussianTokens, action_space: spaces.Space, least_std: float = 0.1) -> GaussianTokens:
    """
    The Gaussian with the mean and the variance of a squashed Gaussian, in the units of the action space.

    Of all Gaussians it is the closest to the squashed one in forward KL. Moments by Gauss-Hermite quadrature.

    :param view: Squashed Gaussian over [-1, 1]
    :param action_space: The env's action space
    :param least_std: Smallest standard deviation, as a fraction of half the range: a saturated tanh has none left
    :return: Gaussian over actions
    """
    assert isinstance(action_space, spaces.Box)
    nodes, weights = hermite_nodes(view.mean)
    samples = th.tanh(view.mean.unsqueeze(-1) + view.log_std.exp().unsqueeze(-1) * nodes)
    mean = (samples * weights).sum(dim=-1)
    std = ((samples - mean.unsqueeze(-1)) ** 2 * weights).sum(dim=-1).sqrt().clamp(min=least_std)
    low, high = (mean.new_tensor(bound).flatten() for bound in (action_space.low, action_space.high))
    half_range = 0.5 * (high - low)
    return GaussianTokens(low + (mean + 1.0) * half_range, (std * half_range).log())


# ---------------------------------------------------------------------------------------------------------------------
# From a specification to a teacher


def make_teacher(
    spec: Any,
    env: VecEnv,
    student: BasePolicy,
    device: th.device | str | None = None,
    dtype: str | th.dtype | None = None,
    custom_objects: dict[str, Any] | None = None,
    vec_normalize: Any = None,
    trust: bool = False,
    shard: bool = False,
    **kwargs: Any,
) -> Teacher:
    """
    Build a teacher and check that it fits the student: action space, bins, statistics, observations.

    :param spec: The directory of a VLA checkpoint or of a run; the zip of any model of Stable-Baselines3, sb3-contrib
        or this library; the name of a checkpoint of the zoo; the id of a VLA or of a model of Stable-Baselines3 on the
        Hugging Face hub; "expert" for the env's scripted expert; a live policy or model; a :class:`Teacher`; None for
        the teacher that the zoo has for this env
    :param env: The student's env
    :param student: The student's policy
    :param device: Device of a teacher that is read from files; None: the student's
    :param dtype: "bfloat16" or "float32": type in which a VLA that is read from files computes, and of its weights;
        None: float32
    :param custom_objects: Attributes of a saved model to use instead of those in the zip, as in
        Stable-Baselines3's ``load()``
    :param vec_normalize: The ``VecNormalize`` that the teacher was trained behind, or the file that its ``save()``
        wrote; False for a teacher of raw observations. None: the file beside a zip as ``CheckpointCallback``, rl-zoo3
        and the hub leave it, or the ``VecNormalize`` of a live model; a teacher without one sees raw observations
    :param trust: Open a zip and its ``VecNormalize`` whatever they hold; code in them runs
    :param shard: In a training with several ranks, spread the weights of a VLA that is read from files over the GPUs of
        all ranks; they are gathered layer by layer whenever it is asked. With one process it changes nothing
    :param kwargs: Arguments of :class:`PolicyTeacher` or :class:`ExpertTeacher`
    :return: The teacher
    """
    if not isinstance(shard, bool):
        raise ValueError(f"shard must be True or False, got {shard!r}.")
    if shard and device is not None:
        raise ValueError(f"A teacher with shard=True lies on the devices of all ranks: leave out device={device!r}.")
    if not (spec is None or isinstance(spec, (str, os.PathLike))) or spec == "expert":
        given = {
            key: value
            for key, value in (
                *(("device", device), ("dtype", dtype), ("custom_objects", custom_objects)),
                ("shard", shard or None),
            )
            if value is not None
        }
        if given:
            raise ValueError(f"teacher_kwargs {given} are for a teacher that is read from files, got {spec!r}.")
    kind: type = ExpertTeacher if isinstance(spec, str) and spec == "expert" else PolicyTeacher
    known = [n for n in inspect.signature(kind).parameters if n not in ("policy", "env", "student", "shard")]
    if isinstance(spec, Teacher):
        kind, known = type(spec), []
    if unknown := sorted(set(kwargs) - set(known)):
        raise ValueError(f"Unknown teacher_kwargs {unknown}: {kind.__name__} takes {known or 'none, it is ready'}.")
    if isinstance(spec, Teacher):
        if isinstance(spec, PolicyTeacher) and spec.sees_raw != hides_raw_observations(env):
            raise ValueError(
                "This PolicyTeacher was made for another env, whose observations are normalised or incomplete where "
                "those of this env are not, or the other way round. Pass its policy, and make_teacher's arguments as "
                "teacher_kwargs."
            )
        return spec
    if isinstance(spec, str) and spec == "expert":
        if vec_normalize:
            raise ValueError('teacher="expert" looks at the simulator: leave out vec_normalize.')
        return ExpertTeacher(env, student, **kwargs)
    if isinstance(spec, BaseAlgorithm):
        vec_normalize = spec.get_vec_normalize_env() if vec_normalize is None else vec_normalize
        spec = spec.policy
    if isinstance(vec_normalize, (str, os.PathLike)):
        vec_normalize = read_vec_normalize(vec_normalize, trust)
    elif not (vec_normalize is None or vec_normalize is False or isinstance(vec_normalize, VecNormalize)):
        raise ValueError(
            f"Expected vec_normalize to be a path, a VecNormalize, False or None, got {vec_normalize!r:.80}."
        )
    if isinstance(spec, BasePolicy):
        return PolicyTeacher(spec, env, student, vec_normalize=vec_normalize or None, **kwargs)
    if spec is not None and not isinstance(spec, (str, os.PathLike)):
        raise ValueError(
            'Expected teacher to be a path, the name of a checkpoint of the zoo, "expert", a policy, a model or None, '
            f"got {type(spec).__name__}."
        )
    # Building networks draws random numbers; the student's run must not depend on the kind of its teacher
    with preserved_rng():
        path, policy = _load_teacher(spec, env, dtype, custom_objects, trust)
    beside = find_vec_normalize(path, env_id_of(env)) if vec_normalize is None and path.is_file() else None
    shard = shard and ranks.world_size() > 1
    if not shard:  # shard() takes its parts to where they belong: the whole of it may not fit there
        policy = policy.to(student.device if device is None else get_device(check_device(device)))
    if shard:
        kwargs["shard"] = True
    if beside is None:
        return PolicyTeacher(policy, env, student, vec_normalize=vec_normalize or None, **kwargs)
    try:
        teacher = PolicyTeacher(policy, env, student, vec_normalize=read_vec_normalize(beside, trust), **kwargs)
    except ValueError as error:
        raise ValueError(f"Teacher {path}, with the VecNormalize in {beside}: {error}") from error
    if teacher.sees:
        teacher.sees += f" (VecNormalize in {beside})"
    return teacher


def _load_teacher(
    spec: str | os.PathLike[str] | None,
    env: VecEnv,
    dtype: str | th.dtype | None,
    custom_objects: dict[str, Any] | None,
    trust: bool,
) -> tuple[Path, BasePolicy]:
    """Where the teacher was found, and its policy."""
    if spec is None:
        env_id = env_id_of(env)
        spec = find_teacher(env_id) if env_id else None
        if spec is None:
            partial = teachers_for_some_tasks(env_id) if env_id else {}
            raise ValueError(
                f"No teacher given, and the zoo has none for {env_id or 'this env'}. Pass teacher= (--teacher): the "
                'directory of a VLA checkpoint, the zip of a model of Stable-Baselines3 or sb3-contrib, "expert" where '
                "the env has a scripted expert, or a policy."
                + "".join(f" The zoo's {name} is for {', '.join(tasks)} alone." for name, tasks in partial.items())
            )
    try:
        path = resolve_checkpoint(spec)
        space = raw_observation_space(env)
        return path, load_policy(path, space, env.action_space, dtype, False, custom_objects, trust)
    except FileNotFoundError as error:
        raise FileNotFoundError(f'Teacher {os.fspath(spec)!r} not found: {error} Or "expert".') from error
    except ValueError as error:
        raise ValueError(f"Teacher {os.fspath(spec)!r}: {error}") from error
