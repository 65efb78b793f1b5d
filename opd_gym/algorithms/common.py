"""What every algorithm does with its policy: read its distributions, accumulate gradients, step, log, save and load."""

from __future__ import annotations

import functools
import inspect
import io
import os
import pathlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback, CallbackList, ProgressBarCallback
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.policies import (
    ActorCriticCnnPolicy,
    ActorCriticPolicy,
    BasePolicy,
    MultiInputActorCriticPolicy,
)
from stable_baselines3.common.preprocessing import is_image_space, is_image_space_channels_first
from stable_baselines3.common.save_util import load_from_zip_file
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, PyTorchObs
from stable_baselines3.common.utils import get_device
from stable_baselines3.common.vec_env import VecNormalize

from opd_gym import ranks
from opd_gym.algorithms.buffers import micro_batches, random_shift
from opd_gym.algorithms.losses import Metrics, weighted_mean
from opd_gym.algorithms.randomness import rng_states
from opd_gym.algorithms.teacher_inputs import check_action_spaces
from opd_gym.checks import check_at_least, check_range, check_schedule, check_seed, did_you_mean
from opd_gym.envs.make import env_id_of, prepare_env, with_action_dim
from opd_gym.files import replacing
from opd_gym.policies.loading import Start, check_device, find_vec_normalize, read_vec_normalize, start_from
from opd_gym.policies.optimizer import fused_by_default
from opd_gym.tokens import TokenSpec, TokenView, action_distribution, distribution_and_values, token_spec, token_view
from opd_gym.untrusted import read_attributes
from opd_gym.zoo.hyperparams import ALGORITHMS, split_hyperparams, tuned_hyperparams

SelfPolicyAlgorithm = TypeVar("SelfPolicyAlgorithm", bound="PolicyAlgorithm")
_Init = TypeVar("_Init", bound=Callable[..., None])

AUGMENTATIONS = (None, "random_shift", "random_shift_batch")
# What hyperparameters may be, which mean the same in every algorithm
_LIMITS: tuple[tuple[Callable[..., None], Any, tuple[str, ...]], ...] = (
    (check_at_least, -1, ("sde_sample_freq",)),
    (check_at_least, 0, ("seed", "warmup_steps")),
    (check_at_least, 1, ("batch_size", "chunk_size", "group_size", "micro_batch_size", "n_demos", "n_epochs")),
    (check_at_least, 1, ("n_groups", "n_steps", "stats_window_size", "teacher_interval")),
    (check_at_least, 1, ("trajectories_per_batch", "validation_freq")),
    (check_range, "[0, 1]", ("gae_lambda", "gamma")),
    (check_range, "[0, 1)", ("validation_fraction",)),
    (check_range, "[0, inf)", ("ent_coef", "label_smoothing", "vf_coef", "weight_decay")),
    (check_range, "(0, inf)", ("target_kl", "temperature")),
    (check_range, "(0, inf]", ("max_grad_norm",)),
    (check_schedule, "[0, inf)", ("learning_rate",)),
    (check_schedule, "(0, inf)", ("clip_range", "clip_range_high", "clip_range_vf")),
)
_MAY_BE_NONE = ("clip_range_vf", "micro_batch_size", "n_demos", "seed", "target_kl")


def check_hyperparams(values: Mapping[str, Any]) -> None:
    """
    :param values: Hyperparameters by name; what is not the name of one is left out
    :raises ValueError: One of them makes no sense
    """
    for check, limit, names in _LIMITS:
        given = {name: values[name] for name in names if name in values}
        for name, value in given.items():
            if value is not None:
                check(limit, **{name: value})
            elif name not in _MAY_BE_NONE:
                raise ValueError(f"{name} must be a number, got None.")


# What a VecNormalize has learned, as far as its save() keeps it
_STATISTICS = ("obs_rms", "ret_rms")


def statistics_of(env: VecNormalize | None) -> dict[str, Any] | None:
    """
    :param env: A ``VecNormalize``, or None
    :return: A copy of its statistics
    """
    return None if env is None else {name: deepcopy(getattr(env, name)) for name in _STATISTICS if hasattr(env, name)}


def set_statistics(env: VecNormalize | None, statistics: Mapping[str, Any] | None) -> None:
    """
    :param env: A ``VecNormalize``, or None
    :param statistics: See :func:`statistics_of`; None: nothing is done
    """
    for name, value in (statistics or {}).items() if env is not None else ():
        own = getattr(env, name)
        pairs = [(own[key], value[key]) for key in own] if isinstance(own, dict) else [(own, value)]
        for target, source in pairs:
            for attribute, content in vars(source).items():
                setattr(target, attribute, deepcopy(content))


