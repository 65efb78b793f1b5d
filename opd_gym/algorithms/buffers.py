"""What algorithms store: the rollout buffer that all of them share, and the replay of states for exact distillation."""

from __future__ import annotations

import os
import pathlib
import re
import uuid
from collections.abc import Generator, Iterator, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.preprocessing import get_obs_shape
from stable_baselines3.common.utils import get_device

from opd_gym.checks import check_at_least_one, check_range
from opd_gym.files import replacing
from opd_gym.observations import map_obs
from opd_gym.tokens import TokenSpec, token_spec

# An observation, or one array per observation of a batch: an array for plain spaces, a dict of arrays for Dict spaces
ObsArray = np.ndarray | dict[str, np.ndarray]


def micro_batches(mask: th.Tensor, size: int | None) -> Iterator[tuple[slice, float]]:
    """
    Cut a minibatch into parts whose gradients add up to that of the whole, if the loss is a mean over its tokens.

    :param mask: 1 for tokens that count, (batch, T)
    :param size: Number of rows of a part; None: all
    :return: For each part its rows, and its share of the tokens that count, by which its loss is to be multiplied
    """
    parts = [slice(start, start + (size or len(mask))) for start in range(0, len(mask), size or max(len(mask), 1))]
    total = mask.sum().clamp(min=1.0)
    shares = th.stack([mask[part].sum() for part in parts]) / total
    # A minibatch in which nothing counts has a loss of 0 whatever its parts weigh
    yield from zip(parts, shares.tolist(), strict=True)


def outcome_of_step(
    infos: Sequence[dict[str, Any]], dones: np.ndarray, void: np.ndarray, n_tokens: int
) -> tuple[np.ndarray, np.ndarray]:
    """
    What the infos of a step say of the decisions that led to it.

    :param infos: Infos of all envs; ``n_executed_tokens`` where a chunk was cut short, ``is_success`` at the end
    :param dones: Whether the episode ended
    :param void: Whether the decision was not carried out
    :param n_tokens: Number of tokens of a decision
    :return: Mask of executed tokens, (n_envs, T), and outcome of the episodes that ended, NaN for the others
    """
    token_mask = np.ones((len(infos), n_tokens), dtype=np.float32)
    success = np.full(len(infos), np.nan, dtype=np.float32)
    for i, info in enumerate(infos):
        token_mask[i, 0 if void[i] else info.get("n_executed_tokens", n_tokens) :] = 0.0
        if dones[i] and "is_success" in info:
            success[i] = info["is_success"]
    return token_mask, success


class TeacherRolloutSamples(NamedTuple):
    """
    A minibatch. The first six fields are those of Stable-Baselines3.

    :param observations: Observations
    :param actions: Actions, in the dtype of the action space (Box: float32)
    :param old_values: Values at collection, (batch,)
    :param old_log_prob: Log-probabilities of the actions at collection, summed over all tokens, (batch,)
    :param advantages: (batch,)
    :param returns: (batch,)
    :param old_token_log_probs: Log-probabilities of the tokens at collection, (batch, T)
    :param token_mask: 1 for tokens that were executed, (batch, T)
    :param teacher_log_probs: Teacher's log-probabilities of the same tokens, (batch, T); zeros without a teacher
    :param teacher_distribution: Teacher's flattened distributions, (batch, flat size); empty where not stored
    :param rows: Rows of the flattened buffer, (batch,)
    """

    observations: th.Tensor | dict[str, th.Tensor]
    actions: th.Tensor
    old_values: th.Tensor
    old_log_prob: th.Tensor
    advantages: th.Tensor
    returns: th.Tensor
    old_token_log_probs: th.Tensor
    token_mask: th.Tensor
    teacher_log_probs: th.Tensor
    teacher_distribution: th.Tensor
    rows: np.ndarray


