"""How tables show a kind of measurement. Each of ``kinds/`` is one; sections.py lists them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Measured = Mapping[str, Any]  # what an evaluator returned: metric, value, protocol and more


@dataclass(frozen=True)
class Section:
    """One kind of measurement in reports.

    metric        the evaluators' ``metric`` that it shows
    title         what stands in captions: "<model>, <title> <describe(protocol)>"
    must_agree    the entries of the protocol that must agree for two numbers to stand in one table; None: all of it
    entries       those of the measurement that ``cells`` cannot do without
    describe      the protocol in one line
    cells         the measurement's columns as people read them, in order; of a measurement in several settings one
                  dict for each, which has its row
    details       its numbers in full precision, by the name of their column in the CSV, besides ``value``
    ascending     whether the lowest value ranks first
    alike         whether this holds for all its columns, so that the best of each can be marked
    """

    metric: str
    title: str
    must_agree: tuple[str, ...] | None
    describe: Callable[[Mapping[str, Any]], str]
    cells: Callable[[Measured], dict[str, str] | list[dict[str, str]]]
    details: Callable[[Measured], dict[str, float]] = lambda measured: {}
    ascending: bool = True
    alike: bool = False
    entries: tuple[str, ...] = ()

    def shows(self, measured: Measured) -> bool:
        """Whether this is its kind of measurement, with all that it reads: others may use the same name."""
        protocol = measured.get("protocol") or {}
        known = set(self.must_agree or ()) <= protocol.keys() and set(self.entries) <= measured.keys()
        return measured["metric"] == self.metric and known

    @property
    def file(self) -> str:
        """The name of its CSV."""
        return re.sub(r"[^\w.-]+", "_", self.metric) + ".csv"


def number(value: float | None, form: str = "{:.4g}") -> str:
    """A number as text; nan for the None of a model whose logits are not finite."""
    return "nan" if value is None else form.format(value)


def fraction(value: float | None) -> str:
    """A fraction as text; — where there is none."""
    return "—" if value is None else f"{value:.3f}"
