"""How the singular values of a pair of factors are divided between them: U Σ^(1−β) and Σ^β Vᵀ (QSVD)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lowrank_lab.lowrank.spectra import orthogonal_factors
from lowrank_lab.quantization.scales import output_error

Rounding = Callable[[Tensor], Tensor]


def splits(left: Tensor, right: Tensor, betas: Sequence[float]) -> list[tuple[Tensor, Tensor]]:
    """The product of ``left`` (out, k) and ``right`` (k, in) as U Σ^(1−β) and Σ^β Vᵀ, for every β of ``betas``.

    k is at most out and in. A direction without weight, σ = 0, is zero in both.
    """
    u, sigma_v, sigma = orthogonal_factors(left, right)
    shrink = [torch.where(sigma > 0, sigma ** (beta - 1), 0.0) for beta in betas]
    return [(u * sigma ** (1 - beta), sigma_v * by.unsqueeze(-1)) for beta, by in zip(betas, shrink, strict=True)]


def weight_loss(
    left: Tensor, right: Tensor, round_left: Rounding, round_right: Rounding, second_moment: Tensor
) -> Tensor:
    """mean ‖(Q(left) Q(right) − left right) x‖², given ``second_moment`` (in, in), the mean x xᵀ."""
    error = round_left(left) @ round_right(right) - left @ right
    return output_error(error, second_moment)


def latent_loss(
    left: Tensor, right: Tensor, round_left: Rounding, round_right: Rounding, rows: Tensor, round_latent: Rounding
) -> Tensor:
    """mean ‖Q(left) Q(Q(right) x) − left right x‖² over the ``rows`` x (tokens, in): the latent is rounded too."""
    rounded = round_latent(rows @ round_right(right).T) @ round_left(left).T
    return (rounded - rows @ right.T @ left.T).square().sum(1).mean()
