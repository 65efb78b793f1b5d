"""RoboTwin 2.0 (https://robotwin-platform.github.io) as Gymnasium environments."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from opd_gym.envs.robotwin.tasks import MESHLESS_TASKS, STAND_IN_TASKS, TASKS

if TYPE_CHECKING:
    from opd_gym.envs.robotwin.env import RoboTwinEnv

__all__ = ["MESHLESS_TASKS", "STAND_IN_TASKS", "TASKS", "RoboTwinEnv"]


def __getattr__(name: str) -> Any:
    # Lazy: the table of environment ids needs the names above, and no more of this package
    if name == "RoboTwinEnv":
        from opd_gym.envs.robotwin.env import RoboTwinEnv

        return RoboTwinEnv
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
