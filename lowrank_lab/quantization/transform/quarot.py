"""QuaRot: Hadamard rotations of the residual stream, the heads and the inputs of down_proj, not learned."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lowrank_lab.basics import checks
from lowrank_lab.basics.lazy_module import LazyModule
from lowrank_lab.quantization.base import Quantization, Transform

if TYPE_CHECKING:
    from lowrank_lab.models.families import Tower
    from lowrank_lab.quantization import rotation
    from lowrank_lab.running.context import Context
else:
    rotation = LazyModule("lowrank_lab.quantization.rotation")


class QuaRot(Transform):
    """Ashkboos et al. 2024, but for the rotation of queries and keys, which is the KV cache's (kv_cache.rotate).

    heads  whether values are also mixed between the heads before o_proj, online; within each head they always are
    down   whether the inputs of down_proj are rotated, online

    Raises SkippedCell for models whose norms do not allow it.
    """

    label = "QuaRot"
    mixes_channels = True
    needs_seed = True
    online = True

    def __init__(self, heads: bool, down: bool) -> None:
        checks.flag(heads=heads, down=down)
        self.heads, self.down = heads, down

    def check(self, tower: Tower, quantization: Quantization) -> None:
        rotation.check(tower, self.label)

    def __call__(self, context: Context, quantization: Quantization) -> None:
        rotation.fold_norms(context.model, context.tower)
        rotation.hadamards(context.model, context.tower, self.heads, self.down)
        rotation.rotate(context.model, context.tower, *rotation.start(context.model, context.cell.cfg.seed))
