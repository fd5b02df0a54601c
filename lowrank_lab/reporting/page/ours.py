"""Our own tables of the page: all that was measured, by comparable set."""

from __future__ import annotations

from typing import Any

import pandas as pd

from lowrank_lab.reporting.page import tags
from lowrank_lab.reporting.page.ranking import alike, best, plain_dense, spelled
from lowrank_lab.reporting.page.table import Cell, Column, Row, Table, number_in
from lowrank_lab.reporting.section import Section
from lowrank_lab.reporting.sections import PERPLEXITY
from lowrank_lab.reporting.tables import all_groups, presentable

# Of a cell's facts those that stand behind what was measured, so that this is in view on a phone.
BEHIND = (
    *("counts", "reached", "MACs kept", "bits a weight", "size (MB)", "parameters (M)", "MACs an image (M)"),
    *("compression (s)", "evaluation (s)"),
)
TIMES = "× dense"
BEST = "the best of those with its ratio and bits a weight"


def measured(records: dict[str, dict[str, Any]]) -> list[Table]:
    """A table for each comparable set of each kind of measurement; ``records`` by key."""
    sets = enumerate(all_groups(list(records.values())), start=1)
    return [_table(f"own-{number}", caption, group, section, records) for number, (section, caption, group) in sets]


def _table(
    id: str, caption: str, group: pd.DataFrame, section: Section, records: dict[str, dict[str, Any]]
) -> Table:
    shown = presentable(group, section)
    numbers = [str(name) for name in shown if name not in ("method", "variant", "ratio", *BEHIND)]
    marked = _best(shown[numbers], group, section)
    if section is PERPLEXITY and (dense := plain_dense(group)):
        shown.insert(list(shown).index("perplexity"), TIMES, [_times(value, dense) for value in group["value"]])
    names = [name for name in ("ratio", *numbers, TIMES, *BEHIND) if name in shown]
    rows = []
    for place, (index, *texts) in enumerate(shown[names].itertuples(name=None)):
        row = group.loc[index]
        cells = [method(row)]
        for name, text in zip(names, texts, strict=True):
            # Costs are in the same record as the measurement beside them: one link less to step over.
            keys = (row["key"],) if name in numbers else ()
            is_best = (place, name) in marked
            sort = None if name == "counts" else number_in(text)
            cells.append(Cell(text, sort, keys, *((BEST, "★", "", "best") if is_best else ())))
        rows.append(Row(tuple(cells), tags.of_measurement(records[row["key"]], row)))
    return Table(id, caption, tuple(map(Column, ("method", *names))), tuple(rows))


def method(row: pd.Series) -> Cell:
    """Method and variant in one cell, so that both stay in view."""
    return Cell(row["method"], below=spelled(row["told"]))


def _times(value: float, dense: float) -> str:
    times = value / dense
    if pd.isna(times):
        return "—"
    return f"{times:.3g}" if times < 1000 else f"{times:,.0f}" if times < 1e6 else f"{times:.2e}"


def _best(shown: pd.DataFrame, group: pd.DataFrame, section: Section) -> set[tuple[int, str]]:
    """Row and column of each number that is the best of the cells compressed alike."""
    if not section.alike:
        return set()
    within = alike(group).reset_index(drop=True)
    found: set[tuple[int, str]] = set()
    for name in map(str, shown):
        numbers = pd.Series([number_in(text) for text in shown[name]], dtype=float)
        found |= {(place, name) for place in best(numbers, within, section.ascending)}
    return found
