"""Workers host several envs, never let the learner's data depend on their speed, and may die."""

from __future__ import annotations

import ctypes
import gc
import importlib
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cloudpickle
import gymnasium as gym
import numpy as np
import pytest
import stable_baselines3
import torch as th
import toys
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import configure
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecTransposeImage
from toys import Match, assert_same, parameters

import opd_gym
from opd_gym.algorithms.grpo import GRPO
from opd_gym.algorithms.opd import OPD
from opd_gym.algorithms.ppo import PPO
from opd_gym.envs import registration
from opd_gym.envs.make import build_env
from opd_gym.envs.workers.pipeline import Pipeline
from opd_gym.envs.workers.process import WorkerTraceback
from opd_gym.envs.workers.vec_env import MAX_DEATHS, WorkerVecEnv
from opd_gym.envs.wrappers import EpisodeControl
from opd_gym.evaluation import EpisodeSpec, evaluate_success
from opd_gym.zoo.hyperparams import split_hyperparams

# Workers that imported these modules would import torch, and take seconds to start
for module in (sys.modules[__name__], toys):
    cloudpickle.register_pickle_by_value(module)

GO, DIE, CRASH, DIVERGE, MISTAKE, HANG, SLEEP, SEIZE = range(8)
# More than a socket takes at once
BALLAST = bytes(2_000_000)


