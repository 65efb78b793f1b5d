"""Supervised fine-tuning (behaviour cloning) from demonstrations: the warm start of a student or a teacher."""

from __future__ import annotations

import math
import time
import warnings
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common import utils
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.preprocessing import is_image_space, is_image_space_channels_first
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, PyTorchObs, Schedule
from stable_baselines3.common.utils import obs_as_tensor

from opd_gym import ranks
from opd_gym.algorithms.common import (
    PolicyAlgorithm,
    accumulate_gradients,
    augment,
    check_augmentation,
    zoo_hyperparams,
)
from opd_gym.algorithms.losses import masked_mean, smoothed_labels
from opd_gym.algorithms.randomness import set_rng_states
from opd_gym.checks import check_at_least_one, check_flag, check_range
from opd_gym.demonstrations import Demonstrations, PathLike
from opd_gym.demonstrations.dataset import REFUSE_OUTSIDE, check_within, share_outside
from opd_gym.observations import obs_rows
from opd_gym.policies.loading import checkpoint_settings
from opd_gym.tokens import CategoricalTokens, TokenView

SelfSFT = TypeVar("SelfSFT", bound="SFT")

DEFAULT_N_BINS = 256


@dataclass(frozen=True)
class SFTMetrics:
    """
    :param loss: The loss that was differentiated
    :param neg_log_prob: Negative log-probability of the demonstrated action, per token
    :param accuracy: Fraction of tokens whose mode is the demonstrated one; NaN for continuous actions
    :param error: Mean distance of the mode from the demonstrated action, in bins or in units of the action
    :param entropy: Entropy of the policy, per token
    """

    loss: float
    neg_log_prob: float
    accuracy: float
    error: float
    entropy: float


class SFTLoss:
    """
    Negative log-likelihood of demonstrated actions, with labels that spread over the neighbouring bins.

    A demonstrated action is right to a few bins, not to one: a Gaussian around the label says so.

    :param label_smoothing: Standard deviation of the label over neighbouring bins, in bins; 0 is plain cross-entropy.
        Meant for ordered bins, no effect on continuous actions
    """

    def __init__(self, label_smoothing: float = 0.0):
        check_range("[0, inf)", label_smoothing=label_smoothing)
        self.label_smoothing = label_smoothing
        self._targets: th.Tensor | None = None

    def __call__(
        self, view: TokenView, actions: th.Tensor, mask: th.Tensor | None = None
    ) -> tuple[th.Tensor, SFTMetrics]:
        """
        :param view: The policy's distributions of T tokens
        :param actions: Demonstrated tokens, or continuous actions, (batch, T)
        :param mask: 1 for tokens that count, (batch, T); by default all
        :return: A scalar loss with gradient, and metrics
        """
        log_prob = view.log_prob(actions)
        mask = th.ones_like(log_prob) if mask is None else mask
        mode = view.mode().detach()
        accuracy = math.nan
        losses = -log_prob
        if isinstance(view, CategoricalTokens):
            accuracy = masked_mean((mode == actions).float(), mask).item()
            if self.label_smoothing > 0.0:
                targets, log_probs, padding = self._table(view.log_probs)[actions.long()], view.log_probs, view.padding
                if padding is not None:
                    # A bin that a token does not have carries no label, and 0 * -inf is NaN
                    targets = targets.masked_fill(padding, 0.0)
                    targets = targets / targets.sum(dim=-1, keepdim=True)
                    log_probs = log_probs.masked_fill(padding, 0.0)
                losses = -(targets * log_probs).sum(dim=-1)
        loss = masked_mean(losses, mask)
        with th.no_grad():
            metrics = SFTMetrics(
                loss=loss.item(),
                neg_log_prob=-masked_mean(log_prob, mask).item(),
                accuracy=accuracy,
                error=masked_mean((mode - actions).abs().float(), mask).item(),
                entropy=masked_mean(view.entropy(), mask).item(),
            )
        return loss, metrics

    def _table(self, log_probs: th.Tensor) -> th.Tensor:
        """Target distribution of every label, (V, V)."""
        n_bins = log_probs.shape[-1]
        if self._targets is None or len(self._targets) != n_bins or self._targets.device != log_probs.device:
            table = smoothed_labels(n_bins, self.label_smoothing)
            self._targets = th.as_tensor(table, dtype=th.float32, device=log_probs.device)
        return self._targets


