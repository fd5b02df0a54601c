"""Magnitude pruning: the smallest weights of every linear become zero (Han et al., NeurIPS 2015)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lowrank_lab.artifacts.store import fingerprint
from lowrank_lab.basics import checks
from lowrank_lab.basics.errors import SkippedCell, named
from lowrank_lab.basics.lazy_module import LazyModule
from lowrank_lab.cells import config
from lowrank_lab.cells.cell import Cell
from lowrank_lab.cells.compression import Compression, Plan
from lowrank_lab.modules.site import members_in

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from lowrank_lab.models import walk
    from lowrank_lab.modules import base, linears, sparse
    from lowrank_lab.running.context import Context
else:
    torch = LazyModule("torch")
    walk = LazyModule("lowrank_lab.models.walk")
    base = LazyModule("lowrank_lab.modules.base")
    linears = LazyModule("lowrank_lab.modules.linears")
    sparse = LazyModule("lowrank_lab.modules.sparse")

VERSION = 1  # raise it when the same settings prune other weights


class Magnitude(Compression):
    """Prune the weights of smallest |W_ij|, the same fraction of every linear; of a factored one, of both factors.

    sparsity  the fraction of the weights that become zero, from 0 to below 1
    """

    axis = "pruning"
    kind = "pruned"
    kind_in_words = "a pruned model"
    in_name = ("sparsity",)

    def __init__(self, sparsity: float) -> None:
        checks.share(sparsity=sparsity)
        if sparsity == 1:
            raise ValueError("sparsity=1 is not valid; it must be below 1, or no weight is left")
        self.sparsity = float(sparsity)

    @property
    def name(self) -> str:
        return f"magnitude {100 * self.sparsity:g}%"

    def key(self, cell: Cell, before: str) -> str:
        content = {"model": before, "pruning": config.for_key(cell.cfg.pruning), "version": VERSION}
        return fingerprint({**content, "targets": None if cell.is_factored else cell.keys.targets_for_key})

    def check(self, context: Context) -> None:
        """Raises SkippedCell where another compression makes pruned weights nonzero again."""
        for other in context.cell.compressions.values():
            if other.mixes_channels:
                raise SkippedCell(f"{other.name} mixes channels, so that pruned weights become nonzero")

    def plan(self, context: Context) -> Plan:
        """The sparsity of every site."""
        return dict.fromkeys(context.sites, self.sparsity)

    def apply(self, context: Context, plan: Plan) -> dict[str, Any]:
        """Replace the linears of the sites by sparse ones.

        The facts are how many weights were ``pruned`` of ``weights``. Raises SkippedCell for linears that are not
        stored as plain weights.
        """
        pruned = weights = 0
        blocks = walk.blocks_of(context.model, context.tower)
        with context.record.stage("pruning"):
            for (index, member), (name, _) in members_in(context.sites).items():
                block = blocks[index]
                for path in linears.linears_in(block, [member]):
                    linear = block.get_submodule(path)
                    if not base.is_linear(linear):
                        raise SkippedCell(
                            f"pruning works on plain weights; the storage or a compression before it changed {name}"
                        )
                    weight = base.dense_weight(linear).detach()
                    with named(name):
                        kept = largest(weight, plan[name])
                    block.set_submodule(path, sparse.SparseLinear.of(weight, kept, base.bias_of(linear)))
                    pruned, weights = pruned + int((~kept).sum()), weights + kept.numel()
        return {"pruned": pruned, "weights": weights}


def largest(weight: Tensor, sparsity: float) -> Tensor:
    """Which of ``weight`` (out, in) are kept, bool: all but the fraction ``sparsity`` of smallest magnitude.

    Of equal ones the first are pruned. Raises FloatingPointError where a weight is not finite.
    """
    if not torch.isfinite(weight).all():
        raise FloatingPointError("a weight to prune is not finite")
    order = weight.abs().flatten().argsort(stable=True)
    kept = torch.ones(weight.numel(), dtype=torch.bool, device=weight.device)
    kept[order[: round(sparsity * weight.numel())]] = False
    return kept.view(weight.shape)
