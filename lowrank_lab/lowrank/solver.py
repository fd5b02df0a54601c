"""The one solver behind every method.

Given a weight W (out, in) and two positive semi-definite metrics, C on the input side and R on the output
side, it finds for every rank k the W' that minimises

    ‖ R^½ (W − W') C^½ ‖_F    subject to rank W' ≤ k.

With U the eigenvectors of R^½ W C Wᵀ R^½ the answer is W'ₖ = R^-½ Uₖ Uₖᵀ R^½ W, and the squared error is the
tail Σ_{i>k} λᵢ of the eigenvalues. C is never inverted, so a singular C (few samples, dead channels) is no
special case. One eigendecomposition, min(out, in) wide, serves all ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank_lab.modules.positive import NOISE, eigh, regular_cholesky

# Far enough from 1 / NOISE that no eigenvalue of a better conditioned metric is mistaken for noise.
WELL_CONDITIONED = 1e10


@dataclass(frozen=True)
class Spectrum:
    """All optimal approximations of one weight at once.

    eigenvalues  (p,)    squared singular values of R^½ W C^½, descending, p = min(out, in)
    basis        (p, p)  if out ≤ in: R^-½ U, so that left = basis;
                         else: T with R^-½ U = W T, so that left = W · basis
    output_metric        R as given to ``decompose``
    """

    eigenvalues: Tensor
    basis: Tensor
    output_metric: Tensor | None

    def squared_error(self, rank: int) -> float:
        """‖R^½ (W − W'ₖ) C^½‖²_F at ``rank``: the tail of the eigenvalues."""
        return float(self.eigenvalues[rank:].sum())

    def factors(self, weight: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """``left`` (out, k), ``right`` (k, in) with W'ₖ = left · right, and the k singular values.

        ``weight`` is the one of which this is the spectrum. The singular values are all in ``right``.
        """
        out, inp = weight.shape
        basis = self.basis[:, :rank]
        left = basis if out <= inp else weight @ basis
        right = left.T @ _apply(self.output_metric, weight)  # (R^½ U)ᵀ W = (R^-½ U)ᵀ R W
        return left, right, self.eigenvalues[:rank].sqrt()


def decompose(
    weight: Tensor, input_metric: Tensor | None, output_metric: Tensor | None, samples: int | None = None
) -> Spectrum:
    """Solve for every rank.

    ``weight`` (out, in) float64; the metrics C (in,) or (in, in) and R (out,) or (out, out) are None
    (identity), a vector (diagonal) or a symmetric positive semi-definite matrix, float64. Where C is a sum of
    ``samples`` outer products its rank is at most that; eigenvalues beyond are rounding of how it was summed.
    Raises FloatingPointError for non-finite input.

    Where the weighted error is already zero at some rank (C singular), the remaining directions are those
    that best approximate what is left of W unweighted in C, so rank min(out, in) always gives W itself
    (unless R is singular too: directions in its null space are left out).
    """
    for name, tensor in (
        ("weight", weight),
        ("input metric", input_metric),
        ("output metric", output_metric),
    ):
        if tensor is not None and not torch.isfinite(tensor).all():
            raise FloatingPointError(f"the {name} is not finite")
    spectrum, determined = _decompose(weight, input_metric, output_metric)
    if samples is not None:
        determined = min(determined, samples)
    if input_metric is None or determined == len(spectrum.eigenvalues):
        return spectrum
    return _complete(spectrum, determined, weight)


def decompose_by_cholesky(weight: Tensor, input_metric: Tensor) -> Spectrum:
    """SVD-LLM's route (Wang et al., ICLR 2025): S Sᵀ = C, W S = U Σ Vᵀ, W'ₖ = Uₖ Σₖ Vₖᵀ S⁻¹.

    ``weight`` (out, in), ``input_metric`` C (in, in), float64. For a regular C the W' are those of ``decompose``.
    Where C is not positive definite, this does what the authors' code does: it adds to the diagonal what the lowest
    eigenvalue lacks, and 1e-6; and more where that is rounded away. Raises FloatingPointError for non-finite input.
    """
    if not (torch.isfinite(weight).all() and torch.isfinite(input_metric).all()):
        raise FloatingPointError("the weight or the input metric is not finite")
    root = regular_cholesky(input_metric)
    u, sigma, vt = torch.linalg.svd(weight @ root, full_matrices=False)
    out, inp = weight.shape
    # Where out > in, the left factor is W · basis: U = W (S V Σ⁻¹). Of a zero weight any basis is right.
    least = torch.where(sigma[0] > 0, sigma[0] * NOISE, 1.0)
    basis = u if out <= inp else root @ vt.T / sigma.clamp(min=least)
    return Spectrum(sigma.square(), basis, None)


def _decompose(
    weight: Tensor, input_metric: Tensor | None, output_metric: Tensor | None, scale: Tensor | None = None
) -> tuple[Spectrum, int]:
    """The spectrum, and how many of its directions are above the rounding noise at ``scale``.

    ``scale`` is the largest eigenvalue unless ``weight`` is itself the remainder of something larger.
    """
    out, inp = weight.shape
    if out <= inp:
        # R = P Pᵀ; then Pᵀ W C Wᵀ P has the eigenvectors U, and P^-T U takes the place of R^-½ U.
        root, inverse_root = _roots(output_metric)
        scaled = weight if root is None else _apply_transposed(root, weight)
        eigenvalues, vectors = eigh(_apply_right(scaled, input_metric) @ scaled.T)
        kept = _above_noise(eigenvalues, scale)
        return Spectrum(eigenvalues, _apply(inverse_root, vectors), output_metric), kept
    # C = S Sᵀ; then Sᵀ Wᵀ R W S has the eigenvectors V, and R^-½ U = W S V Σ^-1.
    root = _root(input_metric)
    scaled = _apply_right(weight, root)
    eigenvalues, vectors = eigh(scaled.T @ _apply(output_metric, scaled))
    kept = _above_noise(eigenvalues, scale)
    basis = torch.zeros_like(vectors)
    basis[:, :kept] = _apply(root, vectors[:, :kept]) / eigenvalues[:kept].sqrt()
    # Dividing by a small σ magnifies rounding. Make the left factors orthonormal in R again; a triangular
    # correction leaves the span of the first k columns as it is, for every k.
    left = weight @ basis[:, :kept]
    cholesky, failed = torch.linalg.cholesky_ex(left.T @ _apply(output_metric, left))
    if failed:  # R is summed in float32, whose rounding leaves it eigenvalues below zero: from here on all is that
        kept = int(failed) - 1
        basis[:, kept:] = 0
        cholesky = cholesky[:kept, :kept]
    basis[:, :kept] = torch.linalg.solve_triangular(cholesky, basis[:, :kept].T, upper=False).T
    return Spectrum(eigenvalues, basis, output_metric), kept


def _complete(spectrum: Spectrum, determined: int, weight: Tensor) -> Spectrum:
    """Fill the directions in which the weighted error is zero anyway with those best for the plain error."""
    out, inp = weight.shape
    output_metric = spectrum.output_metric
    left, right, _ = spectrum.factors(weight, determined)
    residual = weight - left @ right
    energy = (weight * _apply(output_metric, weight)).sum()
    rest, found = _decompose(residual, None, output_metric, scale=energy)
    free = min(len(spectrum.eigenvalues) - determined, found)
    extra = rest.basis[:, :free]
    if out > inp:
        # rest gives its directions as E · extra with E = W − left · right = W (I − basis · right).
        extra = extra - spectrum.basis[:, :determined] @ (right @ extra)
    basis = torch.zeros_like(spectrum.basis)
    basis[:, :determined] = spectrum.basis[:, :determined]
    basis[:, determined : determined + free] = extra
    eigenvalues = spectrum.eigenvalues.clone()
    eigenvalues[determined:] = 0
    return Spectrum(eigenvalues, basis, output_metric)


def _above_noise(eigenvalues: Tensor, scale: Tensor | None) -> int:
    """How many of the descending ``eigenvalues`` are above the rounding noise at ``scale``."""
    return int((eigenvalues > NOISE * (eigenvalues[0] if scale is None else scale)).sum())


def _root(metric: Tensor | None) -> Tensor | None:
    """Any P with P Pᵀ = metric, up to noise; None and vectors as in ``decompose``.

    The Cholesky factor takes a fifth of the time of the eigenvectors, including the bound on the condition number,
    λmax / λmin ≤ trace(C) · trace(C⁻¹). It would keep directions that are noise, so it serves where there are none.
    """
    if metric is None or metric.ndim == 1:
        return _roots(metric)[0]
    root, failed = torch.linalg.cholesky_ex(metric)
    if not failed and metric.trace() * torch.cholesky_inverse(root).trace() < WELL_CONDITIONED:
        return root
    return _roots(metric)[0]


def _roots(metric: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """P with P Pᵀ = metric, and its pseudo-inverse transposed; None and vectors as in ``decompose``."""
    if metric is None:
        return None, None
    values, vectors = (metric, None) if metric.ndim == 1 else eigh(metric)
    kept = values > NOISE * values.max()
    root = torch.where(kept, values, torch.zeros_like(values)).sqrt()
    inverse = torch.where(kept, values, torch.ones_like(values)).rsqrt() * kept
    if vectors is None:
        return root, inverse
    return vectors * root, vectors * inverse


def _apply(metric: Tensor | None, matrix: Tensor) -> Tensor:
    """metric · matrix."""
    if metric is None:
        return matrix
    return metric.unsqueeze(-1) * matrix if metric.ndim == 1 else metric @ matrix


def _apply_transposed(root: Tensor, matrix: Tensor) -> Tensor:
    """rootᵀ · matrix."""
    return root.unsqueeze(-1) * matrix if root.ndim == 1 else root.T @ matrix


def _apply_right(matrix: Tensor, metric: Tensor | None) -> Tensor:
    """matrix · metric."""
    if metric is None:
        return matrix
    return matrix * metric if metric.ndim == 1 else matrix @ metric
