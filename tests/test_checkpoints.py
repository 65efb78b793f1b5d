"""Whatever names a checkpoint means the same everywhere: teacher, student, policy_kwargs, command line."""

import os
import re
import shutil
import warnings
import zipfile
from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import huggingface_hub.constants
import numpy as np
import pytest
import torch as th
from gymnasium.utils.env_checker import data_equivalence
from huggingface_hub.utils import filter_repo_objects
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from toys import TINY_BODY, Robot

from opd_gym import GRPO, OPD, SFT, make_vec
from opd_gym import checkpoints as registry
from opd_gym.checkpoints import HUB_FILES, lasting_name, resolve_checkpoint
from opd_gym.cli.main import main
from opd_gym.cli.options import TrainArgs
from opd_gym.cli.sizes import resolve as resolve_planned
from opd_gym.cli.train import complete_hyperparams, train
from opd_gym.envs.wrappers import ActionChunk, ActionTokens
from opd_gym.files import temporary_beside
from opd_gym.policies.loading import checkpoint_settings, find_vec_normalize, load_policy
from opd_gym.versions import read_versions

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


def behind_vec_normalize(folder: Path, **kwargs: bool) -> tuple[Path, VecNormalize]:
    """A model that saw 20 times the observation and 5 more by a VecNormalize, which lies beside it."""
    env = VecNormalize(make_vec_env("CartPole-v1"), **kwargs)
    if env.norm_obs:
        env.obs_rms.mean[:], env.obs_rms.var[:], env.obs_rms.count = -0.25, 1 / 400, 1000.0
    folder.mkdir()
    PPO("MlpPolicy", env, n_steps=16, device="cpu").save(folder / "model")
    env.save(folder / "vec_normalize.pkl")
    return folder / "model.zip", env


def test_a_student_sees_what_its_vec_normalize_showed_it(tmp_path):
    path, theirs = behind_vec_normalize(tmp_path / "it")
    start = {"checkpoint": path}
    with pytest.raises(ValueError, match=r"through the VecNormalize in .*pass env=VecNormalize\.load\("):
        GRPO("MlpPolicy", "CartPole-v1", policy_kwargs=start)
    # One that has seen nothing yet gets its statistics, one that has keeps its own
    fresh = VecNormalize(make_vec("CartPole-v1", 2))
    GRPO("MlpPolicy", fresh, policy_kwargs=start)
    assert np.allclose(fresh.obs_rms.mean, -0.25) and fresh.obs_rms.count == 1000.0
    used = VecNormalize(make_vec("CartPole-v1", 2))
    used.reset()
    own = used.obs_rms.mean.copy()
    GRPO("MlpPolicy", used, policy_kwargs=start)
    assert np.array_equal(used.obs_rms.mean, own)
    assert np.allclose(theirs.obs_rms.mean, -0.25)
    of_rewards, _ = behind_vec_normalize(tmp_path / "rewards", norm_obs=False)
    GRPO("MlpPolicy", "CartPole-v1", policy_kwargs={"checkpoint": of_rewards})


def test_the_command_line_normalises_for_such_a_student(tmp_path):
    path, _ = behind_vec_normalize(tmp_path / "it")
    args = TrainArgs(
        algo="grpo", env="CartPole-v1", student=str(path), n_timesteps=1, folder=str(tmp_path / "runs"), device="cpu",
        hyperparams=["n_groups:2", "group_size:2"], progress=False,
    )  # fmt: skip
    result = train(args)
    assert result.model.get_vec_normalize_env().obs_rms.count > 1000.0
    assert complete_hyperparams(args)["normalize"]["clip_obs"] == 10.0
    of_rewards, _ = behind_vec_normalize(tmp_path / "rewards", norm_obs=False)
    assert "normalize" not in complete_hyperparams(replace(args, student=str(of_rewards)))
    given = complete_hyperparams(replace(args, hyperparams=["normalize:false"]))
    assert given["normalize"] is False, "what the user says wins"


def test_statistics_beside_several_models_are_doubtful(tmp_path):
    path, _ = behind_vec_normalize(tmp_path / "it")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert find_vec_normalize(path, None) == path.with_name("vec_normalize.pkl")
    PPO("MlpPolicy", "CartPole-v1", n_steps=16, device="cpu").save(path.with_name("raw"))
    with pytest.warns(UserWarning, match="lies beside several models"):
        find_vec_normalize(path.with_name("raw.zip"), None)
    (path.parent / "model").mkdir()
    shutil.copy(path.with_name("vec_normalize.pkl"), path.parent / "model" / "vecnormalize.pkl")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert find_vec_normalize(path, None) == path.parent / "model" / "vecnormalize.pkl"


