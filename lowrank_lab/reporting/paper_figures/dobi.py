"""Dobi-SVD's figures (papers/003) that show measurements."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt

from lowrank_lab.reporting.drawing import COLOURS, look
from lowrank_lab.reporting.figures import truncations
from lowrank_lab.reporting.paper_figures import common
from lowrank_lab.reporting.paper_figures.common import PaperFigure, Records


def factor_values(records: Records, role: str) -> pd.DataFrame:
    """The histograms of the left and right factors of linears of the ``role``, a row a bin with its ``low`` and
    ``high`` edge and its ``count``, with standard deviation and excess kurtosis of the whole factor."""
    rows = []
    for record, found in common.measured(records, "excess kurtosis of factors"):
        for one in found["linears"]:
            if one["role"] != role:
                continue
            of = {name: record[name] for name in ("model", "method", "ratio")}
            of |= {"linear": one["linear"], "block": one["block"]}
            for factor in ("left", "right"):
                values = one[factor]
                of |= {"factor": factor, "std": values["std"], "excess_kurtosis": values["excess_kurtosis"]}
                edges = np.linspace(-values["largest"], values["largest"], len(values["counts"]) + 1).tolist()
                for low, high, count in zip(edges[:-1], edges[1:], values["counts"], strict=True):
                    rows.append({**of, "low": low, "high": high, "count": count})
    by = ["model", "method", "ratio", "linear", "block", "factor", "low"]
    columns = [*by[:-1], "std", "excess_kurtosis", "low", "high", "count"]
    return common.tidy(rows, columns, by)


def draw_factor_values(frame: pd.DataFrame) -> plt.Figure:
    """Density of the values of both factors against the normal one of their standard deviation; of the first
    linear."""
    frame = common.first_of(frame, "model", "method", "ratio", "linear", "block")
    first = frame.iloc[0]
    with common.style():
        figure, panels = plt.subplots(1, 2, figsize=(12, 4.8), layout="constrained")
        for axes, (factor, bins) in zip(panels, frame.groupby("factor"), strict=True):
            width, std = bins["high"] - bins["low"], bins["std"].iloc[0]
            middle = (bins["high"] + bins["low"]) / 2
            density = bins["count"] / (bins["count"].sum() * width)
            x = np.linspace(-6, 6, 401)
            normal = np.exp(-(x**2) / 2) / (std * math.sqrt(2 * math.pi))
            axes.bar(middle, density, width, color=COLOURS[0], label="values")
            axes.plot(x * std, normal, color=COLOURS[1], label="normal, of the same standard deviation")
            axes.set_xlim(-6 * std, 6 * std)
            axes.set_xlabel("value")
            kurtosis = bins["excess_kurtosis"].iloc[0]
            axes.set_title(f"{factor} factor: std {std:.3g}, excess kurtosis {kurtosis:.3g}", fontsize=12)
        panels[0].set_ylabel("density")
        common.legend_below(figure, panels[0], 2)
        what = f"{common.subject(frame)}, ratio {first['ratio']:g}: values of the factors of {first['linear']}"
        common.title(figure, f"{what}, block {first['block']}; the horizontal axis ends at 6 standard deviations")
    return figure


BATCH, LENGTH = "batch size", "sequence length"


def speeds(records: Records) -> pd.DataFrame:
    """Tokens decoded a second, by batch size and by the length of the prompt (``panel``).

    A compressed model and the dense one were measured by turns in one run, that of the ratio ``run``. Between runs
    the machine may have changed: the speeds of the dense model show how far.
    """
    rows = []
    for record, found in common.measured(records, "speed"):
        if record["method"] == "dense":
            continue
        batch, prompt = found["protocol"]["settings"][0]
        for one in found["settings"]:
            fixed = {BATCH: one["prompt"] == prompt, LENGTH: one["batch_size"] == batch}
            for panel in (name for name, is_fixed in fixed.items() if is_fixed):
                for name, method, ratio in (("dense", "dense", 1.0), ("model", record["method"], record["ratio"])):
                    if one[name] is None:  # out of memory
                        continue
                    rows.append(
                        {
                            "model": record["model"],
                            "method": method,
                            "ratio": ratio,
                            "run": record["ratio"],
                            "panel": panel,
                            "batch_size": one["batch_size"],
                            "prompt": one["prompt"],
                            "tokens_per_second": one[name]["decode"]["tokens_per_second"],
                        }
                    )
    by = ["model", "panel", "ratio", "method", "run", "batch_size", "prompt"]
    columns = ["model", "method", "ratio", "run", "panel", "batch_size", "prompt", "tokens_per_second"]
    return common.tidy(rows, columns, by)


def draw_speeds(frame: pd.DataFrame) -> plt.Figure:
    """A line a ratio, and the dense model's: the median of all runs, with the slowest and the fastest."""
    frame = common.first_of(frame, "model")
    with common.style():
        figure, panels = plt.subplots(1, 2, figsize=(12, 4.8), layout="constrained")
        for axes, (panel, varied) in zip(panels, {BATCH: "batch_size", LENGTH: "prompt"}.items(), strict=True):
            shown = frame[frame["panel"] == panel]
            for number, (of, line) in enumerate(shown.groupby(["method", "ratio"])):
                method, ratio = of
                speed = line.groupby(varied)["tokens_per_second"].agg(["median", "min", "max"])
                looks = {**look(number - 1), "label": f"{method} {ratio:g}"}
                if method == "dense":
                    looks = {"color": "0.35", "linestyle": "--", "marker": ".", "label": "dense"}
                spread = [speed["median"] - speed["min"], speed["max"] - speed["median"]]
                axes.errorbar(speed.index, speed["median"], yerr=spread, capsize=3, **looks)
            values = sorted(shown[varied].unique())
            axes.set_xscale("log")
            axes.set_xticks(values, [str(value) for value in values])
            axes.minorticks_off()
            axes.set_ylim(bottom=0)
            axes.set_xlabel(panel)
            fixed = f"{LENGTH} {{prompt}}" if panel == BATCH else f"{BATCH} {{batch_size}}"
            axes.set_title(fixed.format(**shown.iloc[0]), fontsize=12)
        panels[0].set_ylabel("tokens decoded a second")
        common.legend_below(figure, panels[0], 4)
        common.title(figure, f"{frame['model'].iloc[0]}: speed of decoding")
    return figure


