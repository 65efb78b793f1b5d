"""Checks of arguments, for every layer."""

from __future__ import annotations


def check_at_least_one(**sizes: int | None) -> None:
    """
    :param sizes: numbers of things by the name of their argument; None is left out
    :raises ValueError: one of them is below 1
    """
    for name, value in sizes.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
