"""Ratio ↔ rank ↔ parameters ↔ bytes. The only place that converts one into another; no torch.

``ratio`` is the fraction of a linear's parameters that is *kept*. A rank-k factorization of an (out, in)
matrix has k · (out + in) parameters; it is only worth it below out · in.
"""

from __future__ import annotations

from collections.abc import Mapping

from lowrank_lab.errors import SkippedCell


def parameters(out: int, inp: int, rank: int | None) -> int:
    """Weights of a linear at ``rank``, biases apart; None is dense."""
    return out * inp if rank is None else rank * (out + inp)


def rank_for_ratio(out: int, inp: int, ratio: float) -> int | None:
    """The largest rank with at most ``ratio`` of the parameters; None where the linear stays dense.

    Never more parameters than dense: a rank k with k(out + in) ≥ out · in is no factorization. At ratio 1
    every linear stays dense, also where rounding would lose a rank.
    Raises SkippedCell where not even rank 1 fits.
    """
    if ratio >= 1:
        return None
    # A tolerance far below one rank: 0.8 · 576 · 192 / 768 = 115.2 must not become 115.19999999999999.
    rank = int(ratio * out * inp / (out + inp) + 1e-9)
    if rank < 1:
        smallest = (out + inp) / (out * inp)
        raise SkippedCell(
            f"ratio {ratio} leaves no rank for a {out}x{inp} linear; the smallest for it is {smallest:.4f}"
        )
    return rank if parameters(out, inp, rank) < out * inp else None


def total_parameters(shapes: Mapping[str, tuple[int, int]], ranks: Mapping[str, int | None]) -> int:
    """Weights of all compressible linears under a rank plan."""
    return sum(parameters(out, inp, ranks[name]) for name, (out, inp) in shapes.items())
