"""Singular values of the matrices of attention, and of the products within its heads (the slides, for COMCAT)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lowrank_lab.basics.errors import SkippedCell
from lowrank_lab.basics.lazy_module import LazyModule
from lowrank_lab.cells import versions
from lowrank_lab.cells.evaluator import Evaluator
from lowrank_lab.cells.targets import Heads
from lowrank_lab.lowrank.storage.absorb import Absorb
from lowrank_lab.models.families import heads_of
from lowrank_lab.models.vision_families import IMAGE_TASK, TEXT_TASK

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from lowrank_lab.models import walk
    from lowrank_lab.modules import base, heads, linears
    from lowrank_lab.running.context import Context
else:
    torch = LazyModule("torch")
    walk = LazyModule("lowrank_lab.models.walk")
    base = LazyModule("lowrank_lab.modules.base")
    heads = LazyModule("lowrank_lab.modules.heads")
    linears = LazyModule("lowrank_lab.modules.linears")


class HeadValues(Evaluator):
    """The singular values of W_q, W_k, W_v and W_o, and by head of W_qᵀ W_k and W_o W_v, each over the largest.

    They are means over the blocks, and over the heads, of the dense model, without biases. The value is the share
    of the squares that the products keep at half of their rank, so at half of their parameters.
    """

    version = versions.HEAD_VALUES
    component = "HEAD_VALUES"
    models = ("dense",)
    model_tasks = (TEXT_TASK, IMAGE_TASK)

    def check(self, context: Context) -> None:
        """Raises SkippedCell where the attention has no such products."""
        self._sites(context, context.skeleton())

    def __call__(self, context: Context, part: str) -> dict[str, Any]:
        """Measure it: the value, and all ``curves``."""
        blocks, attention = walk.blocks_of(context.model, context.tower), context.tower.attention
        assert attention is not None
        names = {"W_q": attention.query, "W_k": attention.key, "W_v": attention.value, "W_o": attention.output}
        curves = {name: [_of_matrix(block, path) for block in blocks] for name, path in names.items()}
        products: dict[str, list[Tensor]] = {"qk": [], "vo": []}
        for site in self._sites(context, context.model):
            p, q = heads.product_of(blocks[site.block], site)
            p = p[: site.width] if site.product == "qk" else p
            products[site.product].append(_of_product(p, q[:, : site.width]))
        curves |= {"W_qᵀ W_k": products["qk"], "W_o W_v": products["vo"]}
        values = torch.stack([*products["qk"], *products["vo"]])
        half = values.shape[1] // 2
        kept = values[:, :half].square().sum(1) / values.square().sum(1)
        return {
            "metric": "energy at half the rank",
            "value": float(kept.mean()),
            "curves": {
                name: {"by_head": name not in names, "values": _mean(found)} for name, found in curves.items()
            },
            "protocol": {"blocks": len(blocks), "heads": heads_of(context.family, context.model_config)},
        }

    def _sites(self, context: Context, model: nn.Module) -> list[Any]:
        count = heads_of(context.family, context.model_config)
        shapes = linears.linear_shapes(model, context.tower)
        if context.cell.saved is not None:
            raise SkippedCell("eval=head_values is of a dense model")
        return [
            site
            for index, of_block in enumerate(shapes)
            for site in Heads().products_in(context.tower, index, of_block, count, Absorb(0.5))
        ]


def _of_matrix(block: nn.Module, path: str) -> Tensor:
    return torch.linalg.svdvals(base.dense_weight(block.get_submodule(path)).detach().double())


def _of_product(p: Tensor, q: Tensor) -> Tensor:
    """The singular values of p · q, from factors as small as the head."""
    return torch.linalg.svdvals(torch.linalg.qr(p).R @ torch.linalg.qr(q.T).R.T)


def _mean(found: list[Tensor]) -> list[float]:
    """The mean of singular values over the largest of each."""
    scaled = [values / values[0].clamp(min=torch.finfo(values.dtype).tiny) for values in found]
    return [round(float(value), 5) for value in torch.stack(scaled).mean(0)]
