"""The cells that the recipes of a table or figure asked for, each with its record where it has run."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from lowrank_lab.records.results import Results
from lowrank_lab.reporting.status import state_of


@dataclass(frozen=True)
class Cell:
    """A cell that a recipe asked for: its label, and its record where there is one."""

    key: str
    label: str
    record: dict[str, Any] | None

    @property
    def status(self) -> str:
        """Why there is no number; "done" where there may be one."""
        state, reason = state_of(self.record)
        return f"{state} ({reason})" if reason else state


def recipe_cells(recipes: Collection[str], results: Results, methods: Collection[str] = ()) -> list[Cell]:
    """The cells of all grids that were run with one of ``recipes``, and all of ``methods``; later ones first."""
    asked: dict[str, str] = {}
    for grid in results.grids():
        if experiment_of(grid["name"]) in recipes:
            asked |= grid["cells"]
    asked |= {r["key"]: r["label"] for r in (results.records() if methods else []) if r["method"] in methods}
    cells = [Cell(key, label, results.find(key)) for key, label in sorted(asked.items())]
    return sorted(cells, key=lambda cell: (cell.record or {}).get("started", ""), reverse=True)


def experiment_of(grid_name: str) -> str | None:
    """The experiment that a grid's command line names."""
    found = re.search(r"(?:^|\s)\+?experiment=(\w+)", grid_name)
    return found and found.group(1)
