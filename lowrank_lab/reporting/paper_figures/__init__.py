"""The papers' figures, from the records of their recipes in conf/experiment/, in the style of figures.py.

``PAPER_FIGURES`` has them by "<paper>/<figure>".
"""

from __future__ import annotations

from lowrank_lab.reporting.paper_figures.asvd import ASVD
from lowrank_lab.reporting.paper_figures.common import PaperFigure
from lowrank_lab.reporting.paper_figures.dobi import DOBI
from lowrank_lab.reporting.paper_figures.dobi_training import DOBI_TRAINING

PAPER_FIGURES: dict[str, PaperFigure] = {
    **{f"asvd/{name}": figure for name, figure in ASVD.items()},
    **{f"dobi/{name}": figure for name, figure in (DOBI | DOBI_TRAINING).items()},
}
