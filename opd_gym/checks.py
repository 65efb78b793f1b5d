"""Checks of arguments, for every layer."""

from __future__ import annotations

import operator
from numbers import Integral
from typing import Any


def check_at_least_one(**sizes: int | None) -> None:
    """
    :param sizes: numbers of things by the name of their argument; None is left out
    :raises ValueError: one of them is below 1, or no integer
    """
    for name, value in sizes.items():
        if value is not None and (not isinstance(value, Integral) or isinstance(value, bool)):
            raise ValueError(f"{name} must be an integer, got {value!r}.")
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")


def check_seed(seed: Any) -> int | None:
    """
    :param seed: an integer of Python or NumPy; None for none
    :return: it as an integer of Python, as Gymnasium and ``random`` need it
    :raises ValueError: it is something else
    """
    try:
        return None if seed is None else operator.index(seed)
    except TypeError as error:
        raise ValueError(f"seed must be an integer or None, got {seed!r}.") from error
