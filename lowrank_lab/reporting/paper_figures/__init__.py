"""The papers' figures, from the records of their recipes in conf/experiment/, in the style of figures.py.

``PAPER_FIGURES`` has them by "<paper>/<figure>".
"""

from __future__ import annotations

from collections.abc import Iterator

from matplotlib import pyplot as plt

from lowrank_lab.reporting.joined import experiment_of
from lowrank_lab.reporting.paper_figures.asvd import ASVD
from lowrank_lab.reporting.paper_figures.common import PaperFigure
from lowrank_lab.reporting.paper_figures.dobi import DOBI
from lowrank_lab.reporting.paper_figures.dobi_figure3 import DOBI_FIGURE3
from lowrank_lab.reporting.paper_figures.dobi_training import DOBI_TRAINING
from lowrank_lab.results import Results

PAPER_FIGURES: dict[str, PaperFigure] = {
    **{f"asvd/{name}": figure for name, figure in ASVD.items()},
    **{f"dobi/{name}": figure for name, figure in (DOBI_FIGURE3 | DOBI | DOBI_TRAINING).items()},
}


def drawn(results: Results) -> Iterator[tuple[str, str, plt.Figure]]:
    """Name, title and figure of each whose recipe has records to show; each is closed when the next is asked."""
    records = results.records()
    for name, figure in PAPER_FIGURES.items():
        grids = [grid for grid in results.grids() if experiment_of(grid["name"]) == figure.recipe]
        asked = {key for grid in grids for key in grid["cells"]}
        data = figure.data([record for record in records if record["key"] in asked])
        if data.empty:
            continue
        shown = figure.draw(data)
        yield name, figure.title, shown
        plt.close(shown)
