"""Any other measurement, of an evaluator that has no table of its own: its value and its other numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from typing import Any

from lowrank_lab.records.labels import word
from lowrank_lab.reporting.section import Measured, Section, number

SHOWN_SEPARATELY = ("metric", "value", "protocol", "not_finite", "reason")
LONGEST = 40  # characters of an entry of the protocol in a caption


@cache
def other(metric: str) -> Section:
    """The section of a metric that no other section shows. It is not known whether low or high is good."""
    return Section(
        metric=metric,
        title=metric + " with",
        must_agree=None,
        describe=_describe,
        cells=lambda measured: {metric: _value(measured), **_texts(measured)},
        details=_numbers,
    )


def _describe(protocol: Mapping[str, Any]) -> str:
    """The short entries of the protocol; of a hash its first digits."""
    entries = {name: value[:8] if _is_hash(value) else word(value) for name, value in protocol.items()}
    told = [f"{name}={text}" for name, text in entries.items() if len(text) <= LONGEST]
    return ", ".join(told) or "no protocol on record"


def _is_hash(value: Any) -> bool:
    return isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef")


def _value(measured: Measured) -> str:
    value = measured["value"]
    return number(value) if value is None or _is_number(value) else word(value)


def _texts(measured: Measured) -> dict[str, str]:
    return {name: number(value) for name, value in _numbers(measured).items()}


def _numbers(measured: Measured) -> dict[str, float]:
    """The numbers beside ``value``; lists and the like stand in the record alone."""
    return {name: value for name, value in measured.items() if name not in SHOWN_SEPARATELY and _is_number(value)}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
