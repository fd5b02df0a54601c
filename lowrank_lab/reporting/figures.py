"""Figures from records alone. One style: colour-blind safe, readable in print and at half size."""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter

from lowrank_lab.reporting.kinds.errors import linear_names
from lowrank_lab.reporting.sections import OUTPUT_ERROR, PERPLEXITY, SPEED, TRUNCATION
from lowrank_lab.reporting.tables import all_groups, csv_of, in_words, is_dense, present

# Okabe and Ito's palette, distinct with every common kind of colour blindness, and then darker and softer ones of Tol's.
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


def _numbers(group: pd.DataFrame) -> dict[str, int]:
    """By method its number for ``look``: the same in all figures of a comparable set."""
    return {name: number for number, name in enumerate(sorted(set(group["method"]) - {"dense"}))}


def _dense_line(axes: Axes, rows: pd.DataFrame) -> None:
    """The dense model's perplexity; in other dtypes it is hardly another."""
    for value in rows["value"].map("{:.4g}".format).unique():
        axes.axhline(float(value), **DENSE, label=f"dense ({value})")


def perplexity_against_ratio(group: pd.DataFrame, caption: str) -> plt.Figure | None:
    """Perplexity (log scale) against the fraction of all linears kept, a colour for each method.

    Its variants have styles of their own. Quantized cells are in ``perplexity_against_bits`` alone, and ratios of
    part of the model would stand at the wrong place on this axis.
    """
    shown = against_ratio(group)
    compressed = shown[~is_dense(shown)]
    if compressed.empty:
        return None
    numbers = _numbers(group)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(7.2, 4.8), layout="constrained")
        variants = compressed["told"].map(lambda told: in_words(present(told)))  # none of these is quantized
        for method, of_method in compressed.groupby("method", sort=True):
            for style, (variant, line) in enumerate(of_method.groupby(variants, sort=True)):
                line = line.sort_values("ratio_reached")
                looks = look(numbers[method], style)
                axes.plot(line["ratio_reached"], line["value"], **looks, label=label_of(method, variant))
        _dense_line(axes, shown[is_dense(shown)])
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


def against_ratio(group: pd.DataFrame) -> pd.DataFrame:
    """The rows that ``perplexity_against_ratio`` shows."""
    of_ratio = (group["method"] != "dense") & group["whole"] & (group["quantized"] == "none")
    return group[of_ratio | is_dense(group)]


def _ticks_at(axes: Axes, ratios: pd.Series) -> None:
    """Ticks at the ratios that were asked for, if their numbers have room."""
    ticks = sorted(ratios.unique())
    closest = min((b - a for a, b in pairwise(ticks)), default=1)
    if closest >= (ticks[-1] - ticks[0]) / 10:
        axes.set_xticks(ticks)


def perplexity_against_bits(group: pd.DataFrame, caption: str) -> plt.Figure | None:
    """Perplexity against the bits kept for each weight of the dense linears, both on log scales; None without
    quantized cells.

    The colour tells the method, the style of the line the ratio and other compressions, the marker how the weights
    are rounded. A line goes through those cells that none of it with as few bits beats; the others are hollow.
    """
    rows = against_bits(group)
    cells = rows[~is_dense(rows)]
    if (cells["quantized"] == "none").all():
        return None
    numbers = _numbers(group)
    names = [name for name in ("dense", *numbers) if (cells["method"] == name).any()]
    cells = cells.sort_values(["ratio", "others", "bits", "value"], ascending=[False, True, True, True])
    kept = cells["ratio"].map("ratio {:g}".format) + cells["others"].map(lambda others: others and f", {others}")
    ways = sorted(cells["quantized"].unique(), key=lambda way: (way != "none", way))
    colours = {name: look(numbers[name])["color"] if name in numbers else DENSE["color"] for name in names}
    styles = {name: LINES[number % len(LINES)] for number, name in enumerate(dict.fromkeys(kept))}
    markers = {way: MARKERS[number % len(MARKERS)] for number, way in enumerate(ways)}
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(11, 6), layout="constrained")
        joined: list[str] = []  # of the lines that join two points or more
        for (method, line), of_line in cells.groupby(["method", kept], sort=False):
            best = of_line["value"] <= of_line["value"].cummin()
            colour, front = colours[method], of_line[best]
            axes.plot(front["bits"], front["value"], color=colour, linestyle=styles[line], label=f"{method}, {line}")
            joined += [line] if len(front) > 1 else []
            for way, of_way in of_line.groupby("quantized"):
                for points, fill in ((of_way[best[of_way.index]], "full"), (of_way[~best[of_way.index]], "none")):
                    looks = {"color": colour, "fillstyle": fill, "markeredgewidth": 1.6, "label": "_points"}
                    axes.plot(points["bits"], points["value"], markers[way], **looks)
        _dense_line(axes, rows[is_dense(rows)])
        axes.set_xscale("log", base=2)
        _bit_ticks(axes, cells["bits"])
        log_scale(axes, rows["value"])
        axes.set_xlabel("bits kept for each weight of the dense linears")
        axes.set_ylabel("perplexity")
        axes.set_title(wrapped(caption), fontsize=11)
        parts = [("method", [Line2D([], [], color=colour, linewidth=5, label=name) for name, colour in colours.items()])]
        shown = [line for line in styles if line in joined]
        parts.append(("kept", [Line2D([], [], color="0.2", linestyle=styles[line], label=line) for line in shown]))
        marks = [Line2D([], [], color="0.2", marker=markers[way], linestyle="", label=way) for way in ways]
        parts.append(("rounded by", marks))
        _legend_of_parts(figure, axes, parts)
    return figure


