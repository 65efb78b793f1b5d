"""Observations of a batch, which are one array or a dict of arrays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np


def map_obs(function: Callable[[Any], Any], obs: Any) -> Any:
    """
    Apply a function to the array of a plain observation, or to each array of a Dict observation.

    :param function: function of one array
    :param obs: observations
    :return: results in the same structure
    """
    return {key: function(array) for key, array in obs.items()} if isinstance(obs, dict) else function(obs)


def obs_rows(obs: Any, rows: Any) -> Any:
    """
    :param obs: observations of a batch
    :param rows: rows of it: indices, a slice or a mask
    :return: the observations in these rows
    """
    return map_obs(lambda array: array[rows], obs)


def join_obs(parts: Sequence[Any]) -> Any:
    """
    :param parts: observations of several batches, of the same structure
    :return: one batch of all of them, in order
    """
    if isinstance(parts[0], dict):
        return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    return np.concatenate(parts)
