"""The shapes of LLaMA-7B's linears, as benchmarks of single matrices take them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008))  # (out, in) of q k v o, of gate and up, of down
RATIOS = (0.8, 0.6, 0.4)


def options(arguments: Sequence[str] | None, repeats: int) -> argparse.Namespace:
    """``--scale`` and ``--repeats``, from the command line where ``arguments`` is None."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--scale", type=float, default=0.25, help="of the widths of LLaMA-7B")
    parser.add_argument("--repeats", type=int, default=repeats)
    return parser.parse_args(arguments)


def scaled(scale: float) -> list[tuple[int, int]]:
    return [(round(out * scale), round(inp * scale)) for out, inp in SHAPES]


def rank(ratio: float, out: int, inp: int) -> int:
    """That of a factorization with ``ratio`` of the dense weights."""
    return int(ratio * out * inp / (out + inp))