def truncation_losses(records: Records) -> pd.DataFrame:
    """The loss with one linear's activations, and with its weight, truncated to the same rank, and the dense one;
    mean negative log-likelihoods in nats. ``ratio`` is of min(out, in)."""
    values = ["linear", "block", "ratio", "rank", "activation_nll", "weight_nll"]
    rows = [
        {"model": record["model"], **{name: point[name] for name in values}, "dense_nll": found["dense_nll"]}
        for record, found in common.measured(records, "truncation")
        for point in found["points"]
    ]
    return common.tidy(rows, ["model", *values, "dense_nll"], ["model", "block"])


def draw_truncation_losses(frame: pd.DataFrame) -> plt.Figure:
    """Of the first model."""
    frame = common.first_of(frame, "model")
    return truncations(frame, f"{frame['model'].iloc[0]}: activations and weights of one linear truncated")


DOBI = {
    "figure4": PaperFigure(
        "Dobi-SVD, Figure 4: tokens a second by batch size and by sequence length",
        "dobi_figure4",
        speeds,
        draw_speeds,
    ),
    "figure11": PaperFigure(
        "Dobi-SVD, Figure 11: truncating activations against truncating weights",
        "dobi_figure11",
        truncation_losses,
        draw_truncation_losses,
    ),
    "figure5": PaperFigure(
        "Dobi-SVD, Figure 5: values of the factors of an attention matrix",
        "dobi_figure5",
        partial(factor_values, role="attention"),
        draw_factor_values,
    ),
    "figure6": PaperFigure(
        "Dobi-SVD, Figure 6: values of the factors of an MLP matrix",
        "dobi_figure5",
        partial(factor_values, role="mlp"),
        draw_factor_values,
    ),
}
