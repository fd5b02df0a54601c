"""Gradient descent among orthogonal matrices."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn


class CayleySgd(torch.optim.Optimizer):
    """Cayley SGD with momentum (Li, Fuxin and Todorovic 2020, algorithm 1), on square orthogonal parameters.

    With the momentum M and the skew-symmetric W = (M Xᵀ − X Mᵀ) / 2, a step is the Cayley transform
    X ← (I − α/2 W)⁻¹ (I + α/2 W) X with α = min(lr, 1 / ‖W‖₁). The paper approximates it by two fixed-point
    iterations and orthogonalises again now and then; the equation solved exactly leaves X orthogonal to rounding.
    Parameters are (..., n, n), best in float64.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, momentum: float = 0.9) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for x in group["params"]:
                if x.grad is None:
                    continue
                state = self.state[x]
                moment = group["momentum"] * state.get("momentum", torch.zeros_like(x)) - x.grad
                product = moment @ x.mT
                skew = (product - product.mT) / 2
                state["momentum"] = skew @ x
                norm = torch.linalg.matrix_norm(skew, ord=1).clamp(min=torch.finfo(x.dtype).tiny)
                half = skew * (1 / norm).clamp(max=group["lr"])[..., None, None] / 2
                x.copy_(torch.linalg.solve(torch.eye(x.shape[-1]).to(x) - half, x + half @ x))
