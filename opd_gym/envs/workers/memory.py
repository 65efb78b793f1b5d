"""The observations of all envs, in memory that the learner and its workers share."""

from __future__ import annotations

import mmap
import os
import tempfile
from typing import IO, Any

import numpy as np

# By key of the observation; None for spaces that are neither Dict nor Tuple
Arrays = dict[Any, np.ndarray]
# Key, shape and dtype of each array of an observation
Layout = list[tuple[Any, tuple[int, ...], np.dtype]]


def open_memory() -> IO[bytes]:
    """
    :return: A file without a name, so that nothing is left behind by whoever dies
    """
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("WorkerVecEnv"), "r+b")
    return tempfile.TemporaryFile()


class Memory:
    """
    The observations of all envs, beside each the last one of a finished episode, and which envs are at work.

    :param fd: Descriptor of a file of :func:`open_memory`
    :param layout: Arrays of an observation
    :param num_envs: Number of envs
    """

    def __init__(self, fd: int, layout: Layout, num_envs: int):
        fields: Layout = [(None, (num_envs,), np.dtype(np.uint8)), (None, (num_envs, 2), np.dtype(np.uint8))]
        fields += [(key, (num_envs, 2, *shape), dtype) for key, shape, dtype in layout]
        sizes = [int(np.prod(shape)) * dtype.itemsize for _, shape, dtype in fields]
        # Each array begins at a multiple of a cache line
        offsets = np.cumsum([0, *(-(-size // 64) * 64 for size in sizes)]).tolist()
        os.ftruncate(fd, offsets[-1])
        shared = mmap.mmap(fd, offsets[-1])
        at_work, written, *arrays = (
            np.frombuffer(shared, dtype, int(np.prod(shape)), offset).reshape(shape)
            for (_, shape, dtype), offset in zip(fields, offsets, strict=False)
        )
        #: Whether a worker is carrying out a command of an env, for each env. It stays so where the worker dies
        self.at_work = at_work
        # Observations that were not taken since, by env and slot
        self._written = written
        self.arrays: Arrays = {key: array for (key, _, _), array in zip(layout, arrays, strict=True)}

    def read(self, index: int, slot: int) -> Arrays:
        """
        :param index: Number of an env
        :param slot: 0 for its observation, 1 for the last one of its last episode
        :return: A copy of that observation
        """
        return {key: array[index, slot].copy() for key, array in self.arrays.items()}

    def write(self, index: int, slot: int, obs: Any) -> None:
        """
        :param index: Number of an env
        :param slot: 0 for its observation, 1 for the last one of its last episode
        :param obs: The observation
        :raises ValueError: Its shape is not that of the observation space
        """
        for key, array in self.arrays.items():
            value = np.asarray(obs if key is None else obs[key])
            if value.shape != array.shape[2:]:
                where = "the observation" if key is None else f"the observation's {key!r}"
                raise ValueError(
                    f"Env {index} returned {where} with shape {value.shape}; its observation space says "
                    f"{array.shape[2:]}."
                )
            array[index, slot] = value
        self._written[index, slot] = True

    def take(self, index: int) -> dict[int, Arrays]:
        """
        :param index: Number of an env
        :return: Copies of its observations that were written since the last call, by slot
        """
        slots = np.flatnonzero(self._written[index]).tolist()
        self._written[index] = False
        return {slot: self.read(index, slot) for slot in slots}
