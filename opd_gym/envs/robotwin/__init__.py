"""RoboTwin 2.0 (https://robotwin-platform.github.io) as Gymnasium environments."""

from opd_gym.envs.robotwin.env import RoboTwinEnv
from opd_gym.envs.robotwin.tasks import MESHLESS_TASKS, STAND_IN_TASKS, TASKS

__all__ = ["MESHLESS_TASKS", "STAND_IN_TASKS", "TASKS", "RoboTwinEnv"]
