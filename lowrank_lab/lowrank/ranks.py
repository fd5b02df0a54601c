"""Ratio ↔ rank ↔ cost. The only place that converts one into another; no torch.

A *site* is what is factored as one matrix. ``ratio`` is the fraction of the cost of all sites that is *kept*; what
is counted depends on the method: usually parameters, where rank k of an (out, in) matrix costs k · (out + in);
16-bit words under Dobi-SVD's remapping, where it costs k · max(out, in); or latent values in the key-value cache.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

from lowrank_lab.errors import SkippedCell


@dataclass(frozen=True)
class Site:
    """A linear, or linears of one block that share an input, stacked along their outputs.

    members   paths of the linears within their block
    outs      output width of each; ``inp`` the input width that they share
    dense     cost of the site uncompressed; ``per_rank`` that of one rank
    """

    block: int
    members: tuple[str, ...]
    outs: tuple[int, ...]
    inp: int
    dense: int
    per_rank: int

    @property
    def key(self) -> str:
        """Its name within the block."""
        return "+".join(self.members)

    @property
    def out(self) -> int:
        return sum(self.outs)

    @property
    def full(self) -> int:
        """The rank that reproduces the matrix."""
        return min(self.out, self.inp)

    @property
    def last(self) -> int:
        """The highest rank that costs less than the dense site; 0 where there is none."""
        return min(self.full, (self.dense - 1) // self.per_rank)

    def cost(self, rank: int | None) -> int:
        """The cost at ``rank``; None is dense."""
        return self.dense if rank is None else rank * self.per_rank

    def parameters(self, rank: int | None) -> int:
        """How many numbers the site has at ``rank``, biases apart, whatever is counted as its cost."""
        return self.out * self.inp if rank is None else rank * (self.out + self.inp)


# By the full name of a site: the site, and its rank (None where it stays dense).
Sites: TypeAlias = Mapping[str, Site]
Ranks: TypeAlias = dict[str, int | None]


def budget(sites: Sites, ratio: float) -> int:
    """What all sites together may cost at ``ratio``."""
    # A tolerance far below one unit: 0.8 · 1000 must not become 799.
    return int(ratio * sum(site.dense for site in sites.values()) + 1e-9)


def total_cost(sites: Sites, ranks: Mapping[str, int | None]) -> int:
    return sum(site.cost(ranks[name]) for name, site in sites.items())


def rank_within(site: Site, ratio: float) -> int:
    """The largest rank with at most ``ratio`` of the dense cost, saving or not; 0 where there is none."""
    # A tolerance far below one rank: 0.8 · 576 · 192 / 768 = 115.2 must not become 115.19999999999999.
    return int(ratio * site.dense / site.per_rank + 1e-9)


def rank_for_ratio(site: Site, ratio: float) -> int | None:
    """The largest rank with at most ``ratio`` of the dense cost; None where the site stays dense.

    A rank that costs as much as the dense site or more is no compression. At ratio 1 every site stays dense, also
    where rounding would lose a rank. Raises SkippedCell where not even rank 1 fits.
    """
    if ratio >= 1:
        return None
    rank = rank_within(site, ratio)
    if rank < 1:
        smallest = site.per_rank / site.dense
        raise SkippedCell(
            f"ratio {ratio} leaves no rank for a {site.out}x{site.inp} linear; "
            f"the smallest for it is {smallest:.4f}"
        )
    return rank if rank <= site.last else None


def fit(sites: Sites, wanted: Mapping[str, float], limit: int) -> Ranks:
    """Whole ranks in the proportions of ``wanted`` that together cost ``limit`` or less than one rank below it.

    The wanted ranks are scaled by one common factor, each kept between 1 and the last rank that saves anything,
    until they cost ``limit``; then rounded down, and what rounding left is given out by largest remainder. Less is
    spent only where every site has its last rank. Raises SkippedCell where ``limit`` does not reach for rank 1
    everywhere, FloatingPointError where ``wanted`` says nothing.
    """
    if not all(math.isfinite(wish) for wish in wanted.values()) or not any(wish > 0 for wish in wanted.values()):
        raise FloatingPointError("the importances of all linears are zero, or one is not finite")
    if limit >= sum(site.dense for site in sites.values()):
        return dict.fromkeys(sites)
    if limit < sum(site.cost(1) for site in sites.values()):
        raise SkippedCell("the ratio leaves less than rank 1 for every linear")

    def scaled(factor: float) -> dict[str, float]:
        return {name: min(max(factor * wanted[name], 1.0), site.last) for name, site in sites.items()}

    def cost(ranks: Mapping[str, float]) -> float:
        return sum(ranks[name] * site.per_rank for name, site in sites.items())

    low, high = 0.0, 1.0
    while cost(scaled(high)) < limit and any(scaled(high)[name] < site.last for name, site in sites.items()):
        high *= 2
        if high > 1e18:
            break
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(scaled(middle)) <= limit else (low, middle)
    exact = scaled(low)
    ranks: dict[str, int] = {name: int(exact[name] + 1e-9) for name in sites}
    left = limit - total_cost(sites, ranks)
    order = sorted(sites, key=lambda name: ranks[name] - exact[name])  # the largest remainder first
    while True:
        growing = [name for name in order if ranks[name] < sites[name].last and sites[name].per_rank <= left]
        if not growing:
            return dict(ranks)
        for name in growing:
            if sites[name].per_rank <= left:
                ranks[name] += 1
                left -= sites[name].per_rank
