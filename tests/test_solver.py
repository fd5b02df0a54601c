"""The solver against its definition, in float64: optimality, exact errors, singular metrics."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from lowrank_lab.lowrank import solver
from lowrank_lab.lowrank.solver import decompose, decompose_by_cholesky

SHAPES = [(12, 20), (20, 12), (16, 16)]
KINDS = ["none", "diagonal", "full", "singular"]


def metric(kind: str, size: int, seed: int) -> Tensor | None:
    """A positive semi-definite metric; ``singular`` has rank size / 3, as from few samples."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "none":
        return None
    if kind == "diagonal":
        return torch.rand(size, dtype=torch.float64, generator=generator) + 0.1
    samples = 4 * size if kind == "full" else size // 3
    x = torch.randn(size, samples, dtype=torch.float64, generator=generator)
    return x @ x.T / samples


def root(m: Tensor | None, size: int) -> Tensor:
    """The symmetric square root, made independently of the solver."""
    if m is None:
        return torch.eye(size, dtype=torch.float64)
    if m.ndim == 1:
        return m.sqrt().diag()
    values, vectors = torch.linalg.eigh(m)
    return vectors @ values.clamp(min=0).sqrt().diag() @ vectors.T


def weight(out: int, inp: int, seed: int = 0) -> Tensor:
    return torch.randn(out, inp, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


CASES = list(itertools.product(SHAPES, KINDS, KINDS))


@pytest.mark.parametrize(("shape", "c_kind", "r_kind"), CASES)
def test_reported_error_is_the_measured_and_the_optimal_one(shape, c_kind, r_kind):
    out, inp = shape
    w = weight(out, inp)
    c, r = metric(c_kind, inp, 1), metric(r_kind, out, 2)
    left_root, right_root = root(r, out), root(c, inp)
    # Eckart-Young: the optimum is the tail of the singular values of R^½ W C^½.
    singular = torch.linalg.svdvals(left_root @ w @ right_root)
    spectrum = decompose(w, c, r)
    total = float(singular.square().sum())
    for rank in range(1, min(out, inp)):
        left, right, _ = spectrum.factors(w, rank)
        assert left.shape == (out, rank) and right.shape == (rank, inp)
        assert torch.isfinite(left).all() and torch.isfinite(right).all()
        measured = float((left_root @ (w - left @ right) @ right_root).square().sum())
        optimal = float(singular[rank:].square().sum())
        reported = spectrum.squared_error(rank)
        # Relative to the error itself, down to where the error is rounding noise of the whole.
        assert measured == pytest.approx(reported, rel=1e-6, abs=1e-12 * total)
        assert reported == pytest.approx(optimal, rel=1e-6, abs=1e-12 * total)


@pytest.mark.parametrize(("shape", "c_kind"), list(itertools.product(SHAPES, KINDS)))
def test_full_rank_gives_the_weight_itself(shape, c_kind):
    """Also where C is singular and the weighted error is zero long before."""
    out, inp = shape
    w = weight(out, inp)
    left, right, _ = decompose(w, metric(c_kind, inp, 1), metric("full", out, 2)).factors(w, min(out, inp))
    torch.testing.assert_close(left @ right, w, rtol=0, atol=1e-8)


@pytest.mark.parametrize("shape", SHAPES)
def test_error_falls_with_rank(shape):
    out, inp = shape
    spectrum = decompose(weight(out, inp), metric("full", inp, 1), None)
    errors = [spectrum.squared_error(k) for k in range(min(out, inp) + 1)]
    assert all(a > b for a, b in itertools.pairwise(errors))
    assert errors[-1] == 0.0


@pytest.mark.parametrize("shape", SHAPES)
def test_second_moment_equals_the_cholesky_route(shape):
    """SVD-LLM: whiten with the Cholesky factor S of C, truncate the SVD of W S, multiply by S⁻¹."""
    out, inp = shape
    w, c = weight(out, inp), metric("full", inp, 3)
    s = torch.linalg.cholesky(c)
    u, sigma, vh = torch.linalg.svd(w @ s, full_matrices=False)
    spectrum = decompose(w, c, None)
    for rank in (1, 5, 11):
        expected = (u[:, :rank] * sigma[:rank]) @ vh[:rank] @ torch.linalg.inv(s)
        left, right, singular_values = spectrum.factors(w, rank)
        torch.testing.assert_close(left @ right, expected, rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(singular_values, sigma[:rank], rtol=1e-8, atol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_second_moment_equals_the_eigen_route(shape):
    """SVD-LLM v2: whiten with M = U_s S_s^½ of C = U_s S_s U_sᵀ, truncate the SVD of W M, multiply by M⁻¹."""
    w, x = weight(*shape), weight(shape[1], 3 * shape[1], seed=1)
    c = x @ x.T
    values, vectors = torch.linalg.eigh(c)
    m = vectors * values.sqrt()
    u, s, vh = torch.linalg.svd(w @ m, full_matrices=False)
    for rank in (1, 3, min(shape)):
        theirs = (u[:, :rank] * s[:rank]) @ vh[:rank] @ torch.linalg.inv(m)
        left, right, _ = decompose(w, c, None).factors(w, rank)
        torch.testing.assert_close(left @ right, theirs, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_cholesky_option_is_the_same_metric(shape):
    w, x = weight(*shape), weight(shape[1], 3 * shape[1], seed=1)
    ours, theirs = decompose(w, x @ x.T, None), decompose_by_cholesky(w, x @ x.T)
    torch.testing.assert_close(ours.eigenvalues, theirs.eigenvalues, rtol=1e-7, atol=1e-7)
    for rank in (1, 3, min(shape)):
        (left, right, _), (left2, right2, _) = ours.factors(w, rank), theirs.factors(w, rank)
        torch.testing.assert_close(left @ right, left2 @ right2, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_cholesky_option_survives_a_singular_metric_and_is_no_better(shape):
    w, x = weight(*shape), weight(shape[1], 2, seed=1)
    c = x @ x.T
    rest = {}
    for name, spectrum in (("eigen", decompose(w, c, None)), ("cholesky", decompose_by_cholesky(w, c))):
        left, right, _ = spectrum.factors(w, 3)
        assert torch.isfinite(left @ right).all()
        rest[name] = float(((w - left @ right) @ x).norm())
    assert rest["eigen"] <= rest["cholesky"] * (1 + 1e-9) + 1e-9


@pytest.mark.parametrize("shape", SHAPES)
def test_diagonal_metric_equals_the_asvd_route(shape):
    """ASVD: scale the columns of W by S, truncate its SVD, scale back."""
    out, inp = shape
    w, c = weight(out, inp), metric("diagonal", inp, 4)
    s = c.sqrt()
    u, sigma, vh = torch.linalg.svd(w * s, full_matrices=False)
    left, right, _ = decompose(w, c, None).factors(w, 4)
    torch.testing.assert_close(left @ right, (u[:, :4] * sigma[:4]) @ vh[:4] / s, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("shape", SHAPES)
def test_identity_is_the_plain_svd(shape):
    w = weight(*shape)
    u, sigma, vh = torch.linalg.svd(w, full_matrices=False)
    left, right, _ = decompose(w, None, None).factors(w, 6)
    torch.testing.assert_close(left @ right, (u[:, :6] * sigma[:6]) @ vh[:6], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("condition", [1e6, 1e10, 1e14])
def test_badly_scaled_inputs_keep_the_left_factor_orthonormal(shape, condition):
    """Massive activations: a few channels thousands of times larger than the others."""
    out, inp = shape
    w = weight(out, inp)
    c = torch.logspace(0, float(torch.log10(torch.tensor(condition))), inp, dtype=torch.float64)
    spectrum = decompose(w, c, None)
    left, right, _ = spectrum.factors(w, min(out, inp))
    torch.testing.assert_close(left.T @ left, torch.eye(left.shape[1], dtype=torch.float64), rtol=0, atol=1e-7)
    torch.testing.assert_close(left @ right, w, rtol=0, atol=1e-6)


@pytest.mark.parametrize("rotated", [False, True])
def test_the_root_by_cholesky_gives_what_that_of_the_eigenvectors_does(rotated, monkeypatch):
    """To rounding, at every condition: what the one takes for noise the other does not keep."""
    out, inp = 60, 40
    w, conditions, taken = weight(out, inp), [10.0**power for power in range(19)], []
    for condition in conditions:
        values = torch.logspace(0, -math.log10(condition), inp, dtype=torch.float64)
        vectors = torch.linalg.qr(weight(inp, inp, 1))[0] if rotated else torch.eye(inp, dtype=torch.float64)
        c = (vectors * values) @ vectors.T
        c = (c + c.T) / 2
        found = decompose(w, c, None)
        with monkeypatch.context() as patch:
            patch.setattr(solver, "_root", lambda metric: solver._roots(metric)[0])
            expected = decompose(w, c, None)
        taken.append(not torch.equal(found.basis, expected.basis))
        rounding = 1e-12 + 1e-15 * min(condition, solver.WELL_CONDITIONED)
        for rank in range(1, inp + 1):
            (left, right, _), (left2, right2, _) = found.factors(w, rank), expected.factors(w, rank)
            torch.testing.assert_close(left @ right, left2 @ right2, rtol=0, atol=rounding)
    assert any(taken[:7]) and not any(taken[11:])


@pytest.mark.parametrize("shape", SHAPES)
def test_weights_of_low_rank_and_of_rank_zero(shape):
    out, inp = shape
    low = weight(out, 3) @ weight(3, inp, 1)
    for w in (low, torch.zeros(out, inp, dtype=torch.float64)):
        for c in (None, metric("full", inp, 1), metric("singular", inp, 1)):
            left, right, values = decompose(w, c, None).factors(w, min(out, inp))
            assert torch.isfinite(left).all() and torch.isfinite(right).all() and torch.isfinite(values).all()
            torch.testing.assert_close(left @ right, w, rtol=0, atol=1e-7)


def test_input_that_is_not_finite_raises():
    w = weight(4, 5)
    with pytest.raises(FloatingPointError, match="input metric"):
        decompose(w, torch.full((5,), torch.nan, dtype=torch.float64), None)
    with pytest.raises(FloatingPointError, match="weight"):
        decompose(w * torch.inf, None, None)
