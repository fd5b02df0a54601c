"""Figures from records alone. One style: colour-blind safe, readable in print and at half size."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.ticker import MaxNLocator, NullFormatter

from lowrank_lab.reporting.kinds.errors import linear_names
from lowrank_lab.reporting.sections import OUTPUT_ERROR, PERPLEXITY, SPEED, TRUNCATION
from lowrank_lab.reporting.tables import all_groups

# Okabe and Ito's palette: distinct with every common kind of colour blindness, and by marker in grey.
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


def look(number: int) -> dict[str, Any]:
    """Colour and marker of a line; shifted once the colours are used up, so that no pair comes twice."""
    marker = MARKERS[(number + number // len(COLOURS)) % len(MARKERS)]
    return {"color": COLOURS[number % len(COLOURS)], "marker": marker}


def label_of(name: str, variant: str) -> str:
    """A line's name in the legend."""
    return textwrap.fill(f"{name} ({variant})" if variant else name, 36)


def perplexity_against_ratio(group: pd.DataFrame, caption: str) -> plt.Figure | None:
    """Perplexity (log scale) against the fraction of all linears kept, a line for each method."""
    if not ((group["method"] != "dense") & group["whole"]).any():
        return None
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(7.2, 4.8), layout="constrained")
        # Ratios of part of the model would stand at the wrong place on this axis.
        compressed = group[(group["method"] != "dense") & group["whole"]]
        for number, ((method, variant), line) in enumerate(compressed.groupby(["method", "variant"], sort=True)):
            line = line.sort_values("ratio_reached")
            axes.plot(
                line["ratio_reached"],
                line["value"],
                **look(number),
                label=label_of(method, variant),
            )
        dense = group[group["method"] == "dense"]
        for value, variant in zip(dense["value"], dense["variant"], strict=True):
            label = f"dense ({variant}, {value:.4g})" if variant else f"dense ({value:.4g})"
            axes.axhline(value, color="0.35", linestyle="--", label=label)
        axes.set_yscale("log")
        if group["value"].max() < 10 * group["value"].min():  # plain numbers, where powers of ten would say nothing
            axes.yaxis.set_major_locator(MaxNLocator(6))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xticks(sorted(compressed["ratio"].unique()))
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


def perplexity_figure(group: pd.DataFrame, caption: str) -> plt.Figure | None:
    """Against the ratio; where cells are quantized, against the bits kept, which alone compares these."""
    quantized = (group["quantized"] != "none").any()
    return perplexity_against_bits(group, caption) if quantized else perplexity_against_ratio(group, caption)


def perplexity_against_bits(group: pd.DataFrame, caption: str) -> plt.Figure:
    """Perplexity against the bits kept for each weight of the dense linears, both on log scales.

    A line for each method, way to quantize and other compressions, over ratios and formats alike, through those
    cells that none of its line with as few bits beats; the others are fainter.
    """
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(11, 6), layout="constrained")
        rows = group[group["whole"]]
        plain = (rows["method"] == "dense") & (rows["quantized"] == "none") & (rows["others"] == "")
        lines = rows[~plain].groupby(["method", "quantized", "others"])
        for number, ((method, quantized, others), line) in enumerate(lines):
            line = line.sort_values(["bits", "value"])
            best = line["value"] <= line["value"].cummin()
            label = label_of(method, ", ".join(name for name in (others, quantized) if name not in ("", "none")))
            axes.plot(line["bits"][best], line["value"][best], **look(number), label=label)
            axes.plot(line["bits"][~best], line["value"][~best], **look(number), linestyle="", alpha=0.4)
        for value in rows[plain]["value"].map("{:.4g}".format).unique():  # in other dtypes it is hardly another
            axes.axhline(float(value), color="0.35", linestyle="--", label=f"dense ({value})")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xlabel("bits kept for each weight of the dense linears")
        axes.set_ylabel("perplexity")
        axes.set_title(wrapped(caption), fontsize=11)
        figure.legend(loc="outside right upper", frameon=False)
    return figure


