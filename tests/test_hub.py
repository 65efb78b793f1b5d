"""`opd-gym hub` with local folders in the place of the hub."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch as th
from huggingface_hub import ModelCard
from stable_baselines3 import PPO as SB3PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecFrameStack, VecNormalize
from toys import cartpole_teacher

import opd_gym.hub
from opd_gym import OPD
from opd_gym.checkpoints import CHECKPOINTS, HUB_FILES, resolve_checkpoint
from opd_gym.cli.main import main


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Of a policy of numbers."""
    folder = tmp_path_factory.mktemp("run")
    cartpole_teacher().save(folder / "teacher.zip")
    words = ["train", "--env", "CartPole-v1", "--teacher", str(folder / "teacher.zip"), "-n", "64", "--no-progress"]
    words += ["--device", "cpu", "-f", str(folder / "runs"), "--eval-episodes", "2"]
    assert main([*words, "-P", "gradient_steps=2", "-P", "teacher_kwargs.n_eval_episodes=0"]) == 0
    return folder / "runs/opd/CartPole-v1_1"


def test_push_a_run(run, tmp_path, capsys):
    words = ["hub", "push", str(run), "somebody/opd-CartPole-v1", "--license", "mit"]
    assert main([*words, "--folder", str(tmp_path / "up")]) == 0
    names = {path.name for path in (tmp_path / "up").iterdir()}
    assert names == {"README.md", "opd-CartPole-v1.zip", "evaluation.json", "versions.json"}
    card = ModelCard.load(tmp_path / "up/README.md")
    (metric,) = card.data.eval_results
    assert (card.data.license, card.data.library_name) == ("mit", "stable-baselines3")
    assert (metric.dataset_name, metric.metric_type) == ("CartPole-v1", "success_rate")
    assert "| teacher | teacher.zip |" in card.content and "| timesteps | 128 |" in card.content
    # No path of this machine, in the zip neither
    assert str(run.parents[2]) not in card.content
    loaded = OPD.load(tmp_path / "up/opd-CartPole-v1.zip", device="cpu")
    assert loaded.teacher is None and loaded.num_timesteps == 128
    # Whoever downloads it finds the model by the name of the repository
    assert resolve_checkpoint(tmp_path / "up").name == "opd-CartPole-v1.zip"


def test_statistics_of_observations_come_along(tmp_path, capsys):
    """A policy that balances the pole only behind its VecNormalize: played as it is, and as it is published."""
    env = VecNormalize(make_vec_env("CartPole-v1"))
    env.obs_rms.mean[:], env.obs_rms.var[:] = [0.0, 0.0, 5.0, 0.0], [4.0, 4.0, 4.0, 4.0]
    model = cartpole_teacher()
    with th.no_grad():
        weights = model.policy.action_net.weight
        model.policy.action_net.bias.copy_(weights @ th.tensor([0.0, 0.0, 5.0, 0.0]))
        weights *= 2.0
    model.save(tmp_path / "model.zip")
    env.save(tmp_path / "vec_normalize.pkl")
    assert main(["hub", "push", str(tmp_path / "model.zip"), "somebody/cart", "-f", str(tmp_path / "up")]) == 0
    for path in (tmp_path / "model.zip", tmp_path / "up"):
        capsys.readouterr()
        words = ["--env", "CartPole-v1", "--checkpoint", str(path), "--episodes", "2", "--no-progress"]
        assert main(["eval", *words, "--device", "cpu"]) == 0
        assert "| all | 100.0 % |" in capsys.readouterr().out
        assert main(["eval", *words, "--device", "cpu", "--dtype", "bfloat16"]) == 2
        assert "Only a VLA can be read in another dtype" in capsys.readouterr().err


