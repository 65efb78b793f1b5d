"""The algorithms in the real rl-zoo3, and the scripts of rl-zoo3 on runs of opd-gym."""

import os
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch as th
import yaml
from stable_baselines3.common.monitor import load_results
from toys import cartpole_teacher, parameters

pytest.importorskip("rl_zoo3", reason="rl-zoo3 is not installed: pip install 'opd_gym[rl_zoo3]'")

import optuna

from opd_gym import GRPO, OPD, SFT
from opd_gym.algorithms import algorithm_class
from opd_gym.cli.main import main as opd_gym_main
from opd_gym.cli.options import TrainArgs
from opd_gym.cli.train import complete_hyperparams
from opd_gym.envs.make import build_env
from opd_gym.policies.loading import checkpoint_settings, load_policy
from opd_gym.untrusted import read_yaml
from opd_gym.zoo import rl_zoo3 as bridge
from opd_gym.zoo.hyperparams import HYPERPARAMS, algorithm_parameters, rl_zoo3_hyperparams


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where rl-zoo3 works; what it leaves in the current folder and in matplotlib's settings goes."""
    folder = tmp_path_factory.mktemp("rl_zoo3")
    import matplotlib

    with pytest.MonkeyPatch.context() as patch, matplotlib.rc_context():
        patch.chdir(folder)
        matplotlib.use("agg")
        cartpole_teacher().save("teacher.zip")
        yield folder


