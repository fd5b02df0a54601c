"""Water-filling over all linears on the exact truncation errors."""

from __future__ import annotations

import heapq
from itertools import pairwise

import numpy as np

from lowrank_lab.allocation.base import Ranks, Shapes, Tails
from lowrank_lab.errors import SkippedCell
from lowrank_lab.lowrank.ranks import parameters, total_parameters


class GlobalTail:
    """Minimise the summed squared error of all linears at a given number of parameters.

    Each linear offers points (parameters, error): rank 1 up to the last rank that saves anything, and dense with
    error 0. Buying the segments of their lower convex hulls by falling error per parameter is optimal for what
    it has cost at every moment. It stops at the first segment that does not fit; what is left over buys single
    ranks, so that less than one rank of any linear stays unspent.
    """

    needs_tails = True

    def __call__(self, shapes: Shapes, ratio: float, tails: Tails | None) -> Ranks:
        assert tails is not None
        budget = int(ratio * sum(out * inp for out, inp in shapes.values()) + 1e-9)
        ranks = buy_segments(shapes, tails, budget)
        return _spend_the_rest(shapes, tails, ranks, budget - total_parameters(shapes, ranks))


def buy_segments(shapes: Shapes, tails: Tails, budget: int) -> Ranks:
    """The rank plan of least summed error among all that cost no more than itself, near ``budget`` parameters.

    Raises SkippedCell where the budget does not reach for rank 1 everywhere.
    """
    ranks: Ranks = dict.fromkeys(shapes, 1)
    spent = total_parameters(shapes, ranks)
    if spent > budget:
        raise SkippedCell("the ratio leaves less than rank 1 for every linear")
    segments = []
    for number, (name, (out, inp)) in enumerate(shapes.items()):
        for (_, cost, error), (rank, next_cost, next_error) in pairwise(
            _lower_hull(_points(out, inp, tails[name]))
        ):
            gain = (error - next_error) / (next_cost - cost)
            # Equal gains in the order of the model; on one hull gains fall, so ranks are bought in order.
            segments.append((-gain, number, next_cost, next_cost - cost, name, rank))
    for _, _, _, cost, name, rank in sorted(segments, key=lambda segment: segment[:3]):
        if spent + cost > budget:
            break
        ranks[name] = rank
        spent += cost
    return ranks


def _points(out: int, inp: int, tail: np.ndarray) -> list[tuple[int | None, int, float]]:
    """(rank, parameters, squared error) of every choice for one linear, by rising parameters."""
    last = (out * inp - 1) // (out + inp)
    ranked = [(k, parameters(out, inp, k), float(tail[k])) for k in range(1, last + 1)]
    return [*ranked, (None, out * inp, 0.0)]


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


def _spend_the_rest(shapes: Shapes, tails: Tails, ranks: Ranks, left: int) -> Ranks:
    """Buy single ranks, best error per parameter first, until not one more fits."""
    ranks = dict(ranks)

    def next_rank(name: str) -> tuple[float, str] | None:
        rank = ranks[name]
        out, inp = shapes[name]
        if rank is None or parameters(out, inp, rank + 1) >= out * inp:
            return None
        return -float(tails[name][rank] - tails[name][rank + 1]) / (out + inp), name

    heap = [entry for name in shapes if (entry := next_rank(name)) is not None]
    heapq.heapify(heap)
    while heap:
        _, name = heapq.heappop(heap)
        cost = sum(shapes[name])
        if cost > left:
            continue
        rank = ranks[name]
        assert rank is not None
        ranks[name] = rank + 1
        left -= cost
        if (entry := next_rank(name)) is not None:
            heapq.heappush(heap, entry)
    return ranks
