"""Demonstrations: files in LIBERO's HDF5 format, and the arrays a policy learns from."""

from opd_gym.demonstrations.dataset import Demonstrations
from opd_gym.demonstrations.hdf5 import (
    Episode,
    PathLike,
    find_files,
    read_demonstrations,
    read_statistics,
    was_recorded,
    write_demonstrations,
)

__all__ = [
    "Demonstrations",
    "Episode",
    "PathLike",
    "find_files",
    "read_demonstrations",
    "read_statistics",
    "was_recorded",
    "write_demonstrations",
]
