"""SpinQuant: QuaRot's rotations of the residual stream and the heads, learned."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from lowrank_lab.basics import checks
from lowrank_lab.basics.errors import SkippedCell
from lowrank_lab.basics.lazy_module import LazyModule
from lowrank_lab.cells import config, versions
from lowrank_lab.quantization.base import Quantization, Transform

if TYPE_CHECKING:
    from lowrank_lab.models.families import Tower
    from lowrank_lab.quantization import learned_rotation, rotation
    from lowrank_lab.running import training
    from lowrank_lab.running.context import Context
else:
    learned_rotation = LazyModule("lowrank_lab.quantization.learned_rotation")
    rotation = LazyModule("lowrank_lab.quantization.rotation")
    training = LazyModule("lowrank_lab.running.training")


class SpinQuant(Transform):
    """Liu et al. 2024, on the calibration text; queries and keys are the KV cache's (kv_cache.rotate).

    steps, learning_rate  of Cayley SGD, the rate falling to zero
    batch_size            sequences a step, ``micro_batch`` of them in a forward
    round_weights         whether weights are rounded to nearest in training too; activations always are
    down                  whether the inputs of down_proj are rotated by a Hadamard matrix, online

    Raises SkippedCell for models whose norms do not allow it.
    """

    label = "SpinQuant"
    mixes_channels = True
    needs_seed = True
    no_influence = ("micro_batch",)
    needs_calibration = True
    online = True

    def __init__(
        self, steps: int, learning_rate: float, batch_size: int, micro_batch: int, round_weights: bool, down: bool
    ) -> None:
        checks.whole(1, steps=steps, batch_size=batch_size, micro_batch=micro_batch)
        checks.above(0, learning_rate=learning_rate)
        checks.flag(round_weights=round_weights, down=down)
        self.steps, self.learning_rate, self.batch_size = steps, learning_rate, batch_size
        self.micro_batch, self.round_weights, self.down = micro_batch, round_weights, down

    def check(self, tower: Tower, quantization: Quantization) -> None:
        rotation.check(tower, self.label)
        if quantization.activations is None and not (self.round_weights and quantization.method is not None):
            raise SkippedCell(
                "SpinQuant learns from rounded numbers; choose quantization/activations=int4 or "
                "quantization.transform.round_weights=true"
            )

    def __call__(self, context: Context, quantization: Quantization) -> None:
        rotation.fold_norms(context.model, context.tower)
        rotation.hadamards(context.model, context.tower, False, self.down)
        cfg, cell = context.cell.cfg, context.cell
        forms = ("weights", "left", "right") if self.round_weights else ()
        recipe = training.Recipe(
            self.steps, self.batch_size, self.micro_batch, self.learning_rate, seed=context.cell.cfg.seed
        )
        learned = context.artifact(
            "rotations",
            "rotations",
            {
                "quantization": versions.QUANTIZATION,
                "model": cell.keys.weights_before("quantization"),
                "sites": [config.for_key(cfg.grouping), cell.keys.targets_for_key],
                "transform": config.for_key(cfg.quantization.transform, without=self.no_influence),
                "activations": config.for_key(cfg.quantization.activations),
                "weights": [config.for_key(cfg.quantization[form]) for form in forms],
                "tokens": cell.keys.calibration_tokens,
                "seed": cfg.seed,
            },
            partial(learned_rotation.learn, context, quantization, recipe, self.round_weights),
            resumable=True,
        )
        rotation.rotate(context.model, context.tower, *learned_rotation.load(learned))
