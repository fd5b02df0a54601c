"""Scales that move the difficulty of rounding from activations to weights, and the split of σ between factors."""

from __future__ import annotations

import pytest
import torch

from lowrank_lab.quantization.codec import quantize
from lowrank_lab.quantization.formats import Format
from lowrank_lab.quantization.scales import awq_candidates, awq_losses, largest, smoothing
from lowrank_lab.quantization.splits import latent_loss, splits, weight_loss


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rounded(form: Format):
    return lambda x: quantize(x, form).dequantize().double()


def test_smoothing_by_hand():
    """Figure 5 of SmoothQuant: α = ½, s_j = √(max|X_j| / max|W_j|)."""
    weights = largest([torch.tensor([[1.0, -4.0]]), torch.tensor([[-2.0, 1.0]])])
    assert weights.tolist() == [2, 4]
    assert smoothing(torch.tensor([18.0, 1.0]), weights, 0.5).tolist() == [3, 0.5]
    assert smoothing(torch.tensor([18.0, 1.0]), weights, 1.0).tolist() == [18, 1]
    assert smoothing(torch.tensor([18.0, 1.0]), weights, 0.0).tolist() == [0.5, 0.25]


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_channels_without_input_or_weight_are_left_alone(alpha):
    scale = smoothing(torch.tensor([0.0, 1e-30, 1e4, 1.0]), torch.tensor([1.0, 1e-30, 1e-30, 0.0]), alpha)
    assert scale[0] == scale[3] == 1
    assert ((scale >= 1e-5) & (scale <= 1e5)).all()


def test_awq_candidates_by_hand():
    scales = awq_candidates(torch.tensor([1.0, 16.0, 0.0]), 4)
    expected = [[1, 1, 1], [0.5**0.5, 2**0.5, 1], [0.5, 2, 1], [2**-1.5, 2**1.5, 1]]
    torch.testing.assert_close(scales, torch.tensor(expected, dtype=torch.float64))
    assert (scales[0] == 1).all()
    assert (awq_candidates(torch.zeros(3), 4) == 1).all()


@pytest.mark.parametrize("form", [Format(4, granularity=32), Format(3), Format(4, grid="nf4", granularity=64)])
def test_awq_losses_are_those_of_the_outputs(form):
    """The trace form against the rows themselves; a few loud channels make scaling worth it."""
    x = random(500, 72) * torch.ones(72).index_fill(0, torch.tensor([3, 40]), 30.0)
    weights = [(random(24, 72, seed=1), form), (random(8, 72, seed=2), Format(8))]
    scales = awq_candidates(x.abs().mean(0), 20)
    losses = awq_losses(scales, x.T @ x / 500, weights)
    for scale, loss in zip(scales[[0, 7, 19]], losses[[0, 7, 19]], strict=True):
        outputs = [(rounded(f)((w * scale).float()) @ (x / scale).T - w @ x.T).square().sum() / 500 for w, f in weights]
        assert float(loss) == pytest.approx(float(sum(outputs)), rel=1e-4)
    assert losses.min() < 0.7 * losses[0]


def test_splits_have_one_product_and_the_singular_values_where_beta_says():
    left, right = random(9, 4), random(4, 7, seed=1)
    right[3] = right[2]  # rank 3: the last σ is zero, or nearly
    sigma = torch.linalg.svdvals(left @ right)[:4]
    for beta, (a, b) in zip((0.0, 0.3, 1.0), splits(left, right, (0.0, 0.3, 1.0)), strict=True):
        torch.testing.assert_close(a @ b, left @ right)
        torch.testing.assert_close(b.norm(dim=1)[:3], sigma[:3] ** beta)
        torch.testing.assert_close(a.norm(dim=0)[:3], sigma[:3] ** (1 - beta))
    [(a, b)] = splits(torch.zeros(5, 1, dtype=torch.float64), random(1, 6), (0.0,))
    assert (a @ b == 0).all()


def test_losses_of_a_split_are_those_of_the_outputs():
    left, right = random(9, 4), random(4, 7, seed=1)
    x, form = random(50, 7, seed=2), Format(4)
    low = rounded(form)
    error = (x @ low(right).T @ low(left).T - x @ (left @ right).T).square().sum() / 50
    assert float(weight_loss(left, right, low, low, x.T @ x / 50)) == pytest.approx(float(error))
    same = lambda latent: latent
    assert float(latent_loss(left, right, low, low, x, same)) == pytest.approx(float(error))
    assert latent_loss(left, right, low, low, x, low) > error
