"""
Actions as tokens: OpenVLA's binning, the statistics with which a policy's actions were normalised, and joint positions.

RoboTwin's actions are joint positions. Its envs take a joint position divided by pi, and a gripper's opening (0 closed,
1 open) stretched to [-1, 1]. That is the same for every robot and task, and linear: whatever statistics in RoboTwin's
units a policy was trained with, ``ActionTokens`` can express (:func:`statistics_of_positions`). 256 tokens over the
whole range are 1.4 degrees apart, too coarse to grasp with. Policies use the range of their demonstrations
(:func:`statistics_of_actions`), as OpenVLA does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from opd_gym.checks import check_at_least, check_range

Statistics = Mapping[str, Any]

JOINTS = 14  # (6 joints and a gripper) of the left arm, then of the right one
_GRIPPERS = np.arange(JOINTS) % 7 == 6
# position = _SCALE * action + _OFFSET
_SCALE = np.where(_GRIPPERS, 0.5, np.pi)
_OFFSET = np.where(_GRIPPERS, 0.5, 0.0)


def bin_centers(n_bins: int = 256) -> np.ndarray:
    """
    Centres of OpenVLA's action bins.

    ``n_bins`` edges over [-1, 1] enclose ``n_bins - 1`` bins, so the two highest tokens share the last centre
    (https://github.com/openvla/openvla, ``ActionTokenizer``). The middle centre is exactly 0 for an even ``n_bins``:
    with the rounding error of a plain mean a "zero" rotation would re-anchor LIBERO's controller at every step.

    :param n_bins: number of tokens of one action dimension
    :return: float64 array of shape ``(n_bins - 1,)``
    """
    check_at_least(3, n_bins=n_bins)  # two bins share a centre
    edges = np.linspace(-1.0, 1.0, n_bins)
    centers = (edges[:-1] + edges[1:]) / 2.0
    if n_bins % 2 == 0:
        centers[(n_bins - 1) // 2] = 0.0
    return centers


def normalisation_bounds(statistics: Statistics, action_dim: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    low = np.asarray(statistics["q01"], dtype=np.float64)
    high = np.asarray(statistics["q99"], dtype=np.float64)
    mask = np.asarray(statistics.get("mask", np.ones_like(low, dtype=bool)), dtype=bool)
    for name, value in (("q01", low), ("q99", high), ("mask", mask)):
        if value.shape != (action_dim,):
            raise ValueError(
                f"statistics[{name!r}] must have shape ({action_dim},), one entry a dimension, got {value.shape}."
            )
    if statistics.get("gripper") not in (None, "open_is_one"):
        raise ValueError(f'statistics["gripper"] must be "open_is_one" or None, got {statistics["gripper"]!r}.')
    return low, high, mask


def encode_actions(actions: np.ndarray, statistics: Statistics | None = None, n_bins: int = 256) -> np.ndarray:
    """
    Continuous actions to action tokens, OpenVLA's binning.

    :param actions: float array of shape ``(..., D)``; in [-1, 1], or in the data set's units if ``statistics`` are
        given
    :param statistics: ``{"q01": (D,), "q99": (D,), "mask": (D,)}`` of the data set the policy was trained on, where
        dimensions with a false mask were not normalised; ``"gripper": "open_is_one"`` says that its last dimension is
        1 for an open gripper and 0 for a closed one, where the env's is negative and positive (OpenVLA on LIBERO). A
        dimension that is constant in the data (equal ``min`` and ``max`` where given, else equal bounds) becomes the
        middle bin, as in openvla's data loader
    :param n_bins: number of tokens of one action dimension
    :return: int64 array of the same shape, tokens in ``[0, n_bins - 1]``
    :raises ValueError: an action is NaN or infinite, which is no bin's
    """
    x = np.asarray(actions, dtype=np.float64)
    if not np.isfinite(x).all():
        raise ValueError(f"Actions must be finite numbers to become tokens, got {x[~np.isfinite(x)][0]}.")
    if statistics is not None:
        low, high, mask = normalisation_bounds(statistics, x.shape[-1])
        if statistics.get("gripper"):
            x = np.concatenate([x[..., :-1], x[..., -1:] <= 0.0], axis=-1)
        x = np.where(mask, 2.0 * (x - low) / (high - low + 1e-8) - 1.0, x)
        constant = mask & (low == high)
        if "min" in statistics and "max" in statistics:
            constant = np.asarray(statistics["min"]) == np.asarray(statistics["max"])
        x = np.where(constant, 0.0, x)
    edges = np.linspace(-1.0, 1.0, n_bins)
    return np.clip(np.digitize(np.clip(x, -1.0, 1.0), edges) - 1, 0, n_bins - 1).astype(np.int64)


def decode_tokens(tokens: np.ndarray, statistics: Statistics | None = None, n_bins: int = 256) -> np.ndarray:
    """
    Action tokens to continuous actions, the inverse of :func:`encode_actions` up to half a bin.

    :param tokens: integer array of shape ``(..., D)``
    :param statistics: see :func:`encode_actions`; the un-normalisation is OpenVLA's ``0.5 (x + 1) (q99 - q01 + 1e-8) +
        q01``, and ``"gripper": "open_is_one"`` turns the last dimension into -1 (open) or 1 (closed)
    :param n_bins: number of tokens of one action dimension
    :return: float32 array of the same shape
    :raises ValueError: there is no such token
    """
    tokens = np.asarray(tokens)
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < n_bins:
        raise ValueError(f"Tokens must be from 0 to {n_bins - 1}, got {tokens.min()} to {tokens.max()}.")
    x = bin_centers(n_bins)[np.minimum(np.asarray(tokens, dtype=np.int64), n_bins - 2)]
    if statistics is not None:
        low, high, mask = normalisation_bounds(statistics, x.shape[-1])
        x = np.where(mask, 0.5 * (x + 1.0) * (high - low + 1e-8) + low, x)
        if statistics.get("gripper"):
            # As published evaluations execute it: fully open (-1) or closed (1). No centre of a bin is at 0.5.
            x[..., -1] = -np.sign(2.0 * x[..., -1] - 1.0)
    return x.astype(np.float32)


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
    mask = np.asarray(statistics.get("mask", np.ones(JOINTS)), dtype=bool)
    for name, value in (("q01", low), ("q99", high), ("mask", mask)):
        if value.shape != (JOINTS,):
            raise ValueError(f"statistics[{name!r}] must have shape ({JOINTS},), got {value.shape}.")
    # Where nothing was normalised, the bins cover positions from -1 to 1
    low, high = np.where(mask, low, -1.0), np.where(mask, high, 1.0)
    return {
        "q01": ((low - _OFFSET) / _SCALE).tolist(),
        "q99": ((high - _OFFSET) / _SCALE).tolist(),
        "mask": [True] * JOINTS,
    }


def statistics_of_actions(actions: np.ndarray, margin: float = 0.01) -> dict[str, list[Any]]:
    """
    Statistics with which tokens cover the actions of demonstrations and little else.

    The whole range, not quantiles: a joint position that is cut off at its 99th percentile is a grasp missed.

    :param actions: ``(..., 14)`` in [-1, 1]
    :param margin: added on both sides, so that no dimension is empty
    :return: statistics for ``ActionTokens`` and SFT
    """
    check_range("[0, inf)", margin=margin)
    rows = np.asarray(actions, dtype=np.float64).reshape(-1, JOINTS)
    return {
        "q01": np.maximum(rows.min(axis=0) - margin, -1.0).tolist(),
        "q99": np.minimum(rows.max(axis=0) + margin, 1.0).tolist(),
        "mask": [True] * JOINTS,
    }
