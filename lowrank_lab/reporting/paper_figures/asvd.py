"""The figures of ASVD (papers/002): sensitivities, perplexity against ratio, and where the ratio is spent."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.ticker import MaxNLocator

from lowrank_lab.reporting.drawing import COLOURS, label_of, log_scale, look
from lowrank_lab.reporting.paper_figures import common
from lowrank_lab.reporting.paper_figures.common import STEPS, PaperFigure, Records


def sensitivities(records: Records) -> pd.DataFrame:
    """The perplexity of the calibration text with one linear truncated alone, by linear, block and ratio.

    ``ratio`` is that of the linear's parameters, as its rank makes it. Of cells that share a model and a method (at
    several ratios) the first is taken: they have the same sensitivities.
    """
    rows, seen = [], set()
    for record, compression in common.compressions(records, "sensitivities"):
        if (one := (record["model"], record["method"])) in seen:
            continue
        seen.add(one)
        for name, of_site in compression["sensitivities"].items():
            site = compression["sites"][name]
            for rank, nll in of_site.items():
                rows.append(
                    {
                        "model": record["model"],
                        "method": record["method"],
                        "linear": common.linear(site),
                        "block": site["block"],
                        "rank": int(rank),
                        "ratio": _candidate_cost(compression, name, rank) / site["dense"],
                        "perplexity": math.exp(nll),
                    }
                )
    columns = ["model", "method", "linear", "block", "rank", "ratio", "perplexity"]
    return common.tidy(rows, columns, ["model", "method", "block"])


def _candidate_cost(compression: dict[str, Any], name: str, rank: str) -> int:
    """What a site of a record costs at a rank whose sensitivity was measured."""
    if "candidate_costs" in compression:
        return compression["candidate_costs"][name][rank]
    return _cost(compression["sites"][name], int(rank))


def _cost(site: dict[str, Any], rank: int | None) -> int:
    """What a site of a record costs at its rank; old records have the cost of one rank instead, ``per_rank``."""
    if rank is None:
        return site["dense"]
    return rank * site["per_rank"] if "per_rank" in site else site["cost"]


def draw_sensitivities(frame: pd.DataFrame) -> plt.Figure:
    """Perplexity by block, a panel a linear, coloured by ratio; of the first model and method."""
    frame = common.first_of(frame, "model", "method")
    names = common.short_names(frame["linear"])
    with common.style():
        figure, grid = common.panels(len(names), 4, sharey=True)
        colours = plt.Normalize(0, 1)
        for axes, (linear, name) in zip(grid, names.items(), strict=True):
            of_linear = frame[frame["linear"] == linear]
            # A line through the blocks for each place in the order of the ranks: the candidates are the same.
            place = of_linear.groupby("block")["rank"].rank().astype(int)
            for _, line in of_linear.groupby(place):
                colour = STEPS(colours(line["ratio"].mean()))
                axes.plot(line["block"], line["perplexity"], color=colour, marker="o", markersize=4, linewidth=1.4)
            axes.set_title(name, fontsize=13)
            axes.set_xlabel("block")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            log_scale(axes, frame["perplexity"])
        for axes in grid[::4]:
            axes.set_ylabel("perplexity")
        shades = plt.cm.ScalarMappable(colours, STEPS)
        figure.colorbar(shades, ax=grid, label="ratio of the linear's parameters kept")
        common.title(figure, f"{common.subject(frame)}: one linear truncated alone")
    return figure


def perplexities(records: Records) -> pd.DataFrame:
    """Perplexity by ratio of ASVD, and of the dense model at ratio 1, by model and text."""
    rows = []
    for record, found in common.measured(records, "perplexity"):
        if record["method"] in ("dense", "asvd"):
            rows.append(
                {
                    "model": record["model"],
                    "dataset": found["protocol"]["dataset"],
                    "ratio": record["ratio"],
                    "ratio_reached": record["sizes"]["ratio_reached"],
                    "perplexity": found["value"],
                }
            )
    columns = ["model", "dataset", "ratio", "ratio_reached", "perplexity"]
    return common.tidy(rows, columns, ["model", "dataset", "ratio", "ratio_reached", "perplexity"])


def draw_perplexities(frame: pd.DataFrame) -> plt.Figure:
    """A line a model (and text, where there are several)."""
    several = frame["dataset"].nunique() > 1
    with common.style():
        figure, axes = plt.subplots(figsize=(7.2, 4.8), layout="constrained")
        for number, (of, line) in enumerate(frame.groupby(["model", "dataset"])):
            model, dataset = map(str, of)
            label = label_of(model, dataset if several else "")
            axes.plot(line["ratio_reached"], line["perplexity"], **look(number), label=label)
        log_scale(axes, frame["perplexity"])
        axes.set_xlabel("ratio of compressible parameters kept")
        axes.set_ylabel("perplexity")
        axes.legend(frameon=False)
        what = "perplexity" if several else f"perplexity on {frame['dataset'].iloc[0]}"
        axes.set_title(f"ASVD: {what} against ratio", fontsize=11)
    return figure


def kept(records: Records) -> pd.DataFrame:
    """What ASVD's ranks keep of all linears of a type (``by`` is "linear"), and of all of a block ("block").

    ``kept`` is a fraction of what the ratio counts, of which there was ``dense``; weighed by it, the fractions of
    all types, as those of all blocks, have the ratio reached as their mean.
    """
    rows: list[dict[str, Any]] = []
    for record, compression in common.compressions(records, "plan"):
        if record["method"] != "asvd":
            continue
        ranks = compression["plan"]
        sites = pd.DataFrame(
            {
                "linear": common.linear(site),
                "block": site["block"],
                "dense": site["dense"],
                "cost": _cost(site, ranks[name]),
            }
            for name, site in compression["sites"].items()
        )
        rows += _parts(record, sites)
    columns = ["model", "ratio", "by", "part", "dense", "kept"]
    return common.tidy(rows, columns, ["model", "ratio", "by"])


def _parts(record: dict[str, Any], sites: pd.DataFrame) -> Iterator[dict[str, Any]]:
    for by in ("linear", "block"):
        for part, of_part in sites.groupby(by, sort=False):
            yield {
                "model": record["model"],
                "ratio": record["ratio"],
                "by": by,
                "part": str(part),
                "dense": of_part["dense"].sum(),
                "kept": of_part["cost"].sum() / of_part["dense"].sum(),
            }


def draw_kept(frame: pd.DataFrame) -> plt.Figure:
    """Bars by type of linear and points by block, a colour a ratio; of the first model."""
    frame = common.first_of(frame, "model")
    ratios = sorted(frame["ratio"].unique(), reverse=True)
    with common.style():
        figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.8), sharey=True, layout="constrained")
        width = 0.8 / len(ratios)
        for number, ratio in enumerate(ratios):
            of_ratio = frame[frame["ratio"] == ratio]
            types, blocks = (of_ratio[of_ratio["by"] == by] for by in ("linear", "block"))
            names = common.short_names(types["part"])
            places = [place + (number - (len(ratios) - 1) / 2) * width for place in range(len(names))]
            colour = COLOURS[number % len(COLOURS)]
            left.bar(places, types["kept"], width, color=colour)
            left.set_xticks(range(len(names)), list(names.values()), rotation=30, ha="right")
            every = max(1, len(blocks) // 15)
            right.plot(
                blocks["part"].astype(int),
                blocks["kept"],
                **look(number),
                markevery=every,
                label=f"ratio {ratio:g}",
            )
        left.grid(axis="x", visible=False)
        left.set_ylabel("fraction kept")
        left.set_title("by type of linear", fontsize=13)
        right.set_title("by block", fontsize=13)
        right.set_xlabel("block")
        right.xaxis.set_major_locator(MaxNLocator(integer=True))
        left.set_ylim(0, 1.05)
        common.legend_below(figure, right, min(6, len(ratios)))
        common.title(figure, f"{frame['model'].iloc[0]}: parameters that ASVD keeps")
    return figure


ASVD = {
    "figure4": PaperFigure(
        "ASVD, Figure 4: perplexity with one linear truncated alone, by linear, block and ratio",
        "asvd_figure4",
        sensitivities,
        draw_sensitivities,
    ),
    "figure5": PaperFigure(
        "ASVD, Figure 5: perplexity against ratio, a line a model", "asvd_figure5", perplexities, draw_perplexities
    ),
    "figure6": PaperFigure(
        "ASVD, Figure 6: ratio kept by type of linear and by block", "asvd_figure5", kept, draw_kept
    ),
}
