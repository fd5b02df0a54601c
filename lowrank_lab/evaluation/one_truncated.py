"""One linear of the dense model truncated: its activations, or its weight, to the same rank (Dobi-SVD, A.10)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_lab import progress
from lowrank_lab.cells.targets import Grouping, Targets, sites_of
from lowrank_lab.errors import SkippedCell, UserError
from lowrank_lab.evaluation.robust import NotFiniteError, first_not_finite
from lowrank_lab.lowrank.allocation.sensitivity import mean_nll, restore
from lowrank_lab.lowrank.masked import Mask, mask_activations
from lowrank_lab.lowrank.solver import decompose
from lowrank_lab.lowrank.storage.absorb import Absorb
from lowrank_lab.models.families import Tower
from lowrank_lab.models.walk import blocks_of, walk
from lowrank_lab.modules.factorized import factorize, site_weight
from lowrank_lab.modules.linears import linear_shapes
from lowrank_lab.modules.site import Site, Sites, by_block


def chosen_sites(
    model: nn.Module,
    tower: Tower,
    linears: Sequence[str] | None,
    blocks: Sequence[int] | None,
    setting: str = "eval.truncation",
) -> dict[str, Site]:
    """The linears of ``linears`` (roles or paths; None: all) in ``blocks`` (None: the first, middle and last).

    By full name, in the order of the model. Raises UserError for one that the model does not have, with the
    ``setting`` that asked for it.
    """
    count = len(blocks_of(model, tower))
    blocks = (0, count // 2, count - 1) if blocks is None else blocks
    named = {**{name: (name,) for name in tower.linears}, **tower.roles}
    wanted: set[str] = set()
    for name in tower.linears if linears is None else linears:
        if name not in named:
            raise UserError(f"{setting}.linears={name}: this model has {', '.join(named)}")
        wanted.update(named[name])
    for index in blocks:
        if index >= count:
            raise UserError(f"{setting}.blocks={index}: this model has the blocks 0 to {count - 1}")
    each = sites_of(tower, linear_shapes(model, tower), Grouping(()), Targets("all", "parameters"), Absorb(0.5))
    return {name: site for name, site in each.items() if site.block in blocks and site.key in wanted}


@torch.no_grad()
def compare(
    model: nn.Module,
    tower: Tower,
    sites: Sites,
    windows: Tensor,
    ratios: Sequence[float],
    device: torch.device,
) -> dict[str, Any]:
    """The mean negative log-likelihood of ``windows`` (windows, length), in nats: ``dense_nll``, and ``points``.

    A point is one of ``sites`` at one rank, ``ratio`` · min(out, in): ``weight_nll`` with its weight replaced by
    the best approximation of that rank (plain SVD), ``activation_nll`` with its output W x for each window, the
    bias apart, replaced by the best approximation of that rank. Raises SkippedCell where no rank truncates the
    activations of a window, NotFiniteError where a loss is not finite.
    """
    model.to(device)
    batches = windows.split(1)  # a decomposition a window
    dense_nll = mean_nll(model, tower, batches)
    if not math.isfinite(dense_nll):
        layers = (first_not_finite(model, batch.to(device)) for batch in batches)
        raise NotFiniteError(next((layer for layer in layers if layer), "the model"))
    here_of = by_block(sites, len(blocks_of(model, tower)))
    entering: list[Tensor] = []
    points = []
    for index, block, run in progress.track(
        walk(model, tower, batches, device, entering), "truncations", "block", len(here_of)
    ):
        for name, site in progress.track(list(here_of[index].items()), "linears", "linear"):
            weight = site_weight(block, site).to(device, torch.float64)
            spectrum = decompose(weight, None, None)
            dense = {member: block.get_submodule(member) for member in site.members}

            for ratio in ratios:
                rank = max(1, round(ratio * site.full))
                if rank >= windows.shape[1]:
                    continue
                point: dict[str, Any] = {"linear": site.key, "block": index, "ratio": ratio, "rank": rank}
                factorize(block, site, *Absorb(0.5).split(*spectrum.factors(weight, rank)))
                point["weight_nll"] = mean_nll(model, tower, batches, index, entering)
                restore(block, dense)
                mask_activations(model, tower, {name: site}, {name: first(rank)})
                point["activation_nll"] = mean_nll(model, tower, batches, index, entering)
                restore(block, dense)
                if not math.isfinite(point["weight_nll"] + point["activation_nll"]):
                    raise NotFiniteError(f"the model with {name} at rank {rank}")
                points.append(point)
        run()
    if not points:
        raise SkippedCell(
            f"eval.truncation.seqlen={windows.shape[1]} is below all ranks: no activation would be truncated"
        )
    return {"dense_nll": dense_nll, "points": points}


def first(rank: int) -> Mask:
    """The mask that keeps the first ``rank`` directions."""
    return lambda count: (torch.arange(count) < rank).float()
