"""Water-filling over all linears on the exact truncation errors."""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from fnmatch import fnmatchcase
from itertools import pairwise
from typing import TYPE_CHECKING, TypeAlias

from lowrank_lab import checks
from lowrank_lab.errors import SkippedCell, UserError
from lowrank_lab.lowrank.artifacts import tails
from lowrank_lab.lowrank.ranks import Ranks, Site, Sites, budget, total_cost

if TYPE_CHECKING:
    import numpy as np

    from lowrank_lab.running.context import Context

# By the full name of a site, its squared error at every rank 0 … min(out, in), float64.
Tails: TypeAlias = "Mapping[str, np.ndarray]"


class GlobalTail:
    """Minimise the summed squared error of all linears at a given cost.

    ``weights`` multiplies the errors of the sites whose names match a pattern, such as {"*.down_proj": 2.0}; where
    several match, the last one counts. None weighs all alike.
    """

    needs_calibration = False

    def __init__(self, weights: Mapping[str, float] | None) -> None:
        weights = weights or {}
        if not isinstance(weights, Mapping):
            raise ValueError(f"weights={weights} is not valid; it must be factors by pattern, {{*.down_proj:2}}")
        for pattern, weight in weights.items():
            if not checks.is_number(weight) or weight <= 0:
                raise ValueError(f"weights: {pattern}: {weight} is not valid; it must be a number above 0")
        self.weights = dict(weights)

    def __call__(self, context: Context) -> Ranks:
        return water_fill(context.sites, self._weighted(tails(context)), budget(context.sites, context.ratio))

    def _weighted(self, tails: Tails) -> Tails:
        for pattern in self.weights:
            if not any(fnmatchcase(name, pattern) for name in tails):
                raise UserError(
                    f"allocation.weights: no linear matches {pattern}; the first is {next(iter(tails))}"
                )
        weight = dict.fromkeys(tails, 1.0)
        for pattern, value in self.weights.items():
            weight.update({name: value for name in tails if fnmatchcase(name, pattern)})
        return {name: tail * weight[name] for name, tail in tails.items()}


def water_fill(sites: Sites, tails: Tails, limit: int) -> Ranks:
    """The rank plan of least summed error for at most ``limit``.

    Each site offers points (cost, error): rank 1 up to the last rank that saves anything, and dense with error 0.
    Buying the segments of their lower convex hulls by falling error per cost is optimal for what it has cost at
    every moment. It stops at the first segment that does not fit; what is left over buys single ranks, so that
    less than one rank of any site stays unspent. Raises SkippedCell where ``limit`` does not reach for rank 1
    everywhere.
    """
    ranks = buy_segments(sites, tails, limit)
    return _spend_the_rest(sites, tails, ranks, limit - total_cost(sites, ranks))


def buy_segments(sites: Sites, tails: Tails, limit: int) -> Ranks:
    """The rank plan of least summed error among all that cost no more than itself, near ``limit``.

    Raises SkippedCell where ``limit`` does not reach for rank 1 everywhere.
    """
    ranks: Ranks = dict.fromkeys(sites, 1)
    spent = total_cost(sites, ranks)
    if spent > limit:
        raise SkippedCell("the ratio leaves less than rank 1 for every linear")
    segments = []
    for number, (name, site) in enumerate(sites.items()):
        for (_, cost, error), (rank, next_cost, next_error) in pairwise(_lower_hull(_points(site, tails[name]))):
            gain = (error - next_error) / (next_cost - cost)
            # Equal gains in the order of the model; on one hull gains fall, so ranks are bought in order.
            segments.append((-gain, number, next_cost, next_cost - cost, name, rank))
    for _, _, _, cost, name, rank in sorted(segments, key=lambda segment: segment[:3]):
        if spent + cost > limit:
            break
        ranks[name] = rank
        spent += cost
    return ranks


def _points(site: Site, tail: np.ndarray) -> list[tuple[int | None, int, float]]:
    """(rank, cost, squared error) of every choice for one site, by rising cost."""
    ranked = [(k, site.cost(k), float(tail[k])) for k in range(1, site.last + 1)]
    return [*ranked, (None, site.dense, 0.0)]


def _lower_hull(points: list[tuple[int | None, int, float]]) -> list[tuple[int | None, int, float]]:
    """The points on the lower convex hull, from the cheapest to dense."""
    hull: list[tuple[int | None, int, float]] = []
    for point in points:
        while len(hull) >= 2:
            (_, cost0, error0), (_, cost1, error1) = hull[-2:]
            # The middle point goes where it lies on or above the line from the one before to the new one.
            if (error0 - error1) * (point[1] - cost0) > (error0 - point[2]) * (cost1 - cost0):
                break
            hull.pop()
        hull.append(point)
    return hull


def _spend_the_rest(sites: Sites, tails: Tails, ranks: Ranks, left: int) -> Ranks:
    """Buy single ranks, best error per parameter first, until not one more fits."""
    ranks = dict(ranks)

    def next_rank(name: str) -> tuple[float, str] | None:
        rank = ranks[name]
        if rank is None or rank >= sites[name].last:
            return None
        return -float(tails[name][rank] - tails[name][rank + 1]) / sites[name].per_rank, name

    heap = [entry for name in sites if (entry := next_rank(name)) is not None]
    heapq.heapify(heap)
    while heap:
        _, name = heapq.heappop(heap)
        cost = sites[name].per_rank
        if cost > left:
            continue
        rank = ranks[name]
        assert rank is not None
        ranks[name] = rank + 1
        left -= cost
        if (entry := next_rank(name)) is not None:
            heapq.heappush(heap, entry)
    return ranks