@pytest.mark.parametrize("normalised", [False, True])
def test_what_a_card_says_about_loading_works(tmp_path, normalised):
    """Of a model that Stable-Baselines3 trained, by an algorithm that nothing names."""
    env = make_vec_env("CartPole-v1")
    model = SB3PPO("MlpPolicy", env, n_steps=8, device="cpu")
    model.save(tmp_path / "model.zip")
    observation = np.full((1, 4), 0.02, dtype=np.float32)
    if normalised:
        env = VecNormalize(env)
        env.obs_rms.mean[:], env.obs_rms.var[:] = 0.02, 1e-6
        env.save(tmp_path / "vec_normalize.pkl")
    assert main(["hub", "push", str(tmp_path / "model.zip"), "somebody/cart", "-f", str(tmp_path / "up")]) == 0
    code = (tmp_path / "up" / "README.md").read_text().split("```python")[1].split("```")[0]
    names = {"env": env, "observation": observation + 0.001}
    exec(code.replace("somebody/cart", str(tmp_path / "up")), names)  # noqa: S102
    seen = env.normalize_obs(observation + 0.001) if normalised else observation + 0.001
    assert names["action"] == model.predict(seen, deterministic=True)[0]
    np.testing.assert_allclose(names["observation"], seen, rtol=1e-4)


@pytest.mark.parametrize(("env_id", "n_stack", "normalised"), [("CartPole-v1", 3, False), ("MountainCar-v0", 2, True)])
def test_a_policy_of_several_observations_is_played_with_as_many(tmp_path, capsys, env_id, n_stack, normalised):
    env = make_vec_env(env_id)
    env = VecNormalize(env) if normalised else env
    model = SB3PPO("MlpPolicy", VecFrameStack(env, n_stack), n_steps=8, device="cpu")
    model.save(tmp_path / "model.zip")
    if normalised:
        env.save(tmp_path / "vec_normalize.pkl")
    assert main(["hub", "push", str(tmp_path / "model.zip"), "somebody/stacked", "-f", str(tmp_path / "up")]) == 0
    words = ["eval", "--checkpoint", str(tmp_path / "up"), "--episodes", "1", "--no-progress", "--device", "cpu"]
    assert main([*words, "--env", env_id]) == 0
    capsys.readouterr()
    # Observations of another number or other bounds are not taken for a stack
    for other in {"Acrobot-v1", "Pendulum-v1", "CartPole-v1", "MountainCar-v0"} - {env_id}:
        assert main([*words, "--env", other]) == 2
        assert "does not fit the env" in capsys.readouterr().err


def test_an_evaluation_is_published_with_the_model_that_was_evaluated(run, tmp_path, capsys):
    last, other = run / "checkpoints/model_128_steps.zip", run / "checkpoints/model_64_steps.zip"
    shutil.copytree(run, tmp_path / "run")
    run, last, other = (tmp_path / "run" / path.relative_to(run) for path in (run, last, other))
    model = OPD.load(last, device="cpu")
    model.num_timesteps = 64
    model.save(other)
    model.save(run / "best_model.zip")
    for number, (path, evaluated) in enumerate(
        [(run, True), (last, True), (run / "model.zip", True), (other, False), (run / "best_model.zip", False)]
    ):
        up = tmp_path / str(number)
        assert main(["hub", "push", str(path), "somebody/cart", "-f", str(up)]) == 0
        assert (up / "evaluation.json").exists() == evaluated
        assert ("is of the run's last model" in capsys.readouterr().err) != evaluated
    # The run went on after it was evaluated
    model.num_timesteps = 256
    model.save(last.with_name("model_256_steps.zip"))
    assert main(["hub", "push", str(run), "somebody/cart", "-f", str(tmp_path / "on")]) == 0
    assert not (tmp_path / "on" / "evaluation.json").exists()
    # Nor with what a folder has of another policy
    for name in ("evaluation.json", "vec_normalize.pkl"):
        (tmp_path / "left" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "left" / name).write_text("of another")
        assert main(["hub", "push", str(other), "somebody/cart", "-f", str(tmp_path / "left")]) == 2
        assert f"{tmp_path / 'left' / name} would be published" in capsys.readouterr().err
        (tmp_path / "left" / name).unlink()


def test_push_a_checkpoint(tmp_path, capsys):
    """Every file that is read from a repository, as it is."""
    assert main(["hub", "push", "libero-object-student", "somebody/student", "-f", str(tmp_path)]) == 0
    source = CHECKPOINTS / "libero-object-student"
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / name).read_bytes() == (source / name).read_bytes()
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.pipeline_tag == "robotics" and "| action tokens | 8 actions of 7 dimensions" in card.content


