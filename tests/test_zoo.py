"""Hyperparameters, checkpoints of the zoo, run directories and the command line."""

from __future__ import annotations

import csv
import fcntl
import inspect
import json
import os
import pty
import re
import resource
import signal
import socket
import subprocess
import sys
import termios
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
import yaml
from gymnasium import spaces
from stable_baselines3 import PPO as SB3PPO
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.utils import LinearSchedule
from toys import parameters

import opd_gym
from opd_gym import OPD, PPO, make_vec
from opd_gym import checkpoints as registry
from opd_gym.algorithms import algorithm_class
from opd_gym.checkpoints import run_checkpoints
from opd_gym.cli import options, quickstart
from opd_gym.cli import train as cli_train
from opd_gym.cli.evaluate import trained_in
from opd_gym.cli.main import main
from opd_gym.cli.runs import (
    STATES_FOLDER,
    Evaluations,
    RunCheckpoint,
    locked,
    make_logger,
    new_run_dir,
    plot_learning_curve,
    read_progress,
)
from opd_gym.cli.train import TrainArgs, train
from opd_gym.cli.video import side_by_side, write_video
from opd_gym.envs.make import wrapper_function
from opd_gym.envs.registration import LIBERO_IDS
from opd_gym.evaluation import EpisodeRecord, EvaluationResult
from opd_gym.untrusted import read_yaml
from opd_gym.versions import read_versions, versions, write_versions
from opd_gym.zoo import hyperparams as config
from opd_gym.zoo import load_hyperparams

# ------------------------------------------------------------------------------------------------- hyperparameters


@pytest.mark.parametrize("algo", config.ALGORITHMS)
def test_every_entry_of_every_file_is_valid(algo: str) -> None:
    entries = config.read_hyperparams(config.HYPERPARAMS / f"{algo}.yml")
    assert "default" in entries and "LiberoObject-v0" in entries
    for env_id in entries:
        run, kwargs = config.split_hyperparams(algo, load_hyperparams(algo, env_id), algorithm_class(algo))
        assert isinstance(run["policy"], str)
        if env_id not in ("default", config.suite_id("RoboTwinTurnSwitch-v0")):
            gym.spec(env_id)
        # The keywords are accepted by the algorithm's constructor itself.
        inspect.signature(algorithm_class(algo)).bind_partial(run["policy"], None, **kwargs)


def test_tasks_of_robotwin_share_hyperparameters() -> None:
    shared = load_hyperparams("opd", "opd_gym:RoboTwinTurnSwitch-v0")
    assert shared["policy"] == "VLAPolicy" and "horizon" not in shared["env_kwargs"]
    own = load_hyperparams("opd", "RoboTwinHandoverBlock-v0")
    assert own["env_kwargs"]["horizon"] == 450 and own["n_steps"] == shared["n_steps"]


def test_load_hyperparams_falls_back_to_default_and_copies() -> None:
    assert load_hyperparams("opd", "NoSuchEnv-v7") == load_hyperparams("OPD", "default")
    first = load_hyperparams("opd", "opd_gym:LiberoObject-v0")
    first["env_kwargs"]["visuals"] = "changed"
    assert load_hyperparams("opd", "LiberoGoal-v0")["env_kwargs"]["visuals"] == "light"


