"""Envs and teachers on other machines behave as local ones, also when actors and machines are lost."""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import gymnasium as gym
import numpy as np
import pytest
import torch as th
import toys
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecNormalize
from toys import Match, assert_same

import opd_gym
from opd_gym.algorithms.opd import OPD
from opd_gym.algorithms.remote_teacher import RemoteTeacher, TeacherActor, _payload, _Service, _unpack
from opd_gym.cli.main import main
from opd_gym.envs.workers.cluster import connect
from opd_gym.envs.workers.pipeline import Pipeline
from opd_gym.envs.workers.ray_vec_env import RayVecEnv
from opd_gym.envs.workers.vec_env import MAX_DEATHS, WorkerVecEnv
from opd_gym.envs.wrappers import EpisodeControl

if importlib.util.find_spec("ray") is None and not os.environ.get("OPD_GYM_CI"):
    pytest.skip("Ray is an extra", allow_module_level=True)

# Workers that imported these modules would import torch, and take seconds to start
for module in (sys.modules[__name__], toys):
    cloudpickle.register_pickle_by_value(module)

GO, DIE, DIVERGE, HANG = range(4)


class Fragile(gym.Env):
    """Shows its seed and how many steps it took; actions say how it misbehaves."""

    observation_space = spaces.Box(-1e6, 1e6, (2,), np.float32)
    action_space = spaces.Discrete(4)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.seed, self.t = -1 if seed is None else seed, 0
        return np.array([self.seed, 0], np.float32), {}

    def step(self, action):
        if action == DIE:
            os.kill(os.getpid(), signal.SIGKILL)
        elif action == DIVERGE:
            raise RuntimeError("the simulation is unstable")
        elif action == HANG:
            time.sleep(3600)
        self.t += 1
        return np.array([self.seed, self.t], np.float32), float(self.t), self.t == 4, False, {}

    def expert_action(self):
        return np.int64(GO)

    def process(self):
        return os.getpid()


def fragile() -> gym.Env:
    return EpisodeControl(Fragile())


def broken() -> gym.Env:
    raise OSError("no assets here")


