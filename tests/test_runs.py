"""What a run of opd-gym can be told besides its hyperparameters: evaluations meanwhile, callbacks, tracking."""

import csv

import numpy as np
import pytest
import torch as th
import yaml
from stable_baselines3.common.callbacks import BaseCallback
from toys import cartpole_teacher, parameters

from opd_gym import GRPO, OPD
from opd_gym.cli.main import main
from opd_gym.cli.options import TrainArgs
from opd_gym.cli.train import default_episodes, train
from opd_gym.envs.make import build_env
from opd_gym.evaluation import EvaluationResult, evaluate_success
from opd_gym.policies.loading import read_vec_normalize
from opd_gym.untrusted import read_yaml


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    path = tmp_path_factory.mktemp("teacher") / "teacher.zip"
    cartpole_teacher().save(path)
    return str(path)


def args(teacher, folder, *hyperparams, **kwargs):
    items = ["gradient_steps=4", "n_envs=2", "teacher_kwargs.n_eval_episodes=0", *hyperparams]
    given = {"n_timesteps": 256, "device": "cpu", "progress": False, **kwargs}
    return TrainArgs(env="CartPole-v1", teacher=teacher, hyperparams=items, folder=str(folder), **given)


@pytest.fixture(scope="module")
def evaluated(teacher, tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluated")
    return train(args(teacher, folder, eval_freq=100, eval_episodes=3))


def test_evaluations_meanwhile(evaluated):
    with np.load(evaluated.run_dir / "evaluations.npz") as file:
        rows = dict(file)
    # At the first update after every 100 decisions, and after the last
    assert rows["timesteps"].tolist() == [128, 256] and rows["results"].shape == rows["ep_lengths"].shape == (2, 3)
    with (evaluated.run_dir / "progress.csv").open(newline="") as file:
        table = [row for row in csv.DictReader(file) if row["eval/mean_reward"]]
    assert [int(row["time/total_timesteps"]) for row in table] == [128, 256]
    np.testing.assert_allclose([float(row["eval/mean_reward"]) for row in table], rows["results"].mean(axis=1))
    # The last one and the evaluation at the end are of one model, in the same episodes
    assert [episode.reward for episode in evaluated.evaluation.episodes] == rows["results"][-1].tolist()
    env = build_env("CartPole-v1", n_envs=2, seed=0)
    best = OPD.load(evaluated.run_dir / "best_model.zip", device="cpu")
    played = evaluate_success(best, env, default_episodes(env, 3), progress=False)
    assert [episode.reward for episode in played.episodes] == max(rows["results"].tolist(), key=np.mean)


def test_they_do_not_change_what_is_learned(evaluated, teacher, tmp_path):
    alone = train(args(teacher, tmp_path))
    assert th.equal(parameters(alone.model), parameters(evaluated.model))


def test_they_go_on(evaluated, capsys):
    """Which also says that --eval-freq is among what a resumed run keeps."""
    assert main(["train", "--resume", str(evaluated.run_dir), "-n", "384", "--no-progress", "--device", "cpu"]) == 0
    with np.load(evaluated.run_dir / "evaluations.npz") as file:
        assert file["timesteps"].tolist() == [128, 256, 384]


def test_how_many_episodes_must_be_said(capsys):
    assert main(["train", "--env", "CartPole-v1", "--eval-freq", "100"]) == 2
    assert "--eval-episodes" in capsys.readouterr().err


class Count(BaseCallback):
    """For the configuration below."""

    steps: int

    def __init__(self, start: int = 0):
        super().__init__()
        Count.steps = start

    def _on_step(self) -> bool:
        Count.steps += 1
        return True


def test_callbacks(teacher, tmp_path):
    train(args(teacher, tmp_path, "callback=[{test_runs.Count: {start: 1000}}]", n_timesteps=64))
    assert Count.steps == 1032


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("os.system", "expected a subclass of BaseCallback"),
        ("no_such.Callback", "callback: cannot import 'no_such.Callback'"),
        ("{test_runs.Count: {begin: 3}}", "Count does not take"),
    ],
)
def test_what_is_no_callback_is_refused(teacher, tmp_path, spec, message):
    with pytest.raises(ValueError, match=message):
        train(args(teacher, tmp_path, f"callback={spec}"))
    assert not (tmp_path / "opd").exists()


