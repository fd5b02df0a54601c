"""Checks of settings, with the same messages everywhere. No torch."""

from __future__ import annotations

import math
from typing import Any

LARGEST_COUNT = 2**31 - 1  # of samples, tokens, steps, ...: more than any run has
LARGEST_SEED = 2**64 - 1  # torch's; numpy has no bound
SEED_IN_WORDS = "a whole number from 0 to 2^64 - 1"


def is_number(value: Any) -> bool:
    """Whether ``value`` is a finite number that a float can hold."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond every float
        return False


def is_count(value: Any, smallest: int, largest: float = LARGEST_COUNT) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and smallest <= value <= largest


def whole(smallest: int, optional: bool = False, **settings: Any) -> None:
    """Raise ValueError for a setting that is no whole number from ``smallest`` (or None, where ``optional``)."""
    for name, value in settings.items():
        if not (is_count(value, smallest) or (optional and value is None)):
            wanted = f"{'null or ' if optional else ''}a whole number from {smallest}"
            raise ValueError(f"{name}={value} is not valid; it must be {wanted}")


def is_seed(value: Any) -> bool:
    return is_count(value, 0, LARGEST_SEED)


def seeds(**settings: Any) -> None:
    """Raise ValueError for a setting that is no seed: a whole number that torch and numpy take."""
    for name, value in settings.items():
        if not is_seed(value):
            raise ValueError(f"{name}={value} is not valid; it must be {SEED_IN_WORDS}")


def above(bound: float, optional: bool = False, **settings: Any) -> None:
    """Raise ValueError for a setting that is no number above ``bound`` (or None, where ``optional``)."""
    for name, value in settings.items():
        if not ((is_number(value) and value > bound) or (optional and value is None)):
            wanted = f"{'null or ' if optional else ''}a number above {bound:g}"
            raise ValueError(f"{name}={value} is not valid; it must be {wanted}")


def share(**settings: Any) -> None:
    """Raise ValueError for a setting that is no number from 0 to 1."""
    for name, value in settings.items():
        if not (is_number(value) and 0 <= value <= 1):
            raise ValueError(f"{name}={value} is not valid; it must be a number from 0 to 1")


def filled(optional: bool = False, **settings: Any) -> None:
    """Raise ValueError for a setting that is no list, or an empty one (or None, where ``optional``)."""
    for name, value in settings.items():
        if not ((isinstance(value, list) and value) or (optional and value is None)):
            raise ValueError(f"{name}={value} is not valid; it must be a list that is not empty")


def indices(**settings: Any) -> None:
    """Raise ValueError for a setting that is neither None nor a list of whole numbers from 0 that is not empty."""
    filled(optional=True, **settings)
    for name, value in settings.items():
        for index in value or ():
            whole(0, **{name: index})


def text(optional: bool = False, **settings: Any) -> None:
    """Raise ValueError for a setting that is no text (or None, where ``optional``)."""
    for name, value in settings.items():
        if not (isinstance(value, str) or (optional and value is None)):
            raise ValueError(f"{name}={value} is not valid; it must be {'null or ' if optional else ''}text")


def one_of(options: tuple[str, ...], **settings: Any) -> None:
    """Raise ValueError for a setting that is none of ``options``."""
    for name, value in settings.items():
        if value not in options:
            raise ValueError(f"{name}={value} is not valid; it must be one of {', '.join(options)}")


def flag(**settings: Any) -> None:
    """Raise ValueError for a setting that is neither true nor false."""
    for name, value in settings.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name}={value} is not valid; it must be true or false")
