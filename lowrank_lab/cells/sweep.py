"""The jobs of a grid: the product of the swept values, and further products beside it. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override

from lowrank_lab.cells.hydra_private import combinations

Axes = dict[str, str]  # by the name of an axis, the word for it: "ratio=0.8,0.6"


def jobs(params: Mapping[str, Any], also: Sequence[Mapping[str, Any]], words: list[str]) -> list[list[str]]:
    """The overrides of each job of ``hydra.sweeper``, for the ``words`` of a command line.

    ``params`` are swept in every combination. Each of ``also`` is a grid like it in which some axes have other
    values (None: it has no such axis): lines of a table that have not all settings of the others. A word for an
    axis in which the grids differ chooses among them: it leaves out those that have none of its values. Where it
    has a value of no grid, or the words leave out all, they are about ``params`` alone.
    """
    grids = [_axes({**params, **changes}) for changes in ({}, *also)]
    differing = {name for changes in also for name in changes}
    found = []
    for axes in grids:
        chosen = [
            _narrowed(word, axes, grids) if word.get_key_element() in differing else str(word.input_line)
            for word in _parsed(words)
        ]
        kept = [word for word in chosen if word is not None]
        if len(kept) == len(chosen):
            found += _product(axes, kept)
    return found or _product(grids[0], words)


def _narrowed(word: Override, axes: Axes, grids: list[Axes]) -> str | None:
    """What a word says of one of the ``grids``, whose axes are ``axes``; None where it leaves that out."""
    name, asked = word.get_key_element(), _values(word)
    if own := [value for value in asked if value in _values_of(axes, name)]:
        return f"{name}={','.join(own)}"
    elsewhere = any(value in _values_of(other, name) for other in grids for value in asked)
    return str(word.input_line) if axes is grids[0] and not elsewhere else None


def _product(axes: Axes, words: list[str]) -> list[list[str]]:
    return combinations(_parsed([*axes.values(), *words]))


def _axes(params: Mapping[str, Any]) -> Axes:
    return {name: f"{name}={value}" for name, value in params.items() if value is not None}


def _values_of(axes: Axes, name: str) -> list[str]:
    return _values(_parsed([axes[name]])[0]) if name in axes else []


def _values(word: Override) -> list[str]:
    return list(word.sweep_string_iterator()) if word.is_sweep_override() else [word.get_value_element_as_str()]


def _parsed(words: list[str]) -> list[Override]:
    return OverridesParser.create().parse_overrides(words)
