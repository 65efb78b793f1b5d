"""
Exact mode against stock LIBERO on the real simulator: whole episodes, tasks of all five suites.

A task of each suite; with OPD_GYM_TEST_ALL_TASKS=1 every one of the 130 (an hour). benchmarks/libero_exactness.py plays
them; its results have all.
"""

import os
import sys
from pathlib import Path

import pytest

pytest.importorskip("libero", reason="LIBERO is not installed: pip install 'opd_gym[libero]'")

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import libero_exactness  # noqa: E402

from opd_gym.envs.libero.suites import N_TASKS  # noqa: E402

CASES = [
    ("libero_spatial", 0),
    ("libero_object", 7),  # hundreds of contacts before the objects are placed
    ("libero_goal", 4),  # a cabinet with drawers, a mirroring stove
    ("libero_10", 9),  # a microwave
    ("libero_90", 61),
]
if os.environ.get("OPD_GYM_TEST_ALL_TASKS"):
    CASES = [(suite, task) for suite in libero_exactness.SUITES for task in range(N_TASKS[suite])]


@pytest.mark.parametrize(("suite", "task_id"), CASES)
def test_whole_episode_equals_stock_libero(suite, task_id):
    record = libero_exactness.compare(suite, task_id)
    assert record["difference"] is None
    assert record["steps"] == record["horizon"]
    assert record["pictures"] == 2 * libero_exactness.N_PICTURES
    assert record["different_pixels"] == 0
    assert record["moved"] > 1e-3, "nothing was touched: the episode shows little"
