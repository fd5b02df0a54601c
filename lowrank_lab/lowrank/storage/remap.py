"""Dobi-SVD's remapped storage: part of both factors in 8 bits, the rest in 16 (papers/003 §3.3, Algorithm 3)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lowrank_lab.modules.site import Site

if TYPE_CHECKING:
    from torch import Tensor, nn


class Remap:
    """U Σ and V of rank k in k · max(out, in) words of 16 bits, so that every rank below min(out, in) saves.

    With out ≥ in, the first ``in`` rows of U Σ and all rows of V are 8-bit integers, a pair to a word; the other
    rows of U Σ stay in float16. With out < in the same with U and V exchanged. The paper quantizes with
    bitsandbytes' 8 bits; here each singular direction has one float32 scale for its 8-bit part of each factor,
    since the directions differ by their singular values: 2k scales a linear, k more for each further one of a joint
    site, all counted in the record's bytes.
    """

    counts = "16-bit words"

    def cost(self, out: int, inp: int, rank: int) -> int:
        return rank * max(out, inp)

    def install(self, block: nn.Module, site: Site, left: Tensor, right: Tensor, singular_values: Tensor) -> None:
        from lowrank_lab.modules.factorized import dense_weight, install, orthogonal_factors
        from lowrank_lab.modules.mixed import MixedLinear, rows_in_8_bit

        u, sigma_vt, sigma = orthogonal_factors(left, right)  # Algorithm 3, line 1
        u_sigma = u * sigma
        vt = sigma_vt / sigma.clamp(min=sigma.max() * 1e-12 + 1e-300).unsqueeze(-1)
        like = dense_weight(block.get_submodule(site.members[0]))
        scale = u_sigma[: site.full].abs().amax(0)

        def make_left(rows: slice, bias: Tensor | None) -> nn.Module:
            return MixedLinear.of_left(u_sigma[rows], scale, rows_in_8_bit(site, rows), bias).to(like.device)

        install(block, site, MixedLinear.of_right(vt, site.full).to(like.device), make_left)
