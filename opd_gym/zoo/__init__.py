"""Tuned hyperparameters and trained checkpoints, by environment id."""

from opd_gym.zoo.config import load_hyperparams
from opd_gym.zoo.registry import (
    checkpoint_names,
    checkpoint_path,
    find_checkpoint,
    find_teacher,
    student_for,
    teacher_for,
)

__all__ = [
    "checkpoint_names",
    "checkpoint_path",
    "find_checkpoint",
    "find_teacher",
    "load_hyperparams",
    "student_for",
    "teacher_for",
]