def test_track(teacher, tmp_path, monkeypatch):
    """With the real wandb, which keeps offline runs in files."""
    pytest.importorskip("wandb", reason="wandb is not installed: pip install 'opd_gym[track]'")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    result = train(args(teacher, tmp_path, track=True, n_timesteps=128, eval_freq=100, eval_episodes=1))
    name = (result.run_dir / "wandb_id.txt").read_text()
    (path,) = (result.run_dir / "wandb").glob(f"offline-run-*-{name}/run-{name}.wandb")
    logged = path.read_bytes()
    for text in (b"train/kl", b"eval/mean_reward", b"opd/CartPole-v1_1", b"gradient_steps"):
        assert text in logged
    # A run that goes on is the same one there
    assert main(["train", "--resume", str(result.run_dir), "-n", "192", "--no-progress", "--device", "cpu"]) == 0
    assert len(list((result.run_dir / "wandb").glob(f"offline-run-*-{name}"))) == 2


class StopAt(BaseCallback):
    """Breaks a training off, in the middle of a rollout."""

    def __init__(self, at: int):
        super().__init__()
        self.at = at

    def _on_step(self) -> bool:
        return self.n_calls < self.at


def saved_parts(run_dir):
    """Weights and statistics that a run ends with."""
    statistics = read_vec_normalize(run_dir / "CartPole-v1/vecnormalize.pkl").obs_rms
    model = (GRPO if "grpo" in str(run_dir) else OPD).load(run_dir / "model.zip", device="cpu")
    return parameters(model), statistics


@pytest.mark.parametrize(
    ("algo", "items"),
    [
        ("grpo", ["n_groups=2", "group_size=2", "trajectories_per_batch=4", "learning_rate=1e-2", "frame_stack=2"]),
        ("opd", ["gradient_steps=4", "n_steps=32", "teacher_kwargs.n_eval_episodes=0"]),
    ],
)
def test_normalised_and_stacked(teacher, tmp_path, capsys, algo, items):
    """Statistics and all, a run that was broken off goes on as if it had not been; it is played as it was trained."""
    items = ["n_envs=2", "normalize={norm_reward: false}", *items]

    def start(folder, *more, **kwargs):
        given = {"n_timesteps": 300, "seed": 3, "device": "cpu", "progress": False, **kwargs}
        given["teacher"] = teacher if algo == "opd" else None
        return train(TrainArgs(algo=algo, env="CartPole-v1", hyperparams=[*items, *more], folder=str(folder), **given))

    whole = start(tmp_path / "whole", eval_episodes=3, eval_freq=100)
    weights, statistics = saved_parts(whole.run_dir)
    assert statistics.count > 300 and whole.model.observation_space.shape == ((8,) if algo == "grpo" else (4,))
    words = ["--env", "CartPole-v1", "--checkpoint", str(whole.run_dir), "--episodes", "3", "--no-progress"]
    assert main(["eval", *words, "--device", "cpu", "-o", str(tmp_path / "played.json")]) == 0
    played = EvaluationResult.load(tmp_path / "played.json")
    assert [e.reward for e in played.episodes] == [e.reward for e in whole.evaluation.episodes]
    # In the middle of the second iteration
    part = start(tmp_path / "part", "callback={test_runs.StopAt: {at: 60}}")
    assert 0 < part.model.num_timesteps < 200
    config = part.run_dir / "config.yml"
    values = read_yaml(config)
    del values["callback"]
    config.write_text(yaml.safe_dump(values))
    assert main(["train", "--resume", str(part.run_dir), "-n", "300", "--no-progress", "--device", "cpu"]) == 0
    again, resumed = saved_parts(part.run_dir)
    np.testing.assert_array_equal(resumed.mean, statistics.mean)
    assert th.equal(again, weights)


@pytest.mark.parametrize("item", ["normalize=dict(norm_reward=False)", "normalize={no: 1}", "frame_stack=1.5"])
def test_what_cannot_be_normalised_or_stacked_is_refused(teacher, tmp_path, item):
    with pytest.raises(ValueError, match=r"normalize|cannot be normalised|frame_stack"):
        train(args(teacher, tmp_path, item))
