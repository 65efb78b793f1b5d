"""Checks of arguments, for every layer."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from numbers import Integral, Real
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """
    :param word: what was given, and is not known
    :param known: what could have been meant
    :return: a sentence to begin an error's hint with, or "" where nothing is near
    """
    near = difflib.get_close_matches(str(word), [str(name) for name in known], n=1)
    return f"Did you mean {near[0]!r}? " if near else ""


def check_at_least(least: int, /, **counts: Any) -> None:
    """
    :param least: the smallest number that makes sense
    :param counts: whole numbers by the name of their argument, NumPy's included; None is left out
    :raises ValueError: one of them is no integer, is smaller, or is beyond what a C integer can hold
    """
    for name, value in counts.items():
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise ValueError(f"{name} must be an integer, got {value!r:.80}.")
        if int(value) < least:
            raise ValueError(f"{name} must be at least {least}, got {value}.")
        if int(value) >= 2**63:  # C's largest: further on it would be an OverflowError of nothing in particular
            raise ValueError(f"{name} must be below 2**63, got {value}.")


def check_at_least_one(**counts: Any) -> None:
    """
    :param counts: see :func:`check_at_least`
    :raises ValueError: one of them is no integer, or is below 1
    """
    check_at_least(1, **counts)


def check_range(interval: str, /, **values: Any) -> None:
    """
    :param interval: written as in mathematics: "[0, 1)" includes the 0 and not the 1. NaN is in no interval
    :param values: numbers by the name of their argument
    :raises ValueError: one of them is no number, or outside
    """
    low, high = (float(bound) for bound in interval[1:-1].split(","))
    for name, value in values.items():
        number: Any = value if isinstance(value, Real) and not isinstance(value, bool) else math.nan
        inside = low <= number <= high
        if not inside or (value == low and interval[0] == "(") or (value == high and interval[-1] == ")"):
            raise ValueError(f"{name} must be a number in {interval}, got {value!r:.80}.")


def check_flag(**flags: Any) -> None:
    """
    :param flags: True, False or None, by the name of their argument
    :raises ValueError: one of them is something else
    """
    for name, value in flags.items():
        if not (value is None or isinstance(value, bool)):
            raise ValueError(f"{name} must be True, False or None, got {value!r:.80}.")


def check_schedule(interval: str, /, **schedules: Any) -> None:
    """
    :param interval: see :func:`check_range`; a schedule may end at its lower bound
    :param schedules: numbers, or functions of the progress remaining (from 1 to 0), by the name of their argument
    :raises ValueError: one of them is outside, at the beginning, in the middle or at the end
    """
    for name, value in schedules.items():
        if not callable(value):
            check_range(interval, **{name: value})
            continue
        for progress in (1.0, 0.5, 0.0):
            check_range(f"[{interval[1:]}", **{f"{name} at progress {progress}": value(progress)})


def check_fields(cls: type, values: Mapping[str, Any]) -> None:
    """
    :param cls: a class with type hints, a dataclass for instance
    :param values: what a file has for its fields; names that it does not have are passed over
    :raises ValueError: one of them is of another type
    """
    hints = get_type_hints(cls)
    for name, value in values.items():
        if name in hints and not _is_a(value, hints[name]):
            kind = getattr(hints[name], "__name__", None) if get_origin(hints[name]) is None else None
            raise ValueError(f"{name} must be {kind or hints[name]}, got {value!r:.80}.")


def _is_a(value: Any, hint: Any) -> bool:
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Literal:
        return value in parts
    if origin in (Union, UnionType):
        return any(_is_a(value, part) for part in parts)
    if origin is list:
        return isinstance(value, list) and all(_is_a(item, parts[0]) for item in value)
    if isinstance(value, int) and abs(value) >= 2**63:  # no number of anything, and no float either
        return False
    return isinstance(value, {int: Integral, float: Real}.get(hint, hint))


def check_seed(seed: Any) -> int | None:
    """
    :param seed: an integer of Python or NumPy, at least 0; None for none
    :return: it as an integer of Python, as Gymnasium and ``random`` need it
    :raises ValueError: it is something else
    """
    check_at_least(0, seed=seed)
    return None if seed is None else int(seed)
