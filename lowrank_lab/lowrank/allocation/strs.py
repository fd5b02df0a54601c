"""ASVD's sensitivity-based truncation rank search (papers/002 §3.5, §A.4, Algorithm 1).

The sensitivity of a site is the perplexity of the model when that site alone is truncated. One spectrum serves all
candidates of a site. Nothing changes before the truncated site, so the forward starts at its block with the hidden
states of the dense model: half of the work over all blocks.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from lowrank_lab.artifacts.store import write_json
from lowrank_lab.basics import checks
from lowrank_lab.basics.errors import SkippedCell
from lowrank_lab.basics.lazy_module import LazyModule
from lowrank_lab.lowrank import artifacts
from lowrank_lab.lowrank.keys import LowRankKeys
from lowrank_lab.lowrank.ranks import Ranks, budget, rank_of_cost, rank_within, total_cost
from lowrank_lab.lowrank.storage.absorb import Absorb
from lowrank_lab.modules.site import Site, Sites, by_block
from lowrank_lab.process import progress

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from lowrank_lab.lowrank import loss, spectra
    from lowrank_lab.models import walk
    from lowrank_lab.models.tasks.base import Batch
    from lowrank_lab.modules import factorized
    from lowrank_lab.running.context import Context
else:
    torch = LazyModule("torch")
    loss = LazyModule("lowrank_lab.lowrank.loss")
    spectra = LazyModule("lowrank_lab.lowrank.spectra")
    walk = LazyModule("lowrank_lab.models.walk")
    factorized = LazyModule("lowrank_lab.modules.factorized")


@dataclass(frozen=True)
class Step:
    """Truncating one site to ``rank``, with the log-perplexity of the model when only that is done."""

    site: str
    rank: int
    sensitivity: float


class Strs:
    """Truncate first what raises the perplexity least when it is truncated alone.

    ratios             candidates for every site
    samples            the first so many calibration sequences measure the sensitivities (paper: 32 of 2048 tokens)
    target_perplexity  stop at the last plan whose perplexity on these sequences is at most this, where that comes
                       before the ratio; None looks at the ratio alone
    """

    needs_calibration = True

    def __init__(self, ratios: Sequence[float], samples: int, target_perplexity: float | None) -> None:
        if not isinstance(ratios, list) or not ratios or not all(checks.is_number(r) and 0 < r < 1 for r in ratios):
            raise ValueError(f"ratios={ratios} is not valid; it must be numbers between 0 and 1")
        checks.whole(1, samples=samples)
        checks.above(1, optional=True, target_perplexity=target_perplexity)
        self.ratios = sorted(float(ratio) for ratio in ratios)
        self.samples = samples
        self.target_perplexity = target_perplexity

    def __call__(self, context: Context) -> Ranks:
        if context.ratio >= 1:
            return dict.fromkeys(context.sites)
        steps = self._steps(context)
        limit = budget(context.sites, context.ratio)
        index = index_within_budget(context.sites, steps, limit)
        if self.target_perplexity is not None:
            within = index_within_perplexity(index, self.target_perplexity, self._perplexity(context, steps))
            if within < index:
                return plan(context.sites, steps, within)
        return finish(context.sites, steps, index, limit)

    def _perplexity(self, context: Context, steps: Sequence[Step]) -> Callable[[int], float]:
        """The perplexity of the samples by the index of a plan; -1 is the dense model."""
        batches = context.calibration_batches(self.samples)
        return cache(lambda index: perplexity_of(context, plan(context.sites, steps, index), batches))

    def _steps(self, context: Context) -> list[Step]:
        """Every candidate of every site, least sensitive first. The sensitivities are an artifact."""
        keys = LowRankKeys(context.cell)
        parts = {
            "strs": {"ratios": self.ratios, "samples": self.samples},
            "spectra": keys.spectra,
            "tokens": context.cell.keys.calibration_tokens,
            "counted": keys.counted,
        }
        batches = context.calibration_batches(self.samples)
        artifacts.spectra(context)  # so that their time does not count to that of the sensitivities
        make = lambda folder: measure(folder, context, batches, self.ratios)
        folder = context.artifact("sensitivities", "sensitivities", parts, make, resumable=True)
        found: dict[str, dict[str, float]] = {}
        for file in sorted(folder.glob("block_*.json")):
            found |= json.loads(file.read_text())
        context.facts["sensitivities"] = found  # by site and rank, the mean negative log-likelihood in nats
        context.facts["candidate_costs"] = {
            name: {rank: context.sites[name].cost(int(rank)) for rank in by_rank} for name, by_rank in found.items()
        }
        steps = [Step(site, int(rank), nll) for site, by_rank in found.items() for rank, nll in by_rank.items()]
        # Equal sensitivities in an order that does not depend on the machine: the mildest truncation first.
        return sorted(steps, key=lambda step: (step.sensitivity, -step.rank, step.site))


class StrsToPerplexity(Strs):
    """The performance target of §A.4: truncate, in the same order, for as long as the perplexity allows.

    ratios             candidates for every site; the lowest of them bound how far it can go, as the cell's ratio is
                       not read
    samples            the first so many calibration sequences measure the sensitivities and the perplexity
    target_perplexity  the highest that the model may have on these sequences
    """

    meets_ratio = False

    def __init__(self, ratios: Sequence[float], samples: int, target_perplexity: float) -> None:
        checks.above(1, target_perplexity=target_perplexity)
        super().__init__(ratios, samples, target_perplexity)
        self.target = float(target_perplexity)

    def __call__(self, context: Context) -> Ranks:
        """Raises SkippedCell where the dense model's perplexity is above the target."""
        batches = context.calibration_batches(self.samples)
        dense = perplexity_of(context, dict.fromkeys(context.sites), batches)
        if dense > self.target:  # before an hour of sensitivities
            raise SkippedCell(
                f"the dense model has perplexity {dense:.4g} on these samples, "
                f"above allocation.target_perplexity={self.target:g}"
            )
        steps = self._steps(context)
        perplexity = self._perplexity(context, steps)
        index = index_within_perplexity(len(steps) - 1, self.target, perplexity)
        context.facts["perplexity_of_samples"] = {"dense": dense, "compressed": perplexity(index)}
        return plan(context.sites, steps, index)