class Probe(gym.Env):
    """
    Shows what it was reset with and how many steps it took; actions say how it misbehaves.

    :param horizon: number of steps of an episode
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 1}
    observation_space = spaces.Box(-1e6, 1e6, (2,), np.float32)
    action_space = spaces.Discrete(8)

    def __init__(self, horizon: int = 4, render_mode: str | None = None):
        self.horizon = horizon
        self.render_mode = render_mode
        self.flavour = "plain"
        self.moods: list[str] = []

    def _obs(self):
        return np.array([self.episode, self.t], dtype=np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode, self.t = (options or {}).get("episode", -1 if seed is None else seed), 0
        return self._obs(), {"options": options}

    def step(self, action):
        if action == DIE:
            os.kill(os.getpid(), signal.SIGKILL)
        elif action == CRASH:
            os.abort()
        elif action == DIVERGE:
            raise RuntimeError("the simulation is unstable")
        elif action == MISTAKE:
            raise ValueError("no such action")
        elif action == HANG:
            time.sleep(3600)
        elif action == SLEEP:
            time.sleep(0.05)
        elif action == SEIZE:
            # Native code that keeps the interpreter's lock: no thread of this process reads what it is sent
            ctypes.PyDLL(None).sleep(3600)
        self.t += 1
        done = self.t >= self.horizon
        return self._obs(), float(self.t), done, False, {"is_success": True} if done else {}

    def render(self):
        return np.full((4, 4, 3), self.t, np.uint8)

    def expert_action(self):
        return np.int64(self.t)

    def process(self):
        return os.getpid()

    def fork(self):
        pid = os.fork()
        if pid == 0:
            time.sleep(3600)
        return pid

    def add(self, a, b=0):
        return a + b


def probes(n_envs: int = 4, n_workers: int = 2, cls=WorkerVecEnv, **kwargs) -> WorkerVecEnv:
    return cls([lambda: EpisodeControl(Probe())] * n_envs, n_workers, **kwargs)


@pytest.fixture
def env():
    env = probes()
    yield env
    env.close()


def go(n: int = 4, **others: int) -> np.ndarray:
    """Actions: GO, but for the envs that are named, as in ``go(env2=DIE)``."""
    return np.array([others.get(f"env{i}", GO) for i in range(n)])


# Only against waiting for ever
PATIENCE = 300.0


def wait_until(condition: Callable[[], Any], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain until {what}"
        time.sleep(0.01)


class Hasty(WorkerVecEnv):
    """Once in a hurry it soon gives up, but on one worker only: those that are well have all the time they need."""

    hurry = False

    @property
    def timeout(self):
        return 0.5 if self.hurry and not self.deaths else PATIENCE

    @timeout.setter
    def timeout(self, value):
        pass


@pytest.fixture
def never_blocked():
    """A learner that is blocked fails, and does not block the tests."""

    def fail(*_):
        raise AssertionError("the learner was blocked")

    before = signal.signal(signal.SIGALRM, fail)
    signal.setitimer(signal.ITIMER_REAL, PATIENCE, 10.0)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0.0)
    signal.signal(signal.SIGALRM, before)
    assert not any(thread.name == "worker-outbox" for thread in threading.enumerate())


# ------------------------------------------------------------------------------------------------------- the contract


@pytest.mark.parametrize(
    "make",
    [
        lambda: gym.make("CartPole-v1"),
        lambda: Match(horizon=3, dict_obs=True),
        lambda: gym.make("FrozenLake-v1"),
        # Many of its episodes are terminated and truncated in the same step
        lambda: gym.make("Blackjack-v1", max_episode_steps=1),
        lambda: gym.make("Pendulum-v1", max_episode_steps=7),
    ],
    ids=["box", "dict", "discrete", "tuple", "truncated"],
)
@pytest.mark.parametrize("n_workers", [1, 2])
def test_equals_a_dummy_vec_env(make, n_workers):
    env, dummy = WorkerVecEnv([make] * 3, n_workers), DummyVecEnv([make] * 3)
    try:
        assert env.observation_space == dummy.observation_space and env.action_space == dummy.action_space
        env.seed(3)
        dummy.seed(3)
        assert_same(env.reset(), dummy.reset())
        env.action_space.seed(0)
        n_done = 0
        for _ in range(40):
            actions = np.stack([env.action_space.sample() for _ in range(3)])
            ours, theirs = env.step(actions), dummy.step(actions)
            assert_same(list(ours), list(theirs))
            assert_same(list(env.reset_infos), list(dummy.reset_infos))
            n_done += ours[2].sum()
        assert n_done > 2
    finally:
        env.close()


def test_attributes_methods_and_options(env):
    assert env.get_attr("horizon") == [4] * 4 and env.get_attr("flavour", indices=2) == ["plain"]
    assert env.env_method("add", 1, b=2, indices=[3, 0]) == [3, 3]
    assert env.has_attr("add") and not env.has_attr("subtract")
    with pytest.raises(AttributeError, match="subtract"):
        env.get_attr("subtract")
    env.set_attr("flavour", "sweet", indices=[1])
    assert env.get_attr("flavour") == ["plain", "sweet", "plain", "plain"]
    assert env.env_is_wrapped(EpisodeControl) == [True] * 4 and env.env_is_wrapped(Monitor, indices=0) == [False]
    assert len(set(env.env_method("process"))) == 2
    assert env.env_method("process")[0::2] == [env.env_method("process", indices=0)[0]] * 2
    env.seed(7)
    assert env.reset()[:, 0].tolist() == [7, 8, 9, 10]
    env.set_options([{"episode": 10 * i} for i in range(4)])
    assert env.reset()[:, 0].tolist() == [0, 10, 20, 30]
    assert env.reset_infos[2]["options"] == {"episode": 20}
    # Seeds and options are used once
    assert env.reset()[:, 0].tolist() == [-1] * 4
    with pytest.raises(Exception, match="pickle"):
        env.env_method("add", threading.Lock())
    assert env.env_method("add", 1) == [1] * 4


def test_what_a_worker_imports_does_without_torch():
    """It costs a second and memory in each."""
    program = "import sys, opd_gym.envs.workers.host, opd_gym.envs.wrappers; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], timeout=600).returncode == 0


def test_pictures():
    env = WorkerVecEnv([lambda: Probe(render_mode="rgb_array")] * 2, n_workers=1)
    try:
        assert env.render_mode == "rgb_array"
        env.reset()
        env.step(go(2))
        assert [int(picture[0, 0, 0]) for picture in env.get_images()] == [1, 1]
        assert env.render().shape == (8, 4, 3)
    finally:
        env.close()


def test_observations_stay_as_they_are(env):
    env.seed(0)
    seen = [env.reset()]
    terminal = []
    for _ in range(6):
        obs, _, dones, infos = env.step(go())
        seen.append(obs)
        terminal += [info["terminal_observation"] for info, done in zip(infos, dones, strict=True) if done]
    assert [obs[0, 1] for obs in seen] == [0, 1, 2, 3, 0, 1, 2]
    assert [obs.tolist() for obs in terminal] == [[i, 4] for i in range(4)]


def test_closing():
    env = probes()
    pids = env.env_method("process")
    env.reset()
    env.step_async(go())
    env.close()
    env.close()
    assert env.closed and not any(map(_alive, pids))
    for use in (env.reset, env.step_wait, lambda: env.get_attr("horizon")):
        with pytest.raises(RuntimeError, match="closed"):
            use()


def test_whoever_forgets_to_close_leaves_nothing_behind():
    env = probes()
    pids = env.env_method("process")
    env.step_async(go(env0=HANG))
    del env
    gc.collect()
    assert not any(map(_alive, pids))


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "Z"


def _alive(pid: int) -> bool:
    # A process that has ended and waits for its parent to notice is dead
    return _state(pid) != "Z"


class Unlike(Probe):
    observation_space = spaces.Box(-1e6, 1e6, (3,), np.float32)


class Fewer(Probe):
    action_space = spaces.Discrete(7)


class Nested(Probe):
    observation_space = spaces.Dict({"a": spaces.Dict({"b": Probe.observation_space})})


class Wordy(Probe):
    observation_space = spaces.Text(8)


def _broken():
    raise OSError("no assets here")


@pytest.mark.parametrize(
    ("env_fns", "kwargs", "error", "message"),
    [
        ([], {}, ValueError, "at least one"),
        ([Probe], dict(n_workers=0), ValueError, "n_workers must be at least 1"),
        ([Probe], dict(timeout=0), ValueError, r"timeout must be a number in \(0, inf\]"),
        ([Probe, Probe, Unlike], dict(n_workers=1), ValueError, "same spaces"),
        ([Probe, Fewer], {}, ValueError, "same spaces"),
        ([Nested], {}, ValueError, "flat Dict or Tuple"),
        ([Wordy], {}, ValueError, "space of arrays"),
        ([_broken], {}, OSError, "no assets here"),
    ],
)
def test_what_cannot_be_built_is_refused(env_fns, kwargs, error, message):
    with pytest.raises(error, match=message):
        WorkerVecEnv(env_fns, **kwargs)


class Misshapen(Probe):
    """Its episodes begin with an observation that NumPy would spread over the array that it goes into."""

    def reset(self, **kwargs):
        obs, info = super().reset(**kwargs)
        return obs[:1], info


def test_an_observation_of_another_shape_is_refused():
    env = WorkerVecEnv([Misshapen], n_workers=1)
    try:
        with pytest.raises(ValueError, match=r"Env 0 returned the observation with shape \(1,\); .* says \(2,\)"):
            env.reset()
    finally:
        env.close()


def test_workers_and_halves():
    for n_envs, n_workers, halves in [
        (4, 2, [[0, 1], [2, 3]]),
        (5, 2, [[0, 1], [2, 3, 4]]),
        (3, 1, [[0], [1, 2]]),
        (2, 2, [[0, 1]]),
        (2, 9, [[0, 1]]),
    ]:
        env = probes(n_envs, n_workers)
        assert env.n_workers == min(n_envs, n_workers)
        assert [half.tolist() for half in env.halves] == halves
        env.close()
    env = probes(5, None)
    assert env.n_workers == min(5, len(os.sched_getaffinity(0)))
    env.close()


# ------------------------------------------------------------------------------------------------------ send and recv


def test_parts_in_any_order(env):
    env.seed(0)
    env.reset()
    env.send(go(2, env1=SLEEP), [0, 1])
    env.send(go(2), [2, 3])
    # Methods wait for the steps before them
    assert env.env_method("expert_action") == [1, 1, 1, 1]
    obs, rewards, _, infos = env.recv([3, 2])
    assert obs.tolist() == [[3, 1], [2, 1]] and rewards.tolist() == [1, 1] and len(infos) == 2
    env.send(go(1), [2])
    assert env.recv([0, 1])[0].tolist() == [[0, 1], [1, 1]]
    assert env.recv([2])[0].tolist() == [[2, 2]]
    with pytest.raises(RuntimeError, match="Env 1 has no step on its way"):
        env.recv([1])
    env.send(go(1), [1])
    with pytest.raises(RuntimeError, match="Env 1 has a step on its way"):
        env.step_async(go())
    with pytest.raises(ValueError, match=r"one action for each of the envs \[2, 3\], got 1"):
        env.send(go(1), [2, 3])
    # A reset waits for what is on its way, and drops it
    env.seed(5)
    assert env.reset().tolist() == [[5, 0], [6, 0], [7, 0], [8, 0]]
    assert env.step(go())[0][:, 1].tolist() == [1, 1, 1, 1]


def test_pipeline_below_transposed_images():
    def make():
        return EpisodeControl(Match(horizon=2, dict_obs=True))

    envs = [VecTransposeImage(WorkerVecEnv([make] * 3, n_workers=1)), VecTransposeImage(DummyVecEnv([make] * 3))]
    try:
        for vec in envs:
            vec.seed(0)
        workers, plain = (Pipeline(vec) for vec in envs)
        assert_same(envs[0].reset(), envs[1].reset())
        assert [part.tolist() for part in workers.parts] == [[0], [1, 2]] and len(plain.parts) == 1
        assert len(Pipeline(envs[0], split=False).parts) == 1
        for _ in range(3):
            plain.send(0, np.zeros(3, int))
            obs, _, _, infos = plain.recv(0)
            for part, indices in enumerate(workers.parts):
                workers.send(part, np.zeros(len(indices), int))
            for part, indices in enumerate(workers.parts):
                part_obs, _, _, part_infos = workers.recv(part)
                assert_same({key: value[indices] for key, value in obs.items()}, dict(part_obs))
                assert_same([infos[i] for i in indices], part_infos)
        assert obs["picture"].shape == (3, 3, 36, 36)
    finally:
        envs[0].close()


def test_utilisation(env):
    env.reset()
    began = time.perf_counter()
    env.reset_stats()
    for _ in range(4):
        env.step(go(env1=SLEEP))
    idle, busy = env.utilisation()
    assert 0.0 < idle <= 1.0 and 4 * 0.05 / (time.perf_counter() - began) < busy <= 1.0
    env.reset_stats()
    assert env.utilisation().tolist() == [0.0, 0.0]


# ------------------------------------------------------------------------------------------------- workers that die


@pytest.mark.parametrize(
    ("action", "exit_code", "details"),
    [
        (DIE, -signal.SIGKILL, ""),
        (CRASH, -signal.SIGABRT, "in step"),
        (DIVERGE, 0, "RuntimeError: the simulation is unstable"),
        (HANG, -signal.SIGKILL, ""),
    ],
)
def test_a_dead_worker_costs_its_episodes_and_no_more(action, exit_code, details, monkeypatch):
    # On a busy machine an interpreter takes its time to end, and if nobody waits it is killed: another exit code
    monkeypatch.setattr("opd_gym.envs.workers.vec_env.CLOSE_SECONDS", PATIENCE)
    env = probes(cls=Hasty)
    try:
        for i in range(4):
            env.announce(i, options={"episode": i}, tag=("first", i))
        env.set_attr("flavour", "sweet")
        env.reset()
        for i in range(4):
            env.announce(i, seed=10 + i, tag=("second", i))
        before, *_ = env.step(go())
        pids = env.env_method("process")
        env.hurry = action == HANG
        with pytest.warns(RuntimeWarning, match=r"worker 0 \(envs 0, 2\)"):
            obs, rewards, dones, infos = env.step(go(env0=action))
        # Envs 0 and 2 live in the same worker
        assert dones.tolist() == [True, False, True, False] and rewards.tolist() == [0, 2, 0, 2]
        assert obs.tolist() == [[10, 0], [1, 2], [12, 0], [3, 2]]
        for i in (0, 2):
            assert infos[i]["episode_lost"] is infos[i]["TimeLimit.truncated"] is True
            assert infos[i]["episode_tag"] == ("first", i) and env.reset_infos[i]["episode_tag"] == ("second", i)
            assert infos[i]["terminal_observation"].tolist() == before[i].tolist()
        assert not any(infos[i].get("episode_lost") for i in (1, 3))
        (death,) = env.deaths
        assert (death.worker, death.envs, death.exit_code, death.env) == (0, (0, 2), exit_code, 0)
        assert details in death.details and bool(details) == bool(death.details)
        assert [a == b for a, b in zip(pids, env.env_method("process"), strict=True)] == [False, True, False, True]
        assert env.get_attr("flavour") == ["sweet"] * 4
        # All go on
        for _ in range(2):
            obs, *_ = env.step(go())
        assert obs.tolist() == [[10, 2], [11, 0], [12, 2], [13, 0]]
    finally:
        env.close()


def test_a_loss_is_told_once_whenever_it_is_noticed(env):
    """The worker dies between two steps; it is noticed by a method, and the steps on their way are not lost twice."""
    env.seed(0)
    env.reset()
    for i in range(4):
        env.announce(i, seed=10 + i, tag=i)
    env.send(go(2), [0, 1])
    env.recv([0, 1])
    (pid,) = env.env_method("process", indices=[2])
    os.kill(pid, signal.SIGKILL)
    env.send(go(2), [2, 3])
    with pytest.warns(RuntimeWarning, match="died"):
        # The announced episodes have begun in the new worker
        assert env.env_method("expert_action", indices=[0, 2]) == [0, 0]
    obs, _, dones, infos = env.recv([2, 3])
    assert obs.tolist() == [[12, 0], [3, 1]] and dones.tolist() == [True, False]
    obs, _, dones, infos = env.step(go())
    assert dones.tolist() == [True, False, False, False]
    assert obs.tolist() == [[10, 0], [1, 2], [12, 1], [3, 2]]
    assert infos[0]["terminal_observation"].tolist() == [0, 1] and infos[2]["episode_tag"] == 2
    assert env.step(go())[0][0].tolist() == [10, 1] and len(env.deaths) == 1


def test_what_a_step_brought_is_kept_when_the_next_episode_begins(env):
    env.seed(0)
    env.reset()
    env.announce(0, seed=10)
    env.send(go(1), [0])
    env.send(np.array([DIE]), [2])
    with pytest.warns(RuntimeWarning, match="died"):
        env.recv([2])
    # The episode after the lost one has begun in the new worker
    assert env.env_method("expert_action", indices=[0]) == [0]
    assert env.recv([0])[0].tolist() == [[0, 1]]
    assert env.step(go())[0][0].tolist() == [10, 0]


def test_a_loss_right_after_an_episode_waits_for_the_next_announcement(env):
    """Env 0 finishes an episode in the step in which env 2 brings their worker down: the learner knows of neither."""
    env.seed(0)
    env.reset()
    for i in range(4):
        env.announce(i, seed=10 + i, tag=i)
    for _ in range(3):
        env.step(go())
    with pytest.warns(RuntimeWarning, match="died"):
        obs, _, dones, infos = env.step(go(env2=DIE))
    assert dones.all() and obs.tolist() == [[10, 0], [11, 0], [12, 0], [13, 0]]
    assert [info.get("episode_lost") for info in infos] == [None, None, True, None]
    for i in range(4):
        env.announce(i, seed=20 + i, tag=4 + i)
    # A label of the state that it will go on from; what it was for is lost
    assert env.env_method("expert_action", indices=[0]) == [0]
    obs, _, dones, infos = env.step(go())
    assert dones.tolist() == [True, False, False, False] and infos[0]["episode_tag"] == 0
    assert obs.tolist() == [[20, 0], [11, 1], [12, 1], [13, 1]] and env.reset_infos[0]["episode_tag"] == 4
    # And without an announcement it goes on all the same
    for _ in range(3):
        env.step(go())
    env.announce(2, seed=32)
    with pytest.warns(RuntimeWarning, match="died"):
        env.step(go(env2=DIE))
    obs, _, dones, _ = env.step(go())
    assert dones.tolist() == [True, False, False, False] and obs[:, 1].tolist() == [0, 2, 1, 2]


def test_an_announcement_behind_the_step_that_dies_is_still_to_come(env):
    env.seed(0)
    env.reset()
    env.announce(0, seed=10)
    env.send(go(env0=DIE))
    env.announce(0, seed=20)
    with pytest.warns(RuntimeWarning, match="died"):
        assert env.recv()[0][0].tolist() == [10, 0]
    for _ in range(4):
        obs, *_ = env.step(go())
    assert obs[0].tolist() == [20, 0]


def test_an_announced_episode_is_not_used_up_by_one_that_nobody_saw(env):
    env.seed(0)
    env.reset()
    os.kill(env.env_method("process", indices=[0])[0], signal.SIGKILL)
    for i in range(4):
        env.announce(i, seed=10 + i, tag=i)
    with pytest.warns(RuntimeWarning, match="died"):
        env.get_attr("horizon")
    assert env.reset()[:, 0].tolist() == [10, 11, 12, 13]
    assert [info["episode_tag"] for info in env.reset_infos] == [0, 1, 2, 3]
    assert not env.step(go())[2].any()


def test_a_reset_by_its_method_uses_an_announcement_up(env):
    env.reset()
    env.announce(0, seed=3, tag="told")
    assert env.env_method("reset", indices=[0])[0][0].tolist() == [3, 0]
    with pytest.warns(RuntimeWarning, match="died"):
        obs, _, _, infos = env.step(go(env0=DIE))
    assert infos[0]["episode_tag"] == "told" and obs[0].tolist() == [-1, 0]


@pytest.mark.filterwarnings("ignore:WorkerVecEnv:RuntimeWarning")
@pytest.mark.parametrize("n_workers", [1, 2])
def test_whenever_workers_die_episodes_are_played_in_the_announced_order(n_workers, monkeypatch):
    """What a learner sees that announces the episode 100 i + k as the k-th of env i, with deaths at any moment."""
    # Which env is at work when a worker is killed is chance: three deaths in a row may well hit the same one
    monkeypatch.setattr("opd_gym.envs.workers.vec_env.MAX_DEATHS", 100)
    env = WorkerVecEnv([lambda h=h: EpisodeControl(Probe(horizon=h)) for h in (1, 2, 3, 5)], n_workers)
    rng = np.random.default_rng(n_workers)
    pipeline = Pipeline(env)
    begun = [0] * 4

    def begin(i):
        begun[i] += 1
        env.announce(i, seed=100 * i + begun[i], tag=begun[i])

    try:
        for i in range(4):
            env.announce(i, seed=100 * i, tag=0)
        shown = env.reset().astype(int)
        for i in range(4):
            begin(i)
        n_lost = 0
        pipeline.send(0, np.zeros(2, int))
        for row in range(34):
            pipeline.send((row + 1) % 2, np.zeros(2, int))
            if row % 4 == 3:
                os.kill(env._workers[rng.integers(n_workers)].process.pid, signal.SIGKILL)
            obs, _, dones, infos = pipeline.recv(row % 2)
            for i, now, done, info in zip(pipeline.parts[row % 2].tolist(), obs.astype(int), dones, infos, strict=True):
                assert info["episode_tag"] == begun[i] - 1
                last = info["terminal_observation"].tolist() if done else now.tolist()
                if info.get("episode_lost"):
                    n_lost += 1
                    assert last == shown[i].tolist()
                else:
                    assert last == [shown[i][0], shown[i][1] + 1]
                if done:
                    assert now.tolist() == [100 * i + begun[i], 0]
                    assert env.reset_infos[i]["episode_tag"] == begun[i]
                    begin(i)
                shown[i] = now
        assert len(env.deaths) == 8 and n_lost > 8
    finally:
        env.close()


@pytest.mark.filterwarnings("ignore:WorkerVecEnv:RuntimeWarning")
@pytest.mark.parametrize("death", [None, "in the step", "after the step"])
def test_an_announced_episode_that_began_in_a_dropped_step_is_still_to_come(env, death):
    env.seed(0)
    env.reset()
    for _ in range(3):
        env.step(go())
    for i in range(4):
        env.announce(i, seed=10 + i, tag=i)
    env.send(go(env0=DIE if death == "in the step" else GO))
    env.announce(1, seed=21, tag="newer")
    if death == "after the step":
        os.kill(env.env_method("process", indices=[0])[0], signal.SIGKILL)
        env.get_attr("horizon")
    assert env.reset()[:, 0].tolist() == [10, 21, 12, 13]
    assert [info["episode_tag"] for info in env.reset_infos] == [0, "newer", 2, 3]
    assert len(env.deaths) == (death is not None)
    # Once
    assert env.reset()[:, 0].tolist() == [-1] * 4


def test_every_death_is_shown(env):
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("default")  # as without pytest: the same words once
        for _ in range(2):
            env.reset()
            env.step(go(env0=DIE))
    assert len([warning for warning in shown if "died" in str(warning.message)]) == 2


def test_who_stands_still_goes_on_standing_still(env):
    env.announce(0, frozen=True)
    env.reset()
    env.announce(2, seed=3)
    with pytest.warns(RuntimeWarning, match="died"):
        _, _, dones, infos = env.step(go(env2=DIE))
    assert dones.tolist() == [False, False, True, False]
    assert infos[0]["frozen"] and "episode_lost" not in infos[0]
    assert env.get_attr("frozen") == [True, False, False, False]
    env.announce(0, seed=4)
    assert env.env_method("thaw", indices=[0])[0][0].tolist() == [4, 0]
    assert env.step(go())[0][0].tolist() == [4, 1]


def test_the_callers_mistakes_are_raised_here(env):
    env.seed(0)
    env.reset()
    with pytest.raises(ValueError, match="no such action") as error:
        env.step(go(env1=MISTAKE))
    assert isinstance(error.value.__cause__, WorkerTraceback) and "in step" in str(error.value.__cause__)
    # In a step this would be a death
    with pytest.raises(RuntimeError, match="unstable"):
        env.env_method("step", DIVERGE, indices=[1])
    assert env.deaths == [] and env.env_method("add", 1) == [1] * 4
    env.seed(4)
    assert env.reset()[:, 0].tolist() == [4, 5, 6, 7]
    assert env.step(go())[0][:, 1].tolist() == [1, 1, 1, 1]


def test_an_announcement_that_fails_is_reported():
    env = WorkerVecEnv([Probe], n_workers=1)
    try:
        env.announce(0, seed=1)
        with pytest.raises(AttributeError, match="set_next_reset"):
            env.reset()
        # Once
        assert env.reset().shape == (1, 2)
        with pytest.raises(AttributeError, match="set_next_reset"):
            env.env_method("set_next_reset", seed=1)
    finally:
        env.close()


@pytest.mark.filterwarnings("ignore:WorkerVecEnv:RuntimeWarning")
def test_a_worker_that_dies_again_and_again_ends_the_run(env):
    """Because of both its envs together: each of them loses fewer than three episodes."""
    env.reset()
    env.step(go(env1=CRASH))
    env.send(np.array([CRASH]), [3])
    env.recv([3])
    env.send(np.array([CRASH]), [3])
    with pytest.raises(RuntimeError, match=r"(?s)worker 1 .*exit code -6, SIGABRT.*3 times in a row.*in step.*Dummy"):
        env.recv([3])
    with pytest.raises(RuntimeError, match="in a row"):
        env.reset()
    env.close()
    assert [death.env for death in env.deaths] == [1, 3, 3]


@pytest.mark.filterwarnings("ignore:WorkerVecEnv:RuntimeWarning")
def test_an_env_that_loses_one_episode_after_the_other_ends_the_run(env):
    """Whatever steps it and the other env of the worker complete in between."""
    n_begun = 0

    def begin():
        nonlocal n_begun
        env.announce(0, seed=n_begun, options={"episode": n_begun}, tag=f"tag {n_begun}")
        n_begun += 1

    begin()
    env.reset()
    begin()
    for deadly in [True, True, False, True, True, True]:
        env.step(go())
        assert not env.step(go())[2][0]
        action = go(env0=DIE if deadly else GO)
        if n_begun == 7:
            match = r"(?s)env 0 lost 3 episodes in a row.*seed=3, .*'tag 3'; .*'tag 4'; seed=5, options={'episode': 5}"
            with pytest.raises(RuntimeError, match=match):
                env.step(action)
            break
        _, _, dones, infos = env.step(action)
        if not deadly:
            # One that ends normally begins a new row
            _, _, dones, infos = env.step(go())
        assert dones[0] and infos[0].get("episode_lost", False) == deadly
        begin()
    assert n_begun == 7 and len(env.deaths) == 5 and {death.env for death in env.deaths} == {0}


@pytest.mark.filterwarnings("ignore:WorkerVecEnv:RuntimeWarning")
def test_only_the_env_at_work_is_at_fault():
    """Env 1 loses one episode after the other, none of them by its own fault."""
    env = WorkerVecEnv([lambda h=h: EpisodeControl(Probe(horizon=h)) for h in (1, 100)], n_workers=1)
    try:
        env.reset()
        for _ in range(MAX_DEATHS + 1):
            assert env.step(go(2))[2].tolist() == [True, False]
            assert env.step(go(2, env0=DIE))[3][1]["episode_lost"]
        for _ in range(MAX_DEATHS + 1):
            env.step(go(2))
            env._workers[0].process.end()  # while it is idle
            assert env.step(go(2))[3][1]["episode_lost"]
        assert [death.env for death in env.deaths] == [0] * (MAX_DEATHS + 1) + [None] * (MAX_DEATHS + 1)
        # All that it loses by itself
        for _ in range(MAX_DEATHS - 1):
            env.step(go(2))
            env.step(go(2, env1=DIE))
        env.step(go(2))
        with pytest.raises(RuntimeError, match="env 1 lost 3 episodes in a row.*: one that was not announced; one"):
            env.step(go(2, env1=DIE))
    finally:
        env.close()


class Loser(Probe):
    """Says of itself that its episodes are lost, as an env with a simulator of its own may."""

    def step(self, action):
        obs, reward, done, truncated, info = super().step(action)
        return obs, reward, done, truncated, {**info, "episode_lost": done}


@pytest.mark.filterwarnings("ignore:WorkerVecEnv:RuntimeWarning")
def test_an_episode_that_the_env_says_it_lost_is_not_a_finished_one():
    env = WorkerVecEnv([lambda: EpisodeControl(Loser(horizon=1))], n_workers=1)
    try:
        env.reset()
        for _ in range(MAX_DEATHS - 1):
            env.step(go(1, env0=DIE))
            assert env.step(go(1))[3][0]["episode_lost"]
        with pytest.raises(RuntimeError, match="env 0 lost 3 episodes in a row"):
            env.step(go(1, env0=DIE))
    finally:
        env.close()


# --------------------------------------------------------------------------------------------- workers that do not read


@pytest.mark.parametrize("action", [GO, SEIZE])
def test_the_timeout_holds_where_a_worker_does_not_read(never_blocked, action):
    env = probes(2, 1, cls=Hasty)
    try:
        env.seed(0)
        env.reset()
        (pid,) = env.env_method("process", indices=[0])
        if action == GO:
            os.kill(pid, signal.SIGSTOP)
            wait_until(lambda: _state(pid) == "T", "the worker is stopped")
        env.send(go(1, env0=action), [0])
        if action == SEIZE:
            wait_until(lambda: env._memory.at_work[0], "the worker is in its step")
        env.hurry = True
        for i in range(2):
            env.announce(i, options={"episode": 10 + i, "ballast": BALLAST}, tag=i)
        env.send(go(1), [1])
        with pytest.warns(RuntimeWarning, match="no answer to 'step' for 0.5 s: killed"):
            obs, _, dones, _ = env.recv()
        # Env 0 was sent its step before the announcement
        assert dones.all() and obs.tolist() == [[-1, 0], [11, 0]]
        assert env.reset_infos[1]["options"]["ballast"] == BALLAST
        for _ in range(4):
            obs, *_ = env.step(go(2))
        assert obs[0].tolist() == [10, 0] and env.reset_infos[0]["options"]["ballast"] == BALLAST
        assert len(env.deaths) == 1
    finally:
        env.close()


class Listener(Probe):
    """Notes what is announced."""

    def __init__(self):
        super().__init__()
        self.heard: list[int] = []

    def set_next_reset(self, seed, options, tag, frozen):
        assert options["ballast"] == BALLAST[: options["size"]]
        self.heard.append(tag)


def test_what_a_worker_does_not_read_at_once_arrives_in_order(never_blocked):
    env = WorkerVecEnv([Listener] * 2, n_workers=1)
    (pid,) = env.env_method("process", indices=[0])
    try:
        for tag in range(120):
            if tag == 40:
                os.kill(pid, signal.SIGSTOP)
            if tag == 80:
                os.kill(pid, signal.SIGCONT)
            size = len(BALLAST) if tag % 10 == 0 else tag
            env.announce(tag % 2, options={"size": size, "ballast": BALLAST[:size]}, tag=tag)
        assert env.get_attr("heard") == [list(range(0, 120, 2)), list(range(1, 120, 2))]
    finally:
        env.close()


def test_closing_gives_up_what_is_not_read(never_blocked):
    env = probes(2, 1)
    # A process that the env has started holds the worker's end of the pipe
    pid, child = (env.env_method(method, indices=[0])[0] for method in ("process", "fork"))
    try:
        os.kill(pid, signal.SIGSTOP)
        env.announce(0, options={"ballast": BALLAST})
        env.close()
        assert not _alive(pid) and _alive(child)
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_death_is_noticed_although_a_child_holds_the_socket(never_blocked):
    env = probes(1, 1, timeout=None)
    (child,) = env.env_method("fork")
    try:
        env.reset()
        with pytest.warns(RuntimeWarning, match="died in 'step'"):
            assert env.step(go(1, env0=DIE))[3][0]["episode_lost"]
    finally:
        os.kill(child, signal.SIGKILL)
        env.close()


SCRIPT = """
import ctypes, os, pathlib, signal, time
import gymnasium as gym
from opd_gym.envs.workers.vec_env import WorkerVecEnv

