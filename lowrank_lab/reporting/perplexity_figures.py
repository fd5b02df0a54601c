"""Perplexity against the ratio and against the bits kept: two figures of a comparable set, in the same colours."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, NullFormatter

from lowrank_lab.reporting.drawing import DENSE, LINES, MARKERS, STYLE, label_of, log_scale, look, wrapped
from lowrank_lab.reporting.tables import in_words, is_dense, present


def against_ratio(group: pd.DataFrame) -> pd.DataFrame:
    """The rows that ``perplexity_against_ratio`` shows.

    Quantized cells are compared by bits, and ratios of a part of the model would stand at the wrong place.
    """
    of_ratio = (group["method"] != "dense") & group["whole"] & (group["quantized"] == "none")
    return group[of_ratio | is_dense(group)]


def perplexity_against_ratio(group: pd.DataFrame, caption: str) -> plt.Figure | None:
    """Perplexity (log scale) against the fraction of all linears kept: a colour a method, a style a variant."""
    shown = against_ratio(group)
    compressed = shown[~is_dense(shown)]
    if compressed.empty:
        return None
    numbers = _numbers(group)
    variants = compressed["told"].map(lambda told: in_words(present(told)))
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(7.2, 4.8), layout="constrained")
        for method, of_method in compressed.groupby("method", sort=True):
            for style, (variant, line) in enumerate(of_method.groupby(variants, sort=True)):
                line = line.sort_values("ratio_reached")
                looks = look(numbers[method], style)
                axes.plot(line["ratio_reached"], line["value"], **looks, label=label_of(method, variant))
        _dense_line(axes, shown)
        log_scale(axes, shown["value"])
        _ticks_at(axes, compressed["ratio"])
        axes.margins(x=0.1)
        words = " (remapped: words)" if (compressed["counted"] == "16-bit words").any() else ""
        axes.set_xlabel(f"ratio of compressible parameters{words} kept")
        axes.set_ylabel("perplexity")
        axes.set_title(wrapped(caption), fontsize=11)
        if len(axes.get_lines()) <= 6:
            axes.legend(frameon=False)
        else:  # next to the axes: inside it would hide the lines
            figure.set_size_inches(11, max(4.8, 0.45 * len(axes.get_lines())))
            figure.legend(loc="outside right upper", frameon=False)
    return figure


def _numbers(group: pd.DataFrame) -> dict[str, int]:
    """By method its number for ``look``: the same in both figures."""
    return {name: number for number, name in enumerate(sorted(set(group["method"]) - {"dense"}))}


def _dense_line(axes: Axes, rows: pd.DataFrame) -> None:
    """The dense model's perplexity; in other dtypes it is hardly another."""
    for value in rows.loc[is_dense(rows), "value"].map("{:.4g}".format).unique():
        axes.axhline(float(value), **DENSE, label=f"dense ({value})")


def _ticks_at(axes: Axes, ratios: pd.Series) -> None:
    """Ticks at the ratios that were asked for, if their numbers have room."""
    ticks = sorted(ratios.unique())
    closest = min((b - a for a, b in pairwise(ticks)), default=1)
    if closest >= (ticks[-1] - ticks[0]) / 10:
        axes.set_xticks(ticks)


def against_bits(group: pd.DataFrame) -> pd.DataFrame:
    """The rows that ``perplexity_against_bits`` shows."""
    return group[group["whole"]]


def perplexity_against_bits(group: pd.DataFrame, caption: str) -> plt.Figure | None:
    """Perplexity against the bits kept for each weight of the dense linears, both on log scales.

    The colour tells the method, the style of the line the ratio and other compressions, the marker how the weights
    are rounded. A line goes through those cells that none of it with as few bits beats; the others are hollow. None
    without quantized cells.
    """
    rows = against_bits(group)
    cells = rows[~is_dense(rows)].sort_values(
        ["ratio", "others", "bits", "value"], ascending=[False, True, True, True]
    )
    if (cells["quantized"] == "none").all():
        return None
    others = cells["others"].map(lambda others: others and f", {others}")
    cells = cells.assign(kept=cells["ratio"].map("ratio {:g}".format) + others)
    colours = _colours(cells, _numbers(group))
    styles = {kept: LINES[number % len(LINES)] for number, kept in enumerate(dict.fromkeys(cells["kept"]))}
    ways = sorted(cells["quantized"].unique(), key=lambda way: (way != "none", way))
    markers = {way: MARKERS[number % len(MARKERS)] for number, way in enumerate(ways)}
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(11, 6), layout="constrained")
        joined = set()  # of the styles with which some line joins two points or more
        for (method, kept), line in cells.groupby(["method", "kept"], sort=False):
            front = _draw_line(axes, line, f"{method}, {kept}", colours[method], styles[kept], markers)
            joined |= {kept} if front > 1 else set()
        _dense_line(axes, rows)
        axes.set_xscale("log", base=2)
        _bit_ticks(axes, cells["bits"])
        log_scale(axes, rows["value"])
        axes.set_xlabel("bits kept for each weight of the dense linears")
        axes.set_ylabel("perplexity")
        axes.set_title(wrapped(caption), fontsize=11)
        parts = {
            "method": [Line2D([], [], color=colour, linewidth=5, label=name) for name, colour in colours.items()],
            "kept": [Line2D([], [], color="0.2", linestyle=styles[k], label=k) for k in styles if k in joined],
            "rounded by": [Line2D([], [], color="0.2", marker=markers[w], linestyle="", label=w) for w in ways],
        }
        _legend_of_parts(figure, axes, parts)
    return figure


def _colours(cells: pd.DataFrame, numbers: dict[str, int]) -> dict[str, str]:
    """By method its colour; the dense model in few bits has that of the dense line."""
    shown = {"dense": DENSE["color"], **{name: look(number)["color"] for name, number in numbers.items()}}
    return {name: colour for name, colour in shown.items() if (cells["method"] == name).any()}


def _draw_line(
    axes: Axes, line: pd.DataFrame, label: str, colour: str, style: object, markers: dict[str, str]
) -> int:
    """One line, by rising bits, through its best cells, and the markers of all; returns how many are the best."""
    best = line["value"] <= line["value"].cummin()
    axes.plot(line["bits"][best], line["value"][best], color=colour, linestyle=style, label=label)
    for (way, is_best), points in line.groupby(["quantized", best]):
        fill = "full" if is_best else "none"
        looks: dict[str, Any] = {"color": colour, "fillstyle": fill, "markeredgewidth": 1.6, "label": "_points"}
        axes.plot(points["bits"], points["value"], markers[str(way)], **looks)
    return int(best.sum())


def _bit_ticks(axes: Axes, bits: pd.Series) -> None:
    """Numbers of bits that people use; of a narrow range as many as there is room for."""
    if bits.max() < 2 * bits.min():
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    else:
        usual = (1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32)
        axes.set_xticks([tick for tick in usual if bits.min() / 1.3 <= tick <= bits.max() * 1.3])
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())


def _legend_of_parts(figure: plt.Figure, axes: Axes, parts: dict[str, list[Line2D]]) -> None:
    """One legend beside the axes, with the dense line first and each of its parts under a heading."""
    handles = [line for line in axes.get_lines() if str(line.get_label()).startswith("dense (")]
    for heading, of_part in parts.items():
        bold = heading.replace(" ", "~")
        handles += [Line2D([], [], linestyle="", label=f"$\\bf{{{bold}}}$"), *of_part] if of_part else []
    figure.set_size_inches(11, max(6, 0.33 * len(handles) + 0.5))
    figure.legend(handles=handles, loc="outside right upper", frameon=False)
