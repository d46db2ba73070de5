"""Checks of single values: is it of the right kind, is it in range, and what is it in plain Python types?

A check takes (name, value) and returns the value as int, float, bool, str or tuple, or raises a ValueError
that says what `name` was and what it must be.  NumPy's scalars count as numbers, True and False do not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Check = Callable[[str, Any], Any]

# The largest count there is room for: what the core holds in 32 bits, sign aside.
MAX_COUNT = 2**31 - 1


@dataclass(frozen=True)
class Interval:
    """A range of numbers; `open_low` and `open_high` say that the end itself is left out."""

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, value: float) -> bool:
        """Whether `value` lies in it."""
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        return above and below

    def __str__(self) -> str:
        """In words, such as ", at least 0 and below 1"; empty where there is no limit."""
        low = "" if self.low == -math.inf else f"{'above' if self.open_low else 'at least'} {self.low}"
        high = "" if self.high == math.inf else f"{'below' if self.open_high else 'at most'} {self.high}"
        limits = " and ".join(limit for limit in (low, high) if limit)
        return f", {limits}" if limits else ""


def integer(low: int, high: int = MAX_COUNT) -> Check:
    """A check for an int from `low` to `high`."""

    def check(name: str, value: Any) -> int:
        is_integer = isinstance(value, int | np.integer) and not isinstance(value, bool)
        if not is_integer or not low <= value <= high:
            limits = f"at least {low}" if high == MAX_COUNT else f"from {low} to {high}"
            raise ValueError(f"{name} is {value!r}; it must be an int, {limits}")
        return int(value)

    return check


def number(interval: Interval) -> Check:
    """A check for a finite number in `interval`."""

    def check(name: str, value: Any) -> float:
        as_float = _as_float(value)
        if not math.isfinite(as_float) or as_float not in interval:
            raise ValueError(f"{name} is {value!r}; it must be a finite number{interval}")
        return as_float

    return check


def _as_float(value: Any) -> float:
    """`value` as a float, NaN where it is no number or too large."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.nan


def bias(name: str, value: Any) -> float:
    """A check for what may be added to a logit: a finite number, or -inf."""
    as_float = _as_float(value)
    if math.isnan(as_float) or as_float == math.inf:
        raise ValueError(f"{name} is {value!r}; it must be a finite number, or -inf")
    return as_float


def boolean(name: str, value: Any) -> bool:
    """A check for True or False."""
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"{name} is {value!r}; it must be True or False")
    return bool(value)


def optional(check: Check) -> Check:
    """A check that also lets None through."""
    return lambda name, value: None if value is None else check(name, value)


def several(check: Check, what: str, *, allow_empty: bool = True) -> Check:
    """A check for a list, tuple, set or array, `what` in words, of values that each pass `check`."""

    def check_all(name: str, value: Any) -> tuple[Any, ...]:
        is_several = isinstance(value, Sequence | np.ndarray | set | frozenset)
        if not is_several or isinstance(value, str | bytes):
            raise ValueError(f"{name} is {value!r}; it must be {what}")
        if len(value) == 0 and not allow_empty:
            raise ValueError(f"{name} is empty; it must be {what}, one or more")
        return tuple(check(f"{name}[{i}]", item) for i, item in enumerate(value))

    return check_all


def one_or_several(one: Check, more: Check, kind: type | tuple[type, ...]) -> Check:
    """A check for one value of type `kind`, or else what `more` accepts."""
    return lambda name, value: one(name, value) if isinstance(value, kind) else more(name, value)


def mapping(key: Check, item: Check, what: str) -> Check:
    """A check for a dict, `what` in words, whose keys pass `key` and whose values pass `item`."""

    def check_all(name: str, value: Any) -> dict[Any, Any]:
        if not isinstance(value, Mapping):
            raise ValueError(f"{name} is {value!r}; it must be {what}")
        return {key(f"a key of {name}", k): item(f"{name}[{k!r}]", v) for k, v in value.items()}

    return check_all
