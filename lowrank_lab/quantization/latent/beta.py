"""QSVD's split of the singular values between the factors of a site, by what rounding costs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from lowrank_lab import checks
from lowrank_lab.errors import SkippedCell
from lowrank_lab.quantization.base import Quantization, Transform

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lowrank_lab.models.families import Tower
    from lowrank_lab.quantization.inputs import Inputs
    from lowrank_lab.running.context import Context


class BetaSplit(Transform):
    """left = U Σ^(1−β), right = Σ^β Vᵀ (Wang et al. 2025), with the β of ``betas`` that is best for the site.

    betas   from 0 (Σ in the left factor) to 1 (in the right one); ½ is storage=uv
    rotate  whether the latent is then rotated by a Hadamard matrix, folded into both factors

    Best is the smallest mean ‖left' Q(right' x) − left right x‖² on the calibration text, with the factors rounded
    to the nearest of their formats and the latent to that of the activations. Dense sites stay as they are.
    """

    label = "QSVD"
    needs_calibration = True

    def __init__(self, betas: Sequence[float], rotate: bool) -> None:
        if not betas:
            raise ValueError("betas=[] is not valid; it must list numbers from 0 to 1")
        for beta in betas:
            checks.share(betas=beta)
        checks.flag(rotate=rotate)
        self.betas, self.rotate = list(betas), rotate

    def check(self, tower: Tower, quantization: Quantization) -> None:
        if quantization.method is None and quantization.activations is None:
            raise SkippedCell("latent=beta splits for what is rounded; choose a quantization/method or activations")

    def __call__(self, context: Context, quantization: Quantization) -> None:
        from lowrank_lab import progress
        from lowrank_lab.models.walk import blocks_of
        from lowrank_lab.quantization.folding import any_factored, latents_in
        from lowrank_lab.quantization.inputs import gather_inputs

        if not any_factored(context.model, context.tower):
            return
        count = len(blocks_of(context.model, context.tower))
        blocks = context.walk(context.model)
        for _, block, run in progress.track(blocks, "split", "block", count):
            latents = latents_in(block, context.tower)
            rows = quantization.activations is not None
            inputs = gather_inputs(block, list(latents), run, context.calibration_ids.numel(), rows, context.device)
            for right, lefts in latents.items():
                self._split(block, right, lefts, inputs.pop(right), quantization)

    def _split(
        self, block: nn.Module, right: str, lefts: list[str], inputs: Inputs, quantization: Quantization
    ) -> None:
        """Replace the factors at the paths ``right`` and ``lefts``, which read its latent, by the best split."""
        import torch

        from lowrank_lab.modules.hadamard import transform
        from lowrank_lab.modules.linears import change_weight
        from lowrank_lab.quantization.folding import weights_of
        from lowrank_lab.quantization.splits import latent_loss, low_factors, splits, weight_loss

        [of_right], of_lefts = weights_of(block, [right]), weights_of(block, lefts)
        outs = [len(left) for left in of_lefts]
        forms = (quantization.left, quantization.right) if quantization.method is not None else (None, None)
        candidates = splits(torch.cat(of_lefts).double(), of_right.double(), self.betas)
        if self.rotate:
            candidates = [(transform(u), transform(v.T).T) for u, v in candidates]
        losses = []
        for factors in candidates:
            low = low_factors(factors, outs, *forms)
            if quantization.activations is None:
                losses.append(weight_loss(factors, low, inputs.second_moment))
            else:
                assert inputs.rows is not None
                losses.append(latent_loss(factors, low, inputs.rows.double(), quantization.activations.form))
        left, of_right = candidates[int(torch.stack(losses).argmin())]
        for path, weight in zip([right, *lefts], [of_right, *left.split(outs)], strict=True):
            change_weight(block, path, partial(_instead, weight))


def _instead(new: Tensor, _old: Tensor) -> Tensor:
    return new
