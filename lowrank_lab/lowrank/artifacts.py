"""The artifact that low rank computes from the dense model of a cell: the spectra of all sites. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lowrank_lab.basics.lazy_module import LazyModule
from lowrank_lab.lowrank.answers import answers_of
from lowrank_lab.lowrank.keys import LowRankKeys

if TYPE_CHECKING:
    import numpy as np

    from lowrank_lab.lowrank import spectra as decomposition
    from lowrank_lab.running.context import Context
else:
    decomposition = LazyModule("lowrank_lab.lowrank.spectra")


def spectra(context: Context) -> Path:
    """The artifact of all spectra, with the calibration passes that the metric asks for."""
    return context.cached("spectra", lambda: _spectra(context))


def _spectra(context: Context) -> Path:
    metric, grouping = answers_of(context.cell).metric, answers_of(context.cell).grouping
    statistics = context.statistics if metric.needs_inputs else None
    means = context.input_means if metric.needs_inputs and grouping.products else None
    gradients = output_gradients(context) if metric.needs_gradients else None

    def make(folder: Path) -> None:
        with context.dense(context.cell.cfg.dtype) as model:
            where = (folder, model, context.tower, context.sites)
            decomposition.make_spectra(*where, metric, statistics, gradients, context.device, means)

    return context.cached_artifact("decomposition", "spectra", LowRankKeys(context.cell).spectra, make)


def output_gradients(context: Context) -> Path:
    """The artifact of the output gradients' statistics; that of the weights' gradients contains them as well."""
    answers = answers_of(context.cell)
    return context.weight_fisher if answers.one_backward_pass else context.gradients(answers.metric.needs_outer)


def tails(context: Context) -> dict[str, np.ndarray]:
    """By site, its squared error at every rank 0 … min(out, in), float64, in the metric's units."""
    return context.cached("tails", lambda: decomposition.load_tails(spectra(context), context.sites))
