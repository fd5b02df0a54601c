"""Figures from records alone, one or two for each comparable set."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.ticker import MaxNLocator

from lowrank_lab.reporting.drawing import STYLE, label_of, look, save, wrapped
from lowrank_lab.reporting.kinds.errors import linear_names
from lowrank_lab.reporting.perplexity_figures import (
    against_bits,
    against_ratio,
    perplexity_against_bits,
    perplexity_against_ratio,
)
from lowrank_lab.reporting.sections import OUTPUT_ERROR, PERPLEXITY, SPEED, TRUNCATION
from lowrank_lab.reporting.tables import all_groups, csv_of


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
# By name, the metric, the figure of one comparable set (None with nothing to draw), and which rows it shows.
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
