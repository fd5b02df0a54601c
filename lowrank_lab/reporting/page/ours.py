"""Our own tables of the page: the cells of every grid, and all that was measured by comparable set."""

from __future__ import annotations

import re
from typing import Any

import pandas as pd

from lowrank_lab.records.results import Results
from lowrank_lab.reporting.page.table import Cell, Column, Row, Table, number_in, ratio_tag
from lowrank_lab.reporting.status import asked, count
from lowrank_lab.reporting.tables import all_groups, outdated, presentable

NAMES = ("method", "variant", "counts")  # columns of a table that are no numbers
LABEL = r"(\S+)(?: ratio=([\d.e-]+))?(?: (.+))? (\S+) (\S+)"  # method, ratio, quantization, model, data set
OUTDATED = "made by other component versions; run it again"
URGENCY = ("failed", "outdated", "skipped", "preempted", "missing", "running", "queued", "done")
COSTS = ("parameters (M)", "bits a weight", "size (MB)", "compression (s)", "evaluation (s)")


def grids(results: Results) -> list[Table]:
    """A table a grid with the state of its cells, those first that need a look; folded up where none does."""
    cells = asked(results)
    found = []
    for number, name in enumerate(sorted({cell.grid for cell in cells}), start=1):
        of_grid = sorted((cell for cell in cells if cell.grid == name), key=lambda cell: URGENCY.index(cell.state))
        rows = []
        for cell in of_grid:
            keys = (cell.key,) if cell.recorded else ()
            why = OUTDATED if cell.state == "outdated" else cell.reason
            rows.append(_row(Cell(cell.state, None, keys, kind=f"state {cell.state}"), cell.label, why))
        counts = count(of_grid)
        is_open = any(counts[state] for state in ("failed", "outdated", "skipped", "preempted"))
        found.append(_table(f"grid-{number}", name, "state", rows, counts, is_open))
    return found


def _table(
    id: str, title: str, first: str, rows: list[Row], counts: dict[str, int] | None = None, is_open: bool = True
) -> Table:
    """A table of rows by ``_row``, without the columns that say nothing in any of them."""
    names = (first, "method", "ratio", "compression", "model", "data set", "reason")
    filled = [n for n in range(len(names)) if any(row.cells[n].text not in ("", "none") for row in rows)]
    shown = tuple(Row(tuple(row.cells[n] for n in filled), row.tags) for row in rows)
    return Table(id, title, tuple(Column(names[n]) for n in filled), shown, counts or {}, is_open)


def _row(first: Cell, label: str, reason: str) -> Row:
    """A row of a cell, known by its label alone: a cell that has not run has no record."""
    found = re.fullmatch(LABEL, label)
    method, ratio, quantization, model, dataset = found.groups(default="") if found else (label, "", "", "—", "—")
    ratio = ratio_tag(ratio or 1)
    texts = (Cell(method), Cell(ratio, float(ratio)), Cell(quantization or "none"), Cell(model), Cell(dataset))
    return Row((first, *texts, Cell(reason)), {"model": [model], "method": [method], "ratio": [ratio]})


def measured(records: list[dict[str, Any]]) -> list[Table]:
    """A table for each comparable set of each kind of measurement."""
    found = []
    for number, (section, caption, group) in enumerate(all_groups(records), start=1):
        shown = presentable(group, section)
        names = [str(name) for name in shown]
        rows = []
        for index, *texts in shown.itertuples(name=None):
            record = group.loc[index]
            cells = tuple(_cell(name, text, record["key"]) for name, text in zip(names, texts, strict=True))
            rows.append(Row(cells, _tags(record)))
        found.append(Table(f"own-{number}", caption, tuple(map(Column, names)), tuple(rows)))
    return found


def _cell(column: str, text: str, key: str) -> Cell:
    if column in NAMES:
        return Cell(text)
    # The costs are in the same record as the measurement beside them: one link less to step over.
    return Cell(text, number_in(text), () if column in ("ratio", "reached", *COSTS) else (key,))


def without_number(records: list[dict[str, Any]]) -> Table | None:
    """The cells that ran and have no number to show, with the reason."""
    rows = []
    for record in records:
        state = "outdated" if outdated(record) else record["status"]
        if state != "done":
            why = OUTDATED if state == "outdated" else record["reason"]
            rows.append(_row(Cell(state, None, (record["key"],), kind=f"state {state}"), record["label"], why))
    return _table("without-number", "Cells without a number", "state", rows) if rows else None


def left_out(records: list[dict[str, Any]]) -> Table | None:
    """The evaluators that measured nothing, since the model does not suit them."""
    rows = [
        _row(Cell(name, None, (record["key"],)), record["label"], why)
        for record in records
        if record["status"] == "done"
        for name, why in record.get("left_out", {}).items()
    ]
    return _table("left-out", "Left out, since the model does not suit it", "evaluator", rows) if rows else None


def _tags(record: pd.Series) -> dict[str, list[str]]:
    return {"model": [record["model"]], "method": [record["method"]], "ratio": [ratio_tag(record["ratio"])]}
