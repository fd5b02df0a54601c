"""A site kept as two thin factors, and the replacement of its dense linears by them.

A site of one linear becomes one ``FactorizedLinear``. A site of several (q, k and v, say) becomes one for each
member; all share one right factor, which is stored once and computed once for them all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lowrank_lab.modules.site import Site


class FactorizedLinear(nn.Module):
    """y = left(right(x)): a linear of shape (out, in) at rank k, with k · (out + in) weights.

    ``right`` (k, in) maps the input to k latent values, ``left`` (out, k) maps these to the output and has the
    bias, if there is one. With ``leads`` False ``right`` belongs to another member of the site: it is used here,
    but listed only there, so that it is stored, counted and moved between devices once.
    """

    right: nn.Module

    def __init__(self, left: nn.Module, right: nn.Module, leads: bool = True) -> None:
        super().__init__()
        if leads:
            self.right = right
        else:
            self.__dict__["right"] = right
        self.left = left

    def forward(self, x: Tensor) -> Tensor:
        return self.left(self.right(x))


class SharedLatent(nn.Module):
    """The right factor of a site of several linears: computed by the first that asks, then handed to the others."""

    def __init__(self, linear: nn.Module, users: int) -> None:
        super().__init__()
        self.linear = linear
        self.users = users
        self._input: Tensor | None = None
        self._latent: Tensor | None = None
        self._to_serve = 0

    def forward(self, x: Tensor) -> Tensor:
        if self._to_serve == 0 or self._input is not x:
            self._input, self._latent = x, self.linear(x)
            self._to_serve = self.users
        latent = self._latent
        assert latent is not None
        self._to_serve -= 1
        if self._to_serve == 0:  # hold on to no activation longer than the block needs it
            self._input = self._latent = None
        return latent


def dense_weight(linear: nn.Module) -> Tensor:
    """The weight of a dense layer as (out, in), whether it is a Linear or GPT-2's transposed Conv1D."""
    if isinstance(linear, Conv1D):
        return linear.weight.T
    if isinstance(linear, nn.Linear):
        return linear.weight
    raise TypeError(f"{type(linear).__name__} is not a dense linear layer")


def site_weight(block: nn.Module, site: Site) -> Tensor:
    """The dense weight (out, in) of a site: those of its members, one below the other."""
    weights = [dense_weight(block.get_submodule(name)).detach() for name in site.members]
    return weights[0] if len(weights) == 1 else torch.cat(weights)


def plain_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear layer with this ``weight`` (out, in) and ``bias`` (out,), neither to be trained."""
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

    ``make_left(rows, bias)`` gives the left factor of the member whose outputs are ``rows`` of the site's.
    """
    if len(site.members) > 1:
        right = SharedLatent(right, len(site.members))
    first = 0
    for number, (name, out) in enumerate(zip(site.members, site.outs, strict=True)):
        bias = getattr(block.get_submodule(name), "bias", None)
        left = make_left(slice(first, first + out), bias if isinstance(bias, Tensor) else None)
        block.set_submodule(name, FactorizedLinear(left, right, leads=number == 0))
        first += out


def factorize(block: nn.Module, site: Site, left: Tensor, right: Tensor) -> None:
    """Replace the dense members of ``site`` by ``left`` (out, k) and ``right`` (k, in), in their dtype."""
    like = dense_weight(block.get_submodule(site.members[0]))
    left, right = left.to(like), right.to(like)
    install(block, site, plain_linear(right, None), lambda rows, bias: plain_linear(left[rows], bias))


def factors_of(block: nn.Module, site: Site) -> tuple[Tensor, Tensor] | None:
    """``left`` (out, k) and ``right`` (k, in) of a site made by ``factorize``; None where it is dense."""
    members: list[Any] = [block.get_submodule(name) for name in site.members]
    if not all(isinstance(member, FactorizedLinear) for member in members):
        return None
    lefts = [innermost(member.left).weight.detach() for member in members]
    return torch.cat(lefts), innermost(members[0].right).weight.detach()


def innermost(module: Any) -> Any:
    """The linear itself, dense or in few bits, within what shares its outcome or prepares its input."""
    while "linear" in module._modules:
        module = module.linear
    return module