def run(*words: str) -> None:
    """A script of rl-zoo3."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["rl_zoo3", *words])
        assert bridge.main() == 0


TRAIN = ("train", "--algo", "opd", "--env", "CartPole-v1", "--device", "cpu", "--seed", "1", "-f", "logs")
TRAIN += ("--eval-freq", "128", "--eval-episodes", "2")
PARAMS = ("-params", "n_envs:2", "teacher:'teacher.zip'", "teacher_kwargs:dict(n_eval_episodes=0)", "gradient_steps:4")
ENJOY = ("enjoy", "--algo", "opd", "--env", "CartPole-v1", "--no-render", "--device", "cpu", "-n", "510")


@pytest.fixture(scope="module")
def trained(folder):
    run(*TRAIN, "-n", "256", *PARAMS)
    return folder / "logs/opd/CartPole-v1_1"


@pytest.fixture(scope="module")
def own_run(folder):
    """A run of opd-gym."""
    words = ["train", "--env", "CartPole-v1", "--teacher", "teacher.zip", "-n", "256", "--device", "cpu"]
    # It learns next to nothing: episodes stay short
    words += ["-P", "learning_rate=1e-6", "-P", "gradient_steps=4", "--eval-episodes", "3", "--eval-freq", "128"]
    assert opd_gym_main([*words, "-P", "teacher_kwargs.n_eval_episodes=0", "--no-progress"]) == 0
    return folder / "runs/opd/CartPole-v1_1"


def test_train(trained):
    names = {path.relative_to(trained).as_posix() for path in trained.rglob("*")}
    assert {"CartPole-v1.zip", "best_model.zip", "evaluations.npz", "0.monitor.csv", "CartPole-v1/config.yml"} <= names
    model = OPD.load(trained / "CartPole-v1.zip", device="cpu")
    assert model.num_timesteps == 256 and model.teacher == str(trained.parents[2] / "teacher.zip")
    assert model._n_updates == 16
    saved = yaml.load((trained / "CartPole-v1/config.yml").read_text(), yaml.UnsafeLoader)  # noqa: S506
    assert saved["env_wrapper"] == ["opd_gym.envs.wrappers.EpisodeControl"] and saved["n_envs"] == 2


def test_enjoy(trained, capsys):
    for words in ((), ("--load-best",)):
        run(*ENJOY, "-f", "logs", "--exp-id", "1", *words)
        assert "Mean reward: " in capsys.readouterr().out


def test_resume(trained):
    """With a schedule, and with the states that it replays."""
    run(*TRAIN, "-n", "64", "--save-replay-buffer", *PARAMS, "learning_rate:'lin_1e-3'")
    first = max(trained.parent.glob("CartPole-v1_*"), key=lambda path: path.name)
    run(*TRAIN, "-n", "64", "-i", str(first / "CartPole-v1.zip"), *PARAMS, "learning_rate:'lin_1e-3'")
    last = max(trained.parent.glob("CartPole-v1_*"), key=lambda path: path.name)
    old, new = (OPD.load(path / "CartPole-v1.zip", device="cpu") for path in (first, last))
    assert last != first and old._n_updates == 4 and new._n_updates == 8 and new._n_states == 128


def test_normalised_and_stacked(folder, capsys):
    """Keys of rl-zoo3 that opd-gym does not have pass through."""
    words = ("train", "--algo", "grpo", "--env", "CartPole-v1", "-n", "8", "--eval-freq", "-1", "-f", "stacked")
    run(
        *words,
        "--device",
        "cpu",
        "-params",
        "n_envs:2",
        "n_groups:1",
        "group_size:2",
        "normalize:True",
        "frame_stack:2",
    )
    assert (folder / "stacked/grpo/CartPole-v1_1/CartPole-v1/vecnormalize.pkl").is_file()
    run(
        "enjoy",
        "--algo",
        "grpo",
        "--env",
        "CartPole-v1",
        "--no-render",
        "--device",
        "cpu",
        "-n",
        "510",
        "-f",
        "stacked",
    )
    assert "Stacking 2 frames" in capsys.readouterr().out


def test_optuna(folder, capsys):
    words = (*TRAIN, "-n", "64", "-optimize", "--n-trials", "3", "--no-optim-plots", "--sampler", "random")
    run(*words, *PARAMS, "n_envs:1")
    (report,) = (folder / "logs/opd").glob("report_CartPole-v1_3-trials-*.csv")
    header, *rows = report.read_text().splitlines()
    assert {"params_divergence", "params_learning_rate", "params_n_steps_pow"} <= set(header.split(","))
    assert len(rows) == 3 and all("COMPLETE" in row for row in rows)
    assert "Best trial" in capsys.readouterr().out


@pytest.mark.parametrize("algo", bridge.ALGORITHMS)
def test_what_is_sampled_are_hyperparameters(algo):
    bridge.register()
    from rl_zoo3.hyperparams_opt import HYPERPARAMS_CONVERTER, HYPERPARAMS_SAMPLER

    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    trial = study.ask()
    sampled = HYPERPARAMS_SAMPLER[algo](trial, 2, 1, {})
    assert len(sampled) >= 4 and set(sampled) <= set(algorithm_parameters(algorithm_class(algo)))
    # What a finished trial is turned into when it is trained with --trial-id
    assert HYPERPARAMS_CONVERTER[algo](trial.params) == sampled
    assert all(1 <= value <= 512 for name, value in sampled.items() if f"{name}_pow" in trial.params)


def test_grpo(folder):
    """Groups need envs that are told which episode to play: they are."""
    words = ("train", "--algo", "grpo", "--env", "CartPole-v1", "-n", "8", "--eval-freq", "-1", "-f", "logs")
    run(*words, "--device", "cpu", "-params", "n_envs:2", "n_groups:1", "group_size:2", "clip_range:0.1")
    model = GRPO.load(folder / "logs/grpo/CartPole-v1_1/CartPole-v1.zip", device="cpu")
    assert model._n_finished == 2 and model.clip_range == 0.1


def test_sft(folder):
    """On LIBERO, from demonstrations of the expert."""
    pytest.importorskip("libero", reason="LIBERO is not installed: pip install 'opd_gym[libero]'")
    env_id = "LiberoObjectTask3-v0"
    words = ["demos", "--env", env_id, "--image-size", "64", "--stride", "8", "-o", "demos", "--no-progress"]
    assert opd_gym_main(words) == 0
    words = ["train", "--algo", "sft", "--env", env_id, "-n", "2", "--eval-freq", "-1", "-f", "logs", "--device", "cpu"]
    run(*words, "-params", "demonstrations:'demos'", "policy_kwargs:dict(checkpoint='libero-object-student')")
    model = SFT.load(folder / f"logs/sft/{env_id}_1/{env_id}.zip", demonstrations="demos", device="cpu")
    assert model.num_timesteps == model._n_updates == 2
    student = load_policy("libero-object-student", model.observation_space, model.action_space)
    distance = parameters(model) - th.nn.utils.parameters_to_vector(student.parameters())
    assert 0 < distance.abs().max() < 0.01


def test_plots(trained, own_run, capsys):
    from matplotlib import pyplot

    for exp_folder in ("logs", "runs"):
        run("plot_train", "-a", "opd", "-e", "CartPole-v1", "-f", exp_folder, "-w", "2")
        (axis,) = pyplot.gcf().axes
        assert "CartPole-v1_1" in axis.get_legend_handles_labels()[1]
        pyplot.close("all")
    run("all_plots", "-a", "opd", "-e", "CartPole-v1", "-f", "logs", "runs", "--no-display")
    pyplot.close("all")
    assert "|CartPole-v1 |" in capsys.readouterr().out


def test_a_run_of_opd_gym_has_its_layout(own_run, capsys):
    from rl_zoo3.utils import get_trained_models

    for words in ((), ("--load-best",)):
        run(*ENJOY, "-f", "runs", *words)
        assert "Mean reward: " in capsys.readouterr().out
    assert get_trained_models("runs") == {"opd-CartPole-v1": ("opd", "CartPole-v1")}
    # One file of two names
    assert os.path.samefile(own_run / "model.zip", own_run / "CartPole-v1.zip")
    table = load_results(str(own_run))
    assert table.l.sum() <= 256 and (table.r == table.l).all() and table.t.is_monotonic_increasing and len(table) > 4


def test_a_run_goes_on(own_run, capsys):
    before = len(load_results(str(own_run)))
    assert opd_gym_main(["train", "--resume", str(own_run), "-n", "512", "--no-progress", "--device", "cpu"]) == 0
    table = load_results(str(own_run))
    assert len(table) > before and table.t.is_monotonic_increasing
    assert OPD.load(own_run / "CartPole-v1.zip", device="cpu").num_timesteps == 512
    # The files for rl-zoo3 are no second run
    assert opd_gym_main(["report", str(own_run.parent), "-o", "report.html", "--keep", "kept"]) == 0
    assert sorted(path.name for path in Path("kept").rglob("args.yml")) == ["args.yml"]


def test_push_to_hub(own_run, monkeypatch):
    """All but the network."""
    import huggingface_hub
    from huggingface_hub import ModelCard

    uploaded = {}

    class Hub:
        def create_repo(self, **kwargs):
            return "https://huggingface.co/somebody/opd-CartPole-v1"

        def snapshot_download(self, repo_id, local_dir):
            Path(local_dir).mkdir(parents=True)

        def upload_folder(self, repo_id, folder_path, commit_message):
            uploaded[repo_id] = {path.name for path in Path(folder_path).iterdir()}
            uploaded["card"] = ModelCard.load(Path(folder_path) / "README.md").data

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    words = ("--algo", "opd", "--env", "CartPole-v1", "-f", "runs", "-orga", "somebody", "--no-render")
    run("push_to_hub", *words, "--device", "cpu")
    assert uploaded["card"].eval_results[0].dataset_name == "CartPole-v1"
    assert {"README.md", "opd-CartPole-v1.zip", "config.yml", "args.yml"} <= uploaded["somebody/opd-CartPole-v1"]


@pytest.mark.parametrize("path", sorted(HYPERPARAMS.glob("*.yml")), ids=lambda path: path.stem)
def test_its_loader_reads_our_files(path):
    """YAML 1.1 takes 1e-3 for a string."""
    assert yaml.safe_load(path.read_text()) == read_yaml(path)


def test_an_env_of_tokens_is_the_one_of_opd_gym():
    """gymnasium.make and the wrappers that rl-zoo3 applies, beside build_env."""
    pytest.importorskip("libero", reason="LIBERO is not installed: pip install 'opd_gym[libero]'")
    from rl_zoo3.utils import get_wrapper_class

    env_id = "LiberoObjectTask3-v0"
    values = complete_hyperparams(TrainArgs(env=env_id, student="libero-object-student"))
    settings = checkpoint_settings(values["policy_kwargs"])
    converted = yaml.safe_load(yaml.safe_dump(rl_zoo3_hyperparams(env_id, values, settings)))
    assert {"chunk_size", "tokens", "n_bins", "n_workers"}.isdisjoint(converted)
    env = get_wrapper_class(converted)(gym.make(env_id, **converted["env_kwargs"]))
    expected = build_env(env_id, values, n_envs=1, settings=settings)
    assert env.action_space == expected.action_space and env.observation_space == expected.observation_space
    tokens = env.action_space.sample()
    inner = expected.envs[0]
    np.testing.assert_array_equal(env.get_wrapper_attr("decode")(tokens), inner.get_wrapper_attr("decode")(tokens))
    env.close()
    expected.close()


def test_other_scripts_are_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["rl_zoo3", "tran"])
    assert bridge.main() == 2 and "train,enjoy" in capsys.readouterr().err