def ppo(seed: int = 5) -> PPO:
    return PPO("MlpPolicy", gym.make("CartPole-v1"), seed=seed, device="cpu", n_steps=8, batch_size=8)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until_dead(*pids: int) -> None:
    deadline = time.monotonic() + 60
    while any(map(alive, pids)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two machines, as far as Ray knows, with two CPUs each; the learner is on the first."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        import ray
        from ray.cluster_utils import Cluster

        node = {"num_cpus": 2, "object_store_memory": 80 * 2**20}
        cluster = Cluster(initialize_head=True, head_node_args={"include_dashboard": False, **node})
        cluster.node = node
        cluster.spare = cluster.add_node(**node)
        ray.init(address=cluster.address, log_to_driver=False)
        yield cluster
        ray.shutdown()
        cluster.shutdown()


# ---------------------------------------------------------------------------------------------------------------- envs


def test_equals_local_workers(cluster):
    """Step by step: observations with pictures, rewards, infos, which episodes are played."""

    def make():
        return EpisodeControl(Match(horizon=3, dict_obs=True))

    envs = [cls([make] * 3, n_workers=2) for cls in (WorkerVecEnv, RayVecEnv)]
    try:
        seen: list[list[Any]] = [[], []]
        for env, record in zip(envs, seen, strict=True):
            env.seed(3)
            record.append(env.reset())
            pipeline = Pipeline(env)
            rng = np.random.default_rng(0)
            for step in range(8):
                for part, indices in enumerate(pipeline.parts):
                    pipeline.send(part, rng.integers(4, size=len(indices)))
                for part in range(2):
                    record.append(pipeline.recv(part))
                record.append([dict(info) for info in env.reset_infos])
                if step == 3:
                    env.announce(1, seed=9, tag="told")
                    env.set_attr("horizon", 2, indices=[0])
                record.append(env.get_attr("horizon"))
            record.append([env.env_method("expert_action"), env.env_is_wrapped(EpisodeControl)])
        assert_same(*seen)
        assert any(info.get("episode_tag") == "told" for row in seen[1][1::4] for info in row[3])
    finally:
        for env in envs:
            env.close()


class Hasty:
    """In a hurry it soon gives up, until a worker has died of it."""

    hurried_after = -1

    @property
    def timeout(self):
        return 1.0 if self.hurried_after == len(self.deaths) else 300.0

    @timeout.setter
    def timeout(self, value):
        pass


class HastyLocal(Hasty, WorkerVecEnv):
    pass


class HastyRay(Hasty, RayVecEnv):
    pass


@pytest.mark.filterwarnings("ignore:Hasty:RuntimeWarning")
def test_deaths_are_told_as_of_local_workers(cluster, monkeypatch):
    # On a busy machine an interpreter takes its time to end
    monkeypatch.setattr("opd_gym.envs.workers.vec_env.CLOSE_SECONDS", 60.0)

    def play(cls):
        env = cls([fragile] * 2, n_workers=1)
        try:
            env.seed(0)
            seen = [env.reset()]
            for actions in ([DIVERGE, GO], [GO, GO], [GO, DIE], [GO, GO], [HANG, GO]):
                for i in range(2):
                    env.announce(i, seed=10 * len(seen) + i, tag=(len(seen), i))
                env.hurried_after = len(env.deaths) if HANG in actions else -1
                seen += [env.step(np.array(actions)), list(env.reset_infos)]
            return seen, env.deaths
        finally:
            env.close()

    (ours, deaths), (theirs, others) = play(HastyRay), play(HastyLocal)
    assert_same(ours, theirs)
    assert [(d.envs, d.exit_code, d.env, d.reason) for d in deaths] == [
        ((0, 1), 0, 0, "RuntimeError in 'step': the simulation is unstable"),
        ((0, 1), -9, 1, "died in 'step'"),
        ((0, 1), -9, 0, "no answer to 'step' for 1 s: killed"),
    ]
    assert list(map(str, deaths)) == list(map(str, others))
    assert "in step" in deaths[0].details


def node_of(env: RayVecEnv, worker: int) -> str:
    import ray

    actor = env._workers[worker].process._actor
    return ray.get(actor.__ray_call__.remote(lambda _: ray.get_runtime_context().get_node_id()))


@pytest.mark.filterwarnings("ignore:RayVecEnv:RuntimeWarning")
def test_a_lost_actor_costs_its_episodes_and_no_more(cluster):
    import ray

    env = RayVecEnv([fragile] * 4, n_workers=2)
    try:
        assert node_of(env, 0) != node_of(env, 1)
        env.seed(0)
        env.reset()
        for i in range(4):
            env.announce(i, seed=10 + i, tag=i)
        env.step(np.full(4, GO))
        pids = env.env_method("process")
        ray.kill(env._workers[1].process._actor)
        # What it started does not outlive it
        wait_until_dead(pids[1])
        obs, rewards, dones, infos = env.step(np.full(4, GO))
        assert obs.tolist() == [[0, 2], [11, 0], [2, 2], [13, 0]] and rewards.tolist() == [2, 0, 2, 0]
        assert dones.tolist() == [False, True, False, True]
        for info in infos[1::2]:
            assert info["episode_lost"] and not info["at_fault"] and info["terminal_observation"][1] == 1
        (death,) = env.deaths
        assert (death.worker, death.envs, death.exit_code, death.env) == (1, (1, 3), None, None)
        assert "ray.kill" in death.details and "exit code unknown" in str(death)
        # Again and again
        with pytest.raises(RuntimeError, match="RayVecEnv: worker 1 (.|\n)*3 times in a row"):
            for _ in range(MAX_DEATHS):
                ray.kill(env._workers[1].process._actor)
                env.get_attr("spec")
        assert len(env.deaths) == MAX_DEATHS
    finally:
        env.close()
    wait_until_dead(pids[0])


class RemovesANode(BaseCallback):
    """In the middle of a rollout."""

    def __init__(self, cluster):
        super().__init__()
        self.cluster = cluster

    def _on_step(self):
        if self.n_calls == 6:
            self.cluster.remove_node(self.cluster.spare)
        return True


@pytest.mark.filterwarnings("ignore:RayVecEnv:RuntimeWarning")
def test_a_lost_machine_costs_its_episodes_and_no_more(cluster):
    """Its workers go on on the other machine, and so does the training."""
    env = opd_gym.make_vec("CartPole-v1", n_envs=4, n_workers=2, seed=0, ray="auto")
    assert isinstance(env, RayVecEnv)
    try:
        lost = [worker for worker in range(2) if node_of(env, worker) == cluster.spare.node_id]
        assert len(lost) == 1
        kwargs = {"n_eval_episodes": 0}
        model = OPD("MlpPolicy", env, teacher=ppo(), teacher_kwargs=kwargs, n_steps=8, seed=0, device="cpu")
        model.learn(4 * 8 * 3, callback=RemovesANode(cluster))
        assert [(death.worker, death.env, death.exit_code) for death in env.deaths] == [(*lost, None, None)]
        assert "node has died" in env.deaths[0].details
        assert model._n_lost == 2 and model.num_timesteps >= 4 * 8 * 3
        assert node_of(env, *lost) != cluster.spare.node_id
    finally:
        env.close()
        cluster.spare = cluster.add_node(**cluster.node)


def test_what_cannot_be_started_is_refused(cluster, monkeypatch):
    with pytest.raises(OSError, match="no assets here"):
        RayVecEnv([broken], 1)
    with pytest.raises(ValueError, match="max_restarts, name cannot be chosen"):
        RayVecEnv([fragile], 1, actor_options={"name": "me", "max_restarts": 3})
    with pytest.raises(ValueError, match="ray: for WorkerVecEnv alone"):
        opd_gym.make_vec("CartPole-v1", ray="auto", vec_env_cls=WorkerVecEnv)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"pip install 'opd-gym\[ray\]'"):
        opd_gym.make_vec("CartPole-v1", ray="auto")


