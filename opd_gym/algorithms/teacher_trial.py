"""A look at the teacher before it teaches: it plays a few episodes, and so does the student."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch as th
from gymnasium.wrappers import NormalizeObservation
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.utils import obs_as_tensor
from stable_baselines3.common.vec_env import VecEnv

from opd_gym.algorithms.randomness import preserved_rng
from opd_gym.algorithms.teachers import PolicyTeacher, Teacher
from opd_gym.envs.make import env_id_of
from opd_gym.envs.registration import CHUNK_SIZES, bare_id
from opd_gym.episodes import own_rewards
from opd_gym.tokens import env_actions, is_autoregressive

# How many episodes a teacher plays before it teaches, and how many steps of each env they may take
TRIAL_EPISODES = 5
TRIAL_STEPS = 1000


class _LongEnough(Exception):
    pass


class Trial:
    """
    Some episodes in the student's own env, by ``evaluate_policy`` of Stable-Baselines3.

    The env has to be reset afterwards. Its seeds, the statistics of a ``VecNormalize`` and the global random generators
    are left as they were.

    :param env: The student's env
    :param decide: From observations to actions
    :param n_episodes: Number of episodes; fewer, if they take each env more than ``TRIAL_STEPS`` steps
    """

    def __init__(self, env: VecEnv, decide: Callable[[Any], np.ndarray], n_episodes: int):
        self._decide = decide
        self._steps = 0
        self._rewards: list[float] = []
        self._successes: list[float] = []
        with preserved_rng(), _preserved_env(env), suppress(_LongEnough):
            evaluate_policy(self, env, n_episodes, callback=self._take_note, warn=False)  # type: ignore[arg-type]

    def predict(self, observation: Any, **_: Any) -> tuple[np.ndarray, None]:
        """What ``evaluate_policy`` asks."""
        self._steps += 1
        if self._steps > TRIAL_STEPS:
            raise _LongEnough
        return self._decide(observation), None

    def _take_note(self, variables: dict[str, Any], _: Any) -> None:
        self._rewards = variables["episode_rewards"]
        if variables["done"] and "is_success" in variables["info"]:
            self._successes.append(float(variables["info"]["is_success"]))

    @property
    def results(self) -> dict[str, float]:
        """``success_rate``, where the env tells, and ``ep_rew_mean``; empty if no episode ended."""
        found = {"success_rate": self._successes, "ep_rew_mean": self._rewards}
        return {name: float(np.mean(values)) for name, values in found.items() if values}


@contextmanager
def _preserved_env(env: VecEnv) -> Iterator[None]:
    slots = env.unwrapped
    # What the next reset is to be given
    seeds, options = list(slots._seeds), list(slots._options)
    try:
        with own_rewards(env):
            yield
    finally:
        slots._seeds, slots._options = seeds, options


def try_teacher(
    teacher: Teacher, env: VecEnv, student: BasePolicy, n_episodes: int | None = None, verbose: int = 0
) -> dict[str, float]:
    """
    Let the teacher play before it teaches, and the student as well: a teacher that does no better is worth a warning.
    The teacher takes its most likely actions, so what is tried is what is taught; the student acts as in a rollout.

    :param teacher: The teacher
    :param env: The student's env, which has to be reset afterwards
    :param student: The student's policy
    :param n_episodes: Number of episodes of each; 0: none. None: 5 for a policy in an env that is not one of this
        library's benchmarks, which are slow; 0 for other teachers
    :param verbose: 1 to say how well they did
    :return: ``success_rate`` and ``ep_rew_mean`` of the teacher, as far as they are known
    :raises ValueError: Episodes are asked of an autoregressive teacher
    """
    policy = teacher.policy if isinstance(teacher, PolicyTeacher) else None
    if n_episodes is None:
        slow = bare_id(env_id_of(env) or "") in CHUNK_SIZES or is_autoregressive(policy)
        # Each episode would leave its mark on running statistics, and a strict Monitor lets nobody break one off
        strict = env.has_attr("allow_early_resets") and not all(env.get_attr("allow_early_resets"))
        marked = strict or any(env.env_is_wrapped(NormalizeObservation))
        n_episodes = 0 if policy is None or slow or marked else TRIAL_EPISODES
    if n_episodes == 0:
        return {}
    if is_autoregressive(policy):
        raise ValueError("An autoregressive teacher is not tried before it teaches: leave out n_eval_episodes.")

    def teach(observations: Any) -> np.ndarray:
        labels = teacher.label(env, np.arange(env.num_envs)) if teacher.privileged else np.empty((env.num_envs, 0))
        tensors = obs_as_tensor(observations, student.device)
        tokens = teacher.distribution(tensors, th.as_tensor(labels, device=student.device)).mode()
        actions = tokens.cpu().numpy().reshape(-1, *(env.action_space.shape or ()))
        return env_actions(student, actions.astype(env.action_space.dtype, copy=False))

    theirs = Trial(env, teach, n_episodes).results
    # Sampled, as in a rollout: the mode of an untrained policy is one action for ever, or luck
    ours = Trial(env, lambda observations: student.predict(observations)[0], n_episodes).results
    if not theirs or not ours:
        return theirs
    said = [f"the {who} {_report(results)}" for who, results in (("teacher", theirs), ("student", ours))]
    if verbose >= 1:
        print(f"Before training, {said[0]}, {said[1]}.")
    if [theirs[name] for name in ours if name in theirs] <= [ours[name] for name in ours if name in theirs]:
        warnings.warn(
            f"The teacher does no better than the student before training: {said[0]}, {said[1]}. Does it see what it "
            "was trained on (normalisation, wrappers, order of the numbers)? If the env's rewards mean nothing, "
            "teacher_kwargs={'n_eval_episodes': 0} leaves this check out.",
            stacklevel=2,
        )
    return theirs


def _report(results: dict[str, float]) -> str:
    success = f"succeeds in {results['success_rate']:.0%}, " if "success_rate" in results else ""
    return f"{success}has a mean reward of {results['ep_rew_mean']:.4g}"
