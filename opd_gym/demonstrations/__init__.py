"""Demonstrations: files in LIBERO's HDF5 format, data sets of LeRobot's, and the arrays a policy learns from."""

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
from opd_gym.demonstrations.lerobot import read_lerobot, was_recorded_as, write_lerobot

__all__ = [
    "Demonstrations",
    "Episode",
    "PathLike",
    "find_files",
    "read_demonstrations",
    "read_lerobot",
    "read_statistics",
    "was_recorded",
    "was_recorded_as",
    "write_demonstrations",
    "write_lerobot",
]
