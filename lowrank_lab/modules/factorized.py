"""Linears as products of two thin factors, and the replacement of dense linears by them.

A site of one linear becomes one ``FactorizedLinear``. A site of several (q, k and v, for example) becomes one for
each member; all share one right factor, which is stored once and computed once for all.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_lab.basics.errors import SkippedCell
from lowrank_lab.modules.base import (
    CompressedLinear,
    Counts,
    bias_of,
    dense_weight,
    factors_of_linear,
    innermost,
)
from lowrank_lab.modules.counts import count
from lowrank_lab.modules.site import Site


class FactorizedLinear(CompressedLinear):
    """y = left(right(x)): a linear of shape (out, in) at rank k, with k · (out + in) weights.

    ``right`` (k, in) maps the input to k latent values, ``left`` (out, k) maps these to the output and has the
    bias, if there is one. With ``borrows`` the right factor belongs to another member of the site, which lists it:
    so it is stored, counted and moved between devices once.
    """

    kind = "factorized"
    input_part, output_part = "right", "left"
    trainable = True
    shareable = ("right",)

    right: nn.Module

    def __init__(self, left: nn.Module, right: nn.Module, borrows: bool = False) -> None:
        super().__init__()
        if borrows:
            self.borrow("right", right)
        else:
            self.right = right
        self.left = left

    @classmethod
    def empty(cls, description: dict[str, Any], replaced: Any) -> FactorizedLinear:
        like, rank = dense_weight(replaced), description["rank"]
        out, inp = like.shape
        bias = bias_of(replaced)
        return cls(plain_linear(like.new_empty(out, rank), bias), plain_linear(like.new_empty(rank, inp), None))

    def describe(self) -> dict[str, Any]:
        return {"rank": self.rank}

    @property
    def rank(self) -> int:
        return int(innermost(self.left, "output_part").in_features)

    def counts(self) -> Counts:
        return sum((count(part) for part in self.parts().values()), Counts())

    def factors(self) -> tuple[Tensor, Tensor]:
        return dense_weight(self.left), dense_weight(self.right)

    def dense_weight(self) -> Tensor:
        left, right = self.factors()
        return left.detach().float() @ right.detach().float()

    def to_plain(self, dtype: torch.dtype) -> nn.Module:
        for name, part in self.parts().items():
            self._modules[name] = to_plain(part, dtype)
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.left(self.right(x))


class SharedLatent(CompressedLinear):
    """The right factor of a site of several linears: the first call computes it, the others get the same result.

    Steps before several linears are shared in the same way.
    """

    kind = "shared"
    input_part = output_part = "linear"
    trainable = True

    def __init__(self, linear: nn.Module, users: int) -> None:
        super().__init__()
        self.linear = linear
        self.users = users
        self._input: Tensor | None = None
        self._latent: Tensor | None = None
        self._users_left = 0

    @classmethod
    def empty(cls, description: dict[str, Any], replaced: Any) -> SharedLatent:
        return cls(replaced, description["users"])

    def describe(self) -> dict[str, Any]:
        return {"users": self.users}

    def counts(self) -> Counts:
        return count(self.linear)

    def dense_weight(self) -> Tensor:
        return dense_weight(self.linear).detach().float()

    def to_plain(self, dtype: torch.dtype) -> nn.Module:
        self.linear = to_plain(self.linear, dtype)
        return self

    def forward(self, x: Tensor) -> Tensor:
        if self._users_left == 0 or self._input is not x:
            self._input, self._latent = x, self.linear(x)
            self._users_left = self.users
        latent = self._latent
        assert latent is not None
        self._users_left -= 1
        if self._users_left == 0:  # keep no activation longer than the block needs it
            self._input = self._latent = None
        return latent


def to_plain(linear: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A linear layer made of plain linears; a dense one is unchanged."""
    return linear.to_plain(dtype) if isinstance(linear, CompressedLinear) else linear


def site_weight(block: nn.Module, site: Site) -> Tensor:
    """The dense weight (out, in) of a site: those of its members, one below the other."""
    return weight_of(site, block)


