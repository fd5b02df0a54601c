"""Figures from records alone. One style: colour-blind safe, readable in print and at half size."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.ticker import MaxNLocator

from lowrank_lab.reporting.sections import OUTPUT_ERROR, PERPLEXITY, TRUNCATION, linear_names
from lowrank_lab.reporting.tables import WHOLE, all_groups

# Okabe and Ito's palette: told apart with every common kind of colour blindness, and by marker in grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
STYLE: Any = {
    "font.size": 14,
    "axes.labelsize": 15,
    "legend.fontsize": 13,
    "lines.linewidth": 2.2,
    "lines.markersize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "figure.dpi": 150,
    "svg.hashsalt": "lowrank_lab",
}


def perplexity_against_ratio(group: pd.DataFrame, caption: str) -> plt.Figure | None:
    """Perplexity (log scale) against the fraction of all linears kept, a line for each method."""
    if not ((group["method"] != "dense") & group["counted"].isin(WHOLE)).any():
        return None
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(7.2, 4.8), layout="constrained")
        # Ratios of part of the model would stand at the wrong place on this axis.
        compressed = group[(group["method"] != "dense") & group["counted"].isin(WHOLE)]
        for number, ((method, variant), line) in enumerate(compressed.groupby(["method", "variant"], sort=True)):
            line = line.sort_values("ratio_reached")
            axes.plot(
                line["ratio_reached"],
                line["value"],
                color=COLOURS[number % len(COLOURS)],
                # Shifted once the colours are used up, so that no pair comes twice.
                marker=MARKERS[(number + number // len(COLOURS)) % len(MARKERS)],
                label=textwrap.fill(f"{method} ({variant})" if variant else method, 36),
            )
        dense = group[group["method"] == "dense"]
        for value, variant in zip(dense["value"], dense["variant"], strict=True):
            label = f"dense ({variant}, {value:.4g})" if variant else f"dense ({value:.4g})"
            axes.axhline(value, color="0.35", linestyle="--", label=label)
        axes.set_yscale("log")
        axes.set_xticks(sorted(compressed["ratio"].unique()))
        axes.margins(x=0.1)
        words = " (remapped: words)" if (compressed["counted"] == "16-bit words").any() else ""
        axes.set_xlabel(f"ratio of compressible parameters{words} kept")
        axes.set_ylabel("perplexity")
        axes.set_title(_wrapped(caption), fontsize=11)
        if len(axes.get_lines()) <= 6:
            axes.legend(frameon=False)
        else:  # beside the axes: inside it would hide the lines
            figure.set_size_inches(11, max(4.8, 0.45 * len(axes.get_lines())))
            figure.legend(loc="outside right upper", frameon=False)
    return figure


def output_error_against_block(group: pd.DataFrame, caption: str) -> plt.Figure | None:
    """Relative error of every block's output: its own, and with that of the blocks before it; a line a cell.

    Above in the Frobenius norm over all tokens, below as the mean over the tokens, to which massive activations of
    a few tokens do not matter.
    """
    finite = group[group["value"].notna()]
    if finite.empty:
        return None
    panels = {
        "own": "own error, all tokens",
        "accumulated": "with the blocks before, all tokens",
        "own_of_tokens": "own error, mean of the tokens",
        "accumulated_of_tokens": "with the blocks before, mean of the tokens",
    }
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(2, 2, figsize=(12, 8), sharex=True, sharey=True, layout="constrained")
        for axes, (kind, title) in zip(grid.flat, panels.items(), strict=True):
            for number, (_, row) in enumerate(finite.iterrows()):
                errors = row["measured"]["blocks"][kind]
                what = f"{row['method']} {row['ratio']:g}"
                axes.plot(
                    range(len(errors)),
                    errors,
                    color=COLOURS[number % len(COLOURS)],
                    marker=MARKERS[(number + number // len(COLOURS)) % len(MARKERS)],
                    markevery=max(1, len(errors) // 8),
                    label=textwrap.fill(f"{what} ({row['variant']})" if row["variant"] else what, 36),
                )
            axes.set_title(title, fontsize=13)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        for axes in grid[:, 0]:
            axes.set_ylabel("relative output error")
        for axes in grid[-1]:
            axes.set_xlabel("block")
        figure.suptitle(_wrapped(caption), fontsize=11)
        figure.legend(*grid.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return figure


def truncation_against_ratio(group: pd.DataFrame, caption: str) -> plt.Figure | None:
    """The rise of the loss against the rank of one truncated linear: its activations or its weight, by block."""
    finite = group[group["value"].notna()]
    if finite.empty:
        return None
    measured = finite["measured"].iloc[0]  # cells that differ in their dtype alone would look the same
    points = pd.DataFrame(measured["points"])
    names = linear_names(points["linear"].unique())
    columns = min(4, len(names))
    rows = -(-len(names) // columns)
    with plt.rc_context(STYLE):
        size = (3.6 * columns, 3.4 * rows + 1.6)
        figure, grid = plt.subplots(rows, columns, figsize=size, sharey=True, squeeze=False, layout="constrained")
        for axes in grid.flat[len(names) :]:
            axes.set_visible(False)
        for axes, (path, name) in zip(grid.flat, names.items(), strict=False):
            for number, (block, line) in enumerate(points[points["linear"] == path].groupby("block")):
                line = line.sort_values("ratio")
                for kind, style in (("activation", "-"), ("weight", "--")):
                    axes.plot(
                        line["ratio"],
                        line[f"{kind}_nll"] - measured["dense_nll"],
                        style,
                        color=COLOURS[number % len(COLOURS)],
                        marker=MARKERS[number % len(MARKERS)],
                        label=f"block {block}, {kind}",
                    )
            axes.axhline(0, color="0.35", linestyle=":", label="dense")
            axes.set_yscale("symlog", linthresh=0.01)  # from losses that are noise to models that are destroyed
            axes.set_title(name, fontsize=13)
            axes.set_xlabel("rank / min(out, in)")
        for axes in grid[:, 0]:
            axes.set_ylabel("loss above dense (nats)")
        figure.suptitle(_wrapped(caption), fontsize=11)
        figure.legend(*grid.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return figure


# By metric, a figure of one comparable set, or None where there is nothing to draw.
FIGURES: dict[str, Callable[[pd.DataFrame, str], plt.Figure | None]] = {
    PERPLEXITY.metric: perplexity_against_ratio,
    OUTPUT_ERROR.metric: output_error_against_block,
    TRUNCATION.metric: truncation_against_ratio,
}


def write(records: list[dict[str, Any]], folder: Path) -> list[Path]:
    """Write each comparable set as PNG and PDF; returns the files written."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for section, caption, group in all_groups(records):
        if section.metric not in FIGURES:
            continue
        figure = FIGURES[section.metric](group, caption)
        if figure is None:
            continue
        first = group.iloc[0]
        what = [section.metric, first["model"], first["protocol_text"].split(",")[0], first["identity"][:6]]
        for suffix in ("png", "pdf"):
            file = folder / f"{re.sub(r'[^A-Za-z0-9._-]+', '-', '_'.join(what))}.{suffix}"
            # No creation date, so that the same records give the same bytes.
            figure.savefig(file, metadata={"CreationDate": None} if suffix == "pdf" else {"Software": None})
            files.append(file)
        plt.close(figure)
    return files


def _wrapped(caption: str) -> str:
    return "\n".join(textwrap.wrap(caption, 72))
