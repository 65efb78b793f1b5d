"""
Models as version 0.1.0 saved them, before the modules of the package were moved: ``tests/test_saved.py`` loads them.

    git switch --detach <a commit of 0.1.0>; PYTHONPATH=tests python tests/golden/saved/make_saved.py

Writes zips beside this file, and what the models in them predict: ``expected.npz``.
"""

from pathlib import Path

import numpy as np
from toys import Match, Robot, cartpole_teacher

from opd_gym import GRPO, OPD, PPO

FOLDER = Path(__file__).parent
SMALL = {"net_arch": [8]}
BODY = {
    "body_kwargs": {
        "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
        "stem_channels": [8, 8], "summary_size": 8, "vocab_size": 64, "word_size": 8, "token_rank": 4,
    }
}  # fmt: skip


def main() -> None:
    """Train each for a moment, save it, and note what it predicts."""
    expected = {}
    models = {
        "opd": OPD("MlpPolicy", "CartPole-v1", teacher=cartpole_teacher(), policy_kwargs=SMALL, seed=0, n_steps=16),
        "grpo": GRPO("MlpPolicy", Match(), policy_kwargs=SMALL, seed=0, group_size=2),
        "ppo": PPO("MlpPolicy", Match("box"), policy_kwargs=SMALL, seed=0, n_steps=16, batch_size=16),
        "vla": OPD("VLAPolicy", Robot(), teacher="expert", policy_kwargs=BODY, seed=0, n_steps=4),
    }
    for name, model in models.items():
        model.learn(16)
        model.save(FOLDER / name)
        obs = model.observation_space
        obs.seed(0)
        batch = obs.sample()
        actions = model.predict(batch, deterministic=True)[0]
        expected.update(
            {f"{name}/obs/{key}": value for key, value in (batch if isinstance(batch, dict) else {"": batch}).items()}
        )
        expected[f"{name}/action"] = np.asarray(actions)
    np.savez_compressed(FOLDER / "expected.npz", **expected)


if __name__ == "__main__":
    main()