@pytest.mark.parametrize("env_id", ["LiberoObject-v0", "LiberoGoal-v0", "CartPole-v1"])
@pytest.mark.parametrize("algo", config.ALGORITHMS)
def test_several_learners_share_the_zoos_rollouts_and_minibatches(
    algo: str, env_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight learners make the same number of updates of as many decisions as one, and not an eighth of it."""
    one = load_hyperparams(algo, env_id)
    assert config.tuned_hyperparams(algo, env_id) in (one, None)
    for name, value in dict(RANK="3", WORLD_SIZE="8", MASTER_ADDR="localhost", MASTER_PORT="1").items():
        monkeypatch.setenv(name, value)
    of_eight = load_hyperparams(algo, env_id)
    assert config.tuned_hyperparams(algo, env_id) in (of_eight, None)
    changed = {key: of_eight[key] for key in of_eight if of_eight[key] != one[key]}
    expected = {
        "opd": {"n_steps": 8, "batch_size": 16},
        "grpo": {"n_groups": 1, "trajectories_per_batch": 2},
        "ppo": {"n_steps": 32, "batch_size": 16},
        "sft": {},
    }
    if env_id.startswith("Libero"):
        assert changed == expected[algo]
    own = tmp_path / "own.yml"
    own.write_text("default: {n_steps: 64, batch_size: 128, n_groups: 4}\n")
    assert load_hyperparams(algo, "CartPole-v1", own) == {"n_steps": 64, "batch_size": 128, "n_groups": 4}


def test_load_hyperparams_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="opd, grpo, ppo, sft"):
        load_hyperparams("sac", "CartPole-v1")
    path = tmp_path / "a.yml"
    path.write_text("Acrobot-v1: {n_envs: 1}\n")
    with pytest.raises(ValueError, match="Acrobot-v1"):
        load_hyperparams("opd", "CartPole-v1", path)
    path.write_text("default: 3\n")
    with pytest.raises(ValueError, match="expected a mapping"):
        load_hyperparams("opd", "CartPole-v1", path)


def test_nothing_is_evaluated(tmp_path: Path) -> None:
    path = tmp_path / "evil.yml"
    for text in ("default: !!python/object/apply:os.system ['true']\n", "default: !!python/name:os.system ''\n"):
        path.write_text(text)
        with pytest.raises(ValueError, match="not YAML that can be read"):
            load_hyperparams("opd", "CartPole-v1", path)
    with pytest.raises(ValueError, match=r"policy_kwargs: expected a mapping.*Nothing is evaluated"):
        config.split_hyperparams("opd", {"policy_kwargs": "dict(net_arch=[64])"}, OPD)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5e-4", 5e-4),
        ("2e6", 2e6),
        ("-1E+2", -100.0),
        (".5e1", 5.0),
        ("1.5", 1.5),
        ("12", 12),
        ("1e", "1e"),
        ("e4", "e4"),
    ],
)
def test_numbers_without_a_dot_are_numbers(text: str, value: Any) -> None:
    parsed = config.parse_yaml(text)
    assert parsed == value and type(parsed) is type(value)


def test_schedules() -> None:
    _, kwargs = config.split_hyperparams(
        "ppo", {"learning_rate": "lin_5e-4", "clip_range": 0.1}, algorithm_class("ppo")
    )
    rate = kwargs["learning_rate"]
    assert isinstance(rate, LinearSchedule)
    assert [rate(progress) for progress in (1.0, 0.5, 0.0)] == pytest.approx([5e-4, 2.5e-4, 0.0])
    assert kwargs["clip_range"] == 0.1
    assert config.schedule("3e-4", "learning_rate") == 3e-4
    for bad in ("cos_1", "lin_", "__import__('os')"):
        with pytest.raises(ValueError, match=r"learning_rate: expected a number or a schedule like lin_5e-4"):
            config.schedule(bad, "learning_rate")


def test_unknown_keys_name_the_valid_ones() -> None:
    with pytest.raises(
        ValueError, match=r"(?s)Unknown hyperparameters of opd: learning_rat, seed\..*n_envs.*learning_rate"
    ):
        config.split_hyperparams(
            "opd", {"learning_rat": 1, "learning_rate": 1, "n_envs": 2, "seed": 3}, algorithm_class("opd")
        )


def test_keywords_that_are_passed_on_to_a_base_class_are_known() -> None:
    class Base:
        def __init__(self, env: Any, a: int = 0, *, b: int = 0) -> None: ...

    class Derived(Base):
        def __init__(self, env: Any, c: int = 0, **kwargs: Any) -> None: ...

    class Closed(Derived):
        def __init__(self, env: Any, d: int = 0) -> None: ...

    assert list(config.algorithm_parameters(Derived)) == ["c", "a", "b"]
    assert list(config.algorithm_parameters(Closed)) == ["d"]


def test_numbers_of_the_run() -> None:
    run, _ = config.split_hyperparams("opd", {"n_timesteps": 2e4, "n_envs": 2}, OPD)
    assert run == {"n_timesteps": 20000, "n_envs": 2} and isinstance(run["n_timesteps"], int)
    with pytest.raises(ValueError, match="n_envs: expected a number"):
        config.split_hyperparams("opd", {"n_envs": "two"}, OPD)


def test_overrides() -> None:
    items = [
        "learning_rate:5e-4",
        "env_kwargs.image_size:64",
        "env_kwargs.init_states:[1, 2]",
        "teacher:a:b",
        "augmentation:null",
    ]
    values = config.parse_overrides(items)
    assert values == {
        "learning_rate": 5e-4,
        "env_kwargs": {"image_size": 64, "init_states": [1, 2]},
        "teacher": "a:b",
        "augmentation": None,
    }
    base = {"env_kwargs": {"visuals": "light", "image_size": 128}, "n_envs": 1}
    merged = config.merge(base, values)
    assert merged["env_kwargs"] == {"visuals": "light", "image_size": 64, "init_states": [1, 2]}
    assert base["env_kwargs"] == {"visuals": "light", "image_size": 128}
    for bad in ("learning_rate", ":3"):
        with pytest.raises(ValueError, match="key:value"):
            config.parse_overrides([bad])
    with pytest.raises(ValueError, match="cannot be a mapping"):
        config.parse_overrides(["a:1", "a.b:2"])


def test_env_wrapper() -> None:
    spec = ["gymnasium.wrappers.FlattenObservation", {"gymnasium.wrappers.TimeLimit": {"max_episode_steps": 3}}]
    wrap = wrapper_function(spec)
    assert wrap is not None
    env = wrap(gym.make("CartPole-v1"))
    env.reset()
    assert [env.step(0)[3] for _ in range(3)] == [False, False, True]
    assert wrapper_function(None) is None
    for bad in ("gymnasium.wrappers.NoSuch", "NoModule", "no.such.Module", {"a": 1, "b": 2}, 3):
        with pytest.raises(ValueError, match="env_wrapper"):
            wrapper_function(bad)


# ----------------------------------------------------------------------------------------------------- checkpoints


@pytest.fixture
def zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "checkpoints.yml").write_text(
        "expert-all:\n  teacher_for: ['Libero*']\n"
        "expert-one:\n  description: for one suite\n  teacher_for: [LiberoObject-v0]\n  student_for: []\n"
        "beginner:\n  student_for: [LiberoObject*]\n"
    )
    for name in ("expert-all", "expert-one"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "config.json").write_text("{}")
    monkeypatch.setattr(registry, "REGISTRY_FILE", tmp_path / "checkpoints.yml")
    monkeypatch.setattr(registry, "CHECKPOINTS", tmp_path / "checkpoints")
    monkeypatch.setattr(registry, "REPOSITORY_CHECKPOINTS", tmp_path / "repository")
    return tmp_path


def test_defaults_of_the_zoo(zoo: Path) -> None:
    assert registry.checkpoint_names() == ["expert-all", "expert-one", "beginner"]
    # The more precise entry wins, wherever it stands in the file.
    assert registry.teacher_for("LiberoObject-v0") == "expert-one"
    assert registry.teacher_for("opd_gym:LiberoObject-v0") == "expert-one"
    assert registry.teacher_for("LiberoGoal-v0") == "expert-all"
    assert registry.teacher_for("CartPole-v1") is None
    assert registry.student_for("LiberoObjectTask3-v0") == "beginner"
    assert registry.student_for("LiberoGoal-v0") is None
    assert registry.find_teacher("LiberoObject-v0") == zoo / "checkpoints" / "expert-one"
    assert registry.find_teacher("CartPole-v1") is None
    assert registry.find_checkpoint("nothing") is None


def test_teachers_of_some_tasks_of_a_suite_are_named() -> None:
    tasks = tuple(f"Libero10Task{task}-v0" for task in (0, 1, 3, 6, 7))
    assert registry.teachers_for_some_tasks("opd_gym:Libero10-v0") == {"libero-10-teacher": tasks}
    assert registry.teachers_for_some_tasks("CartPole-v1") == {}
    assert registry.teachers_for_some_tasks("CartPole") == {}


def test_checkpoint_path(zoo: Path, tmp_path: Path) -> None:
    assert registry.checkpoint_path("expert-one") == zoo / "checkpoints" / "expert-one"
    with pytest.raises(ValueError, match=r"expert-all, expert-one, beginner"):
        registry.checkpoint_path("nothing")
    with pytest.raises(FileNotFoundError, match=r"copy benchmarks/checkpoints/beginner of the repository"):
        registry.checkpoint_path("beginner")
    for name in ("beginner", "expert-one"):
        (zoo / "repository" / name).mkdir(parents=True)
        (zoo / "repository" / name / "config.json").write_text("{}")
    assert registry.checkpoint_path("beginner") == zoo / "repository" / "beginner"
    # What comes with the package is taken first
    assert registry.checkpoint_path("expert-one") == zoo / "checkpoints" / "expert-one"
    model = tmp_path / "model.zip"
    model.write_bytes(b"")
    assert registry.resolve_checkpoint(tmp_path / "model") == registry.resolve_checkpoint(model) == model
    assert registry.resolve_checkpoint("expert-all") == registry.resolve_checkpoint(zoo / "checkpoints" / "expert-all")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="neither a VLA checkpoint"):
        registry.resolve_checkpoint(tmp_path / "empty")


def test_registry_errors(tmp_path: Path) -> None:
    path = tmp_path / "checkpoints.yml"
    path.write_text("a: {techer_for: [x]}\n")
    with pytest.raises(ValueError, match="techer_for"):
        registry.read_registry(path)
    path.write_text("- a\n")
    with pytest.raises(ValueError, match="must map names"):
        registry.read_registry(path)


def test_committed_checkpoints_fit_their_envs() -> None:
    for name, entry in registry.read_registry().items():
        path = registry.checkpoint_path(name)
        assert (path / "config.json").is_file() and (path / "model.safetensors").is_file()
        for pattern in entry.teacher_for + entry.student_for:
            assert "*" in pattern or pattern in gym.registry, f"{name} is for {pattern}, which is no environment"


# ------------------------------------------------------------------------------------------------- run directories


def test_new_run_dir_counts_up(tmp_path: Path) -> None:
    names = [new_run_dir(tmp_path, "opd", env).name for env in ("opd_gym:A-v0", "A-v0", "ALE/Pong-v5")]
    assert names == ["A-v0_1", "A-v0_2", "ALE-Pong-v5_1"]
    (tmp_path / "opd" / "A-v0_notes").mkdir()
    assert new_run_dir(tmp_path, "opd", "A-v0").name == "A-v0_3"


class _Model:
    num_timesteps = 0

    def get_vec_normalize_env(self) -> None:
        return None

    replay_buffer = None

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(str(self.num_timesteps))


def test_run_checkpoint_keeps_the_last(tmp_path: Path) -> None:
    callback = RunCheckpoint(tmp_path, interval=0.0, keep_last=2)
    model: Any = _Model()
    callback.model = model
    for model.num_timesteps in (8, 16, 100):
        callback.on_step()
    assert [path.name for path in run_checkpoints(tmp_path)] == ["model_16_steps.zip", "model_100_steps.zip"]
    # A file that was being written when the process was killed is no checkpoint.
    (tmp_path / "checkpoints" / ".model_200_steps.zip.123.tmp").write_text("")
    (tmp_path / "checkpoints" / "model_x_steps.zip").write_text("")
    assert run_checkpoints(tmp_path)[-1].read_text() == "100"
    with pytest.raises(ValueError, match="keep_last"):
        RunCheckpoint(tmp_path, keep_last=0)


def test_every_checkpoint_has_its_states(tmp_path: Path) -> None:
    callback = RunCheckpoint(tmp_path, interval=0.0)
    model: Any = _Model()
    model.replay_buffer = written = []
    model.save_replay_buffer = lambda path: written.append((model.num_timesteps, len(run_checkpoints(tmp_path))))
    callback.model = model
    for model.num_timesteps in (8, 16, 24):
        callback.on_step()
    # Before the model: whenever it is killed, the newest one has them
    assert written == [(8, 0), (16, 1), (24, 2)]


def test_a_table_that_cannot_be_written_does_not_end_the_run(tmp_path: Path) -> None:
    logger = make_logger(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (256, hard))
    try:
        with pytest.warns(UserWarning) as caught:
            for step in range(100):
                logger.record("time/total_timesteps", step)
                logger.dump(step)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    logger.record("time/total_timesteps", 100)
    logger.dump(100)
    texts = {str(warning.message) for warning in caught}
    assert any(f"{tmp_path}/progress.csv could not be written" in text and "too large" in text for text in texts)
    assert any(f"{tmp_path} could not be written" in text for text in texts)  # TensorBoard's
    assert read_progress(tmp_path)[-1]["time/total_timesteps"] == 100


def test_progress_of_a_resumed_run_is_one_curve(tmp_path: Path) -> None:
    for steps in ((10, 20, 30), (20, 30, 40)):
        # Killed after it had logged step 30; the last checkpoint is of step 10
        logger = make_logger(tmp_path, start=steps[0] - 10)
        for step in steps:
            logger.record("time/total_timesteps", step)
            logger.record("rollout/success_rate", step / 100)
            logger.record("time/time_elapsed", step - steps[0] + 7)
            logger.record("time/teacher_seconds", step - steps[0] + 2)
            logger.dump(step)
        logger.close()
    rows = read_progress(tmp_path)
    assert [row["time/total_timesteps"] for row in rows] == [10, 20, 30, 40]
    # 27 seconds until the interruption, of which the last 20 were done again
    assert [row["time/time_elapsed"] for row in rows] == [7, 34, 44, 54]
    assert [row["time/teacher_seconds"] for row in rows] == [2, 24, 34, 44]
    assert sorted(path.name for path in tmp_path.glob("*.csv")) == ["progress.1.until_10.csv", "progress.csv"]
    # Iterations of other lengths after the resume: what was lost is no part of the curve, its time is
    (tmp_path / "progress.csv").write_text("time/total_timesteps,time/time_elapsed\n35,7\n")
    rows = read_progress(tmp_path)
    assert [(row["time/total_timesteps"], row["time/time_elapsed"]) for row in rows] == [(10, 7), (35, 34)]
    # Tables of versions that did not note the checkpoint
    (tmp_path / "progress.1.until_10.csv").rename(tmp_path / "progress.1.csv")
    assert [row["time/total_timesteps"] for row in read_progress(tmp_path)] == [10, 20, 30, 35]
    picture = plot_learning_curve(tmp_path, references={"teacher": 0.9})
    assert picture is not None and picture.read_bytes().startswith(b"\x89PNG")
    assert plot_learning_curve(tmp_path / "nothing") is None


@pytest.mark.parametrize("suffix", [".gif", ".mp4"])
def test_films(tmp_path: Path, suffix: str) -> None:
    left = [np.full((33, 41, 3), 10 * i, dtype=np.uint8) for i in range(3)]
    frames = side_by_side(left, left[:1], ("before", "after"))
    assert len(frames) == 3 and frames[0].shape == (53, 82, 3)
    path = write_video(tmp_path / "new" / f"film{suffix}", frames)
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    import imageio.v3 as iio

    assert len(list(iio.imiter(path))) == 3
    with pytest.raises(ValueError, match="no picture"):
        write_video(path, [])
    with pytest.raises(ValueError, match=r"\.mp4 or a \.gif"):
        write_video(tmp_path / "film.avi", frames)
    assert side_by_side([], left, ("a", "b")) == []


# ------------------------------------------------------------------------------------------------ the command line


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("teacher") / "ppo.zip"
    SB3PPO("MlpPolicy", "CartPole-v1", n_steps=64, seed=0).save(path)
    return path


SMALL = ["n_envs:1", "n_steps:32", "gradient_steps:1"]
# What differs between two equal runs
CLOCKS = ("time/fps", "time/time_elapsed", "time/teacher_seconds")


def _train(teacher: Path, folder: Path, *more: str) -> int:
    command = ["train", "--algo", "opd", "--env", "CartPole-v1", "--teacher", str(teacher), "-f", str(folder)]
    return main([*command, "--no-progress", "--device", "cpu", *more])


def test_train_keeps_everything_and_resumes(teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _train(teacher, tmp_path, "-n", "64", "--eval-episodes", "2", "--hyperparams", *SMALL) == 0
    run = tmp_path / "opd" / "CartPole-v1_1"
    assert {"args.yml", "config.yml", "command.txt", "progress.csv", "curve.png", "model.zip", "evaluation.json"} <= {
        path.name for path in run.iterdir()
    }
    assert read_versions(run) == EvaluationResult.load(run / "evaluation.json").versions == versions()
    assert len(list(run.glob("events.out.tfevents*"))) == 1
    stored = yaml.safe_load((run / "config.yml").read_text())
    assert stored["n_steps"] == 32 and stored["n_timesteps"] == 64 and stored["teacher"] == str(teacher)
    assert (run / "command.txt").read_text().count("\n") == 1
    assert [path.name for path in run_checkpoints(run)] == ["model_64_steps.zip"]
    assert len(EvaluationResult.load(run / "evaluation.json").episodes) == 2

    assert main(["train", "--resume", str(run), "-n", "128", "--no-progress"]) == 0
    # What it replays are the states from before the resume, too.
    parts = sorted(path.name for path in (run / "checkpoints" / STATES_FOLDER).iterdir())
    assert parts == ["0-64.npz", "64-128.npz"]
    assert "64 states to replay" in capsys.readouterr().out
    assert [path.name for path in run_checkpoints(run)] == ["model_64_steps.zip", "model_128_steps.zip"]
    assert opd_gym.OPD.load(run / "model.zip").num_timesteps == 128
    steps = [row["time/total_timesteps"] for row in read_progress(run)]
    assert steps == sorted(steps) and steps[0] == 32 and steps[-1] == 128
    assert (run / "command.txt").read_text().count("\n") == 2
    assert main(["train", "--resume", str(run), "-n", "128", "--no-progress"]) == 0
    assert "already" in capsys.readouterr().out
    assert sorted(path.name for path in run.glob("progress*.csv")) == ["progress.1.until_64.csv", "progress.csv"]
    assert (run / "progress.csv").stat().st_size > 0

    output = tmp_path / "result.json"
    command = ["eval", "--env", "CartPole-v1", "--checkpoint", str(run), "--episodes", "3", "--no-progress"]
    assert main([*command, "-o", str(output)]) == 0
    assert len(EvaluationResult.load(output).episodes) == 3
    text = capsys.readouterr().out
    assert "| all |" in text and "trained with" not in text
    # Of a machine with another simulator
    write_versions(run, {**versions(), "mujoco": "1.0", "robosuite": "1.4.0", "torch": "2.0"})
    assert main(command) == 0
    there = versions().get("mujoco")
    wanted = f"Not what {run} was trained with: mujoco 1.0 and {there}\n"
    assert (wanted in capsys.readouterr().out) == (there is not None)
    assert main(["train", "--resume", str(run), "-n", "128", "--no-progress"]) == 0
    assert (f"Before and from now on: mujoco 1.0 and {there}\n" in capsys.readouterr().out) == (there is not None)
    assert read_versions(run) == versions()


def test_two_runs_with_one_seed_are_identical(teacher: Path, tmp_path: Path) -> None:
    for _ in range(2):
        assert _train(teacher, tmp_path, "-n", "64", "--seed", "3", "--hyperparams", *SMALL) == 0
    tables = []
    for number in (1, 2):
        with (tmp_path / "opd" / f"CartPole-v1_{number}" / "progress.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        tables.append([{k: v for k, v in row.items() if k not in CLOCKS} for row in rows])
    assert tables[0] == tables[1]


def test_what_a_run_can_do_without_does_not_end_it(teacher: Path, tmp_path: Path) -> None:
    small = ["n_envs:1", "n_steps:1024", "gradient_steps:1", "policy_kwargs.net_arch:[2]"]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Enough for the model, too little for its states, as on a full disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, hard))
    try:
        with pytest.warns(UserWarning) as caught:
            assert _train(teacher, tmp_path, "-n", "4096", "--hyperparams", *small) == 0
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    run = tmp_path / "opd" / "CartPole-v1_1"
    texts = [str(warning.message) for warning in caught]
    states = run / "checkpoints" / STATES_FOLDER
    assert any(f"{states} could not be written" in text and "File too large" in text for text in texts)
    assert not list(states.iterdir())
    assert opd_gym.OPD.load(run / "model.zip").num_timesteps == 4096
    kept = ["config.yml", "model_4096_steps.zip", STATES_FOLDER]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == kept
    (run / "curve.png").unlink()
    (run / "curve.png").mkdir()
    with pytest.warns(UserWarning, match="curve.png could not be written .*The run goes on"):
        assert main(["train", "--resume", str(run), "-n", "5120", "--no-progress"]) == 0
    assert opd_gym.OPD.load(run / "model.zip").num_timesteps == 5120


def test_a_student_from_a_zip(teacher: Path, tmp_path: Path) -> None:
    student = tmp_path / "student.zip"
    SB3PPO("MlpPolicy", "CartPole-v1", n_steps=64, seed=7).save(student)
    more = ("-n", "32", "--student", str(student), "--hyperparams", *SMALL, "learning_rate:0.0")
    assert _train(teacher, tmp_path, *more) == 0
    model = opd_gym.OPD.load(tmp_path / "opd" / "CartPole-v1_1" / "model.zip")
    observations = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
    wanted = SB3PPO.load(student).predict(observations, deterministic=True)[0]
    assert (model.predict(observations, deterministic=True)[0] == wanted).all()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Sums have the same bits in the same number of threads alone."""
    threads = th.get_num_threads()
    th.set_num_threads(1)
    yield
    th.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_run_goes_on_from_its_last_checkpoint(
    teacher: Path, tmp_path: Path, signum: int, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [sys.executable, "-m", "opd_gym.cli", "train", "--algo", "opd", "--env", "CartPole-v1"]
    command += ["--teacher", str(teacher), "-f", str(tmp_path), "-n", "1000000", "--no-progress", "--device", "cpu"]
    command += ["--checkpoint-interval", "0.05", "--hyperparams", *SMALL]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, **pipes)
    run = tmp_path / "opd" / "CartPole-v1_1"
    try:
        deadline = time.monotonic() + 600  # only against waiting for ever
        while len(run_checkpoints(run)) < 2:
            assert process.poll() is None and time.monotonic() < deadline, "no checkpoint was written"
            time.sleep(0.05)
        assert main(["train", "--resume", str(run)]) == 2
        assert f"Process {process.pid} on {socket.gethostname()} is training into {run}" in capsys.readouterr().err
        process.send_signal(signum)
        output, said = process.communicate(timeout=600)
    finally:
        process.kill()
    steps = int(re.findall(r"\d+", run_checkpoints(run)[-1].name)[0])
    if signum == signal.SIGTERM:
        assert process.returncode == 130 and "Stopping after this step or update" in said
        assert f"Stopped, {steps:,} timesteps are kept. Go on with: opd-gym train --resume {run}" in output
    assert main(["train", "--resume", str(run), "-n", str(steps + 32), "--no-progress", "--device", "cpu"]) == 0
    resumed = opd_gym.OPD.load(run / "model.zip")
    assert resumed.num_timesteps == steps + 32
    # To the bit the run that nobody killed
    assert _train(teacher, tmp_path, "-n", str(steps + 32), "--device", "cpu", "--hyperparams", *SMALL) == 0
    whole = opd_gym.OPD.load(tmp_path / "opd" / "CartPole-v1_2" / "model.zip")
    assert th.equal(parameters(resumed), parameters(whole))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train"], "Pass --env"),
        (["train", "--env", "CartPole-v1"], "No teacher given"),
        (["train", "--env", "CartPole-v1", "--teacher", "no-such-teacher"], "no-such-teacher"),
        (["train", "--env", "CartPole-v1", "--teacher", "expert"], "scripted expert"),
        (["train", "--env", "NoSuch-v1", "--teacher", "expert"], "NoSuch"),
        (["train", "--env", "CartPole-v1", "--student", "nobody"], "nobody"),
        (["train", "--env", "CartPole-v1", "--hyperparams", "learning_rat:1"], "learning_rat"),
        (["train", "--env", "CartPole-v1", "--hyperparams", "learning_rate"], "key:value"),
        (["train", "--algo", "grpo", "--env", "CartPole-v1", "--teacher", "expert"], "grpo has no teacher"),
        (["train", "--algo", "ppo", "--env", "CartPole-v1", "--demonstrations", "x"], "takes no demonstrations"),
        (["train", "--resume", "/no/such/run"], "There is no /no/such/run"),
        (["eval", "--env", "CartPole-v1", "--checkpoint", "nobody"], "nobody"),
        (["demos", "--env", "CartPole-v1"], "LIBERO"),
        (["train", "--algo", "ppo", "--env", "CartPole-v1", "--device", "gpu"], "Unknown device 'gpu'"),
        (["eval", "--env", "CartPole-v1", "--checkpoint", "libero-object-student", "--device", "x"], "Unknown device"),
        (["train", "--algo", "ppo", "--env", "CartPole-v1", "-P", "env_kwargs.image_sze=3"], "image_sze"),
        (["train", "--algo", "ppo", "--env", "CartPole-v1", "-P", "policy_kwargs.foo=3"], "argument 'foo'"),
        (
            ["train", "--algo", "ppo", "--env", "CartPole-v1", "-P", "n_steps=many"],
            "n_steps must be an integer.*'many'",
        ),
        (["train", "--algo", "ppo", "--env", "CartPole-v1", "-P", "n_envs=1.5"], "n_envs: expected an integer"),
        (["train", "--env", "CartPole-v1", "-P", "teacher_kwargs={a: [}"], "teacher_kwargs.*expected YAML"),
        (["train", "--env", "CartPole-v1", "--config", __file__], "test_zoo.py is not YAML"),
        (["train", "--env", "CartPole-v1", "--config", "/proc/self/mem"], "error"),
        (["train", "--env", "nobody:CartPole-v1"], "No module named 'nobody'"),
        # Before anything is loaded or played
        (
            ["eval", "--env", "E-v0", "--checkpoint", "nobody", "-o", "/proc/no/file.json"],
            "file.json cannot be written",
        ),
        (["eval", "--env", "E-v0", "--checkpoint", "nobody", "-o", "/"], "/ cannot be written: it is a folder"),
        (["video", "--env", "E-v0", "--checkpoint", "nobody", "-o", "/proc/film.mp4"], "/proc/film.mp4 cannot be"),
        (["video", "--env", "E-v0", "--checkpoint", "nobody", "-o", "film.avi"], "mp4 or a .gif, got 'film.avi'"),
        (["demos", "--env", "LiberoObject-v0", "-o", "/dev/null/demos"], "/dev/null/demos cannot be"),
        (["report", "nothing", "-o", "/proc/page.html"], "/proc/page.html cannot be written"),
        (["train", "--env", "E-v0", "-f", "/proc/runs"], "/proc/runs cannot be written"),
    ],
)
def test_bad_input(arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["-f", str(tmp_path), "--no-progress"] if arguments[0] == "train" and "-f" not in arguments else []
    assert main([*arguments, *more]) == 2
    said = capsys.readouterr().err
    assert re.search(message, said) and "Traceback" not in said
    assert not list(tmp_path.rglob("*.zip"))


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    text = capsys.readouterr().out
    assert "LiberoObject-v0" in text and "LiberoObjectTask3-v0\n" not in text
    assert main(["list", "--all"]) == 0
    text = capsys.readouterr().out
    assert all(env_id in text for env_id in LIBERO_IDS)


def test_help_of_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("train", "eval", "enjoy", "video", "demos", "list", "quickstart", "doctor"):
        with pytest.raises(SystemExit) as stop:
            main([command, "--help"])
        assert stop.value.code == 0
        assert "usage: opd-gym" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------- quickstart


class ToyRobot(gym.Env):
    """An env of pictures, instructions and two motors: everything that the quickstart needs of LIBERO, in no time."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 5}
    observation_space = spaces.Dict(
        {
            "agentview": spaces.Box(0, 255, (16, 16, 3), np.uint8),
            "proprio": spaces.Box(-np.inf, np.inf, (3,), np.float32),
            "instruction": spaces.Box(0, 255, (16,), np.uint8),
        }
    )
    action_space = spaces.Box(-1.0, 1.0, (2,), np.float32)

    def __init__(self, task_ids: tuple[int, ...] = (0, 1), render_mode: str | None = None) -> None:
        self.task_ids, self.render_mode = task_ids, render_mode

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict, dict]:
        super().reset(seed=seed)
        self.task = (options or {}).get("task_id", self.task_ids[0])
        self.left = 6
        return self._obs(), {}

    def _obs(self) -> dict[str, np.ndarray]:
        picture = np.full((16, 16, 3), 40 * self.left, dtype=np.uint8)
        proprio = np.full(3, self.left, dtype=np.float32)
        return {"agentview": picture, "proprio": proprio, "instruction": np.full(16, self.task, dtype=np.uint8)}

    def step(self, action: np.ndarray) -> tuple[dict, float, bool, bool, dict]:
        self.left -= 1
        success = bool(self.left <= 0 and action[0] > 0)
        info = {"is_success": success, "task_id": self.task, "init_state_id": 0}
        return self._obs(), float(success), self.left <= 0, False, info

    def render(self) -> np.ndarray:  # type: ignore[override]
        return np.zeros((32, 32, 3), dtype=np.uint8)


@pytest.fixture
def toy_checkpoints(tmp_path: Path) -> list[Path]:
    if "ToyRobot-v0" not in gym.registry:
        gym.register("ToyRobot-v0", ToyRobot)
    env = opd_gym.make_vec("ToyRobot-v0", chunk_size=2, tokens=True)
    body = {
        "action_dim": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "stem_channels": [16, 32],
        "summary_size": 32,
    }
    paths = [tmp_path / "student", tmp_path / "teacher"]
    for path in paths:
        policy = opd_gym.VLAPolicy(env.observation_space, env.action_space, lambda _: 0.0, body_kwargs=body)
        policy.save_checkpoint(path)
    return paths


def test_quickstart(
    toy_checkpoints: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    class FewDecisions(quickstart.TimeBudget):
        """The same number of decisions on a busy machine as on any other."""

        def _on_step(self) -> bool:
            return super()._on_step() and self.model.num_timesteps < 64

    monkeypatch.setattr(quickstart, "TimeBudget", FewDecisions)
    student, teacher = map(str, toy_checkpoints)
    folder = tmp_path / "out"
    command = ["quickstart", "--env", "ToyRobot-v0", "--student", student, "--teacher", teacher, "-f", str(folder)]
    command += ["--eval-episodes", "4", "--n-envs", "2", "--device", "cpu", "--hyperparams", "policy:VLAPolicy"]
    command += ["n_steps:4", "batch_size:8", "gradient_steps:1"]
    assert main([*command, "--minutes", "30"]) == 0
    wanted = {"results.json", "results.md", "curve.png", "before_after.mp4", "before_after.gif", "model.zip", "policy"}
    assert wanted <= {path.name for path in folder.iterdir()}
    assert json.loads((folder / "results.json").read_text())["versions"] == versions()
    assert read_versions(folder / "policy") == versions()
    results = json.loads((folder / "results.json").read_text())
    tasks = [episode["task_id"] for episode in results["after"]["episodes"]]
    assert tasks == [0, 1, 0, 1] == [episode["task_id"] for episode in results["before"]["episodes"]]
    # Chunks of two actions, episodes of six.
    assert [episode["steps"] for episode in results["after"]["episodes"]] == [6] * 4
    assert results["total_seconds"] > 0
    assert "student before" in (folder / "results.md").read_text()

    monkeypatch.setattr(quickstart, "MIN_TRAINING", 7200.0)
    capsys.readouterr()
    assert main([*command, "--minutes", "30"]) == 2
    assert "Raise --minutes" in capsys.readouterr().err


def test_film_of_two_policies(
    toy_checkpoints: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import imageio.v3 as iio

    class Gauge(ToyRobot):
        """Shows the last action, so that a picture says which policy acted."""

        def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict, dict]:
            self.level = 0
            return super().reset(seed=seed, options=options)

        def step(self, action: np.ndarray) -> tuple[dict, float, bool, bool, dict]:
            self.level = 20 + int(100 * (action[0] + 1))
            return super().step(action)

        def render(self) -> np.ndarray:
            return np.full((32, 32, 3), self.level, dtype=np.uint8)

    monkeypatch.setattr(gym.registry["ToyRobot-v0"], "entry_point", Gauge)
    student, teacher = map(str, toy_checkpoints)
    command = ["video", "--env", "ToyRobot-v0", "--episodes", "2", "--no-progress"]
    films = {}
    for name, arguments in {
        "student": ["--checkpoint", student],
        "teacher": ["--checkpoint", teacher],
        "both": ["--before", student, "--checkpoint", teacher],
    }.items():
        path = tmp_path / f"{name}.mp4"
        assert main([*command, *arguments, "-o", str(path)]) == 0
        films[name] = iio.imread(path).astype(int)
    # Two episodes of a picture after the reset and after each of three chunks; beside each other under their titles.
    assert films["both"].shape == (2 * 4, 52, 64, 3)
    left, right = films["both"][:, 24:48, 4:28], films["both"][:, 24:48, 36:60]
    inner = {name: films[name][:, 4:28, 4:28] for name in ("student", "teacher")}
    assert np.abs(inner["student"] - inner["teacher"]).max() > 20
    # What compression leaves of an even grey
    assert np.abs(left - inner["student"]).max() < 10 and np.abs(right - inner["teacher"]).max() < 10
    assert capsys.readouterr().out.count("| all |") == 4

    env = opd_gym.make_vec("ToyRobot-v0", chunk_size=1, tokens=True)
    body = {"action_dim": 2, "hidden_size": 32, "intermediate_size": 64, "stem_channels": [16, 32], "summary_size": 32}
    policy = opd_gym.VLAPolicy(env.observation_space, env.action_space, lambda _: 0.0, body_kwargs=body)
    policy.save_checkpoint(tmp_path / "other_chunk")
    other = ["--before", student, "--checkpoint", str(tmp_path / "other_chunk"), "-o", str(tmp_path / "no.mp4")]
    assert main([*command, *other]) == 2
    assert "differ in what they were trained with" in capsys.readouterr().err


def test_quickstart_without_checkpoints(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quickstart", "--env", "CartPole-v1"]) == 2
    assert "Pass --student" in capsys.readouterr().err


def test_quickstart_says_how_many_minutes_would_do() -> None:
    from opd_gym.cli.quickstart import _too_few

    # 270 s until then, 4 episodes of 10 s once more, 75 s for the rest: 385 s
    message = _too_few(5.0, 270.0, 10.0, 4)
    assert "5 minutes are too few" in message and "--minutes to 7 at least" in message


@pytest.mark.parametrize(
    ("seconds", "per_episode", "n_tasks", "expected"),
    [
        (900.0, 3.0, 2, 20),  # all that were asked for
        (145.0, 7.0, 2, 6),  # (72 s / 7 s + 4) / 2 are 7, of two tasks 6: 56 s of evaluation are to come
        (145.0, 7.0, 1, 7),
        (20.0, 7.0, 2, 4),  # no less than what was played
        (900.0, 0.0, 2, 20),
    ],
)
def test_quickstart_leaves_half_of_the_time_to_the_training(seconds, per_episode, n_tasks, expected) -> None:
    found = quickstart.fit_episodes(seconds, per_episode, n_played=4, n_tasks=n_tasks, n_episodes=20)
    assert found == expected
    assert found == 4 or per_episode * (2 * found - 4) <= seconds / 2


def test_quickstart_takes_what_the_memory_carries() -> None:
    from opd_gym.cli.quickstart import fit_memory

    assert fit_memory(2, None) == 2
    assert fit_memory(2, 24.0) == 2
    assert fit_memory(2, 4.0) == 1  # 1.5 + 2 * 1.3 = 4.1
    assert fit_memory(2, 1.0) == 1


def test_sft_goes_on_with_its_demonstrations_and_learning_rate(tmp_path: Path) -> None:
    from opd_gym.demonstrations import Episode, write_demonstrations

    rng = np.random.default_rng(0)
    observations = {
        "agentview": rng.integers(0, 256, (6, 32, 32, 3), dtype=np.uint8),
        "wrist": rng.integers(0, 256, (6, 32, 32, 3), dtype=np.uint8),
        "proprio": rng.normal(size=(6, 9)).astype(np.float32),
    }
    write_demonstrations(tmp_path / "a_demo.hdf5", [Episode(observations, rng.uniform(-1, 1, (6, 7)))], "do it")
    command = ["train", "--algo", "sft", "--env", "LiberoObject-v0", "--student", "none", "--no-progress"]
    command += ["--demonstrations", str(tmp_path / "a_demo.hdf5"), "-f", str(tmp_path), "--device", "cpu"]
    tiny = ["env_kwargs.image_size:32", "n_envs:1", "batch_size:4", "warmup_steps:0", "learning_rate:1e-3"]
    tiny += ["policy_kwargs.body_kwargs.stem_channels:[8, 8]", "policy_kwargs.body_kwargs.summary_size:16"]
    assert main([*command, "-n", "4", "--hyperparams", *tiny]) == 0
    run = tmp_path / "sft" / "LiberoObject-v0_1"
    assert main(["train", "--resume", str(run), "-n", "8", "--no-progress", "--device", "cpu"]) == 0
    model = opd_gym.SFT.load(run / "model.zip", device="cpu")
    assert model.num_timesteps == 8
    # The last of 8 steps of a cosine from 1e-3, not the last of 4.
    assert model.policy.optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 * 0.5 * (1 + np.cos(np.pi * 7 / 8)))


def test_resume_says_what_it_does_not_take(teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _train(teacher, tmp_path, "-n", "32", "--hyperparams", *SMALL) == 0
    run = tmp_path / "opd" / "CartPole-v1_1"
    assert main(["train", "--resume", str(run), "--hyperparams", "learning_rate:1e-5"]) == 2
    assert "--hyperparams" in capsys.readouterr().err
    # What it does take
    more = ["-n", "128", "--eval-episodes", "2", "--checkpoint-interval", "0", "--no-progress"]
    assert main(["train", "--resume", str(run), *more]) == 0
    assert len(json.loads((run / "evaluation.json").read_text())["episodes"]) == 2
    args = read_yaml(run / "args.yml")
    assert args["eval_episodes"] == 2 and args["checkpoint_interval"] == 0.0
    for name, content in (("args.yml", "- 1"), ("config.yml", "a: [")):
        kept = (run / name).read_text()
        (run / name).write_text(content)
        assert main(["train", "--resume", str(run)]) == 2 and name in capsys.readouterr().err
        (run / name).write_text(kept)


def test_a_run_killed_before_its_first_checkpoint_goes_on(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--resume", str(tmp_path)]) == 2
    assert "killed before it began: args.yml is missing" in capsys.readouterr().err
    # All that there is before config.yml
    hyperparams = [*SMALL, "n_timesteps:32"]
    args = {"algo": "opd", "env": "CartPole-v1", "teacher": str(teacher), "hyperparams": hyperparams}
    (tmp_path / "args.yml").write_text(yaml.safe_dump(args))
    assert main(["train", "--resume", str(tmp_path), "--no-progress", "--device", "cpu"]) == 0
    assert read_yaml(tmp_path / "config.yml")["n_timesteps"] == 32
    assert opd_gym.OPD.load(tmp_path / "model.zip").num_timesteps == 32


def test_a_finished_run_without_its_checkpoints_does_not_begin_anew(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _train(teacher, tmp_path, "-n", "32", "--hyperparams", *SMALL) == 0
    run = tmp_path / "opd" / "CartPole-v1_1"
    for path in run_checkpoints(run):
        path.unlink()
    before = (run / "model.zip").read_bytes()
    assert main(["train", "--resume", str(run), "--no-progress"]) == 2
    assert "no checkpoint to go on from" in capsys.readouterr().err
    assert (run / "model.zip").read_bytes() == before


def test_results_take_the_place_of_results_alone(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["eval", "--env", "CartPole-v1", "--checkpoint", str(teacher), "--episodes", "1", "--no-progress", "-o"]
    before = teacher.read_bytes()
    assert main([*command, str(teacher)]) == 2 and "holds no results" in capsys.readouterr().err
    assert teacher.read_bytes() == before
    path = tmp_path / "results.json"
    path.touch()
    for _ in range(2):
        assert main([*command, str(path)]) == 0
    path.unlink()
    # And they are there before anything is told to a pipe that may be closed

    def closed(self: EvaluationResult, title: str = "") -> str:
        raise BrokenPipeError

    monkeypatch.setattr(EvaluationResult, "to_markdown", closed)
    assert main([*command, str(path)]) != 0
    assert len(EvaluationResult.load(path).episodes) == 1


def test_a_configuration_that_was_changed(teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where the teacher lies may change; what the saved model has as it was is refused, not ignored."""
    assert _train(teacher, tmp_path, "-n", "64", "--hyperparams", *SMALL) == 0
    run = tmp_path / "opd" / "CartPole-v1_1"
    path = run / "config.yml"
    before = path.read_text()
    values = yaml.safe_load(before)
    path.write_text(yaml.safe_dump({**values, "learning_rate": 0.5, "divergence": "jsd"}))
    resume = ["train", "--resume", str(run), "--no-progress", "--device", "cpu", "-n"]
    assert main([*resume, "128"]) == 2
    said = capsys.readouterr().err
    assert "learning_rate (None, now 0.5)" in said and "divergence (None, now 'jsd')" in said
    moved = tmp_path / "moved.zip"
    moved.write_bytes(teacher.read_bytes())
    path.write_text(yaml.safe_dump({**values, "teacher": str(moved)}))
    assert main([*resume, "128"]) == 0
    assert opd_gym.OPD.load(run / "model.zip").teacher == str(moved)
    path.write_text(before)
    assert main([*resume, "192"]) == 0
    assert opd_gym.OPD.load(run / "model.zip").teacher == str(teacher)


def test_a_run_is_played_in_its_own_env(teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrapper = "env_wrapper={gymnasium.wrappers.TimeLimit: {max_episode_steps: 7}}"
    assert _train(teacher, tmp_path, "-n", "32", "-P", wrapper, "--hyperparams", *SMALL) == 0
    run = tmp_path / "opd" / "CartPole-v1_1"
    played = ["eval", "--env", "CartPole-v1", "--no-progress", "--episodes", "3", "-o", str(tmp_path / "out.json")]
    for checkpoint in (run, run / "model.zip"):
        assert main([*played, "--checkpoint", str(checkpoint)]) == 0
        assert [episode.steps for episode in EvaluationResult.load(tmp_path / "out.json").episodes] == [7, 7, 7]
    assert main([*played, "--checkpoint", str(run), "-P", wrapper.replace("7", "5")]) == 0
    assert [episode.steps for episode in EvaluationResult.load(tmp_path / "out.json").episodes] == [5, 5, 5]
    capsys.readouterr()
    assert main([*played, "--checkpoint", str(run), "--task-ids", "3"]) == 2
    assert "no tasks" in capsys.readouterr().err
    # A slip in the last of several envs is found before the first is played
    (tmp_path / "out.json").unlink()
    ids = [*played, "--checkpoint", str(run), "--env", "CartPole-v1", "Cartpole-v1"]
    assert main(ids) == 2
    assert "Cartpole" in (told := capsys.readouterr().err) and "What came before" not in told
    # And what cannot be known before costs no result that is there
    assert main([*ids[:-1], "Acrobot-v1"]) == 2
    assert "What came before Acrobot-v1:\n\nCartPole-v1: 0.0 % [0.0, 56.2] (0/3)" in capsys.readouterr().err


def test_of_a_benchmark_the_tasks_and_the_horizon_of_training_do_not_count(tmp_path: Path) -> None:
    (tmp_path / "policy").mkdir()
    (tmp_path / "args.yml").write_text("env: LiberoObject-v0\n")
    env_kwargs = {"visuals": "exact", "image_size": 64, "horizon": 160, "task_ids": [1, 2]}
    (tmp_path / "config.yml").write_text(yaml.safe_dump({"env_kwargs": env_kwargs, "n_envs": 2, "learning_rate": 1.0}))
    kept = {"env_kwargs": {"visuals": "exact", "image_size": 64}}
    for checkpoint in (tmp_path, tmp_path / "policy", tmp_path / "checkpoints" / "model_8_steps.zip"):
        assert trained_in(checkpoint, "opd_gym:LiberoObject-v0") == kept
    assert trained_in(tmp_path, "LiberoGoal-v0") == {"env_kwargs": {"visuals": "exact"}}
    assert trained_in(tmp_path, "CartPole-v1") == {"env_kwargs": {}}
    assert trained_in(tmp_path / "a" / "b" / "c", "LiberoObject-v0") == {}


def test_an_evaluation_that_was_broken_off(teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one in the training is made up for, the last one's old result does not stand beside a newer model."""
    evaluate = "opd_gym.cli.train._evaluate"
    original = cli_train._evaluate

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    more = ("--eval-episodes", "2", "--hyperparams", *SMALL)
    monkeypatch.setattr(evaluate, broken)
    assert _train(teacher, tmp_path, "-n", "64", "--eval-freq", "1000", *more) == 130
    run = tmp_path / "opd" / "CartPole-v1_1"
    assert not (run / "best_model.zip").exists() and len(list((run / "checkpoints" / STATES_FOLDER).iterdir())) == 1
    monkeypatch.setattr(evaluate, original)
    resume = ["train", "--resume", str(run), "--no-progress", "--device", "cpu"]
    assert main(resume) == 0
    assert (run / "best_model.zip").exists() and (run / "evaluation.json").exists()
    with np.load(run / "evaluations.npz") as rows:
        assert rows["timesteps"].tolist() == [64]
    # Nothing is left to be made up for, and other episodes would not be comparable
    assert main(resume) == 0
    with np.load(run / "evaluations.npz") as rows:
        assert rows["timesteps"].tolist() == [64]
    assert main([*resume, "--eval-episodes", "3"]) == 2

    assert _train(teacher, tmp_path, "-n", "64", *more) == 0
    run = tmp_path / "opd" / "CartPole-v1_2"
    assert (run / "evaluation.json").exists()
    monkeypatch.setattr(evaluate, broken)
    assert main(["train", "--resume", str(run), "--no-progress", "--device", "cpu", "-n", "128"]) == 130
    assert opd_gym.OPD.load(run / "model.zip").num_timesteps == 128 and not (run / "evaluation.json").exists()


def test_evaluations_are_due_as_if_the_run_had_not_been_killed(tmp_path: Path) -> None:
    """A run that is killed more often than it is evaluated."""
    played = []
    expert = SB3PPO("MlpPolicy", "CartPole-v1", n_steps=64)

    def evaluate(model: Any) -> EvaluationResult:
        played.append(model.num_timesteps)
        return EvaluationResult([EpisodeRecord(-1, -1, True, 3, 1.0)])

    for part in range(3):
        model = opd_gym.OPD("MlpPolicy", "CartPole-v1", teacher=expert, n_steps=8)
        model.num_timesteps = 40 * part
        model.set_logger(Logger(folder=None, output_formats=[]))
        callback = Evaluations(tmp_path, evaluate, 64)
        callback.init_callback(model)
        callback.on_training_start({}, {})
        for steps in range(8):
            model.num_timesteps = 40 * part + 8 * steps
            callback.on_rollout_start()
    assert played == [64, 128]
    with np.load(tmp_path / "evaluations.npz") as rows:
        assert rows["timesteps"].tolist() == [64, 128]
    # The best model is written before its score, and missed if it is gone
    (tmp_path / "best_model.zip").unlink()
    callback = Evaluations(tmp_path, evaluate, 64)
    callback.init_callback(model)
    callback.make_up(model)
    assert played == [64, 128, 136] and (tmp_path / "best_model.zip").exists()


def test_states_of_a_checkpoint_that_was_never_finished(teacher: Path, tmp_path: Path) -> None:
    assert _train(teacher, tmp_path, "-n", "64", "--hyperparams", *SMALL) == 0
    run = tmp_path / "opd" / "CartPole-v1_1"
    for path in [*run_checkpoints(run), run / "model.zip"]:
        path.unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert main(["train", "--resume", str(run), "--no-progress", "--device", "cpu", "-n", "128"]) == 0
    model = opd_gym.OPD.load(run / "model.zip")
    model.load_replay_buffer(run / "checkpoints" / STATES_FOLDER)
    assert model.replay_buffer.size == 128


def test_the_highest_seed_goes_on(teacher: Path, tmp_path: Path) -> None:
    assert _train(teacher, tmp_path, "-n", "32", "--seed", str(2**32 - 1), "--hyperparams", *SMALL) == 0
    run = tmp_path / "opd" / "CartPole-v1_1"
    assert main(["train", "--resume", str(run), "--no-progress", "--device", "cpu", "-n", "64"]) == 0


def test_episodes_that_would_count_twice() -> None:
    with pytest.raises(ValueError, match="--env names something twice: A A"):
        options.Eval(env=("A", "A"), checkpoint="c")
    with pytest.raises(ValueError, match="--task-ids names something twice: 3 1 3"):
        options.Eval(env=("A",), checkpoint="c", task_ids=(3, 1, 3))


def test_a_home_that_the_shell_left_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert TrainArgs(folder="~/runs").folder == str(tmp_path / "runs")
    assert options.Demos(env="E", output=Path("~/d")).output == tmp_path / "d"
    assert options.Report(results=(Path("~/a"), Path("b"))).results == (tmp_path / "a", Path("b"))


def test_two_processes_do_not_train_into_one_directory(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text("Process 1 on another machine")  # left by a process that was killed
    for _ in range(2):
        with locked(tmp_path):
            holder = f"Process {os.getpid()} on {socket.gethostname()} is training into {tmp_path}"
            with pytest.raises(RuntimeError, match=holder):
                train(TrainArgs(), resume=tmp_path)


def test_an_env_of_a_module_in_this_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_envs.py").write_text(
        "import gymnasium\n"
        "entry_point = 'gymnasium.envs.classic_control:CartPoleEnv'\n"
        "gymnasium.register('Own-v0', entry_point, max_episode_steps=9, reward_threshold=9)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    small = ["-n", "32", "--no-progress", "-P", "n_steps=32", "-P", "n_envs=2", "-P", "n_workers=1"]
    assert main(["train", "--algo", "ppo", "--env", "own_envs:Own-v0", *small, "--eval-episodes", "1"]) == 0
    run = tmp_path / "runs" / "ppo" / "Own-v0_1"
    assert json.loads((run / "evaluation.json").read_text())["episodes"][0]["steps"] == 9
    assert main(["eval", "--env", "own_envs:Own-v0", "--checkpoint", str(run), "--episodes", "1", "--no-progress"]) == 0


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_run_although_a_worker_hangs(tmp_path: Path, signum: int) -> None:
    (tmp_path / "own_envs.py").write_text(
        "import pathlib, time, gymnasium\n"
        "from gymnasium.envs.classic_control import CartPoleEnv\n"
        "class Hanging(CartPoleEnv):\n"
        "    n = 0\n"
        "    def step(self, action):\n"
        "        self.n += 1\n"
        "        if self.n > 40:\n"
        "            pathlib.Path('hangs').touch()\n"
        "            time.sleep(3600)\n"
        "        return super().step(action)\n"
        "gymnasium.register('Hanging-v0', Hanging)\n"
    )
    command = [
        sys.executable,
        "-m",
        "opd_gym.cli",
        "train",
        "--algo",
        "ppo",
        "--env",
        "own_envs:Hanging-v0",
        "-n",
        "999",
    ]
    command += ["--no-progress", "--device", "cpu", "-P", "n_steps=16", "-P", "n_envs=2", "-P", "n_workers=2"]
    terminal, end = pty.openpty()

    def in_terminal() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # these tests may run below nohup
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"},
        stdin=end,
        stdout=end,
        stderr=end,
        start_new_session=True,
        preexec_fn=in_terminal,
    )
    os.close(end)
    try:
        deadline = time.monotonic() + 600  # only against waiting for ever
        while not (tmp_path / "hangs").exists():
            assert process.poll() is None and time.monotonic() < deadline, "no worker hangs"
            time.sleep(0.05)
        if signum == signal.SIGTERM:
            process.send_signal(signum)
        else:
            os.close(terminal)
        # A worker counts as dead after 300 seconds
        assert process.wait(timeout=250) == 130
    finally:
        process.kill()
    run = tmp_path / "runs" / "ppo" / "Hanging-v0_1"
    # Two iterations; nothing is learned from the rollout that was broken off, and nothing of it counted
    assert [path.name for path in run_checkpoints(run)] == ["model_64_steps.zip"]
    assert (run / "curve.png").exists()  # what comes after the training did not raise


def test_python_trains_an_id_of_the_zoo_as_the_command_line_does(capsys):
    model = PPO("MlpPolicy", "CartPole-v1", gamma=0.9, policy_kwargs={"net_arch": [8]}, verbose=1, device="cpu")
    run, tuned = config.split_hyperparams("ppo", load_hyperparams("ppo", "CartPole-v1"), PPO)
    assert (model.n_envs, model.default_total_timesteps) == (run["n_envs"], run["n_timesteps"])
    assert (model.n_steps, model.n_epochs) == (tuned["n_steps"], tuned["n_epochs"])
    assert model.lr_schedule(0.5) == tuned["learning_rate"](0.5) != 3e-4
    assert model.gamma == 0.9
    out = capsys.readouterr().out
    assert "From the zoo, for CartPole-v1: n_envs=8" in out and "Passed instead: gamma" in out
    # Neither an id that only `default` is for, nor another policy, nor an env that is there already
    plain = PPO("MlpPolicy", "Acrobot-v1", device="cpu")
    own = PPO("MlpPolicy", make_vec("CartPole-v1"), device="cpu")
    assert plain.n_envs == own.n_envs == 1 and plain.gamma == own.gamma == 0.99


def test_seeds_of_numpy_are_seeds() -> None:
    actions = [
        PPO("MlpPolicy", "CartPole-v1", seed=seed, n_steps=8, device="cpu").learn(8).rollout_buffer.actions
        for seed in (3, np.int64(3))
    ]
    assert np.array_equal(*actions)
    assert make_vec("CartPole-v1", seed=np.uint32(3)).reset().shape == (1, 4)
    with pytest.raises(ValueError, match="seed must be an integer, got 'x'"):
        PPO("MlpPolicy", "CartPole-v1", seed="x")
