"""Singular values absorbed into the factors (ASVD §A.8)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lowrank_lab.basics import checks
from lowrank_lab.basics.lazy_module import LazyModule
from lowrank_lab.modules.site import Site

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lowrank_lab.modules import factorized
else:
    factorized = LazyModule("lowrank_lab.modules.factorized")


class Absorb:
    """Two factors in the model's dtype, with ``left_share`` of each singular value in the left one.

    ½ is the papers' √Σ split (left = U √Σ, right = √Σ Vᵀ), 1 puts all of it in U, 0 in V.
    """

    counts = "weights"

    def __init__(self, left_share: float) -> None:
        if not checks.is_number(left_share) or not 0 <= left_share <= 1:
            raise ValueError(f"left_share={left_share} is not valid; it must be a number in [0, 1]")
        self.left_share = left_share

    def cost(self, out: int, inp: int, rank: int) -> int:
        return rank * (out + inp)

    def install(self, block: nn.Module, site: Site, left: Tensor, right: Tensor, singular_values: Tensor) -> None:
        factorized.factorize(block, site, *self.split(left, right, singular_values))

    def split(self, left: Tensor, right: Tensor, singular_values: Tensor) -> tuple[Tensor, Tensor]:
        """``left`` (out, k) and ``right`` (k, in), which has all singular values at first, split by ``left_share``.

        A singular value that is zero to working precision is split as the smallest one above it, so that both
        factors stay finite.
        """
        floor = singular_values.max() * 1e-6
        scale = singular_values.clamp(min=floor) if floor > 0 else singular_values.new_ones(())
        scale = scale**self.left_share
        return left * scale, right / scale.unsqueeze(-1) if scale.ndim else right