class Sleeper(gym.Env):
    observation_space = action_space = gym.spaces.Discrete(3600)
    def process(self):
        return os.getpid()
    def reset(self, *, seed=None, options=None):
        return 0, {{}}
    def step(self, action):
        pathlib.Path(str(os.getpid())).touch()
        if {seize}:
            ctypes.PyDLL(None).sleep(int(action))
        time.sleep(float(action))
        return 0, 0.0, False, False, {{}}

if __name__ == "__main__":
    # Whoever runs the tests in the background may have taken it away
    signal.signal(signal.SIGINT, signal.default_int_handler)
    env = WorkerVecEnv([Sleeper] * 3, n_workers=2)
    env.reset()
    pids = env.env_method("process")
    if {stop}:
        os.kill(pids[0], signal.SIGSTOP)
        env.announce(0, options={{"ballast": bytes(2_000_000)}})
    print(*pids, flush=True)
    try:
        env.step([3600, 0, 0])
    except KeyboardInterrupt:
        print("interrupted", flush=True)
"""


@pytest.mark.parametrize(
    ("end", "stop", "seize"),
    [
        (signal.SIGKILL, False, False),
        # Native code keeps the interpreter's lock
        (signal.SIGKILL, False, True),
        (signal.SIGINT, False, False),
        # In the middle of a message
        (signal.SIGKILL, True, False),
    ],
)
def test_workers_end_with_the_learner(tmp_path, end, stop, seize):
    (tmp_path / "learner.py").write_text(SCRIPT.format(stop=stop, seize=seize))
    learner = subprocess.Popen(
        [sys.executable, "learner.py"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    pids = [int(pid) for pid in learner.stdout.readline().split()]
    assert len(pids) == 3 and all(map(_alive, pids))
    # Of a worker that is stopped nothing will come
    wait_until((tmp_path / str(pids[1 if stop else 0])).exists, "the learner has sent a step")
    if end == signal.SIGINT:
        # As the terminal does: to the learner and its workers
        os.killpg(learner.pid, end)
    else:
        learner.kill()
    if stop:
        learner.wait()
        os.kill(pids[0], signal.SIGCONT)
    out, err = learner.communicate(timeout=PATIENCE)
    if end == signal.SIGINT:
        assert "interrupted" in out and "Traceback" not in err
    wait_until(lambda: not any(map(_alive, pids)), "the workers have ended")


# ------------------------------------------------------------------------------------------------- how they start


OWN = """
import os
import sys
import gymnasium as gym
import numpy as np
from opd_gym.envs.workers.vec_env import WorkerVecEnv

