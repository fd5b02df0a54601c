"""Dobi-SVD's remapped storage: part of both factors in 8 bits, the rest in 16 (papers/003 §3.3, Algorithm 3)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lowrank_lab.basics.lazy_module import LazyModule
from lowrank_lab.modules.site import Site

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lowrank_lab.modules import factorized, mixed
else:
    factorized = LazyModule("lowrank_lab.modules.factorized")
    mixed = LazyModule("lowrank_lab.modules.mixed")


class Remap:
    """U Σ and V of rank k in k · max(out, in) words of 16 bits, so that every rank below min(out, in) saves.

    With out ≥ in, the first ``in`` rows of U Σ and all rows of V are 8-bit integers, a pair to a word; the other
    rows of U Σ stay in float16. With out < in the same with U and V exchanged. The paper quantizes with
    bitsandbytes' 8 bits. This class has one float32 scale for the 8-bit part of each singular direction in each
    factor, since the directions differ by their singular values: 2k scales a linear, k more for each further one of
    a joint site, all counted in the record's bytes.
    """

    counts = "16-bit words"

    def cost(self, out: int, inp: int, rank: int) -> int:
        return rank * max(out, inp)

    def install(self, block: nn.Module, site: Site, left: Tensor, right: Tensor, singular_values: Tensor) -> None:
        u, sigma_vt, sigma = factorized.orthogonal_factors(left, right)  # Algorithm 3, line 1
        u_sigma = u * sigma
        vt = sigma_vt / sigma.clamp(min=sigma.max() * 1e-12 + 1e-300).unsqueeze(-1)
        like = factorized.dense_weight(block.get_submodule(site.members[0]))
        scale = u_sigma[: site.full].abs().amax(0)

        def make_left(rows: slice, bias: Tensor | None) -> nn.Module:
            in_8_bit = mixed.rows_in_8_bit(site, rows)
            return mixed.MixedLinear.of_left(u_sigma[rows], scale, in_8_bit, bias).to(like.device)

        right_part = mixed.MixedLinear.of_right(vt, site.full).to(like.device)
        factorized.install(block, site, right_part, make_left)
