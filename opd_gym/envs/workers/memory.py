"""The observations of all envs, in memory that the learner and its workers share."""

from __future__ import annotations

import mmap
import os
import tempfile
from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.vec_env.util import obs_space_info

# By key of the observation; None for spaces that are neither Dict nor Tuple
Arrays = dict[Any, np.ndarray]


class Memory:
    """
    The observations of all envs, and beside each the last one of a finished episode, in memory that learner and workers
    share. It has no name, so nothing is left behind by whoever dies.

    :param space: Observation space
    :param num_envs: Number of envs
    :param fd: File that another process made; None: make one
    """

    def __init__(self, space: spaces.Space, num_envs: int, fd: int | None = None):
        try:
            self.keys, shapes, dtypes = obs_space_info(space)
            layout = [((num_envs, 2, *shapes[key]), np.dtype(dtypes[key])) for key in self.keys]
        except (NotImplementedError, AssertionError, TypeError) as error:
            raise _unsupported(space) from error
        if any(dtype.kind not in "biuf" for _, dtype in layout):
            raise _unsupported(space)
        sizes = [int(np.prod(shape)) * dtype.itemsize for shape, dtype in layout]
        # Each array begins at a multiple of a cache line
        offsets = np.cumsum([0, *(-(-size // 64) * 64 for size in sizes)]).tolist()
        if fd is None:
            if hasattr(os, "memfd_create"):
                self._file: Any = os.fdopen(os.memfd_create("WorkerVecEnv"), "r+b")
            else:
                self._file = tempfile.TemporaryFile()  # noqa: SIM115  (lives as long as the memory)
            self._file.truncate(max(offsets[-1], 1))
        else:
            self._file = os.fdopen(fd, "r+b")
        shared = mmap.mmap(self._file.fileno(), 0)
        self.arrays: Arrays = {
            key: np.frombuffer(shared, dtype, int(np.prod(shape)), offset).reshape(shape)
            for key, (shape, dtype), offset in zip(self.keys, layout, offsets, strict=False)
        }

    @property
    def fd(self) -> int:
        return self._file.fileno()

    def read(self, index: int, slot: int) -> Arrays:
        return {key: array[index, slot].copy() for key, array in self.arrays.items()}

    def write(self, index: int, slot: int, obs: Any) -> None:
        for key, array in self.arrays.items():
            value = np.asarray(obs if key is None else obs[key])
            if value.shape != array.shape[2:]:
                where = "the observation" if key is None else f"the observation's {key!r}"
                raise ValueError(
                    f"Env {index} returned {where} with shape {value.shape}; its observation space says "
                    f"{array.shape[2:]}."
                )
            array[index, slot] = value


def _unsupported(space: spaces.Space) -> ValueError:
    return ValueError(
        "WorkerVecEnv expects an observation space of arrays: Box, Discrete, MultiDiscrete, MultiBinary, or a flat "
        f"Dict or Tuple of these. Got {space}. Wrap the env so that it returns arrays."
    )
