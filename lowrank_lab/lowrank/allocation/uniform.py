"""The same ratio for every linear that some rank makes cheaper."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lowrank_lab.lowrank.ranks import Ranks, budget, budget_of_ranks, compressible, rank_for_ratio
from lowrank_lab.modules.site import Sites

if TYPE_CHECKING:
    from lowrank_lab.running.context import Context


class Uniform:
    needs_calibration = False
    computes_little = True

    def __call__(self, context: Context) -> Ranks:
        return uniform(context.sites, context.ratio)


def uniform(sites: Sites, ratio: float) -> Ranks:
    ranked = compressible(sites)
    if ratio < 1 and len(ranked) < len(sites):  # the others stay dense, which these have to make up for
        ratio = budget_of_ranks(sites, budget(sites, ratio)) / sum(site.dense for site in ranked.values())
    return {name: rank_for_ratio(site, ratio) if name in ranked else None for name, site in sites.items()}