def test_a_registered_env_whose_module_is_not_there_matters_to_who_makes_it(cluster, tmp_path, monkeypatch):
    """The learner's machine may know envs that the others do not."""
    (tmp_path / "only_here.py").write_text("from toys import Match\n\n\nclass Mine(Match):\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    gym.register("OnlyHere-v0", importlib.import_module("only_here").Mine)
    try:
        env = RayVecEnv([lambda: gym.make("CartPole-v1")], 1)
        env.reset()
        env.close()
        with pytest.raises(ImportError, match="OnlyHere-v0 is registered .*No module named 'only_here'"):
            RayVecEnv([lambda: gym.make("OnlyHere-v0")], 1)
    finally:
        del gym.registry["OnlyHere-v0"]


# ------------------------------------------------------------------------------------------------------------- teachers


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("teacher") / "ppo.zip"
    ppo().save(path)
    return path


def learn(teacher: Path, callback: BaseCallback | None = None, normalised: bool = False, **kwargs: Any) -> OPD:
    env: Any = opd_gym.make_vec("CartPole-v1", n_envs=4, seed=0)
    if normalised:
        env = VecNormalize(env)
    model = OPD(
        *("MlpPolicy", env, teacher),
        n_steps=16,
        batch_size=12,
        seed=0,
        device="cpu",
        teacher_kwargs={"n_eval_episodes": 0, **kwargs},
    )
    return model.learn(4 * 16 * 2, callback=callback)


def same_weights(a: OPD, b: OPD) -> bool:
    return all(th.equal(x, y) for x, y in zip(a.policy.parameters(), b.policy.parameters(), strict=True))


def actor_of(model: OPD) -> Any:
    assert isinstance(model._teacher, RemoteTeacher)
    return model._teacher._service.actor


class KillsTheTeacher(BaseCallback):
    """In the second rollout."""

    def _on_step(self):
        if self.n_calls == 20:
            import ray

            ray.kill(actor_of(self.model))
        return True


@pytest.mark.filterwarnings("ignore:The teacher's actor:RuntimeWarning")
def test_a_teacher_elsewhere_teaches_the_same(cluster, teacher):
    """Bit by bit, also if its actor dies in the middle; two students ask the same actor."""
    here, there = learn(teacher), learn(teacher, ray="auto")
    assert same_weights(here, there) and there._teacher.n_deaths == 0
    # A last one of 4 decisions
    assert learn_counts(there) == (2 * 6, 2 * 6)
    disturbed = learn(teacher, KillsTheTeacher(), ray="auto")
    assert same_weights(here, disturbed) and disturbed._teacher.n_deaths >= 1
    assert disturbed._teacher._service.name == there._teacher._service.name
    # The first student lost it as well, and finds the new one
    view = there._teacher.distribution(th.zeros(3, 4), th.zeros(3, 1))
    assert th.equal(view.log_probs, here._teacher.distribution(th.zeros(3, 4), th.zeros(3, 1)).log_probs)
    assert learn_counts(there) == learn_counts(disturbed)
    # One that sees what the student does not is asked for its labels in every step
    assert same_weights(learn(teacher, normalised=True), learn(teacher, normalised=True, ray="auto"))


def learn_counts(model: OPD) -> tuple[int, int]:
    import ray

    return ray.get(actor_of(model).counts.remote())


def test_requests_of_several_students_are_one_batch(teacher):
    env = opd_gym.make_vec("CartPole-v1", seed=0)
    student = OPD("MlpPolicy", env, teacher, device="cpu", seed=0)
    rows = np.random.default_rng(0).normal(size=(2, 4, 10, 4)).astype(np.float32)

    async def ask() -> tuple[list[Any], tuple[int, int]]:
        actor = TeacherActor(max_batch_size=25)
        await actor.build(_payload(teacher, env, student.policy, {}))
        asked = [actor.opinion(f"student {i}", rows[i, k], None, None) for k in range(4) for i in range(2)]
        answers = await asyncio.gather(*asked)
        counts = await actor.counts()
        # A third one does not fit into the batch; one that asks nonsense is no error of another
        rows[1, 0, 0] = np.nan
        asked = [actor.opinion(f"student {i}", rows[i % 2, 0], None, None) for i in range(3)]
        answers += await asyncio.gather(*asked, return_exceptions=True)
        assert (await actor.counts())[1] - counts[1] == 1 + 2 + 1
        # One that is alone gets the batches that it asks for
        await asyncio.gather(*(actor.opinion("student 0", rows[0, k], None, None) for k in range(4)))
        assert (await actor.counts())[1] - counts[1] == 1 + 2 + 1 + 4
        return answers, counts

    answers, counts = asyncio.run(ask())
    assert counts == (8, 4)
    for answer, (k, i) in zip(answers, [(k, i) for k in range(4) for i in range(2)], strict=False):
        if (k, i) != (0, 1):
            expected = student._teacher.distribution(th.as_tensor(rows[i, k]), th.zeros(10, 1))
            th.testing.assert_close(_unpack(answer).log_probs, expected.log_probs, rtol=0, atol=1e-6)
    assert isinstance(answers[9], FloatingPointError)
    assert not any(isinstance(answers[i], Exception) for i in (8, 10))


@pytest.mark.filterwarnings("ignore:The teacher's actor:RuntimeWarning")
def test_a_teacher_that_dies_again_and_again_ends_the_run(cluster, teacher, monkeypatch):
    import ray

    model = learn(teacher, ray={"address": "auto", "timeout": 60.0})
    start = _Service._start

    def kill(actor):
        ray.kill(actor)
        with pytest.raises(ray.exceptions.RayActorError):  # until then it might still answer
            while True:
                ray.get(actor.__ray_ready__.remote(), timeout=60.0)

    def start_and_kill(self):
        start(self)
        kill(self.actor)

    monkeypatch.setattr(_Service, "_start", start_and_kill)
    kill(actor_of(model))
    with pytest.raises(RuntimeError, match="(?s)The teacher's actor .* died.* 3 times in a row without an answer"):
        model.learn(64)


def test_teachers_that_cannot_be_elsewhere_are_refused(cluster, teacher):
    with pytest.raises(ValueError, match="read from files there, got .*Save it"):
        learn(ppo(), ray="auto")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"Unknown keys \['gpus'\]"):
        learn(teacher, ray={"gpus": 1})
    # What the actor says
    with pytest.raises(FileNotFoundError, match="nothing.zip"):
        learn(teacher.with_name("nothing.zip"), ray="auto")


def test_command_line(cluster, teacher, tmp_path):
    words = ["train", "--env", "CartPole-v1", "--teacher", str(teacher), "-f", str(tmp_path), "-n", "32"]
    words += ["--no-progress", "--device", "cpu", "-P", "n_steps=16", "-P", "n_envs=2", "-P", "n_workers=1"]
    words += ["--ray", "auto", "-P", "teacher_kwargs.ray=auto", "-P", "teacher_kwargs.n_eval_episodes=0"]
    assert main(words) == 0
    (config,) = tmp_path.glob("*/*/config.yml")
    assert "ray: auto" in config.read_text()


def test_without_a_cluster(monkeypatch):
    import ray

    def init(**kwargs):
        raise ConnectionError("Could not find any running Ray instance")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(ConnectionError, match="No Ray cluster at 'auto'. Start one .*Could not find any"):
        connect()
