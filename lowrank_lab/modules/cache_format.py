"""The format of keys and values in a cache of few bits. No torch: attention.py rounds them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lowrank_lab.basics.checks import flag, whole
from lowrank_lab.modules.formats import Format, Granularity


@dataclass(frozen=True)
class CacheFormat:
    """Keys and values rounded to 2^bits evenly spaced values, as a cache in so few bits would keep them.

    symmetric    around zero, or with a zero point
    granularity  ``head``: each token has a scale for every head; a number: so have so many channels of a head
    rotate       an online Hadamard transform of queries and keys after their position embedding, which leaves the
                 products as they are and spreads outliers of keys (QuaRot §4, the R3 of SpinQuant)
    scale_dtype  of the scales
    """

    bits: int
    symmetric: bool
    granularity: Literal["head"] | int
    rotate: bool
    scale_dtype: Literal["float32", "float16", "bfloat16"]

    def __post_init__(self) -> None:
        flag(symmetric=self.symmetric, rotate=self.rotate)
        if self.granularity != "head":
            whole(1, granularity=self.granularity)
        _ = self.form

    @property
    def form(self) -> Format:
        """That of a matrix with a row for every token and head."""
        shared: Granularity = self.granularity if isinstance(self.granularity, int) else "channel"
        return Format(self.bits, "integer", self.symmetric, shared, self.scale_dtype)

    @property
    def label(self) -> str:
        parts = [f"KV{self.bits}", "sym" if self.symmetric else ""]
        parts += ["" if self.granularity == "head" else f"g{self.granularity}", "rotated" if self.rotate else ""]
        return " ".join(part for part in parts if part)

    def bytes_per_token(self, layers: int, heads: int, head_size: int) -> int:
        """Of the codes of keys and values, their scales and zero points, each packed by token and layer."""
        rows = (heads, head_size)
        scales = self.form.scales(rows)
        zeros = self.form.packed(scales) if self.form.has_zero else 0
        one_scale = 4 if self.scale_dtype == "float32" else 2
        return 2 * layers * (self.form.packed(rows) + one_scale * scales[0] * scales[1] + zeros)
