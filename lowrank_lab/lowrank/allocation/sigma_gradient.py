"""QSVD's allocation: rank goes where the loss depends on the singular values (papers/000)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from lowrank_lab import checks
from lowrank_lab.lowrank.allocation.global_tail import water_fill
from lowrank_lab.lowrank.artifacts import spectra
from lowrank_lab.lowrank.keys import LowRankKeys
from lowrank_lab.lowrank.ranks import budget, fit
from lowrank_lab.modules.site import Ranks, Sites

if TYPE_CHECKING:
    import numpy as np

    from lowrank_lab.running.context import Context


class SigmaGradient:
    """Importance from the gradient of the loss with respect to the singular values of every site.

    form     ``layer``: the rank of a site in proportion to Σ_i E|dL/dσ_i|, as in the lecture;
             ``global``: over all sites the directions of largest σ·√E[(dL/dσ)²], by their cost
    samples  the first so many calibration sequences; None takes all
    """

    needs_calibration = True

    def __init__(self, form: Literal["layer", "global"], samples: int | None) -> None:
        checks.one_of(("layer", "global"), form=form)
        checks.whole(1, optional=True, samples=samples)
        self.form = form
        self.samples = samples

    def __call__(self, context: Context) -> Ranks:
        if context.ratio >= 1:
            return dict.fromkeys(context.sites)
        from lowrank_lab.lowrank.allocation.sigma_statistics import load_sigma_gradients, make_sigma_gradients

        ids, made = context.calibration_ids[: self.samples], spectra(context)
        parts = {
            "sigma": self.samples,
            "spectra": LowRankKeys(context.cell).spectra,
            "tokens": context.cell.keys.calibration_tokens,
        }
        tower, sites, device, task = context.tower, context.sites, context.device, context.task
        make = lambda folder: make_sigma_gradients(
            folder, context.take_model().float(), tower, sites, made, ids, device, task
        )
        folder = context.artifact("singular value gradients", "sigma", parts, make)
        sigma, mean_abs, mean_square = load_sigma_gradients(folder, context.sites)
        limit = budget(context.sites, context.ratio)
        if self.form == "layer":
            return fit(context.sites, {name: float(g.sum()) for name, g in mean_abs.items()}, limit)
        return water_fill(context.sites, score_tails(context.sites, sigma, mean_square), limit)


def score_tails(
    sites: Sites, sigma: Mapping[str, np.ndarray], mean_square: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """What cutting a site to each rank 0 … full does to the loss to first order: Σ_{i>k} σ_i² E[(dL/dσ_i)²].

    Directions are kept in the order of their singular values, so a site's choice is its rank; where a later
    direction scores higher than an earlier one, both come or go together.
    """
    import numpy as np

    tails = {}
    for name in sites:
        scores = sigma[name] ** 2 * mean_square[name]
        tails[name] = np.append(np.cumsum(scores[::-1])[::-1], 0.0)
    return tails
