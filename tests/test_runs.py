"""What a run of opd-gym can be told besides its hyperparameters: evaluations meanwhile, callbacks, tracking."""

import csv

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from toys import cartpole_teacher, parameters

from opd_gym import OPD
from opd_gym.cli.main import main
from opd_gym.cli.options import TrainArgs
from opd_gym.cli.train import default_episodes, train
from opd_gym.envs.make import build_env
from opd_gym.evaluation import evaluate_success


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
