"""A site's latent values rotated by a Hadamard matrix, between its factors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lowrank_lab.basics.lazy_module import LazyModule
from lowrank_lab.quantization.base import Quantization, Transform

if TYPE_CHECKING:
    from lowrank_lab.quantization import rotation
    from lowrank_lab.running.context import Context
else:
    rotation = LazyModule("lowrank_lab.quantization.rotation")


class LatentHadamard(Transform):
    """left ← left H and right ← Hᵀ right: the same product at no cost.

    The latent values, which fall off with the singular values, then are of one size, so that few bits suffice for
    them and for the factors. Dense sites stay as they are.
    """

    label = "latent Hadamard"
    mixes_channels = True

    def __call__(self, context: Context, quantization: Quantization) -> None:
        rotation.rotate_latent(context.model, context.tower)
