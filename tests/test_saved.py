"""Models that version 0.1.0 saved, before the modules were moved, still load and predict what they did."""

from pathlib import Path

import numpy as np
import pytest

from opd_gym import GRPO, OPD, PPO

SAVED = Path(__file__).parent / "golden" / "saved"


@pytest.mark.parametrize(("name", "algorithm"), [("opd", OPD), ("grpo", GRPO), ("ppo", PPO), ("vla", OPD)])
def test_a_model_saved_by_the_first_version_predicts_what_it_did(name, algorithm):
    model = algorithm.load(SAVED / f"{name}.zip", device="cpu")
    with np.load(SAVED / "expected.npz") as file:
        obs = {key.split("/")[2]: file[key] for key in file.files if key.startswith(f"{name}/obs/")}
        expected = file[f"{name}/action"]
    action, _ = model.predict(obs.get("", obs), deterministic=True)
    np.testing.assert_allclose(action, expected, rtol=1e-5)
