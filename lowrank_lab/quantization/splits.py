"""How the singular values of a pair of factors are divided between them: U Σ^(1−β) and Σ^β Vᵀ (QSVD)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import torch
from torch import Tensor

from lowrank_lab.lowrank.factors import orthogonal_factors
from lowrank_lab.modules.formats import Format
from lowrank_lab.modules.steps import Round
from lowrank_lab.quantization.scales import output_error, rounded

Factors = tuple[Tensor, Tensor]


def splits(left: Tensor, right: Tensor, betas: Sequence[float]) -> list[Factors]:
    """The product of ``left`` (out, k) and ``right`` (k, in) as U Σ^(1−β) and Σ^β Vᵀ, for every β of ``betas``.

    k is at most out and in. A direction without weight, σ = 0, is zero in both.
    """
    u, sigma_v, sigma = orthogonal_factors(left, right)
    of_right = [torch.where(sigma > 0, sigma ** (beta - 1), 0.0).unsqueeze(-1) for beta in betas]
    return [(u * sigma ** (1 - beta), sigma_v * by) for beta, by in zip(betas, of_right, strict=True)]


def weight_loss(factors: Factors, low: Factors, second_moment: Tensor) -> Tensor:
    """mean ‖(L' R' − L R) x‖² with the rounded factors ``low``, given ``second_moment`` (in, in), the mean x xᵀ."""
    return output_error(low[0] @ low[1] - factors[0] @ factors[1], second_moment)


def latent_loss(factors: Factors, low: Factors, rows: Tensor, form: Format) -> Tensor:
    """mean ‖L' Q(R' x) − L R x‖² over the ``rows`` x (tokens, in), with the latent R' x rounded to ``form`` too."""
    latent, rounding = rows @ low[1].T, Round(asdict(form)).to(rows.device)
    if rounding.static:
        rounding.fix(latent.amin(), latent.amax())
    errors = rounding(latent) @ low[0].T - rows @ factors[1].T @ factors[0].T
    return errors.square().sum(1).mean()


def low_factors(factors: Factors, outs: Sequence[int], left: Format | None, right: Format | None) -> Factors:
    """``factors`` rounded to these formats (None: not); each left factor, ``outs`` rows long, by itself."""
    lefts = factors[0].split(list(outs))
    return (
        torch.cat([rounded(one, left).to(one.dtype) for one in lefts]) if left is not None else factors[0],
        rounded(factors[1], right).to(factors[1].dtype) if right is not None else factors[1],
    )
