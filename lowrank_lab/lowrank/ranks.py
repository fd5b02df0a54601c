"""Ratio ↔ rank ↔ cost. The only place that converts one into another; no torch.

A *site* is what is factored as one matrix. ``ratio`` is the fraction of the cost of all sites that is *kept*; what
is counted depends on the method: usually parameters, where rank k of an (out, in) matrix costs k · (out + in);
16-bit words under Dobi-SVD's remapping, where it costs k · max(out, in); or latent values in the key-value cache.
A cost may be any function of the rank that never falls. Between whole ranks it is interpolated, where ranks are
real numbers.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping
from typing import TypeAlias

from lowrank_lab.basics.errors import SkippedCell
from lowrank_lab.modules.site import Site, Sites

# By the full name of a site: its rank, None where it stays dense.
Ranks: TypeAlias = dict[str, int | None]


def budget(sites: Sites, ratio: float) -> int:
    """What all sites together may cost at ``ratio``."""
    # A tolerance far below one unit: 0.8 · 1000 must not become 799.
    return int(ratio * sum(site.dense for site in sites.values()) + 1e-9)


def total_cost(sites: Sites, ranks: Mapping[str, int | None]) -> int:
    return sum(site.cost(ranks[name]) for name, site in sites.items())


def compressible(sites: Sites) -> dict[str, Site]:
    """The sites that some rank makes cheaper. Every allocation leaves the others dense."""
    return {name: site for name, site in sites.items() if site.last > 0}


def budget_of_ranks(sites: Sites, limit: int) -> int:
    """What is left of ``limit`` for the sites that some rank makes cheaper, once the others have their dense cost.

    Raises SkippedCell where rank 1 for all of them costs more.
    """
    ranked = compressible(sites)
    left = limit - sum(site.dense for name, site in sites.items() if name not in ranked)
    if left < sum(site.cost(1) for site in ranked.values()):
        raise SkippedCell("the ratio leaves less than rank 1 for every linear")
    return left


def rank_of_cost(site: Site, cost: float) -> int:
    """The largest rank, up to full, that costs at most ``cost``; 0 where there is none."""
    return bisect_right(range(1, site.full + 1), cost, key=site.cost)


def cost_line(site: Site, rank: int) -> tuple[int, int]:
    """``start`` and ``step`` of the line start + step · k through the costs at ``rank`` and the rank after it."""
    step = site.cost(rank + 1) - site.cost(rank)
    return site.cost(rank) - rank * step, step


def cost_at(site: Site, k: float) -> float:
    """The cost at the real-valued rank ``k`` from 0 to full."""
    start, step = cost_line(site, min(int(k), site.full - 1))
    return start + step * k


def rank_at(site: Site, cost: float) -> float:
    """The real-valued rank that costs ``cost``; below rank 1 and above full in proportion to the cost there."""
    whole = rank_of_cost(site, cost)
    if whole in (0, site.full):
        end = max(1, whole)
        return cost / (site.cost(end) / end)
    start, step = cost_line(site, whole)
    return (cost - start) / step


def rank_within(site: Site, ratio: float) -> int:
    """The largest rank with at most ``ratio`` of the dense cost, saving or not; 0 where there is none."""
    # A tolerance far below one rank: 0.8 · 576 · 192 / 768 = 115.2 must not become 115.19999999999999.
    return int(rank_at(site, ratio * site.dense) + 1e-9)


def rank_for_ratio(site: Site, ratio: float) -> int | None:
    """The largest rank with at most ``ratio`` of the dense cost; None where the site stays dense.

    A rank that costs as much as the dense site or more is no compression. At ratio 1 every site stays dense, also
    where rounding would lose a rank. Raises SkippedCell where not even rank 1 fits.
    """
    if ratio >= 1:
        return None
    rank = rank_within(site, ratio)
    if rank < 1:
        smallest = site.cost(1) / site.dense
        raise SkippedCell(
            f"ratio {ratio} leaves no rank for a {site.out}x{site.inp} linear; "
            f"the smallest for it is {smallest:.4f}"
        )
    return rank if rank <= site.last else None


def starting_share(site: Site, ratio: float) -> float:
    """Where a site starts between rank 1 and the last that saves anything, from 0 to 1.

    It starts at the rank that ``ratio`` gives it alone, but not at the ends, where the gradient vanishes."""
    share = (rank_at(site, ratio * site.dense) - 1) / max(1, site.last - 1)
    return min(max(share, 0.01), 0.99)


def fit(sites: Sites, wanted: Mapping[str, float], limit: int) -> Ranks:
    """Whole ranks in the proportions of ``wanted`` that together cost ``limit`` or less than one rank below it.

    The wanted ranks are scaled by one common factor, each kept between 1 and the last rank that saves anything,
    until they cost ``limit``; then rounded down. What rounding leaves unspent buys ranks in the order of the
    largest remainders: one for every site whose next rank fits, and again while one fits. Less is spent only where
    every site has its last rank. A site for which no rank saves anything stays dense, and counts so. Where
    ``wanted`` is 0 everywhere it says nothing, and all get the same ratio. Raises SkippedCell where rank 1
    everywhere else costs more than ``limit``, FloatingPointError, naming the site, where ``wanted`` is not finite.
    """
    dense: Ranks = dict.fromkeys(sites)
    if limit >= sum(site.dense for site in sites.values()):
        return dense
    limit, sites = budget_of_ranks(sites, limit), compressible(sites)
    for name in sites:
        if not math.isfinite(wanted[name]):
            raise FloatingPointError(f"{name}: its importance is not finite")
    if not any(wanted[name] > 0 for name in sites):
        share = limit / sum(site.dense for site in sites.values())
        wanted = {name: rank_at(site, share * site.dense) for name, site in sites.items()}

    def scaled(factor: float) -> dict[str, float]:
        return {name: min(max(factor * wanted[name], 1.0), site.last) for name, site in sites.items()}

    def cost(ranks: Mapping[str, float]) -> float:
        return sum(cost_at(site, ranks[name]) for name, site in sites.items())

    low, high = 0.0, 1.0
    while cost(scaled(high)) < limit and any(scaled(high)[name] < site.last for name, site in sites.items()):
        high *= 2
        if high > 1e300:  # a site whose importance is zero stays at rank 1
            break
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(scaled(middle)) <= limit else (low, middle)
    exact = scaled(low)
    ranks: dict[str, int] = {name: int(exact[name] + 1e-9) for name in sites}
    left = limit - total_cost(sites, ranks)
    order = sorted(sites, key=lambda name: ranks[name] - exact[name])  # the largest remainder first

    def next_costs(name: str) -> int:
        return sites[name].cost(ranks[name] + 1) - sites[name].cost(ranks[name])

    while True:
        growing = [name for name in order if ranks[name] < sites[name].last and next_costs(name) <= left]
        if not growing:
            return {**dense, **ranks}
        for name in growing:
            if next_costs(name) <= left:
                left -= next_costs(name)
                ranks[name] += 1