def against_bits(group: pd.DataFrame) -> pd.DataFrame:
    """The rows that ``perplexity_against_bits`` shows."""
    return group[group["whole"]]


def _bit_ticks(axes: Axes, bits: pd.Series) -> None:
    """Numbers of bits that people use; of a narrow range as many as there is room for."""
    if bits.max() < 2 * bits.min():
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    else:
        usual = (1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32)
        axes.set_xticks([tick for tick in usual if bits.min() / 1.3 <= tick <= bits.max() * 1.3])
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())


def _legend_of_parts(figure: plt.Figure, axes: Axes, parts: list[tuple[str, list[Line2D]]]) -> None:
    """One legend beside the axes, each of its parts under a heading."""
    dense = [line for line in axes.get_lines() if str(line.get_label()).startswith("dense (")]
    handles: list[Line2D] = dense[:1]
    for heading, of_part in parts:
        bold = heading.replace(" ", "~")
        handles += [Line2D([], [], linestyle="", label=f"$\\bf{{{bold}}}$"), *of_part] if of_part else []
    height = max(6, 0.33 * len(handles) + 0.5)
    figure.set_size_inches(11, height)
    figure.legend(handles=handles, loc="outside right upper", frameon=False)


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
                        **{**look(number), "linestyle": style},
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


Draw = Callable[[pd.DataFrame, str], plt.Figure | None]
Rows = Callable[[pd.DataFrame], pd.DataFrame]
# By name, the metric, the figure of one comparable set (None where there is nothing to draw), and which rows it shows.
FIGURES: dict[str, tuple[str, Draw, Rows]] = {
    "perplexity": (PERPLEXITY.metric, perplexity_against_ratio, against_ratio),
    "perplexity-by-bits": (PERPLEXITY.metric, perplexity_against_bits, against_bits),
    "speed": (SPEED.metric, speed_against_settings, lambda group: group),
    "output-error": (OUTPUT_ERROR.metric, output_error_against_block, lambda group: group),
    "truncation": (TRUNCATION.metric, truncation_against_ratio, lambda group: group),
}


LONGEST_NAME = 100  # characters of a model's in the name of a file, of which file systems allow 255


@dataclass(frozen=True)
class Drawn:
    """A figure with the name of its files, its caption, and the rows that it shows with their CSV."""

    name: str
    caption: str
    figure: plt.Figure
    rows: pd.DataFrame
    csv: str


def drawn(records: list[dict[str, Any]]) -> Iterator[Drawn]:
    """The figures of each comparable set that can be drawn; each is closed when the next is asked."""
    for section, caption, group in all_groups(records):
        for kind, (metric, draw, of) in FIGURES.items():
            figure = draw(group, caption) if metric == section.metric else None
            if figure is not None:
                rows = of(group)
                yield Drawn(_name(kind, group), caption, figure, rows, csv_of(rows, section))
                plt.close(figure)


def _name(kind: str, group: pd.DataFrame) -> str:
    first = group.iloc[0]
    what = [kind, first["model"][:LONGEST_NAME], first["protocol_text"].split(",")[0], first["identity"][:6]]
    return re.sub(r"[^A-Za-z0-9._-]+", "-", "_".join(what))


def write(records: list[dict[str, Any]], folder: Path) -> list[Path]:
    """Write each figure as PNG and PDF; returns the files written."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for one in drawn(records):
        for suffix in ("png", "pdf"):
            files.append(folder / f"{one.name}.{suffix}")
            save(one.figure, files[-1])
    return files


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