class TeacherRolloutBuffer(RolloutBuffer):
    """
    Rollout buffer of every algorithm here, for plain and Dict observations.

    Beside what Stable-Baselines3 stores it holds, per step and env: token log-probabilities, the mask of executed
    tokens, the teacher's log-probabilities and (where asked for) full distribution, a privileged teacher's actions,
    the ids of group and episode, and the outcome of finished episodes. It grows when a rollout is longer than expected,
    so episodes of any length fit; :meth:`finish` cuts it to what was filled and flattens it env by env.

    :param buffer_size: Expected number of steps of a rollout
    :param observation_space: Observation space
    :param action_space: Action space
    :param device: Device of the minibatches
    :param gae_lambda: Bias-variance trade-off of generalised advantage estimation
    :param gamma: Discount factor
    :param n_envs: Number of parallel environments
    :param store_distribution: Store the teacher's full distributions
    """

    observations: Any
    advantages: np.ndarray
    returns: np.ndarray
    token_log_probs: np.ndarray
    token_mask: np.ndarray
    teacher_log_probs: np.ndarray
    teacher_distributions: np.ndarray
    teacher_actions: np.ndarray
    group_ids: np.ndarray
    episode_ids: np.ndarray
    successes: np.ndarray

    def __init__(
        self,
        buffer_size: int,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        device: th.device | str = "auto",
        gae_lambda: float = 1.0,
        gamma: float = 0.99,
        n_envs: int = 1,
        store_distribution: bool = False,
    ):
        check_at_least_one(buffer_size=buffer_size, n_envs=n_envs)
        check_range("[0, 1]", gae_lambda=gae_lambda, gamma=gamma)
        self.spec = token_spec(action_space)
        self.store_distribution = store_distribution
        self.expected_size = buffer_size
        #: Numbers of a teacher's label of one state
        self.label_size = self.spec.n_tokens
        super().__init__(buffer_size, observation_space, action_space, device, gae_lambda, gamma, n_envs)

    def _fields(self) -> dict[str, tuple[tuple[int, ...], Any, float]]:
        """Shape of one entry, dtype and fill value of every array but the observations."""
        n_tokens = self.spec.n_tokens
        return {
            "actions": ((self.action_dim,), self.action_space.dtype, 0),
            "rewards": ((), np.float32, 0),
            "episode_starts": ((), np.float32, 0),
            "values": ((), np.float32, 0),
            "token_log_probs": ((n_tokens,), np.float32, 0),
            "token_mask": ((n_tokens,), np.float32, 0),
            "teacher_actions": ((self.label_size,), np.float32, np.nan),
            "group_ids": ((), np.int64, -1),
            "episode_ids": ((), np.int64, -1),
            "successes": ((), np.float32, np.nan),
        }

    def reset(self) -> None:
        """Forget everything and allocate room for the expected number of steps."""
        self.buffer_size = self.expected_size
        head = (self.buffer_size, self.n_envs)
        self.observations = zeros_like_space(self.observation_space, head)
        for name, (shape, dtype, fill) in self._fields().items():
            setattr(self, name, np.full((*head, *shape), fill, dtype=dtype))
        self.pos = 0
        self.full = False
        self.generator_ready = False

    def _grow(self) -> None:
        def double(array: np.ndarray, fill: float = 0) -> np.ndarray:
            return np.concatenate([array, np.full_like(array, fill)])

        self.observations = map_obs(double, self.observations)
        for name, (_, _, fill) in self._fields().items():
            setattr(self, name, double(getattr(self, name), fill))
        self.buffer_size *= 2

    def add(  # type: ignore[override]
        self,
        obs: ObsArray,
        action: np.ndarray,
        reward: np.ndarray,
        episode_start: np.ndarray,
        value: th.Tensor,
        token_log_probs: th.Tensor,
        token_mask: np.ndarray,
        group_id: np.ndarray,
        episode_id: np.ndarray,
        success: np.ndarray,
        teacher_action: np.ndarray | None = None,
    ) -> None:
        """
        One step of all environments; the first axis of everything is the environment.

        :param obs: Observations
        :param action: Actions
        :param reward: Rewards
        :param episode_start: Whether the observation is the first of an episode
        :param value: Estimated values
        :param token_log_probs: Log-probabilities of the sampled tokens, (n_envs, T)
        :param token_mask: Executed tokens, (n_envs, T); all 0 for an environment that stood still
        :param group_id: Group of each episode, -1 for none
        :param episode_id: Episode
        :param success: Outcome of the episodes that ended with this step, NaN for the others
        :param teacher_action: Labels of a privileged teacher, (n_envs, ``label_size``), NaN for none
        """
        if self.pos == self.buffer_size:
            self._grow()
        i = self.pos
        store_obs(self.observations, i, obs)
        self.actions[i] = np.asarray(action).reshape(self.n_envs, self.action_dim)
        self.rewards[i] = reward
        self.episode_starts[i] = episode_start
        self.values[i] = value.detach().cpu().numpy().flatten()
        self.token_log_probs[i] = token_log_probs.detach().cpu().numpy()
        self.token_mask[i] = token_mask
        self.group_ids[i] = group_id
        self.episode_ids[i] = episode_id
        self.successes[i] = success
        if teacher_action is not None:
            self.teacher_actions[i] = teacher_action
        self.pos += 1
        self.full = self.pos == self.buffer_size

    def finish(self, last_values: th.Tensor | None = None, dones: np.ndarray | None = None) -> None:
        """
        End of the rollout: cut to the steps that were added, compute advantages, flatten env by env.

        :param last_values: Values of the observations after the last step; None: no advantages
        :param dones: Whether the last step ended an episode
        """
        self.buffer_size = self.pos
        self.full = True
        self.observations = map_obs(lambda array: array[: self.pos], self.observations)
        for name in self._fields():
            setattr(self, name, getattr(self, name)[: self.pos])
        self.advantages = np.zeros_like(self.rewards)
        self.returns = np.zeros_like(self.rewards)
        if last_values is not None:
            assert dones is not None
            self.compute_returns_and_advantage(last_values, dones)
        # Advantages first: flattening takes the time axis away
        self.observations = map_obs(self.swap_and_flatten, self.observations)
        for name in (*self._fields(), "advantages", "returns"):
            array = getattr(self, name)
            setattr(self, name, array.swapaxes(0, 1).reshape(-1, *array.shape[2:]))
        n_rows = len(self.rewards)
        self.teacher_log_probs = np.zeros((n_rows, self.spec.n_tokens), dtype=np.float32)
        flat_size = self.spec.flat_size if self.store_distribution else 0
        self.teacher_distributions = np.zeros((n_rows, flat_size), dtype=self.spec.storage_dtype)
        self.generator_ready = True

    def set_teacher(self, rows: np.ndarray, log_probs: th.Tensor, distributions: th.Tensor | None = None) -> None:
        """
        Attach the teacher's labels to rows of the finished rollout.

        :param rows: Rows of the flattened buffer
        :param log_probs: Teacher's log-probabilities of the sampled tokens, (rows, T)
        :param distributions: Teacher's flattened distributions
        """
        self.teacher_log_probs[rows] = log_probs.detach().cpu().numpy()
        if self.store_distribution and distributions is not None:
            self.teacher_distributions[rows] = distributions.detach().cpu().numpy()

    def valid_rows(self) -> np.ndarray:
        """
        :return: Rows with at least one executed token (an environment that stood still has none)
        """
        return np.flatnonzero(self.token_mask.any(axis=1))

    def get(self, batch_size: int | None = None, rows: np.ndarray | None = None) -> Generator[Any, None, None]:
        """
        Shuffled minibatches of the finished rollout.

        :param batch_size: Number of rows in a minibatch; None: all in one
        :param rows: Rows to draw from, in this order where given; None: all valid rows, shuffled
        :return: Minibatches of :class:`TeacherRolloutSamples`
        """
        assert self.generator_ready, "finish() must be called before get()"
        indices = np.random.permutation(self.valid_rows()) if rows is None else rows
        step = batch_size or max(len(indices), 1)
        for start in range(0, len(indices), step):
            yield self._get_samples(indices[start : start + step])

    def _get_samples(self, batch_inds: np.ndarray, env: Any = None) -> Any:
        token_log_probs = self.token_log_probs[batch_inds]
        return TeacherRolloutSamples(
            observations=map_obs(lambda array: self.to_torch(array[batch_inds]), self.observations),
            actions=self.to_torch(self.actions[batch_inds]),
            old_values=self.to_torch(self.values[batch_inds]),
            old_log_prob=self.to_torch(token_log_probs.sum(axis=1)),
            advantages=self.to_torch(self.advantages[batch_inds]),
            returns=self.to_torch(self.returns[batch_inds]),
            old_token_log_probs=self.to_torch(token_log_probs),
            token_mask=self.to_torch(self.token_mask[batch_inds]),
            teacher_log_probs=self.to_torch(self.teacher_log_probs[batch_inds]),
            teacher_distribution=self.to_torch(self.teacher_distributions[batch_inds]),
            rows=batch_inds,
        )


