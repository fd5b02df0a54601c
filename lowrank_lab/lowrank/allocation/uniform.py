"""The same ratio for every linear."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lowrank_lab.lowrank.ranks import Ranks, rank_for_ratio
from lowrank_lab.modules.site import Sites

if TYPE_CHECKING:
    from lowrank_lab.running.context import Context


class Uniform:
    needs_calibration = False
    computes_little = True

    def __call__(self, context: Context) -> Ranks:
        return uniform(context.sites, context.ratio)


def uniform(sites: Sites, ratio: float) -> Ranks:
    return {name: rank_for_ratio(site, ratio) for name, site in sites.items()}