def has_images(space: spaces.Space) -> bool:
    """
    :param space: Space of observations
    :return: Whether it is an image, or a Dict with one
    """
    if isinstance(space, spaces.Dict):
        return any(map(has_images, space.spaces.values()))
    return is_image_space(space)


def check_augmentation(augmentation: str | None) -> None:
    """
    :param augmentation: See :func:`augment`
    :raises ValueError: There is no such augmentation
    """
    if augmentation not in AUGMENTATIONS:
        raise ValueError(f"Expected augmentation to be one of {AUGMENTATIONS}, got {augmentation!r}.")


def policy_kwargs_over(
    defaults: Mapping[str, Any], policy_kwargs: Mapping[str, Any] | None, weight_decay: float | None = None
) -> dict[str, Any]:
    """
    :param defaults: Keyword arguments of a policy
    :param policy_kwargs: Those that were passed, which win; among those of the optimizer, one by one
    :param weight_decay: Of the optimizer, if it has one and its own arguments say nothing about it
    :return: All of them
    """
    kwargs = {**defaults, **(policy_kwargs or {})}
    parts = [kwargs_.get("optimizer_kwargs") or {} for kwargs_ in (defaults, policy_kwargs or {})]
    kwargs["optimizer_kwargs"] = {**parts[0], **parts[1]}
    if "optimizer_class" in kwargs:
        kwargs["optimizer_kwargs"] = fused_by_default(kwargs["optimizer_class"], kwargs["optimizer_kwargs"])
    if weight_decay is not None and "weight_decay" in inspect.signature(kwargs["optimizer_class"]).parameters:
        kwargs["optimizer_kwargs"].setdefault("weight_decay", weight_decay)
    return kwargs


def augment(observations: PyTorchObs, space: spaces.Space, augmentation: str | None) -> PyTorchObs:
    """
    Augment the images of a minibatch; everything else stays as it is.

    :param observations: Observations
    :param space: Their space
    :param augmentation: "random_shift" shifts each image by up to 1/16 of its size, "random_shift_batch" all images of
        one camera alike (cheaper); None: nothing
    :return: Observations
    """
    if augmentation is None:
        return observations
    if isinstance(space, spaces.Dict):
        assert isinstance(observations, dict)
        return {key: augment(observations[key], inner, augmentation) for key, inner in space.spaces.items()}  # type: ignore[misc]
    if not (isinstance(space, spaces.Box) and is_image_space(space)):
        return observations
    assert isinstance(observations, th.Tensor)
    return random_shift(observations, augmentation == "random_shift", is_image_space_channels_first(space))


def accumulate_gradients(
    mask: th.Tensor, micro_batch_size: int | None, loss_of: Callable[[slice], tuple[th.Tensor, Metrics]]
) -> Metrics:
    """
    Add the gradient of a minibatch's loss, a mean over its tokens, to what the parameters hold; a part of the
    minibatch at a time, for memory. The minibatches of all ranks are one: the mean is over the tokens of all of them,
    and the gradients of the ranks are still to be added up.

    :param mask: 1 for tokens that count, (batch, T)
    :param micro_batch_size: Number of rows of a part; None: all of them at once
    :param loss_of: From the rows of a part to its loss, a mean over its tokens, and its metrics
    :return: Metrics of the minibatch
    """
    parts = []
    of_all_ranks = ranks.share(mask.sum())
    for rows, share in micro_batches(mask, micro_batch_size):
        loss, metrics = loss_of(rows)
        (of_all_ranks * share * loss).backward()
        parts.append((share, metrics))
    return weighted_mean(parts)


def _not_finite_in(name: str, values: Any) -> list[str]:
    """Names of those arrays of a plain or Dict observation that hold NaN or infinity."""
    if isinstance(values, dict):
        return [found for key, value in values.items() for found in _not_finite_in(f"{name}[{key!r}]", value)]
    return [] if bool(th.isfinite(th.as_tensor(values)).all()) else [name]


def _zip_path(path: str | os.PathLike[str]) -> pathlib.Path:
    """A file whose name may go without its ``.zip``."""
    file = pathlib.Path(path)
    return file if file.exists() or file.suffix == ".zip" else file.with_name(f"{file.name}.zip")