class ReplayedStates(NamedTuple):
    """
    A minibatch of states.

    :param observations: Observations
    :param distributions: Teacher's flattened distributions, (batch, flat size)
    :param masks: 1 for tokens that count, (batch, T)
    :param actions: The student's tokens in these states, (batch, T); None where they are not kept
    """

    observations: th.Tensor | dict[str, th.Tensor]
    distributions: th.Tensor
    masks: th.Tensor
    actions: th.Tensor | None


class StateReplay:
    """
    Ring buffer of states with the teacher's distribution, so that an exact divergence can be descended on all states
    visited so far: the objective is an expectation over states alone, and a frozen teacher's labels do not age.

    Memory grows by doubling up to ``capacity`` and observations keep the dtype of their space (images: uint8).

    :param capacity: Largest number of states; the oldest are overwritten
    :param observation_space: Observation space
    :param spec: Token specification of the teacher's distributions
    :param device: Device of the samples
    :param store_actions: Also keep the student's tokens: to an autoregressive student they are part of the state
    :param raw: The observations are those before a ``VecNormalize`` has changed them
    """

    actions: np.ndarray

    def __init__(
        self,
        capacity: int,
        observation_space: spaces.Space,
        spec: TokenSpec,
        device: th.device | str = "auto",
        store_actions: bool = False,
        raw: bool = False,
    ):
        check_at_least_one(capacity=capacity)
        self.capacity = capacity
        self.observation_space = observation_space
        self.spec = spec
        self.device = get_device(device)
        self.store_actions = store_actions
        self.raw = raw
        self.size = 0
        #: Number of all states that were ever added, forgotten ones included; state ``i`` lies in row ``i % capacity``
        self.n_added = 0
        #: Whose states these are: a folder of another replay is not written to
        self.identity = uuid.uuid4().hex
        # The folder whose files are this replay, and those of them that are not, to be removed by the next save
        self._folder: pathlib.Path | None = None
        self._stale: set[pathlib.Path] = set()
        self._allocate(min(capacity, 1024))

    @staticmethod
    def bytes_per_state(observation_space: spaces.Space, spec: TokenSpec, store_actions: bool = False) -> int:
        """
        :param observation_space: Observation space
        :param spec: Token specification
        :param store_actions: Whether the student's tokens are kept
        :return: Memory that one state takes
        """
        sizes: list[int] = []
        map_obs(lambda array: sizes.append(array.nbytes), zeros_like_space(observation_space, (1,)))
        actions = spec.n_tokens * np.dtype(_token_dtype(spec)).itemsize if store_actions else 0
        return sum(sizes) + spec.flat_size * np.dtype(spec.storage_dtype).itemsize + spec.n_tokens + actions

    def _allocate(self, n: int) -> None:
        self.observations = zeros_like_space(self.observation_space, (n,))
        self.distributions = np.zeros((n, self.spec.flat_size), dtype=self.spec.storage_dtype)
        self.masks = np.zeros((n, self.spec.n_tokens), dtype=bool)
        self.actions = np.zeros((n, self.spec.n_tokens if self.store_actions else 0), dtype=_token_dtype(self.spec))

    def _grow(self, n: int) -> None:
        allocated = len(self.masks)
        if n <= allocated:
            return
        old_obs, old_distributions, old_masks = self.observations, self.distributions, self.masks
        old_actions = self.actions
        self._allocate(min(max(n, 2 * allocated), self.capacity))
        rows = np.arange(self.size)
        store_obs(self.observations, rows, map_obs(lambda array: array[: self.size], old_obs))
        self.distributions[rows] = old_distributions[: self.size]
        self.masks[rows] = old_masks[: self.size]
        self.actions[rows] = old_actions[: self.size]

    def add(
        self,
        observations: ObsArray,
        distributions: np.ndarray,
        masks: np.ndarray,
        actions: np.ndarray | None = None,
    ) -> None:
        """
        :param observations: Observations, (n, ...)
        :param distributions: Teacher's flattened distributions, (n, flat size)
        :param masks: Tokens that count, (n, T)
        :param actions: The student's tokens, (n, T); not needed where they are not kept
        """
        if self.store_actions and actions is None:
            raise ValueError("This state replay keeps the student's tokens: pass actions.")
        n_added = self.n_added + len(masks)
        keep = slice(max(len(masks) - self.capacity, 0), None)
        observations = map_obs(lambda array: array[keep], observations)
        distributions, masks = distributions[keep], masks[keep]
        n = len(masks)
        self._grow(min(n_added, self.capacity))
        rows = np.arange(n_added - n, n_added) % self.capacity
        store_obs(self.observations, rows, observations)
        self.distributions[rows] = distributions
        self.masks[rows] = masks > 0
        if self.store_actions and actions is not None:
            self.actions[rows] = actions[keep]
        # Last: what could not be stored is not counted
        self.n_added, self.size = n_added, min(self.size + n, self.capacity)

    def sample(self, batch_size: int) -> ReplayedStates:
        """
        States drawn uniformly, with replacement.

        :param batch_size: Number of states
        :return: A minibatch
        """
        check_at_least_one(batch_size=batch_size)
        return self.states(np.random.randint(0, self.size, size=batch_size))

    def states(self, rows: np.ndarray) -> ReplayedStates:
        """
        :param rows: Numbers of the states, each less than ``size``
        :return: These states
        """
        return ReplayedStates(
            map_obs(lambda array: th.as_tensor(array[rows], device=self.device), self.observations),
            th.as_tensor(self.distributions[rows], device=self.device),
            th.as_tensor(self.masks[rows], device=self.device).float(),
            th.as_tensor(self.actions[rows], device=self.device) if self.store_actions else None,
        )

    def save(self, path: str | os.PathLike[str], since: int = 0) -> None:
        """
        Write states to an ``.npz`` file, atomically.

        :param path: File to write
        :param since: Leave out the states that were added before there were so many
        """
        first = max(since, self.n_added - self.size)
        rows = np.arange(first, self.n_added) % self.capacity
        observations = self.observations if isinstance(self.observations, dict) else {"": self.observations}
        arrays = {f"obs/{key}": array[rows] for key, array in observations.items()}
        arrays |= {"distributions": self.distributions[rows], "masks": self.masks[rows], "first": np.array(first)}
        arrays |= {"raw": np.array(self.raw), "replay": np.array(self.identity)}
        if self.store_actions:
            arrays["actions"] = self.actions[rows]
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]

    def load(self, path: str | os.PathLike[str], until: int | None = None, since: int = 0) -> None:
        """
        Add the states of a file that :meth:`save` wrote. To a replay that has none they come in their old places.

        :param path: File to read
        :param until: Leave out the states after so many of the replay that was saved; None: none
        :param since: Leave out the states before so many of them
        :raises ValueError: They are of another kind than this replay's, or the file is damaged; nothing was added
        """
        try:
            self._load(path, until, since)
        except FileNotFoundError:
            raise
        except Exception as error:  # a damaged file raises anything
            if str(path) in str(error):
                raise
            raise ValueError(f"{path} is not a file of replayed states, or is damaged: {error}.") from error

    def _load(self, path: str | os.PathLike[str], until: int | None, since: int) -> None:
        with np.load(path) as arrays:
            found = {name[len("obs/") :]: arrays[name] for name in arrays.files if name.startswith("obs/")}
            own = self.observations if isinstance(self.observations, dict) else {"": self.observations}
            got, expected = ({key: (a.shape[1:], a.dtype) for key, a in each.items()} for each in (found, own))
            if got != expected:
                raise ValueError(
                    f"The state replay in {path} holds other observations: expected {_described(expected)}, "
                    f"got {_described(got)}."
                )
            observations: ObsArray = found if isinstance(self.observations, dict) else found[""]
            if arrays["distributions"].shape[1] != self.spec.flat_size:
                raise ValueError(
                    f"The state replay in {path} holds distributions of {arrays['distributions'].shape[1]} numbers, "
                    f"this model needs {self.spec.flat_size}: it belongs to another action space."
                )
            if bool(arrays["raw"] if "raw" in arrays.files else False) != self.raw:
                seen, keeps = ("after", "before") if self.raw else ("before", "after")
                raise ValueError(
                    f"The state replay in {path} holds observations {seen} a VecNormalize, this model keeps them "
                    f"{keeps} it."
                )
            if self.store_actions and "actions" not in arrays.files:
                raise ValueError(
                    f"The state replay in {path} holds no tokens of the student, which an autoregressive student "
                    "needs: it belongs to a student with parallel decoding."
                )
            first = int(arrays["first"])
            rows = slice(max(since - first, 0), None if until is None else max(until - first, 0))
            actions = arrays["actions"][rows] if self.store_actions else None
            distributions, masks = arrays["distributions"][rows], arrays["masks"][rows]
        if not self.size:
            self.n_added = max(first, since)
        self.add(map_obs(lambda array: array[rows], observations), distributions, masks, actions)

    def save_to(self, folder: pathlib.Path) -> None:
        """
        Write the states that no file of a folder has yet, and remove files of states long forgotten. Together the
        files are this replay, and writing them takes as long as there are new states.

        :param folder: Folder of one replay; created
        :raises ValueError: It holds the states of another one
        """
        files = _parts(folder)
        if files and folder.resolve() != self._folder:
            raise ValueError(f"{folder} holds the states of another replay. Name another folder.")
        self._folder = folder.resolve()
        kept = [end for _, end, path in files if path not in self._stale]
        saved = max(kept, default=0)
        written = folder / f"{max(saved, self.n_added - self.size)}-{self.n_added}.npz"
        if saved < self.n_added:
            self.save(written, saved)
        for _, end, path in files:
            # Not those that the model before this one may be resumed with
            if end <= saved - self.capacity or path in self._stale - {written}:
                path.unlink(missing_ok=True)
        self._stale = set()

    def load_from(self, folder: pathlib.Path, until: int, identity: str | None = None) -> list[str]:
        """
        Take over the states of a folder that :meth:`save_to` wrote, each in its old place, instead of those that are
        here. The folder stays as it is until the next :meth:`save_to`, which goes on with it if it is the model's own.

        :param folder: Folder
        :param until: How many had been added when the model was saved, 0 for a model that was not: later ones are left
            out, and removed by the next save, because they come again. Of another replay's folder all are taken
        :param identity: ``identity`` of the replay whose states the model was saved with; None: not known
        :return: What is missing, and why
        """
        missing = []
        parts = _parts(folder)
        theirs = _identity_of(parts)
        own = until > 0 and (None in (theirs, identity) or theirs == identity)
        if own:
            self.identity = identity or theirs or self.identity
            self._folder = folder.resolve()
        else:
            until = max((end for _, end, _ in parts), default=0)
            self._folder = None
        self.size = self.n_added = 0
        for first, _, path in parts:
            if first < until:
                if self.n_added < first <= until - self.capacity:
                    # What lies between was forgotten before it was saved
                    self.size, self.n_added = 0, first
                try:
                    self.load(path, until, self.n_added)
                except (OSError, ValueError) as error:
                    missing.append(f"{error} Its states are not replayed.")
        incomplete = self.n_added != until or self.size < min(until, self.capacity)
        if incomplete:
            self._close_gaps()
            if not missing:
                missing.append(
                    f"{folder} has {self.size} of the {min(until, self.capacity)} states that this model replayed when "
                    "it was saved."
                )
        self._stale = {path for _, end, path in parts if own and (incomplete or end > until)}
        return missing

    def _close_gaps(self) -> None:
        """Number the states anew, from 0."""
        rows = np.arange(self.n_added - self.size, self.n_added) % self.capacity
        observations = map_obs(lambda array: array[rows], self.observations)
        arrays = [array[rows] for array in (self.distributions, self.masks, self.actions)]
        self.size = self.n_added = 0
        self.add(observations, *arrays)


