"""Smooth truncation of an activation, with a gradient that survives equal and vanishing singular values.

Dobi-SVD (papers/003) §3.1, Algorithms 1, 4 and 5. The paper differentiates through U, Σ and V one by one (Eq. 1).
Here all three gradients come from one product U diag(t) Vᵀ, and what would divide by σ_j − σ_i cancels wherever the
mask is flat; only the remaining part, of pairs for which the mask differs, uses the paper's stabilised 1/E.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

VALUE_FLOOR = 1e-10  # ε_val: γ of §A.3, "singular values smaller than 1e-10 are treated as 1e-10"
GRADIENT_FLOOR = 1e-10  # ε_grad: γ of §3.1, the 1/E of two singular values that are both about zero
TERMS = 10  # n_Taylor: K of §A.3


def smooth_truncation(activations: Tensor, mask: Tensor) -> Tensor:
    """U diag(σ · mask) Vᵀ of the singular value decomposition U diag(σ) Vᵀ of ``activations``.

    ``activations`` (tokens, out); ``mask`` (p,) with p = min(tokens, out), for the descending singular values
    (Algorithm 1, lines 3-5). Half precision is computed in float32. Returns (tokens, out) in the dtype of
    ``activations``; gradients flow to both, once. Raises FloatingPointError for activations that are not finite.

    The decomposition is a full one, where Algorithm 4 takes ``svd_lowrank(X, q=k, niter=2)``: k is what is learned
    and may approach p, and the gradient needs the exact singular subspaces; those of a randomized decomposition are
    least accurate at the very edge that k moves.
    """
    return _SmoothTruncation.apply(activations, mask)


class _SmoothTruncation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, activations: Tensor, mask: Tensor) -> Tensor:
        if not bool(torch.isfinite(activations).all()):
            raise FloatingPointError("an activation to truncate is not finite")
        precise = torch.promote_types(activations.dtype, torch.float32)
        u, sigma, vt = torch.linalg.svd(activations.to(precise), full_matrices=False)
        ctx.save_for_backward(u, sigma, vt, mask)
        return ((u * (sigma * mask.to(precise))) @ vt).to(activations.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        u, sigma, vt, saved_mask = ctx.saved_tensors
        g, mask = gradient.to(sigma.dtype), saved_mask.to(sigma.dtype)
        to_activations = to_mask = None
        gv = g @ vt.T
        m = u.T @ gv  # Uᵀ G V
        if ctx.needs_input_grad[0]:
            to_activations = (u @ core_gradient(m, sigma, mask) @ vt).to(gradient.dtype)
            # What Eq. (1) leaves out for matrices that are not square; Algorithm 5, lines 41-46. δU = G V diag(t)
            # there, and its division by σ cancels against t = σ · mask.
            if u.shape[0] > u.shape[1]:  # (I − U Uᵀ) G V diag(mask) Vᵀ: Term 1, line 42
                to_activations += (((gv - u @ m) * mask) @ vt).to(gradient.dtype)
            if vt.shape[1] > vt.shape[0]:  # U diag(mask) Uᵀ G (I − V Vᵀ): Term 2, line 44
                to_activations += ((u * mask) @ (u.T @ g - m @ vt)).to(gradient.dtype)
        if ctx.needs_input_grad[1]:
            to_mask = (sigma * m.diagonal()).to(saved_mask.dtype)
        return to_activations, to_mask


def core_gradient(projected: Tensor, sigma: Tensor, mask: Tensor) -> Tensor:
    """The gradient of the activation between its own singular vectors, (p, p): the bracket of Eq. (1).

    ``projected`` (p, p) is M = Uᵀ G V of the gradient G of U diag(t) Vᵀ, t = σ · ``mask`` (p,); ``sigma`` (p,) is
    descending.

    With δU = G V diag(t), δV = Gᵀ U diag(t) and δS = mask · diag(M), the terms of Eq. (1) with E_ij = σ_j² − σ_i²
    and skew(X) = X − Xᵀ (Algorithm 5, line 34; the ½ that §3.1 puts into skew is not in the derivative) add up to

        M_ij (σ_j t_j − σ_i t_i) / E_ij  +  M_ji (σ_i t_j − σ_j t_i) / E_ij
        = ½ (M_ij + M_ji) (t_j − t_i) / (σ_j − σ_i)  +  ½ (M_ij − M_ji) (t_j + t_i) / (σ_j + σ_i)
    """
    sigma_i, sigma_j = sigma.unsqueeze(1), sigma.unsqueeze(0)
    mean = (mask.unsqueeze(1) + mask.unsqueeze(0)) / 2
    step = mask.unsqueeze(0) - mask.unsqueeze(1)  # m_j − m_i
    total = sigma_j + sigma_i
    # (t_j − t_i) / (σ_j − σ_i): the mean mask exactly, for equal σ too, and a rest that is 0 unless the mask
    # differs, with 1 / (σ_j − σ_i) = (σ_j + σ_i) / E_ij.
    difference = mean + step * (total / 2) * total * stable_inverse(sigma)
    # (t_j + t_i) / (σ_j + σ_i): a weighted mean of the two masks; the plain one where both σ vanish.
    tiny = torch.finfo(sigma.dtype).tiny
    quotient = mean + step * (sigma_j - sigma_i) / (2 * total).clamp(min=tiny)
    # Eq. (1) / Algorithm 5, lines 36-39. On the diagonal both factors are the mask: diag(δS) = mask · diag(M).
    return (projected + projected.T) / 2 * difference + (projected - projected.T) / 2 * quotient


def stable_inverse(sigma: Tensor) -> Tensor:
    """1 / (σ_j² − σ_i²) at (i, j), always finite: E of Algorithm 5 (from its line 8), the 1/E of Eq. (1) and (2).

    ``sigma`` (p,) descending. Returns (p, p), antisymmetric, with a zero diagonal (Algorithm 5 leaves 1 there,
    where it only meets the zero diagonal of a skew matrix).

    Two σ are *close* if they differ by at most √ε of the dtype times the larger: ε_diff, which the paper does not
    give. It is relative because the scale of an activation means nothing: closer than that, the singular vectors of
    the two are uncertain by more than √ε, and a gradient through them is noise. There the series is much smaller
    than what it replaces; it bounds the gradient, it does not approximate it.
    """
    close = torch.finfo(sigma.dtype).eps ** 0.5
    clamped = sigma.clamp(min=VALUE_FLOOR)  # line 9
    # Lines 10-12. In the lower triangle, j < i, column j has the larger value: λ_i of the algorithm, whose
    # q = λ_j / λ_i ≤ 1 lets the series of line 27 converge.
    larger, smaller = clamped.unsqueeze(0), clamped.unsqueeze(1)
    difference = larger - smaller  # line 20; the absolute value below the diagonal, the only part used
    q2 = (smaller / larger).square()  # line 26
    one = torch.ones_like(q2)
    equal = TERMS / larger.square() * one  # line 23
    distinct = (difference != 0) & (q2 != 1)
    # Lines 26-27. Equal to the last bit after squaring counts as equal: 0/0 otherwise.
    series = torch.where(distinct, (1 - q2**TERMS) / torch.where(distinct, 1 - q2, one), TERMS * one)
    plain = 1 / torch.where(distinct, difference * (larger + smaller), one)  # line 30
    inverse = torch.where(difference <= close * larger, series / larger.square(), plain)  # lines 24-30
    inverse = torch.where(difference == 0, equal, inverse)  # lines 21-23
    both_tiny = (difference == 0) & (larger == VALUE_FLOOR)  # lines 15-17
    inverse = torch.where(both_tiny, GRADIENT_FLOOR * one, inverse)
    lower = inverse.tril(-1)  # line 14
    return lower - lower.T  # lines 31-33