def speed_against_settings(group: pd.DataFrame, caption: str) -> plt.Figure | None:
    """Tokens a second over those of the dense model, as Dobi-SVD's Figure 4 varies batch size and prompt length.

    A line for each compressed cell: medians of the ratios in its own run, with their quartiles. Tokens a second of
    two runs are not drawn together: a machine that does other work in one of them would decide what is faster.
    """
    compressed = group[group["method"] != "dense"]
    if compressed.empty:
        return None
    settings = [(one["batch_size"], one["prompt"]) for one in compressed["measured"].iloc[0]["settings"]]
    batch, prompt = settings[0]
    sweeps = [
        ("batch size", f"prompts of {prompt} tokens", sorted(s for s in settings if s[1] == prompt), 0),
        ("prompt length (tokens)", f"batch size {batch}", sorted(s for s in settings if s[0] == batch), 1),
    ]
    sweeps = [sweep for sweep in sweeps if len(sweep[2]) > 1]
    if not sweeps:
        return None
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(
            2, len(sweeps), figsize=(5.6 * len(sweeps), 8), sharey="row", squeeze=False, layout="constrained"
        )
        for phase, of_phase in zip(("prefill", "decode"), grid, strict=True):
            for (xlabel, fixed, shown, varied), axes in zip(sweeps, of_phase, strict=True):
                x = [setting[varied] for setting in shown]
                axes.axhline(1, color="0.35", linestyle="--", label="dense")
                for number, (_, row) in enumerate(compressed.iterrows()):
                    ratios = _ratios(row["measured"], phase, shown)
                    axes.errorbar(
                        x,
                        ratios["median"],
                        yerr=[ratios["median"] - ratios["q1"], ratios["q3"] - ratios["median"]],
                        capsize=3,
                        **look(number),
                        label=label_of(f"{row['method']} {row['ratio']:g}", row["variant"]),
                    )
                axes.set_xscale("log")
                axes.set_xticks(x, [str(value) for value in x])
                axes.minorticks_off()
                axes.set_xlabel(xlabel)
                axes.set_title(fixed, fontsize=12)
            of_phase[0].set_ylabel(f"{phase}, × dense")
        figure.suptitle(wrapped(caption), fontsize=11)
        handles, labels = grid[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    return figure


def _ratios(measured: dict[str, Any], phase: str, settings: list[tuple[int, int]]) -> pd.DataFrame:
    """Median and quartiles of the ratios in these settings; nan where memory ran out."""
    found = {(one["batch_size"], one["prompt"]): one[f"{phase}_ratio"] for one in measured["settings"]}
    return pd.DataFrame([found[setting] or {} for setting in settings], columns=["median", "q1", "q3"], dtype=float)


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
                axes.plot(
                    range(len(errors)),
                    errors,
                    **look(number),
                    markevery=max(1, len(errors) // 8),
                    label=label_of(f"{row['method']} {row['ratio']:g}", row["variant"]),
                )
            axes.set_title(title, fontsize=13)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        for axes in grid[:, 0]:
            axes.set_ylabel("relative output error")
        for axes in grid[-1]:
            axes.set_xlabel("block")
        figure.suptitle(wrapped(caption), fontsize=11)
        figure.legend(*grid.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return figure


def truncation_against_ratio(group: pd.DataFrame, caption: str) -> plt.Figure | None:
    """The rise of the loss against the rank of one truncated linear: its activations or its weight, by block."""
    finite = group[group["value"].notna()]
    if finite.empty:
        return None
    measured = finite["measured"].iloc[0]  # cells that differ in their dtype alone would look the same
    points = pd.DataFrame(measured["points"])
    return truncations(points.assign(dense_nll=measured["dense_nll"]), caption)


def truncations(points: pd.DataFrame, caption: str) -> plt.Figure:
    """The ``points`` of eval=truncation, each with ``dense_nll``: a panel a linear, a colour a block."""
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
                        line[f"{kind}_nll"] - line["dense_nll"],
                        style,
                        **look(number),
                        label=f"block {block}, {kind}",
                    )
            axes.axhline(0, color="0.35", linestyle=":", label="dense")
            axes.set_yscale("symlog", linthresh=0.01)  # from losses that are noise to models that are destroyed
            axes.set_title(name, fontsize=13)
            axes.set_xlabel("rank / min(out, in)")
        for axes in grid[:, 0]:
            axes.set_ylabel("loss above dense (nats)")
        figure.suptitle(wrapped(caption), fontsize=11)
        figure.legend(*grid.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return figure


# By metric, a figure of one comparable set, or None where there is nothing to draw.
FIGURES: dict[str, Callable[[pd.DataFrame, str], plt.Figure | None]] = {
    PERPLEXITY.metric: perplexity_figure,
    SPEED.metric: speed_against_settings,
    OUTPUT_ERROR.metric: output_error_against_block,
    TRUNCATION.metric: truncation_against_ratio,
}


LONGEST_NAME = 100  # characters of a model's in the name of a file, of which file systems allow 255


def drawn(records: list[dict[str, Any]]) -> Iterator[tuple[str, str, plt.Figure]]:
    """Name, caption and figure of each comparable set that can be drawn; each is closed when the next is asked."""
    for section, caption, group in all_groups(records):
        if section.metric not in FIGURES:
            continue
        figure = FIGURES[section.metric](group, caption)
        if figure is None:
            continue
        first = group.iloc[0]
        what = [
            section.metric,
            first["model"][:LONGEST_NAME],
            first["protocol_text"].split(",")[0],
            first["identity"][:6],
        ]
        yield re.sub(r"[^A-Za-z0-9._-]+", "-", "_".join(what)), caption, figure
        plt.close(figure)


def write(records: list[dict[str, Any]], folder: Path) -> list[Path]:
    """Write each comparable set as PNG and PDF; returns the files written."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name, _, figure in drawn(records):
        for suffix in ("png", "pdf"):
            files.append(folder / f"{name}.{suffix}")
            save(figure, files[-1])
    return files


def save(figure: plt.Figure, file: Path) -> None:
    """Write a PNG or PDF without its date of creation, so that the same records give the same bytes."""
    figure.savefig(file, metadata={"CreationDate": None} if file.suffix == ".pdf" else {"Software": None})


def wrapped(caption: str) -> str:
    return "\n".join(textwrap.wrap(caption, 72))