print("begins", flush=True)
text = "global"


class Note:
    limit = 1

    def __init__(self, text):
        self.text = text


class Refused(ValueError):
    pass


class Own(gym.Wrapper):
    def step(self, action):
        return *self.env.step(action)[:4], {"note": Note("step")}

    def echo(self, note):
        if note.text == "bad":
            raise Refused(note.text)
        return Note(note.text * 2)

    def surroundings(self):
        return text, sys.argv, os.getcwd(), sys.path, sys.flags.utf8_mode, sys.warnoptions, os.environ["OWN"]


class Registered(gym.Env):
    observation_space = action_space = gym.spaces.Discrete(7)


gym.register("Mine-v0", Registered)


def learn():
    os.environ["OWN"] = "set late"
    env = WorkerVecEnv([lambda: Own(gym.make("CartPole-v1"))] * 2, n_workers=2)
    env.reset()
    infos = env.step(np.zeros(2, dtype=int))[3]
    assert [type(info["note"]) for info in infos] == [Note, Note]
    assert env.env_is_wrapped(Own) == [True, True] and env.env_is_wrapped(gym.Wrapper) == [True, True]
    assert [note.text for note in env.env_method("echo", Note("ab"))] == ["abab", "abab"]
    assert env.env_method("surroundings") == [Own(gym.make("CartPole-v1")).surroundings()] * 2
    try:
        env.env_method("echo", Note("bad"))
    except Refused:
        print("refused")
    env.close()
    mine = WorkerVecEnv([lambda: gym.make("Mine-v0", disable_env_checker=True)])
    print(mine.observation_space.n)
    mine.close()
