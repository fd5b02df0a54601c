"""The states of cells on the page: those of every grid, and which have no number, with the reason."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lowrank_lab.records.results import Results
from lowrank_lab.reporting import tables
from lowrank_lab.reporting.page import tags
from lowrank_lab.reporting.page.table import Cell, Column, Row, Table
from lowrank_lab.reporting.page.tags import Tags
from lowrank_lab.reporting.status import asked, count
from lowrank_lab.reporting.tables import outdated

Records = dict[str, dict[str, Any]]  # by key
OUTDATED = "made by other component versions; run it again"
URGENCY = ("failed", "outdated", "skipped", "preempted", "missing", "running", "queued", "done")


def grids(results: Results, records: Records) -> list[Table]:
    """A table a grid with the state of its cells, those first that need a look."""
    cells = asked(results)
    quantizations = sorted({record["quantization"]["name"] for record in records.values()} - {tags.NONE})
    found = []
    for number, name in enumerate(sorted({cell.grid for cell in cells}), start=1):
        of_grid = sorted((cell for cell in cells if cell.grid == name), key=lambda cell: URGENCY.index(cell.state))
        rows = []
        for cell in of_grid:
            keys = (cell.key,) if cell.recorded else ()
            why = OUTDATED if cell.state == "outdated" else cell.reason
            record = records.get(cell.key)
            under = tags.of_record(record) if record else tags.of_label(cell.label, quantizations)
            rows.append(_row(Cell(cell.state, None, keys, kind=f"state {cell.state}"), cell.label, why, under))
        found.append(_table(f"grid-{number}", name, "state", rows, count(of_grid)))
    return found


def without_number(records: Records) -> Iterator[Table]:
    """The cells that ran and have no number to show, with the reason."""
    rows = []
    for record in records.values():
        state = "outdated" if outdated(record) else record["status"]
        if state != "done":
            why = OUTDATED if state == "outdated" else record["reason"]
            first = Cell(state, None, (record["key"],), kind=f"state {state}")
            rows.append(_row(first, record["label"], why, tags.of_record(record)))
    if rows:
        yield _table("without-number", "Cells without a number", "state", rows)


def left_out(records: Records) -> Iterator[Table]:
    """The evaluators that measured nothing, since the model does not suit them."""
    rows = [
        _row(Cell(name, None, (record["key"],)), record["label"], why, tags.of_record(record))
        for record in records.values()
        if record["status"] == "done"
        for name, why in record.get("left_out", {}).items()
    ]
    if rows:
        yield _table("left-out", "Left out, since the model does not suit it", "evaluator", rows)


def in_doubt(records: Records) -> Iterator[Table]:
    """The numbers that came with a warning."""
    found = tables.in_doubt(records.values())
    rows = [_row(Cell(name, None, (r["key"],)), r["label"], why, tags.of_record(r)) for r, name, why in found]
    if rows:
        yield _table("in-doubt", "Numbers in doubt", "evaluator", rows)


def _table(id: str, title: str, first: str, rows: list[Row], counts: dict[str, int] | None = None) -> Table:
    """A table of rows by ``_row``, without the columns that say nothing in any of them; folded up."""
    names = (first, "method", "ratio", "compression", "model", "data set", "reason")
    filled = [n for n in range(len(names)) if any(row.cells[n].text not in ("", "none") for row in rows)]
    shown = tuple(Row(tuple(row.cells[n] for n in filled), row.tags) for row in rows)
    return Table(id, title, tuple(Column(names[n]) for n in filled), shown, counts or {}, open=False)


def _row(first: Cell, label: str, reason: str, under: Tags) -> Row:
    """A row of a cell, known by its label alone: a cell that has not run has no record."""
    method, ratio, told, model, dataset = tags.parts(label)
    texts = (Cell(method), Cell(ratio, float(ratio)), Cell(told or "none"), Cell(model), Cell(dataset))
    return Row((first, *texts, Cell(reason)), under)
