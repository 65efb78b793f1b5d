"""The generators of Python, NumPy and PyTorch, from which everything draws: left alone, or gone on with."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch as th


def rng_states() -> dict[str, Any]:
    """
    :return: how far the global random generators are, GPUs included: plain values and arrays
    """
    on_gpus = th.cuda.get_rng_state_all() if th.cuda.is_initialized() else []
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": th.get_rng_state().numpy(),
        "cuda": [state.numpy() for state in on_gpus],
    }


def set_rng_states(states: dict[str, Any]) -> None:
    """
    :param states: what :func:`rng_states` gave, maybe on a machine with other GPUs
    """
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    th.set_rng_state(th.from_numpy(states["torch"].copy()))
    if len(states["cuda"]) == th.cuda.device_count() > 0:
        th.cuda.set_rng_state_all([th.from_numpy(state.copy()) for state in states["cuda"]])


@contextmanager
def preserved_rng() -> Iterator[None]:
    """Leave the global random generators as they were."""
    states = rng_states()
    try:
        yield
    finally:
        set_rng_states(states)
