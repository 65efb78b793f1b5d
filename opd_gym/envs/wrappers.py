"""Wrappers that turn any robot env into one where one step is one decision of a token policy.

``env -> ActionChunk -> ActionTokens -> (Monitor) -> EpisodeControl``
"""

from __future__ import annotations

import sys
import zlib
from collections.abc import Sequence
from typing import Any, SupportsFloat

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.wrappers import ClipAction, OrderEnforcing, PassiveEnvChecker, RescaleAction, TimeLimit

from opd_gym.actions import Statistics, decode_tokens, encode_actions, normalisation_bounds
from opd_gym.checks import check_at_least, check_at_least_one


def _is_transparent(env: gym.Env) -> bool:
    """Whether a wrapper that overrides ``step`` neither ends an episode nor keeps what it has seen."""
    # Where nobody has imported Stable-Baselines3, as in a worker, there is no Monitor; and torch need not be imported
    monitors = sys.modules.get("stable_baselines3.common.monitor")
    return isinstance(env, (OrderEnforcing, PassiveEnvChecker)) or (
        monitors is not None and isinstance(env, monitors.Monitor)
    )


def _layers(env: gym.Env, method: str) -> tuple[gym.Env | None, list[gym.Wrapper]]:
    """
    The outermost layer of an env that has a method, and the wrappers around it, from the inside out.
    """
    around: list[gym.Wrapper] = []
    while not hasattr(env, method):
        if not isinstance(env, gym.Wrapper):
            return None, around
        around.insert(0, env)
        env = env.env
    return env, around


def outer_action(wrapper: gym.Wrapper, action: np.ndarray) -> np.ndarray:
    """
    The action to give to a wrapper so that the env below it executes a certain one.

    :param wrapper: any wrapper; one that changes actions in a way of its own has a method ``reverse_action`` for this
    :param action: action of the env below, or a chunk of them, (D,) or (K, D)
    :return: action of the wrapper, of the same shape
    :raises ValueError: the wrapper changes actions, and does not say how to undo that
    """
    if hasattr(wrapper, "reverse_action"):
        flat = np.ndim(action) <= len(wrapper.env.action_space.shape or ())
        return wrapper.reverse_action(action) if flat else np.stack([wrapper.reverse_action(one) for one in action])
    if isinstance(wrapper, RescaleAction):
        # An affine function of each dimension
        zero = np.zeros(wrapper.action_space.shape or ())
        offset = wrapper.func(zero)
        return ((action - offset) / (wrapper.func(zero + 1.0) - offset)).astype(np.asarray(action).dtype)
    changes = isinstance(wrapper, gym.ActionWrapper) or wrapper.action_space != wrapper.env.action_space
    if changes and not isinstance(wrapper, ClipAction):
        raise ValueError(
            f"{type(wrapper).__name__} changes actions, so that an expert's action is not one of the wrapped env's. "
            "Give it a method reverse_action(action) that returns the action for which it executes the given one."
        )
    return action


class _ExpertThrough(gym.Wrapper):
    """A wrapper that brings labels of a scripted expert to its own action space."""

    _expert_method = "expert_action"

    def _label(self, *args: Any) -> Any:
        layer, around = _layers(self.env, self._expert_method)
        if layer is None:
            raise AttributeError(f"{self.env.unwrapped} has no method {self._expert_method}().")
        label = getattr(layer, self._expert_method)(*args)
        for wrapper in around:
            label = outer_action(wrapper, label)
        return label

    @property
    def has_expert(self) -> bool:
        """
        Whether there is a scripted expert below.

        :raises ValueError: there is one, and a wrapper above it changes actions without a ``reverse_action``
        """
        layer, around = _layers(self.env, self._expert_method)
        if layer is None or not getattr(layer, "has_expert", True):
            return False
        for wrapper in around:
            outer_action(wrapper, np.zeros(wrapper.env.action_space.shape or ()))
        return True


