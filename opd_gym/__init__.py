"""On-policy distillation for vision-language-action policies, in the world of Gymnasium and Stable-Baselines3."""

from __future__ import annotations

import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
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


def _register_envs() -> None:
    from opd_gym.envs.registration import register_envs

    register_envs()


class _WithGymnasium(MetaPathFinder):
    """Registers the environment ids as soon as somebody imports Gymnasium: the command line's help need not wait."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if fullname != "gymnasium":
            return None
        sys.meta_path.remove(self)  # what the others find
        try:
            spec = find_spec(fullname)
        finally:
            sys.meta_path.insert(0, self)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: Any) -> None:
                execute(module)
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                    _register_envs()

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


if "gymnasium" in sys.modules:
    _register_envs()
else:
    sys.meta_path.insert(0, _WithGymnasium())


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
