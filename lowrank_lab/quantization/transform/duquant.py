"""DuQuant: outliers of activations spread over the channels, by what calibration shows of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lowrank_lab import checks
from lowrank_lab.quantization.base import Quantization, Transform

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lowrank_lab.quantization.outliers import Spreading
    from lowrank_lab.running.context import Context

SAMPLE = 256  # tokens that the search looks at, evenly taken: with the largest ones, output errors are the same


class DuQuant(Transform):
    """Lin et al. 2024, for the inputs of all linears that are quantized (outliers.py).

    alpha       how much of the activations' outliers the weights take over
    block_size  of the two block-diagonal rotations
    steps       of the greedy search for each of their blocks

    The scale is part of the first rotation's blocks, which costs nothing. Between the factors of a site nothing is
    left for the forward: the right factor takes it over, unless the quantization has a ``latent`` of its own.
    """

    label = "DuQuant"
    needs_seed = True
    needs_calibration = True
    online = True

    def __init__(self, alpha: float, block_size: int, steps: int) -> None:
        checks.share(alpha=alpha)
        checks.whole(1, block_size=block_size)
        checks.whole(0, steps=steps)
        self.alpha, self.block_size, self.steps = alpha, block_size, steps

    def __call__(self, context: Context, quantization: Quantization) -> None:
        """Raises FloatingPointError, naming the linear, where an activation is not finite."""
        from lowrank_lab import progress
        from lowrank_lab.modules.linears import linears_in, shared_inputs
        from lowrank_lab.quantization.apply import members_by_block
        from lowrank_lab.quantization.inputs import look_at_inputs

        members, seed = members_by_block(context), context.cell.cfg.seed
        blocks = context.walk(context.model)
        for index, block, run in progress.track(blocks, "DuQuant", "block", len(members)):
            targets = linears_in(block, members[index])
            groups = [
                g for g in shared_inputs(block, context.tower, context.tower.linears) if set(g) & set(targets)
            ]
            if quantization.latent is not None:
                groups = [group for group in groups if not _reads_latent(group)]
            tokens = context.calibration_ids.numel()
            seen = look_at_inputs(block, [group[0] for group in groups], run, tokens, SAMPLE)
            for group in groups:
                try:
                    spreading = self._made_for(block, group, *seen.pop(group[0]), seed)
                except FloatingPointError as error:
                    raise FloatingPointError(f"block {index}: {group[0]}: {error}") from None
                _spread(block, group, targets, spreading)

    def _made_for(self, block: nn.Module, group: list[str], rows: Tensor, abs_max: Tensor, seed: int) -> Spreading:
        """From a sample of tokens (n, width) and the largest |x| of each channel (width,)."""
        from lowrank_lab.modules.factorized import dense_weight
        from lowrank_lab.quantization.outliers import spread_outliers
        from lowrank_lab.quantization.scales import largest

        weights = largest([dense_weight(block.get_submodule(path)) for path in group])
        return spread_outliers(rows, abs_max, weights, self.alpha, self.block_size, self.steps, seed)


def _reads_latent(group: list[str]) -> bool:
    return group[0].endswith(".left")


def _spread(block: nn.Module, group: list[str], targets: list[str], spreading: Spreading) -> None:
    """Put ``spreading`` between the linears of ``group`` and their input: into the right factor, or online."""
    from lowrank_lab.modules.linears import change_bias, change_weight, input_side, set_steps

    for path in group:
        change_weight(block, path, spreading.weight)
    if _reads_latent(group):
        right = input_side(block, group[0].removesuffix(".left"))
        change_weight(block, right, lambda weight: spreading.activations(weight.T).T)
        change_bias(block, right, lambda bias: spreading.activations(bias.unsqueeze(0))[0])
        return
    # What is no target shares the input but not the rounding to come, so it has steps of its own.
    for part in ([p for p in group if p in targets], [p for p in group if p not in targets]):
        if part:
            like = next(block.get_submodule(part[0]).parameters())
            set_steps(block, part, [step.to(like) for step in _steps(spreading)])


def _steps(spreading: Spreading) -> list[nn.Module]:
    from lowrank_lab.modules.steps import Permute, Rotate

    width, size = len(spreading.order), spreading.first.shape[1]
    first, order, second = Rotate(width, size), Permute(width), Rotate(width, size)
    first.blocks.data, second.blocks.data = spreading.scaled_first(), spreading.second
    order.order.data = spreading.order.int()
    return [first, order, second]