def test_weights_of_another_policy_are_not_published_along(run, tmp_path, capsys):
    push = ["hub", "push", "libero-object-student", "somebody/student", "-f"]
    for name in ("model-00001-of-00002.safetensors", "old.zip", "model.safetensors.index.json"):
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        (folder / name).write_bytes(b"{}")
        for command in ([*push, str(folder)], ["hub", "push", str(run), "somebody/cart", "-f", str(folder)]):
            assert main(command) == 2 and f"beside those of this one: {name}" in capsys.readouterr().err
        assert [path.name for path in folder.iterdir()] == [name]
    for _ in range(2):
        assert main([*push, str(tmp_path / "again")]) == 0


class Hub:
    """What is used of HfApi, in a folder."""

    def __init__(self, token=None):
        pass

    def create_repo(self, repo_id, private, exist_ok):
        assert exist_ok
        (self.root / repo_id).mkdir(parents=True)
        self.private[repo_id] = private

    def model_info(self, repo_id, revision):
        files = [path.name for path in (self.root / repo_id).iterdir()]
        return type(
            "Info", (), {"sha": "1" * 40, "siblings": [type("File", (), {"rfilename": name}) for name in files]}
        )

    def upload_folder(self, repo_id, folder_path, commit_message):
        for path in Path(folder_path).iterdir():
            (self.root / repo_id / path.name).write_bytes(path.read_bytes())
        return type("Commit", (), {"commit_url": f"https://huggingface.co/{repo_id}/commit/1"})


def test_there_and_back(run, tmp_path, monkeypatch, capsys):
    from huggingface_hub.utils import filter_repo_objects

    def snapshot_download(repo_id, revision, local_dir, allow_patterns):
        local_dir.mkdir(exist_ok=True)
        assert revision == "1" * 40
        names = [path.name for path in (Hub.root / repo_id).iterdir()]
        for name in filter_repo_objects(names, allow_patterns=allow_patterns):
            (local_dir / name).write_bytes((Hub.root / repo_id / name).read_bytes())
        return str(local_dir)

    Hub.root, Hub.private = tmp_path / "hub", {}
    monkeypatch.setattr(opd_gym.hub, "HfApi", Hub)
    monkeypatch.setattr(opd_gym.hub, "snapshot_download", snapshot_download)
    assert main(["hub", "push", str(run), "somebody/cart", "--private"]) == 0
    assert "https://huggingface.co/somebody/cart/commit/1" in capsys.readouterr().out
    assert Hub.private == {"somebody/cart": True}
    (Hub.root / "somebody/cart/modeling.py").write_text("raise SystemExit")  # code of others stays where it is
    assert main(["hub", "pull", "somebody/cart", "-o", str(tmp_path / "here")]) == 0
    # Once more it replaces its own files, and no other weights are left beside them
    assert main(["hub", "pull", "somebody/cart", "-o", str(tmp_path / "here")]) == 0
    (tmp_path / "other").mkdir()
    (tmp_path / "other/model.safetensors").write_bytes(b"")
    assert main(["hub", "pull", "somebody/cart", "-o", str(tmp_path / "other")]) == 2
    assert "weights of another policy" in capsys.readouterr().err
    names = {path.name for path in (tmp_path / "here").iterdir()}
    assert names == {"README.md", "cart.zip", "evaluation.json", "versions.json"} and "*.py" not in HUB_FILES
    words = ["--env", "CartPole-v1", "--checkpoint", str(tmp_path / "here"), "--episodes", "1", "--no-progress"]
    assert main(["eval", *words, "--device", "cpu"]) == 0


def test_without_a_network(monkeypatch, capsys, tmp_path):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for name in ("here", "there"):
        if name == "there":  # what is in a folder is not what was to be fetched
            (tmp_path / name).mkdir()
            (tmp_path / name / "model.zip").write_text("another")
        assert main(["hub", "pull", "somebody/robot", "-o", str(tmp_path / name)]) == 2
        assert "hf download somebody/robot" in capsys.readouterr().err