def _parts(folder: pathlib.Path) -> list[tuple[int, int, pathlib.Path]]:
    """Files of a folder that :meth:`StateReplay.save_to` wrote: number of the first state, of the one after, path."""
    names = (re.fullmatch(r"(\d+)-(\d+)\.npz", path.name) for path in folder.glob("*.npz"))
    return sorted((int(name[1]), int(name[2]), folder / name[0]) for name in names if name)


def _identity_of(parts: list[tuple[int, int, pathlib.Path]]) -> str | None:
    """Of the replay that wrote the files of a folder; None where no file says so."""
    for _, _, path in reversed(parts):
        with suppress(Exception), np.load(path) as arrays:  # a damaged file raises anything
            return str(arrays["replay"])
    return None


def _described(observations: dict[str, tuple[tuple[int, ...], np.dtype]]) -> str:
    return ", ".join(f"{key} {shape} {dtype}".strip() for key, (shape, dtype) in observations.items())


def _token_dtype(spec: TokenSpec) -> type[np.generic]:
    """Smallest type for the tokens of actions that torch indexes with too."""
    if not spec.n_bins:
        return np.float32
    return np.uint8 if spec.n_bins <= 256 else np.int32


def store_obs(target: Any, index: Any, obs: Any) -> None:
    """
    ``target[index] = obs`` for plain and Dict observations.

    :param target: Arrays to write to
    :param index: Where to write
    :param obs: Observations to write
    """
    if isinstance(target, dict):
        for key, array in target.items():
            array[index] = np.asarray(obs[key]).reshape(array[index].shape)
    else:
        # Discrete observations come as (n,) and are kept as (n, 1)
        target[index] = np.asarray(obs).reshape(target[index].shape)