def plan(sites: Sites, steps: Sequence[Step], index: int) -> Ranks:
    """The ranks once the steps 0 … ``index`` are taken: for each site the lowest of its ranks among them.

    Algorithm 1 sorts in ascending order and reads from the middle to the end, which would truncate the most
    sensitive linears hardest. What it means, and what its search needs to converge, is the beginning up to the
    middle.
    """
    ranks: Ranks = dict.fromkeys(sites)
    for step in steps[: index + 1]:
        rank = ranks[step.site]
        ranks[step.site] = step.rank if rank is None else min(rank, step.rank)
    return ranks


def index_within_budget(sites: Sites, steps: Sequence[Step], limit: int) -> int:
    """The first index whose plan costs at most ``limit``; -1 where the dense model does.

    Binary search; the result is the converged index, not the last one probed. Raises SkippedCell where the plan of
    all steps costs more than ``limit``.
    """
    if sum(site.dense for site in sites.values()) <= limit:
        return -1
    smallest = total_cost(sites, plan(sites, steps, len(steps)))
    if smallest > limit:
        reached = smallest / sum(site.dense for site in sites.values())
        raise SkippedCell(f"the candidates of strs reach down to ratio {reached:.3f}; add lower ones to its ratios")
    low, high = 0, len(steps) - 1
    while low < high:
        middle = (low + high) // 2
        if total_cost(sites, plan(sites, steps, middle)) <= limit:
            high = middle
        else:
            low = middle + 1
    return low


