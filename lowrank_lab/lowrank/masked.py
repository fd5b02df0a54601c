"""Sites with a mask on their singular directions, so that the loss has a gradient for how much of each is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial, singledispatch
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_lab.basics.errors import named
from lowrank_lab.lowrank.spectra import load_spectrum
from lowrank_lab.lowrank.storage.absorb import Absorb
from lowrank_lab.lowrank.truncation import smooth_truncation
from lowrank_lab.models.families import Tower
from lowrank_lab.models.walk import blocks_of
from lowrank_lab.modules.factorized import factorize, install, plain_linear, site_weight
from lowrank_lab.modules.site import HeadSite, Site, Sites, by_block

# From how many directions there are to the factor of each, (count,).
Mask = Callable[[int], Tensor]


def first(rank: int) -> Mask:
    """The mask that keeps the first ``rank`` directions."""
    return lambda count: (torch.arange(count) < rank).float()


class MaskedLatent(nn.Module):
    """A right factor whose latent values are each multiplied by the mask."""

    def __init__(self, linear: nn.Linear, mask: Mask) -> None:
        super().__init__()
        self.linear = linear
        self.mask = mask

    def forward(self, x: Tensor) -> Tensor:
        latent = self.linear(x)
        return latent * self.mask(latent.shape[-1]).to(latent)


class MaskedHeads(nn.Module):
    """Keys or values by head, those of some heads each multiplied by the mask of the head."""

    def __init__(self, rows: nn.Module, masks: Mapping[int, Mask]) -> None:
        super().__init__()
        self.rows = rows
        self.masks = dict(masks)

    def forward(self, x: Tensor) -> Tensor:
        rows: Any = self.rows
        values = rows(x)
        heads = list(values.split(rows.size, -1))
        for head, mask in self.masks.items():
            kept = nn.functional.pad(mask(rows.ranks[head]).to(values), (0, rows.size - rows.ranks[head]))
            heads[head] = heads[head] * kept
        return torch.cat(heads, -1)


class TruncatedActivation(nn.Module):
    """W x of all tokens of a batch as one matrix, with its singular values multiplied by the mask (Dobi-SVD)."""

    def __init__(self, linear: nn.Linear, mask: Mask, name: str = "a linear") -> None:
        super().__init__()
        self.name = name
        self.linear = linear
        self.mask = mask

    def forward(self, x: Tensor) -> Tensor:
        activation = self.linear(x)
        rows = activation.flatten(0, -2).float()
        with named(self.name):
            truncated = smooth_truncation(rows, self.mask(min(rows.shape)).to(rows))
        return truncated.to(activation).view_as(activation)


class Rows(nn.Module):
    """The outputs of one member out of those of its site, with its bias."""

    def __init__(self, rows: slice, bias: Tensor | None) -> None:
        super().__init__()
        self.rows = rows
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x[..., self.rows]
        return x if self.bias is None else x + self.bias


def mask_directions(
    model: nn.Module,
    tower: Tower,
    sites: Sites,
    spectra: Path,
    ranks: Mapping[str, int],
    masks: Mapping[str, Mask],
    device: torch.device,
) -> None:
    """Replace every site, in place, by its factors at the rank of ``ranks`` with ``masks`` on their directions."""
    for block, name, site in _sites_with_blocks(model, tower, sites):
        weight = site_weight(block, site)
        factors = load_spectrum(spectra, site, device).factors(weight.to(device, torch.float64), ranks[name])
        left, right = (factor.to(weight) for factor in Absorb(0.5).split(*factors))
        put_masked(site, block, left, right, masks[name])


@singledispatch
def put_masked(site: Site, block: nn.Module, left: Tensor, right: Tensor, mask: Mask) -> None:
    """Replace a site by its factors with ``mask`` on the latent values, by the kind of site."""
    install(block, site, MaskedLatent(plain_linear(right, None), mask), partial(_rows_of, left))


@put_masked.register
def _(site: HeadSite, block: nn.Module, left: Tensor, right: Tensor, mask: Mask) -> None:
    _, second = site.members
    before = block.get_submodule(second)
    masks = before.masks if isinstance(before, MaskedHeads) else {}
    if isinstance(before, MaskedHeads):
        block.set_submodule(second, before.rows)
    factorize(block, site, left, right)
    block.set_submodule(second, MaskedHeads(block.get_submodule(second), {**masks, site.head: mask}))


def mask_activations(model: nn.Module, tower: Tower, sites: Sites, masks: Mapping[str, Mask]) -> None:
    """Replace every site, in place, by one whose outputs are truncated batch by batch under ``masks``."""
    for block, name, site in _sites_with_blocks(model, tower, sites):
        truncated = TruncatedActivation(plain_linear(site_weight(block, site), None), masks[name], name)
        install(block, site, truncated, Rows)


def _rows_of(left: Tensor, rows: slice, bias: Tensor | None) -> nn.Module:
    return plain_linear(left[rows], bias)


def _sites_with_blocks(model: nn.Module, tower: Tower, sites: Sites) -> Iterator[tuple[nn.Module, str, Site]]:
    blocks = blocks_of(model, tower)
    for block, of_block in zip(blocks, by_block(sites, len(blocks)), strict=True):
        for name, site in of_block.items():
            yield block, name, site
