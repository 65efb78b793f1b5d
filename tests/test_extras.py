"""What works without an extra, and what is said where one is needed."""

import subprocess
import sys

import pytest

# None in sys.modules is to Python as if the module were not installed
WITHOUT = "import sys; sys.modules.update(dict.fromkeys({names!r}))\n"
TEACHING = """
from stable_baselines3 import PPO
from opd_gym import OPD, SFT, make_vec
from opd_gym.demonstrations import Demonstrations
import opd_gym.cli.evaluate, opd_gym.cli.train, opd_gym.evaluation
import numpy as np

teacher = PPO("MlpPolicy", "CartPole-v1", n_steps=8, batch_size=8, device="cpu")
student = OPD("MlpPolicy", "CartPole-v1", teacher=teacher, n_steps=8, batch_size=8, device="cpu").learn(8)
student.save(sys.argv[1])
OPD.load(sys.argv[1], env=make_vec("CartPole-v1"), teacher=teacher, device="cpu")
data = Demonstrations(np.zeros((4, 2), np.float32), np.zeros(4, np.int64))
SFT("MlpPolicy", demonstrations=data, device="cpu").learn(1)
for make in (lambda: OPD("VLAPolicy", "CartPole-v1", teacher=teacher), lambda: __import__("opd_gym").VLAPolicy):
    try:
        make()
    except ImportError as error:
        assert "opd-gym[vla]" in str(error), error
    else:
        raise AssertionError("a VLA without transformers")
"""
LEROBOT = """
from opd_gym.demonstrations import Episode, read_lerobot, write_lerobot
import numpy as np

episode = Episode({"proprio": np.zeros((2, 3))}, np.zeros((2, 1)), instruction="x")
for call in (lambda: write_lerobot(sys.argv[1], [episode]), lambda: list(read_lerobot(sys.argv[2]))):
    try:
        call()
    except ImportError as error:
        assert "opd-gym[lerobot]" in str(error), error
    else:
        raise AssertionError("a data set without pyarrow")
try:
    import opd_gym.integrations.lerobot.config
except ImportError as error:
    assert "pip install lerobot" in str(error), error
"""


@pytest.mark.parametrize(
    ("names", "code"),
    [(("transformers", "peft"), TEACHING), (("pyarrow", "pyarrow.parquet", "lerobot"), LEROBOT)],
    ids=["vla", "lerobot"],
)
def test_without(tmp_path, names, code):
    golden = __file__.replace("test_extras.py", "golden/lerobot/images")
    command = [sys.executable, "-c", WITHOUT.format(names=names) + code, str(tmp_path / "x"), golden]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
