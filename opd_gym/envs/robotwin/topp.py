"""
Time-optimal path parameterisation in place of mplib's.

RoboTwin turns a chunk of joint positions into a trajectory with ``mplib``, whose last release (0.2.1) crashes under
NumPy 2. Playing actions needs nothing else of mplib. Planning, which RoboTwin's own expert needs, is not replaced.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any, NoReturn

import numpy as np


def time_optimal(
    path: np.ndarray, step: float, verbose: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, float]:
    """
    The fastest way through a path with velocities and accelerations of at most 1 rad/s and 1 rad/s^2, mplib's limits.

    :param path: joint positions in rad, ``(N, n_joints)``, N > 1
    :param step: seconds between two points of the result
    :param verbose: as in mplib; nothing is printed
    :return: times ``(T,)``, positions, velocities and accelerations ``(T, n_joints)``, and the duration in seconds
    :raises RuntimeError: there is no such trajectory; RoboTwin then lets the arm stand still
    """
    from toppra import SplineInterpolator
    from toppra.algorithm import TOPPRA
    from toppra.constraint import JointAccelerationConstraint, JointVelocityConstraint

    path = np.asarray(path, dtype=np.float64)
    limits = np.tile([-1.0, 1.0], (path.shape[1], 1))
    constraints = [JointVelocityConstraint(limits), JointAccelerationConstraint(limits)]
    spline = SplineInterpolator(np.linspace(0.0, 1.0, len(path)), path)
    trajectory = TOPPRA(constraints, spline, parametrizer="ParametrizeConstAccel").compute_trajectory()
    if trajectory is None:
        raise RuntimeError("The path cannot be parameterised.")
    duration = float(trajectory.duration)
    times = np.linspace(0.0, duration, int(duration / step))
    return times, trajectory(times), trajectory(times, 1), trajectory(times, 2), duration


class _Planner:
    """RoboTwin makes one of these for each arm."""

    def __init__(self, *args: Any, **kwargs: Any):
        self.TOPP = time_optimal

    def plan_pose(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise RuntimeError(PLANNER_HINT)

    plan_screw = plan_pose


PLANNER_HINT = (
    "RoboTwin's expert plans with mplib 0.2.1, which needs NumPy 1, so in an environment of its own. Make one with "
    "`opd-gym robotwin install --planner`, or pass an interpreter that has both with --python."
)


def has_planner() -> bool:
    """
    :return: whether the mplib that is imported is the real one
    """
    return getattr(sys.modules.get("mplib"), "Planner", _Planner) is not _Planner


def install_as_mplib() -> None:
    """Let ``import mplib`` find this instead."""
    modules = {name: ModuleType(name) for name in ("mplib", "mplib.planner", "mplib.sapien_utils")}
    root, utils = modules["mplib"], modules["mplib.sapien_utils"]
    root.Planner = utils.SapienPlanner = _Planner  # type: ignore[attr-defined]
    utils.SapienPlanningWorld = lambda scene, articulations: None  # type: ignore[attr-defined]
    root.planner, root.sapien_utils = modules["mplib.planner"], utils  # type: ignore[attr-defined]
    sys.modules.update(modules)
