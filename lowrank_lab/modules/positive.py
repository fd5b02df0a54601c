"""Symmetric positive semi-definite matrices, as statistics are: also those that are singular, zero or rounded.

All that factors or inverts one goes through here, so that few tokens, dead channels and linears without a gradient
are no special cases.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Eigenvalues below this fraction of the largest are rounding noise of the float64 decomposition.
NOISE = 1e-12


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, descending and not below zero, and eigenvectors of a positive semi-definite matrix."""
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    return values.flip(0).clamp(min=0), vectors.flip(1)


def inverse_cholesky(matrix: Tensor) -> Tensor:
    """The upper triangular U (n, n) with Uᵀ U = M⁻¹ of a symmetric positive semi-definite ``matrix`` M, float64.

    Where M is singular to working precision, its eigenvalues below the noise of their decomposition (NOISE of the
    largest) count as that much, so that U is finite: no direction is larger than M can tell.
    """
    root, failed = torch.linalg.cholesky_ex(matrix)
    if not failed:
        upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(root), upper=True)
        if not failed:
            return upper
    values, vectors = eigh(matrix)
    least = torch.where(values[0] > 0, NOISE * values[0], 1.0)
    upper = torch.linalg.qr((vectors * values.clamp(min=least).rsqrt()).T)[1]
    return upper * torch.where(upper.diagonal() < 0, -1.0, 1.0).unsqueeze(-1)


def solve_positive(matrix: Tensor, right: Tensor) -> Tensor:
    """M⁺ · ``right``, (n, m), of a symmetric positive semi-definite ``matrix`` M (n, n), in its dtype.

    By its Cholesky factor where it has one. Else by its eigenvectors, without those whose eigenvalues are rounding:
    below n · ε of the largest, the bound on the rounding of M (Golub and Van Loan, Matrix Computations, §5.4).
    """
    root, failed = torch.linalg.cholesky_ex(matrix)
    if not failed:
        return torch.cholesky_solve(right, root)
    values, vectors = eigh(matrix)
    kept = values > len(matrix) * torch.finfo(matrix.dtype).eps * values[0]
    vectors = vectors[:, kept]
    return vectors @ ((vectors.T @ right) / values[kept].unsqueeze(-1))


def regular_cholesky(metric: Tensor) -> Tensor:
    """The Cholesky factor of ``metric`` (n, n), with as much added to its diagonal as it needs to have one.

    That is what the lowest eigenvalue lacks, and 1e-6; and more where that is rounded away.
    """
    root, failed = torch.linalg.cholesky_ex(metric)
    if not failed:
        return root
    identity = torch.eye(len(metric), dtype=metric.dtype, device=metric.device)
    added = (1e-6 - torch.linalg.eigvalsh(metric)[0]).clamp(min=0)
    while failed:
        root, failed = torch.linalg.cholesky_ex(metric + added * identity)
        added = torch.maximum(10 * added, torch.finfo(metric.dtype).eps * metric.trace())
    return root
