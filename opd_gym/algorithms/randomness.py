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
    version, numbers, gauss = random.getstate()
    name, keys, *rest = np.random.get_state(legacy=True)
    return {
        # As bytes: Stable-Baselines3 writes short arrays out as text beside the pickle
        "python": (version, np.array(numbers, np.uint32).view(np.uint8), gauss),
        "numpy": (name, np.asarray(keys).view(np.uint8), *rest),
        "torch": th.get_rng_state().numpy(),
        "cuda": [state.numpy() for state in on_gpus],
    }


def set_rng_states(states: dict[str, Any]) -> None:
    """
    :param states: what :func:`rng_states` gave, maybe on a machine with other GPUs
    """
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers.view(np.uint32).tolist()), gauss))
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.view(np.uint32), *rest))
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
