"""Linears of an attention some of whose heads have fewer values than the others see: COMCAT's factors.

A head of size d whose product W_qᵀ W_k has been cut to rank r needs r rows of queries and r of keys. The attention
of transformers has heads of one size, so ``HeadRows`` fills up what its linear gives with zeros, which change no
product, and ``HeadColumns`` reads only what is not such a zero. Every family's attention stays as it is, and its
scale too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_lab.modules.base import CompressedLinear, Counts, bias_of, dense_weight
from lowrank_lab.modules.counts import count
from lowrank_lab.modules.factorized import (
    check_reach,
    factors_to_rebuild,
    plain_linear,
    put_factors,
    to_plain,
    weight_of,
)
from lowrank_lab.modules.site import HeadSite


class _OfHeads(CompressedLinear):
    """``linear`` has ``ranks[h]`` values for head h, and the model ``size`` for each."""

    input_part = output_part = "linear"
    trainable = True

    def __init__(self, linear: nn.Module, ranks: Sequence[int], size: int) -> None:
        super().__init__()
        self.linear = linear
        self.ranks = tuple(ranks)
        self.size = size

    def describe(self) -> dict[str, Any]:
        return {"ranks": list(self.ranks), "size": self.size}

    def counts(self) -> Counts:
        return count(self.linear)

    def to_plain(self, dtype: torch.dtype) -> nn.Module:
        self.linear = to_plain(self.linear, dtype)
        return self

    def places(self) -> list[int]:
        """Where each value of the linear stands among those of the model."""
        return [head * self.size + i for head, rank in enumerate(self.ranks) for i in range(rank)]


class HeadRows(_OfHeads):
    """Queries, keys or values (…, heads · size): those of ``linear``, and zeros behind them in each head."""

    kind = "head_rows"

    @classmethod
    def empty(cls, description: dict[str, Any], replaced: Any) -> HeadRows:
        like, bias = dense_weight(replaced), bias_of(replaced)
        rows = sum(description["ranks"])
        shorter = None if bias is None else bias.new_empty(rows)
        return cls(plain_linear(like.new_empty(rows, like.shape[1]), shorter), **description)

    def dense_weight(self) -> Tensor:
        return self._spread(dense_weight(self.linear).detach().float())

    def dense_bias(self) -> Tensor | None:
        bias = bias_of(self.linear)
        return None if bias is None else self._spread(bias)

    def _spread(self, rows: Tensor) -> Tensor:
        spread = rows.new_zeros(len(self.ranks) * self.size, *rows.shape[1:])
        spread[self.places()] = rows
        return spread

    def forward(self, x: Tensor) -> Tensor:
        heads = [
            nn.functional.pad(values, (0, self.size - rank))
            for values, rank in zip(self.linear(x).split(self.ranks, -1), self.ranks, strict=True)
        ]
        return torch.cat(heads, -1)


class HeadColumns(_OfHeads):
    """The output of an attention: ``linear`` of those of its values (…, heads · size) that are not filled up."""

    kind = "head_columns"

    @classmethod
    def empty(cls, description: dict[str, Any], replaced: Any) -> HeadColumns:
        like = dense_weight(replaced)
        columns = like.new_empty(like.shape[0], sum(description["ranks"]))
        return cls(plain_linear(columns, bias_of(replaced)), **description)

    def dense_weight(self) -> Tensor:
        columns = dense_weight(self.linear).detach().float()
        spread = columns.new_zeros(len(columns), len(self.ranks) * self.size)
        spread[:, self.places()] = columns
        return spread

    def forward(self, x: Tensor) -> Tensor:
        heads = x.split(self.size, -1)
        kept = [values[..., :rank] for values, rank in zip(heads, self.ranks, strict=True)]
        return self.linear(torch.cat(kept, -1))


def product_of(block: nn.Module, site: HeadSite) -> tuple[Tensor, Tensor]:
    """P (out, size) and Q (size, width + 1), float64, whose product is the site's; the last column is of biases.

    For ``qk`` the first of them is transposed and has biases too, (width + 1, size): with x̃ = [x, 1] the scores are
    x̃ᵀ P Q x̃. For ``vo`` P Q x̃ is what a token's value adds to the output.
    """
    first, second = (block.get_submodule(member) for member in site.members)
    q = _with_bias(second, site)
    if site.product == "qk":
        return _with_bias(first, site).T, q
    return dense_weight(first).detach()[:, _of_head(site)].double(), q


@weight_of.register
def _(site: HeadSite, block: nn.Module) -> Tensor:
    """The identity between the two factors of the product."""
    return torch.eye(site.inp, device=dense_weight(block.get_submodule(site.members[0])).device)


@put_factors.register
def _(site: HeadSite, block: nn.Module, left: Tensor, right: Tensor) -> None:
    """Multiply ``left`` (size, k) and ``right`` (k, size) into the two linears, whose head then has k values."""
    first, second = site.members
    if site.product == "qk":
        _change_rows(block, first, site, left.T)
    else:
        _change_columns(block, first, site, left)
    _change_rows(block, second, site, right)


@factors_to_rebuild.register
def _(site: HeadSite, block: nn.Module) -> tuple[Tensor, Tensor] | None:
    """What takes the values that the head has out of those of the model, whose others are zero."""
    first: Any = block.get_submodule(site.members[0])
    if not isinstance(first, _OfHeads):
        return None
    kept = torch.eye(site.inp)[:, : first.ranks[site.head]]
    return kept, kept.T


def _change_rows(block: nn.Module, path: str, site: HeadSite, change: Tensor) -> None:
    """Replace the rows of the head by ``change`` (k, rows) times them, and their biases too."""
    parts, ranks, bias = _parts(block, path, site, 0)
    parts[site.head] = (change.double() @ parts[site.head].double()).to(parts[site.head])
    biases = None
    if bias is not None:
        of_heads = list(bias.split(ranks))
        of_heads[site.head] = (change.double() @ of_heads[site.head].double()).to(bias)
        biases = torch.cat(of_heads)
    ranks[site.head] = len(change)
    linear = plain_linear(torch.cat(parts), biases)
    check_reach(*linear.parameters())
    block.set_submodule(path, HeadRows(linear, ranks, site.inp))


def _change_columns(block: nn.Module, path: str, site: HeadSite, change: Tensor) -> None:
    """Replace the columns of the head by them times ``change`` (columns, k)."""
    parts, ranks, bias = _parts(block, path, site, 1)
    parts[site.head] = (parts[site.head].double() @ change.double()).to(parts[site.head])
    ranks[site.head] = change.shape[1]
    linear = plain_linear(torch.cat(parts, 1), bias)
    check_reach(*linear.parameters())
    block.set_submodule(path, HeadColumns(linear, ranks, site.inp))


def _parts(block: nn.Module, path: str, site: HeadSite, side: int) -> tuple[list[Tensor], list[int], Tensor | None]:
    """The rows (``side`` 0) or columns of each head as they are now, how many each has, and the bias."""
    module: Any = block.get_submodule(path)
    changed = isinstance(module, _OfHeads)
    linear = module.linear if changed else module
    ranks = list(module.ranks) if changed else [site.inp] * site.heads
    bias = bias_of(linear)
    return list(dense_weight(linear).detach().split(ranks, side)), ranks, None if bias is None else bias.detach()


def _with_bias(linear: nn.Module, site: HeadSite) -> Tensor:
    """The rows of a head in a dense linear, and their biases as a last column: (size, width + 1), float64."""
    weight, bias = dense_weight(linear).detach()[_of_head(site)].double(), bias_of(linear)
    of_head = weight.new_zeros(len(weight)) if bias is None else bias.detach()[_of_head(site)].double()
    return torch.cat([weight, of_head[:, None]], 1)


def _of_head(site: HeadSite) -> slice:
    return slice(site.head * site.inp, (site.head + 1) * site.inp)
