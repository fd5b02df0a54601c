"""SmoothQuant: a scale makes activations easier to round, and weights harder by as much."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from lowrank_lab.basics import checks
from lowrank_lab.basics.errors import SkippedCell, named
from lowrank_lab.basics.lazy_module import LazyModule
from lowrank_lab.models.families import Tower, folding_of
from lowrank_lab.quantization.base import Quantization, Transform
from lowrank_lab.quantization.scales import largest, rounded, smoothing

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from lowrank_lab.modules import steps
    from lowrank_lab.modules.formats import Format
    from lowrank_lab.quantization import folding
    from lowrank_lab.running.context import Context
else:
    torch = LazyModule("torch")
    steps = LazyModule("lowrank_lab.modules.steps")
    folding = LazyModule("lowrank_lab.quantization.folding")

SAMPLE = 256  # evenly spaced tokens by which α is chosen


class SmoothQuant(Transform):
    """Xiao et al. 2023: linears read x / s and have W diag(s), with s_j = max|X_j|^α / max|W_j|^(1−α).

    alpha  how much of the difficulty moves into the weights, from 0 to 1; a list: the best of them for every input
    where  ``norms``: inputs that a norm gives; ``foldable``: also those whose scale the rows of another linear
           take over; ``all``: the others too, divided by s in the forward

    max|W_j| is over all linears that read the input; query heads that share values share a scale, that of the
    largest of them. A factored site is scaled at its right factor. The best α has the smallest
    Σ ‖Q(W diag(s)) Q(x / s) − W x‖² over a sample of tokens x and the linears that read the input, with weights
    rounded to the nearest; the paper chooses one α for a model on calibration data.
    """

    label = "SmoothQuant"
    needs_calibration = True

    def __init__(self, alpha: float | Sequence[float], where: str) -> None:
        self.searches = not isinstance(alpha, (int, float))
        if self.searches:
            checks.filled(alpha=alpha)
            self.label = "SmoothQuant (α searched)"
        self.alphas = list(alpha) if isinstance(alpha, Sequence) else [alpha]
        for one in self.alphas:
            checks.share(alpha=one)
        checks.one_of(("norms", "foldable", "all"), where=where)
        self.where = where
        self.online = where == "all"

    def check(self, tower: Tower, quantization: Quantization) -> None:
        folding_of(tower, self.label)
        if self.searches and quantization.method is None and quantization.activations is None:
            raise SkippedCell(
                "SmoothQuant looks for the α of what is rounded; choose a quantization/method or activations"
            )

    def __call__(self, context: Context, quantization: Quantization) -> None:
        sources, sample = folding.SOURCES[self.where], SAMPLE if self.searches else 0
        for index, (block, inputs) in enumerate(folding.calibrated(context, sources, sample)):
            scales = []
            for at, sums, rows in inputs:
                weights = largest(folding.weights_of(block, at.readers))
                activations, weights = (at.shared(each, lambda x: x.amax(1)) for each in (sums.abs_max, weights))
                candidates = [smoothing(activations, weights, alpha) for alpha in self.alphas]
                best = 0
                if self.searches:
                    with named(f"block {index}: {at.rounded[0]}"):
                        best = int(_losses(candidates, rows, block, at, quantization).argmin())
                scales.append((at, candidates[best]))
            folding.fold(block, context.tower, scales)


def _losses(
    scales: Sequence[Tensor], rows: Tensor, block: nn.Module, at: folding.Input, quantization: Quantization
) -> Tensor:
    """``smoothing_losses`` of the linears of ``at`` that ``quantization`` rounds."""
    rounds = quantization.method is not None
    forms = [quantization.format_of(path) if rounds else None for path in at.rounded]
    weights = list(zip(folding.weights_of(block, at.rounded), forms, strict=True))
    activations = quantization.activations
    return smoothing_losses(scales, rows, weights, activations.form if activations is not None else None)


def smoothing_losses(
    scales: Sequence[Tensor],
    rows: Tensor,
    weights: Sequence[tuple[Tensor, Format | None]],
    activations: Format | None,
) -> Tensor:
    """Σ ‖Q(W diag(s)) Q(x / s) − W x‖² for every s of ``scales``, each (width,): (points,), float64.

    The sum is over the tokens x of ``rows`` (n, width), float32, and the ``weights`` (out, width) that read them,
    each rounded to the nearest of its format; None: not rounded. Raises FloatingPointError where a weight is not
    finite.
    """
    losses = torch.zeros(len(scales), dtype=torch.float64, device=rows.device)
    for number, scale in enumerate(scales):
        given = (rows / scale).float()
        if activations is not None:
            rounding = steps.Round(asdict(activations)).to(rows.device)
            if rounding.static:
                rounding.fix(given.amin(), given.amax())
            given = rounding(given)
        for weight, form in weights:
            scaled = (weight * scale).float()
            low = scaled if form is None else rounded(scaled, form)
            losses[number] += (given @ low.T - rows @ weight.float().T).square().sum(dtype=torch.float64)
    return losses
