"""Whatever names a checkpoint means the same everywhere: teacher, student, policy_kwargs, command line."""

import zipfile
from pathlib import Path

import gymnasium as gym
import huggingface_hub.constants
import pytest
import torch as th
from gymnasium.utils.env_checker import data_equivalence
from huggingface_hub.utils import filter_repo_objects
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from toys import TINY_BODY, Robot

from opd_gym import OPD, SFT
from opd_gym import checkpoints as registry
from opd_gym.checkpoints import HUB_FILES, resolve_checkpoint
from opd_gym.cli.options import TrainArgs
from opd_gym.cli.sizes import resolve as resolve_planned
from opd_gym.cli.train import complete_hyperparams
from opd_gym.envs.wrappers import ActionChunk, ActionTokens
from opd_gym.policies.body import checkpoint_settings
from opd_gym.policies.loading import load_policy

WAYS = ("directory", "zip", "zip without its suffix", "run", "finished run", "zoo", "hub")


def put_on_the_hub(cache: Path, hub_id: str, folder: Path, monkeypatch) -> None:
    """A repository of the hub, as it lies in the cache after it was downloaded."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    repository = cache / f"models--{hub_id.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0123abc")
    (repository / "snapshots").mkdir()
    (repository / "snapshots" / "0123abc").symlink_to(folder)


def parameters(of) -> th.Tensor:
    policy = getattr(of, "policy", of)
    return th.nn.utils.parameters_to_vector(policy.parameters()).detach()


def env():
    return ActionTokens(ActionChunk(Robot(), 4))


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A VLA, as a checkpoint and in the zip of an algorithm."""
    folder = tmp_path_factory.mktemp("saved")
    model = OPD("VLAPolicy", env(), teacher="expert", policy_kwargs=dict(body_kwargs=TINY_BODY), seed=7, device="cpu")
    model.policy.save_checkpoint(folder / "vla")
    model.save(folder / "model.zip")
    return folder


@pytest.fixture(params=WAYS)
def named(request, saved, tmp_path, monkeypatch) -> str:
    """The name of the same weights in one of the ways."""
    way = request.param
    if way == "directory":
        return str(saved / "vla")
    if way.startswith("zip"):
        return str(saved / ("model.zip" if way == "zip" else "model"))
    if way.endswith("run"):
        place = tmp_path / "run" / ("checkpoints/model_8_steps.zip" if way == "run" else "model.zip")
        place.parent.mkdir(parents=True)
        place.symlink_to(saved / "model.zip")
        return str(tmp_path / "run")
    if way == "zoo":
        monkeypatch.setattr(registry, "CHECKPOINTS", saved)
        monkeypatch.setattr(registry, "REGISTRY_FILE", tmp_path / "checkpoints.yml")
        (tmp_path / "checkpoints.yml").write_text("vla: {description: for this test}\n")
        return "vla"
    put_on_the_hub(tmp_path, "somebody/vla", saved / "vla", monkeypatch)
    return "somebody/vla"


def test_every_way_to_name_a_checkpoint(named, saved):
    expected = load_policy(saved / "vla", env().observation_space, env().action_space)
    # The policy itself
    policy = load_policy(named, env().observation_space, env().action_space)
    assert th.equal(parameters(policy), parameters(expected))
    assert checkpoint_settings({"checkpoint": named}) == checkpoint_settings({"checkpoint": saved / "vla"})
    # As teacher and as student, in Python
    kwargs = dict(policy_kwargs=dict(checkpoint=named), seed=1, device="cpu")
    model = OPD("VLAPolicy", env(), teacher=named, **kwargs)
    assert th.equal(parameters(model), parameters(expected))
    assert th.equal(parameters(model._teacher.policy), parameters(expected))
    assert th.equal(parameters(SFT("VLAPolicy", env(), **kwargs)), parameters(expected))
    # On the command line
    args = TrainArgs("opd", "LiberoObject-v0", student=named, teacher=named)
    values = complete_hyperparams(args)
    start = values["policy_kwargs"]["checkpoint"]
    assert resolve_checkpoint(start) == resolve_checkpoint(named)
    assert resolve_checkpoint(values["teacher"]) == resolve_checkpoint(named)
    assert Path(start).is_absolute() or named in ("vla", "somebody/vla"), "paths become absolute, names stay names"
    assert resolve_planned(named)[0] == "tiny"