"""
GUARD = "if __name__ == '__main__':\n    "


@pytest.mark.parametrize(
    ("way", "guard"), [("file", ""), ("file", GUARD), ("-m", ""), ("-m", GUARD), ("stdin", ""), ("-c", "")]
)
def test_a_program_needs_no_guard_and_may_define_what_it_likes(tmp_path, way, guard):
    """However it is started: workers do not run it again, and have what it defines. A notebook is like stdin."""
    program = f"{OWN}\n\n{guard}learn()\n"
    folder = tmp_path / "package"
    folder.mkdir()
    (folder / "script.py").write_text(program)
    command = {
        "file": [str(folder / "script.py")],
        "-m": ["-m", "package.script"],
        "stdin": ["-"],
        "-c": ["-c", program],
    }
    done = subprocess.run(
        [sys.executable, "-X", "utf8", "-W", "ignore", *command[way], "argument"],
        cwd=tmp_path,
        input=program if way == "stdin" else None,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["begins", "refused", "7"]


BESIDE = """
import gymnasium as gym

class Beside(gym.Env):
    observation_space = action_space = gym.spaces.Discrete(7)

def make():
    return Beside()
"""


@pytest.mark.parametrize("appended", [False, True])
def test_env_functions_of_modules_are_imported(tmp_path, appended):
    """Beside the script, or where the script has said at run time."""
    code = folder = tmp_path / "code"
    folder.mkdir()
    lines = ["from opd_gym.envs.workers.vec_env import WorkerVecEnv"]
    if appended:
        folder = tmp_path / "elsewhere"
        folder.mkdir()
        lines += ["import sys", f"sys.path.append({str(folder)!r})"]
    (folder / "beside.py").write_text(BESIDE)
    lines += ["from beside import make", "env = WorkerVecEnv([make] * 2)", "print(env.observation_space.n)"]
    (code / "script.py").write_text("\n".join(lines))
    done = subprocess.run(
        [sys.executable, str(code / "script.py")], cwd=tmp_path, capture_output=True, text=True, timeout=600
    )
    # Nobody closes it
    assert (done.returncode, done.stdout, done.stderr) == (0, "7\n", "")


def test_a_start_method_is_ignored():
    with pytest.warns(DeprecationWarning, match="ignores start_method='spawn'.*Leave the argument out"):
        env = probes(1, 1, start_method="spawn")
    assert env.reset().shape == (1, 2)
    env.close()


# ---------------------------------------------------------------------------------------------------------- algorithms


def match(horizon: int):
    return lambda: EpisodeControl(Match(horizon=horizon))


HORIZONS = (3, 4, 5, 6)
FAST = dict(n_steps=16, batch_size=64, gradient_steps=4, device="cpu", seed=0)


@pytest.fixture
def matches():
    env = WorkerVecEnv([match(horizon) for horizon in HORIZONS], n_workers=2)
    yield env
    env.close()


class Look(BaseCallback):
    """Keeps the buffers of all rollouts, counts rows, and kills a worker after one of them."""

    def __init__(self, kill_after: int = 0):
        super().__init__()
        self.kill_after = kill_after
        self.rollouts: list[dict[str, Any]] = []

    def _on_step(self):
        if self.n_calls == self.kill_after:
            env = self.training_env.unwrapped
            # Not in the middle of a step: whether that was carried out in time would be chance
            env.get_attr("spec")
            env._workers[0].process.end()
        return True

    def _on_rollout_end(self):
        buffer = self.model.rollout_buffer
        # The arrays are new ones in the next rollout
        names = ["observations", *buffer._fields(), "advantages"]
        self.rollouts.append({name: getattr(buffer, name) for name in names})


def test_stable_baselines3_learns_the_same_on_it():
    runs = []
    for cls in (DummyVecEnv, WorkerVecEnv):
        env = cls([lambda: Monitor(gym.make("CartPole-v1"))] * 3)
        env.seed(0)
        model = stable_baselines3.PPO("MlpPolicy", env, n_steps=32, batch_size=32, n_epochs=2, seed=1, device="cpu")
        runs.append(parameters(model.learn(192)))
        env.close()
    assert th.equal(*runs)


def test_a_pipeline_collects_what_lockstep_collects(matches):
    """What Match shows does not depend on actions: only those may differ, for they are drawn half by half."""
    rollouts = []
    for env in (DummyVecEnv([match(horizon) for horizon in HORIZONS]), matches):
        look = Look()
        env.seed(0)
        model = OPD("MlpPolicy", env, teacher="expert", group_size=2, **FAST).learn(128, callback=look)
        assert len(Pipeline(model.env).parts) == (2 if env is matches else 1)
        assert look.n_calls == 32 and model.num_timesteps == model.num_env_steps == 128
        rollouts.append(look.rollouts)
    for plain, pipelined in zip(*rollouts, strict=True):
        for name in ("observations", "teacher_actions", "group_ids", "episode_ids", "episode_starts", "token_mask"):
            np.testing.assert_array_equal(plain[name], pipelined[name])
        assert (pipelined["rewards"] == (pipelined["actions"] == pipelined["teacher_actions"])[:, 0]).all()
        assert np.array_equal(np.isnan(plain["successes"]), np.isnan(pipelined["successes"]))


@pytest.mark.parametrize("algorithm", ["OPD", "GRPO", "PPO"])
def test_same_seed_same_run_whatever_the_timing(algorithm):
    def run(delay):
        class Delayed(Match):
            def step(self, action):
                time.sleep(float(delay * self.vector[1] ** 2))
                return super().step(action)

        env = WorkerVecEnv([lambda: EpisodeControl(Delayed(horizon=3))] * 4, n_workers=2)
        env.seed(0)
        try:
            if algorithm == "OPD":
                return parameters(OPD("MlpPolicy", env, teacher="expert", **FAST).learn(64))
            if algorithm == "PPO":
                return parameters(PPO("MlpPolicy", env, n_steps=16, batch_size=32, seed=0, device="cpu").learn(64))
            return parameters(GRPO("MlpPolicy", env, 4, 3, dynamic_sampling=None, seed=0, device="cpu").learn(1))
        finally:
            env.close()

    assert th.equal(run(0.0), run(0.02))


@pytest.mark.filterwarnings("ignore:WorkerVecEnv:RuntimeWarning")
def test_opd_goes_on_after_a_death(matches, tmp_path):
    model = OPD("MlpPolicy", matches, teacher="expert", group_size=3, **FAST)
    model.set_logger(configure(str(tmp_path), ["csv"]))
    look = Look(kill_after=7)
    model.learn(126, callback=look)
    assert [death.worker for death in matches.deaths] == [0]
    first, second = look.rollouts
    void = ~first["token_mask"].any(axis=1)
    # Envs 0 and 2, a decision each; rows are in the order of the envs
    assert [row // 16 for row in np.flatnonzero(void)] == [0, 2] and second["token_mask"].all()
    assert np.isnan(first["successes"][void]).all() and (first["rewards"][void] == 0).all()
    assert first["episode_starts"][np.flatnonzero(void) + 1].all()
    assert model.num_timesteps == 126 and model.replay_buffer.size == 126
    for rollout in (first, second):
        rows = rollout["token_mask"].any(axis=1)
        np.testing.assert_array_equal(rollout["observations"][rows].argmax(axis=1), rollout["teacher_actions"][rows, 0])
        right = (rollout["actions"] == rollout["teacher_actions"])[:, 0]
        np.testing.assert_array_equal(rollout["rewards"][rows], right[rows])
    # Members of a group start from the same state, also those that began in the new worker
    starts: dict[int, set] = {}
    for rollout in (first, second):
        for row in np.flatnonzero(rollout["episode_starts"]):
            starts.setdefault(int(rollout["group_ids"][row]), set()).add(tuple(rollout["observations"][row]))
    assert len(starts) > 5 and all(len(first_obs) == 1 for first_obs in starts.values())
    log = np.genfromtxt(tmp_path / "progress.csv", delimiter=",", names=True)
    assert log["rolloutepisodes_lost"].tolist() == [2, 2, 2]
    assert len(model.ep_success_buffer) == model._n_finished


@pytest.mark.filterwarnings("ignore:WorkerVecEnv:RuntimeWarning")
def test_grpo_goes_on_after_a_death(matches):
    look = Look(kill_after=6)
    model = GRPO("MlpPolicy", matches, group_size=4, n_groups=4, dynamic_sampling=None, seed=0, device="cpu")
    model.learn(1, callback=look)
    assert len(matches.deaths) == 1 and len(model._lost_episodes) == 2
    buffer = model.rollout_buffer
    learned = {int(buffer.episode_ids[t[0]]): t for t in model._trajectories}
    assert len(learned) == 14 and not model._lost_episodes & set(learned)
    assert sum(len(t) for t in model._trajectories) < len(buffer.valid_rows())
    groups = {e: int(buffer.group_ids[t[0]]) for e, t in learned.items()}
    outcomes = {e: buffer.successes[t[-1]] for e, t in learned.items()}
    assert not np.isnan(list(outcomes.values())).any()
    for episode, rows in learned.items():
        members = np.array([outcomes[e] for e in learned if groups[e] == groups[episode]], dtype=np.float64)
        advantage = (outcomes[episode] - members.mean()) / (members.std(ddof=1) + 1e-6)
        np.testing.assert_allclose(buffer.advantages[rows], advantage, atol=1e-5)
    # The next iteration is complete
    model.learn(1, reset_num_timesteps=False)
    assert len(model._trajectories) == 16 and not model._lost_episodes


@pytest.mark.filterwarnings("ignore:WorkerVecEnv:RuntimeWarning")
def test_ppo_cuts_a_lost_episode_where_it_was_lost(matches):
    look = Look(kill_after=7)
    model = PPO("MlpPolicy", matches, n_steps=16, batch_size=32, gae_lambda=1.0, gamma=0.9, seed=0, device="cpu")
    model.learn(62, callback=look)
    (rollout,) = look.rollouts
    for row in np.flatnonzero(~rollout["token_mask"].any(axis=1)):
        np.testing.assert_allclose(rollout["advantages"][row], 0.0, atol=1e-6)
        assert not rollout["episode_starts"][row] and rollout["episode_starts"][row + 1]
        expected = rollout["rewards"][row - 1] + 0.9 * rollout["values"][row] - rollout["values"][row - 1]
        np.testing.assert_allclose(rollout["advantages"][row - 1], expected, atol=1e-5)


def test_learning_goes_on_after_a_callback_stopped_it(matches):
    class Stop(BaseCallback):
        def _on_step(self):
            return self.n_calls < 5

    model = OPD("MlpPolicy", matches, teacher="expert", **FAST)
    model.learn(64, callback=Stop())
    look = Look()
    model.learn(64, callback=look, reset_num_timesteps=False)
    (rollout,) = look.rollouts
    np.testing.assert_array_equal(rollout["observations"].argmax(axis=1), rollout["teacher_actions"][:, 0])
    assert rollout["episode_starts"][::16].all()


# ---------------------------------------------------------------------------------------------------------- evaluation


class Deadly(Probe):
    """Dies once, or always, in the second step of episode 2."""

    def __init__(self, file: str):
        super().__init__()
        self.file = Path(file)

    def step(self, action):
        if self.episode == 2 and self.t == 1 and self.file.exists():
            if self.file.read_text() == "once":
                self.file.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().step(action)


class Go:
    """Policy that always takes action GO."""

    def predict(self, observation, *, deterministic=False):
        return np.zeros(len(observation), dtype=int), None


@pytest.mark.filterwarnings("ignore:WorkerVecEnv:RuntimeWarning")
@pytest.mark.parametrize(("n_envs", "n_workers"), [(5, 2), (2, 2), (3, 1)])
def test_a_lost_episode_is_evaluated_again(tmp_path, n_envs, n_workers):
    file = tmp_path / "deadly"
    specs = [EpisodeSpec(seed=i, options={"episode": i, "task_id": i % 2}) for i in range(9)]
    env = WorkerVecEnv([lambda: EpisodeControl(Monitor(Deadly(str(file))))] * n_envs, n_workers)
    dummy = DummyVecEnv([lambda: EpisodeControl(Monitor(Probe()))])
    try:
        expected = evaluate_success(Go(), dummy, specs, progress=False)
        assert expected.n_success == 9 and expected.env_steps == 36
        assert evaluate_success(Go(), env, specs, progress=False) == expected
        file.write_text("once")
        assert evaluate_success(Go(), env, specs, progress=False) == expected
        assert len(env.deaths) == 1
        # Lost when all others stand still already
        file.write_text("once")
        assert evaluate_success(Go(), env, specs[2:3], progress=False).n_success == 1
        file.write_text("always")
        # Whatever other episodes are lost with it
        result = evaluate_success(Go(), env, specs[:4], progress=False)
        assert result.episodes == [*expected.episodes[:2], expected.episodes[3]]
        (lost,) = result.lost
        assert (lost.task_id, lost.seed) == (0, 2) and "SIGKILL" in lost.reason
    finally:
        env.close()


# -------------------------------------------------------------------------------------------------------- construction


def test_make_vec_chooses_workers():
    env = opd_gym.make_vec("CartPole-v1", n_envs=3, n_workers=1)
    try:
        assert isinstance(env, WorkerVecEnv) and (env.num_envs, env.n_workers, env.timeout) == (3, 1, 300.0)
    finally:
        env.close()
    env = build_env("CartPole-v1", {"n_envs": 2, "worker_timeout": 7})
    try:
        assert isinstance(env, WorkerVecEnv) and env.timeout == 7.0
    finally:
        env.close()
    with pytest.raises(ValueError, match="timeout"):
        opd_gym.make_vec("CartPole-v1", worker_timeout=-1.0)
    with pytest.raises(ValueError, match="worker_timeout: expected a number of seconds"):
        split_hyperparams("ppo", {"worker_timeout": "soon"}, opd_gym.PPO)
    assert isinstance(opd_gym.make_vec("CartPole-v1", n_envs=3), DummyVecEnv)
    with pytest.raises(ValueError, match="n_workers and worker_timeout: for WorkerVecEnv alone"):
        opd_gym.make_vec("CartPole-v1", n_workers=1, worker_timeout=9.0, vec_env_cls=DummyVecEnv)


@pytest.mark.parametrize("system", ["darwin", "win32"])
def test_other_systems_have_no_workers(monkeypatch, system):
    monkeypatch.setattr(sys, "platform", system)
    with pytest.raises(NotImplementedError, match=f"'{system}'. Use .* SubprocVecEnv"):
        WorkerVecEnv([Probe])
    with pytest.raises(NotImplementedError, match="SubprocVecEnv"):
        opd_gym.make_vec("CartPole-v1", n_envs=2, n_workers=1)


def test_a_benchmark_goes_without_workers_on_other_systems(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setitem(registration.CHUNK_SIZES, "CartPole-v1", 0)
    for n_envs, cls in ((1, DummyVecEnv), (2, SubprocVecEnv)):
        env = opd_gym.make_vec("CartPole-v1", n_envs=n_envs)
        try:
            assert type(env) is cls and env.reset().shape == (n_envs, 4)
        finally:
            env.close()


def test_configurations_may_say_how_many_workers():
    from opd_gym.envs.make import build_env
    from opd_gym.zoo.hyperparams import split_hyperparams

    run, _ = split_hyperparams("opd", {"n_envs": 3, "n_workers": 2}, OPD)
    env = build_env("CartPole-v1", run)
    try:
        assert isinstance(env, WorkerVecEnv) and env.n_workers == 2
    finally:
        env.close()


@pytest.mark.libero
@pytest.mark.filterwarnings("ignore:WorkerVecEnv:RuntimeWarning")
def test_a_worker_killed_in_the_middle_of_a_rollout_on_libero():
    pytest.importorskip("libero", reason="LIBERO is not installed: pip install 'opd_gym[libero]'")
    kwargs = {"visuals": "light", "image_size": 64, "task_ids": (3,), "horizon": 160}
    env = opd_gym.make_vec("LiberoObject-v0", n_envs=4, n_workers=2, seed=0, env_kwargs=kwargs)
    student = {"checkpoint": "libero-object-student"}
    look = Look(kill_after=1)
    try:
        kwargs = dict(n_steps=4, group_size=8, gradient_steps=2, seed=0, device="cpu")
        model = OPD("VLAPolicy", env, policy_kwargs=student, **kwargs)
        model.learn(30, callback=look)
        assert [death.worker for death in env.deaths] == [0]
        assert model._n_lost == 2 and model.num_timesteps == 30 and model.num_env_steps == 30 * 8
        first, second = look.rollouts
        assert [row // 4 for row in np.flatnonzero(~first["token_mask"].any(axis=1))] == [0, 2]
        assert second["token_mask"].all()
        # The first group's episodes start from the same state, in the old workers and in the new one
        starts = np.flatnonzero(first["episode_starts"])
        assert [row // 4 for row in starts] == [0, 0, 1, 2, 2, 3] and (first["group_ids"][starts] == 0).all()
        for key in ("agentview", "wrist", "proprio"):
            observations = first["observations"][key][starts]
            assert all(np.array_equal(observations[0], other) for other in observations[1:])
    finally:
        env.close()


def test_modules_of_registered_envs_are_imported_by_those_alone_who_make_them(tmp_path, monkeypatch):
    (tmp_path / "slow_to_import.py").write_text(
        "import os\nimport numpy as np\n"
        "from gymnasium.envs.classic_control import CartPoleEnv\n\n"
        f"open({str(tmp_path / 'imported')!r}, 'a').write(f'{{os.getpid()}} ')\n\n\n"
        "class Slow(CartPoleEnv):\n    def render(self):\n        return np.zeros((4, 6, 3), np.uint8)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    gym.register("Slow-v0", importlib.import_module("slow_to_import").Slow)

    def importers() -> int:
        return len((tmp_path / "imported").read_text().split())

    try:
        WorkerVecEnv([lambda: gym.make("CartPole-v1")]).close()
        assert importers() == 1  # this process
        env = WorkerVecEnv([lambda: gym.make("Slow-v0", render_mode="rgb_array")])
        assert importers() == 2
        env.reset()
        assert env.env_method("render")[0].shape == (4, 6, 3)
        env.close()
    finally:
        del gym.registry["Slow-v0"]
