"""Number formats of few bits, for weights, activations and the KV cache. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from lowrank_lab.basics.checks import flag, is_count, one_of, whole

Grid = Literal["integer", "nf4", "fp4", "codebook"]
Granularity = Literal["tensor", "channel"] | int


@dataclass(frozen=True)
class Format:
    """bits         of a code, 2 to 8
    grid         ``integer``: evenly spaced; ``nf4``, ``fp4``: 16 fixed values; ``codebook``: chosen values
    symmetric    integer grid: around zero with a scale alone; else with a zero point too
    granularity  what shares a scale: the ``tensor``, a ``channel`` (row of a weight, token of an activation), or a
                 whole number of neighbours in a row
    scale_dtype  of scales and codebooks. Codes are found with the scale as it is kept, so that a short dtype costs
                 no more than a slightly wider or narrower grid, but for steps below 1e-6 in float16, which it
                 keeps badly or as nothing
    """

    bits: int
    grid: Grid = "integer"
    symmetric: bool = False
    granularity: Granularity = "channel"
    scale_dtype: Literal["float32", "float16", "bfloat16"] = "float16"

    def __post_init__(self) -> None:
        if not (is_count(self.bits, 2) and self.bits <= 8):
            raise ValueError(f"bits={self.bits} is not valid; it must be a whole number from 2 to 8")
        one_of(("integer", "nf4", "fp4", "codebook"), grid=self.grid)
        if self.grid in ("nf4", "fp4") and self.bits != 4:
            raise ValueError(f"bits={self.bits} is not valid with grid={self.grid}, which has 4")
        flag(symmetric=self.symmetric)
        if self.granularity not in ("tensor", "channel"):
            whole(1, granularity=self.granularity)
        one_of(("float32", "float16", "bfloat16"), scale_dtype=self.scale_dtype)

    @property
    def name(self) -> str:
        """Short, as tables show it: INT4, INT4 sym g128, NF4 g64."""
        kinds = {"integer": f"INT{self.bits}", "nf4": "NF4", "fp4": "FP4", "codebook": f"K{2**self.bits}"}
        parts = [kinds[self.grid], "sym" if self.symmetric and self.grid == "integer" else ""]
        parts.append({"channel": "", "tensor": "per tensor"}.get(str(self.granularity), f"g{self.granularity}"))
        return " ".join(part for part in parts if part)

    @property
    def has_zero(self) -> bool:
        return self.grid == "integer" and not self.symmetric

    def scales(self, shape: tuple[int, int]) -> tuple[int, int]:
        """The shape of the scales of a matrix of this ``shape``."""
        if self.granularity == "tensor":
            return 1, 1
        return shape[0], math.ceil(shape[1] / self.group_of(shape[1]))

    def packed(self, shape: tuple[int, ...]) -> int:
        """How many bytes the codes of a tensor of this ``shape`` take."""
        return math.ceil(math.prod(shape) * self.bits / 8)

    def group_of(self, width: int) -> int:
        """How many neighbours of a row of ``width`` share a scale; ``tensor`` counts as the row here."""
        return min(width, self.granularity) if isinstance(self.granularity, int) else width
