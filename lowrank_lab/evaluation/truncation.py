"""One linear of the dense model truncated: its activations, or its weight, to the same rank (Dobi-SVD, A.10)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from lowrank_lab.basics import checks
from lowrank_lab.basics.errors import SkippedCell
from lowrank_lab.basics.lazy_module import LazyModule
from lowrank_lab.cells import versions
from lowrank_lab.evaluation import robust
from lowrank_lab.evaluation.chosen_sites import chosen_sites
from lowrank_lab.evaluation.windows import WindowEvaluator
from lowrank_lab.lowrank.storage.absorb import Absorb
from lowrank_lab.modules.site import Site, Sites, by_block
from lowrank_lab.process import progress

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from lowrank_lab.lowrank import loss, masked, solver, spectra
    from lowrank_lab.models import walk
    from lowrank_lab.models.families import Tower
    from lowrank_lab.modules import factorized
    from lowrank_lab.running.context import Context
else:
    torch = LazyModule("torch")
    loss = LazyModule("lowrank_lab.lowrank.loss")
    masked = LazyModule("lowrank_lab.lowrank.masked")
    solver = LazyModule("lowrank_lab.lowrank.solver")
    spectra = LazyModule("lowrank_lab.lowrank.spectra")
    walk = LazyModule("lowrank_lab.models.walk")
    factorized = LazyModule("lowrank_lab.modules.factorized")


class Truncation(WindowEvaluator):
    """Truncating one linear's activations against truncating its weight (Dobi-SVD, Figure 11 and A.10).

    The value is the mean, over all linears, blocks and ratios, of how much higher the negative log-likelihood is
    with the weight truncated than with the activations truncated to the same rank, in nats a token: above 0 where
    the paper's claim holds. The activations are those of one window at a time: their best approximation uses
    the window itself, also its later tokens, and saves nothing. It is a bound, not a compressed model.

    linears  roles of models/families.py or paths of linears within a block; None for all
    blocks   their indices; None for the first, the middle and the last
    ratios   the ranks, as fractions of min(out, in). A rank from ``seqlen`` on truncates no activation, since
             a window has no more tokens; these are left out
    """

    version = versions.TRUNCATION
    component = "TRUNCATION"
    models = ("dense",)

    def __init__(
        self,
        seqlen: int,
        max_windows: int | None,
        bos: Literal["text", "window"],
        linears: list[str] | None,
        blocks: list[int] | None,
        ratios: list[float],
    ) -> None:
        super().__init__(seqlen, max_windows, bos, batch_size=1)
        checks.filled(optional=True, linears=linears)
        checks.indices(blocks=blocks)
        checks.filled(ratios=ratios)
        for ratio in ratios:
            if not checks.is_number(ratio) or not 0 < ratio <= 1:
                raise ValueError(f"ratios={ratio} is not valid; it must be a list of numbers in (0, 1]")
        self.linears = linears
        self.blocks = blocks
        self.ratios = ratios

    def check(self, context: Context) -> None:
        self._chosen(context, context.skeleton())

    def __call__(self, context: Context, part: str) -> dict[str, Any]:
        """Measure it: the value, the losses it is made of, and its protocol."""
        windows, protocol = self.windows(context)
        sites = self._chosen(context, context.model)
        protocol |= {
            "linears": list(dict.fromkeys(site.key for site in sites.values())),
            "blocks": sorted({site.block for site in sites.values()}),
            "ratios": list(self.ratios),
        }
        try:
            found = compare(context.model, context.tower, sites, windows, self.ratios, context.device)
        except robust.NotFiniteError as error:
            return {"metric": "truncation", "value": None, "not_finite": error.layer, "protocol": protocol}
        gains = [point["weight_nll"] - point["activation_nll"] for point in found["points"]]
        return {"metric": "truncation", "value": sum(gains) / len(gains), **found, "protocol": protocol}

    def _chosen(self, context: Context, model: nn.Module) -> dict[str, Site]:
        return chosen_sites(model, context.tower, self.linears, self.blocks, "eval.truncation")


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
    with torch.no_grad():
        dense_nll = loss.mean_nll(model, tower, batches)
        if not math.isfinite(dense_nll):
            runs = (partial(model, batch.to(device), use_cache=False) for batch in batches)
            layers = (robust.first_not_finite(model, run) for run in runs)
            raise robust.NotFiniteError(next((layer for layer in layers if layer), "the model"))
        block_sites = by_block(sites, len(walk.blocks_of(model, tower)))
        entering: list[Tensor] = []
        points = []
        blocks = walk.walk(model, tower, batches, device, entering)
        for index, block, run in progress.track(blocks, "truncations", "block", len(block_sites)):
            for name, site in progress.track(list(block_sites[index].items()), "linears", "linear"):
                weight = factorized.site_weight(block, site).to(device, torch.float64)
                spectrum = solver.decompose(weight, None, None)
                for ratio in ratios:
                    rank = max(1, round(ratio * site.full))
                    if rank >= windows.shape[1]:
                        continue
                    with loss.restoring(block, site):
                        factors = Absorb(0.5).split(*spectrum.factors(weight, rank))
                        factorized.factorize(block, site, *factors)
                        of_weight = loss.mean_nll(model, tower, batches, index, entering)
                    with loss.restoring(block, site):
                        masked.mask_activations(model, tower, {name: site}, {name: masked.first(rank)})
                        of_activation = loss.mean_nll(model, tower, batches, index, entering)
                    if not math.isfinite(of_weight + of_activation):
                        raise robust.NotFiniteError(f"the model with {name} at rank {rank}")
                    point = {"linear": site.key, "block": index, "ratio": ratio, "rank": rank}
                    points.append({**point, "weight_nll": of_weight, "activation_nll": of_activation})
            run()
    if not points:
        raise SkippedCell(
            f"eval.truncation.seqlen={windows.shape[1]} is below all ranks: no activation would be truncated"
        )
    return {"dense_nll": dense_nll, "points": points}
