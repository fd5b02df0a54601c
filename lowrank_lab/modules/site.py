"""Sites: linears that are factored as one matrix, and the cost of their ranks. No torch."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar, TypeAlias


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
    between: ClassVar[bool] = False  # whether its matrix stands between two factors, which magnify its rounding

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

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """By member, the (out, in) of its dense weight."""
        return {member: (out, self.inp) for member, out in zip(self.members, self.outs, strict=True)}

    @property
    def own_outs(self) -> dict[str, int]:
        """By member, how many of its outputs belong to the site."""
        return dict(zip(self.members, self.outs, strict=True))


@dataclass(frozen=True)
class HeadSite(Site):
    """The product of two linears of an attention within one head (COMCAT): its rank is at most the head's size.

    ``qk`` is W_qᵀ W_k, ``vo`` is W_o W_v. With P and Q the two factors as they stand, the product is P I Q: what is
    factored is the identity between them, which is why ``outs`` and ``inp`` are the size of a head. ``members`` are
    the two linears, of which other heads have their own rows or columns.

    product  ``qk`` or ``vo``
    head     its index, among ``heads``
    width    of the attention's input
    """

    between: ClassVar[bool] = True
    product: str
    head: int
    heads: int
    width: int

    @property
    def key(self) -> str:
        return f"{'+'.join(self.members)}.{self.head}"

    def parameters(self, rank: int | None) -> int:
        return 2 * self.width * (self.inp if rank is None else rank)

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        rows = (self.heads * self.inp, self.width)
        first, second = self.members
        return {first: rows if self.product == "qk" else rows[::-1], second: rows}

    @property
    def own_outs(self) -> dict[str, int]:
        first, second = self.members
        return {first: self.inp if self.product == "qk" else 0, second: self.inp}


# By the full name of a site: the site.
Sites: TypeAlias = Mapping[str, Site]


def members_in(sites: Sites) -> dict[tuple[int, str], tuple[str, Site]]:
    """By block and path, every linear of ``sites`` once, with the name and the first site that has it."""
    found: dict[tuple[int, str], tuple[str, Site]] = {}
    for name, site in sites.items():
        for member in site.members:
            found.setdefault((site.block, member), (name, site))
    return found


def by_block(sites: Sites, count: int) -> list[dict[str, Site]]:
    """The sites of each of ``count`` blocks, by their full names."""
    found: list[dict[str, Site]] = [{} for _ in range(count)]
    for name, site in sites.items():
        found[site.block][name] = site
    return found
