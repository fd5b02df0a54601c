"""Tables as Markdown, also for a terminal that is narrower than they are."""

from __future__ import annotations

from textwrap import fill

import pandas as pd

NEVER_DROPPED = ("method", "variant", "ratio")
# What says least about a method, first.
COSTS = ("evaluation (s)", "compression (s)", "MACs an image (M)", "parameters (M)", "reached")
# What quantized rows, and images with merged tokens, are compared by, the most important last.
SIZES = ("size (MB)", "counts", "bits a weight", "MACs kept")
NARROWEST_VARIANT = 16
HEADER_PADDING = 2  # of tabulate


def as_markdown(table: pd.DataFrame, widths: list[int | None] | None = None) -> str:
    """A table of text as Markdown; ``widths`` are those at which the text of a column is broken."""
    return table.to_markdown(index=False, disable_numparse=True, maxcolwidths=widths)


def fitted(table: pd.DataFrame, width: int, csv: str) -> str:
    """A table of text as Markdown in ``width`` characters, with a line about the columns left out.

    Costs, and columns that say the same in all rows, go before the variant is broken over lines; all others only
    where a variant of NARROWEST_VARIANT characters is still too wide. A table whose least columns are wider stays
    so.
    """
    dropped: list[str] = []
    cheap = _same_in_all_rows(table)
    cheap += [name for name in COSTS if name in table and name not in cheap]
    for name in (*cheap, *_dear(table, cheap)):
        if width_of(table, None if name in cheap else NARROWEST_VARIANT) <= width:
            break
        dropped.append(f"{name} = {table[name].iloc[0]}" if name in _same_in_all_rows(table) else name)
        table = table.drop(columns=name)
    widths: list[int | None] = [None] * table.shape[1]
    if (excess := width_of(table) - width) > 0 and "variant" in table:
        place = list(table).index("variant")
        widths[place] = max(NARROWEST_VARIANT, _widths(table)[place] - excess)
    text = as_markdown(table, widths)
    if dropped:
        text += "\n\n" + fill(f"(not in {width} columns: {', '.join(dropped)}; {csv} has all)", width)
    return text


def width_of(table: pd.DataFrame, variant: int | None = None) -> int:
    """The characters of a line of the table in Markdown, its variant at most ``variant`` wide."""
    widths = dict(zip(table, _widths(table), strict=True))
    if variant is not None and "variant" in widths:
        widths["variant"] = min(widths["variant"], variant)
    return sum(found + 3 for found in widths.values()) + 1


def _widths(table: pd.DataFrame) -> list[int]:
    return [max(len(str(name)) + HEADER_PADDING, *(len(text) for text in table[name])) for name in table]


def _measured(table: pd.DataFrame) -> list[str]:
    """The columns of the measurement that may go, from the last on: its mean, or its first column, stays."""
    names = [str(name) for name in table if name not in (*NEVER_DROPPED, *COSTS, *SIZES)]
    main = "mean" if "mean" in names else names[0]
    return [name for name in reversed(names) if name != main]


def _same_in_all_rows(table: pd.DataFrame) -> list[str]:
    """Such columns as one sentence can tell; in a table of one row these would be all."""
    names = [name for name in (*COSTS, *SIZES, *_measured(table)) if name in table]
    return [name for name in names if len(table) > 1 and table[name].nunique() == 1]


def _dear(table: pd.DataFrame, cheap: list[str]) -> list[str]:
    """All other columns that may go; sizes last where they are what rows are compared by."""
    sizes = [name for name in SIZES if name in table]
    measured = _measured(table)
    names = [*measured, *sizes] if "bits a weight" in table else [*sizes, *measured]
    return [name for name in names if name not in cheap]