def zeros_like_space(space: spaces.Space, head: tuple[int, ...]) -> Any:
    """
    :param space: Plain or Dict observation space
    :param head: Leading shape
    :return: Zeros in the shape and dtype of the space's observations
    """
    if isinstance(space, spaces.Dict):
        return {key: zeros_like_space(sub_space, head) for key, sub_space in space.spaces.items()}
    return np.zeros((*head, *get_obs_shape(space)), dtype=space.dtype)  # type: ignore[misc]


def random_shift(
    images: th.Tensor, per_sample: bool = True, channels_first: bool = True, pad: float = 1 / 16
) -> th.Tensor:
    """
    Shift images by a random number of pixels, replicating the border (DrQ, https://arxiv.org/abs/2004.13649).

    :param images: (batch, C, H, W), or (batch, H, W, C), of any dtype
    :param per_sample: One shift per image; False: the same for the whole batch
    :param channels_first: Which of the two layouts
    :param pad: Largest shift, as a fraction of height and width (4 pixels of 64)
    :return: Shifted images
    """
    height, width = images.shape[2:] if channels_first else images.shape[1:3]
    batch = len(images)
    n_shifts = batch if per_sample else 1

    def shifted(size: int) -> th.Tensor:
        reach = max(round(pad * size), 1)
        shift = th.randint(-reach, reach + 1, (n_shifts, 1), device=images.device)
        # Clamped indices replicate the border without a padded copy
        return (th.arange(size, device=images.device) + shift).clamp(0, size - 1)

    rows, columns = shifted(height), shifted(width)
    if not per_sample:
        dims = (2, 3) if channels_first else (1, 2)
        return images.index_select(dims[0], rows[0]).index_select(dims[1], columns[0])
    sample = th.arange(batch, device=images.device).view(-1, 1, 1)
    if channels_first:
        return images.movedim(1, -1)[sample, rows.unsqueeze(2), columns.unsqueeze(1)].movedim(-1, 1)
    return images[sample, rows.unsqueeze(2), columns.unsqueeze(1)]
