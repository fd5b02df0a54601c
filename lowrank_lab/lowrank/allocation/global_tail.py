"""Water-filling over all linears on the exact truncation errors."""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping
from fnmatch import fnmatchcase
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from lowrank_lab.basics import checks
from lowrank_lab.basics.errors import SkippedCell, UserError
from lowrank_lab.lowrank.artifacts import tails
from lowrank_lab.lowrank.ranks import Ranks, budget, total_cost
from lowrank_lab.modules.site import Site, Sites

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
    computes_little = True

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
    Buying the segments of their lower convex hulls by falling error per cost is optimal for the cost spent at
    every moment, whatever the costs and errors are. It stops at the first segment that does not fit; the rest
    of the budget buys single ranks, so that less than one rank of any site stays unspent. These are the best ones
    at each step, not the best of all: where further ranks cost less (a concave cost), segments are long, and the
    rest may be large. The error is above the least possible by at most the rest times the rate of the first segment
    that does not fit. Raises SkippedCell where rank 1 everywhere costs more than ``limit``.
    """
    ranks = buy_segments(sites, tails, limit)
    return _spend_the_rest(sites, tails, ranks, limit - total_cost(sites, ranks))


def buy_segments(sites: Sites, tails: Tails, limit: int) -> Ranks:
    """The rank plan of least summed error among all that cost no more than itself, near ``limit``.

    Raises SkippedCell where rank 1 everywhere costs more than ``limit``.
    """
    hulls = {name: _lower_hull(_points(site, tails[name])) for name, site in sites.items()}
    ranks: Ranks = {name: hull[0].rank for name, hull in hulls.items()}
    spent = total_cost(sites, ranks)
    if spent > limit:
        raise SkippedCell("the ratio leaves less than rank 1 for every linear")
    segments = []
    for number, (name, hull) in enumerate(hulls.items()):
        for (_, cost, error), (rank, next_cost, next_error) in pairwise(hull):
            gain = (error - next_error) / (next_cost - cost)
            # Equal gains in the order of the model; on one hull gains fall, so ranks are bought in order.
            segments.append((-gain, number, next_cost, next_cost - cost, name, rank))
    for _, _, _, cost, name, rank in sorted(segments, key=lambda segment: segment[:3]):
        if spent + cost > limit:
            break
        ranks[name] = rank
        spent += cost
    return ranks


class _Point(NamedTuple):
    """One choice for a site, with its squared error."""

    rank: int | None
    cost: int
    error: float


def _points(site: Site, tail: np.ndarray) -> list[_Point]:
    """Every choice for one site, by rising cost."""
    ranked = [_Point(k, site.cost(k), float(tail[k])) for k in range(1, site.last + 1)]
    return [*ranked, _Point(None, site.dense, 0.0)]


def _lower_hull(points: list[_Point]) -> list[_Point]:
    """The points on the lower convex hull, from the cheapest to dense; of equal costs the last one."""
    hull: list[_Point] = []
    for point in points:
        if hull and hull[-1].cost == point.cost:
            hull.pop()
        while len(hull) >= 2:
            (_, cost0, error0), (_, cost1, error1) = hull[-2:]
            # Drop the middle point where it lies on or above the line from the one before it to the new one.
            if (error0 - error1) * (point.cost - cost0) > (error0 - point.error) * (cost1 - cost0):
                break
            hull.pop()
        hull.append(point)
    return hull


def _spend_the_rest(sites: Sites, tails: Tails, ranks: Ranks, left: int) -> Ranks:
    """Buy single ranks, best error per cost first, until no further one fits."""
    ranks = dict(ranks)

    def next_rank(name: str) -> tuple[float, str, int] | None:
        rank = ranks[name]
        if rank is None or rank >= sites[name].last:
            return None
        cost = sites[name].cost(rank + 1) - sites[name].cost(rank)
        gain = float(tails[name][rank] - tails[name][rank + 1])
        return (-gain / cost if cost else -math.inf), name, cost

    heap = [entry for name in sites if (entry := next_rank(name)) is not None]
    heapq.heapify(heap)
    while heap:
        _, name, cost = heapq.heappop(heap)
        if cost > left:
            continue
        rank = ranks[name]
        assert rank is not None
        ranks[name] = rank + 1
        left -= cost
        if (entry := next_rank(name)) is not None:
            heapq.heappush(heap, entry)
    return ranks