class ActionChunk(_ExpertThrough):
    """
    One step of this env is one decision: a chunk of actions that are executed one after the other.

    A finished episode ends inside the chunk; ``info["n_executed"]`` says how many actions ran. Rewards are summed.

    Nobody looks at the observations between two decisions. An env whose observations are costly may say so: with
    ``can_skip_observations = True`` its attribute ``observe`` is False for all but the last action of a chunk and of
    an episode. It stays True at every step where a wrapper in between overrides ``step`` (``TimeLimit`` excepted): that
    might look, or end the episode.

    :param env: env with a one-dimensional Box action space
    :param chunk_size: number of actions in a chunk
    """

    _expert_method = "expert_chunk"

    def __init__(self, env: gym.Env, chunk_size: int = 8):
        super().__init__(env)
        space = env.action_space
        if not isinstance(space, spaces.Box) or len(space.shape) != 1:
            raise ValueError(f"ActionChunk needs a Box action space of shape (D,), got {space}. Wrap the raw env.")
        check_at_least_one(chunk_size=chunk_size)
        self.chunk_size = chunk_size
        if chunk_size == 1 and _layers(env, self._expert_method)[0] is None:
            self._expert_method = "expert_action"
        repeat = (chunk_size, 1)
        self.action_space = spaces.Box(np.tile(space.low, repeat), np.tile(space.high, repeat), dtype=space.dtype.type)  # type: ignore[arg-type,union-attr]
        self._time_limits: list[TimeLimit] = []
        self._lazy = bool(getattr(env.unwrapped, "can_skip_observations", False))
        while isinstance(env, gym.Wrapper):
            if isinstance(env, TimeLimit):
                self._time_limits.append(env)
            elif "step" in _overridden(type(env)) and not _is_transparent(env):
                self._lazy = False
            env = env.env

    def step(self, action: np.ndarray) -> tuple[Any, SupportsFloat, bool, bool, dict[str, Any]]:
        """
        :param action: float array of shape ``(chunk_size, D)``
        :return: observation after the chunk, summed reward, terminated, truncated, info of the last executed action
        """
        actions = np.asarray(action)
        if actions.shape != self.action_space.shape:
            raise ValueError(f"ActionChunk expects actions of shape {self.action_space.shape}, got {actions.shape}.")
        total = 0.0
        try:
            for i, one in enumerate(actions):
                if self._lazy:
                    self.env.unwrapped.observe = i == self.chunk_size - 1 or self._time_is_up()  # type: ignore[attr-defined]
                obs, reward, terminated, truncated, info = self.env.step(one)
                total += float(reward)
                if terminated or truncated:
                    break
        finally:
            if self._lazy:
                self.env.unwrapped.observe = True  # type: ignore[attr-defined]
        info["n_executed"] = i + 1
        info["n_executed_tokens"] = (i + 1) * actions.shape[1]
        return obs, total, terminated, truncated, info

    def _time_is_up(self) -> bool:
        """Whether a time limit ends the episode with the next step."""
        return any((limit._elapsed_steps or 0) + 1 >= limit._max_episode_steps for limit in self._time_limits)

    def expert_action(self) -> np.ndarray:
        """
        The scripted expert's next chunk from the present state.

        :return: float array of shape ``(chunk_size, D)``
        :raises AttributeError: if the env has no scripted expert: a method ``expert_chunk(chunk_size)``; for chunks of
            one action ``expert_action()`` will do
        """
        if self._expert_method == "expert_action":
            return np.asarray(self._label())[None]
        return self._label(self.chunk_size)


def _overridden(cls: type) -> set[str]:
    """Names that a class of wrappers defines itself, and not those of Gymnasium's bases."""
    bases = (gym.Wrapper, gym.ObservationWrapper, gym.ActionWrapper, gym.RewardWrapper)
    return {name for base in cls.__mro__ if issubclass(base, gym.Wrapper) and base not in bases for name in vars(base)}


