"""Demonstrations as arrays that a policy learns from: observations, action chunks, their tokens."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from gymnasium import spaces

from opd_gym.actions import encode_actions, normalisation_bounds
from opd_gym.checks import check_at_least, check_at_least_one
from opd_gym.demonstrations.hdf5 import (
    Episode,
    PathLike,
    find_files,
    read_demonstrations,
    resize_images,
)
from opd_gym.demonstrations.lerobot import read_lerobot
from opd_gym.demonstrations.untrusted import check_finite
from opd_gym.instructions import encode_instruction
from opd_gym.observations import join_obs, obs_rows
from opd_gym.tokens import check_starts

# Share of a dimension's actions outside the range of its tokens
WARN_OUTSIDE, REFUSE_OUTSIDE = 0.05, 0.5


def share_outside(values: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """
    :param values: numbers ``(N, D)``
    :param low: least sensible value of each dimension ``(D,)``
    :param high: largest one
    :return: share of each dimension's values beyond them, but for a 255th of the range ``(D,)``
    """
    bounded = np.isfinite(low) & np.isfinite(high)
    slack = np.where(bounded, high - low, 0.0) / 255 + 1e-6
    return ((values < low - slack) | (values > high + slack)).mean(axis=0)


def check_within(actions: np.ndarray, low: np.ndarray, high: np.ndarray, what: str, remedy: str) -> None:
    """
    :param actions: demonstrated actions ``(N, D)``
    :param low: least sensible value of each dimension ``(D,)``
    :param high: largest one
    :param what: what lies between them, for the message
    :param remedy: what to do
    :raises ValueError: most actions of a dimension lie outside; a warning from 5 % on
    """
    outside = share_outside(actions, low, high)
    worst = int(outside.argmax())
    if outside[worst] <= WARN_OUTSIDE:
        return
    text = (
        f"{outside[worst]:.0%} of the demonstrated actions in dimension {worst} lie outside of [{low[worst]:.3g}, "
        f"{high[worst]:.3g}], {what}: they reach from {actions[:, worst].min():.3g} to "
        f"{actions[:, worst].max():.3g}. {remedy}"
    )
    if outside[worst] > REFUSE_OUTSIDE:
        raise ValueError(text)
    warnings.warn(text, stacklevel=4)


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
    :raises ValueError: no rows, arrays of different lengths, what is no number, NaN or infinite, or a space that does
        not count from 0
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
        self.mask = mask = None if mask is None else np.asarray(mask, dtype=bool)
        for name, space in (("observation", observation_space), ("action", action_space)):
            if space is not None:
                check_starts(f"demonstrations' {name} space", space)
        n = len(self.actions)
        self.episodes = np.arange(n) if episodes is None else np.asarray(episodes)
        arrays = self.observations if isinstance(self.observations, dict) else {"observations": self.observations}
        for name, array in [*arrays.items(), ("episodes", self.episodes), ("actions", self.actions)]:
            if len(array) != n:
                raise ValueError(f"{name} has {len(array)} rows, there are {n} actions.")
            if np.asarray(array).dtype.kind not in "biuf":
                raise ValueError(f"{name} has type {np.asarray(array).dtype}, expected numbers.")
            check_finite(name, np.asarray(array))
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
        :raises ValueError: no episodes, episodes of different shapes, or an ``action_offset`` where labels are chunks
            of their own, or that is as long as an episode
        """
        size = image_size if image_size is None or isinstance(image_size, Sequence) else (image_size, image_size)
        if size is not None and len(size) != 2:
            raise ValueError(f"image_size must be a height and a width, or one number for both, got {image_size}.")
        for length in size or ():
            check_at_least_one(image_size=length)
        check_at_least_one(chunk_size=chunk_size, stride=stride, instruction_length=instruction_length)
        check_at_least(0, action_offset=action_offset)
        parts: list[Demonstrations] = []
        for number, episode in enumerate(episodes):
            if episode.instruction is None:
                raise ValueError(f"Episode {number} has no instruction.")
            chunks, mask = _chunk_labels(episode, chunk_size, action_offset)
            keep = slice(None, None, 1 if episode.action_chunks is not None else stride)
            rows = {key: np.asarray(value)[keep] for key, value in episode.observations.items()}
            for key, value in rows.items():
                if value.dtype == np.uint8 and value.ndim == 4 and size is not None:
                    rows[key] = resize_images(value, size)
            n = len(chunks[keep])
            rows["instruction"] = np.tile(encode_instruction(episode.instruction, instruction_length), (n, 1))
            part = cls(rows, chunks[keep], mask[keep], np.zeros(n, dtype=np.int64))
            if parts:
                parts[0]._check_alike(part, f"episode {number}")
            parts.append(part)
        return cls._join(parts)

    @classmethod
    def from_hdf5(
        cls,
        paths: PathLike | Sequence[PathLike],
        n_demos: int | None = None,
        cameras: Sequence[str] | None = None,
        instruction: str | None = None,
        skip: bool = False,
        lerobot: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Demonstrations:
        """
        Also from data sets in LeRobot's format.

        :param paths: HDF5 files of LIBERO or robomimic, or directories of them, one file per task; or folders with a
            data set of LeRobot's
        :param n_demos: number of demonstrations of each file, and of each task of LeRobot's; by default all
        :param cameras: cameras to read; by default all
        :param instruction: the task in words; by default what each file or its name says
        :param skip: leave out files that cannot be used, with a warning that names each one and says why
        :param lerobot: ``layout`` and ``features`` of :func:`opd_gym.demonstrations.read_lerobot`
        :param kwargs: see :meth:`from_episodes`
        :raises ImportError: a data set of LeRobot's, without the libraries of the extra ``lerobot``
        :raises ValueError: a file cannot be used; names it
        """
        parts: list[Demonstrations] = []
        skipped: list[str] = []
        files = find_files(paths)
        for file in files:
            try:
                if file.is_dir():
                    episodes = read_lerobot(file, n_demos, cameras, instruction, **(lerobot or {}))
                else:
                    episodes = read_demonstrations(file, n_demos, cameras, instruction)
                part = cls.from_episodes(episodes, **kwargs)
                if parts:
                    parts[0]._check_alike(part, str(file))
                parts.append(part)
            except (FileNotFoundError, ValueError) as error:
                reason = str(error) if str(file) in str(error) else f"{file}: {error}"
                if not skip:
                    raise error if isinstance(error, FileNotFoundError) else ValueError(reason) from error
                skipped.append(reason)
        if skipped:
            reasons = "".join(f"\n  {reason}" for reason in skipped)
            if not parts:
                raise ValueError(f"None of the {len(files)} files of demonstrations can be used:{reasons}")
            warnings.warn(f"Skipped {len(skipped)} of {len(files)} files of demonstrations:{reasons}", stacklevel=2)
        return cls._join(parts)

    @classmethod
    def _join(cls, parts: Sequence[Demonstrations]) -> Demonstrations:
        """All rows of several parts. The parts lose their observations, so that less is in memory twice."""
        if not parts:
            raise ValueError("There are no demonstrations.")
        if len(parts) == 1:
            return parts[0]
        arrays: list[dict[str, np.ndarray]] = [part.observations for part in parts]  # type: ignore[misc]
        observations = {key: np.concatenate([array.pop(key) for array in arrays]) for key in list(arrays[0])}
        first = np.cumsum([0, *(part.n_episodes for part in parts[:-1])])
        return cls(
            observations,
            np.concatenate([part.actions for part in parts]),
            np.concatenate([part.mask for part in parts]),  # type: ignore[misc]
            np.concatenate([part.episodes + number for part, number in zip(parts, first, strict=True)]),
        )

    def _check_alike(self, other: Demonstrations, name: str) -> None:
        expected, got = self._shapes(), other._shapes()
        if got.keys() != expected.keys():
            raise ValueError(f"{name} has {sorted(got)}, expected {sorted(expected)}.")
        for key, shape in got.items():
            if shape != expected[key]:
                raise ValueError(
                    f"{key} of {name} has shape {shape}, expected {expected[key]}. Pass image_size to bring pictures "
                    "to one size."
                )

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        obs = self.observations
        arrays = {f"observations[{key!r}]": obs[key] for key in obs} if isinstance(obs, dict) else {"observations": obs}
        return {key: array.shape[1:] for key, array in [*arrays.items(), ("actions", self.actions)]}

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
        if self.actions.dtype == bool:
            raise ValueError(
                "Demonstrated actions are True or False, which may be Discrete(2) or MultiBinary: pass action_space."
            )
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
        :raises ValueError: most actions of a dimension lie outside the statistics' range; a warning from 5 % on
        """
        self._check_range(statistics)
        return encode_actions(self.actions, statistics, n_bins).reshape(len(self), -1)

    def _check_range(self, statistics: Mapping[str, Any] | None) -> None:
        """1st and 99th percentiles leave 2 % outside; with other data's statistics far more becomes the last token."""
        n_dims = self.actions.shape[-1]
        given = statistics or {"q01": -np.ones(n_dims), "q99": np.ones(n_dims)}
        low, high, mask = normalisation_bounds(given, n_dims)
        low, high = np.where(mask, low, -1.0), np.where(mask, high, 1.0)
        if given.get("gripper"):
            low[-1], high[-1] = -np.inf, np.inf  # only its sign counts
        check_within(
            self.actions.reshape(-1, n_dims),
            low,
            high,
            "the range of the tokens",
            "Use the statistics of these demonstrations.",
        )

    def token_mask(self) -> np.ndarray | None:
        """
        :return: boolean ``(N, K * D)``, False where a token is padding beyond the end of its episode
        """
        if self.mask is None or self.actions.ndim == 2:
            return self.mask
        return np.repeat(self.mask, self.actions.shape[2], axis=1)

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
        """All rows of both, as DAgger aggregates data. Without a mask every label counts."""
        self._check_alike(other, "the other part")
        observations = join_obs([self.observations, other.observations])
        mask = None
        if self.mask is not None or other.mask is not None:
            parts = (self, other)
            mask = np.concatenate([np.ones(p.actions.shape[:2], bool) if p.mask is None else p.mask for p in parts])
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
    if action_offset and episode.action_chunks is not None:
        raise ValueError(
            f"action_offset={action_offset} is for labels that are the actions which follow; the file's are chunks of "
            "their own (action_chunks). Leave it out."
        )
    if action_offset >= n:
        raise ValueError(f"action_offset={action_offset} leaves no action of an episode of {n}.")
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
