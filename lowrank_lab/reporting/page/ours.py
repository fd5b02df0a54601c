"""Our own tables of the page: all that was measured by comparable set, answers, and the cells of every grid."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pandas as pd

from lowrank_lab.records.results import Results
from lowrank_lab.reporting import generation
from lowrank_lab.reporting.page import tags
from lowrank_lab.reporting.page.ranking import alike, best, plain_dense, spelled
from lowrank_lab.reporting.page.table import Cell, Column, Row, Table, number_in
from lowrank_lab.reporting.page.tags import Tags
from lowrank_lab.reporting.section import Section
from lowrank_lab.reporting.sections import PERPLEXITY, REPETITION
from lowrank_lab.reporting.status import asked, count
from lowrank_lab.reporting.tables import all_groups, groups, outdated, presentable

Records = dict[str, dict[str, Any]]  # by key
OUTDATED = "made by other component versions; run it again"
URGENCY = ("failed", "outdated", "skipped", "preempted", "missing", "running", "queued", "done")
BEFORE = ("ratio",)  # of a cell's facts those that stand before what was measured, and those behind it
BEHIND = (
    *("counts", "reached", "bits a weight", "size (MB)", "parameters (M)"),
    *("compression (s)", "evaluation (s)"),
)
BEST = "the best of those with its ratio and bits a weight"
TIMES = "× dense"


def measured(records: Records) -> list[Table]:
    """A table for each comparable set of each kind of measurement."""
    found = []
    for number, (section, caption, group) in enumerate(all_groups(list(records.values())), start=1):
        shown = presentable(group, section)
        if section is PERPLEXITY and (dense := plain_dense(group)):
            times = group["value"].map(lambda value, dense=dense: f"{value / dense:,.3g}")
            shown.insert(list(shown).index("perplexity") + 1, TIMES, times.where(group["value"].notna(), "—"))
        of_measurement = [str(name) for name in shown if name not in ("method", "variant", *BEFORE, *BEHIND)]
        names = [name for name in (*BEFORE, *of_measurement, *BEHIND) if name in shown]
        marked = _best(shown[of_measurement], group, section)
        rows = []
        for place, (index, texts) in enumerate(shown.iterrows()):
            record = records[group.loc[index, "key"]]
            # Costs are in the same record as the measurement beside them: one link less to step over.
            keys = {name: (record["key"],) if name in of_measurement and name != TIMES else () for name in names}
            cells = [Cell(texts[n], _sort(n, texts[n]), keys[n], **_mark((place, n) in marked)) for n in names]
            rows.append(Row((_method(group.loc[index]), *cells), tags.of_measurement(record, group.loc[index])))
        found.append(Table(f"own-{number}", caption, tuple(map(Column, ("method", *names))), tuple(rows)))
    return found


def _method(row: pd.Series) -> Cell:
    """Method and variant in one cell, so that both stay in view."""
    return Cell(row["method"], below=spelled(row["told"]))


def _mark(is_best: bool) -> dict[str, str]:
    return {"mark": "★", "kind": "best", "title": BEST} if is_best else {}


def _sort(column: str, text: str) -> float | None:
    return None if column == "counts" else number_in(text)


def _best(shown: pd.DataFrame, group: pd.DataFrame, section: Section) -> set[tuple[int, str]]:
    """Row and column of each number that is the best of the cells compressed alike."""
    if not section.alike:
        return set()
    within = alike(group).reset_index(drop=True)
    found = set()
    for name in shown:
        numbers = shown[name].map(number_in).reset_index(drop=True).astype(float)
        found |= {(place, name) for place in best(numbers, within, section.ascending) if name != TIMES}
    return found


def answers(records: Records) -> list[Table]:
    """A table for each question that models were asked; the first is unfolded."""
    found: list[Table] = []
    for caption, group in groups(list(records.values()), REPETITION):
        shown = presentable(group, REPETITION)
        for question, how, texts in generation.answered(group, generation.printable):
            rows = []
            for (index, facts), answer in zip(shown.iterrows(), texts, strict=True):
                record = records[group.loc[index, "key"]]
                greedy, repetition, sampled, of_sampled = answer
                cells = (
                    Cell(facts["ratio"], number_in(facts["ratio"])),
                    *(Cell(greedy, kind="answer"), Cell(repetition, number_in(repetition), (record["key"],))),
                    *(Cell(sampled, kind="answer"), Cell(of_sampled, number_in(of_sampled), (record["key"],))),
                )
                rows.append(Row((_method(group.loc[index]), *cells), tags.of_measurement(record, group.loc[index])))
            columns = tuple(map(Column, ("method", "ratio", *generation.ANSWER)))
            title = f"{question} ({how}; {group['model'].iloc[0]})"
            found.append(Table(f"answers-{len(found) + 1}", title, columns, tuple(rows), open=not found, about=caption))
    return found


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
