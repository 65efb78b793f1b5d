"""Which episode each env plays: how it is specified, and the one dispatcher that hands episodes to envs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from stable_baselines3.common.vec_env import VecEnv, unwrap_vec_normalize

from opd_gym.checks import check_seed


@dataclass(frozen=True)
class EpisodeSpec:
    """
    One episode: how its env is reset.

    :param seed: seed of the reset
    :param options: options of the reset, on LIBERO ``task_id`` and ``init_state_id``
    :param group: number of the group of episodes from one state that it belongs to; -1 for none
    :param member: its number in the group, or among all episodes
    """

    seed: int | None = None
    options: dict[str, Any] | None = None
    group: int = -1
    member: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "seed", check_seed(self.seed))


class Dispatcher:
    """
    Hands episodes to the envs of a vectorised env.

    Stable-Baselines3's envs reset by themselves as soon as an episode ends. So each env is told its next episode while
    it still plays the present one, and none waits for the others. An env for which there is no episode left stands
    still. Envs that are not wrapped in ``EpisodeControl`` cannot be told; they choose for themselves.

    Call :meth:`announce_first`, reset the vectorised env, then :meth:`all_begun`, and :meth:`begun` whenever an episode
    of an env ended.

    :param env: vectorised env
    :param next_episode: from the number of an env to the episode that it plays next, or None to let it stand still
    """

    def __init__(self, env: VecEnv, next_episode: Callable[[int], EpisodeSpec | None]):
        self.env = env
        self.next_episode = next_episode
        #: Whether the envs can be told which episode to play
        self.controlled = can_announce(env)
        #: What each env plays now; None where it stands still, or chooses for itself
        self.playing: list[EpisodeSpec | None] = [None] * env.num_envs
        #: Whether each env stands still, bool ``(num_envs,)``
        self.standing_still = np.zeros(env.num_envs, dtype=bool)
        #: Running number of the episode of each env, int64 ``(num_envs,)``
        self.numbers = np.zeros(env.num_envs, dtype=np.int64)
        self._announced: list[EpisodeSpec | None] = [None] * env.num_envs
        self._n_begun = 0

    def announce_first(self) -> None:
        """Announce the first episode of every env, before the vectorised env is reset."""
        if self.controlled:
            seeds: list[int | None] = self.env.unwrapped._seeds
            for index in range(self.env.num_envs):
                self._announce_next(index)
                announced = self._announced[index]
                if announced is None or announced.seed is not None:
                    # A seed that was given to the vectorised env would win over the announced one, and over a freeze
                    seeds[index] = None

    def so_far(self) -> dict[str, Any] | None:
        """
        For a training that is interrupted.

        :return: which episodes are played and announced, and what was played of them: plain values and arrays; None
            where envs choose for themselves, or stand still
        """
        if not self.controlled or self.standing_still.any():
            return None
        return {
            "playing": [vars(episode) for episode in self.playing if episode is not None],
            "announced": [episode and vars(episode) for episode in self._announced],
            "numbers": self.numbers.copy(),
            "n_begun": self._n_begun,
            "played": self.env.env_method("episode_so_far"),
        }

    def announce_again(self, so_far: dict[str, Any]) -> None:
        """
        Announce the episodes of an interrupted training, before the vectorised env is reset.

        :param so_far: what :meth:`so_far` gave
        """
        self.env.unwrapped._reset_seeds()
        for index, episode in enumerate(so_far["playing"]):
            self._announce(index, EpisodeSpec(**episode))

    def replay(self, so_far: dict[str, Any]) -> bool:
        """
        After the reset, play again what was played of these episodes.

        :param so_far: what :meth:`so_far` gave
        :return: whether all envs are where they were; if not, they have to be reset
        """
        for index, episode in enumerate(so_far["announced"]):
            self.playing[index] = self._announced[index]
            self._announce(index, episode and EpisodeSpec(**episode))
        self.numbers[:], self._n_begun = so_far["numbers"], so_far["n_begun"]
        return all(self.env.env_method("replay", {tag: tuple(played) for tag, *played in so_far["played"]}))

    def begun(self, index: int) -> None:
        """
        Take note that the announced episode of an env has begun, and announce the one after it.

        :param index: the env
        """
        self.numbers[index] = self._n_begun
        self._n_begun += 1
        if self.controlled:
            self.playing[index] = self._announced[index]
            self.standing_still[index] = self.playing[index] is None
            if not self.standing_still[index]:
                self._announce_next(index)

    def all_begun(self) -> None:
        """Take note that the vectorised env was reset: the announced episodes of all envs have begun."""
        for index in range(self.env.num_envs):
            self.begun(index)

    def tag(self, index: int) -> tuple[int, int] | None:
        """
        :param index: an env
        :return: the tag of the episode that it plays; None where it stands still, or chooses for itself
        """
        episode = self.playing[index]
        return None if episode is None else (episode.group, episode.member)

    def _announce_next(self, index: int) -> None:
        self._announce(index, self.next_episode(index))

    def _announce(self, index: int, episode: EpisodeSpec | None) -> None:
        self._announced[index] = episode
        if episode is None:
            announce(self.env, index, frozen=True)
        else:
            tag = (episode.group, episode.member)
            announce(self.env, index, seed=episode.seed, options=episode.options, tag=tag)


def release(env: VecEnv) -> None:
    """
    Leave a vectorised env to others: nothing is announced any more, and no env of it stands still.

    :param env: vectorised env
    """
    # Between sending actions and receiving what came of them SubprocVecEnv would take one answer for another
    if can_announce(env) and not getattr(env.unwrapped, "waiting", False):
        env.env_method("release")


def can_announce(env: VecEnv) -> bool:
    """
    :param env: vectorised env
    :return: whether every env of it can be told which episode to play next (``EpisodeControl``)
    """
    return env.has_attr("set_next_reset")


def announce(env: VecEnv, index: int, **announcement: Any) -> None:
    """
    Announce the next episode of an env that is wrapped in ``EpisodeControl``, without waiting where that is possible.

    :param env: vectorised env
    :param index: the env
    :param announcement: arguments of ``EpisodeControl.set_next_reset``
    """
    inner: Any = env.unwrapped
    if hasattr(inner, "announce"):  # a WorkerVecEnv
        inner.announce(index, **announcement)
    else:
        env.env_method("set_next_reset", indices=[index], **announcement)


@contextmanager
def own_rewards(env: VecEnv) -> Iterator[None]:
    """
    The statistics of a ``VecNormalize`` stand still, and rewards are those of the env.

    :param env: vectorised env
    """
    vec_normalize = unwrap_vec_normalize(env)
    if vec_normalize is None:
        yield
        return
    training, norm_reward = vec_normalize.training, vec_normalize.norm_reward
    vec_normalize.training = vec_normalize.norm_reward = False
    try:
        yield
    finally:
        vec_normalize.training, vec_normalize.norm_reward = training, norm_reward
