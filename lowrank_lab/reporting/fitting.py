"""Tables as Markdown, also for a terminal that is narrower than they are."""

from __future__ import annotations

from textwrap import fill

import pandas as pd

NEVER_DROPPED = ("method", "variant", "ratio")
FIRST_DROPPED = (  # what says least about a method
    "evaluation (s)",
    "compression (s)",
    "parameters (M)",
    "reached",
    "bits a weight",
    "size (MB)",
)
NARROWEST_VARIANT = 16
HEADER_PADDING = 2  # of tabulate


def as_markdown(table: pd.DataFrame, widths: list[int | None] | None = None) -> str:
    """A table of text as Markdown; ``widths`` are those at which the text of a column is broken."""
    return table.to_markdown(index=False, disable_numparse=True, maxcolwidths=widths)


def fitted(table: pd.DataFrame, width: int, csv: str) -> str:
    """A table of text as Markdown in ``width`` characters, with a line about the columns left out.

    Where that is not enough, the variant is broken over lines. A table whose least columns are wider stays so.
    """
    dropped: list[str] = []
    for name in _in_order_of_dropping(table):
        if width_of(table) <= width:
            break
        table = table.drop(columns=name)
        dropped.append(name)
    widths: list[int | None] = [None] * table.shape[1]
    if (excess := width_of(table) - width) > 0 and "variant" in table:
        place = list(table).index("variant")
        widths[place] = max(NARROWEST_VARIANT, _widths(table)[place] - excess)
    text = as_markdown(table, widths)
    if dropped:
        text += "\n\n" + fill(f"(not in {width} columns: {', '.join(dropped)}; {csv} has all)", width)
    return text


def width_of(table: pd.DataFrame) -> int:
    """The characters of a line of the table in Markdown."""
    return sum(found + 3 for found in _widths(table)) + 1


def _widths(table: pd.DataFrame) -> list[int]:
    return [max(len(str(name)) + HEADER_PADDING, *(len(text) for text in table[name])) for name in table]


def _in_order_of_dropping(table: pd.DataFrame) -> list[str]:
    """Costs first, then what was measured from its last column on; its mean, or its first column, stays."""
    names = [str(name) for name in table]
    costs = [name for name in FIRST_DROPPED if name in names]
    measured = [name for name in names if name not in (*costs, *NEVER_DROPPED, "counts")]
    main = "mean" if "mean" in measured else measured[0]
    least = [name for name in reversed(measured) if name != main]
    return [*costs, *least, *(name for name in names if name == "counts")]
