"""Smooth truncation against finite differences and the paper's own formulas (papers/003, Eq. 1, Algorithm 5)."""

from __future__ import annotations

import pytest
import torch

from lowrank_lab.lowrank.truncation import (
    GRADIENT_FLOOR,
    TERMS,
    core_gradient,
    smooth_truncation,
    stable_inverse,
)

SHAPES = [(9, 5), (5, 9), (6, 6)]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def edge(p: int, k: float, beta: float = 10.0) -> torch.Tensor:
    """0.5 tanh(β (k − i)) + 0.5 for i = 1 … p."""
    i = torch.arange(1, p + 1, dtype=torch.float64)
    return 0.5 * torch.tanh(beta * (k - i)) + 0.5


def with_values(tokens: int, out: int, sigma: list[float]) -> torch.Tensor:
    u = torch.linalg.qr(random(tokens, len(sigma), seed=1))[0]
    v = torch.linalg.qr(random(out, len(sigma), seed=2))[0]
    return (u * torch.tensor(sigma, dtype=torch.float64)) @ v.T


def gradients(activations: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of Σ Y · C for a fixed random C: to the activations and to the mask."""
    a, m = activations.clone().requires_grad_(True), mask.clone().requires_grad_(True)
    (smooth_truncation(a, m) * random(*activations.shape, seed=3)).sum().backward()
    assert a.grad is not None and m.grad is not None
    return a.grad, m.grad


def differences(activations: torch.Tensor, mask: torch.Tensor, h: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The same by central finite differences."""
    weights = random(*activations.shape, seed=3)

    def of(which: int) -> torch.Tensor:
        arguments = [activations, mask]
        found = torch.zeros_like(arguments[which])
        for n in range(found.numel()):
            sides = []
            for sign in (1, -1):
                moved = [t.clone() for t in arguments]
                moved[which].view(-1)[n] += sign * h
                sides.append((smooth_truncation(*moved) * weights).sum())
            found.view(-1)[n] = (sides[0] - sides[1]) / (2 * h)
        return found

    return of(0), of(1)


def check(activations: torch.Tensor, mask: torch.Tensor, h: float = 1e-6, tolerance: float = 1e-6) -> None:
    for ours, numeric in zip(gradients(activations, mask), differences(activations, mask, h), strict=True):
        torch.testing.assert_close(ours, numeric, rtol=tolerance, atol=tolerance)


def test_the_forward_is_the_masked_decomposition():
    a = random(7, 5)
    torch.testing.assert_close(smooth_truncation(a, torch.ones(5, dtype=torch.float64)), a)
    hard = torch.tensor([1.0, 1, 0, 0, 0], dtype=torch.float64)
    u, s, vt = torch.linalg.svd(a, full_matrices=False)
    torch.testing.assert_close(smooth_truncation(a, hard), (u[:, :2] * s[:2]) @ vt[:2])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("k", [0.7, 2.95, 3.5, 20.0])
def test_gradients_of_distinct_singular_values(shape, k):
    check(random(*shape), edge(min(shape), k))


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_of_a_mask_that_differs_everywhere(shape):
    check(random(*shape), random(min(shape), seed=4).abs())


@pytest.mark.parametrize("shape", [(9, 6), (6, 9), (6, 6)])
@pytest.mark.parametrize(
    "sigma",
    [[3.0, 3.0, 2.0, 1.0, 0.5, 0.2], [3.0, 2.5, 2.0, 0.5, 0.5, 0.2], [3.0, 3.0, 3.0, 0.5, 0.5, 0.5]],
    ids=["kept", "cut", "both"],
)
def test_equal_singular_values_where_the_mask_is_flat(shape, sigma):
    """There the truncation is differentiable all the same; an approximation of 1/E would show here."""
    mask = torch.tensor([0.9, 0.9, 0.9, 0.1, 0.1, 0.1], dtype=torch.float64)
    check(with_values(*shape, sigma), mask)


def test_equal_singular_values_of_a_steep_edge():
    check(with_values(8, 6, [3.0, 3.0, 2.0, 1.0, 0.5, 0.5]), edge(6, 3.5))


@pytest.mark.parametrize("shape", [(9, 6), (6, 9), (6, 6)])
@pytest.mark.parametrize("last", [[1e-12, 1e-12, 5e-13], [0.0, 0.0, 0.0], [1e-9, 1e-10, 1e-11]])
def test_vanishing_singular_values(shape, last):
    """At σ = 0 the singular vectors have no derivative, but the product has one where the mask is flat."""
    mask = torch.tensor([1.0, 1.0, 0.6, 0.2, 0.2, 0.2], dtype=torch.float64)
    check(with_values(*shape, [3.0, 2.0, 1.0, *last]), mask, h=1e-5, tolerance=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "sigma", [[3.0, 2.0, 2.0, 1.0, 0.5], [1.0] * 5, [0.0] * 5, [1e-20] * 5, [1.0, 1.0, 1.0 - 1e-8, 0.0, 0.0]]
)
def test_equal_singular_values_across_the_edge_stay_finite(dtype, sigma):
    """No derivative exists there; the gradient is bounded by the series, which has K terms."""
    a, mask = with_values(7, 5, sigma).to(dtype), edge(5, 2.5).to(dtype)
    for gradient in gradients(a, mask):
        assert torch.isfinite(gradient).all()
        assert gradient.abs().max() < 1e3
    u, s, vt = torch.linalg.svd(a, full_matrices=False)
    core = core_gradient(u.T @ random(7, 5, seed=3).to(dtype) @ vt.T, s, mask)
    assert torch.isfinite(core).all()


def test_low_precision_is_computed_in_float32():
    a = random(6, 4).bfloat16().requires_grad_(True)
    mask = edge(4, 2.5).float().requires_grad_(True)
    y = smooth_truncation(a, mask)
    y.float().square().sum().backward()
    assert y.dtype == torch.bfloat16 and a.grad.dtype == torch.bfloat16 and mask.grad.dtype == torch.float32
    exact = a.detach().double().requires_grad_(True)
    smooth_truncation(exact, mask.detach().double()).square().sum().backward()
    torch.testing.assert_close(a.grad.double(), exact.grad, rtol=0.03, atol=0.03)


def test_activations_that_are_not_finite_raise():
    with pytest.raises(FloatingPointError):
        smooth_truncation(torch.full((3, 2), torch.nan), torch.ones(2))


@pytest.mark.parametrize("shape", SHAPES)
def test_the_gradient_is_that_of_algorithm_5(shape):
    """From δU, δS and δV, for distinct singular values: the core (lines 36-39) and the whole (to line 46)."""
    a, p = random(*shape), min(shape)
    mask, g = edge(p, 2.4, beta=1.0), random(*shape, seed=3)
    u, s, vt = torch.linalg.svd(a, full_matrices=False)
    v, t = vt.T, s * mask
    delta_u, delta_s, delta_v = g @ v * t, mask * (u.T @ g @ v).diagonal(), g.T @ u * t
    inverse = 1 / (s[None, :].square() - s[:, None].square() + torch.eye(p, dtype=torch.float64))

    def skew(x: torch.Tensor) -> torch.Tensor:
        return x - x.T

    omega_u, omega_v = skew(u.T @ delta_u) * inverse, skew(v.T @ delta_v) * inverse
    core = omega_u @ s.diag() + s.diag() @ omega_v + delta_s.diag()
    torch.testing.assert_close(core_gradient(u.T @ g @ v, s, mask), core, rtol=1e-10, atol=1e-10)

    u_scaled, v_scaled = delta_u / s, delta_v.T / s[:, None]
    delta_x = u @ core @ vt + (u_scaled - u @ (u.T @ u_scaled)) @ vt + u @ (v_scaled - v_scaled @ v @ vt)
    torch.testing.assert_close(gradients(a, mask)[0], delta_x, rtol=1e-9, atol=1e-9)


def test_the_stable_inverse_of_separated_values_is_the_inverse():
    s = torch.tensor([5.0, 3.0, 2.9, 1.0, 1e-3], dtype=torch.float64)
    expected = s[None, :].square() - s[:, None].square()
    off = ~torch.eye(5, dtype=torch.bool)
    torch.testing.assert_close(stable_inverse(s)[off], 1 / expected[off], rtol=1e-12, atol=0)


def test_every_case_of_algorithm_5():
    near, far = 2 * (1 - 2.0**-13), 2 * (1 - 2.0**-11)  # float32 has √ε = 2^-11.5
    s = torch.tensor([4.0, 2.0, 2.0, near, 1e-12, 0.0])
    e = stable_inverse(s)
    assert float(e[1, 0]) == pytest.approx(1 / (16 - 4))  # other
    assert float(e[2, 1]) == pytest.approx(TERMS / 4)  # equal
    q2 = (near / 2) ** 2
    assert float(e[3, 2]) == pytest.approx(sum(q2**n for n in range(TERMS)) / 4, rel=1e-3)  # close
    assert float(e[5, 4]) == pytest.approx(GRADIENT_FLOOR)  # both too small
    assert float(e[4, 0]) == pytest.approx(1 / 16)
    assert float(stable_inverse(torch.tensor([2.0, far]))[1, 0]) == pytest.approx(1 / (4 - far**2))  # not close
    exact = stable_inverse(torch.tensor([2.0, near], dtype=torch.float64))  # close in float32 alone
    assert float(exact[1, 0]) == pytest.approx(1 / (4 - near**2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_stable_inverse_is_finite_and_antisymmetric(dtype):
    s = torch.tensor([2.0, 2.0, 2.0 - 1e-8, 1.0, 1.0, 1e-6, 1e-10, 1e-10, 1e-12, 0.0, 0.0], dtype=dtype)
    e = stable_inverse(s)
    assert torch.isfinite(e).all()
    torch.testing.assert_close(e, -e.T, rtol=0, atol=0)
    assert (e.tril(-1) >= 0).all()
    # The series never exceeds its K terms.
    assert (e[:3, :3].abs() <= 10 / 4 * 1.001).all()


def test_the_mask_reaches_a_learned_position():
    """The gradient to k of a loss that wants more rank points up (Algorithm 1)."""
    k = torch.tensor(2.5, dtype=torch.float64, requires_grad=True)
    a = random(8, 5)
    i = torch.arange(1, 6, dtype=torch.float64)
    (smooth_truncation(a, 0.5 * torch.tanh(k - i) + 0.5) - a).square().sum().backward()
    assert k.grad is not None and float(k.grad) < 0
