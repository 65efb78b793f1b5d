"""Demonstrations as arrays that a policy learns from: observations, action chunks, their tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from gymnasium import spaces

from opd_gym.actions import encode_actions
from opd_gym.demonstrations.hdf5 import (
    Episode,
    PathLike,
    find_files,
    read_demonstrations,
    resize_images,
)
from opd_gym.instructions import encode_instruction
from opd_gym.observations import join_obs, obs_rows


class Demonstrations:
    """
    Observations with the demonstrated actions, one row per time step (or decision).

    For chunked policies ``actions`` is ``(N, K, D)``: the next K actions. Beyond the end of the episode its last action
    is repeated, and ``mask`` is False. For other policies ``actions`` is whatever the env takes, ``(N, ...)``, and
    ``mask`` is None. ``demonstrations[indices]`` returns these rows.

    :param observations: arrays ``(N, ...)`` by key, or one array
    :param actions: labels
    :param mask: ``(N, K)``, False where a label is padding
    :param episodes: ``(N,)`` number of the episode of each row; by default each row is its own
    :param observation_space: by default inferred from the arrays
    :param action_space: by default inferred from the arrays; pass it for actions that are not chunks
    """

    def __init__(
        self,
        observations: np.ndarray | Mapping[str, np.ndarray],
        actions: np.ndarray,
        mask: np.ndarray | None = None,
        episodes: np.ndarray | None = None,
        observation_space: spaces.Space | None = None,
        action_space: spaces.Space | None = None,
    ):
        self.observations = dict(observations) if isinstance(observations, Mapping) else np.asarray(observations)
        self.actions = np.asarray(actions)
        self.mask = mask
        n = len(self.actions)
        self.episodes = np.arange(n) if episodes is None else np.asarray(episodes)
        arrays = self.observations if isinstance(self.observations, dict) else {"observations": self.observations}
        for name, array in [*arrays.items(), ("episodes", self.episodes)]:
            if len(array) != n:
                raise ValueError(f"{name} has {len(array)} rows, there are {n} actions.")
        if n == 0:
            raise ValueError("There are no demonstrations.")
        if mask is not None and mask.shape != self.actions.shape[:2]:
            raise ValueError(f"mask must have shape {self.actions.shape[:2]}, got {mask.shape}.")
        self._observation_space = observation_space
        self._action_space = action_space

    @classmethod
    def from_episodes(
        cls,
        episodes: Sequence[Episode] | Iterator[Episode],
        chunk_size: int = 8,
        image_size: int | tuple[int, int] | None = None,
        instruction_length: int = 128,
        stride: int = 1,
        action_offset: int = 0,
    ) -> Demonstrations:
        """
        :param episodes: episodes; every one needs an instruction
        :param chunk_size: number of actions K of a label
        :param image_size: height and width of the pictures; by default as stored
        :param instruction_length: number of bytes of the instruction
        :param stride: keep one of every ``stride`` time steps (episodes with ``action_chunks`` are kept whole)
        :param action_offset: the label of the observation at t starts with the action at t + offset. LIBERO's official
            files hold the observation AFTER each action: there 1 is exact, and 0 is common practice
        """
        size = (image_size, image_size) if isinstance(image_size, int) else image_size
        observations: dict[str, list[np.ndarray]] = {}
        actions, masks, numbers = [], [], []
        for number, episode in enumerate(episodes):
            if episode.instruction is None:
                raise ValueError(f"Episode {number} has no instruction.")
            chunks, mask = _chunk_labels(episode, chunk_size, action_offset)
            keep = slice(None, None, 1 if episode.action_chunks is not None else stride)
            actions.append(chunks[keep])
            masks.append(mask[keep])
            n = len(actions[-1])
            numbers.append(np.full(n, number))
            rows = {key: np.asarray(value)[keep] for key, value in episode.observations.items()}
            for key, value in rows.items():
                if value.dtype == np.uint8 and value.ndim == 4 and size is not None:
                    rows[key] = resize_images(value, size)
            rows["instruction"] = np.tile(encode_instruction(episode.instruction, instruction_length), (n, 1))
            if observations and set(rows) != set(observations):
                raise ValueError(f"Episode {number} has observations {sorted(rows)}, expected {sorted(observations)}.")
            for key, value in rows.items():
                if key in observations and value.shape[1:] != observations[key][0].shape[1:]:
                    raise ValueError(
                        f"`{key}` of episode {number} has shape {value.shape[1:]}, expected "
                        f"{observations[key][0].shape[1:]}. Pass image_size to bring pictures to one size."
                    )
                observations.setdefault(key, []).append(value)
        if not actions:
            raise ValueError("There are no demonstrations.")
        joined = {}
        for key in list(observations):
            # Key by key, so that only one camera's pictures are in memory twice.
            joined[key] = np.concatenate(observations.pop(key))
        return cls(joined, np.concatenate(actions), np.concatenate(masks), np.concatenate(numbers))

    @classmethod
    def from_hdf5(
        cls,
        paths: PathLike | Sequence[PathLike],
        n_demos: int | None = None,
        cameras: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> Demonstrations:
        """
        :param paths: LIBERO HDF5 files, or directories of them; one file per task
        :param n_demos: number of demonstrations of each file; by default all
        :param cameras: cameras to read; by default all
        :param kwargs: see :meth:`from_episodes`
        """
        files = find_files(paths)
        return cls.from_episodes((e for file in files for e in read_demonstrations(file, n_demos, cameras)), **kwargs)

    def __len__(self) -> int:
        return len(self.actions)

    @property
    def n_episodes(self) -> int:
        """Number of episodes."""
        return len(np.unique(self.episodes))

    @property
    def is_chunked(self) -> bool:
        """Whether labels are chunks of continuous actions, (N, K, D)."""
        return self.actions.ndim == 3 and np.issubdtype(self.actions.dtype, np.floating)

    @property
    def observation_space(self) -> spaces.Space:
        """Space of one observation."""
        if self._observation_space is not None:
            return self._observation_space
        if isinstance(self.observations, dict):
            return spaces.Dict({key: _space_of(value) for key, value in self.observations.items()})
        return _space_of(self.observations)

    def action_space(self, n_bins: int | None = None) -> spaces.Space:
        """
        :param n_bins: number of bins of a token policy, whose chunks are ``MultiDiscrete([n_bins] * K * D)``
        :return: space of one action
        """
        if n_bins is not None and self.is_chunked:
            return spaces.MultiDiscrete(np.full(int(np.prod(self.actions.shape[1:])), n_bins))
        if self._action_space is not None:
            return self._action_space
        if self.is_chunked:
            return spaces.Box(-1.0, 1.0, self.actions.shape[1:], np.float32)
        if np.issubdtype(self.actions.dtype, np.integer) and self.actions.ndim == 1:
            return spaces.Discrete(int(self.actions.max()) + 1)
        if np.issubdtype(self.actions.dtype, np.integer):
            return spaces.MultiDiscrete(self.actions.max(axis=0) + 1)
        bound = np.maximum(np.abs(self.actions).max(axis=0), 1e-6).astype(np.float32)
        return spaces.Box(-bound, bound, dtype=np.float32)

    def tokens(self, n_bins: int = 256, statistics: Mapping[str, Any] | None = None) -> np.ndarray:
        """
        :param n_bins: number of bins of one action dimension
        :param statistics: see :func:`opd_gym.actions.encode_actions`
        :return: int64 ``(N, K * D)``
        """
        return encode_actions(self.actions, statistics, n_bins).reshape(len(self), -1)

    def token_mask(self) -> np.ndarray | None:
        """
        :return: boolean ``(N, K * D)``, False where a token is padding beyond the end of its episode
        """
        return None if self.mask is None else np.repeat(self.mask, self.actions.shape[2], axis=1)

    def __getitem__(self, indices: np.ndarray | slice) -> Demonstrations:
        """
        :param indices: rows
        :return: the demonstrations of these rows
        """
        mask = None if self.mask is None else self.mask[indices]
        return Demonstrations(
            obs_rows(self.observations, indices),
            self.actions[indices],
            mask,
            self.episodes[indices],
            self._observation_space,
            self._action_space,
        )

    def __add__(self, other: Demonstrations) -> Demonstrations:
        """All rows of both, as DAgger aggregates data."""
        if isinstance(self.observations, dict) != isinstance(other.observations, dict) or (
            isinstance(self.observations, dict) and set(self.observations) != set(other.observations)
        ):
            raise ValueError("Only demonstrations with the same observation keys can be added.")
        if self.actions.shape[1:] != other.actions.shape[1:]:
            raise ValueError(f"Labels have shapes {self.actions.shape[1:]} and {other.actions.shape[1:]}.")
        observations = join_obs([self.observations, other.observations])
        mask = None if self.mask is None or other.mask is None else np.concatenate([self.mask, other.mask])
        episodes = np.concatenate([self.episodes, other.episodes + self.episodes.max() + 1])
        actions = np.concatenate([self.actions, other.actions])
        return Demonstrations(observations, actions, mask, episodes, self._observation_space, self._action_space)

    def split_rows(self, fraction: float, seed: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """
        Split by episodes. Rows of one episode look alike, so a split by rows would validate on what was learned.

        :param fraction: share of the episodes for validation, at least one episode
        :param seed: seed of the random split
        :return: row numbers of the training and of the validation part
        """
        numbers = np.unique(self.episodes)
        n_validation = max(1, round(fraction * len(numbers)))
        if not 0.0 < fraction < 1.0 or n_validation >= len(numbers):
            raise ValueError(f"Cannot set {fraction} of {len(numbers)} episodes aside for validation.")
        chosen = np.random.default_rng(seed).permutation(numbers)[:n_validation]
        validation = np.isin(self.episodes, chosen)
        return np.flatnonzero(~validation), np.flatnonzero(validation)

    def split(self, fraction: float, seed: int | None = None) -> tuple[Demonstrations, Demonstrations]:
        """
        As :meth:`split_rows`, but returns demonstrations.

        :return: training and validation part
        """
        training, validation = self.split_rows(fraction, seed)
        return self[training], self[validation]


def _chunk_labels(episode: Episode, chunk_size: int, action_offset: int) -> tuple[np.ndarray, np.ndarray]:
    n = len(episode.actions)
    if episode.action_chunks is not None:
        if episode.action_chunks.shape[1] < chunk_size:
            raise ValueError(
                f"The file's labels are chunks of {episode.action_chunks.shape[1]} actions, chunk_size is {chunk_size}."
            )
        return episode.action_chunks[:, :chunk_size], np.ones((n, chunk_size), dtype=bool)
    steps = np.arange(n)[:, None] + np.arange(chunk_size) + action_offset
    return episode.actions[np.minimum(steps, n - 1)], steps < n


def _space_of(array: np.ndarray) -> spaces.Space:
    shape = array.shape[1:]
    if array.dtype == np.uint8:
        return spaces.Box(0, 255, shape, np.uint8)
    return spaces.Box(-np.inf, np.inf, shape, np.float32)
