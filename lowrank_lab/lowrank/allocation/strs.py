"""ASVD's sensitivity-based truncation rank search (papers/002 §3.5, §A.4, Algorithm 1)."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lowrank_lab import checks
from lowrank_lab.errors import SkippedCell
from lowrank_lab.lowrank.artifacts import spectra
from lowrank_lab.lowrank.keys import LowRankKeys
from lowrank_lab.lowrank.ranks import budget, rank_of_cost, total_cost
from lowrank_lab.modules.site import Ranks, Sites

if TYPE_CHECKING:
    from lowrank_lab.running.context import Context


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
            perplexity = lambda i: self._perplexity(context, plan(context.sites, steps, i))
            within = index_within_perplexity(index, self.target_perplexity, perplexity)
            if within < index:
                return plan(context.sites, steps, within)
        return finish(context.sites, steps, index, limit)

    def _steps(self, context: Context) -> list[Step]:
        """Every candidate of every site, least sensitive first. The sensitivities are an artifact."""
        from lowrank_lab.lowrank.allocation.sensitivity import measure

        keys = LowRankKeys(context.cell)
        parts = {
            "strs": {"ratios": self.ratios, "samples": self.samples},
            "spectra": keys.spectra,
            "tokens": context.cell.keys.calibration_tokens,
            "counted": keys.counted,
        }
        batches, made = context.calibration_batches(self.samples), spectra(context)
        make = lambda folder: measure(
            folder,
            context.model,
            context.tower,
            context.sites,
            made,
            batches,
            self.ratios,
            context.device,
            context.offload,
            context.task,
        )
        folder = context.artifact("sensitivities", "sensitivities", parts, make, resumable=True)
        found: dict[str, dict[str, float]] = {}
        for file in sorted(folder.glob("block_*.json")):
            found |= json.loads(file.read_text())
        context.facts["sensitivities"] = found  # by site and rank, the mean negative log-likelihood in nats
        context.facts["candidate_costs"] = {
            name: {rank: context.sites[name].cost(int(rank)) for rank in of_site} for name, of_site in found.items()
        }
        steps = [Step(site, int(rank), nll) for site, of_site in found.items() for rank, nll in of_site.items()]
        # Equal sensitivities in an order that does not depend on the machine: the mildest truncation first.
        return sorted(steps, key=lambda step: (step.sensitivity, -step.rank, step.site))

    def _perplexity(self, context: Context, ranks: Ranks) -> float:
        from lowrank_lab.lowrank.allocation.sensitivity import perplexity_of

        return perplexity_of(context, ranks, context.calibration_batches(self.samples))


def plan(sites: Sites, steps: Sequence[Step], index: int) -> Ranks:
    """The ranks once the steps 0 … ``index`` are taken: for each site the lowest of its ranks among them.

    Algorithm 1 sorts in ascending order and reads from the middle to the end, which would truncate the most
    sensitive linears hardest; what it means, and what its search needs to converge, is the beginning up to the
    middle.
    """
    ranks: Ranks = dict.fromkeys(sites)
    for step in steps[: index + 1]:
        rank = ranks[step.site]
        ranks[step.site] = step.rank if rank is None else min(rank, step.rank)
    return ranks


def index_within_budget(sites: Sites, steps: Sequence[Step], limit: int) -> int:
    """The first index whose plan costs at most ``limit``; -1 where the dense model does.

    Binary search; the result is the converged index, not the last one probed. Raises SkippedCell where not even
    all steps together get there.
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
    """The plan of ``index`` with its last step taken only as far as the budget asks.

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
