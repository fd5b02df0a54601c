"""One style for all figures: colour-blind safe, readable in print and at half size."""

from __future__ import annotations

import io
import textwrap
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter

# Okabe and Ito's palette, distinct with every common kind of colour blindness; then darker and softer ones of Tol.
COLOURS = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"),
    *("#999933", "#882255", "#44AA99", "#332288", "#661100", "#CC6677", "#117733", "#DDCC77", "#AA4499", "#7F7F7F"),
)
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES: Any = ("-", (0, (4, 1.5)), (0, (1, 1)), (0, (6, 1.5, 1, 1.5)), (0, (3, 1, 1, 1, 1, 1)), (0, (9, 3)))
DENSE: Any = {"color": "0.35", "linestyle": "--", "linewidth": 1.5}
STYLE: Any = {
    "font.size": 14,
    "axes.labelsize": 15,
    "legend.fontsize": 13,
    "legend.handlelength": 2.8,
    "lines.linewidth": 2.2,
    "lines.markersize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "figure.dpi": 150,
    "svg.hashsalt": "lowrank_lab",
}


def look(number: int, line: int = 0) -> dict[str, Any]:
    """Colour, marker and style of a line: no colour comes twice before all are used, and then in another style.

    ``line`` counts the styles of one colour, for what is told apart within it.
    """
    times = number // len(COLOURS)
    return {
        "color": COLOURS[number % len(COLOURS)],
        "marker": MARKERS[(number + times) % len(MARKERS)],
        "linestyle": LINES[(times + line) % len(LINES)],
    }


def readable(value: float, _: object = None) -> str:
    """A tick as people read it: 0.5, 25, 1,500, 20 k, 3 M."""
    return f"{value:,g}" if value < 1e4 else EngFormatter()(value)


def log_scale(axes: Axes, values: pd.Series) -> None:
    """A log scale for ``values``, with ticks at round numbers as people read them."""
    axes.set_yscale("log")
    span = values.max() / values.min()
    if span < 10:
        axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    elif span < 1e4:
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(readable)
    axes.yaxis.set_minor_formatter(NullFormatter())


def label_of(name: str, variant: str) -> str:
    """A line's name in the legend."""
    return textwrap.fill(f"{name} ({variant})" if variant else name, 36)


def save(figure: plt.Figure, file: Path) -> None:
    """Write a PNG or PDF."""
    file.write_bytes(content(figure, file.suffix.removeprefix(".")))


def content(figure: plt.Figure, kind: str) -> bytes:
    """A figure as "png" or "pdf" without its date of creation, so that the same records give the same bytes."""
    file = io.BytesIO()
    figure.savefig(file, format=kind, metadata={"CreationDate": None} if kind == "pdf" else {"Software": None})
    return file.getvalue()


def wrapped(caption: str) -> str:
    return "\n".join(textwrap.wrap(caption, 72))
