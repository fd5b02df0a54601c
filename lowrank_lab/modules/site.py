"""Sites: linears that are factored as one matrix, and the cost of their ranks. No torch."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeAlias


@dataclass(frozen=True)
class Site:
    """A linear, or linears of one block that share an input, stacked along their outputs.

    members    paths of the linears within their block
    outs       output width of each; ``inp`` the input width that they share
    dense      cost of the site uncompressed
    rank_cost  the cost at a rank from 0 to ``full``, which never decreases with the rank. Equality of two sites
               ignores it, as functions cannot be compared
    """

    block: int
    members: tuple[str, ...]
    outs: tuple[int, ...]
    inp: int
    dense: int
    rank_cost: Callable[[int], int] = field(compare=False, repr=False)

    @property
    def key(self) -> str:
        """The name of the site within the block."""
        return "+".join(self.members)

    @property
    def out(self) -> int:
        return sum(self.outs)

    @property
    def full(self) -> int:
        """The rank that reproduces the matrix."""
        return min(self.out, self.inp)

    @cached_property
    def last(self) -> int:
        """The highest rank that costs less than the dense site; 0 where there is none."""
        return bisect_left(range(1, self.full + 1), self.dense, key=self.rank_cost)

    def cost(self, rank: int | None) -> int:
        """The cost at ``rank``; None is dense."""
        return self.dense if rank is None else self.rank_cost(rank)

    def parameters(self, rank: int | None) -> int:
        """The number of values in the site at ``rank`` without biases, whatever its cost counts."""
        return self.out * self.inp if rank is None else rank * (self.out + self.inp)


# By the full name of a site: the site.
Sites: TypeAlias = Mapping[str, Site]


def by_block(sites: Sites, count: int) -> list[dict[str, Site]]:
    """The sites of each of ``count`` blocks, by their full names."""
    found: list[dict[str, Site]] = [{} for _ in range(count)]
    for name, site in sites.items():
        found[site.block][name] = site
    return found
