"""Rotations: Hadamard transforms, models that are rotated without a change, Cayley's descent."""

from __future__ import annotations

import pytest
import torch

from lowrank_lab.quantization import hadamard

# Widths of models, of heads, and of the fields they lead to: prime (107), squares (25, 49) and cubes (27, 343).
HADAMARD = [1, 2, 4, 12, 20, 28, 36, 44, 48, 52, 64, 80, 100, 192, 976, 500, 576, 1536]
OTHERS = [3, 5, 7, 137, 92, 6, 74, 274]


@pytest.mark.parametrize("width", HADAMARD)
def test_hadamard_matrices_have_orthogonal_rows_of_ones(width):
    matrix = hadamard.matrix(width)
    whole = (matrix * width**0.5).round().to(torch.int64)
    assert set(whole.unique().tolist()) <= {1, -1}
    torch.testing.assert_close(whole.double() / width**0.5, matrix, rtol=0, atol=1e-12)
    assert torch.equal(whole @ whole.T, width * torch.eye(width, dtype=torch.int64))


@pytest.mark.parametrize("width", [8960, 9728, 11008, 13824, 14336, 18944, 28672, 4864, 29568])
def test_widths_of_large_models_are_hadamards(width):
    """But for the piece of Paley, its order; the rest of the product are powers of two."""
    for size in hadamard.pieces(width):
        whole = (hadamard.matrix(size) * size**0.5).round()
        assert torch.equal(whole @ whole.T, size * torch.eye(size, dtype=torch.float64))
        assert (whole.abs() == 1).all()


@pytest.mark.parametrize("width", OTHERS)
def test_other_widths_are_orthogonal_and_spread(width):
    matrix = hadamard.matrix(width)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(width, dtype=torch.float64), rtol=0, atol=1e-6)
    assert matrix.abs().max() <= (2 / width) ** 0.5 + 1e-9


@pytest.mark.parametrize("width", [*HADAMARD, *OTHERS, 9 * 128])
def test_the_transform_is_a_product_with_the_matrix(width):
    x = torch.randn(2, 3, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(hadamard.transform(x), x @ hadamard.matrix(width))
    assert hadamard.transform(x.bfloat16()).dtype == torch.bfloat16


def test_random_signs_follow_the_seed():
    first, same, other = (hadamard.randomized(12, seed) for seed in (0, 0, 1))
    assert torch.equal(first, same) and not torch.equal(first, other)
    torch.testing.assert_close(first @ first.T, torch.eye(12, dtype=torch.float64))
