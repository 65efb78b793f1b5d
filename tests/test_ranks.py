"""Several learners under torchrun: together they make the update that one would make of all their rollouts."""

import hashlib
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import ranked
import torch as th
from gymnasium import spaces
from ranked import torchrun
from toys import TINY_BODY, Robot, cartpole_teacher, parameters

from opd_gym import OPD, ranks
from opd_gym.cli.runs import read_progress
from opd_gym.policies.vla import VLAPolicy

TESTS = Path(__file__).parent
CASES = ["exact", "sampled", "grpo", "ppo", "ppo_token", "lora"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    space = Robot().observation_space
    policy = VLAPolicy(space, spaces.MultiDiscrete([256] * 16), lambda _: 1e-3, body_kwargs=TINY_BODY)
    policy.save_checkpoint(folder / "base")
    return folder


@pytest.fixture(scope="module")
def two(base):
    """What two ranks did."""
    done = torchrun(TESTS / "ranked.py", base, *CASES, "sft", "whole", "stopped")
    assert done.returncode == 0, done.stderr[-3000:]
    return base


def loaded(folder: Path, name: str) -> list[dict[str, np.ndarray]]:
    return [dict(np.load(folder / f"{name}{rank}.npz")) for rank in range(2)]


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_make_the_update_of_one_with_the_joined_rollout(two, case):
    first, second = loaded(two, case)
    np.testing.assert_array_equal(first["trained"], second["trained"])
    model = ranked.make(case, 2, two / "base")
    model._setup_learn(1000)
    model.policy.load_state_dict(th.load(two / f"{case}.pt", weights_only=True))
    before = parameters(model).numpy().copy()
    # Ids are those of a rank's own groups and episodes
    for name in ("group_ids", "episode_ids"):
        second[name] = second[name] + 1000
    joined = {name: np.concatenate([first[name], second[name]]) for name in first if first[name].ndim}
    n_rows = len(joined["actions"])
    buffer = model.rollout_buffer
    buffer.reset()
    buffer.finish()
    obs = {name[4:]: array for name, array in joined.items() if name.startswith("obs.")}
    buffer.observations, buffer.buffer_size = obs or joined["obs"], n_rows
    for name in ranked.ROWS:
        setattr(buffer, name, joined[name])
    if case == "grpo":
        ids = buffer.episode_ids
        valid = buffer.valid_rows()
        model._trajectories = np.split(valid, np.flatnonzero(np.diff(ids[valid])) + 1)
        assert len(model._trajectories) == 2 * (3 + 4) and buffer.advantages.std() > 0.1
    model.train()
    after = parameters(model).numpy()
    assert np.abs(after - before).max() > 1e-3
    np.testing.assert_allclose(first["trained"], after, rtol=0, atol=1e-6)
    # They did not play the same episodes
    n = min(len(first["rewards"]), len(second["rewards"]))
    name = "obs.proprio" if obs else "obs"
    assert not np.array_equal(first[name][:n], second[name][:n])


@pytest.mark.parametrize("case", ["exact", "grpo", "ppo", "normalized"])
def test_whole_trainings(two, case):
    first, second = loaded(two, f"whole_{case}")
    np.testing.assert_array_equal(first["trained"], second["trained"])
    np.testing.assert_array_equal(first["counts"], second["counts"])
    n_timesteps, _, n_finished, n_updates = first["counts"]
    # 8 steps of 1 and of 3 envs are an iteration; groups of two episodes of four steps, three on each rank
    assert n_timesteps == (96 if case == "grpo" else 64) and n_finished > 10 and n_updates > 3
    if case == "normalized":
        np.testing.assert_array_equal(first["seen"], second["seen"])
        # The first observations, and one a step of every env
        assert first["count"] == second["count"] == pytest.approx(4 + 64, abs=0.1)


def test_supervised_minibatches_are_joined(two):
    first, second = loaded(two, "sft")
    np.testing.assert_array_equal(first["trained"], second["trained"])
    model = ranked.sft()
    model.policy.load_state_dict(th.load(two / "sft.pt", weights_only=True))
    batch, drawn = model._batch, iter(np.concatenate([first["drawn"], second["drawn"]], axis=1))
    model._batch = lambda _: batch(next(drawn))
    model.learn(3)
    np.testing.assert_allclose(first["trained"], parameters(model).numpy(), rtol=0, atol=1e-6)


def test_a_callback_of_the_first_rank_ends_all(two):
    # In the second iteration, in which the other rank goes on to the end of its rollout
    assert [(two / f"stopped{rank}").read_text() for rank in range(2)] == ["2 54", "2 54"]


def test_a_dead_rank_ends_the_run_and_is_named(base):
    done = torchrun(TESTS / "ranked.py", base, "killed")
    assert done.returncode != 0
    assert re.search(r"rank\s*: 1 .*", done.stderr) and "SIGKILL" in done.stderr
    newest = max((base / "checkpoints").glob("rl_model_*_steps.zip"), key=lambda path: int(path.stem.split("_")[-2]))
    assert OPD.load(newest).num_timesteps > 32


def test_at_the_end_gloo_is_waited_for(monkeypatch):
    """A thread of it that needs the GIL while the interpreter ends would abort the process."""
    monkeypatch.setattr(ranks.dist, "destroy_process_group", lambda: None)
    done = []

    def runs():
        Path(f"/proc/self/task/{threading.get_native_id()}/comm").write_text("pt_gloo_runloop")
        begun.set()
        hashlib.pbkdf2_hmac("sha512", b"", b"", 1_000_000)  # without the GIL
        done.append(True)

    begun, thread = threading.Event(), threading.Thread(target=runs)
    thread.start()
    begun.wait()
    ranks._leave()
    assert done
    thread.join()


def test_on_the_command_line(tmp_path):
    cartpole_teacher().save(tmp_path / "teacher.zip")

    def train(*words: object) -> str:
        command = [sys.executable, "-m", "opd_gym.cli", "train", "--nproc", "2", "--no-progress", "--device", "cpu"]
        env = {**os.environ, "PYTHONPATH": str(TESTS.parent), "OMP_NUM_THREADS": "1"}
        done = subprocess.run([*command, *map(str, words)], env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    words = ["--env", "CartPole-v1", "--teacher", tmp_path / "teacher.zip", "-f", tmp_path, "-n", 128]
    told = train(*words, "--eval-episodes", 1, "-P", "n_envs=1", "-P", "n_steps=32")
    assert told.count("128 timesteps") == 1 and told.count("| all |") == 1
    (run,) = (tmp_path / "opd").iterdir()
    assert "256 timesteps" not in told and "128 states to replay" not in told
    again = train("--resume", run, "-n", 192)
    # Of the first rank
    assert again.count("64 states to replay") == 1
    model = OPD.load(run / "model.zip")
    assert model.num_timesteps == 192 and len(model.ep_info_buffer) > 0
    assert [row["time/total_timesteps"] for row in read_progress(run)] == [64, 128, 128, 192, 192]