def index_within_perplexity(last: int, target: float, perplexity: Callable[[int], float]) -> int:
    """The highest index up to ``last`` whose plan's ``perplexity`` is at most ``target``; -1 where none is.

    Binary search, for a perplexity that rises with the index.
    """
    low, high = -1, last
    while low < high:
        middle = (low + high + 1) // 2
        if perplexity(middle) <= target:
            low = middle
        else:
            high = middle - 1
    return low


def finish(sites: Sites, steps: Sequence[Step], index: int, limit: int) -> Ranks:
    """The plan of ``index``, whose last step lowers its site only as far as ``limit`` requires.

    Less than one rank of that site stays unspent.
    """
    ranks = plan(sites, steps, index)
    if index < 0:
        return ranks
    name = steps[index].site
    before, now = plan(sites, steps, index - 1)[name], ranks[name]
    assert now is not None
    most = sites[name].last if before is None else before
    left = limit - total_cost(sites, ranks)
    ranks[name] = min(most, rank_of_cost(sites[name], sites[name].cost(now) + left))
    return ranks


def measure(folder: Path, context: Context, batches: Sequence[Batch | Tensor], ratios: Sequence[float]) -> None:
    """For every site and candidate rank the mean loss of ``batches``, for tokens in nats.

    Writes one file a block, {site: {rank: nats}}, each complete or absent. A block whose file exists is not
    measured again.
    """
    model, tower = context.model.to(context.device), context.tower
    block_sites = by_block(context.sites, len(walk.blocks_of(model, tower)))
    entering: list[Tensor] = []
    with torch.no_grad():
        blocks = walk.walk(model, tower, batches, context.device, entering, context.offload, context.task)
        for index, _, run in progress.track(blocks, "sensitivities", "block", len(block_sites)):
            file = folder / f"block_{index:03d}.json"
            if not file.exists():
                found = {}
                for name, site in progress.track(list(block_sites[index].items()), "linears", "linear"):
                    found[name] = _of_site(context, site, entering, batches, candidate_ranks(site, ratios))
                write_json(file, found)
            run()


def candidate_ranks(site: Site, ratios: Sequence[float]) -> list[int]:
    """The ranks of a site at the candidate ratios, each at least 1 and at most the last that saves anything."""
    ranks = {max(1, rank_within(site, ratio)) for ratio in ratios}
    return sorted(rank for rank in ranks if rank <= site.last)


def _of_site(
    context: Context,
    site: Site,
    entering: Sequence[Tensor],
    batches: Sequence[Batch | Tensor],
    candidates: Sequence[int],
) -> dict[int, float]:
    """By rank, the mean loss with ``site`` alone at that rank; ``entering`` are the inputs of its block."""
    model, tower, device = context.model, context.tower, context.device
    block = walk.blocks_of(model, tower)[site.block]
    weight = factorized.site_weight(block, site).to(device, torch.float64)
    spectrum = spectra.load_spectrum(artifacts.spectra(context), site, device)
    left, right = Absorb(0.5).split(*spectrum.factors(weight, max(candidates, default=1)))
    found = {}
    for rank in candidates:
        with loss.restoring(block, site):
            factorized.factorize(block, site, left[:, :rank], right[:rank])
            found[rank] = loss.mean_nll(model, tower, batches, site.block, entering, context.task)
    for rank, nll in found.items():
        if not math.isfinite(nll):
            raise FloatingPointError(f"block {site.block}: the loss is not finite with {site.key} at rank {rank}")
    return found


def perplexity_of(context: Context, ranks: Ranks, batches: Sequence[Batch | Tensor]) -> float:
    """The perplexity of ``batches`` with every site at its rank of ``ranks``."""
    model, tower, sites, device = context.model, context.tower, context.sites, context.device
    blocks = walk.blocks_of(model, tower)
    with torch.no_grad(), ExitStack() as dense_again:
        for site in sites.values():
            dense_again.enter_context(loss.restoring(blocks[site.block], site))
        spectra.compress(model, tower, sites, ranks, artifacts.spectra(context), Absorb(0.5), device)
        return math.exp(loss.mean_nll(model.to(device), tower, batches, task=context.task))
