"""Policies: the token view of action distributions and the vision-language-action policy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opd_gym.policies.vla import VLAPolicy

__all__ = ["VLAPolicy"]


def __getattr__(name: str) -> Any:
    # Lazy: the body of a VLA imports transformers, which plain Stable-Baselines3 policies never need
    if name == "VLAPolicy":
        from opd_gym.policies.vla import VLAPolicy

        return VLAPolicy
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
