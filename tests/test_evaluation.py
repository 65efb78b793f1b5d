"""The evaluator plays exactly the episodes that were asked for, and its statistics are right."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import sb3_contrib
import torch as th
from gymnasium import spaces
from stable_baselines3 import DQN, PPO, SAC, TD3
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv, VecNormalize
from toys import vec

from opd_gym.envs.workers.vec_env import WorkerVecEnv
from opd_gym.envs.wrappers import EpisodeControl
from opd_gym.evaluation import (
    MAX_FALSE_STARTS,
    EpisodeRecord,
    EpisodeSpec,
    EvaluationResult,
    LostEpisode,
    difference_interval,
    eval_episodes,
    evaluate_success,
    mcnemar,
    wilson_interval,
)


class Masked(gym.Env):
    """Only the action that the mask allows solves it, and it changes from step to step."""

    observation_space = spaces.Box(0, 1, (1,), np.float32)
    action_space = spaces.Discrete(7)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.t, self.right = 0, True
        return np.zeros(1, np.float32), {}

    def action_masks(self) -> np.ndarray:
        return np.arange(7) == (3 * self.t) % 7

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.right &= bool(self.action_masks()[int(action)])
        self.t += 1
        return np.zeros(1, np.float32), 0.0, self.t >= 6, False, {"is_success": self.right}


@pytest.mark.parametrize("of_policy", [False, True])
def test_a_policy_with_masks_is_asked_with_them(of_policy: bool) -> None:
    env = DummyVecEnv([lambda: EpisodeControl(Monitor(Masked()))] * 2)
    model = sb3_contrib.MaskablePPO("MlpPolicy", env, n_steps=8, seed=0)
    result = evaluate_success(
        model.policy if of_policy else model, env, [{"seed": i} for i in range(5)], progress=False
    )
    assert result.success_rate == 1.0


def test_a_policy_with_memory_is_refused() -> None:
    env = DummyVecEnv([lambda: EpisodeControl(Monitor(Masked()))])
    model = sb3_contrib.RecurrentPPO("MlpLstmPolicy", env, n_steps=8)
    for asked in (model, model.policy):
        with pytest.raises(ValueError, match="recurrent"):
            evaluate_success(asked, env, [{"seed": 0}], progress=False)


class Countdown(gym.Env):
    """Action 1 solves an episode of an even task; it lasts ``3 + init_state_id`` steps. Every reset is remembered."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 1}
    observation_space = spaces.Box(0, 100, (2,), np.float32)
    action_space = spaces.Discrete(2)

    def __init__(self, render_mode: str | None = None) -> None:
        self.render_mode = render_mode
        self.resets: list[tuple[int, int]] = []
        self.n_steps = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        options = options or {}
        self.task = int(options.get("task_id", 99))
        self.state = int(options.get("init_state_id", 99))
        self.resets.append((self.task, self.state))
        self.left = 3 + self.state
        return self._obs(), {}

    def _obs(self) -> np.ndarray:
        return np.array([self.task, self.left], dtype=np.float32)

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.n_steps += 1
        self.left -= 1
        done = self.left <= 0
        success = done and action == 1 and self.task % 2 == 0
        info = {"task_id": self.task, "init_state_id": self.state, "is_success": success, "n_executed": 2}
        return self._obs(), float(success), done, False, info

    def render(self) -> np.ndarray:  # type: ignore[override]
        return np.full((8, 8, 3), self.left, dtype=np.uint8)


