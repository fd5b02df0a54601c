"""Dobi-SVD's figures (papers/003) of the training of ranks: loss and perplexity, and every rank on its way."""

from __future__ import annotations

from functools import partial
from typing import Any

import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.ticker import MaxNLocator

from lowrank_lab.reporting.drawing import log_scale, look
from lowrank_lab.reporting.paper_figures import common
from lowrank_lab.reporting.paper_figures.common import STEPS, PaperFigure, Records

LOSS, PERPLEXITY = "training loss (nats)", "perplexity"
INITIAL = "#D0021B"  # the paper's red line


def progress(records: Records) -> pd.DataFrame:
    """By model, method and ratio: after ``step`` steps, the training's loss on its next batch, without the distance
    from the target ratio, and the perplexity on the evaluation text where eval=learned_ranks was run."""
    rows = []

    def add(record: dict[str, Any], quantity: str, step: int, value: float | None) -> None:
        of = {name: record[name] for name in ("model", "method", "ratio")}
        rows.append({**of, "quantity": quantity, "step": step, "epoch": step / _per_epoch(record), "value": value})

    for record, compression in common.compressions(records, "training"):
        for step, found in enumerate(compression["training"]["steps"]):
            add(record, LOSS, step, found["task_loss"])
    for record, found in common.measured(records, "perplexity of learned ranks"):
        for step, value in zip(found["states"], found["perplexity"], strict=True):
            add(record, PERPLEXITY, step, value)
    columns = ["model", "method", "ratio", "quantity", "step", "epoch", "value"]
    return common.tidy(rows, columns, columns)


def _per_epoch(record: dict[str, Any]) -> float:
    """How many steps go once through the calibration samples."""
    return record["config"]["calibration"]["samples"] / record["config"]["allocation"]["batch_size"]


def _epoch_means(line: pd.DataFrame) -> pd.DataFrame:
    """The mean loss of each whole epoch, at its middle: batches differ more than a training changes their loss."""
    if len(line) < 2:
        return line
    epoch = line["epoch"].astype(int)
    whole = line[epoch < int(line["epoch"].max() + line["epoch"].diff().max() + 1e-9)]
    return whole.groupby(epoch)[["step", "value"]].mean()


def draw_progress(frame: pd.DataFrame) -> plt.Figure:
    """Loss (of epochs; faint, of batches) and perplexity, a line a ratio; of the first model and method."""
    frame = common.first_of(frame, "model", "method")
    with common.style():
        figure, panels = plt.subplots(1, 2, figsize=(12, 4.8), layout="constrained")
        for axes, quantity in zip(panels, (LOSS, PERPLEXITY), strict=True):
            of_quantity = frame[frame["quantity"] == quantity].dropna()
            for number, (ratio, line) in enumerate(of_quantity.groupby("ratio")):
                if quantity == LOSS:
                    axes.plot(line["step"], line["value"], color=look(number)["color"], linewidth=1, alpha=0.3)
                    line = _epoch_means(line)
                every = max(1, len(line) // 8)
                axes.plot(line["step"], line["value"], **look(number), markevery=every, label=f"ratio {ratio:g}")
            axes.set_xlabel("steps of training")
            axes.set_ylabel(quantity)
            if not of_quantity.empty:
                log_scale(axes, of_quantity["value"])
        common.legend_below(figure, panels[0], 3)
        common.title(figure, f"{common.subject(frame)}: training of the ranks")
    return figure


def ranks(records: Records, ratio: float) -> pd.DataFrame:
    """The learned ranks k at ``ratio`` by linear, block and step; step 0 has those that training begins with.

    ``step`` counts optimizer steps, ``epoch`` passes through the calibration samples.
    """
    rows = []
    for record, compression in common.compressions(records, "training"):
        if record["ratio"] != ratio:
            continue
        training, per_epoch = compression["training"], _per_epoch(record)
        for name, of_states in training["k"].items():
            site = compression["sites"][name]
            of = {"model": record["model"], "method": record["method"], "ratio": ratio}
            of |= {"linear": common.linear(site), "block": site["block"]}
            for step, k in zip(training["states"], of_states, strict=True):
                rows.append({**of, "step": step, "epoch": step / per_epoch, "k": k})
    columns = ["model", "method", "ratio", "linear", "block", "step", "epoch", "k"]
    return common.tidy(rows, columns, ["model", "method", "block"])


def draw_ranks(frame: pd.DataFrame) -> plt.Figure:
    """k by block, a panel a linear, coloured by step, with the initial k as a red line; of the first model and
    method."""
    frame = common.first_of(frame, "model", "method")
    names = common.short_names(frame["linear"])
    with common.style():
        figure, grid = common.panels(len(names), 4, sharey=False)
        colours = plt.Normalize(0, frame["step"].max())
        for axes, (linear, name) in zip(grid, names.items(), strict=True):
            of_linear = frame[frame["linear"] == linear]
            for step, line in of_linear[of_linear["step"] > 0].groupby("step"):
                axes.plot(line["block"], line["k"], color=STEPS(colours(step)), linewidth=1.4)
            initial = of_linear[of_linear["step"] == 0]
            axes.plot(initial["block"], initial["k"], color=INITIAL, linestyle="--", label="initial k")
            axes.set_title(name, fontsize=13)
            axes.set_xlabel("block")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        for axes in grid[::4]:
            axes.set_ylabel("rank k")
        figure.colorbar(plt.cm.ScalarMappable(colours, STEPS), ax=grid, label="steps of training")
        common.legend_below(figure, grid[0], 1)
        common.title(figure, f"{common.subject(frame)}, ratio {frame['ratio'].iloc[0]:g}: ranks during training")
    return figure


def _ranks_figure(number: int, ratio: float) -> PaperFigure:
    title = f"Dobi-SVD, Figure {number}: k by layer and type during training, at ratio {ratio:g}"
    return PaperFigure(title, "dobi_figure8", partial(ranks, ratio=ratio), draw_ranks)


DOBI_TRAINING = {
    "figure7": PaperFigure(
        "Dobi-SVD, Figure 7: training loss and perplexity during the training of the ranks",
        "dobi_figure8",
        progress,
        draw_progress,
    ),
    "figure8": _ranks_figure(8, 0.4),
    "figure9": _ranks_figure(9, 0.2),
    "figure10": _ranks_figure(10, 0.6),
}
