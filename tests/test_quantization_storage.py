"""In which factor the singular values are best kept where both are rounded (ASVD §A.8, Table 6).

Σ^a goes to the left factor and Σ^(1−a) to the right one. Rounding row i to steps Δᵢ adds an error of variance
Δᵢ²/12 to each of its values, which reaches the output through the other factor. For inputs that the right factor
makes white, as SVD-LLM's whitening does:

- Right factor (rank, in), a scale a row: its scales take Σ^(1−a) up, and its error is the same whatever a is.
- Left factor (out, rank), a scale a row: Σᵢ Δᵢ(a)² · Σⱼ σⱼ^(2(1−a)), where Δᵢ(a)² goes with maxⱼ σⱼ^(2a) uᵢⱼ². Both
  are log-convex in a, and so is their product: the error of a=½ is at most the geometric mean of those of 1 and 0,
  never the worst. It is the best where the singular values decay: with a=1 the first column makes the steps of all
  so coarse, with a=0 the largest of all uᵢⱼ does, and the columns that matter most get no finer ones than the rest.
- With one scale for the tensor the bound holds for the right factor too. There ½ is the best where the rows of the
  right factor are as long as their singular values. SVD-LLM's are not: it is Σ^−a UᵀW, where UᵀW is as even as W
  itself, so that a=0 may be better.
"""

from __future__ import annotations

import pytest
import torch

from lowrank_lab.lowrank.storage.absorb import Absorb
from lowrank_lab.modules.codec import quantize
from lowrank_lab.modules.formats import Format

OUT, INP, RANK = 96, 64, 24
SHARES = {"uv": 0.5, "u": 1.0, "v": 0.0}


def errors(form: Format, decay: float, seed: int) -> dict[str, tuple[float, float, float]]:
    """By storage the relative output error of the left factor rounded, of the right one, and of both, for white
    inputs and singular values j^−decay."""
    generator = torch.Generator().manual_seed(seed)
    orthonormal = lambda rows: torch.linalg.qr(torch.randn(rows, RANK, generator=generator, dtype=torch.float64))[0]
    left, right = orthonormal(OUT), orthonormal(INP).T
    singular = torch.arange(1, RANK + 1, dtype=torch.float64) ** -decay
    product = left * singular @ right
    found = {}
    for name, share in SHARES.items():
        u, v = Absorb(share).split(left, right * singular.unsqueeze(1), singular)
        torch.testing.assert_close(u @ v, product)
        rounded_u, rounded_v = (quantize(factor, form).dequantize().double() for factor in (u, v))
        relative = lambda made: float((made - product).norm() / product.norm())
        found[name] = relative(rounded_u @ v), relative(u @ rounded_v), relative(rounded_u @ rounded_v)
    return found


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("granularity", ["channel", "tensor", 16])
@pytest.mark.parametrize("decay", [1.0, 2.0])
def test_int6_is_best_with_singular_values_in_both(decay, granularity, seed):
    both = {name: error[2] for name, error in errors(Format(6, granularity=granularity), decay, seed).items()}
    assert both["uv"] < 0.95 * min(both["u"], both["v"])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("granularity", ["channel", "tensor"])
@pytest.mark.parametrize("decay", [0.0, 0.1, 0.3, 1.0, 3.0])
def test_both_is_never_worse_than_between_the_two(decay, granularity, seed):
    """At most the geometric mean, in each factor by itself; 2 % for the rounding that is not uniform noise."""
    found = errors(Format(6, symmetric=True, granularity=granularity, scale_dtype="float32"), decay, seed)
    for factor in (0, 1):
        assert found["uv"][factor] <= 1.02 * (found["u"][factor] * found["v"][factor]) ** 0.5


@pytest.mark.parametrize("decay", [0.3, 1.0, 3.0])
def test_rows_of_the_right_factor_take_up_the_singular_values(decay):
    right = [error[1] for error in errors(Format(6, scale_dtype="float32"), decay, 0).values()]
    assert right == pytest.approx([right[0]] * 3, rel=1e-3)