class Poisoned(Countdown):
    """
    Raises in some initial states.

    :param states: where it raises
    :param where: "reset" or "step"
    """

    def __init__(self, states: tuple[int, ...], where: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.states, self.where = states, where

    def _raise(self, where: str) -> None:
        if self.where == where and self.state in self.states:
            raise ValueError(f"state {self.state} is broken")

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        found = super().reset(seed=seed, options=options)
        self._raise("reset")
        return found

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        self._raise("step")
        return super().step(action)


class Always:
    """Policy that repeats one action and remembers how many observations it saw."""

    def __init__(self, action: int = 1) -> None:
        self.action = action
        self.seen = 0

    def predict(self, observation: Any, *, deterministic: bool = False) -> tuple[np.ndarray, None]:
        self.seen += len(observation)
        return np.full(len(observation), self.action), None


def make(n_envs: int, cls: type[VecEnv] = DummyVecEnv, **kwargs: Any) -> VecEnv:
    return cls([lambda: EpisodeControl(Monitor(Countdown(**kwargs)))] * n_envs)  # type: ignore[call-arg,list-item,arg-type]


@pytest.mark.parametrize(
    ("k", "n", "low", "high"),
    [
        # By hand: p = 0.5, z^2/n = 0.38416, centre = 0.5, half = 1.96 sqrt(0.025 + 0.009604) / 1.38416.
        (5, 10, 0.236593, 0.763407),
        (0, 10, 0.0, 0.277533),
        (10, 10, 0.722467, 1.0),
        (90, 100, 0.825634, 0.944771),
        (0, 0, 0.0, 1.0),
    ],
)
def test_wilson_interval(k: int, n: int, low: float, high: float) -> None:
    assert wilson_interval(k, n) == pytest.approx((low, high), abs=1e-5)


@pytest.mark.parametrize(("k", "n"), [(3, 2), (-1, 2), (0, -1)])
def test_wilson_interval_refuses_impossible_counts(k: int, n: int) -> None:
    with pytest.raises(ValueError, match="0 <= k <= n"):
        wilson_interval(k, n)


@pytest.mark.parametrize("n_envs", [1, 2, 3, 7])
def test_exactly_the_requested_episodes(n_envs: int) -> None:
    env = make(n_envs)
    asked = [(task, state) for task in (0, 1, 2) for state in (0, 4)]
    policy = Always()
    result = evaluate_success(policy, env, eval_episodes((0, 1, 2), 2, init_states=[0, 4]), progress=False)
    assert [(r.task_id, r.init_state_id) for r in result.episodes] == asked
    assert [r.success for r in result.episodes] == [True, True, False, False, True, True]
    assert [r.steps for r in result.episodes] == [2 * (3 + state) for _, state in asked]
    played = [reset for resets in env.get_attr("resets") for reset in resets]
    # A worker without an episode has to be reset once before it can stand still.
    assert sorted(reset for reset in played if reset != (99, 99)) == sorted(asked)
    assert played.count((99, 99)) == max(0, n_envs - len(asked))
    # No step of the simulator, and no decision of the policy, that belongs to no episode.
    n_steps = sum(3 + state for _, state in asked)
    assert sum(env.get_attr("n_steps")) == policy.seen == n_steps


def test_evaluating_again_with_the_same_envs_and_then_training_on_them() -> None:
    env = make(3)
    for _ in range(2):
        result = evaluate_success(Always(), env, eval_episodes([0], 2), progress=False)
        assert [(r.init_state_id, r.success) for r in result.episodes] == [(0, True), (1, True)]
    env.reset()
    for _ in range(5):
        _, _, _, infos = env.step(np.ones(3, dtype=np.int64))
    assert not any(info.get("frozen") for info in infos)


@pytest.mark.parametrize("cls", [DummyVecEnv, WorkerVecEnv])
def test_whoever_uses_the_env_next_finds_it_playing(cls: Any) -> None:
    """A model of Stable-Baselines3 goes on without a reset; envs that stand still would give it reward 0 for ever."""
    env = make(3, cls)
    try:
        evaluate_success(Always(1), env, eval_episodes([0], 4), progress=False)
        assert env.get_attr("frozen") == [False] * 3 and env.get_attr("episode_tag") == [None] * 3
        ended = 0
        for _ in range(110):  # what nobody announces takes 102 steps
            _, _, dones, infos = env.step(np.ones((3,), dtype=np.int64))
            ended += int(dones.sum())
            assert not any("frozen" in info for info in infos)
        assert ended == 3
    finally:
        env.close()


def test_a_vec_normalize_stays_as_it_is_and_returns_are_the_envs() -> None:
    env = VecNormalize(vec(2, env="Pendulum-v1"))
    env.reset()
    for _ in range(50):
        env.step(np.ones((2, 1), np.float32))
    mean, count = env.obs_rms.mean.copy(), env.obs_rms.count

    class Nothing:
        def predict(self, observation: Any, **_: Any) -> Any:
            assert np.abs(observation).max() <= 10.0
            return np.zeros((len(observation), 1), np.float32), None

    found = evaluate_success(Nothing(), env, [EpisodeSpec(seed=i) for i in range(3)], progress=False)
    expected = []
    for seed in range(3):
        plain = gym.make("Pendulum-v1")
        plain.reset(seed=seed)
        expected.append(sum(float(plain.step(np.zeros(1, np.float32))[1]) for _ in range(200)))
    assert found.mean_reward == pytest.approx(np.mean(expected), rel=1e-4)
    assert env.training and env.norm_reward
    assert np.array_equal(env.obs_rms.mean, mean) and env.obs_rms.count == count


@pytest.mark.parametrize(
    ("info", "expected"),
    [
        ({"difficulty": np.int64(2), "perturbation": np.float32(0.5)}, {"difficulty": 2, "perturbation": None}),
        ({"difficulty": "hard", "category": 3}, {"difficulty": None, "category": None}),
        ({"task_id": "pick", "init_state_id": True}, {"task_id": 7, "init_state_id": -1}),
        ({"task_id": np.int32(4), "frozen": True}, {"task_id": 4}),
        ({"episode": 3}, {"task_id": 7, "reward": 0.0}),
        ({"episode": {"r": 99.0}}, {"reward": 0.0}),
    ],
)
def test_an_env_may_mean_other_things_by_our_names(
    info: dict[str, Any], expected: dict[str, Any], tmp_path: Path
) -> None:
    class Own(Countdown):
        def step(self, action: Any) -> Any:
            *rest, _ = super().step(action)
            return *rest, {"is_success": True, **info}

    env = DummyVecEnv([lambda: EpisodeControl(Own())])
    result = evaluate_success(Always(1), env, [EpisodeSpec(seed=0, options={"task_id": 7})], progress=False)
    result.save(tmp_path / "result.json")
    (episode,) = EvaluationResult.load(tmp_path / "result.json").episodes
    assert {name: getattr(episode, name) for name in expected} == expected


class OneStep(gym.Env):
    """What it says of success, and a reward that single precision does not have."""

    observation_space, action_space = spaces.Box(-1, 1, (3,), np.float32), spaces.Discrete(2)

    def __init__(self, said: Any = None, reward: float = 0.7) -> None:
        self.said, self.reward = said, reward

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        return np.zeros(3, np.float32), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        return np.zeros(3, np.float32), self.reward, True, False, {} if self.said is None else {"is_success": self.said}


@pytest.mark.parametrize(
    ("said", "reward", "threshold", "expected"),
    [
        (True, 0.0, 10.0, True),  # what the env says comes before any return
        (np.array([False]), 0.7, 0.7, False),
        (None, 0.7, 0.7, True),
        (None, 0.7, 0.70001, False),
        (float("nan"), 0.7, None, None),
        (None, float("nan"), 0.7, None),
    ],
)
@pytest.mark.parametrize("wrapper", [Monitor, lambda env: env])
def test_what_counts_as_success(said: Any, reward: float, threshold: float, expected: Any, wrapper: Any) -> None:
    env = DummyVecEnv([lambda: EpisodeControl(wrapper(OneStep(said, reward)))])
    result = evaluate_success(Always(), env, [{"seed": 0}], progress=False, reward_threshold=threshold)
    assert result.episodes[0].success is expected
    assert result.mean_reward == pytest.approx(reward, nan_ok=True)
    # Which single precision does not have
    many = DummyVecEnv([lambda: EpisodeControl(wrapper(OneStep(said, 16777217.0)))])
    returned = evaluate_success(Always(), many, [{"seed": 0}], progress=False).mean_reward
    assert returned == 16777216.0 + (wrapper is Monitor)


def test_a_word_is_no_success() -> None:
    env = DummyVecEnv([lambda: EpisodeControl(OneStep("False"))])
    with pytest.raises(ValueError, match="True or False, got 'False'"):
        evaluate_success(Always(), env, [{"seed": 0}], progress=False)


def test_episodes_without_a_seed_are_those_of_the_vec_envs_seed() -> None:
    def lengths(seed: int) -> list[int]:
        env = DummyVecEnv([lambda: EpisodeControl(Monitor(gym.make("CartPole-v1")))] * 2)
        env.seed(seed)
        specs: list[Any] = [{}] * 6
        result = evaluate_success(Always(), env, specs, progress=False, reward_threshold=9.0)
        return [episode.steps for episode in result.episodes]

    assert lengths(0) == lengths(0) != lengths(1)


def test_a_seed_of_the_vec_env_does_not_win() -> None:
    env = DummyVecEnv([lambda: EpisodeControl(Monitor(gym.make("CartPole-v1")))])
    specs = [EpisodeSpec(seed=seed) for seed in (5, 6)]
    results = []
    for vec_seed in (0, 1):
        env.seed(vec_seed)
        results.append(evaluate_success(Always(), env, specs, progress=False, reward_threshold=9.0))
    assert results[0] == results[1]
    assert [r.seed for r in results[0].episodes] == [5, 6]


def test_workers_in_processes() -> None:
    env = make(2, SubprocVecEnv)
    try:
        result = evaluate_success(Always(), env, eval_episodes([0, 1], 3), progress=False)
    finally:
        env.close()
    assert result.success_rate == 0.5


def test_workers_keep_their_tasks() -> None:
    env = make(2)
    evaluate_success(Always(), env, eval_episodes([0, 1], 10), progress=False)
    # Each task's simulator is built by one worker; only the last episodes may cross over.
    for resets in env.get_attr("resets"):
        tasks = [task for task, _ in resets]
        assert len(set(tasks[:8])) == 1


class Target(gym.Env):
    """One step, which any action of the space solves; it remembers the actions."""

    observation_space = spaces.Box(-1, 1, (3,), np.float32)

    def __init__(self, space: spaces.Space) -> None:
        self.action_space = space
        self.taken: list[Any] = []

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        return self.np_random.uniform(-1, 1, 3).astype(np.float32), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        assert self.action_space.contains(np.asarray(action, self.action_space.dtype))
        self.taken.append(action)
        return np.zeros(3, np.float32), 0.0, True, False, {"is_success": True}


@pytest.mark.parametrize(
    "space",
    [spaces.Discrete(5), spaces.MultiDiscrete([4, 6]), spaces.MultiBinary(4), spaces.Box(-1, 1, (2,), np.float32)],
    ids=lambda space: type(space).__name__,
)
def test_actions_are_sampled_at_the_temperature(space: spaces.Space) -> None:
    env = DummyVecEnv([lambda: EpisodeControl(Monitor(Target(space)))] * 2)
    model = PPO("MlpPolicy", env, n_steps=8, seed=0)
    specs = [{"seed": i} for i in range(40)]

    def taken(of: Any = model, **kwargs: Any) -> np.ndarray:
        for actions in env.get_attr("taken"):
            actions.clear()
        th.manual_seed(0)
        result = evaluate_success(of, env, specs, progress=False, **kwargs)
        assert result.temperature == kwargs.get("temperature", None if kwargs.get("deterministic", True) else 1.0)
        return np.array([action for actions in env.get_attr("taken") for action in actions], dtype=float)

    greedy, sampled = taken(), taken(temperature=1.0)
    assert np.allclose(taken(temperature=1e-8), greedy, atol=1e-3)
    assert not np.allclose(sampled, greedy, atol=1e-3)
    assert np.array_equal(taken(model.policy, temperature=1.0), sampled)
    assert np.array_equal(taken(deterministic=False), sampled)  # as Stable-Baselines3 samples


def test_who_cannot_be_sampled_at_a_temperature() -> None:
    env, specs = make(1), eval_episodes([0], 1)
    for model, message in (
        (Always(), "for actor-critic policies, got Always"),
        (DQN("MlpPolicy", env), "for actor-critic policies, got DQNPolicy"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate_success(model, env, specs, progress=False, temperature=0.5)
    for temperature in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="temperature"):
            evaluate_success(PPO("MlpPolicy", env), env, specs, progress=False, temperature=temperature)
    noisy = DummyVecEnv([lambda: EpisodeControl(Monitor(Target(spaces.Box(-1, 1, (2,), np.float32))))])
    with pytest.raises(ValueError, match="has its own noise"):
        evaluate_success(PPO("MlpPolicy", noisy, use_sde=True), noisy, specs, progress=False, temperature=0.5)


def test_what_has_no_samples_is_not_said_to_be_sampled() -> None:
    env = DummyVecEnv([lambda: EpisodeControl(Monitor(Target(spaces.Box(-1, 1, (2,), np.float32))))])
    countable = make(1)
    for model, own, message in (
        (DQN("MlpPolicy", countable), countable, "DQNPolicy has nothing to sample"),
        (TD3("MlpPolicy", env).policy, env, "TD3Policy has nothing to sample"),
        (PPO("MlpPolicy", env, use_sde=True), env, "noise once a rollout"),
        (SAC("MlpPolicy", env, use_sde=True), env, "noise once a rollout"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate_success(model, own, [{"seed": 0}], deterministic=False, progress=False)
        assert evaluate_success(model, own, [{"seed": 0}], progress=False).temperature is None
    maskable = sb3_contrib.MaskablePPO("MlpPolicy", countable)
    for samples, own in ((SAC("MlpPolicy", env), env), (maskable, countable), (maskable.policy, countable)):
        result = evaluate_success(samples, own, [{"seed": 0}], deterministic=False, progress=False)  # type: ignore[arg-type]
        assert result.temperature == 1.0


def test_an_evaluation_draws_no_action_from_the_env() -> None:
    env = make(3)
    env.action_space.seed(0)
    expected = [env.action_space.sample() for _ in range(8)]
    env.action_space.seed(0)
    evaluate_success(Always(), env, eval_episodes([0], 1), progress=False)
    assert [env.action_space.sample() for _ in range(8)] == expected


def test_recording() -> None:
    env = make(2, render_mode="rgb_array")
    env.render_mode = "rgb_array"
    result = evaluate_success(Always(), env, eval_episodes([0], 3), progress=False, record=[0, 2])
    assert sorted(result.frames) == [0, 2]
    assert [len(result.frames[i]) for i in (0, 2)] == [4, 6]
    assert [int(frame[0, 0, 0]) for frame in result.frames[0]] == [3, 2, 1, 0]  # the last one shows how it ended
    with pytest.raises(ValueError, match="rgb_array"):
        evaluate_success(Always(), make(1), eval_episodes([0], 1), progress=False, record=1)


@pytest.mark.parametrize("where", ["reset", "step"])
@pytest.mark.parametrize(("cls", "n_envs"), [(DummyVecEnv, 1), (DummyVecEnv, 3), (WorkerVecEnv, 2)])
@pytest.mark.filterwarnings("ignore:WorkerVecEnv:RuntimeWarning")
def test_an_episode_in_which_the_env_raises_costs_no_other(n_envs: int, cls: Any, where: str, tmp_path: Path) -> None:
    envs = [lambda: EpisodeControl(Monitor(Poisoned((0, 4), where, render_mode="rgb_array")))] * n_envs  # type: ignore[arg-type]
    env = cls(envs)
    env.render_mode = "rgb_array"
    specs = eval_episodes([2, 3], 6)
    try:
        result = evaluate_success(Always(), env, specs, progress=False, record=[0, 1])
        expected = [(task, state) for task in (2, 3) for state in (1, 2, 3, 5)]
        assert [(record.task_id, record.init_state_id) for record in result.episodes] == expected
        assert [record.success for record in result.episodes] == [True] * 4 + [False] * 4
        assert [(lost.task_id, lost.init_state_id) for lost in result.lost] == [(2, 0), (2, 4), (3, 0), (3, 4)]
        assert all(f"ValueError: state {lost.init_state_id} is broken" in lost.reason for lost in result.lost)
        assert list(result.frames) == [0] and len(result.frames[0]) == 5  # of the first that was not lost
        with pytest.raises(RuntimeError, match="All 1 episodes of the evaluation were lost; .*state 4 is broken"):
            evaluate_success(Always(), env, specs[4:5], progress=False)
    finally:
        env.close()
    assert "\nEpisodes lost, which count neither as solved nor as failed: 4\n" in result.to_markdown()
    assert "- task 3, initial state 4, seed 1000004: ValueError: state 4 is broken\n" in result.to_markdown()
    assert str(result).endswith("(4/8, 4 lost)")
    result.save(tmp_path / "result.json")
    assert EvaluationResult.load(tmp_path / "result.json") == result
    # What one of two has lost is not compared
    whole = evaluate_success(Always(), make(n_envs), specs, progress=False)
    assert result.paired(whole) == whole.paired(result) == (0, 0, 1.0)


def test_an_env_that_always_raises_ends_the_evaluation_soon() -> None:
    env = DummyVecEnv([lambda: EpisodeControl(Monitor(Poisoned(tuple(range(100)), "step")))] * 2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="is broken"):
        evaluate_success(Always(), env, eval_episodes([0], 100), progress=False)
    assert max(len(resets) for resets in env.get_attr("resets")) == MAX_FALSE_STARTS


def test_errors_say_what_to_do() -> None:
    with pytest.raises(ValueError, match="EpisodeControl"):
        evaluate_success(Always(), DummyVecEnv([Countdown]), [{}], progress=False)
    cartpole = DummyVecEnv([lambda: EpisodeControl(Monitor(gym.make("CartPole-v1")))])
    with pytest.raises(ValueError, match="seed and options"):
        evaluate_success(Always(), cartpole, [{"sead": 0}], progress=False)
    with pytest.raises(ValueError, match="n_per_task"):
        eval_episodes([0], 0)
    with pytest.raises(ValueError, match="different initial states"):
        eval_episodes([0], 3, init_states=[1, 1, 2])
    with pytest.raises(ValueError, match="sampled"):
        eval_episodes([0], 3, init_states="test")


def test_eval_episodes() -> None:
    assert eval_episodes([3], 2) == [
        EpisodeSpec(1_000_000, {"task_id": 3, "init_state_id": 0}),
        EpisodeSpec(1_000_001, {"task_id": 3, "init_state_id": 1}),
    ]
    for tasks, states in (([3, 3], "eval"), ([3], [1, 1, 2])):
        with pytest.raises(ValueError, match="once|different initial states"):
            eval_episodes(tasks, 2, init_states=states)
    with pytest.raises(TypeError):
        eval_episodes([3], 1, init_states=[1.7])  # type: ignore[list-item]
    sampled = eval_episodes([3, 4], 2, init_states="sampled", seed=7)
    assert [(spec.seed, spec.options) for spec in sampled[1:3]] == [
        (8, {"task_id": 3, "init_state_id": -1}),
        (7, {"task_id": 4, "init_state_id": -1}),
    ]


def test_result(tmp_path: Any) -> None:
    records = [EpisodeRecord(task, i, i < 3 - task, 10, 0.0) for task in (0, 1) for i in range(4)]
    result = EvaluationResult(records)
    assert result.success_rate == 5 / 8
    assert result.interval == wilson_interval(5, 8)
    assert {task: part.success_rate for task, part in result.per_task().items()} == {0: 0.75, 1: 0.5}
    assert "| 1 | 50.0 % | 15.0 to 85.0 % | 4 | 10 |" in result.to_markdown()
    assert str(result) == "62.5 % [30.6, 86.3] (5/8)"
    path = tmp_path / "deep" / "result.json"
    result.save(path)
    assert EvaluationResult.load(path) == result
    assert json.loads(path.read_text())["n_success"] == 5
    assert [p.name for p in path.parent.iterdir()] == ["result.json"]
    assert "temperature" not in json.loads(path.read_text())
    sampled = EvaluationResult(records, temperature=0.3)
    sampled.save(path)
    assert EvaluationResult.load(path) == sampled != result
    assert sampled.per_task()[0].temperature == 0.3
    assert sampled.to_markdown() == result.to_markdown() + "\nActions were sampled at temperature 0.3.\n"
    assert math.isnan(EvaluationResult([]).success_rate)
    assert evaluate_success(Always(), make(1), [], progress=False) == EvaluationResult([])


def test_an_env_that_says_nothing_of_success_has_returns() -> None:
    cartpole = DummyVecEnv([lambda: EpisodeControl(Monitor(gym.make("CartPole-v1")))])
    specs = [EpisodeSpec(seed) for seed in (0, 1)]
    result = evaluate_success(Always(), cartpole, specs, progress=False)
    returns = [episode.reward for episode in result.episodes]
    assert [episode.success for episode in result.episodes] == [None, None]
    assert result.mean_reward == sum(returns) / 2 > 5 and result.std_reward == abs(returns[0] - returns[1]) / 2
    assert math.isnan(result.success_rate) and result.interval == (0.0, 1.0) and result.n_success == 0
    assert str(result) == f"mean return {result.mean_reward:.2f} +/- {result.std_reward:.2f} (2 episodes)"
    table = result.to_markdown()
    assert f"| {result.mean_reward:.2f} +/- {result.std_reward:.2f} | 2 |" in table and "success" not in table
    assert result.to_dict()["success_rate"] is None and result.to_dict()["mean_reward"] == result.mean_reward
    with pytest.raises(ValueError, match="which episodes were solved"):
        result.paired(result)
    judged = evaluate_success(Always(), cartpole, specs, progress=False, reward_threshold=max(returns))
    assert judged.n_success == 1 + (returns[0] == returns[1])
    assert "success" in judged.to_markdown() and "mean return" in judged.to_markdown()


def test_table_by_perturbation(tmp_path: Any) -> None:
    def episodes(n: int, k: int, **values: Any) -> list[EpisodeRecord]:
        return [EpisodeRecord(i, 0, i < k, 10, 0.0, **values) for i in range(n)]

    result = EvaluationResult(
        [
            *episodes(10, 9),
            *episodes(4, 3, category="camera", perturbation="view_1", difficulty=2),
            *episodes(4, 1, category="camera", perturbation="view_2", difficulty=1),
            *episodes(5, 0, category="swap"),
        ]
    )
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in result.to_markdown().splitlines()]
    assert [(row[0], row[1], row[3]) for row in rows[2:]] == [
        ("all", "56.5 %", "23"),
        ("unperturbed", "90.0 %", "10"),
        ("camera", "50.0 %", "8"),
        ("camera, level 1", "25.0 %", "4"),
        ("camera, level 2", "75.0 %", "4"),
        ("swap", "0.0 %", "5"),
    ]
    assert rows[0][-1] == "points against unperturbed"
    low, high = difference_interval(4, 8, 9, 10)
    assert rows[4][-1] == f"-40.0 [{100 * low:+.1f}, {100 * high:+.1f}]" and rows[2][-1] == rows[3][-1] == ""
    perturbed = EvaluationResult(result.episodes[10:]).to_markdown()
    assert "unperturbed" not in perturbed
    result.save(tmp_path / "result.json")
    assert EvaluationResult.load(tmp_path / "result.json") == result


def test_a_task_of_which_everything_was_lost_has_a_row() -> None:
    episodes = [EpisodeRecord(0, i, True, 10, 1.0, seed=i) for i in range(2)]
    rows = EvaluationResult(episodes, lost=[LostEpisode(1, 0, 0, "killed")]).to_markdown().splitlines()
    assert [row.split(" | ")[0] for row in rows[2:5]] == ["| 0", "| 1", "| all"]
    assert rows[3] == "| 1 |  |  | 0 |  |"


def test_difference_interval() -> None:
    """Newcombe (1998), Statistics in Medicine 17, table II, method 10."""
    assert difference_interval(56, 70, 48, 80) == pytest.approx((0.0524, 0.3339), abs=1e-4)
    assert difference_interval(9, 10, 3, 10) == pytest.approx((0.1705, 0.8090), abs=1e-4)
    assert difference_interval(5, 56, 0, 29) == pytest.approx((-0.0381, 0.1926), abs=1e-4)


def test_paired_results() -> None:
    # Exact binomial test of 8 against 1 of 9: 2 * (1 + 9) / 512.
    assert mcnemar(8, 1) == mcnemar(1, 8) == pytest.approx(20 / 512)
    assert mcnemar(0, 0) == mcnemar(3, 3) == 1.0
    first = EvaluationResult([EpisodeRecord(0, i, i != 0, 10, 0.0, seed=i) for i in range(12)])
    second = EvaluationResult([EpisodeRecord(0, i, i < 4, 10, 0.0, seed=i) for i in range(12)])
    assert first.paired(second) == (8, 1, pytest.approx(20 / 512))
    assert second.paired(first) == (1, 8, pytest.approx(20 / 512))
    assert first.paired(EvaluationResult(second.episodes[::-1])) == first.paired(second)
    with pytest.raises(ValueError, match="an episode that both have"):
        EvaluationResult([]).paired(EvaluationResult([]))
    for other in (second.episodes[1:], [EpisodeRecord(0, i, True, 10, 0.0) for i in range(12)]):
        with pytest.raises(ValueError, match="expects results of the same episodes"):
            first.paired(EvaluationResult(other))
    partly = EvaluationResult([EpisodeRecord(0, i, True if i < 2 else None, 10, 5.0, seed=i) for i in range(10)])
    assert str(partly) == "100.0 % [34.2, 100.0] (2/2, 8 not judged)"
    assert "The env says of 2 of 10 episodes whether they were solved." in partly.to_markdown()
    with pytest.raises(ValueError, match="know which episodes were solved"):
        partly.paired(partly)
    # Of two envs, in whatever order; one that is not named is taken for the other's
    a, b = (EvaluationResult([replace(e, env_id=env) for e in first.episodes]) for env in "AB")
    with pytest.raises(ValueError, match="differ in their envs"):
        a.paired(b)
    assert EvaluationResult(a.episodes + b.episodes).paired(EvaluationResult(b.episodes + a.episodes)) == (0, 0, 1.0)
    assert a.paired(second) == first.paired(second)
    # What was lost before its env said which task it was
    lost = EvaluationResult(second.episodes[1:], lost=[LostEpisode(-1, -1, 0, "killed")])
    assert first.paired(lost)[:2] == (8, 0)
    nameless = EvaluationResult([EpisodeRecord(0, -1, True, 10, 0.0) for _ in range(3)])
    with pytest.raises(ValueError, match="an initial state or a seed"):
        nameless.paired(nameless)
