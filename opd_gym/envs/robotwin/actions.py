"""
Joint positions of RoboTwin and actions in [-1, 1], which token policies need.

An action is a joint position divided by pi, and a gripper's opening (0 closed, 1 open) stretched to [-1, 1]. That is
the same for every robot and task, and linear: whatever statistics in RoboTwin's units a policy was trained with,
``ActionTokens`` can express (:func:`statistics_of_positions`). 256 tokens over the whole range are 1.4 degrees apart,
too coarse to grasp with. Policies use the range of their demonstrations (:func:`statistics_of_actions`), as OpenVLA
does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from opd_gym.envs.robotwin.tasks import ACTION_DIM

_GRIPPERS = np.arange(ACTION_DIM) % 7 == 6
# position = _SCALE * action + _OFFSET
_SCALE = np.where(_GRIPPERS, 0.5, np.pi)
_OFFSET = np.where(_GRIPPERS, 0.5, 0.0)


def to_positions(actions: np.ndarray) -> np.ndarray:
    """
    :param actions: ``(..., 14)`` in [-1, 1]
    :return: float64 ``(..., 14)``: joint positions in rad and gripper openings
    """
    return np.asarray(actions, dtype=np.float64) * _SCALE + _OFFSET


def to_actions(positions: np.ndarray) -> np.ndarray:
    """
    :param positions: ``(..., 14)``: joint positions in rad and gripper openings
    :return: float32 ``(..., 14)``, inside [-1, 1] where the joints are within a half turn
    """
    return ((np.asarray(positions, dtype=np.float64) - _OFFSET) / _SCALE).astype(np.float32)


def statistics_of_positions(statistics: Mapping[str, Any]) -> dict[str, list[Any]]:
    """
    Un-normalisation statistics of a policy that was trained on RoboTwin's own units, for the actions here.

    :param statistics: ``q01``, ``q99`` and, optionally, ``mask``, in joint positions and gripper openings, ``(14,)``
    :return: the same tokens' statistics for ``ActionTokens``
    :raises ValueError: wrong shape
    """
    low, high = (np.asarray(statistics[key], dtype=np.float64) for key in ("q01", "q99"))
    mask = np.asarray(statistics.get("mask", np.ones(ACTION_DIM)), dtype=bool)
    for name, value in (("q01", low), ("q99", high), ("mask", mask)):
        if value.shape != (ACTION_DIM,):
            raise ValueError(f"statistics[{name!r}] must have shape ({ACTION_DIM},), got {value.shape}.")
    # Where nothing was normalised, the bins cover positions from -1 to 1
    low, high = np.where(mask, low, -1.0), np.where(mask, high, 1.0)
    return {
        "q01": ((low - _OFFSET) / _SCALE).tolist(),
        "q99": ((high - _OFFSET) / _SCALE).tolist(),
        "mask": [True] * ACTION_DIM,
    }


def statistics_of_actions(actions: np.ndarray, margin: float = 0.01) -> dict[str, list[Any]]:
    """
    Statistics with which tokens cover the actions of demonstrations and little else.

    The whole range, not quantiles: a joint position that is cut off at its 99th percentile is a grasp missed.

    :param actions: ``(..., 14)`` in [-1, 1]
    :param margin: added on both sides, so that no dimension is empty
    :return: statistics for ``ActionTokens`` and SFT
    """
    rows = np.asarray(actions, dtype=np.float64).reshape(-1, ACTION_DIM)
    return {
        "q01": np.maximum(rows.min(axis=0) - margin, -1.0).tolist(),
        "q99": np.minimum(rows.max(axis=0) + margin, 1.0).tolist(),
        "mask": [True] * ACTION_DIM,
    }
