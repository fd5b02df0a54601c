"""The grouping and targets of a method: they choose the sites of a model. No torch.

``grouping`` says which linears are factored together, ``targets`` which are compressed at all and what ``ratio``
counts. Both name *roles*, for which models/families.py lists the linears of each architecture.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from lowrank_lab.basics import checks
from lowrank_lab.basics.errors import SkippedCell, UserError
from lowrank_lab.models.families import Tower
from lowrank_lab.modules.site import HeadSite, Site

ROLES = ("all", "attention", "mlp", "qkv", "kv", "gate_up")
RATIO_OF = ("parameters", "kv_cache")


class Targets:
    """Which linears are compressed, and of what the ratio is a fraction.

    linears   a role, such as ``all`` or ``kv``
    ratio_of  ``parameters``: of the storage of these linears; ``kv_cache``: of the values cached a token (ASVD
              §3.4), where a rank costs one and may have more parameters than the dense linear
    blocks    their indices, from the last where negative (-1); None for all. The ratio is of their linears alone
    tower     the tower of a model that has several, language or vision; None for its first. It is read by the cell
    """

    def __init__(
        self, linears: str, ratio_of: str, blocks: list[int] | None = None, tower: str | None = None
    ) -> None:
        checks.one_of(ROLES, linears=linears)
        checks.text(optional=True, tower=tower)
        checks.one_of(RATIO_OF, ratio_of=ratio_of)
        if ratio_of == "kv_cache" and linears != "kv":
            raise ValueError("ratio_of=kv_cache counts what is cached, so it needs linears=kv")
        if blocks is not None and not (isinstance(blocks, list) and blocks and all(map(_is_index, blocks))):
            raise ValueError(f"blocks={blocks} is not valid; it must be a list of whole numbers, such as [0, -1]")
        self.linears = linears
        self.ratio_of = ratio_of
        self.blocks = blocks
        self.tower = tower

    def blocks_of(self, count: int) -> set[int]:
        """The indices of the blocks among ``count``. Raises UserError for one that does not exist."""
        if self.blocks is None:
            return set(range(count))
        for index in self.blocks:
            if not -count <= index < count:
                raise UserError(f"targets.blocks={index}: this model has the blocks 0 to {count - 1}")
        return {index % count for index in self.blocks}


def _is_index(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


class Grouping:
    """Which linears are factored as one matrix: the linears of each role in ``joint``, stacked.

    They share the right factor, and so one latent: its down-projection is stored and computed once (QSVD).
    """

    products = False  # whether products of two linears are factored

    def __init__(self, joint: Sequence[str]) -> None:
        if isinstance(joint, str):
            raise ValueError(f"joint={joint} is not valid; it must be a list of roles, [{joint}]")
        for role in joint:
            checks.one_of(("qkv", "kv", "gate_up"), joint=role)
        if "qkv" in joint and "kv" in joint:
            raise ValueError("joint=[qkv, kv] is not valid; k and v can only be in one of them")
        self.joint = tuple(joint)

    def products_in(
        self, tower: Tower, block: int, shapes: Mapping[str, tuple[int, int]], heads: int | None, storage: Any
    ) -> list[HeadSite]:
        """The products that are factored in the attention of a block, whose linears have ``shapes``.

        Raises SkippedCell where they cannot be.
        """
        return []


class Heads(Grouping):
    """Within each head of an attention, W_qᵀ W_k and W_o W_v are factored as one matrix each (COMCAT).

    Where nothing stands between queries and keys, these products are all that the attention computes with, and have
    no more rank than the size of a head. Other linears are factored one by one.
    """

    products = True

    def __init__(self) -> None:
        super().__init__(())

    def products_in(
        self, tower: Tower, block: int, shapes: Mapping[str, tuple[int, int]], heads: int | None, storage: Any
    ) -> list[HeadSite]:
        attention = tower.attention
        if attention is None or heads is None or not attention.plain:
            raise SkippedCell(
                "grouping=heads factors products of queries with keys: in this architecture a rotary embedding or "
                "a norm stands between them, or it is not known what does"
            )
        width = shapes[attention.query][1]
        if shapes[attention.query] != shapes[attention.key] or shapes[attention.output] != (
            width,
            shapes[attention.value][0],
        ):
            raise SkippedCell("grouping=heads needs as many heads of keys and values as of queries")
        size = shapes[attention.query][0] // heads
        pairs = {"qk": (attention.query, attention.key), "vo": (attention.output, attention.value)}
        cost = partial(storage.cost, width, width)
        return [
            HeadSite(block, members, (size,), size, 2 * width * size, cost, product, head, heads, width)
            for product, members in pairs.items()
            for head in range(heads)
        ]


def sites_of(
    tower: Tower,
    shapes: Sequence[Mapping[str, tuple[int, int]]],
    grouping: Grouping,
    targets: Targets,
    storage: Any,
    heads: int | None = None,
) -> dict[str, Site]:
    """All sites by their full names, in the order of the model.

    ``shapes`` has by block the (out, in) of every compressible linear; ``storage`` says what ranks cost; ``heads``
    are those of an attention, None where it is not known.
    Raises SkippedCell where the architecture lacks a role that is named, UserError where it lacks a block or
    where costs are none (``check_costs``).
    """
    wanted = tower.linears if targets.linears == "all" else _role(tower, targets.linears)
    joint = [_role(tower, role) for role in grouping.joint]
    blocks = targets.blocks_of(len(shapes))
    sites: dict[str, Site] = {}
    checked: set[tuple[int, int]] = set()
    for index, of_block in enumerate(shapes):
        if index not in blocks:
            continue
        of_heads = _products(grouping.products_in(tower, index, of_block, heads, storage), wanted)
        sites.update({f"{tower.blocks}.{index}.{site.key}": site for site in of_heads})
        in_heads = {member for site in of_heads for member in site.members}
        for members in _groups(tower, joint):
            members = tuple(name for name in members if name in wanted and name not in in_heads)
            if not members:
                continue
            outs = tuple(of_block[name][0] for name in members)
            inp = of_block[members[0]][1]
            out = sum(outs)
            if targets.ratio_of == "kv_cache":
                site = Site(index, members, outs, inp, dense=out, rank_cost=int)  # one value a token and rank
            else:
                if (out, inp) not in checked:
                    check_costs(storage, out, inp)
                    checked.add((out, inp))
                site = Site(index, members, outs, inp, out * inp, partial(storage.cost, out, inp))
            sites[f"{tower.blocks}.{index}.{site.key}"] = site
    return sites


def _products(sites: Sequence[HeadSite], wanted: Sequence[str]) -> list[HeadSite]:
    """Those of ``sites`` whose linears are ``wanted``. Raises SkippedCell where only one of two is."""
    found = [site for site in sites if set(site.members) & set(wanted)]
    if any(not set(site.members) <= set(wanted) for site in found):
        raise SkippedCell("grouping=heads factors products of two linears, of which targets names one alone")
    return found


def check_costs(storage: Any, out: int, inp: int) -> None:
    """Raises UserError where ``storage`` breaks the contract of costs (lowrank/storage/base.py), on some ranks."""
    full = min(out, inp)
    ranks = sorted({0, *(2**power for power in range(full.bit_length())), full - 1, full})
    costs = [storage.cost(out, inp, rank) for rank in ranks]
    for i, (rank, cost) in enumerate(zip(ranks, costs, strict=True)):
        what = f"storage: {type(storage).__name__} says that rank {rank} of a {out}x{inp} linear costs {cost}"
        if not checks.is_count(cost, min(rank, 1), math.inf):
            raise UserError(f"{what}; it must be a whole number{', above 0' if rank else ' from 0'}")
        if i and cost < costs[i - 1]:
            raise UserError(f"{what}, less than the {costs[i - 1]} of rank {ranks[i - 1]}; a cost must never fall")


def _groups(tower: Tower, joint: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """The linears of a block in their order; those of a joint role are one group at the position of the first."""
    groups: list[tuple[str, ...]] = []
    for name in tower.linears:
        group = next((members for members in joint if name in members), (name,))
        if group not in groups:
            groups.append(group)
    return groups


def _role(tower: Tower, role: str) -> tuple[str, ...]:
    if role not in tower.roles:
        raise SkippedCell(f"this architecture has no separate {role} linears")
    return tower.roles[role]