def _n_values(space: spaces.Space) -> Any:
    """Numbers of values of a discrete action."""
    if isinstance(space, spaces.MultiBinary):
        return 2
    return space.nvec.ravel() if isinstance(space, spaces.MultiDiscrete) else space.n  # type: ignore[attr-defined]


def _check_values(key: str, array: np.ndarray, space: spaces.Space) -> None:
    """
    :raises ValueError: observations that the env cannot show: other pictures than from 0 to 255, or other whole numbers
        than a discrete space has; a warning where most lie outside the bounds of a Box
    """
    if not array.size:
        return
    there = f"{array.dtype} from {array.min():.5g} to {array.max():.5g}"
    told = f"`{key}` of the demonstrations has {there}, the policy expects"
    if is_image_space(space):
        if array.dtype == bool or array.min() < 0 or array.max() > 255:
            raise ValueError(f"{told} pictures from 0 to 255. Convert them to uint8.")
    elif isinstance(space, (spaces.Discrete, spaces.MultiDiscrete)):
        values = array.reshape(len(array), -1)
        if np.any(values < 0) or np.any(values >= _n_values(space)) or np.any(values != np.floor(values)):
            raise ValueError(f"{told} whole numbers in {space}.")
    elif isinstance(space, spaces.Box):
        outside = share_outside(array.reshape(len(array), -1), space.low.ravel(), space.high.ravel())
        if outside.max() > REFUSE_OUTSIDE:
            # Not all envs keep to the bounds that they name
            warnings.warn(f"{told} {space}. Scale them as the env does.", stacklevel=4)


class GradientStepProgressBar(BaseCallback):
    """Progress bar that counts gradient steps; unlike Stable-Baselines3's it needs no env."""

    def _on_training_start(self) -> None:
        from tqdm import tqdm

        self.pbar = tqdm(total=self.locals["total_timesteps"] - self.model.num_timesteps)

    def _on_step(self) -> bool:
        self.pbar.update(1)
        return True

    def _on_training_end(self) -> None:
        self.pbar.refresh()
        self.pbar.close()


