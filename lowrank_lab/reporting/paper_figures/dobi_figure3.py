"""The three panels of Dobi-SVD's Figure 3 (papers/003), which have different recipes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pandas as pd
from matplotlib import pyplot as plt

from lowrank_lab.reporting.drawing import label_of, log_scale, look
from lowrank_lab.reporting.paper_figures import common
from lowrank_lab.reporting.paper_figures.common import PaperFigure, Records

MIB = 2**20


def few_layers(records: Records) -> pd.DataFrame:
    """Perplexity by ratio with the linears of some blocks alone compressed, and of the dense model (ratio 1).

    ``linears`` and ``blocks`` say which, as targets= does; the ratio is of them alone.
    """
    rows = []
    for record, found in common.measured(records, "perplexity"):
        targets = record["config"]["targets"]
        blocks = ",".join(map(str, targets.get("blocks") or ["all"]))
        dense = record["method"] == "dense"
        rows.append(
            {
                "model": record["model"],
                "method": record["method"],
                "linears": "none" if dense else targets["linears"],
                "blocks": "none" if dense else blocks,
                "ratio": record["ratio"],
                "perplexity": found["value"],
            }
        )
    columns = ["model", "method", "linears", "blocks", "ratio", "perplexity"]
    return common.tidy(rows, columns, columns)


def draw_few_layers(frame: pd.DataFrame) -> plt.Figure:
    """A line a method and choice of blocks, the dense model's dashed; of the first model."""
    frame = common.first_of(frame, "model")
    dense = frame[frame["method"] == "dense"]
    lines = frame[frame["method"] != "dense"].groupby(["method", "linears", "blocks"])
    linears = frame["linears"][frame["method"] != "dense"].unique()
    of = (lambda name: f"{name} of ") if len(linears) > 1 else (lambda name: "")
    named = ((f"{method}, {of(name)}blocks {blocks}", line) for (method, name, blocks), line in lines)
    what = f"only {' or '.join(linears)} of some blocks compressed; -1 is the last block"
    return _by_ratio(frame, named, dense, what)


def batches(records: Records) -> pd.DataFrame:
    """Perplexity by ratio of models whose ranks were trained in batches of ``batch_size`` sequences, for ``steps``,
    out of ``samples``."""
    rows = []
    for record, found in common.measured(records, "perplexity"):
        allocation = record["config"]["allocation"] or {}
        if "batch_size" in allocation:
            rows.append(
                {
                    "model": record["model"],
                    "method": record["method"],
                    "samples": record["config"]["calibration"]["samples"],
                    "batch_size": allocation["batch_size"],
                    "steps": allocation["steps"],
                    "ratio": record["ratio"],
                    "perplexity": found["value"],
                }
            )
    columns = ["model", "method", "samples", "batch_size", "steps", "ratio", "perplexity"]
    return common.tidy(rows, columns, columns)


def draw_batches(frame: pd.DataFrame) -> plt.Figure:
    """A line a training; of the first model."""
    frame = common.first_of(frame, "model")
    named = (
        (f"{method}, batch size {batch}, {steps} steps", line)
        for (method, samples, batch, steps), line in frame.groupby(["method", "samples", "batch_size", "steps"])
    )
    return _by_ratio(frame, named, frame[:0], "perplexity by the batch size of the training")


def _by_ratio(
    frame: pd.DataFrame, named: Iterable[tuple[str, pd.DataFrame]], dense: pd.DataFrame, what: str
) -> plt.Figure:
    with common.style():
        figure, axes = plt.subplots(figsize=(8.4, 5.6), layout="constrained")
        for number, (name, line) in enumerate(named):
            axes.plot(line["ratio"], line["perplexity"], **look(number), label=label_of(name, ""))
        for value in dense["perplexity"]:
            axes.axhline(value, color="0.35", linestyle="--", label=f"dense ({value:.4g})")
        log_scale(axes, frame["perplexity"])
        axes.set_xticks(sorted(frame["ratio"][frame["ratio"] < 1].unique()))
        axes.margins(x=0.1)
        axes.set_xlabel("ratio of the targeted parameters kept")
        axes.set_ylabel("perplexity")
        common.legend_below(figure, axes, 2)
        common.title(figure, f"{frame['model'].iloc[0]}: {what}")
    return figure


def memory(records: Records) -> pd.DataFrame:
    """The peak bytes of each ``way`` to reduce ``samples`` sets of ``rank`` directions of ``width`` to one."""
    rows: list[dict[str, Any]] = [
        {"samples": found["protocol"]["samples"], **point}
        for _, found in common.measured(records, "memory of PCA over IPCA")
        for point in found["points"]
    ]
    return common.tidy(rows, ["way", "samples", "width", "rank", "bytes"], ["way", "samples", "width", "rank"])


def draw_memory(frame: pd.DataFrame) -> plt.Figure:
    """A line a way, both axes logarithmic: on them a power law is straight; of the smallest number of samples."""
    frame = frame[frame["samples"] == frame["samples"].min()]
    with common.style():
        figure, axes = plt.subplots(figsize=(7.2, 4.8), layout="constrained")
        for number, (way, line) in enumerate(frame.groupby("way")):
            axes.plot(line["width"], line["bytes"] / MIB, **look(number), label=way)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        widths = sorted(frame["width"].unique())
        axes.set_xticks(widths, [str(width) for width in widths])
        axes.set_xlabel("width n")
        axes.set_ylabel("MiB held at once")
        axes.legend(frameon=False)
        axes.set_title(f"directions of {frame['samples'].iloc[0]} samples brought to one set", fontsize=11)
    return figure


DOBI_FIGURE3 = {
    "figure3_left": PaperFigure(
        "Dobi-SVD, Figure 3 left: perplexity with few layers compressed, by weights and with trained ranks",
        "dobi_figure3_left",
        few_layers,
        draw_few_layers,
    ),
    "figure3_middle": PaperFigure(
        "Dobi-SVD, Figure 3 middle: perplexity by the batch size of the training",
        "dobi_figure3_middle",
        batches,
        draw_batches,
    ),
    "figure3_right": PaperFigure(
        "Dobi-SVD, Figure 3 right: memory of PCA against IPCA by width", "dobi_figure3_right", memory, draw_memory
    ),
}
