"""Floating point operations of the stages of a cell, two for a multiply-accumulate, from shapes.

Only products of matrices count, not norms, activations and losses. torch's counter gives the same for forward and
backward passes; it does not count decompositions, which are EIGH · n³, nor roots by Cholesky.
"""

from __future__ import annotations

from lowrank_lab.calibration.statistics import STRIPS
from lowrank_lab.modules.site import Site
from lowrank_lab.planning.shapes import Shapes

EIGH = 9  # of a symmetric n × n matrix with its vectors (Golub & Van Loan, §8.3: 9 n³)


def forward(shapes: Shapes, sequences: int, length: int, head: bool = True, saved: int = 0) -> int:
    """A forward of ``sequences``; ``saved`` is how many parameters the compression removes."""
    macs = shapes.linear_macs - saved + (shapes.head_macs if head else 0)
    products = 2 * shapes.layers * length * shapes.attention  # of queries and keys, and with values
    return 2 * sequences * length * (macs + products)


def statistics(shapes: Shapes, sequences: int, length: int) -> int:
    """The forward through all blocks, and the computed part of x xᵀ for every input."""
    share = (STRIPS + 1) / (2 * STRIPS)
    squares = sum(width**2 for of_block in shapes.inputs for width in of_block)
    return forward(shapes, sequences, length, head=False) + round(2 * share * sequences * length * squares)


def gradients(shapes: Shapes, sequences: int, length: int, outer: bool) -> int:
    """Forward and backward to the activations, Σ g xᵀ of every linear, and g gᵀ with ``outer``.

    The backward of attention counts as two and a half of its forward.
    """
    linears = [shape for of_block in shapes.linears for shape in of_block.values()]
    more = sum(out * inp + outer * out**2 for out, inp in linears)
    attention = 4 * sequences * length**2 * shapes.layers * shapes.attention
    return 2 * forward(shapes, sequences, length) + round(1.5 * attention) + 2 * sequences * length * more


def decomposition(site: Site, full_metric: bool, tokens: int) -> int:
    """The decomposition of one site (solver.py); ``full_metric``: C is a matrix, the mean over ``tokens`` inputs.

    Where out > in, C has a root: by Cholesky, which takes n³ / 3 and the bound on its condition 2 n³ / 3, or by its
    eigenvectors where it is singular, as it is of fewer tokens than channels. (One that is ill-conditioned takes
    its eigenvectors too, which shapes do not show.)
    """
    p, large = site.full, site.out * site.inp
    products = 2 * large * p + (2 * large * site.inp if full_metric else 0)
    if site.out <= site.inp:
        return products + EIGH * p**3
    root = 0 if not full_metric else p**3 if tokens >= site.inp else EIGH * p**3
    return products + root + EIGH * p**3 + 4 * large * p + 5 * p**3


def factorization(site: Site, rank: int) -> int:
    """The factors of one site at ``rank``, from its spectrum."""
    return 2 * rank * site.out * site.inp * (1 if site.out <= site.inp else 2)
