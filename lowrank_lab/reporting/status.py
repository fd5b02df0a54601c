"""The state of all cells that commands have asked for."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from lowrank_lab.basics.paths import RUN
from lowrank_lab.launching import jobs
from lowrank_lab.records.results import FINISHED, Results
from lowrank_lab.reporting.tables import outdated

STATES = ("done", "failed", "skipped", "running", "queued", "preempted", "missing", "outdated")
ACTIVE = ("running", "queued")
ALWAYS_COUNTED = ("done", "failed", "skipped", "missing")


@dataclass(frozen=True)
class Asked:
    """A cell that a grid asked for: one of STATES, the reason or who works on it, and whether there is a record."""

    grid: str
    key: str
    label: str
    state: str
    reason: str
    recorded: bool


def state_of(record: dict[str, Any] | None) -> tuple[str, str]:
    """Of a cell's record, or of one that has none: which of STATES, and of a failed or skipped cell the reason."""
    if record is None:
        return "missing", ""
    if outdated(record):
        return "outdated", ""
    return record["status"], record["reason"] if record["status"] in ("failed", "skipped") else ""


def asked(results: Results) -> list[Asked]:
    """The cells of every grid, in the order of their labels; a cell of several grids stands in each."""
    known = {record["key"]: record for record in results.records()}
    grids: dict[str, dict[str, str]] = {}
    for grid in results.grids():  # the same command may have asked for other cells later
        grids.setdefault(grid["name"], {}).update(grid["cells"])
    states = {key: state_of(known.get(key)) for cells in grids.values() for key in cells}
    for key, (state, _) in states.items():
        if state == "missing":
            states[key] = state, results.why_missing(key)
    unfinished = [key for key, (state, _) in states.items() if state not in FINISHED]
    for key, (state, why) in jobs.states(results, unfinished).items():
        if state in ACTIVE or key not in known:  # a record says more than how a job ended
            states[key] = state, why
    return [
        Asked(name, key, label, *states[key], key in known)
        for name, cells in grids.items()
        for key, label in sorted(cells.items(), key=lambda item: item[1])
    ]


def count(cells: list[Asked]) -> dict[str, int]:
    """How many cells are in each of STATES; one that is in several grids counts once."""
    total = Counter({cell.key: cell.state for cell in cells}.values())
    return {state: total[state] for state in STATES}


def status(results: Results) -> str:
    """One line a cell with its state below each grid, and a count at the end."""
    cells = asked(results)
    if not cells:
        return f"no grid has been run in {results.root} yet; start with: {RUN}"
    lines = []
    for grid in dict.fromkeys(cell.grid for cell in cells):
        lines.append(f"grid: {grid}")
        lines += [f"  {cell.state:10}{cell.label}{_explain(cell, results)}" for cell in cells if cell.grid == grid]
    total = ", ".join(
        f"{number} {state}" for state, number in count(cells).items() if number or state in ALWAYS_COUNTED
    )
    return "\n".join([*lines, total])


def _explain(cell: Asked, results: Results) -> str:
    where = f"; traceback in {results.path(cell.key)}" if cell.state == "failed" and cell.recorded else ""
    return f"  ({cell.reason}{where})" if cell.reason else ""
