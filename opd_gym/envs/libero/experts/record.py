"""Demonstrations by a scripted expert or a policy, recorded at states where a chunked policy might have to decide."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from opd_gym.actions import decode_tokens, encode_actions
from opd_gym.checks import check_at_least_one, check_range
from opd_gym.envs.libero.env import LiberoEnv


@dataclass
class RecordedEpisode:
    """
    One episode of demonstration.

    T is 0 where no state could be recorded.

    :param observations: arrays ``(T, ...)`` by key
    :param action_chunks: float32 ``(T, K, D)``: the actions in the K steps after each observation
    :param actions: float32 ``(T, D)``: the first of them
    :param task_id: the task
    :param seed: seed of the reset
    :param success: whether the episode ended in success
    :param n_steps: control steps of the episode, recorded or not
    """

    observations: dict[str, np.ndarray]
    action_chunks: np.ndarray
    actions: np.ndarray
    task_id: int
    seed: int
    success: bool
    n_steps: int


def _perturbation(rng: np.random.Generator) -> tuple[int, np.ndarray]:
    """A push, sometimes with a twist or a change of the gripper: for how many steps, and the action."""
    action = np.zeros(7, dtype=np.float32)
    action[:3] = rng.uniform(-1.0, 1.0, 3)
    if rng.random() < 0.33:
        action[3:6] = rng.uniform(-0.3, 0.3, 3)
    action[6] = rng.choice([-1.0, 1.0]) if rng.random() < 0.33 else 0.0
    return int(rng.integers(2, 9)), action


def record_episode(
    env: LiberoEnv,
    seed: int,
    task_id: int,
    chunk_size: int = 8,
    stride: int = 1,
    perturbation: float = 0.0,
    policy: Callable[[dict[str, np.ndarray]], np.ndarray] | None = None,
) -> RecordedEpisode:
    """
    Let the scripted expert, or a policy, play one episode, and label each state with the chunk of its next actions.

    With ``perturbation`` the player is sometimes pushed off its way and has to recover (noise injection as in DART,
    https://arxiv.org/abs/1703.09327), so that a policy also learns from states its own errors lead to. A state is
    recorded only if its next ``chunk_size`` steps are the player's own: a push is never a label.

    :param env: raw LIBERO env
    :param seed: seed of the reset and of the perturbations
    :param task_id: the task
    :param chunk_size: number of actions of a chunk
    :param stride: record one of every ``stride`` steps
    :param perturbation: probability of a push at a step
    :param policy: from an observation to the float actions ``(K, 7)`` that are carried out before it is asked again, or
        until the next push; None for the scripted expert, which is asked at every step
    :return: the episode
    """
    check_at_least_one(chunk_size=chunk_size, stride=stride)
    check_range("[0, 1]", perturbation=perturbation)
    rng = np.random.default_rng(seed)
    env.observe = True
    env.reset(seed=seed, options={"task_id": task_id})
    observations: list[tuple[int, dict[str, np.ndarray]]] = []
    actions: list[np.ndarray] = []
    clean: list[bool] = []
    left, push, rest = 0, np.zeros(7, dtype=np.float32), 0
    planned: deque[np.ndarray] = deque()
    done = success = False
    while not done:
        step = len(actions)
        if left == 0 and rest == 0 and rng.random() < perturbation:
            left, push = _perturbation(rng)
            rest = chunk_size + int(rng.integers(8, 25))
        obs = None
        if left == 0 and step % stride == 0:
            obs = env.current_observation()
            observations.append((step, obs))
        if left > 0:
            planned.clear()
        elif policy is not None and not planned:
            planned.extend(policy(env.current_observation() if obs is None else obs))
        if planned:
            action = np.asarray(planned.popleft(), dtype=np.float32)
        else:
            # Rounded to tokens, as a token policy would execute it.
            action = decode_tokens(encode_actions(env.expert_action() if left == 0 else push))
        if left > 0 and push[6] == 0.0 and actions:
            action[6] = actions[-1][6]
        actions.append(action)
        clean.append(left == 0)
        left, rest = max(left - 1, 0), max(rest - 1, 0) if left <= 1 else rest
        env.observe = False
        _, _, terminated, truncated, info = env.step(action)
        done, success = terminated or truncated, bool(info["is_success"])
    env.observe = True
    # Everyone stands still after a success: the last action is repeated.
    executed = np.stack(actions + [actions[-1]] * chunk_size)
    is_clean = np.array(clean + [True] * chunk_size)
    kept = [(step, obs) for step, obs in observations if is_clean[step : step + chunk_size].all()]
    steps = np.array([step for step, _ in kept], dtype=np.int64)
    chunks = executed[steps[:, None] + np.arange(chunk_size)].astype(np.float32)
    keys: list[Any] = list(kept[0][1]) if kept else []
    return RecordedEpisode(
        observations={key: np.stack([obs[key] for _, obs in kept]) for key in keys},
        action_chunks=chunks,
        actions=chunks[:, 0],
        task_id=task_id,
        seed=seed,
        success=success,
        n_steps=len(actions),
    )
