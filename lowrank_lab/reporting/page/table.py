"""What a table of the page is made of; the template says how it looks."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Cell:
    """One cell.

    text    what people read
    sort    its number, where it is one: sorts before all text
    keys    the records it is from: a link
    title   what a pointer over it says
    mark    the letter of how protocols differ, explained below the table
    below   a second, smaller line
    kind    a class of style.css: "state failed", "over2 muted", ...
    """

    text: str
    sort: float | None = None
    keys: tuple[str, ...] = ()
    title: str = ""
    mark: str = ""
    below: str = ""
    kind: str = ""

    @property
    def link(self) -> str:
        """Opens the records: the script reads it, so it works together with the filters in the same address."""
        return "#" + "&".join(f"record={key}" for key in self.keys)


@dataclass(frozen=True)
class Column:
    """A column: its name, that of the columns it stands with ("" for a column alone), and its data set, if it is of
    one: it is hidden where the filter names others."""

    name: str
    group: str = ""
    dataset: str = ""


@dataclass(frozen=True)
class Row:
    """Its cells, and by filter (see tags.py) the values under which it is shown."""

    cells: tuple[Cell, ...]
    tags: dict[str, list[str]]


@dataclass(frozen=True)
class Table:
    """``id`` names it in the address, ``about`` says more than the title. Of a grid's cells, ``counts`` says how
    many are in each state. ``open``: not folded up."""

    id: str
    title: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    counts: dict[str, int] = field(default_factory=dict)
    open: bool = True
    about: str = ""

    @property
    def numeric(self) -> set[int]:
        """The columns that hold numbers."""
        cells = ((number, cell) for row in self.rows for number, cell in enumerate(row.cells))
        return {number for number, cell in cells if cell.sort is not None}

    @property
    def groups(self) -> list[tuple[str, list[tuple[int, str]]]]:
        """The columns by their group, in order, each with its number; columns alone are a group of one."""
        found: list[tuple[str, list[tuple[int, str]]]] = []
        for number, column in enumerate(self.columns):
            if column.group and found and found[-1][0] == column.group:
                found[-1][1].append((number, column.name))
            else:
                found.append((column.group, [(number, column.name)]))
        return found


def number_in(text: str) -> float | None:
    """The number that a text begins with ("0.24 ± 0.04", "27,660"); None where there is none, or nan."""
    found = re.match(r"[+-]?\d[\d,]*(\.\d+)?(e[+-]?\d+)?", text)
    value = float(found.group().replace(",", "")) if found else math.nan
    return value if math.isfinite(value) else None


def ratio_tag(ratio: str | float) -> str:
    """A ratio as the filter has it: "0.8" for 0.80, "none" for a line without one."""
    return "none" if ratio == "" else f"{float(ratio):g}"
