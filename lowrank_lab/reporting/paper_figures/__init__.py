"""The papers' figures, from the records of their recipes in conf/experiment/, in the style of figures.py.

``PAPER_FIGURES`` has them by "<paper>/<figure>".
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pandas as pd
from matplotlib import pyplot as plt

from lowrank_lab.basics.errors import UserError
from lowrank_lab.records.results import Results
from lowrank_lab.reporting import published
from lowrank_lab.reporting.drawing import save
from lowrank_lab.reporting.figures import Drawn
from lowrank_lab.reporting.paper_figures.asvd import ASVD
from lowrank_lab.reporting.paper_figures.common import PaperFigure
from lowrank_lab.reporting.paper_figures.dobi import DOBI
from lowrank_lab.reporting.paper_figures.dobi_figure3 import DOBI_FIGURE3
from lowrank_lab.reporting.paper_figures.dobi_training import DOBI_TRAINING
from lowrank_lab.reporting.paper_figures.slides import SLIDES
from lowrank_lab.reporting.recipe_cells import recipe_cells

PAPER_FIGURES: dict[str, PaperFigure] = {
    **{f"asvd/{name}": figure for name, figure in ASVD.items()},
    **{f"slides/{name}": figure for name, figure in SLIDES.items()},
    **{f"dobi/{name}": figure for name, figure in (DOBI_FIGURE3 | DOBI | DOBI_TRAINING).items()},
}


def drawn(results: Results) -> Iterator[Drawn]:
    """Each figure whose recipes have records to show; it is closed when the next is asked."""
    for name, figure in PAPER_FIGURES.items():
        data = data_of(name, results)
        if not data.empty:
            shown = figure.draw(data)
            yield Drawn(file_name(name), figure.title, shown, data, _csv(data))
            plt.close(shown)


def data_of(name: str, results: Results) -> pd.DataFrame:
    """What the figure ``name`` shows, from the records of its recipes; no rows where there are none.

    Raises UserError for a name that is no figure.
    """
    recipes = published.recipes(name)
    if name not in PAPER_FIGURES:
        raise UserError(f"{name} is no figure; figures are {', '.join(PAPER_FIGURES)}")
    records = [cell.record for cell in recipe_cells(recipes, results) if cell.record]
    return PAPER_FIGURES[name].data(records)


def write(name: str, results: Results, folder: Path) -> list[Path]:
    """Write <source>_<figure>.csv, .png and .pdf into ``folder``; returns the files, none without data."""
    data = data_of(name, results)
    if data.empty:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{file_name(name)}{ending}" for ending in (".csv", ".png", ".pdf")]
    files[0].write_text(_csv(data), encoding="utf-8")
    figure = PAPER_FIGURES[name].draw(data)
    for file in files[1:]:
        save(figure, file)
    plt.close(figure)
    return files


def file_name(name: str) -> str:
    """A figure's name as that of its files, without an ending."""
    return name.replace("/", "_")


def _csv(data: pd.DataFrame) -> str:
    return data.to_csv(index=False, lineterminator="\n")
