"""Tuned hyperparameters and trained checkpoints, by environment id."""

from opd_gym.checkpoints import (
    checkpoint_names,
    checkpoint_path,
    find_checkpoint,
    find_teacher,
    student_for,
    teacher_for,
)
from opd_gym.zoo.hyperparams import load_hyperparams

__all__ = [
    "checkpoint_names",
    "checkpoint_path",
    "find_checkpoint",
    "find_teacher",
    "load_hyperparams",
    "student_for",
    "teacher_for",
]
