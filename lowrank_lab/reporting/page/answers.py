"""What the models of the page wrote, a table a question."""

from __future__ import annotations

from typing import Any

from lowrank_lab.reporting import generation
from lowrank_lab.reporting.page import tags
from lowrank_lab.reporting.page.ours import method
from lowrank_lab.reporting.page.table import Cell, Column, Row, Table, number_in
from lowrank_lab.reporting.sections import REPETITION
from lowrank_lab.reporting.tables import groups

COLUMNS = tuple(map(Column, ("method", "ratio", *generation.ANSWER)))


def answers(records: dict[str, dict[str, Any]]) -> list[Table]:
    """A table for each question that the models of ``records`` (by key) were asked; the first is unfolded."""
    found: list[Table] = []
    for caption, group in groups(list(records.values()), REPETITION):
        for question, how, texts in generation.answered(group, generation.printable):
            rows = []
            for (_, row), (greedy, repetition, sampled, of_sampled) in zip(group.iterrows(), texts, strict=True):
                cells = (
                    method(row),
                    Cell(f"{row['ratio']:g}", row["ratio"]),
                    *(Cell(greedy, kind="answer"), Cell(repetition, number_in(repetition), (row["key"],))),
                    *(Cell(sampled, kind="answer"), Cell(of_sampled, number_in(of_sampled), (row["key"],))),
                )
                rows.append(Row(cells, tags.of_measurement(records[row["key"]], row)))
            id, title = f"answers-{len(found) + 1}", f"{question} ({how}; {group['model'].iloc[0]})"
            found.append(Table(id, title, COLUMNS, tuple(rows), open=not found, about=caption))
    return found