def test_what_a_zip_starts_learns_and_loads_without_it(saved, tmp_path):
    (tmp_path / "student.zip").write_bytes((saved / "model.zip").read_bytes())
    model = OPD(
        "VLAPolicy", env(), teacher="expert", n_steps=2, batch_size=2, gradient_steps=1, device="cpu",
        policy_kwargs=dict(checkpoint=tmp_path / "student.zip"),
    )  # fmt: skip
    model.learn(2)
    model.save(tmp_path / "distilled.zip")
    (tmp_path / "student.zip").unlink()
    again = OPD.load(tmp_path / "distilled.zip", env=env(), device="cpu")
    assert th.equal(parameters(again), parameters(model))
    assert data_equivalence(again.policy_kwargs, model.policy_kwargs)


def test_a_zip_of_another_class_of_policy_is_refused(saved, tmp_path):
    PPO("MlpPolicy", "CartPole-v1", n_steps=2, batch_size=2, device="cpu").save(tmp_path / "mlp.zip")
    with pytest.raises(ValueError, match="holds a ActorCriticPolicy.*VLAPolicy"):
        OPD("VLAPolicy", env(), teacher="expert", policy_kwargs=dict(checkpoint=tmp_path / "mlp.zip"))
    with pytest.raises(ValueError, match="VLA checkpoint, which ActorCriticPolicy cannot start from"):
        OPD("MlpPolicy", "CartPole-v1", policy_kwargs=dict(checkpoint=saved / "vla"))
    model = SFT("MlpPolicy", "CartPole-v1", policy_kwargs=dict(checkpoint=tmp_path / "mlp"), device="cpu")
    assert th.equal(parameters(model), parameters(PPO.load(tmp_path / "mlp.zip", device="cpu")))


@pytest.mark.parametrize("zip_name", ["ppo-Pendulum-v1.zip", "best.zip"])
def test_a_model_that_rl_zoo3_published(zip_name, tmp_path, monkeypatch):
    env = VecNormalize(DummyVecEnv([lambda: gym.make("Pendulum-v1")]), training=False)
    env.obs_rms.mean[:] = 0.5
    model = PPO("MlpPolicy", env, n_steps=2, batch_size=2, device="cpu")
    folder = tmp_path / "files"
    model.save(folder / zip_name)
    env.save(str(folder / "vec_normalize.pkl"))
    with zipfile.ZipFile(folder / "train_eval_metrics.zip", "w") as archive:
        archive.writestr("measurements", "{}")
    for name in ("README.md", "args.yml", "results.json", "replay.mp4"):
        (folder / name).write_text("{}")
    put_on_the_hub(tmp_path / "cache", "sb3/ppo-Pendulum-v1", folder, monkeypatch)
    fetched = set(filter_repo_objects([file.name for file in folder.iterdir()], allow_patterns=HUB_FILES))
    assert {zip_name, "vec_normalize.pkl"} <= fetched and "replay.mp4" not in fetched
    for name in ("sb3/ppo-Pendulum-v1", folder):
        teacher = OPD("MlpPolicy", "Pendulum-v1", teacher=name, device="cpu")._teacher
        obs = th.rand(4, 3)
        found = teacher.distribution(obs, th.empty(0)).mean
        expected = model.policy.get_distribution(((obs - 0.5) / (1 + 1e-8) ** 0.5).float()).distribution.mean
        assert th.allclose(found, expected, atol=1e-5)
    # A second model: that of the repository's name, or nobody knows which
    model.save(folder / "another.zip")
    if zip_name == "best.zip":
        with pytest.raises(ValueError, match=r"several models: another\.zip, best\.zip"):
            resolve_checkpoint("sb3/ppo-Pendulum-v1")
    else:
        assert resolve_checkpoint("sb3/ppo-Pendulum-v1").name == zip_name
    (tmp_path / "empty").mkdir()
    put_on_the_hub(tmp_path / "cache", "sb3/empty", tmp_path / "empty", monkeypatch)
    with pytest.raises(ValueError, match="'sb3/empty'.*holds no zip of a model"):
        OPD("MlpPolicy", "Pendulum-v1", teacher="sb3/empty")


def test_what_is_no_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no checkpoint 'nothing'.*libero-object-teacher"):
        resolve_checkpoint("nothing")
    with pytest.raises(ValueError, match="neither a VLA checkpoint"):
        resolve_checkpoint(tmp_path)
    for use in (lambda: OPD("MlpPolicy", "CartPole-v1", teacher="nothing"), lambda: resolve_planned("nothing")):
        with pytest.raises((FileNotFoundError, ValueError), match="There is no checkpoint 'nothing'"):
            use()
