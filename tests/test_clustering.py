"""Codebooks: k-means against rounding to the nearest; products from look-up tables."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lowrank_lab.basics.errors import UserError
from lowrank_lab.modules.codec import Quantized, by_group, quantize
from lowrank_lab.modules.formats import Format
from lowrank_lab.modules.look_up import look_up_linear
from lowrank_lab.modules.steps import Round
from lowrank_lab.quantization.method.kmeans import KMeans, centroids, kmeans

RAGGED = 137  # a rank that no group size divides


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def with_outlier() -> Tensor:
    weight = 0.01 * random(6, RAGGED)
    weight[:, 5] = 1e4
    return weight


WEIGHTS = {
    "normal": random(6, RAGGED),
    "outlier": with_outlier(),
    "negative outlier": -with_outlier(),
    "zeros": torch.zeros(4, RAGGED),
    "constant": torch.full((4, RAGGED), 7.3),
    "tiny": 1e-9 * random(4, RAGGED),
    "on a grid": torch.randint(16, (6, RAGGED), generator=torch.Generator().manual_seed(0)) * 0.3,
    "one input": random(5, 1),
    "one output": random(1, RAGGED),
    "rank 1": torch.outer(random(6), random(RAGGED, seed=1)),
}
FORMS = [
    *(Format(bits, "codebook", granularity=part) for bits in (2, 4) for part in ("tensor", "channel", 32)),
    *(Format(4, "codebook", scale_dtype=scale_dtype) for scale_dtype in ("bfloat16", "float32")),
    Format(8, "codebook", granularity=32),
]


def energies(width: int) -> dict[str, Tensor | None]:
    one_dead = random(width, seed=2).double() ** 2
    one_dead[0] = 0.0
    return {
        "none": None,
        "one dead": one_dead,
        "all dead": torch.zeros(width, dtype=torch.float64),
        "far apart": torch.logspace(-20, 20, width, dtype=torch.float64),
    }


@pytest.mark.parametrize("form", FORMS, ids=lambda form: f"{form.name} {form.scale_dtype}")
@pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS.keys())
def test_no_group_is_worse_than_rounded_to_the_nearest(weight, form):
    for energy in energies(weight.shape[1]).values():
        found = kmeans(weight, energy, form)
        assert found.codes.dtype == torch.uint8 and int(found.codes.max()) < 2**form.bits
        assert found.scale.shape == form.scales(weight.shape)
        assert found.codebook.shape == (*form.scales(weight.shape), 2**form.bits)
        kept = getattr(torch, form.scale_dtype)
        for values in (found.scale, found.codebook):  # nothing is lost when they are stored
            assert torch.equal(values.to(kept).float(), values)

        nearest = quantize(weight, replace(form, grid="integer"))
        counts = torch.ones(weight.shape[1], dtype=torch.float64) if energy is None else energy
        squares = [counts * (q.dequantize() - weight).double() ** 2 for q in (found, nearest)]
        if form.granularity == "tensor":
            ours, theirs = (total.sum() for total in squares)
        else:
            ours, theirs = (torch.cat([p.sum(2) for _, p in by_group(total, form)], 1) for total in squares)
        assert torch.isfinite(ours).all()
        assert (ours <= theirs * (1 + 1e-12)).all()


@pytest.mark.parametrize("granularity", ["tensor", "channel", 64])
def test_as_many_distinct_values_as_centroids_are_kept_exactly(granularity):
    values = torch.cat([torch.tensor([1e4, -3.0, 0.0]), random(5)])  # eight, far apart
    weight = values[torch.randint(8, (6, 200), generator=torch.Generator().manual_seed(1))]
    form = Format(3, "codebook", granularity=granularity, scale_dtype="float32")
    assert torch.equal(kmeans(weight, None, form).dequantize(), weight)
    halves = kmeans(weight.half().float(), random(200).double() ** 2, replace(form, scale_dtype="float16"))
    assert torch.equal(halves.dequantize(), weight.half().float())


def test_an_outlier_takes_one_centroid_from_the_others():
    """Rounding to the nearest loses all other weights; of 16 centroids, 15 are as good as without the outlier."""
    weight = with_outlier()
    others = torch.ones(RAGGED, dtype=torch.bool)
    others[5] = False
    form = Format(4, "codebook")
    error = lambda quantized: (quantized.dequantize() - weight)[:, others].norm() / weight[:, others].norm()
    assert error(quantize(weight, Format(4))) > 0.99
    assert error(kmeans(weight, None, form)) < 0.15
    assert error(kmeans(weight, None, form)) < 1.5 * error(kmeans(torch.where(others, weight, 0.0), None, form))


def test_errors_count_by_the_input():
    weight, energy = random(32, RAGGED), 10 * random(RAGGED, seed=1).double() ** 4
    form = Format(3, "codebook")
    error = lambda counts: (energy * (kmeans(weight, counts, form).dequantize() - weight) ** 2).sum()
    assert error(energy) < 0.8 * error(None)


def best_sum(x: list[float], counts: list[float], number: int) -> float:
    """The smallest Σ c (x − centroid)² over all ways to cut sorted ``x`` into ``number`` stretches, by trying."""

    def of_stretch(begin: int, end: int) -> float:
        total = sum(counts[begin:end])
        mean = sum(c * v for c, v in zip(counts[begin:end], x[begin:end], strict=True)) / total
        return sum(c * (v - mean) ** 2 for c, v in zip(counts[begin:end], x[begin:end], strict=True))

    best = [0.0] + [math.inf] * len(x)
    for _ in range(number):
        best = [0.0] + [
            min(best[begin] + of_stretch(begin, end) for begin in range(end)) for end in range(1, len(x) + 1)
        ]
    return best[-1]


def test_centroids_are_near_the_best_that_there_are():
    x, counts = random(20, 40).double(), random(20, 40, seed=1).double() ** 2 + 0.01
    found = centroids(x, counts, 4, 50)
    assert (found.diff(dim=1) >= 0).all()
    ours = (counts * (x.unsqueeze(2) - found.unsqueeze(1)).abs().amin(2) ** 2).sum(1)
    for row in range(len(x)):
        order = x[row].argsort()
        best = best_sum(x[row][order].tolist(), counts[row][order].tolist(), 4)
        assert best * (1 - 1e-9) <= ours[row] <= 1.5 * best  # a local minimum
    assert ours.sum() < 1.1 * sum(
        best_sum(x[row].sort().values.tolist(), counts[row][x[row].argsort()].tolist(), 4) for row in range(len(x))
    )


def test_no_iteration_makes_the_error_larger():
    x, counts = random(8, 500).double() ** 3, torch.ones(8, 500, dtype=torch.float64)
    errors = [
        (x.unsqueeze(2) - centroids(x, counts, 8, n).unsqueeze(1)).abs().amin(2).square().sum(1) for n in range(12)
    ]
    for before, after in pairwise(errors):
        assert (after <= before * (1 + 1e-12)).all()
    assert errors[-1].sum() < 0.9 * errors[0].sum()


def test_what_is_not_finite_raises():
    form = Format(4, "codebook")
    with pytest.raises(FloatingPointError, match="not finite"):
        kmeans(torch.tensor([[1.0, math.nan]]), None, form)
    with pytest.raises(FloatingPointError, match="not finite"):
        kmeans(torch.ones(1, 2), torch.tensor([1.0, math.inf]), form)


def test_only_codebooks_are_clustered(lab):
    with pytest.raises(ValueError, match="choose codebook"):
        KMeans(True, 10).check(Format(4))
    with pytest.raises(UserError, match="choose codebook"):
        lab.cells("quantization=int4", "quantization/method=kmeans")
    with pytest.raises(UserError, match="kmeans"):
        lab.cells("quantization=int4", "quantization.weights.grid=codebook")
    weighted, alike = lab.cells(
        "method=dense", "quantization=kmeans", "quantization.method.weighted=true,false", multirun=True
    )
    assert weighted.calibration_data is not None and alike.calibration_data is None


def test_a_checkpoint_with_codebooks_is_the_model_in_memory(lab):
    overrides = ["method=svdllm", "grouping=qkv", "ratio=0.8", "quantization=kmeans"]
    made = lab.run(*overrides, "quantization.weights.granularity=16", "save=true")
    loaded = lab.run(f"model.path={lab.root / made['checkpoint']}")
    assert "K16 g16" in loaded["method"]
    assert loaded["metrics"]["ppl"]["value"] == made["metrics"]["ppl"]["value"]
    assert loaded["sizes"]["bytes"] == made["sizes"]["bytes"]
    tensors = load_file(lab.root / made["checkpoint"] / "model.safetensors")
    books = [tensor for name, tensor in tensors.items() if name.endswith(".codebook")]
    assert books and all(book.dtype == torch.float16 and book.shape[2] == 16 for book in books)


def exactly(x: Quantized, weight: Quantized) -> list[list[float]]:
    """x Wᵀ of the values that the codes stand for, in rational numbers, rounded once."""
    rows, columns = exact_values(x), exact_values(weight)
    return [[float(sum(a * b for a, b in zip(row, column, strict=True))) for column in columns] for row in rows]


def exact_values(quantized: Quantized) -> list[list[Fraction]]:
    """Each value as scale · (code − zero), or scale · entry: a product that float32 would round."""
    form, (rows, width) = quantized.format, quantized.codes.shape
    scale = quantized.scale.expand(rows, -1)
    values = []
    for row in range(rows):
        line = []
        for column in range(width):
            code = int(quantized.codes[row, column])
            group = column // form.group_of(width)
            if quantized.codebook is None:
                zero = 8 if quantized.zero is None else int(quantized.zero.expand(rows, 1)[row, 0])
                value = Fraction(code - zero)
            else:
                value = Fraction(float(quantized.codebook.expand(rows, -1, -1)[row, group, code]))
            line.append(value * Fraction(float(scale[row, group])))
        values.append(line)
    return values


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("weight", ["normal", "outlier", "on a grid", "zeros", "one input"])
def test_sums_of_looked_up_products_are_exact(weight, bits, granularity, symmetric):
    """One codebook a row, or one for all: the result is the exact one, rounded once, to the last bit."""
    values = WEIGHTS[weight][:3]
    x = 3 * random(4, values.shape[1], seed=7) + 1
    tokens = quantize(x, Format(4, symmetric=symmetric, scale_dtype="float32"))
    clustered = kmeans(values, None, Format(bits, "codebook", granularity=granularity))
    assert look_up_linear(tokens, clustered).tolist() == exactly(tokens, clustered)


@pytest.mark.parametrize("granularity", ["tensor", "channel", 32])
def test_looked_up_products_are_those_of_the_dense_operands(granularity):
    x, weight = random(9, RAGGED, seed=3), WEIGHTS["normal"]
    tokens, clustered = quantize(x, Format(4)), kmeans(weight, None, Format(4, "codebook", granularity=granularity))
    dense = tokens.dequantize().double() @ clustered.dequantize().double().T
    torch.testing.assert_close(look_up_linear(tokens, clustered), dense, rtol=1e-6, atol=1e-6)


def test_other_formats_cannot_be_looked_up():
    x, weight = random(2, 8), random(3, 8)
    clustered = kmeans(weight, None, Format(4, "codebook"))
    for form in (Format(3), Format(4, "nf4"), Format(4, granularity=4)):
        with pytest.raises(ValueError, match="cannot be looked up"):
            look_up_linear(quantize(x, form), clustered)
    for other in (quantize(weight, Format(4)), kmeans(weight, None, Format(4, "codebook", scale_dtype="float32"))):
        with pytest.raises(ValueError, match="cannot be looked up"):
            look_up_linear(quantize(x, Format(4)), other)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("granularity", ["tensor", "channel", 32])
def test_codes_of_a_step_are_what_it_rounds_to(granularity, symmetric):
    step, x = Round(asdict(Format(4, "integer", symmetric, granularity, "float32"))), random(9, RAGGED)
    if step.static:
        step.fix(x.amin() / 2, x.amax())
    assert torch.equal(step.codes(x).dequantize(), step(x))


LOOKED_UP = ("quantization=kmeans", "quantization/activations=int4")


def test_a_cell_measures_looked_up_products(lab):
    """Of factors, in memory and from a checkpoint; a right factor that several linears share is counted once."""
    overrides = ("method=svdllm", "grouping=qkv", "ratio=0.8", *LOOKED_UP, "save=true")
    asked = ("eval=[ppl,look_up]", "eval.look_up.linears=[attention]", "eval.look_up.blocks=[0,2]")
    made = lab.run(*overrides, *asked)
    measured = made["metrics"]["look_up"]
    tensors = load_file(lab.root / made["checkpoint"] / "model.safetensors")
    names = [name for name in tensors if name.endswith(".codebook") and ".self_attn." in name]
    books = [tensors[name] for name in names if ".layers.1." not in name]
    entries, shapes = 16 * sum(book.numel() for book in books), [one["shape"] for one in measured["linears"]]
    weights = sum(out * inp for out, inp in shapes)
    assert len(shapes) == len(books) == 2 * (1 + 3 + 2)  # right and left of qkv, then those of o
    assert measured["look_ups_per_token"] == weights and measured["multiplications_for_tables"] == entries
    assert measured["table_entries_over_codes"] == pytest.approx(entries / weights)
    codes = sum(len(tensors[name.removesuffix("codebook") + "codes"]) for name in names if ".layers.1." not in name)
    assert measured["table_bytes_over_codes"] == pytest.approx(8 * entries / codes)
    assert {"self_attn.q_proj.right", "self_attn.v_proj.left"} <= {one["linear"] for one in measured["linears"]}
    assert measured["value"] == max(one["difference"] for one in measured["linears"])
    assert 0 < measured["value"] < 1e-5
    loaded = lab.run(f"model.path={lab.root / made['checkpoint']}", *asked)
    assert loaded["metrics"]["look_up"]["linears"] == measured["linears"]


@pytest.mark.parametrize(
    ("quantization", "reason"),
    [
        ("none", ""),
        ("w4a4", ": weights in INT4 cannot be looked up; they need codebooks in float16"),
        ("w8a8", ": inputs in INT8 sym cannot be looked up; they need 4 bits and a scale a token"),
    ],
)
def test_cells_without_both_operands_are_left_out(lab, quantization, reason):
    record = lab.run("method=dense", f"quantization={quantization}", "eval=[ppl,look_up]")
    needs = "eval=look_up needs quantization=kmeans quantization/activations=int4"
    assert record["left_out"] == {"look_up": needs + reason} and set(record["metrics"]) == {"ppl"}
