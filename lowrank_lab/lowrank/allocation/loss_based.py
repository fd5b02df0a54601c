"""SVD-LLM v2's allocation: within a type of matrix, less is cut from what loses more (Wang et al., NAACL 2025)."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import TYPE_CHECKING

from lowrank_lab.basics.errors import SkippedCell
from lowrank_lab.lowrank.answers import answers_of
from lowrank_lab.lowrank.artifacts import tails
from lowrank_lab.lowrank.ranks import Ranks, budget, compressible, fit, rank_at, rank_for_ratio
from lowrank_lab.modules.site import Sites

if TYPE_CHECKING:
    from lowrank_lab.running.context import Context


class LossBased:
    """Cut from each matrix of a type in proportion to 1 / log of the least loss that truncating it can have.

    With L = ‖W X − W' X‖_F at the uniform ratio, over all calibration tokens and from the exact spectrum, the
    fraction removed from matrix i of a type with n members is  n · removed · (1 / log L_i) / Σ_j (1 / log L_j).
    The logarithm has to be positive: the rule does not cover a loss of 1 or less.
    """

    needs_calibration = True
    computes_little = True

    def __call__(self, context: Context) -> Ranks:
        if context.ratio >= 1:
            return dict.fromkeys(context.sites)
        # The spectra are of the mean over tokens; the paper's loss is of their sum.
        errors, metric = tails(context), answers_of(context.cell).metric
        tokens = context.calibration_positions if metric.needs_inputs else 1
        losses = {}
        for name, site in compressible(context.sites).items():
            rank = rank_for_ratio(site, context.ratio)
            squared = 0.0 if rank is None else float(errors[name][rank])
            losses[name] = math.sqrt(squared * tokens)
        return loss_based(context.sites, context.ratio, losses)


def loss_based(sites: Sites, ratio: float, losses: dict[str, float]) -> Ranks:
    """The ranks at ``ratio`` for these ``losses``, by site that some rank makes cheaper; the others stay dense.

    Raises SkippedCell where a loss is 1 or less.
    """
    types = defaultdict(list)
    for name, site in compressible(sites).items():
        types[site.key].append(name)
    for name, loss in losses.items():
        if loss == 0:
            raise SkippedCell(
                f"loss_based needs losses above 1 for their logarithm; {name} loses nothing at this ratio: choose "
                "another allocation"
            )
        if loss <= 1:
            raise SkippedCell(
                f"loss_based needs losses above 1 for their logarithm; that of {name} is {loss:.3g} (it is summed "
                "over the calibration tokens: use more, or metric=second_moment)"
            )
    wanted = {}
    for names in types.values():
        share = {name: 1 / math.log(losses[name]) for name in names}
        mean = sum(share.values()) / len(names)
        for name in names:
            kept = 1 - (1 - ratio) * share[name] / mean
            wanted[name] = rank_at(sites[name], kept * sites[name].dense)
    return fit(sites, wanted, budget(sites, ratio))
