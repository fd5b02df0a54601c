"""k-means: a codebook for every channel or group of a weight, in place of an evenly spaced grid.

An evenly spaced grid has to reach the largest weight, so that one outlier widens every step; centroids lie where
the weights are, and an outlier takes one of them (CodeQuant, papers/000). All groups are clustered at once.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from lowrank_lab.basics import checks
from lowrank_lab.basics.lazy_module import LazyModule
from lowrank_lab.modules.codec import Quantized, by_group, check_finite, quantize, spread
from lowrank_lab.modules.formats import Format
from lowrank_lab.quantization.method.base import WeightMethod

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from lowrank_lab.quantization.inputs import Inputs
else:
    torch = LazyModule("torch")

# The least that a column counts, as a share of the mean column: one whose input is always zero gets values too.
LEAST = 1e-6


class KMeans(WeightMethod):
    """Clustering as in CodeQuant (papers/000).

    weighted    the squared error of a weight counts by the mean x² of its input; else all count alike, without data
    iterations  at most so many of Lloyd's algorithm
    """

    label = "k-means"

    def __init__(self, weighted: bool, iterations: int) -> None:
        checks.flag(weighted=weighted)
        checks.whole(0, iterations=iterations)
        self.needs_inputs = weighted
        self.iterations = iterations

    def check(self, form: Format) -> None:
        if form.grid != "codebook":
            raise ValueError(
                f"weights.grid={form.grid} is not what quantization/method=kmeans makes; choose codebook"
            )

    def quantize(self, weight: Tensor, form: Format, inputs: Inputs | None) -> Quantized:
        energy = inputs.second_moment.diagonal() if self.needs_inputs and inputs is not None else None
        return kmeans(weight, energy, form, self.iterations)


def kmeans(weight: Tensor, energy: Tensor | None, form: Format, iterations: int = 30) -> Quantized:
    """``weight`` (out, in) as codes of codebooks, 2^bits values for each group of ``form``, a codebook format.

    energy      mean x² (in,) of the inputs, by which the squared errors of a column count; None: all alike
    iterations  at most

    In every group Σ energy (w − w')² is at most what rounding to the nearest gives on the integer grid of the same
    bits, granularity, symmetry and scale_dtype: where that is better, its values become the codebook. Up to 2^bits
    distinct values are kept as they are, but for rounding to scale_dtype. Raises FloatingPointError where a weight
    or energy is not finite, or a scale is too large for scale_dtype.
    """
    if form.granularity == "tensor":
        inputs = None if energy is None else energy.repeat(len(weight))
        found = kmeans(weight.reshape(1, -1), inputs, replace(form, granularity="channel"), iterations)
        return replace(found, format=form, codes=found.codes.view(weight.shape))
    energy = torch.ones_like(weight[0]) if energy is None else energy
    check_finite(weight)
    check_finite(energy, "the mean square of an input")
    energy = energy.double().unsqueeze(0)
    uniform = _on_integer_grid(weight, form)
    clustered = _clustered(weight.double(), energy, form, iterations)

    def errors(quantized: Quantized) -> Tensor:
        squares = energy * (quantized.dequantize().double() - weight.double()) ** 2
        return torch.cat([part.sum(2) for _, part in by_group(squares, form)], dim=1)

    keep = errors(uniform) < errors(clustered)
    return Quantized(
        form,
        torch.where(spread(keep, form, weight.shape[1]), uniform.codes, clustered.codes),
        torch.where(keep, uniform.scale, clustered.scale),
        None,
        torch.where(keep.unsqueeze(2), _codebook(uniform), _codebook(clustered)),
    )


def _codebook(quantized: Quantized) -> Tensor:
    assert quantized.codebook is not None
    return quantized.codebook


def _on_integer_grid(weight: Tensor, form: Format) -> Quantized:
    """``weight`` rounded to the nearest on an integer grid, with that grid as a codebook: whole steps."""
    nearest = quantize(weight, replace(form, grid="integer"))
    zero = torch.full_like(nearest.scale, 2 ** (form.bits - 1)) if nearest.zero is None else nearest.zero
    codebook = torch.arange(2**form.bits, device=weight.device) - zero.unsqueeze(2)
    return Quantized(form, nearest.codes, nearest.scale, None, codebook)


def _clustered(weight: Tensor, energy: Tensor, form: Format, iterations: int) -> Quantized:
    """The centroids of every group as ``form`` keeps them, and the codes of the nearest; energy (1, in)."""
    mean = energy.mean()
    counts = (energy / mean).clamp(min=LEAST) if mean > 0 else torch.ones_like(energy)
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    scales, codebooks = [], []
    for (_, x), (_, part), (_, group_counts) in zip(
        by_group(weight, form), by_group(codes, form), by_group(counts, form), strict=True
    ):
        found = centroids(x.flatten(0, 1), group_counts.expand_as(x).flatten(0, 1), 2**form.bits, iterations)
        # Powers of two, which cost no precision, that bring the codebook near the upper end of float16.
        largest = x.abs().amax(2)
        scale = torch.ldexp(torch.ones_like(largest), (torch.frexp(largest).exponent - 15).clamp(min=-24))
        kept = (found.view(*scale.shape, -1) / scale.unsqueeze(2)).to(getattr(torch, form.scale_dtype)).double()
        between = (kept[..., 1:] + kept[..., :-1]) / 2
        part.copy_(torch.searchsorted(between, (x / scale.unsqueeze(2)).contiguous()))
        scales.append(scale)
        codebooks.append(kept)
    return Quantized(form, codes, torch.cat(scales, 1).float(), None, torch.cat(codebooks, 1).float())


def centroids(x: Tensor, counts: Tensor, number: int, iterations: int) -> Tensor:
    """So many centroids, ascending, for each row of ``x``: (rows, width) → (rows, number), float64.

    ``counts`` (rows, width) > 0 says how much a value counts. Of sorted values every cluster is a stretch, and its
    sums are differences of running sums. To begin with, the worst stretch is cut at its mean, ``number`` − 1 times,
    so that outliers are alone. An iteration is one of Lloyd's, then a boundary that hardly matters moves to where
    one is missed; neither makes the error larger.
    """
    x, order = x.double().sort(dim=1)
    counts = counts.double().gather(1, order)
    sums = torch.stack([counts, counts * x, counts * x * x]).cumsum(2)
    sums = torch.nn.functional.pad(sums, (1, 0))  # (3, rows, width + 1): sums of the first values

    bounds = _cut(x, sums, number)
    for _ in range(iterations):
        moved = _swap(x, sums, _nearest(x, sums, bounds))
        if torch.equal(moved, bounds):
            break
        bounds = moved
    return _means(x, sums, bounds)


def _cut(x: Tensor, sums: Tensor, number: int) -> Tensor:
    """Sorted rows cut into stretches: where each begins, and the width at the end, (rows, number + 1)."""
    width = x.shape[1]
    start = torch.zeros(len(x), number, dtype=torch.int64, device=x.device)
    stop = torch.full_like(start, width)
    error = torch.zeros(len(x), number, dtype=x.dtype, device=x.device)
    for new in range(1, number):
        worst = error.argmax(1, keepdim=True)
        begin, end = start.gather(1, worst), stop.gather(1, worst)
        middle = _middle(x, sums, begin, end)
        stop.scatter_(1, worst, middle)
        start[:, new : new + 1], stop[:, new : new + 1] = middle, end
        error.scatter_(1, worst, _squares(sums, begin, middle))
        error[:, new : new + 1] = _squares(sums, middle, end)
    return torch.nn.functional.pad(start.sort(dim=1).values, (0, 1), value=width)


def _nearest(x: Tensor, sums: Tensor, bounds: Tensor) -> Tensor:
    """One iteration of Lloyd's: values go to the nearest mean of the stretches between ``bounds``."""
    means = _means(x, sums, bounds)
    inner = torch.searchsorted(x, (means[:, 1:] + means[:, :-1]) / 2)
    return torch.cat([bounds[:, :1], inner, bounds[:, -1:]], dim=1)


def _swap(x: Tensor, sums: Tensor, bounds: Tensor) -> Tensor:
    """Without the boundary that costs least to leave out, and with a cut where it gains most, if that is better."""
    begin, end = bounds[:, :-1], bounds[:, 1:]
    squares = _squares(sums, begin, end)
    cost = _squares(sums, bounds[:, :-2], bounds[:, 2:]) - squares[:, :-1] - squares[:, 1:]
    middle = _middle(x, sums, begin, end)
    gain = squares - _squares(sums, begin, middle) - _squares(sums, middle, end)
    cut = middle.gather(1, gain.argmax(1, keepdim=True))
    swapped = bounds.scatter(1, cost.argmin(1, keepdim=True) + 1, cut).sort(dim=1).values
    error = _squares(sums, swapped[:, :-1], swapped[:, 1:]).sum(1, keepdim=True)
    return torch.where(error < squares.sum(1, keepdim=True), swapped, bounds)


def _middle(x: Tensor, sums: Tensor, begin: Tensor, end: Tensor) -> Tensor:
    """The first value above the mean of each stretch, but neither the first of the stretch nor beyond its end."""
    count, total, _ = _between(sums, begin, end)
    above = torch.searchsorted(x, total / count, right=True)
    return torch.minimum(torch.maximum(above, begin + 1), end)


def _between(sums: Tensor, begin: Tensor, end: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Σ c, Σ c x and Σ c x² over stretches [begin, end) of the rows, each (rows, stretches)."""
    count, total, square = (running.gather(1, end) - running.gather(1, begin) for running in sums)
    return count, total, square


def _squares(sums: Tensor, begin: Tensor, end: Tensor) -> Tensor:
    """Σ c (x − mean)² over stretches; 0 for those of one value or none."""
    count, total, square = _between(sums, begin, end)
    return torch.where(end - begin > 1, (square - total**2 / count).clamp(min=0), torch.zeros_like(count))


def _means(x: Tensor, sums: Tensor, bounds: Tensor) -> Tensor:
    """The mean of each stretch between ``bounds``; of one without values the value that follows.

    No mean leaves its stretch by rounding of the running sums, so that they stay in order.
    """
    begin, end = bounds[:, :-1], bounds[:, 1:]
    count, total, _ = _between(sums, begin, end)
    last = x.shape[1] - 1
    lowest, highest = x.gather(1, begin.clamp(max=last)), x.gather(1, (end - 1).clamp(min=0))
    means = torch.minimum(torch.maximum(total / count, lowest), highest)
    return torch.where(end > begin, means, lowest)