@singledispatch
def weight_of(site: Site, block: nn.Module) -> Tensor:
    """``site_weight``, by the kind of site."""
    weights = [dense_weight(block.get_submodule(name)).detach() for name in site.members]
    return weights[0] if len(weights) == 1 else torch.cat(weights)


def plain_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear layer with this ``weight`` (out, in) and ``bias`` (out,), both not trainable."""
    out, inp = weight.shape
    linear = nn.Linear(inp, out, bias=bias is not None, device="meta", dtype=weight.dtype)
    linear.weight = nn.Parameter(weight.detach().contiguous(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return linear


def install(
    block: nn.Module, site: Site, right: nn.Module, make_left: Callable[[slice, Tensor | None], nn.Module]
) -> None:
    """Replace the members of ``site`` in ``block`` by factors.

    ``make_left(rows, bias)`` gives the left factor of the member whose outputs are ``rows`` of the site's. Raises
    SkippedCell for a product of two linears, which has no place for modules of other kinds.
    """
    if site.shapes.keys() != set(site.members) or list(site.own_outs.values()) != list(site.outs):
        raise SkippedCell(f"{site.key}: the factors of a head can only be stored as plain weights; use storage=uv")
    if len(site.members) > 1:
        right = SharedLatent(right, len(site.members))
    first = 0
    for number, (name, out) in enumerate(zip(site.members, site.outs, strict=True)):
        bias = getattr(block.get_submodule(name), "bias", None)
        left = make_left(slice(first, first + out), bias if isinstance(bias, Tensor) else None)
        block.set_submodule(name, FactorizedLinear(left, right, borrows=number > 0))
        first += out


def factorize(block: nn.Module, site: Site, left: Tensor, right: Tensor) -> None:
    """Replace the dense members of ``site`` by ``left`` (out, k) and ``right`` (k, in), in their dtype.

    Raises FloatingPointError where that dtype does not reach to a value.
    """
    put_factors(site, block, left, right)


@singledispatch
def put_factors(site: Site, block: nn.Module, left: Tensor, right: Tensor) -> None:
    """``factorize``, by the kind of site."""
    like = dense_weight(block.get_submodule(site.members[0]))
    left, right = left.to(like), right.to(like)
    check_reach(left, right)
    install(block, site, plain_linear(right, None), lambda rows, bias: plain_linear(left[rows], bias))


def check_reach(*factors: Tensor) -> None:
    """Raises FloatingPointError where the dtype of ``factors`` has not reached to one of their values."""
    if not all(bool(factor.isfinite().all()) for factor in factors):
        raise FloatingPointError(
            f"a factor is too large for {factors[0].dtype}; choose dtype=float32 or storage=uv"
        )


def factors_of(block: nn.Module, site: Site) -> tuple[Tensor, Tensor] | None:
    """``left`` (out, k) and ``right`` (k, in) of a site as stored; None where it has no factors."""
    members = [factors_of_linear(block.get_submodule(name)) for name in site.members]
    lefts, rights = [], []
    for factors in members:
        if factors is None:
            return None
        lefts.append(factors[0].detach())
        rights.append(factors[1].detach())
    return torch.cat(lefts), rights[0]


@singledispatch
def factors_to_rebuild(site: Site, block: nn.Module) -> tuple[Tensor, Tensor] | None:
    """The factors that ``factorize`` needs to make a site as it is now, by its kind; None where it has none.

    It makes it of a block in which every other parameter has the value that it has in this one: linears without
    factors of their own that of ``dense_weight``.
    """
    return factors_of(block, site)


def orthogonal_factors(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same product as U (out, k) and Σ Vᵀ (k, in) of its singular value decomposition, and its σ (k,)."""
    q_left, r_left = torch.linalg.qr(left)
    q_right, r_right = torch.linalg.qr(right.T)
    u, sigma, vt = torch.linalg.svd(r_left @ r_right.T)
    return q_left @ u, sigma.unsqueeze(-1) * (vt @ q_right.T), sigma
