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
