"""Models that version 0.1.0 saved, before the modules were moved, still load and predict what they did."""

from pathlib import Path

import numpy as np
import pytest
import stable_baselines3
from toys import vec

from opd_gym import GRPO, OPD, PPO, SFT

SAVED = Path(__file__).parent / "golden" / "saved"


@pytest.mark.parametrize(("name", "algorithm"), [("opd", OPD), ("grpo", GRPO), ("ppo", PPO), ("vla", OPD)])
def test_a_model_saved_by_the_first_version_predicts_what_it_did(name, algorithm):
    model = algorithm.load(SAVED / f"{name}.zip", device="cpu")
    with np.load(SAVED / "expected.npz") as file:
        obs = {key.split("/")[2]: file[key] for key in file.files if key.startswith(f"{name}/obs/")}
        expected = file[f"{name}/action"]
    action, _ = model.predict(obs.get("", obs), deterministic=True)
    np.testing.assert_allclose(action, expected, rtol=1e-5)


@pytest.mark.parametrize("algorithm", [OPD, GRPO, SFT, PPO])
def test_a_model_of_another_algorithm_is_refused(algorithm, tmp_path):
    """It would have neither teacher nor hyperparameters."""
    other = SAVED / ("grpo.zip" if algorithm is OPD else "opd.zip")
    stable_baselines3.PPO("MlpPolicy", "CartPole-v1", device="cpu").save(tmp_path / "ppo.zip")
    for path in (other, tmp_path / "ppo.zip"):
        with pytest.raises(ValueError, match=f"{path.name} was not saved by {algorithm.__name__}"):
            algorithm.load(path, device="cpu")


def test_its_weights_are_a_beginning(tmp_path):
    model = PPO("MlpPolicy", vec(2), device="cpu", seed=1)
    model.save(tmp_path / "ppo.zip")
    student = OPD("MlpPolicy", vec(2), "expert", device="cpu", seed=2)
    student.set_parameters(tmp_path / "ppo.zip")
    obs = model.env.reset()
    assert (model.predict(obs, deterministic=True)[0] == student.predict(obs, deterministic=True)[0]).all()
    weights = zip(model.policy.parameters(), student.policy.parameters(), strict=True)
    assert all((ours == theirs).all() for ours, theirs in weights)


def test_its_optimizer_is_not(tmp_path):
    """Its settings, and what it has seen of gradients, are of another loss."""
    stable_baselines3.PPO("MlpPolicy", vec(1), n_steps=8, batch_size=8, device="cpu").learn(8).save(tmp_path / "ppo")
    stable_baselines3.A2C("MlpPolicy", vec(1), device="cpu").save(tmp_path / "a2c")

    def settings(model):
        (group,) = model.policy.optimizer.param_groups
        return {name: value for name, value in group.items() if name != "params"}

    student = OPD("MlpPolicy", vec(2), "expert", weight_decay=0.1, device="cpu")
    own = settings(student)
    student.set_parameters(tmp_path / "ppo")
    assert settings(student) == own and own["weight_decay"] == 0.1 and not student.policy.optimizer.state
    for algorithm in (PPO, GRPO):
        plain = algorithm("MlpPolicy", vec(2), device="cpu")
        started = algorithm("MlpPolicy", vec(2), policy_kwargs={"checkpoint": tmp_path / "a2c.zip"}, device="cpu")
        assert type(started.policy.optimizer) is type(plain.policy.optimizer) and settings(started) == settings(plain)
    # Its own zip is taken whole
    student.learn(64).save(tmp_path / "opd")
    again = OPD("MlpPolicy", vec(2), "expert", device="cpu")
    again.set_parameters(tmp_path / "opd")
    assert settings(again)["weight_decay"] == 0.1 and again.policy.optimizer.state
    with pytest.raises(ValueError, match=r"The weights of .*a2c\.zip do not fit the policy"):
        OPD("MlpPolicy", vec(2, kind="box"), "expert", device="cpu").set_parameters(tmp_path / "a2c.zip")


def test_what_cannot_be_changed_when_a_model_is_loaded_is_refused(tmp_path):
    OPD("MlpPolicy", vec(2), "expert", device="cpu").save(tmp_path / "model")
    for name, value in (("weight_decay", 0.5), ("estimator", "sampled")):
        with pytest.raises(ValueError, match=f"{name} of a model that is loaded cannot be changed.*'checkpoint'"):
            OPD.load(tmp_path / "model", **{name: value})
    for name, meant in (("max_grad_nrom", "max_grad_norm"), ("n_step", "n_steps")):
        with pytest.raises(ValueError, match=f"knows no {name}. Did you mean '{meant}'"):
            OPD.load(tmp_path / "model", **{name: 3})
    given = {"n_steps": 16, "max_grad_norm": 9.0, "divergence": "jsd", "gradient_steps": 3, "teacher_interval": 2}
    model = OPD.load(tmp_path / "model", env=vec(2), device="cpu", verbose=0, tensorboard_log=None, **given)
    assert {name: getattr(model, name) for name in given} == given
    model.learn(32)