def test_a_student_does_what_its_zip_did(tmp_path):
    """A torque of 1.5 is 0.75 of an env that is rescaled to [-1, 1], and the zip's 1.5 would be clipped to 1 there."""
    PPO("MlpPolicy", "Pendulum-v1", n_steps=16, device="cpu").save(tmp_path / "torques")
    env = gym.wrappers.RescaleAction(gym.make("Pendulum-v1"), -1.0, 1.0)
    with pytest.raises(
        ValueError, match=r"torques\.zip's action space is Box\(-2\.0.*the policy to train's Box\(-1\.0"
    ):
        GRPO("MlpPolicy", env, policy_kwargs={"checkpoint": tmp_path / "torques.zip"})


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


def test_a_name_of_the_zoo_wins_over_files_of_that_name(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "libero-object-teacher"
    (tmp_path / name).mkdir()
    (tmp_path / f"{name}.zip").write_bytes((saved / "model.zip").read_bytes())
    assert resolve_checkpoint(name) == registry.checkpoint_path(name) and lasting_name(name) == name
    (tmp_path / name).rmdir()
    for file in (f"./{name}", f"{name}.zip", Path(name)):
        assert resolve_checkpoint(file).resolve() == tmp_path / f"{name}.zip"
        assert lasting_name(file) == str(tmp_path / f"{name}.zip")
    # Where the policy's own arguments are written down as well
    policy_kwargs = dict(body_kwargs=TINY_BODY)
    assert OPD("VLAPolicy", env(), teacher="expert", policy_kwargs=policy_kwargs).teacher == "expert"


def test_the_name_of_a_file_is_not_looked_up_on_the_hub(monkeypatch):
    def download(name):
        raise AssertionError(name)

    monkeypatch.setattr(registry, "_download", download)
    for name in ("t/typo.zip", "runs/model.safetensors", "a/b/c", "../model", "/model"):
        with pytest.raises(FileNotFoundError, match=f"There is no checkpoint '{name}'"):
            resolve_checkpoint(name)


def test_pointers_of_git_lfs_and_adapters_are_named(tmp_path, capsys):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 100\n"
    (tmp_path / "vla").mkdir()
    (tmp_path / "vla" / "config.json").write_text("{}")
    (tmp_path / "vla" / "model-00001-of-00002.safetensors").write_text(pointer)
    (tmp_path / "model.zip").write_text(pointer)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    message = {"vla": "safetensors is a pointer of Git LFS.*git lfs pull", "model.zip": "git lfs pull"}
    message["adapter"] = "LoRA adapters.*merge_and_unload"
    for name, said in message.items():
        path = str(tmp_path / name)
        with pytest.raises(ValueError, match=said):
            resolve_checkpoint(path)
        for words in (
            ["eval", "--env", "CartPole-v1", "--checkpoint", path],
            ["plan", "--student", path],
            ["train", "--env", "CartPole-v1", "--teacher", path, "-f", str(tmp_path / "runs")],
            ["train", "--env", "CartPole-v1", "--teacher", "expert", "--student", path, "-f", str(tmp_path / "runs")],
        ):
            assert main(words) == 2
            assert re.search(said, capsys.readouterr().err)


def test_a_run_goes_on_from_another_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = ["-n", "32", "--no-progress", "-P", "n_steps=32", "-P", "n_envs=1"]
    assert main(["train", "--algo", "ppo", "--env", "CartPole-v1", *small]) == 0
    start = "runs/ppo/CartPole-v1_1"
    small += ["--teacher", start, "--student", "runs/ppo/CartPole-v1_1/model"]
    assert main(["train", "--env", "CartPole-v1", *small]) == 0
    run = tmp_path / "runs" / "opd" / "CartPole-v1_1"
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert main(["train", "--resume", str(run), "-n", "64", "--no-progress"]) == 0
    # A saved model finds its teacher as well
    assert OPD.load(run / "model.zip", env="CartPole-v1").learn(32, reset_num_timesteps=False).num_timesteps > 64


def test_export(tmp_path, capsys):
    name = "libero-object-student"
    words = ["export", "--env", "LiberoObject-v0", "--checkpoint", name, "--dtype", "float16"]
    assert main([*words, "-o", str(tmp_path / "half")]) == 0
    # The zoo's own are in half precision: nothing is lost on the way
    zoo = resolve_checkpoint(name)
    assert (tmp_path / "half" / "model.safetensors").read_bytes() == (zoo / "model.safetensors").read_bytes()
    assert read_versions(tmp_path / "half") == read_versions(zoo) != {}
    PPO("MlpPolicy", "CartPole-v1", n_steps=8, batch_size=8, device="cpu").save(tmp_path / "ppo.zip")
    words = ["export", "--env", "CartPole-v1", "--checkpoint", str(tmp_path / "ppo.zip"), "-o", str(tmp_path / "ppo")]
    assert main(words) == 2 and "Only a VLAPolicy" in capsys.readouterr().err
    assert not (tmp_path / "ppo").exists()


def test_paths_for_an_env_become_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("light").write_text("not what env_kwargs.visuals means")
    Path("levels.json").write_text("{}")
    given = [f"env_kwargs.{item}" for item in ("visuals:light", "difficulty_file:levels.json", "map_file:unknown.txt")]
    values = complete_hyperparams(TrainArgs(env="CartPole-v1", teacher="expert", hyperparams=given))
    expected = {"visuals": "light", "difficulty_file": str(tmp_path / "levels.json"), "map_file": "unknown.txt"}
    assert values["env_kwargs"] == expected


def test_what_a_killed_save_left_is_no_model(tmp_path):
    model = PPO("MlpPolicy", "CartPole-v1", n_steps=8, batch_size=8, device="cpu")
    model.save(tmp_path / "model_of_mine.zip")
    left = temporary_beside(tmp_path / "model_of_mine.zip")
    shutil.copyfile(tmp_path / "model_of_mine.zip", left)
    assert resolve_checkpoint(tmp_path).name == "model_of_mine.zip"
    (tmp_path / "model_of_mine.zip").unlink()
    with pytest.raises(ValueError, match="holds no zip"):
        resolve_checkpoint(tmp_path)


def test_a_killed_save_leaves_the_old_checkpoint_or_the_new_one(tmp_path, monkeypatch):
    """Whatever call it is killed at: each of its files is in shards, and the shards of the two look alike."""
    from opd_gym.policies.tiny import TinyVLAModel

    save = TinyVLAModel.save_pretrained
    monkeypatch.setattr(TinyVLAModel, "save_pretrained", lambda self, path: save(self, path, max_shard_size=60_000))
    kwargs = dict(teacher="expert", policy_kwargs=dict(body_kwargs=TINY_BODY), device="cpu")
    old, new = (OPD("VLAPolicy", env(), seed=seed, **kwargs).policy for seed in (1, 2))
    calls = [(os, name) for name in ("replace", "link", "unlink", "rmdir", "fsync")]
    found = []
    for n in range(0, 10_000, 4):
        place = tmp_path / str(n)
        old.save_checkpoint(place)
        assert len(list(place.glob("*.safetensors"))) > 1
        child = os.fork()
        if child == 0:
            left = n

            def killed(real):
                def call(*args, **kwargs):
                    nonlocal left
                    left -= 1
                    return os._exit(7) if left < 0 else real(*args, **kwargs)

                return call

            for module, name in calls:
                setattr(module, name, killed(getattr(module, name)))
            try:
                new.save_checkpoint(place)
            finally:
                os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        read = parameters(load_policy(place, old.observation_space, old.action_space))
        found.append(bool(th.equal(read, parameters(new))))
        assert found[-1] or th.equal(read, parameters(old))
        if status == 0:
            break
        old.save_checkpoint(place)
        assert not list(place.glob(".opd_gym*")), "it can be written over"
    assert n > 10 and found == sorted(found) and 0 < sum(found) < len(found)


def damaged(path, way):
    data = path.read_bytes()
    middle = len(data) // 2
    path.write_bytes(
        {"empty": b"", "cut": data[:middle], "overwritten": data[:middle] + b"x" * 99 + data[middle + 99 :]}[way]
    )


@pytest.mark.parametrize("way", ["empty", "cut", "overwritten"])
def test_a_run_whose_newest_checkpoint_is_damaged_goes_on_from_the_one_before(way, tmp_path, capsys):
    small = ["-P", "n_steps=32", "-P", "n_envs=1", "--checkpoint-interval", "0", "--no-progress"]
    assert main(["train", "--algo", "ppo", "--env", "CartPole-v1", "-n", "96", "-f", str(tmp_path), *small]) == 0
    run = tmp_path / "ppo" / "CartPole-v1_1"
    first, last = registry.run_checkpoints(run)
    damaged(last, way)
    with pytest.warns(UserWarning, match=f"{last.name} is damaged"):
        assert resolve_checkpoint(run) == first
    with pytest.warns(UserWarning, match=f"{last.name} is damaged"):
        assert main(["train", "--resume", str(run), "-n", "128", "--no-progress"]) == 0
    for path in registry.run_checkpoints(run):
        damaged(path, way)
    with pytest.warns(UserWarning):
        assert main(["train", "--resume", str(run), "-n", "160"]) == 2
    assert "Every checkpoint of the run is damaged" in capsys.readouterr().err


def test_a_run_goes_on_without_states_that_are_damaged(tmp_path, capsys):
    small = ["-P", "n_steps=32", "-P", "n_envs=1", "--no-progress", "--teacher", str(tmp_path / "teacher.zip")]
    PPO("MlpPolicy", "CartPole-v1", n_steps=2, batch_size=2, device="cpu").save(tmp_path / "teacher.zip")
    assert main(["train", "--env", "CartPole-v1", "-n", "32", "-f", str(tmp_path), *small]) == 0
    run = tmp_path / "opd" / "CartPole-v1_1"
    for way, timesteps in (("empty", 64), ("cut", 96)):
        (states,) = (run / "checkpoints" / "states").iterdir()
        damaged(states, way)
        with pytest.warns(UserWarning, match=f"{states} is not a file of replayed states, or is damaged"):
            assert main(["train", "--resume", str(run), "-n", str(timesteps), "--no-progress"]) == 0
        assert "0 states to replay" in capsys.readouterr().out