class ActionTokens(_ExpertThrough, gym.ActionWrapper):
    """
    Box actions as tokens: ``MultiDiscrete([n_bins] * size)``, OpenVLA's binning.

    :param env: env with a Box action space in [-1, 1] of shape ``(D,)`` or ``(K, D)`` (after :class:`ActionChunk`)
    :param n_bins: number of tokens of one action dimension
    :param statistics: un-normalisation statistics of the policy's checkpoint, see :func:`encode_actions`; None if the
        policy's bins cover the env's own [-1, 1]
    """

    def __init__(self, env: gym.Env, n_bins: int = 256, statistics: Statistics | None = None):
        super().__init__(env)
        space = env.action_space
        if not isinstance(space, spaces.Box) or len(space.shape) not in (1, 2):
            raise ValueError(f"ActionTokens needs a Box action space of shape (D,) or (K, D), got {space}.")
        check_at_least(3, n_bins=n_bins)  # two bins share a centre
        if not (np.all(space.low == -1.0) and np.all(space.high == 1.0)):
            raise ValueError(
                f"ActionTokens needs actions in [-1, 1], got low {space.low.min()} and high {space.high.max()}. "
                "Wrap the env in gymnasium.wrappers.RescaleAction(env, -1.0, 1.0) first."
            )
        self.n_bins = n_bins
        self.statistics = dict(statistics) if statistics is not None else None
        self._shape = space.shape
        self.action_dim = space.shape[-1]
        if self.statistics is not None:
            normalisation_bounds(self.statistics, self.action_dim)
        self.action_space = spaces.MultiDiscrete(np.full(int(np.prod(space.shape)), n_bins))

    def encode(self, actions: np.ndarray) -> np.ndarray:
        """
        :param actions: float array of shape ``(..., K, D)`` (``(..., D)`` without chunks)
        :return: int64 tokens of shape ``(..., K * D)``
        """
        tokens = encode_actions(actions, self.statistics, self.n_bins)
        return tokens.reshape(*tokens.shape[: tokens.ndim - len(self._shape)], -1)

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        """
        :param tokens: integer array of shape ``(..., K * D)``
        :return: float32 actions of shape ``(..., K, D)`` (``(..., D)`` without chunks)
        """
        tokens = np.asarray(tokens)
        return decode_tokens(tokens.reshape(*tokens.shape[:-1], *self._shape), self.statistics, self.n_bins)

    def action(self, action: np.ndarray) -> np.ndarray:
        """Tokens to the wrapped env's action."""
        return np.clip(self.decode(action), -1.0, 1.0)

    def step(self, action: np.ndarray) -> tuple[Any, SupportsFloat, bool, bool, dict[str, Any]]:
        """
        As the wrapped env's, with ``info["n_executed_tokens"]``: so many of the first tokens of ``action`` were
        executed.

        :param action: integer array of shape ``(K * D,)``
        """
        obs, reward, terminated, truncated, info = self.env.step(self.action(action))
        # An env that takes chunks itself, and says nothing, has carried out the whole
        n_actions = info.get("n_executed", int(np.prod(self._shape[:-1])))
        info["n_executed_tokens"] = n_actions * self.action_dim
        return obs, reward, terminated, truncated, info

    def expert_action(self) -> np.ndarray:
        """
        The scripted expert's next action as tokens.

        :return: int64 array of shape ``(K * D,)``
        """
        return self.encode(self._label())


class PrivilegedObservation(gym.ObservationWrapper):
    """
    Keeps keys of a Dict observation from the student, which a teacher goes on seeing.

    The student's policy is built for the other keys, and needs no more than those once it is trained.

    :param env: env with a Dict observation
    :param keys: what is kept from the student
    """

    def __init__(self, env: gym.Env, keys: str | Sequence[str]):
        super().__init__(env)
        keys = [keys] if isinstance(keys, str) else list(keys)
        space = env.observation_space
        if not isinstance(space, spaces.Dict) or not set(keys) < set(space.spaces):
            raise ValueError(
                f"PrivilegedObservation takes some of the keys of a Dict observation, and leaves others; got {keys} of "
                f"{space}."
            )
        self.full_observation_space = space
        self.observation_space = spaces.Dict({key: part for key, part in space.spaces.items() if key not in keys})
        self._full: dict[str, Any] = {}

    def observation(self, observation: dict[str, Any]) -> dict[str, Any]:
        """What the student sees of an observation."""
        self._full = observation
        return {key: observation[key] for key in self.observation_space}  # type: ignore[attr-defined]

    def full_observation(self) -> dict[str, Any]:
        """
        :return: the present observation with all its keys
        """
        return self._full


# An episode is played again if it is no longer than this: some never end, and their actions take memory
MAX_REPLAYED = 20_000
# Far longer than two episodes of others, which is how long an env has to wait for its next one
MAX_STEPS_FROZEN = 100_000


