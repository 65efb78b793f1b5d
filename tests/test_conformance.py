"""
LIBERO as it was published: our scenes against those of stock LIBERO with MuJoCo 2.3.7, the version of LIBERO's time.

tests/golden/libero/mujoco_2.3.7.npz has the positions of all free bodies and the mean colours of both cameras after a
reset to each of the 50 official states of 40 tasks and ten no-ops, mujoco_3.3.2.npz the same of stock LIBERO with the
pinned MuJoCo; make_golden.py beside them made both. The two are compared over all 2,000 states, ours with them in a
sample; with OPD_GYM_TEST_ALL_TASKS=1 in all states.
"""

import os
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("libero", reason="LIBERO is not installed: pip install 'opd_gym[libero]'")

import mujoco  # noqa: E402

from opd_gym.envs.libero.simulator import Simulator  # noqa: E402
from opd_gym.envs.libero.suites import CLASSIC_SUITES, N_TASKS, load_init_states, tasks  # noqa: E402

GOLDEN = Path(__file__).parent / "golden" / "libero"
PINNED = "3.3.2"
CAMERAS = ("agentview", "robot0_eye_in_hand")
SIZE = 128
EVERY_TASK = [(suite, task_id) for suite in CLASSIC_SUITES for task_id in range(N_TASKS[suite])]
ALL = bool(os.environ.get("OPD_GYM_TEST_ALL_TASKS"))
CASES = EVERY_TASK if ALL else [
    ("libero_spatial", 7),  # one of those where 3.3.2 and 2.3.7 disagree
    ("libero_spatial", 5),  # with later versions the bowl slides off the ramekin
    ("libero_object", 2),  # the floor grows dark
    ("libero_goal", 4),
    ("libero_10", 0),  # a bottle is thrown into the air
]  # fmt: skip


# Positions are those of another version of the contact code, pictures of the same renderer
MAX_DISTANCE = 1e-4  # m
MAX_COLOUR = 0.5  # of 255, mean over the picture
ROUNDING = 1e-6  # m; the files hold float32

# Where stock LIBERO on 3.3.2 and on 2.3.7 themselves disagree: the largest distance (mm) and the number of states
DISAGREE: dict[tuple[str, int], tuple[float, int]] = {
    ("libero_spatial", 2): (12.2, 2),
    ("libero_spatial", 6): (3.4, 50),
    ("libero_spatial", 7): (3.4, 50),
    ("libero_spatial", 8): (6.6, 2),
    ("libero_spatial", 9): (3.4, 50),
    ("libero_10", 0): (102.8, 1),
    ("libero_10", 7): (3.7, 1),
}


def golden(version: str, suite: str, task_id: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    with np.load(GOLDEN / f"mujoco_{version}.npz") as file:
        names, positions, colours = (file[f"{suite}/{task_id}/{key}"] for key in ("names", "positions", "colours"))
    assert len(positions) == len(colours) == 50
    return names, positions, colours


@pytest.mark.parametrize(("suite", "task_id"), EVERY_TASK)
def test_the_pinned_mujoco_is_that_of_the_published_benchmark(suite, task_id):
    names, positions, colours = golden("2.3.7", suite, task_id)
    pinned_names, pinned, pinned_colours = golden(PINNED, suite, task_id)
    assert names.tolist() == pinned_names.tolist()
    distance = np.linalg.norm(pinned - positions, axis=2).max(axis=1)
    largest, n_states = DISAGREE.get((suite, task_id), (0.0, 0))
    agrees = distance < MAX_DISTANCE
    assert (~agrees).sum() == n_states
    if n_states:
        assert 1000 * distance.max() == pytest.approx(largest, abs=0.06)
    assert np.abs(pinned_colours - colours)[agrees].max(initial=0.0) < MAX_COLOUR


@pytest.mark.parametrize(("suite", "task_id"), CASES)
def test_scenes_are_those_of_the_published_benchmark(suite, task_id):
    names, positions, colours = golden("2.3.7", suite, task_id)
    pinned = golden(PINNED, suite, task_id)[1]
    task = tasks(suite)[task_id]
    states = load_init_states(task)
    assert len(states) == 50
    simulator = Simulator(task)
    try:
        for number in range(50) if ALL else (0, 17, 34):
            simulator.reset(1000 * task_id + number, states[number])
            found = np.array([simulator.data.body(str(name)).xpos for name in names])
            if mujoco.__version__ == PINNED:
                assert np.abs(found - pinned[number]).max() < ROUNDING, f"state {number}: not as in stock LIBERO"
            apart = np.linalg.norm(pinned[number] - positions[number], axis=1).max()
            if (suite, task_id) in DISAGREE and apart > MAX_DISTANCE:
                continue
            distance = np.linalg.norm(found - positions[number], axis=1)
            assert distance.max() < MAX_DISTANCE, f"state {number}: {names[distance.argmax()]} lies elsewhere"
            pictures = simulator.render(CAMERAS, SIZE)
            difference = np.abs(np.array([picture.mean(axis=(0, 1)) for picture in pictures]) - colours[number])
            assert difference.max() < MAX_COLOUR, f"state {number}: the pictures have other colours"
    finally:
        simulator.close()