class SFT(PolicyAlgorithm):
    """
    Supervised fine-tuning on demonstrations: behaviour cloning by maximum likelihood.

    One timestep is one gradient step. No env is needed: without one, the spaces are those of the demonstrations. Works
    for VLAPolicy (chunks of actions become tokens) and for every actor-critic policy of Stable-Baselines3 (demonstrated
    actions as they are). An autoregressive VLA is taught each token after the demonstrated tokens before it (teacher
    forcing), also where ``label_smoothing`` spreads the label of that token over its neighbours.

    :param policy: The policy model to use (VLAPolicy, MlpPolicy, CnnPolicy, MultiInputPolicy, ...)
    :param env: The environment that the policy is for: an id (of which one env is made), an env, or a vectorised env;
        it is not stepped
    :param demonstrations: LIBERO HDF5 file(s), directories of them, data sets of LeRobot's, or a Demonstrations object
    :param learning_rate: The learning rate, it can be a function of the current progress remaining (from 1 to 0), which
        then replaces ``lr_decay``
    :param lr_decay: "cosine" decays the learning rate to 0 over the steps of a ``learn``; "constant"
    :param warmup_steps: Number of first gradient steps over which the learning rate grows from 0
    :param batch_size: Minibatch size
    :param micro_batch_size: Number of samples that go through the policy at once; gradients are accumulated over the
        parts of a minibatch. None: the whole minibatch
    :param label_smoothing: Standard deviation, in bins, of labels over neighbouring bins; 0 is plain cross-entropy
    :param augmentation: "random_shift" shifts each image by up to 1/16 of its size, "random_shift_batch" all images of
        a minibatch by the same amount (cheaper); None does not
    :param mask_padding: Leave out what a chunk shows beyond the end of its episode (the last action, repeated)
    :param n_demos: Number of demonstrations to read from each file (LIBERO: one file per task), or of each task of
        LeRobot's; None: all
    :param chunk_size: Number of actions of one decision, where no env says so
    :param image_size: Height and width of the pictures, where no env says so; None: as they are stored
    :param demonstration_kwargs: Further arguments of ``Demonstrations.from_hdf5`` (cameras, stride, action_offset,
        lerobot)
    :param validation_fraction: Part of the episodes to validate on
    :param validation_freq: Number of gradient steps between two validations
    :param max_grad_norm: The maximum value for the gradient clipping
    :param stats_window_size: Not used, for the sake of callbacks that expect it
    :param tensorboard_log: The log location for tensorboard (if None, no logging)
    :param policy_kwargs: Additional arguments to be passed to the policy on creation
    :param verbose: 0 for no output, 1 for info messages, 2 for debug messages
    :param seed: Seed for the pseudo random generators
    :param device: Device on which the code should be run
    :param _init_setup_model: Whether or not to build the network at the creation of the instance
    """

    _own_argument = "label_smoothing"
    default_total_timesteps = 2_000
    steps_env: ClassVar[bool] = False
    progress_bar_class: ClassVar[type[BaseCallback]] = GradientStepProgressBar

    @zoo_hyperparams
    def __init__(
        self,
        policy: str | type[ActorCriticPolicy],
        env: GymEnv | str | None = None,
        demonstrations: PathLike | Sequence[PathLike] | Demonstrations | None = None,
        learning_rate: float | Schedule = 1e-3,
        lr_decay: Literal["cosine", "constant"] = "cosine",
        warmup_steps: int = 50,
        batch_size: int = 128,
        micro_batch_size: int | None = None,
        label_smoothing: float = 0.0,
        augmentation: Literal["random_shift", "random_shift_batch"] | None = None,
        mask_padding: bool = False,
        n_demos: int | None = None,
        chunk_size: int = 8,
        image_size: int | tuple[int, int] | None = None,
        demonstration_kwargs: dict[str, Any] | None = None,
        validation_fraction: float = 0.0,
        validation_freq: int = 200,
        max_grad_norm: float = 1.0,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        _init_setup_model: bool = True,
    ):
        self.augmentation = augmentation
        self.lr_decay = lr_decay
        self._check_settings()
        env, policy_kwargs = self._prepare(policy, env, policy_kwargs, verbose, seed)
        super().__init__(
            policy,
            env,
            learning_rate=learning_rate,
            policy_kwargs=policy_kwargs,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            verbose=verbose,
            device=device,
            support_multi_env=True,
            seed=seed,
        )
        self.max_grad_norm = max_grad_norm
        self.warmup_steps = warmup_steps
        self.batch_size = batch_size
        self.micro_batch_size = micro_batch_size
        self.label_smoothing = label_smoothing
        self.mask_padding = mask_padding
        self.n_demos = n_demos
        self.chunk_size = chunk_size
        self.image_size = image_size
        self.demonstration_kwargs = demonstration_kwargs
        self.validation_fraction = validation_fraction
        self.validation_freq = validation_freq
        self.loss = SFTLoss(label_smoothing)
        self.demonstrations: Any = demonstrations
        self._training_rows = self._validation_rows = np.zeros(0, dtype=np.int64)
        self._n_updates = 0
        self._split_seed: int | None = None
        if _init_setup_model:
            if demonstrations is None and env is None:
                raise ValueError(
                    "SFT expects demonstrations: LIBERO HDF5 file(s), a directory of them, a data set of LeRobot's, or "
                    "a Demonstrations."
                )
            self._setup_model()

    # ------------------------------------------------------------------------------------------------------ set-up

    def _check_settings(self) -> None:
        super()._check_settings()
        check_flag(mask_padding=getattr(self, "mask_padding", None))
        check_augmentation(self.augmentation)
        if self.lr_decay not in ("cosine", "constant"):
            raise ValueError(f'Expected lr_decay to be "cosine" or "constant", got {self.lr_decay!r}.')

    def _setup_model(self) -> None:
        # Again, because a loaded model gets its settings after __init__
        self._check_settings()
        self._setup_lr_schedule()
        self.loss = SFTLoss(self.label_smoothing)
        normalises = self.get_vec_normalize_env()
        if normalises is not None and normalises.norm_obs:
            raise ValueError(
                "Demonstrations are learned as they are recorded, and this env's VecNormalize shows the policy other "
                "observations. Leave it out (normalize: false), or pass norm_obs=False."
            )
        demonstrations, self.demonstrations = self.demonstrations, None
        if demonstrations is not None and not isinstance(demonstrations, Demonstrations):
            demonstrations = self._read(demonstrations)
        if not hasattr(self, "observation_space") or self.observation_space is None:
            self.observation_space = demonstrations.observation_space
            n_bins = None
            if self._requires_tokens:
                n_bins = checkpoint_settings(self.policy_kwargs).get("n_bins", DEFAULT_N_BINS)
            self.action_space = demonstrations.action_space(n_bins)
        self.set_random_seed(self.seed)
        if not issubclass(self.policy_class, ActorCriticPolicy):
            raise ValueError(f"SFT expects an actor-critic policy, got {self.policy_class.__name__}.")
        policy = self.policy_class(
            self.observation_space, self.action_space, self.lr_schedule, use_sde=self.use_sde, **self.policy_kwargs
        )
        self.policy = policy.to(self.device)
        self._policy_is_built()
        if demonstrations is not None:
            self.set_demonstrations(demonstrations)

    @property
    def _requires_tokens(self) -> bool:
        return bool(getattr(self.policy_class, "requires_tokens", False))

    def _read(self, paths: PathLike | Sequence[PathLike]) -> Demonstrations:
        kwargs: dict[str, Any] = dict(chunk_size=self.chunk_size, image_size=self.image_size)
        if self._requires_tokens:
            kwargs["chunk_size"] = checkpoint_settings(self.policy_kwargs).get("chunk_size", self.chunk_size)
        space = getattr(self, "observation_space", None)
        if isinstance(space, spaces.Dict):
            images = {key: box for key, box in space.spaces.items() if is_image_space(box)}
            kwargs["cameras"] = list(images)
            for box in images.values():
                shape = box.shape or ()
                kwargs["image_size"] = shape[1:] if is_image_space_channels_first(box) else shape[:2]  # type: ignore[arg-type]
            if "instruction" in space.spaces:
                kwargs["instruction_length"] = int(np.prod(space["instruction"].shape or (1,)))
        acts = getattr(self, "action_space", None)
        if isinstance(acts, spaces.MultiDiscrete) and self.env is not None:
            # An env of others' tokens may not say so; LIBERO's actions, and most arms', have 7
            action_dim = self._action_dim or 7
            if len(acts.nvec) % action_dim == 0:
                kwargs["chunk_size"] = len(acts.nvec) // action_dim
        elif isinstance(acts, spaces.Box) and self.env is not None:
            # Of chunks, or single actions
            kwargs["chunk_size"] = acts.shape[0] if len(acts.shape) == 2 else 1
        return Demonstrations.from_hdf5(paths, n_demos=self.n_demos, **{**kwargs, **(self.demonstration_kwargs or {})})

    @property
    def _action_dim(self) -> int | None:
        """Number of dimensions of an action, if an env of tokens says it."""
        if self.env is None or not self.env.has_attr("action_dim"):
            return None
        return int(self.env.get_attr("action_dim", indices=0)[0])

    def set_demonstrations(self, demonstrations: PathLike | Sequence[PathLike] | Demonstrations) -> None:
        """
        Learn from these demonstrations from now on (more of them, or after ``load``, which brings none along).

        :param demonstrations: LIBERO HDF5 file(s), directories, data sets of LeRobot's, or a Demonstrations object
        """
        data = demonstrations if isinstance(demonstrations, Demonstrations) else self._read(demonstrations)
        self._check_observations(data)
        actions = self._encode(data)
        mask = data.token_mask() if self.mask_padding else None
        if self.mask_padding and (mask is None or mask.all()):
            warnings.warn(
                "mask_padding=True leaves nothing out: the demonstrations do not say what of their labels is padding "
                "(those that hold action_chunks, as opd-gym demos writes them, never do).",
                stacklevel=2,
            )
        numbers = np.arange(len(data))
        self._validation_rows = numbers[:0]
        if self.validation_fraction > 0.0:
            if self._split_seed is None:
                # Kept in the zip: a run that goes on must not train on what it has validated on
                self._split_seed = int(np.random.randint(2**31)) if self.seed is None else self.seed
            training, validation = data.split_rows(self.validation_fraction, self._split_seed)
            numbers, self._validation_rows = training, validation
        self._training_rows = numbers
        self._actions = actions
        self._mask = mask
        self.demonstrations = data

    def _check_observations(self, data: Demonstrations) -> None:
        expected: dict[str, spaces.Space]
        arrays: dict[str, np.ndarray]
        if isinstance(self.observation_space, spaces.Dict):
            if not isinstance(data.observations, dict):
                raise ValueError(f"The demonstrations hold one array, the policy expects {self.observation_space}.")
            expected, arrays = dict(self.observation_space.spaces), data.observations
        elif isinstance(data.observations, dict):
            raise ValueError(
                f"The demonstrations hold {sorted(data.observations)}, the policy expects {self.observation_space}."
            )
        else:
            expected, arrays = {"observations": self.observation_space}, {"observations": data.observations}
        for key, space in expected.items():
            if key not in arrays:
                raise ValueError(
                    f"The demonstrations have no `{key}`, which the policy expects; they have {sorted(arrays)}."
                )
            shape: tuple[int, ...] = arrays[key].shape[1:]
            if is_image_space(space) and self._needs_transpose(shape, space):
                shape = (shape[-1], *shape[:-1])
            array = arrays[key]
            if is_image_space(space) and np.issubdtype(array.dtype, np.floating) and array.max() <= 1.0:
                raise ValueError(
                    f"`{key}` of the demonstrations has {array.dtype} from {array.min():.3g} to {array.max():.3g}, the "
                    "policy expects pictures from 0 to 255, which it divides by 255 itself. Multiply by 255 and "
                    "convert them to uint8."
                )
            if shape != space.shape:
                raise ValueError(
                    f"`{key}` of the demonstrations has shape {arrays[key].shape[1:]}, the policy expects "
                    f"{space.shape}. Pass image_size or chunk_size, or read the demonstrations with the env's."
                )
            _check_values(key, array, space)

    @staticmethod
    def _needs_transpose(shape: tuple[int, ...], space: spaces.Space) -> bool:
        # Stable-Baselines3 transposes the env's pictures; demonstrations hold them as they are looked at
        return shape != space.shape and (shape[-1], *shape[:-1]) == space.shape

    def _encode(self, data: Demonstrations) -> np.ndarray:
        """Demonstrated actions in the policy's action space, one row of T tokens each."""
        space = self.action_space
        if data.is_chunked and isinstance(space, spaces.MultiDiscrete):
            n_tokens = int(np.prod(data.actions.shape[1:]))
            if self._action_dim not in (None, data.actions.shape[2]):
                raise ValueError(
                    f"The demonstrated actions have {data.actions.shape[2]} dimensions, those of the env "
                    f"{self._action_dim}."
                )
            if n_tokens != len(space.nvec):
                raise ValueError(
                    f"The demonstrations are chunks of {data.actions.shape[1]} actions with {data.actions.shape[2]} "
                    f"dimensions, {n_tokens} tokens; the policy has {len(space.nvec)} tokens. Set chunk_size to match."
                )
            return data.tokens(int(space.nvec[0]), getattr(self.policy, "statistics", None))
        shape = space.shape or ()
        if data.actions.ndim == 3 and len(shape) == 2 and data.actions.shape[1:] != shape:
            raise ValueError(f"Demonstrated actions have shape {data.actions.shape[1:]}, the action space is {space}.")
        actions = data.actions.reshape(len(data), -1)
        if actions.shape[1] != max(1, int(np.prod(space.shape or (1,)))):
            raise ValueError(f"Demonstrated actions have shape {data.actions.shape[1:]}, the action space is {space}.")
        if not isinstance(space, spaces.Box):
            actions = actions.astype(np.int64) if actions.dtype == bool else actions
            if np.any(actions < 0) or np.any(actions >= _n_values(space)):
                raise ValueError(
                    f"Demonstrated actions reach from {actions.min()} to {actions.max()}, outside {space}."
                )
            if np.any(actions != np.floor(actions)):
                raise ValueError(
                    f"Demonstrated actions of {space} have to be whole numbers, got for instance "
                    f"{actions[actions != np.floor(actions)][0]:.3g}. Are they probabilities?"
                )
        else:
            check_within(
                actions, space.low.ravel(), space.high.ravel(), "the bounds of the action space",
                "Wrap the env as the one in which they were recorded, or rescale them.",
            )  # fmt: skip
        if isinstance(space, spaces.Box) and self.policy.squash_output:
            # Saturated actions have no finite pre-image under the tanh
            actions = np.clip(self.policy.scale_action(actions), -1.0 + 1e-6, 1.0 - 1e-6)
        return actions

    def _excluded_save_params(self) -> list[str]:
        data = ["demonstrations", "_actions", "_mask", "_training_rows", "_validation_rows", "loss"]
        return [*super()._excluded_save_params(), *data]

    # ------------------------------------------------------------------------------------------------------ training

    def _learning_rate_now(self) -> float:
        rate = self.lr_schedule(self._current_progress_remaining)
        if self.lr_decay == "cosine" and not callable(self.learning_rate):
            rate *= 0.5 * (1.0 - math.cos(math.pi * self._current_progress_remaining))
        return rate * min(1.0, (self._n_updates + 1) / max(1, self.warmup_steps))

    def _batch(self, rows: np.ndarray) -> tuple[PyTorchObs, th.Tensor, th.Tensor | None]:
        data: Demonstrations = self.demonstrations

        def prepare(array: np.ndarray, space: spaces.Space) -> th.Tensor:
            x = obs_as_tensor(array[rows], self.device)
            assert isinstance(x, th.Tensor)
            if is_image_space(space) and self._needs_transpose(tuple(x.shape[1:]), space):
                x = x.movedim(-1, 1)
            return x

        obs: PyTorchObs
        if isinstance(self.observation_space, spaces.Dict):
            assert isinstance(data.observations, dict)
            obs = {key: prepare(data.observations[key], space) for key, space in self.observation_space.spaces.items()}
        else:
            assert isinstance(data.observations, np.ndarray)
            obs = prepare(data.observations, self.observation_space)
        mask = None if self._mask is None else th.as_tensor(self._mask[rows], device=self.device).float()
        return obs, th.as_tensor(self._actions[rows], device=self.device), mask

    def train(self) -> None:
        """Take one gradient step on a random minibatch."""
        self.policy.set_training_mode(True)
        # An update that was interrupted, or refused, has left its gradients
        self.policy.optimizer.zero_grad()
        utils.update_learning_rate(self.policy.optimizer, self._learning_rate_now())
        self.logger.record("train/learning_rate", self.policy.optimizer.param_groups[0]["lr"])
        rows = self._training_rows[th.randint(len(self._training_rows), (self.batch_size,)).numpy()]
        observations, actions, mask = self._batch(rows)
        observations = augment(observations, self.observation_space, self.augmentation)
        counts = th.ones(actions.shape, device=self.device) if mask is None else mask

        def loss_of(part: slice) -> tuple[th.Tensor, SFTMetrics]:
            return self.loss(self._student(obs_rows(observations, part), actions[part]), actions[part], counts[part])

        metrics = accumulate_gradients(counts, self.micro_batch_size, loss_of)
        grad_norm = self._gradient_step()
        # Means over the interval of logging: one minibatch alone says little
        for name, value in vars(metrics).items():
            if not math.isnan(value):
                self.logger.record_mean(f"train/{name}", value)
        self.logger.record_mean("train/grad_norm", grad_norm)
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")

    def validate(self, demonstrations: Demonstrations | None = None, max_batches: int = 20) -> SFTMetrics:
        """
        Metrics of the policy, without augmentation.

        :param demonstrations: What to validate on; None: the episodes that were set aside
        :param max_batches: Upper bound on the number of minibatches
        :return: Metrics
        :raises ValueError: No episodes were set aside, or these demonstrations do not fit the policy
        """
        check_at_least_one(max_batches=max_batches)
        if demonstrations is None:
            if len(self._validation_rows) == 0:
                raise ValueError("No episodes were set aside: pass validation_fraction to SFT.")
            return self._evaluate(self._validation_rows, max_batches)
        self._check_observations(demonstrations)
        kept = self.demonstrations, self._actions, self._mask
        self.demonstrations, self._actions = demonstrations, self._encode(demonstrations)
        self._mask = demonstrations.token_mask() if self.mask_padding else None
        try:
            return self._evaluate(np.arange(len(demonstrations)), max_batches)
        finally:
            self.demonstrations, self._actions, self._mask = kept

    def _evaluate(self, rows: np.ndarray, max_batches: int) -> SFTMetrics:
        self.policy.set_training_mode(False)
        if len(rows) > max_batches * self.batch_size:
            rows = rows[np.linspace(0, len(rows) - 1, max_batches * self.batch_size).astype(int)]
        parts, weights = [], []
        with th.no_grad():
            for batch in np.array_split(rows, math.ceil(len(rows) / (self.micro_batch_size or self.batch_size))):
                obs, actions, mask = self._batch(batch)
                parts.append(self.loss(self._student(obs, actions), actions, mask)[1])
                # The metrics are means over the tokens that count
                weights.append(len(batch) if mask is None else float(mask.sum()))
        names = list(SFTMetrics.__dataclass_fields__)
        return SFTMetrics(**{n: float(np.average([getattr(p, n) for p in parts], weights=weights)) for n in names})

    def _setup_learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        reset_num_timesteps: bool = True,
        tb_log_name: str = "run",
        progress_bar: bool = False,
    ) -> tuple[int, BaseCallback]:
        self._join_ranks()
        # As Stable-Baselines3's, without an env that is reset
        self.start_time = time.time_ns()
        if self.ep_info_buffer is None or reset_num_timesteps:
            self.ep_info_buffer = deque(maxlen=self._stats_window_size)
            self.ep_success_buffer = deque(maxlen=self._stats_window_size)
        if reset_num_timesteps:
            self.num_timesteps = 0
        else:
            total_timesteps += self.num_timesteps
        self._total_timesteps = total_timesteps
        self._num_timesteps_at_start = self.num_timesteps
        if not self._custom_logger:
            self._logger = utils.configure_logger(self.verbose, self.tensorboard_log, tb_log_name, reset_num_timesteps)
        return total_timesteps, self._init_callback(callback, progress_bar)

    def learn(
        self: SelfSFT,
        total_timesteps: int | None = None,
        callback: MaybeCallback = None,
        log_interval: int = 50,
        tb_log_name: str | None = None,
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfSFT:
        """
        Train the policy.

        :param total_timesteps: Number of gradient steps; None: ``default_total_timesteps``
        :param callback: Callback(s) called at every gradient step
        :param log_interval: Number of gradient steps before logging
        :param tb_log_name: Name of the run for TensorBoard logging; None: the name of the algorithm
        :param reset_num_timesteps: Whether to start counting from 0; False resumes
        :param progress_bar: Display a progress bar using tqdm
        :return: The trained model
        """
        if self.demonstrations is None:
            raise ValueError(
                "This model has no demonstrations: pass them to SFT(...) or SFT.load(path, demonstrations=...), or "
                "call set_demonstrations(...)."
            )
        total_timesteps = self._steps_to_learn(total_timesteps, log_interval)
        with self._joined_after():
            total_timesteps, callback = self._setup_learn(
                total_timesteps, callback, reset_num_timesteps, tb_log_name or type(self).__name__, progress_bar
            )
            interrupted, self._interrupted = self._interrupted, None
            if interrupted is not None and "rng" in interrupted and not reset_num_timesteps and ranks.world_size() == 1:
                set_rng_states(interrupted["rng"])
            callback.on_training_start(locals(), globals())
            self._follow_callbacks()
            try:
                while self.num_timesteps < total_timesteps:
                    # Of all steps, those before a resume included: the learning rate goes on where it was
                    self._update_current_progress_remaining(self.num_timesteps, total_timesteps)
                    self.train()
                    self.num_timesteps += 1
                    done = self.num_timesteps >= total_timesteps
                    if len(self._validation_rows) and (self.num_timesteps % self.validation_freq == 0 or done):
                        for name, value in vars(self.validate()).items():
                            self.logger.record(f"validation/{name}", value)
                    if self.num_timesteps % log_interval == 0 or done:
                        self.dump_logs()
                    callback.update_locals(locals())
                    goes_on = callback.on_step()
                    self._follow_callbacks()
                    if not ranks.agree(goes_on):
                        break
            finally:
                callback.on_training_end()
            self._follow_callbacks()
        if self.logger.name_to_value:
            self.dump_logs()
        return self

    def dump_logs(self, iteration: int = 0) -> None:
        """
        Write log.

        :param iteration: Not used: an iteration is a gradient step
        """
        elapsed = max((time.time_ns() - self.start_time) / 1e9, 1e-9)
        done = self.num_timesteps - self._num_timesteps_at_start
        self.logger.record("time/samples_per_second", int(done * self.batch_size / elapsed))
        self.logger.record("time/time_elapsed", int(elapsed), exclude="tensorboard")
        self.logger.record("time/total_timesteps", self.num_timesteps, exclude="tensorboard")
        self.logger.dump(step=self.num_timesteps)
