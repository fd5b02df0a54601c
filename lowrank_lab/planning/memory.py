"""Bytes of memory of a cell's stages in addition to the weights and the hidden states, from shapes.

Each is the peak of the code that it estimates, rounded up, with intermediate results.
"""

from __future__ import annotations

from lowrank_lab.modules.site import Site
from lowrank_lab.planning.shapes import Shapes

DOUBLE, SINGLE = 8, 4


def activations(shapes: Shapes, tokens: int, value: int) -> int:
    """The activations of one block for ``tokens`` tokens, with ``value`` bytes a number."""
    return tokens * value * (8 * shapes.hidden + 4 * shapes.attention + 4 * shapes.widest)


def logits(shapes: Shapes, tokens: int, value: int) -> int:
    """The logits for a perplexity: in the model's dtype, and three times in float32 for the loss."""
    return tokens * shapes.vocabulary * (value + 3 * SINGLE)


def sums(shapes: Shapes, tokens: int) -> int:
    """The statistics of a block's inputs: float64, the input in float32, and a mean while it is computed."""
    widest = max(width for of_block in shapes.inputs for width in of_block)
    kept = max(sum(width**2 for width in of_block) for of_block in shapes.inputs)
    return DOUBLE * kept + max(2 * SINGLE * tokens * widest, DOUBLE * widest**2) + SINGLE * widest**2


def statistics_file(shapes: Shapes) -> list[int]:
    """By block: mean x xᵀ, mean and maximum of |x| of every input, float32."""
    return [sum(SINGLE * (width**2 + 2 * width) for width in of_block) for of_block in shapes.inputs]


def gradients_file(shapes: Shapes, outer: bool, weight: bool) -> list[int]:
    """By block: mean g², the row Fisher, perhaps mean g gᵀ and mean (dL/dW)² of every linear, float32."""
    return [
        sum(SINGLE * (2 * out + outer * out**2 + weight * out * inp) for out, inp in of_block.values())
        for of_block in shapes.linears
    ]


def backward(shapes: Shapes, tokens: int, outer: bool, weight: bool) -> int:
    """A backward pass over one sequence in float32: the saved activations, and the sums of all linears."""
    saved = shapes.layers * activations(shapes, tokens, SINGLE) + 2 * logits(shapes, tokens, SINGLE)
    square = sum(
        2 * DOUBLE * out + DOUBLE * outer * out**2 + SINGLE * weight * out * inp
        for of_block in shapes.linears
        for out, inp in of_block.values()
    )
    return (
        saved
        + square
        + 3 * SINGLE * max(out * inp for of_block in shapes.linears for out, inp in of_block.values())
    )


def spectra_file(shapes: Shapes, metric_outputs: str) -> list[int]:
    """By block: eigenvalues in float64, bases in float32 or float64, R in float32 (no ``none``, a ``vector`` or a
    ``matrix``). lowrank/spectra.py says when a basis is kept in which.
    """
    found = [0] * len(shapes.linears)
    for site in shapes.sites.values():
        basis = SINGLE if site.out <= site.inp else DOUBLE
        output_metric = {"none": 0, "vector": site.out, "matrix": site.out**2}[metric_outputs]
        found[site.block] += DOUBLE * site.full + basis * site.full**2 + SINGLE * output_metric
    return found


def decomposition(site: Site) -> int:
    """The solver on one site in float64: the weight and C, their products, eigenvectors, work space."""
    return DOUBLE * (4 * site.out * site.inp + 2 * site.inp**2 + 8 * site.full**2)