class DecisionProgressBar(ProgressBarCallback):
    """
    Progress bar that counts decisions (envs that stand still make none) and says when the policy learns from
    them. It stays full while the last iteration, a whole one, makes more than was asked for.
    """

    def _on_rollout_start(self) -> None:
        self.pbar.set_description("acting")

    def _on_step(self) -> bool:
        done = self.model.num_timesteps - self.model._num_timesteps_at_start
        self.pbar.update(min(done, self.pbar.total or done) - self.pbar.n)
        return True

    def _on_rollout_end(self) -> None:
        self.pbar.set_description("learning")


def zoo_hyperparams(init: _Init) -> _Init:
    """
    Decorator of an algorithm's ``__init__``: what is passed is checked. Where it gets the id of an env that the zoo has
    hyperparameters for, what is not passed is the zoo's, as on the command line. Another policy than the zoo's is
    another matter.
    """
    parameters = inspect.signature(init).parameters
    names = list(parameters)[1:]
    # "auto", for instance
    words = {name: item.default for name, item in parameters.items() if isinstance(item.default, str)}

    @functools.wraps(init)
    def with_zoo(self: PolicyAlgorithm, *args: Any, **kwargs: Any) -> None:
        passed = {**dict(zip(names, args, strict=False)), **kwargs}
        check_hyperparams({k: v for k, v in passed.items() if not (isinstance(v, str) and v == words.get(k))})
        env_id, policy = passed.get("env"), passed.get("policy")
        if not isinstance(env_id, str) or policy is None or len(args) > len(names):
            return init(self, *args, **kwargs)
        entry = self._zoo_entry(env_id, self._get_policy_from_name(policy) if isinstance(policy, str) else policy)
        if entry is None:
            return init(self, *args, **kwargs)
        run, tuned = split_hyperparams(self._zoo_name(), entry, type(self))
        if passed.get("verbose", 0) >= 1:
            from_zoo = [f"{name}={value}" for name, value in entry.items() if name != "policy" and name not in passed]
            print(f"From the zoo, for {env_id}: {', '.join(from_zoo)}")
            print(f"Passed instead: {', '.join(name for name in tuned if name in passed) or 'nothing'}")
        if tuned.get("policy_kwargs") and passed.get("policy_kwargs"):
            passed["policy_kwargs"] = policy_kwargs_over(tuned["policy_kwargs"], passed["policy_kwargs"])
        self.default_total_timesteps = run.get("n_timesteps", type(self).default_total_timesteps)
        return init(self, **{**tuned, **passed})

    return with_zoo  # type: ignore[return-value]


def _in_shards(train: Callable[[Any], None]) -> Callable[[Any], None]:
    """A method ``train``, in which sharded weights are gathered layer by layer, and after which they are whole."""

    @functools.wraps(train)
    def in_shards(self: PolicyAlgorithm) -> None:
        if self._sharding is None:
            return train(self)
        self._sharding.spread()
        train(self)
        self._sharding.gather()

    return in_shards


