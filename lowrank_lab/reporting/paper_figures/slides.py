"""The slides' plot for COMCAT."""

from __future__ import annotations

import pandas as pd
from matplotlib import pyplot as plt

from lowrank_lab.reporting.figures import look
from lowrank_lab.reporting.paper_figures.common import (
    PaperFigure,
    Records,
    first_of,
    legend_below,
    measured,
    style,
    tidy,
    title,
)

COLUMNS = ["model", "level", "matrix", "index", "value"]


def singular_values(records: Records) -> pd.DataFrame:
    """By matrix and index (from 1), the mean singular value over the largest."""
    rows = [
        {
            "model": record["model"],
            "level": "head" if curve["by_head"] else "matrix",
            "matrix": name,
            "index": index,
            "value": value,
        }
        for record, found in measured(records, "energy at half the rank")
        for name, curve in found["curves"].items()
        for index, value in enumerate(curve["values"], 1)
    ]
    return tidy(rows, COLUMNS, by=["model", "level", "matrix", "index"])


def draw(data: pd.DataFrame) -> plt.Figure:
    """Both levels against the index, up to the width of the matrices."""
    shown = first_of(data, "model")
    with style():
        figure, axes = plt.subplots(figsize=(7.2, 5.4), layout="constrained")
        for number, ((level, matrix), line) in enumerate(shown.groupby(["level", "matrix"], sort=True)):
            label = f"{matrix} of each head" if level == "head" else str(matrix)
            appearance = {**look(number), "marker": "", "linestyle": "-" if level == "head" else "--"}
            axes.plot(line["index"], line["value"], **appearance, label=label)
        axes.set_xlabel("index of the singular value")
        axes.set_ylabel("singular value over the largest")
        axes.set_ylim(bottom=0)
        legend_below(figure, axes, columns=3)
        title(figure, f"{shown['model'].iloc[0]}: means over blocks and heads")
    return figure


SLIDES = {
    "singular_values": PaperFigure(
        "Slides, COMCAT: singular values of products within heads and of whole matrices",
        "slides_comcat_mha",
        singular_values,
        draw,
    )
}
