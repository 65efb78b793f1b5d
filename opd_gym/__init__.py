"""On-policy distillation for vision-language-action policies, in the world of Gymnasium and Stable-Baselines3."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opd_gym.version import __version__

if TYPE_CHECKING:
    from opd_gym.algorithms.grpo import GRPO
    from opd_gym.algorithms.opd import OPD
    from opd_gym.algorithms.ppo import PPO
    from opd_gym.algorithms.sft import SFT
    from opd_gym.envs.make import make_vec
    from opd_gym.policies.vla import VLAPolicy

__all__ = ["GRPO", "OPD", "PPO", "SFT", "VLAPolicy", "__version__", "make_vec"]

# Loaded at first use: a simulator worker imports this package for its environment ids and has no need of torch's
# models.
_LAZY = {
    "GRPO": "opd_gym.algorithms.grpo",
    "OPD": "opd_gym.algorithms.opd",
    "PPO": "opd_gym.algorithms.ppo",
    "SFT": "opd_gym.algorithms.sft",
    "VLAPolicy": "opd_gym.policies.vla",
    "make_vec": "opd_gym.envs.make",
}


# The command registers them once it knows what to do: its help need not wait for Gymnasium
if Path(getattr(sys, "argv", [""])[0]).name != "opd-gym":
    from opd_gym.envs.registration import register_envs

    register_envs()


def __dir__() -> list[str]:
    return sorted(__all__)


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