class PolicyAlgorithm(BaseAlgorithm):
    """Base of all algorithms here, those without rollouts (SFT) included."""

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": ActorCriticPolicy,
        "CnnPolicy": ActorCriticCnnPolicy,
        "MultiInputPolicy": MultiInputActorCriticPolicy,
    }
    # Without a critic nothing is bootstrapped from, or computed for, an untrained value network
    uses_critic: ClassVar[bool] = False
    default_total_timesteps: int = 20_000
    # Whether an env that is made from its id gets all the slots that its training defaults ask for
    steps_env: ClassVar[bool] = True

    progress_bar_class: ClassVar[type[BaseCallback]] = DecisionProgressBar
    # An argument that no other algorithm has: by it a zip shows which of them saved it. Every zip has this one
    _own_argument: ClassVar[str] = "policy_class"

    policy: ActorCriticPolicy
    # What a saved model needs to go on as if it had not been interrupted
    _interrupted: dict[str, Any] | None = None
    # Arguments that a loaded model keeps as they were
    _fixed_arguments: ClassVar[tuple[str, ...]] = ("policy", "weight_decay")
    _start_state: Start | None = None
    max_grad_norm: float
    _n_updates: int

    # ------------------------------------------------------------------------------------------------------ set-up

    def __init__(self, *args: Any, device: th.device | str = "auto", seed: int | None = None, **kwargs: Any):
        device = check_device(ranks.local_device(device))
        if not ranks.is_main():
            kwargs.update(verbose=0, tensorboard_log=None)
        super().__init__(*args, device=device, seed=check_seed(seed), **kwargs)  # type: ignore[misc]

    def _get_policy_from_name(self, policy_name: str) -> type[BasePolicy]:
        if policy_name == "VLAPolicy":
            # Lazy: a VLA imports transformers
            from opd_gym.policies.vla import VLAPolicy

            return VLAPolicy
        if policy_name not in self.policy_aliases:
            known = ["VLAPolicy", *self.policy_aliases]
            raise ValueError(f"Unknown policy {policy_name!r}: expected one of {known}, or a policy class.")
        return super()._get_policy_from_name(policy_name)

    def _prepare(
        self,
        policy: str | type[BasePolicy],
        env: GymEnv | str | None,
        policy_kwargs: dict[str, Any] | None,
        verbose: int,
        seed: int | None,
    ) -> tuple[Any, dict[str, Any] | None]:
        """
        The env and the arguments of the policy, as they fit each other; with a checkpoint among them that is the zip of
        a model, what that says.

        :return: The env, and keyword arguments of the policy
        """
        policy_class: type[BasePolicy] = self._get_policy_from_name(policy) if isinstance(policy, str) else policy
        policy_kwargs, self._start_state = start_from(policy_class, policy_kwargs)
        if env is None:
            return None, policy_kwargs
        prepared = self._prepare_env(env, policy_class, policy_kwargs, verbose, seed)
        return prepared, with_action_dim(prepared, policy_class, policy_kwargs)

    @classmethod
    def _prepare_env(
        cls,
        env: GymEnv | str,
        policy_class: type[BasePolicy],
        policy_kwargs: dict[str, Any] | None,
        verbose: int,
        seed: int | None,
    ) -> Any:
        """See :func:`prepare_env`."""
        entry = cls._zoo_entry(env, policy_class) if isinstance(env, str) else None
        seed = ranks.rank_seed(check_seed(seed))
        return prepare_env(env, policy_class, policy_kwargs, verbose, seed, None if cls.steps_env else 1, entry)

    @classmethod
    def _zoo_name(cls) -> str:
        """Name of the algorithm in the zoo, for subclasses that others write as well."""
        return next(name for name in (base.__name__.lower() for base in cls.__mro__) if name in ALGORITHMS)

    @classmethod
    def _zoo_entry(cls, env_id: str, policy_class: type[BasePolicy]) -> dict[str, Any] | None:
        """The zoo's hyperparameters for an env id and the policy that they are for."""
        entry = tuned_hyperparams(cls._zoo_name(), env_id)
        name = "MlpPolicy" if entry is None else entry.get("policy", "MlpPolicy")
        fits = policy_class.__name__ == name or cls.policy_aliases.get(name) is policy_class
        return entry if fits else None

    def set_env(self, env: GymEnv | str, force_reset: bool = True) -> None:
        """
        Set the environment to go on with.

        :param env: The environment; an id or a raw env is wrapped as in the constructor
        :param force_reset: Force a reset before training
        """
        prepared = self._prepare_env(env, self.policy_class, self.policy_kwargs, self.verbose, self.seed)
        super().set_env(prepared, force_reset)

    def set_random_seed(self, seed: int | None = None) -> None:
        """
        Set the seed of the pseudo-random generators (Python, NumPy, PyTorch, Gymnasium); each rank has one of its own.

        :param seed: The seed; Python's generator takes no integer of NumPy's
        """
        seed = ranks.rank_seed(None if seed is None else int(seed))
        super().set_random_seed(seed)
        if getattr(self, "policy", None) is not None:  # not while the model is set up
            self._begin_anew(seed)

    def _begin_anew(self, seed: int | None) -> None:
        """
        Go on with a seed of its own, and not with the random numbers that would have come.

        :param seed: The seed of this rank
        """
        if self._interrupted is not None:
            self._interrupted = {key: value for key, value in self._interrupted.items() if key != "rng"}

    def set_logger(self, logger: Logger) -> None:
        """
        Log to this logger from now on; of several ranks the first one alone.

        :param logger: The logger
        """
        super().set_logger(logger if ranks.is_main() else Logger(None, []))

    @property
    def token_spec(self) -> TokenSpec:
        """Token view of the policy's actions."""
        return token_spec(self.action_space, squashed=self.policy.squash_output)

    def _policy_is_built(self) -> None:
        """Load the weights that it starts from, and keep arguments that build it where its checkpoint is gone."""
        if hasattr(self.policy, "lstm_actor"):
            raise ValueError(
                f"{type(self).__name__} does not train recurrent policies such as {type(self.policy).__name__}. Use "
                "one without memory, for instance MlpPolicy; VecFrameStack shows it several observations at once."
            )
        augmentation = getattr(self, "augmentation", None)
        if augmentation is not None and not has_images(self.observation_space):
            raise ValueError(
                f"augmentation={augmentation!r} shifts pictures, and there are none in {self.observation_space}: leave "
                "it out."
            )
        if self._start_state is not None:
            start, self._start_state = self._start_state, None
            try:
                self.policy.load_state_dict(start.state)
            except RuntimeError as error:
                raise ValueError(f"The weights of {start.path} do not fit the policy to train: {error}") from error
            self._check_start(start)
        portable_kwargs = getattr(self.policy, "portable_kwargs", None)
        if portable_kwargs is not None:
            self.policy_kwargs = portable_kwargs()

    def _check_start(self, start: Start) -> None:
        """
        The zip's policy has to see and to do in this env what it did in its own.

        :param start: See :class:`Start`
        :raises ValueError: Its actions mean something else, or it saw normalised observations
        """
        check_action_spaces(start.action_space, self.action_space, str(start.path), "the policy to train")
        file = find_vec_normalize(start.path, None if self.env is None else env_id_of(self.env))
        if file is None:
            return
        found, own = read_vec_normalize(file, start.trust), self.get_vec_normalize_env()
        if not found.norm_obs:
            return
        if own is None or not own.norm_obs:
            raise ValueError(
                f"The policy of {start.path} saw observations through the VecNormalize in {file}, and this env has "
                f"none: pass env=VecNormalize.load({str(file)!r}, vec_env). If it is not that policy's, move it away."
            )
        moments = own.obs_rms.values() if isinstance(own.obs_rms, dict) else [own.obs_rms]
        if all(rms.count < 1 for rms in moments):
            set_statistics(own, statistics_of(found))

    def _steps_to_learn(self, total_timesteps: int | None, log_interval: int | None) -> int:
        """The number that ``learn`` was given, or the default; checks the other one as well."""
        total_timesteps = self.default_total_timesteps if total_timesteps is None else total_timesteps
        check_range("[0, inf)", total_timesteps=total_timesteps)
        check_at_least(1, log_interval=log_interval)
        return total_timesteps

    def _join_ranks(self) -> None:
        """Before a training: all ranks begin with the weights of the first one, which alone talks."""
        if self._sharding is not None:
            raise RuntimeError(
                "An earlier training ended with an error, and left the weights in parts on all ranks: load the last "
                "checkpoint and go on from it."
            )
        ranks.join()
        if not ranks.is_main():
            self.verbose, self.tensorboard_log = 0, None
        trained = [parameter for parameter in self.policy.parameters() if parameter.requires_grad]
        ranks.copy_from_main([*trained, *self.policy.buffers()])
        shard_weights = getattr(self.policy, "shard_weights", None)
        if shard_weights is not None:
            shard_weights(self.device)

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if "train" in vars(cls):
            cls.train = _in_shards(vars(cls)["train"])  # type: ignore[attr-defined]

    @property
    def _sharding(self) -> Any:
        """What spreads the policy's weights over all ranks; None where each has them all."""
        return getattr(self.policy, "sharding", None)

    @contextmanager
    def _joined_after(self) -> Iterator[None]:
        """Around a training: afterwards each rank has the whole policy again."""
        try:
            yield
        except BaseException:
            if self._sharding is not None:
                self._sharding.abandon()
            raise
        if self._sharding is not None:
            self.policy.join_weights()  # type: ignore[operator]

    def _follow_callbacks(self) -> None:
        """Where the first rank alone has had callbacks, and weights are sharded: what these saved takes all ranks."""
        if self._sharding is not None:
            self._sharding.follow()

    def _keep_pace(self) -> None:
        """After the passes of a minibatch, with sharded weights: wait for the ranks that have more of them."""
        if self._sharding is not None:
            self.policy.keep_pace(self.uses_critic)  # type: ignore[operator]

    def _init_callback(self, callback: MaybeCallback, progress_bar: bool = False) -> BaseCallback:
        # Checkpoints, evaluations and the decision to stop are the first rank's affair
        hybrid = super()._init_callback(callback if ranks.is_main() else None, progress_bar=False)
        if progress_bar and ranks.is_main():
            hybrid = CallbackList([hybrid, self.progress_bar_class()])
            hybrid.init_callback(self)
        return hybrid

    # ------------------------------------------------------------------------------------------------------ training

    def _distribution(self, obs: PyTorchObs, actions: th.Tensor | None = None) -> tuple[Any, th.Tensor]:
        """
        The policy's distribution and, for algorithms with a critic, its values.

        :param obs: Observations
        :param actions: Actions, after whose tokens an autoregressive policy gives the distributions of the next
        :return: distribution and values (zeros without a critic)
        """
        with self._nan_named(obs):
            if self.uses_critic:
                return distribution_and_values(self.policy, obs, actions)
            return action_distribution(self.policy, obs, actions), th.zeros(1, device=self.device)

    def _student(self, obs: PyTorchObs, actions: th.Tensor | None, temperature: float = 1.0) -> TokenView:
        """
        The policy's distribution as tokens, with gradient.

        :param obs: Observations
        :param actions: Actions that were taken there; only an autoregressive policy needs them
        :param temperature: Temperature to apply
        :return: Token view
        """
        return token_view(self._distribution(obs, actions)[0]).temper(temperature)

    @contextmanager
    def _nan_named(self, observations: Any) -> Iterator[None]:
        """Say what has gone wrong where the policy's outputs for these observations are NaN."""
        try:
            yield
        except (ValueError, FloatingPointError) as error:
            # How torch's and the VLA's distributions refuse NaN
            if self._weights_are_finite() and "nan" not in str(error).lower():
                raise
            raise self._not_finite("outputs of the policy", observations) from error

    def _weights_are_finite(self) -> bool:
        # Of sharded weights this rank's: others may not look
        own = (p.to_local() if hasattr(p, "to_local") else p for p in self.policy.parameters())
        return all(bool(th.isfinite(parameter).all()) for parameter in own)

    def _not_finite(self, what: str, observations: Any = None) -> FloatingPointError:
        """
        :param what: What is NaN or infinite
        :param observations: What it was computed from, if that was not the rollout
        :return: The error, which names the likeliest cause
        """
        inputs = {} if observations is None else {"observations": observations}
        buffer = getattr(self, "rollout_buffer", None)
        if observations is None and buffer is not None:
            inputs = {"observations": buffer.observations, "rewards": buffer.rewards}
        broken = [name for key, value in inputs.items() for name in _not_finite_in(key, value)]
        if broken:
            cause = (
                f"So are the {', '.join(broken)}, which came from the env: Stable-Baselines3's VecCheckNan finds when."
            )
        elif self._n_updates > 0:
            rate = self.policy.optimizer.param_groups[0]["lr"]
            cause = (
                "The training has diverged. Go on from the last checkpoint with a lower learning_rate (now "
                f"{rate:g}) or max_grad_norm (now {self.max_grad_norm:g})."
            )
        elif not self._weights_are_finite():
            cause = "Whatever the learning_rate, the policy started from weights that are NaN or infinite."
        else:
            cause = (
                "Whatever the learning_rate, that is what the training started from: look for enormous numbers in "
                "observations, labels or rewards, and in the weights."
            )
        return FloatingPointError(
            f"{type(self).__name__}: the {what} are NaN or infinite after {self._n_updates} updates and "
            f"{self.num_timesteps} timesteps. {cause}"
        )

    def _gradient_step(self) -> float:
        """
        Add up the gradients of all ranks, clip them, take an optimiser step, and clear them.

        :return: Norm of the gradients before clipping
        """
        check_range("[0, inf)", learning_rate=self.policy.optimizer.param_groups[0]["lr"])  # of a schedule
        self._keep_pace()
        if self._sharding is None:
            ranks.add_gradients(self.policy.parameters())
        grad_norm = th.nn.utils.clip_grad_norm_(self.policy.parameters(), self.max_grad_norm)
        if self._sharding is not None:
            # Of all parts
            grad_norm = getattr(grad_norm, "full_tensor", lambda: grad_norm)()
        if not bool(th.isfinite(grad_norm)):
            # Before the step: the weights are still good
            raise self._not_finite("gradients")
        self.policy.optimizer.step()
        self.policy.optimizer.zero_grad()
        self._n_updates += 1
        return grad_norm.item()

    def _idle_step(self) -> float:
        """
        Take part in an update for which this rank has no minibatch left.

        :return: Norm of the gradients of the others before clipping
        """
        ranks.share(0.0)
        return self._gradient_step()

    def _record_metrics(self, metrics: list[Any]) -> None:
        """
        Log the means of the metrics of all minibatches as ``train/*``.

        :param metrics: Dataclasses of metrics
        """
        for name in metrics[0].__dataclass_fields__ if metrics else ():
            values = [getattr(m, name) for m in metrics]
            if not np.isnan(values).all():
                self.logger.record(f"train/{name}", float(np.mean(values)))

    # ------------------------------------------------------------------------------------------------------ saving

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        return ["policy", "policy.optimizer"], []

    def get_parameters(self) -> dict[str, dict]:
        """:return: State of the policy and of its optimizer; of sharded ones the whole"""
        whole = getattr(self.policy, "whole_weights", nullcontext)
        with whole():
            return super().get_parameters()

    def save(
        self,
        path: str | pathlib.Path | io.BufferedIOBase,
        exclude: Iterable[str] | None = None,
        include: Iterable[str] | None = None,
    ) -> None:
        """
        Save the model in a zip file. A file of that name is replaced only once the new one is complete. Of several
        ranks the first one alone writes it.

        :param path: Path of the file (``.zip`` is added where there is no suffix), or a file object
        :param exclude: Names of parameters that should be excluded in addition to the default ones
        :param include: Names of parameters that might be excluded but should be included anyway
        """
        target = pathlib.Path(path) if isinstance(path, (str, os.PathLike)) else None
        if target is not None and not ranks.is_main():
            return
        # A model that was loaded and not trained is saved as it was found
        pending = self._interrupted
        self._interrupted = self._interruption() if pending is None else pending
        try:
            if target is None:
                super().save(path, exclude=exclude, include=include)
                return
            with replacing(target if target.suffix else target.with_name(f"{target.name}.zip")) as temporary:
                super().save(temporary, exclude=exclude, include=include)
        finally:
            self._interrupted = pending

    def set_parameters(
        self,
        load_path_or_dict: str | os.PathLike[str] | dict[str, Any],
        exact_match: bool = True,
        device: th.device | str = "auto",
    ) -> None:
        """
        Take the parameters of a saved model. Of one that another algorithm saved the policy alone: settings and state
        of its optimizer are of its own loss.

        :param load_path_or_dict: The zip, or what ``get_parameters()`` gave
        :param exact_match: Whether the file has to have all parameters of this model, and no others
        :param device: Device on which the code should run
        :raises ValueError: It holds no policy, or another one
        """
        if isinstance(load_path_or_dict, (str, os.PathLike)):
            path = _zip_path(load_path_or_dict)
            if self._own_argument not in read_attributes(path, keys=(self._own_argument,)):
                _, found, _ = load_from_zip_file(path, load_data=False, device=device)
                if "policy" not in found:
                    raise ValueError(
                        f"{path} holds no policy: expected what a Stable-Baselines3 model's save() writes."
                    )
                try:
                    self.policy.load_state_dict(found["policy"], strict=exact_match)  # type: ignore[arg-type]
                except RuntimeError as error:
                    raise ValueError(f"The weights of {path} do not fit the policy: {error}") from error
                return
            load_path_or_dict = path
        super().set_parameters(load_path_or_dict, exact_match, device)  # type: ignore[arg-type]

    def _interruption(self) -> dict[str, Any] | None:
        """
        Hook: what it takes to go on later as if nothing had been, beside weights, counters and settings.

        :return: Plain values and arrays; None in the middle of an iteration
        """
        return {"rng": rng_states()}

    def _leave_optimizer_behind(self, device: th.device | str) -> None:
        """
        Move a model that was read into main memory, but not the state of its optimizer.

        :param device: Where to
        """
        self.device = get_device(check_device(ranks.local_device(device)))
        self.policy.to(self.device)
        for name in ("rollout_buffer", "replay_buffer"):
            if getattr(self, name, None) is not None:
                getattr(self, name).device = self.device

    @classmethod
    def _check_changes(cls, path: Any, kwargs: Mapping[str, Any], data: Mapping[str, Any]) -> None:
        """What is to be other than in a file has to be something that a model has, and that can still be changed."""
        arguments = {name for base in cls.__mro__ for name in inspect.signature(base.__init__).parameters}  # type: ignore[misc]
        for name in kwargs:
            if name in cls._fixed_arguments:
                raise ValueError(
                    f"{name} of a model that is loaded cannot be changed. To begin with its weights, create a "
                    f"{cls.__name__} with {name}={kwargs[name]!r} and policy_kwargs={{'checkpoint': {str(path)!r}}}."
                )
            if name not in data and name not in arguments:
                raise ValueError(
                    f"{cls.__name__}.load() knows no {name}. {did_you_mean(name, {*data, *arguments})}Expected an "
                    f"argument of {cls.__name__}."
                )

    def _keep_episodes(self, n: int) -> None:
        """
        Report the mean of other than the last 100 episodes.

        :param n: How many
        """
        check_hyperparams({"stats_window_size": n})
        self._stats_window_size = n
        for name in ("ep_info_buffer", "ep_success_buffer"):
            if getattr(self, name) is not None:
                setattr(self, name, deque(getattr(self, name), maxlen=n))

    def _check_settings(self) -> None:
        """
        Hook: refuse settings that make no sense, in the constructor and again when ``load()`` has changed some. Not all
        are there when it is called for the first time.
        """
        check_hyperparams(vars(self))

    @classmethod
    def load(
        cls: type[SelfPolicyAlgorithm],
        path: str | pathlib.Path | io.BufferedIOBase,
        env: GymEnv | str | None = None,
        device: th.device | str = "auto",
        custom_objects: dict[str, Any] | None = None,
        print_system_info: bool = False,
        force_reset: bool = True,
        trust: bool = False,
        **kwargs: Any,
    ) -> SelfPolicyAlgorithm:
        """
        Load the model from a zip file. No code that the file holds is run, see :func:`opd_gym.untrusted.unpickle`.

        :param path: Path of the file (``.zip`` may be left out), or a file object
        :param env: The environment to go on with (None if only predictions are needed); an id or a raw env is wrapped
            as in the constructor
        :param device: Device on which the code should run
        :param custom_objects: Objects to replace upon loading
        :param print_system_info: Whether to print system info of the saved model
        :param force_reset: Force a reset before training
        :param trust: Open the file, and the teacher that it names, whatever they hold; code in them runs
        :param kwargs: Extra arguments to change the model when loading
        :return: New model with loaded parameters
        :raises FileNotFoundError: There is no such file
        :raises ValueError: It is not the zip of a model of this algorithm, holds code such as a learning rate that is a
            function, has damaged weights, or does not fit the env
        """
        file: Any = _zip_path(path) if isinstance(path, (str, os.PathLike)) else path
        data = read_attributes(file, custom_objects, trust=trust)
        if not data:
            raise ValueError(f"{path} has no attributes of a model: expected what save() writes.")
        if cls._own_argument not in data:
            raise ValueError(
                f"{path} was not saved by {cls.__name__}: it has no `{cls._own_argument}`. Load it with the algorithm "
                f"that did. To begin with its weights, create the {cls.__name__} with policy_kwargs={{'checkpoint': "
                f"{str(path)!r}}}."
            )
        if isinstance(data.get("teacher_kwargs"), dict):
            # Whether to trust is not for the file to say
            data["teacher_kwargs"] = {**data["teacher_kwargs"], "trust": trust}
        cls._check_changes(path, kwargs, data)
        # Under another name in the model
        n_kept = kwargs.pop("stats_window_size", None)
        if not isinstance(file, pathlib.Path):
            file.seek(0)
        prepared: Any = env
        if env is not None:
            prepared = cls._prepare_env(env, data["policy_class"], data["policy_kwargs"], data["verbose"], data["seed"])
        # Of an optimizer's state that is to be sharded, a GPU may not have room for the whole
        sharded = ranks.world_size() > 1 and bool((data.get("policy_kwargs") or {}).get("shard"))
        try:
            # With all attributes as custom objects Stable-Baselines3 unpickles nothing
            read_on = "cpu" if sharded else device
            model = super().load(file, prepared, read_on, data, print_system_info, force_reset, **kwargs)
            if n_kept is not None:
                model._keep_episodes(n_kept)
            if "seed" in kwargs:
                model.set_random_seed(kwargs["seed"])
            if sharded:
                model._leave_optimizer_behind(device)
            return model
        except (ImportError, FileNotFoundError, MemoryError):
            raise
        except Exception as error:  # damaged weights raise anything
            if isinstance(error, ValueError) and (not isinstance(file, pathlib.Path) or str(path) in str(error)):
                raise
            raise ValueError(f"{path}: {error}") from error
