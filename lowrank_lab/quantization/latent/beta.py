"""QSVD's split of the singular values between the factors of a site, U Σ^(1−β) and Σ^β Vᵀ, by rounding errors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

from lowrank_lab.basics import checks
from lowrank_lab.basics.errors import SkippedCell, named
from lowrank_lab.basics.lazy_module import LazyModule
from lowrank_lab.modules.formats import Format
from lowrank_lab.quantization.base import Quantization, Transform
from lowrank_lab.quantization.scales import output_error, rounded

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from lowrank_lab.models.families import Tower
    from lowrank_lab.modules import factorized, hadamard, linears, steps
    from lowrank_lab.quantization import folding
    from lowrank_lab.quantization.inputs import Inputs
    from lowrank_lab.running.context import Context
else:
    torch = LazyModule("torch")
    factorized = LazyModule("lowrank_lab.modules.factorized")
    hadamard = LazyModule("lowrank_lab.modules.hadamard")
    linears = LazyModule("lowrank_lab.modules.linears")
    steps = LazyModule("lowrank_lab.modules.steps")
    folding = LazyModule("lowrank_lab.quantization.folding")

Factors: TypeAlias = "tuple[Tensor, Tensor]"


class BetaSplit(Transform):
    """left = U Σ^(1−β), right = Σ^β Vᵀ (Wang et al. 2025), with the β of ``betas`` that is best for the site.

    betas   from 0 (Σ in the left factor) to 1 (in the right one); ½ is storage=uv
    rotate  whether the latent is then rotated by a Hadamard matrix, folded into both factors

    Best is the smallest mean ‖left' Q(right' x) − left right x‖² on the calibration text, with the factors rounded
    to the nearest of their formats and the latent to that of the activations. Dense sites stay as they are.
    """

    label = "QSVD"
    mixes_channels = True
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
        rows = quantization.activations is not None
        for index, (block, latents) in enumerate(folding.calibrated_latents(context, rows)):
            for right, lefts, inputs in latents:
                with named(f"block {index}: {right}"):
                    self._split(block, right, lefts, inputs, quantization)

    def _split(
        self, block: nn.Module, right: str, lefts: list[str], inputs: Inputs, quantization: Quantization
    ) -> None:
        """Replace the factors at the paths ``right`` and ``lefts``, which read its latent, by the best split."""
        [of_right], of_lefts = folding.weights_of(block, [right]), folding.weights_of(block, lefts)
        outs = [len(left) for left in of_lefts]
        forms = (quantization.left, quantization.right) if quantization.method is not None else (None, None)
        candidates = splits(torch.cat(of_lefts).double(), of_right.double(), self.betas)
        if self.rotate:
            candidates = [(hadamard.transform(u), hadamard.transform(v.T).T) for u, v in candidates]
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
            linears.change_weight(block, path, partial(_replaced_by, weight))


def _replaced_by(new: Tensor, _old: Tensor) -> Tensor:
    return new


def splits(left: Tensor, right: Tensor, betas: Sequence[float]) -> list[Factors]:
    """The product of ``left`` (out, k) and ``right`` (k, in) as U Σ^(1−β) and Σ^β Vᵀ, for every β of ``betas``.

    k is at most out and in. A direction without weight, σ = 0, is zero in both.
    """
    u, sigma_v, sigma = factorized.orthogonal_factors(left, right)
    of_right = [torch.where(sigma > 0, sigma ** (beta - 1), 0.0).unsqueeze(-1) for beta in betas]
    return [(u * sigma ** (1 - beta), sigma_v * by) for beta, by in zip(betas, of_right, strict=True)]


def weight_loss(factors: Factors, low: Factors, second_moment: Tensor) -> Tensor:
    """mean ‖(L' R' − L R) x‖² with the rounded factors ``low``, given ``second_moment`` (in, in), the mean x xᵀ."""
    return output_error(low[0] @ low[1] - factors[0] @ factors[1], second_moment)


def latent_loss(factors: Factors, low: Factors, rows: Tensor, form: Format) -> Tensor:
    """mean ‖L' Q(R' x) − L R x‖² over the ``rows`` x (tokens, in), with the latent R' x rounded to ``form`` too."""
    latent, rounding = rows @ low[1].T, steps.Round(asdict(form)).to(rows.device)
    if rounding.static:
        rounding.fix(latent.amin(), latent.amax())
    errors = rounding(latent) @ low[0].T - rows @ factors[1].T @ factors[0].T
    return errors.square().sum(1).mean()


def low_factors(factors: Factors, outs: Sequence[int], left: Format | None, right: Format | None) -> Factors:
    """``factors`` rounded to these formats (None: not); each left factor, ``outs`` rows long, by itself."""
    lefts = factors[0].split(list(outs))
    return (
        torch.cat([rounded(one, left).to(one.dtype) for one in lefts]) if left is not None else factors[0],
        rounded(factors[1], right).to(factors[1].dtype) if right is not None else factors[1],
    )
