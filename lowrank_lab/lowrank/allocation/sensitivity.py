"""How much the perplexity rises when one site alone is truncated (ASVD §3.5).

One spectrum a site serves all its candidates, and as nothing changes before the truncated site, the forward enters
the model at its block with the hidden states of the dense model: half of the work over all blocks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lowrank_lab import progress
from lowrank_lab.artifacts.store import write_json
from lowrank_lab.lowrank.artifacts import spectra
from lowrank_lab.lowrank.ranks import rank_within
from lowrank_lab.lowrank.spectra import compress, load_spectrum
from lowrank_lab.lowrank.storage.absorb import Absorb
from lowrank_lab.models.families import Tower
from lowrank_lab.models.tasks.base import Batch, Task
from lowrank_lab.models.tasks.causal_lm import CAUSAL_LM
from lowrank_lab.models.walk import as_batch, blocks_of, entering_at, walk
from lowrank_lab.modules.factorized import factorize, site_weight
from lowrank_lab.modules.site import Ranks, Site, Sites, by_block

if TYPE_CHECKING:
    from lowrank_lab.running.context import Context


@torch.no_grad()
def measure(
    folder: Path,
    model: nn.Module,
    tower: Tower,
    sites: Sites,
    spectra: Path,
    batches: Sequence[Batch | Tensor],
    ratios: Sequence[float],
    device: torch.device,
    offload: Path | None = None,
    task: Task = CAUSAL_LM,
) -> None:
    """For every site and candidate rank the mean loss of ``batches``, for tokens in nats.

    One file a block, {site: {rank: nats}}, each whole or absent; those that are there are not measured again.
    """
    model.to(device)
    here_of = by_block(sites, len(blocks_of(model, tower)))
    entering: list[Tensor] = []
    stops = walk(model, tower, batches, device, entering, offload, task)
    for index, _, run in progress.track(stops, "sensitivities", "block", len(here_of)):
        file = folder / f"block_{index:03d}.json"
        if not file.exists():
            named = list(here_of[index].items())
            found = {
                name: _of_site(
                    model, tower, site, entering, batches, spectra, candidate_ranks(site, ratios), device, task
                )
                for name, site in progress.track(named, "linears", "linear")
            }
            write_json(file, found)
        run()


def candidate_ranks(site: Site, ratios: Sequence[float]) -> list[int]:
    """The ranks of a site at the candidate ratios, each at least 1 and at most the last that saves anything."""
    ranks = {max(1, rank_within(site, ratio)) for ratio in ratios}
    return sorted(rank for rank in ranks if rank <= site.last)


def _of_site(
    model: nn.Module,
    tower: Tower,
    site: Site,
    entering: Sequence[Tensor],
    batches: Sequence[Batch | Tensor],
    spectra: Path,
    candidates: Sequence[int],
    device: torch.device,
    task: Task,
) -> dict[int, float]:
    block = blocks_of(model, tower)[site.block]
    dense = {member: block.get_submodule(member) for member in site.members}
    weight = site_weight(block, site).to(device, torch.float64)
    factors = load_spectrum(spectra, site, device).factors(weight, max(candidates, default=1))
    left, right = Absorb(0.5).split(*factors)
    found = {}
    try:
        for rank in candidates:
            factorize(block, site, left[:, :rank], right[:rank])
            found[rank] = mean_nll(model, tower, batches, site.block, entering, task)
            restore(block, dense)
    finally:
        restore(block, dense)
    for rank, nll in found.items():
        if not math.isfinite(nll):
            raise FloatingPointError(f"block {site.block}: the loss is not finite with {site.key} at rank {rank}")
    return found


def restore(block: nn.Module, members: dict[str, nn.Module]) -> None:
    for name, module in members.items():
        block.set_submodule(name, module)


def mean_nll(
    model: nn.Module,
    tower: Tower,
    batches: Sequence[Batch | Tensor],
    block: int = 0,
    entering: Sequence[Tensor] = (),
    task: Task = CAUSAL_LM,
) -> float:
    """The mean loss of all that is predicted (of tokens in nats), entering ``block`` with these states."""
    device = next(model.parameters()).device
    total, count = 0.0, 0
    for number, given in enumerate(batches):
        batch = {name: tensor.to(device) for name, tensor in as_batch(given).items()}
        with entering_at(model, tower, block, entering[number].to(device)) if block else nullcontext():
            total += task.loss(model, batch, "sum").item()
        count += task.predicted(batch)
    return total / count


@torch.no_grad()
def perplexity_of(context: Context, ranks: Ranks, batches: Sequence[Batch]) -> float:
    """The perplexity of ``batches`` with every site at its rank of ``ranks``."""
    model, blocks = context.model, blocks_of(context.model, context.tower)
    dense = [
        (blocks[site.block], {member: blocks[site.block].get_submodule(member) for member in site.members})
        for site in context.sites.values()
    ]
    try:
        compress(model, context.tower, context.sites, ranks, spectra(context), Absorb(0.5), context.device)
        return math.exp(mean_nll(model.to(context.device), context.tower, batches, task=context.task))
    finally:
        for block, members in dense:
            restore(block, members)
