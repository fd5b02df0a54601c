"""Our own tables of the page: the cells of every grid, and all that was measured by comparable set."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from lowrank_lab.reporting.page.table import Cell, Column, Row, Table, number_in, ratio_tag
from lowrank_lab.reporting.status import Asked, asked, count
from lowrank_lab.reporting.tables import all_groups, outdated, presentable
from lowrank_lab.results import Results

NAMES = ("method", "variant", "counts")  # columns of a table that are no numbers
COSTS = ("parameters (M)", "bits a weight", "size (MB)", "compression (s)", "evaluation (s)")


def grids(results: Results) -> list[Table]:
    """A table a grid with the state of its cells; folded up where all are done."""
    cells = asked(results)
    found = []
    for number, name in enumerate(dict.fromkeys(cell.grid for cell in cells), start=1):
        of_grid = [cell for cell in cells if cell.grid == name]
        counts = count(of_grid)
        columns = ("state", "method", "ratio", "model", "cell", "reason")
        rows = tuple(_asked_row(cell) for cell in of_grid)
        unfinished = counts["done"] < len(of_grid)
        table = Table(f"grid-{number}", name, _columns(columns), rows, counts=counts, open=unfinished)
        found.append(table)
    return found


def _asked_row(cell: Asked) -> Row:
    """A cell of a grid. One that has not run is known by its label alone: method, ratio, …, model, data set."""
    words = cell.label.split()
    method, model = words[0], words[-2] if len(words) > 2 else "—"
    ratio = re.search(r" ratio=(\S+)", cell.label)
    of = ratio_tag(ratio.group(1)) if ratio else "1"
    keys = () if cell.state == "missing" else (cell.key,)
    texts = (Cell(method), Cell(of, float(of)), Cell(model), Cell(cell.label), Cell(cell.reason))
    tags = {"model": [model], "method": [method], "ratio": [of]}
    return Row((Cell(cell.state, None, keys, kind=f"state {cell.state}"), *texts), tags)


def measured(records: list[dict[str, Any]]) -> list[Table]:
    """A table for each comparable set of each kind of measurement."""
    found = []
    for number, (section, caption, group) in enumerate(all_groups(records), start=1):
        shown = presentable(group, section)
        rows = []
        for index, *texts in shown.itertuples(name=None):
            record = group.loc[index]
            cells = tuple(_cell(name, text, record["key"]) for name, text in zip(shown, texts, strict=True))
            rows.append(Row(cells, _tags(record)))
        found.append(Table(f"own-{number}", caption, _columns(map(str, shown)), tuple(rows)))
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
            why = record.get("reason", "") if state != "outdated" else "made by other component versions; run it again"
            rows.append(_record_row(record, Cell(state, None, (record["key"],), kind=f"state {state}"), why))
    columns = _columns(("state", "method", "ratio", "model", "cell", "reason"))
    return Table("without-number", "Cells without a number", columns, tuple(rows)) if rows else None


def left_out(records: list[dict[str, Any]]) -> Table | None:
    """The evaluators that measured nothing, since the model does not suit them."""
    rows = [
        _record_row(record, Cell(name, None, (record["key"],)), why)
        for record in records
        if record["status"] == "done"
        for name, why in record.get("left_out", {}).items()
    ]
    columns = _columns(("evaluator", "method", "ratio", "model", "cell", "reason"))
    return Table("left-out", "Left out, since the model does not suit it", columns, tuple(rows)) if rows else None


def _record_row(record: dict[str, Any], first: Cell, why: str) -> Row:
    ratio = ratio_tag(record["ratio"])
    texts = (Cell(record["method"]), Cell(ratio, float(ratio)), Cell(record["model"]))
    return Row((first, *texts, Cell(record["label"]), Cell(why)), _tags(record))


def _tags(record: Any) -> dict[str, list[str]]:
    return {"model": [record["model"]], "method": [record["method"]], "ratio": [ratio_tag(record["ratio"])]}


def _columns(names: Iterable[str]) -> tuple[Column, ...]:
    return tuple(Column(name) for name in names)
