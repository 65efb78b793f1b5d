"""Algorithms: on-policy distillation and what it is compared with."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from opd_gym.algorithms.common import PolicyAlgorithm


def algorithm_class(algo: str) -> type[PolicyAlgorithm]:
    """
    :param algo: "opd", "grpo", "ppo" or "sft"
    :return: its class
    :raises ValueError: there is no such algorithm
    """
    from opd_gym.zoo.hyperparams import ALGORITHMS

    if algo.lower() not in ALGORITHMS:
        raise ValueError(f"Unknown algorithm {algo!r}. Known: {', '.join(ALGORITHMS)}.")
    return getattr(importlib.import_module(f"opd_gym.algorithms.{algo.lower()}"), algo.upper())
