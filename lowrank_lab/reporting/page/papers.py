"""The published tables of the page, each number with ours."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from lowrank_lab.basics.paths import CONF, RUN
from lowrank_lab.records.results import Results
from lowrank_lab.reporting import published
from lowrank_lab.reporting.joined import join
from lowrank_lab.reporting.matching import quantization_of, settings_in
from lowrank_lab.reporting.page.table import Cell, Column, Row, Table, number_in, ratio_tag
from lowrank_lab.reporting.page.tags import NONE, Tags
from lowrank_lab.reporting.paper_tables import (
    LINE,
    column_name,
    difference_text,
    left_out,
    letters,
    ours_text,
    setting_apart,
)
from lowrank_lab.reporting.protocols import another_model
from lowrank_lab.reporting.published import Published
from lowrank_lab.reporting.recipe_cells import recipe_cells

STEPS = (0.01, 0.05, 0.2)  # relative differences from which on a number has a stronger colour


@dataclass(frozen=True)
class Paper:
    """A published table: what the source says of it, the table, and its marks and notes spelled out."""

    source: Published
    table: Table
    marks: dict[str, str]
    notes: list[str]

    @property
    def compared(self) -> bool:
        """Whether a number of ours has its difference from the published one."""
        return any(cell.below for row in self.table.rows for cell in row.cells[1:])

    @property
    def command(self) -> str:
        return " and ".join(f"{RUN} -m experiment={name}" for name in self.source.recipes)


def paper(name: str, results: Results) -> Paper | None:
    """The published table ``name`` with our numbers; None where none of its recipes has a record."""
    if not published.entry(name).get("recipes"):
        return None
    source = published.load(name)
    if all(cell.record is None for cell in recipe_cells(source.recipes, results)):
        return None
    joined = setting_apart(join(source, results))
    marks = letters(joined)
    return Paper(source, _table(source, joined, marks), marks, [*_notes(joined), *left_out(joined)])


def _table(source: Published, joined: pd.DataFrame, marks: dict[str, str]) -> Table:
    """A row a line of the source, and for each of its columns what is published and ours."""
    filled = [name for name in ("quantization", "variant") if (joined[name].replace("none", "") != "").any()]
    if joined["model"].nunique() > 1:
        filled = ["model", *filled]
    columns = [Column("method"), Column("ratio")]
    heads = {column_name(row): source.also.get(row["dataset"], row["dataset"]) for _, row in joined.iterrows()}
    columns += [Column(kind, head, heads[head]) for head in heads for kind in ("published", "ours")]
    rows = []
    by_model = [rows for _, rows in joined.groupby("model", sort=False)]
    for line in (line for rows_of_one in by_model for _, line in rows_of_one.groupby(LINE, sort=False)):
        first = line.iloc[0]
        told = ", ".join(first[name] for name in filled if first[name] not in ("", "none"))
        cells = [Cell(published.printed(first["method"]), below=told)]
        cells.append(Cell(first["ratio"] or "—", number_in(first["ratio"])))
        numbers = {column_name(row): row for _, row in line.iterrows()}
        for head in heads:
            if head in numbers:
                cells += [_published(numbers[head]), _ours(numbers[head], source, marks)]
            else:
                cells += [Cell("—"), Cell("—")]
        rows.append(Row(tuple(cells), _tags(line, source)))
    models = joined["model"].unique()
    title = f"{source.name}: {source.title}" + (f" ({models[0]})" if len(models) == 1 else "")
    return Table(source.name.replace("/", "-"), title, tuple(columns), tuple(rows))


def _tags(line: pd.DataFrame, source: Published) -> Tags:
    """A line is found by its own model and method, and by those that we measured in their place."""
    first = line.iloc[0]
    models = [first["model"], *(model for model in line["our_model"] if model)]
    methods = [first["method"], source.also.get(first["method"], first["method"])]
    datasets = [source.also.get(name, name) for name in line["dataset"] if name]
    return {
        "model": list(dict.fromkeys(models)),
        "dataset": list(dict.fromkeys(datasets)) or [NONE],
        "method": list(dict.fromkeys(methods)),
        "ratio": [ratio_tag(first["ratio"])],
        "quantization": [quantization_of(first["quantization"], source)],
        "variant": [f"{name}={value}" for name, value in settings_in(first["variant"])] or [NONE],
    }


def _published(row: pd.Series) -> Cell:
    note = "*" if row["note"] else ""
    return Cell(row["published"] or "—", number_in(row["published"]), mark=note, title=row["note"])


def _ours(row: pd.Series, source: Published, marks: dict[str, str]) -> Cell:
    """Our number, coloured by how far it is from the published one of its model, or what became of the cell."""
    keys = tuple(row["keys"].split())
    if row["status"] != "done":
        return _without_number(row["status"], keys, row["method"], source)
    below, kind = "", ""
    reference = number_in(row["published"])
    if reference and pd.notna(row["difference"]) and not another_model(row["differs"], row["our_model"]):
        relative = row["difference"] / abs(reference)
        below = f"{_minus(difference_text(row))} · {_relative(relative)}"
        kind = _colour(relative) + (" muted" if row["differs"] else "")
    text = ours_text(row, {})
    mark = marks.get(row["differs"], "")
    return Cell(text, number_in(text), keys, row["differs"], mark, below, kind)


def _without_number(status: str, keys: tuple[str, ...], method: str, source: Published) -> Cell:
    state, _, reason = status.partition(" (")
    if state == "left out":
        return Cell("—", title=reason.removesuffix(")"))
    ours = CONF / "method" / f"{source.also.get(method, method)}.yaml"
    if state == "missing" and not ours.is_file():
        return Cell("—", title="a method that lowrank_lab does not have")
    return Cell(state, None, keys, reason.removesuffix(")"), kind=f"state {state.replace(' ', '-')}")


def _colour(relative: float) -> str:
    """The class of a relative difference: "agrees", or "over" or "under" with how many steps it reaches."""
    steps = sum(abs(relative) >= step for step in STEPS)
    return f"{'over' if relative > 0 else 'under'}{steps}" if steps else "agrees"


def _relative(relative: float) -> str:
    """In percent, and as a multiple from ten times on."""
    if relative < 9:
        return _minus(f"{100 * relative:+.{0 if abs(relative) >= 0.1 else 1}f} %")
    multiple = 1 + relative
    return f"× {multiple:,.0f}" if multiple < 1e6 else f"× {multiple:.2e}"


def _minus(text: str) -> str:
    return text.replace("-", "−", 1) if text.startswith("-") else text


def _notes(joined: pd.DataFrame) -> list[str]:
    """What the source or we say of single published numbers, those with the same note together."""
    noted = joined[joined["note"] != ""]
    found = []
    for note, rows in noted.groupby("note", sort=False):
        places = [f"{row['model']} {row['method']} {row['ratio']} {column_name(row)}" for _, row in rows.iterrows()]
        found.append(f"{'; '.join(' '.join(place.split()) for place in places)}: {note}")
    return found
