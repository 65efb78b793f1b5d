"""
LIBERO as it was published: our scenes against those of stock LIBERO with MuJoCo 2.3.7, the version of LIBERO's time.

tests/golden/libero/mujoco_2.3.7.npz has the positions of all free bodies and the mean colours of both cameras after a
reset to each of the 50 official states of 40 tasks and ten no-ops; make_golden.py beside it made it. A sample here;
with OPD_GYM_TEST_ALL_TASKS=1 all 2,000 states.
"""

import os
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("libero", reason="LIBERO is not installed: pip install 'opd_gym[libero]'")

from opd_gym.envs.libero.simulator import Simulator  # noqa: E402
from opd_gym.envs.libero.suites import CLASSIC_SUITES, N_TASKS, load_init_states, tasks  # noqa: E402

GOLDEN = Path(__file__).parent / "golden" / "libero" / "mujoco_2.3.7.npz"
CAMERAS = ("agentview", "robot0_eye_in_hand")
SIZE = 128
EVERY_TASK = [(suite, task_id) for suite in CLASSIC_SUITES for task_id in range(N_TASKS[suite])]
ALL = bool(os.environ.get("OPD_GYM_TEST_ALL_TASKS"))
CASES = EVERY_TASK if ALL else [
    ("libero_spatial", 5),  # with later versions the bowl slides off the ramekin
    ("libero_object", 2),  # the floor grows dark
    ("libero_goal", 4),
    ("libero_10", 0),  # a bottle is thrown into the air
]  # fmt: skip


# Positions are those of another version of the contact code, pictures of the same renderer
MAX_DISTANCE = 1e-4  # m
MAX_COLOUR = 0.5  # of 255, mean over the picture


@pytest.mark.parametrize(("suite", "task_id"), CASES)
def test_scenes_are_those_of_the_published_benchmark(suite, task_id):
    with np.load(GOLDEN) as golden:
        names, positions, colours = (golden[f"{suite}/{task_id}/{key}"] for key in ("names", "positions", "colours"))
    task = tasks(suite)[task_id]
    states = load_init_states(task)
    assert len(states) == len(positions) == 50
    simulator = Simulator(task)
    try:
        for number in range(50) if ALL else (0, 17, 34):
            simulator.reset(1000 * task_id + number, states[number])
            found = np.array([simulator.data.body(str(name)).xpos for name in names])
            distance = np.linalg.norm(found - positions[number], axis=1)
            assert distance.max() < MAX_DISTANCE, f"state {number}: {names[distance.argmax()]} lies elsewhere"
            pictures = simulator.render(CAMERAS, SIZE)
            difference = np.abs(np.array([picture.mean(axis=(0, 1)) for picture in pictures]) - colours[number])
            assert difference.max() < MAX_COLOUR, f"state {number}: the pictures have other colours"
    finally:
        simulator.close()
