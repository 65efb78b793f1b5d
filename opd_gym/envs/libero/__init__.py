"""LIBERO as Gymnasium environments. Importing this package does not import LIBERO."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from opd_gym.envs.libero.suites import CLASSIC_SUITES, PRO_SUITES, SUITES

if TYPE_CHECKING:
    from opd_gym.envs.libero.env import LiberoEnv

__all__ = ["CLASSIC_SUITES", "PRO_SUITES", "SUITES", "LiberoEnv"]


def __getattr__(name: str) -> Any:
    # Lazy: the table of environment ids needs the names above, and no more of this package
    if name == "LiberoEnv":
        from opd_gym.envs.libero.env import LiberoEnv

        return LiberoEnv
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
