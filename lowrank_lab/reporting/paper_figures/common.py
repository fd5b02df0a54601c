"""What the papers' figures have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import Colormap

from lowrank_lab.records.results import compression_of
from lowrank_lab.reporting.drawing import STYLE, wrapped
from lowrank_lab.reporting.kinds.errors import linear_names
from lowrank_lab.reporting.tables import outdated

Records = list[dict[str, Any]]
STEPS: Colormap = plt.get_cmap("viridis_r").resampled(256)  # yellow to purple: what follows one after the other


@dataclass(frozen=True)
class PaperFigure:
    """One figure of a paper, or one panel where the panels have different recipes.

    title   what it shows, with its number
    recipe  the experiment in conf/experiment/ that is made for it; catalogue.yaml names others that do too
    data    from records of these what it shows: tidy, in a fixed order, with no rows where no record has it
    draw    from ``data``, as it is or read from a CSV, the figure
    """

    title: str
    recipe: str
    data: Callable[[Records], pd.DataFrame]
    draw: Callable[[pd.DataFrame], plt.Figure]


def done(records: Records) -> Records:
    """The records with numbers of the present versions, in a fixed order."""
    found = [record for record in records if record["status"] == "done" and not outdated(record)]
    return sorted(found, key=lambda r: (r["model"], r["dataset"], r["method"], -r["ratio"], r["key"]))


def tidy(rows: Iterable[dict[str, Any]], columns: list[str], by: list[str]) -> pd.DataFrame:
    """``rows`` as a frame with these ``columns``, sorted ``by`` some of them; rows that are equal once."""
    frame = pd.DataFrame(list(rows), columns=columns)
    return frame.sort_values(by, kind="stable").drop_duplicates().reset_index(drop=True)


def compressions(records: Records, entry: str) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """The records whose low-rank compression has this entry, with what it says."""
    for record in done(records):
        if entry in (compression := compression_of(record, "lowrank")) and "sites" in compression:
            yield record, compression


def measured(records: Records, metric: str) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """The records that measured ``metric``, each with what was measured, where it is a number."""
    for record in done(records):
        for found in record["metrics"].values():
            if found["metric"] == metric and found["value"] is not None:
                yield record, found


def linear(site: dict[str, Any]) -> str:
    """The linears of a site by their paths within a block, as its type."""
    return "+".join(site["linears"])


def short_names(linears: Iterable[str]) -> dict[str, str]:
    """By linear, a short name for titles and axes, in the order of their first occurrence."""
    return linear_names(dict.fromkeys(linears))


def first_of(frame: pd.DataFrame, *columns: str) -> pd.DataFrame:
    """The rows that agree with the first in ``columns``: a figure shows one model."""
    return frame[(frame[list(columns)] == frame[list(columns)].iloc[0]).all(axis=1)]


def subject(frame: pd.DataFrame) -> str:
    """The model and method of the first row, for a title."""
    return f"{frame['model'].iloc[0]}, {frame['method'].iloc[0]}"


def panels(count: int, columns: int, sharey: bool, height: float = 3.4) -> tuple[plt.Figure, list[Axes]]:
    """A figure of ``count`` panels in rows of at most ``columns``; call it within the style."""
    columns = min(columns, count)
    rows = -(-count // columns)
    size = (max(7.2, 3.8 * columns), height * rows + 1.4)
    figure, grid = plt.subplots(rows, columns, figsize=size, sharey=sharey, squeeze=False, layout="constrained")
    for axes in grid.flat[count:]:
        axes.set_visible(False)
    return figure, list(grid.flat[:count])


def legend_below(figure: plt.Figure, axes: Axes, columns: int) -> None:
    """The lines of ``axes`` named below all panels."""
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=columns, frameon=False)


def style() -> Any:
    """The context in which every figure is drawn."""
    return plt.rc_context(STYLE)


def title(figure: plt.Figure, text: str) -> None:
    figure.suptitle(wrapped(text), fontsize=11)