class EpisodeControl(_ExpertThrough):
    """
    Lets the learner decide which episode an env of a VecEnv plays next.

    SB3's vectorised envs reset by themselves and drop seed and options there. The learner announces the next episode
    with ``vec_env.env_method("set_next_reset", ..., indices=[i])`` before the present one ends; the env then goes on
    without waiting. A frozen env costs nothing until it is thawed. Untouched, this wrapper does nothing.

    :param env: env to wrap, outermost (after ``Monitor``)
    """

    def __init__(self, env: gym.Env):
        super().__init__(env)
        self._next: tuple[int | None, dict[str, Any] | None, Any] | None = None
        self._freeze_next = False
        self._frozen = False
        self._steps_frozen = 0
        self._draws_end = False
        # Released while it stood still: nobody has begun an episode
        self._unbegun = False
        self._tag: Any = None
        self._obs: Any = None
        self._actions: list[Any] = []

    @property
    def frozen(self) -> bool:
        """Whether this env stands still."""
        return self._frozen

    @property
    def episode_tag(self) -> Any:
        """Tag of the present episode; None if nobody has announced it."""
        return None if self._frozen else self._tag

    def set_next_reset(
        self, seed: int | None = None, options: dict[str, Any] | None = None, tag: Any = None, frozen: bool = False
    ) -> None:
        """
        Say what the next ``reset`` of this env does (auto-reset included).

        :param seed: its seed
        :param options: its options
        :param tag: given back as ``info["episode_tag"]`` at that reset and at every step of the episode
        :param frozen: do not start an episode: the env stands still, at no cost, until :meth:`thaw`
        """
        self._next = (seed, options, tag)
        self._freeze_next = frozen

    def release(self) -> None:
        """
        Take back what was announced, for whoever uses the env next and announces nothing. If it stands still, an
        episode begins with the next step, unless it is reset before.
        """
        self._next, self._freeze_next, self._tag = None, False, None
        self._unbegun, self._frozen = self._unbegun or self._frozen, False

    def draw_end(self, wanted: bool = True) -> None:
        """
        For films: a VecEnv resets at once, so that nobody can draw the end of an episode afterwards.

        :param wanted: whether ``info["final_frame"]`` of a last step has what ``render()`` gives then
        """
        self._draws_end = wanted

    def thaw(self) -> tuple[Any, dict[str, Any]]:
        """
        End the freeze and start the episode that :meth:`set_next_reset` announced.

        :return: observation and info of the reset
        """
        self._frozen = False
        self._freeze_next = False
        return self.reset()

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Reset; an explicit ``seed`` or ``options`` wins over the announced one, and a seed over a freeze."""
        self._unbegun = False
        if self._freeze_next and seed is None:
            if self._obs is None:  # never reset: something has to be shown while it stands still
                self._obs, _ = self.env.reset(seed=seed, options=options)
            self._frozen, self._freeze_next, self._steps_frozen = True, False, 0
            return self._obs, {"frozen": True, "episode_tag": None}
        self._frozen = self._freeze_next = False
        if self._next is not None:
            next_seed, next_options, self._tag = self._next
            seed = next_seed if seed is None else seed
            options = next_options if options is None else options
            self._next = None
        else:
            self._tag = None
        self._actions = []
        self._obs, info = self.env.reset(seed=seed, options=options)
        info["episode_tag"] = self._tag
        return self._obs, info

    def episode_so_far(self) -> tuple[Any, np.ndarray, int]:
        """
        For a training that is interrupted: what it takes to bring another env of the kind to the same state.

        :return: tag of the present episode, the actions played in it, and a checksum of what the env shows
        """
        return self._tag, np.array(self._actions), _checksum(self._obs)

    def replay(self, episodes: dict[Any, tuple[np.ndarray, int]]) -> bool:
        """
        Play again what was played of the episode that has just begun.

        :param episodes: by tag, actions and checksum that :meth:`episode_so_far` gave
        :return: whether that led to the same state; False as well for an episode that is not among them, because it
            was lost with its worker when they were taken
        """
        actions, checksum = episodes.get(self._tag, ((), None))
        if checksum is None or len(actions) > MAX_REPLAYED:
            return False
        for action in actions:
            _, _, terminated, truncated, _ = self.step(action)
            if terminated or truncated:
                return False
        return _checksum(self._obs) == checksum

    def step(self, action: Any) -> tuple[Any, SupportsFloat, bool, bool, dict[str, Any]]:
        """
        As the wrapped env's; a no-op while frozen.

        :raises RuntimeError: it has been frozen for ``MAX_STEPS_FROZEN`` steps
        """
        if self._frozen:
            self._steps_frozen += 1
            if self._steps_frozen > MAX_STEPS_FROZEN:
                raise RuntimeError(
                    f"This env has stood still for {MAX_STEPS_FROZEN} steps. Either the episode of another never ends, "
                    "or an evaluation has reset this one in the middle of learn(): give that an env of its own."
                )
            return self._obs, 0.0, False, False, {"frozen": True, "episode_tag": None}
        if self._unbegun:
            self.reset()
        if len(self._actions) <= MAX_REPLAYED:
            self._actions.append(np.array(action))
        self._obs, reward, terminated, truncated, info = self.env.step(action)
        info["episode_tag"] = self._tag
        if self._draws_end and (terminated or truncated):
            info["final_frame"] = self.env.render()
        return self._obs, reward, terminated, truncated, info

    def expert_action(self) -> Any:
        """
        The wrapped env's expert label; zeros while frozen.
        """
        if self._frozen:
            return np.zeros(self.action_space.shape, dtype=self.action_space.dtype)
        return self._label()


def _checksum(obs: Any) -> int:
    if isinstance(obs, dict):
        return zlib.crc32(repr([(key, _checksum(obs[key])) for key in sorted(obs)]).encode())
    return zlib.crc32(np.ascontiguousarray(obs).tobytes())
