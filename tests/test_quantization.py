"""Quantization: codes and bytes, GPTQ against OBQ, models whose linears are kept in few bits."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import load_file

from lowrank_lab.basics.errors import UserError
from lowrank_lab.modules.codec import NF4, decode, encode, grids, pack, quantize, spread, unpack
from lowrank_lab.modules.formats import Format
from lowrank_lab.modules.quantized import QuantizedLinear
from lowrank_lab.quantization.method.gptq import gptq

RAGGED = 137  # a rank that no group size divides


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


FORMATS = [
    Format(bits, symmetric=symmetric, granularity=granularity, scale_dtype="float32")
    for bits in range(2, 9)
    for symmetric in (False, True)
    for granularity in ("tensor", "channel", 32, 500)
]


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
def test_every_value_is_within_half_a_step(form):
    """But that the symmetric grid ends half a step before its largest value on the upper side."""
    x = random(5, RAGGED)
    quantized = quantize(x, form)
    step = spread(quantized.scale, form, RAGGED)
    allowed = step * (1.0 if form.symmetric else 0.5) * (1 + 1e-5)
    assert ((quantized.dequantize() - x).abs() <= allowed).all()
    if not form.symmetric:
        assert (quantize(quantized.dequantize(), form).codes == quantized.codes).float().mean() > 0.99


def test_nf4_takes_the_nearest_of_its_values():
    x = random(3, 100)
    form = Format(4, grid="nf4", granularity=64, scale_dtype="float32")
    quantized = quantize(x, form)
    scale = spread(quantized.scale, form, 100)
    nearest = (x / scale).unsqueeze(-1).sub(torch.tensor(NF4)).abs().argmin(-1)
    assert (quantized.codes.long() == nearest).all()
    assert quantized.scale[1, 1] == x[1, 64:].abs().max()  # the short group at the end has its own


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [1, 7, 8, 685])
def test_packed_codes_take_their_bits_and_come_back(bits, count):
    codes = torch.randint(2**bits, (count,), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    packed = pack(codes, bits)
    assert len(packed) == math.ceil(count * bits / 8)
    assert (unpack(packed, bits, (count,)) == codes).all()


@pytest.mark.parametrize(
    "weight",
    [
        torch.zeros(4, RAGGED),
        torch.full((4, RAGGED), 7.0),
        torch.full((4, RAGGED), 1e-9),
        torch.cat([torch.full((4, 1), 1e4), 0.01 * random(4, RAGGED - 1)], dim=1),
        random(4, 1),
        random(1, RAGGED),
    ],
    ids=["zeros", "constant", "tiny", "outlier", "one input", "one output"],
)
@pytest.mark.parametrize(
    "form", [Format(4), Format(3, symmetric=True), Format(2, granularity=32), Format(4, grid="nf4", granularity=64)]
)
def test_odd_weights_stay_finite(weight, form):
    moment = torch.eye(weight.shape[1]) * random(weight.shape[1]).abs()
    moment[0, 0] = 0.0  # a dead channel
    for quantized in (quantize(weight, form), gptq(weight, moment, form)):
        error = (quantized.dequantize() - weight).abs()
        assert torch.isfinite(error).all()
        assert error.max() <= weight.abs().max()


def test_a_weight_that_is_not_finite_raises():
    with pytest.raises(FloatingPointError, match="not finite"):
        quantize(torch.tensor([[1.0, math.nan]]), Format(4))


def obq(weight: torch.Tensor, moment: torch.Tensor, form: Format) -> torch.Tensor:
    """OBQ with a fixed order, as it is written down: the slow reference of ``gptq`` without damping.

    Quantize one column, move the remaining ones by −(w − q) / [H⁻¹]₁₁ · [H⁻¹]₁, and drop it from H. Returns W'
    (out, in), float64. Only for grids that all columns share.
    """
    weight, hessian = weight.double().clone(), moment.double()
    scale, zero = grids(weight, form)
    scale = spread(scale, form, weight.shape[1])
    zero = None if zero is None else spread(zero, form, weight.shape[1])
    result = torch.empty_like(weight)
    for step in range(weight.shape[1]):
        its = scale[:, step].expand(len(weight)), None if zero is None else zero[:, step].expand(len(weight))
        result[:, step] = decode(encode(weight[:, step], form, *its), form, *its)
        inverse = torch.linalg.inv(hessian[step:, step:])
        error = (weight[:, step] - result[:, step]) / inverse[0, 0]
        weight[:, step:] -= torch.outer(error, inverse[0])
    return result


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_gptq_is_obq_with_a_fixed_order(bits, granularity):
    x = random(400, 40) @ random(40, 40, seed=1)
    weight, moment, form = random(6, 40, seed=2), x.T @ x / 400, Format(bits, granularity=granularity)
    found = gptq(weight, moment, form, damping=0.0).dequantize()
    torch.testing.assert_close(found.double(), obq(weight, moment, form), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("granularity", ["channel", 32])
@pytest.mark.parametrize("act_order", [False, True])
def test_gptq_has_a_smaller_output_error_than_rounding(granularity, act_order):
    x = random(2000, RAGGED) @ random(RAGGED, RAGGED, seed=1)
    weight, moment, form = random(48, RAGGED, seed=2), x.T @ x / 2000, Format(3, granularity=granularity)
    error = lambda quantized: ((quantized.dequantize() - weight) @ x.T).norm()
    assert error(gptq(weight, moment, form, act_order=act_order)) < 0.9 * error(quantize(weight, form))


def test_gptq_of_white_inputs_is_rounding():
    weight, form = random(8, 50), Format(4)
    assert (gptq(weight, torch.eye(50), form).codes == quantize(weight, form).codes).all()


@pytest.mark.parametrize(
    "form",
    [Format(3), Format(4, symmetric=True, granularity=32), Format(4, grid="nf4", granularity=64), Format(8)],
    ids=lambda form: form.name,
)
def test_a_linear_multiplies_with_the_values_of_its_codes(form):
    weight, bias, x = random(9, RAGGED), random(9), random(4, RAGGED, seed=3)
    quantized = quantize(weight, form)
    linear = QuantizedLinear.of(quantized, bias)
    torch.testing.assert_close(linear.weight, quantized.dequantize(), rtol=0, atol=0)
    torch.testing.assert_close(linear(x), x @ quantized.dequantize().T + bias)
    empty = QuantizedLinear.empty(linear.describe(), torch.nn.Linear(RAGGED, 9, device="meta"))
    shapes = lambda module: {name: (p.shape, p.dtype) for name, p in module.named_parameters()}
    assert shapes(empty) == shapes(linear)
    assert linear.codes.numel() == math.ceil(9 * RAGGED * form.bits / 8)


def test_values_between_two_codes_go_to_the_nearest():
    form = Format(2, symmetric=False)
    codes = encode(torch.tensor([[0.0, 0.4, 0.6, 9.0]]), form, torch.ones(1, 4), torch.zeros(1, 4))
    assert codes.tolist() == [[0, 0, 1, 3]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 1}, "bits"), ({"bits": 9}, "bits"), ({"bits": 8, "grid": "nf4"}, "nf4"),
        ({"bits": 4, "grid": "hexagonal"}, "grid"), ({"bits": 4, "granularity": 0}, "granularity"),
        ({"bits": 4, "granularity": "row"}, "granularity"), ({"bits": 4, "scale_dtype": "int8"}, "scale_dtype"),
        ({"bits": 4, "symmetric": "no"}, "symmetric"),
    ],
)  # fmt: skip
def test_formats_out_of_range_are_rejected(settings, message):
    with pytest.raises(ValueError, match=message):
        Format(**settings)


@pytest.mark.parametrize(
    ("method", "quantization"), [("dense", "gptq"), ("dobi_untrained", "int8"), ("svdllm grouping=qkv", "nf4")]
)
def test_a_cell_in_few_bits(lab, method, quantization):
    """Its bytes are those of its tensors, its parameters those of the cell that is not quantized."""
    overrides = [f"method={method.split()[0]}", *method.split()[1:], "ratio=0.8"]
    plain = lab.run(*overrides)
    record = lab.run(*overrides, f"quantization={quantization}")
    assert record["key"] != plain["key"]
    assert record["sizes"]["parameters"] == plain["sizes"]["parameters"]
    assert record["sizes"]["macs_per_token"] == plain["sizes"]["macs_per_token"]
    assert record["sizes"]["bytes"] < plain["sizes"]["bytes"]
    value = record["metrics"]["ppl"]["value"]
    assert value != plain["metrics"]["ppl"]["value"]
    assert value == pytest.approx(plain["metrics"]["ppl"]["value"], rel=0.05)


def test_bytes_by_hand(lab):
    """INT4 by channel: half a byte a weight, a 16-bit scale and a 4-bit zero point a row."""
    plain, record = lab.run("method=dense"), lab.run("method=dense", "quantization=int4")
    [cell] = lab.cells("method=dense", "quantization=int4")
    from lowrank_lab.records.results import Record
    from lowrank_lab.running.context import Context, pick_device

    sites = Context(cell, Record(cell, None), pick_device("cpu")).sites.values()
    dense = sum(site.out * site.inp * 4 for site in sites)
    packed = sum(math.ceil(site.out * site.inp / 2) + 2 * site.out + math.ceil(site.out / 2) for site in sites)
    assert record["sizes"]["bytes"] == plain["sizes"]["bytes"] - dense + packed
    assert record["sizes"]["sites"]["bytes"] == packed


def test_the_quantization_of_a_cell_is_told_in_its_label_and_key(lab):
    cells = lab.cells("method=dense,svd", "quantization=none,int4,gptq", multirun=True)
    assert len({cell.key for cell in cells}) == 6
    assert [cell.calibration_data is None for cell in cells] == [True, True, False] * 2
    assert ["INT4" in cell.label for cell in cells] == [False, True, True] * 2
    assert ["GPTQ" in cell.label for cell in cells] == [False, False, True] * 2


@pytest.mark.parametrize("method", ["dense", "dobi_untrained", "svdllm grouping=qkv"])
def test_a_checkpoint_in_few_bits_is_the_model_in_memory(lab, method):
    overrides = [f"method={method.split()[0]}", *method.split()[1:], "ratio=0.8", "quantization=int3"]
    made = lab.run(*overrides, "save=true", "save.merge=true")
    folder = lab.root / made["checkpoint"]
    loaded = lab.run(f"model.path={folder}")
    assert loaded["metrics"]["ppl"]["value"] == made["metrics"]["ppl"]["value"]
    assert loaded["method"] == f"{method.split()[0]} INT3"
    for count in ("parameters", "bytes", "macs_per_token"):
        assert loaded["sizes"][count] == made["sizes"][count]
    tensors = load_file(folder / "model.safetensors")
    packed = sum(tensor.numel() for name, tensor in tensors.items() if name.endswith(".codes"))
    weights = made["sizes"]["sites"]["parameters"]
    assert weights * 3 / 8 <= packed < weights * 3 / 8 + len(tensors)
    merged = lab.run(f"model.path={lab.root / made['merged_checkpoint']}", "method=dense")
    assert merged["metrics"]["ppl"]["value"] == pytest.approx(made["metrics"]["ppl"]["value"], rel=1e-4)
    with pytest.raises(UserError, match="quantized already"):
        lab.cells(f"model.path={folder}", "quantization=int4")


def test_a_dense_model_in_few_bits_is_no_dense_model(lab):
    """Its speed is against the dense one, and what needs a dense model goes without it."""
    small = [
        "eval.speed.batch_sizes=[1]",
        "eval.speed.seqlens=[8]",
        "eval.speed.new_tokens=1",
        "eval.speed.repeats=1",
    ]
    record = lab.run("method=dense", "quantization=int4", "eval=ppl,speed,truncation,output_error", *small)
    assert set(record["metrics"]) == {"ppl", "speed"}
    assert set(record["metrics"]["speed"]["macs"]) == {"dense", "model"}
    [setting] = record["metrics"]["speed"]["settings"]
    assert setting["dense"]["decode"] != setting["model"]["decode"]


def test_a_compressed_checkpoint_is_quantized_as_its_cell_is(lab, caplog):
    caplog.set_level("INFO")
    made = lab.run("method=svdllm", "ratio=0.6", "save=true")
    here = lab.run("method=svdllm", "ratio=0.6", "quantization=int4")
    there = lab.run(f"model.path={lab.root / made['checkpoint']}", "quantization=int4")
    assert "no method is applied again, it is only changed further by" in caplog.text
    assert there["metrics"]["ppl"]["value"] == here["metrics"]["ppl"]["value"]
    assert there["sizes"]["bytes"] == here["sizes"]["bytes"]


@pytest.mark.parametrize(
    ("method", "granularity"),
    [("dense", "tensor"), ("svdllm", "8"), ("svdllm grouping=qkv", "token")],
)
def test_inputs_are_rounded_and_saved_with_their_scales(lab, method, granularity):
    overrides = [f"method={method.split()[0]}", *method.split()[1:], "quantization=w8a8"]
    made = lab.run(*overrides, f"quantization.activations.granularity={granularity}", "save=true")
    weights_alone = lab.run(*overrides, "quantization/activations=none")
    value = made["metrics"]["ppl"]["value"]
    assert value != weights_alone["metrics"]["ppl"]["value"]
    if granularity != "tensor":  # one scale for all tokens loses more
        assert value == pytest.approx(weights_alone["metrics"]["ppl"]["value"], rel=0.01)
    loaded = lab.run(f"model.path={lab.root / made['checkpoint']}")
    assert loaded["metrics"]["ppl"]["value"] == value
    assert loaded["sizes"]["bytes"] == made["sizes"]["bytes"]
    with pytest.raises(UserError, match="dense weights cannot hold"):
        lab.cells(*overrides, "save.merge=true")


def test_inputs_of_linears_in_front_of_one_another_are_rounded_once():
    """q, k and v share their rounding, and so do the left factors of a joint site."""
    from lowrank_lab.models.families import LLAMA
    from lowrank_lab.modules.factorized import factorize
    from lowrank_lab.modules.linears import linears_in, set_steps, shared_inputs
    from lowrank_lab.modules.site import Site
    from lowrank_lab.modules.steps import Round
    from tests.prepared import prepared_in

    block = torch.nn.ModuleDict(
        {
            "self_attn": torch.nn.ModuleDict({f"{n}_proj": torch.nn.Linear(16, 16) for n in "qkvo"}),
            "mlp": torch.nn.ModuleDict({f"{n}_proj": torch.nn.Linear(16, 16) for n in ("gate", "up", "down")}),
        }
    )
    members = LLAMA.linears
    qkv = tuple(f"self_attn.{n}_proj" for n in "qkv")
    factorize(block, Site(0, qkv, (16, 16, 16), 16, 768, lambda rank: 64 * rank), random(48, 4), random(4, 16))
    groups = shared_inputs(block, LLAMA, members)
    assert [len(group) for group in groups] == [1, 1, 2, 1, 3]
    assert sorted(path for group in groups for path in group) == sorted(linears_in(block, members))
    for group in groups:
        set_steps(block, group, [Round({"bits": 8})])
    assert [group for group, _ in prepared_in(block)] == [groups[0], groups[4], *groups[1:4]]
    calls = []
    for _, steps in prepared_in(block):
        steps.register_forward_hook(lambda *_: calls.append(1))
    x = random(3, 16)
    for name in "qkv":
        block["self_attn"][f"{name}_proj"](x)
    assert len(calls) == 2


def test_a_fixed_scale_covers_the_calibration_text_and_clips_beyond():
    from lowrank_lab.modules.steps import Round

    for symmetric in (True, False):
        step = Round({"bits": 8, "granularity": "tensor", "symmetric": symmetric, "scale_dtype": "float32"})
        x = random(50, 16)
        step.fix(x.amin(), x.amax())
        scale = float(step.scale)
        assert ((step(x) - x).abs() <= scale * (1 + 1e-5)).all()
        assert (step(10 * x).abs() <= x.abs().max() + scale).all()


def test_each_factor_may_have_a_format_of_its_own(lab):
    record = lab.run("method=svdllm", "quantization=int4", "quantization.left.bits=8", "save=true")
    alike = lab.run("method=svdllm", "quantization=int4")
    assert record["sizes"]["bytes"] > alike["sizes"]["bytes"]
    settings = json.loads((lab.root / record["checkpoint"] / "config.json").read_text())["quantization_config"]
    formats = {name: one["format"] for name, one in settings["modules"].items() if one["kind"] == "quantized"}
    bits = {name.rpartition(".")[2]: form["bits"] for name, form in formats.items()}
    assert bits == {"left": 8, "right": 4}
    [cell] = lab.cells("method=svdllm", "quantization=int4", "quantization.left.bits=8")
    assert cell.compressions["quantization"].name == "INT4 (INT8·INT4)"


def test_calibration_on_unquantized_blocks_differs_from_the_second_block_on(lab):
    values = [
        lab.run("method=dense", "quantization=gptq3", f"quantization.sequential={sequential}")["metrics"]["ppl"][
            "value"
        ]
        for sequential in ("true", "false")
    ]
    assert values[0] != values[1]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["quantization/method=none"], "nothing is quantized"),
        (["quantization.weights.grid=codebook"], "kmeans"),
        (["quantization/activations=int8", "quantization.activations.granularity=channel"], "granularity"),
        (["quantization.sequential=1"], "true or false"),
    ],
)
def test_mistakes_stop_before_work(lab, overrides, message):
    with pytest.raises(UserError, match=message):
        lab.cells("method=dense", "quantization=int4", *overrides)


def test_fixed_scales_are_those_of_the_model_that_is_not_rounded(lab):
    """Small latents too: a step that has no scale yet must not round what comes to the next."""
    from lowrank_lab.modules.linears import linears_in
    from lowrank_lab.quantization.inputs import rounding_of
    from lowrank_lab.records.results import Record
    from lowrank_lab.running.context import Context, pick_device

    job = ["method=dense", "quantization=int8", "quantization/method=none", "quantization/activations=int8_static"]
    [cell] = lab.cells(*job)
    context, plain = (Context(cell, Record(cell, None), pick_device("cpu")) for _ in range(2))
    cell.compressions["quantization"].apply(context, {})
    seen: dict[str, float] = {}
    members = context.tower.linears
    for name in members:
        linear = plain.model.get_submodule(f"model.layers.0.{name}")

        def note(_, args, name=name):
            seen[name] = max(seen.get(name, 0.0), float(args[0].abs().max()))

        linear.register_forward_pre_hook(note)
    with torch.no_grad():
        plain.model(plain.calibration_ids)
    block = context.model.model.layers[0]
    for path, name in zip(linears_in(block, members), members, strict=True):
        assert float(rounding_of(block, path).scale) == pytest.approx(2 * seen[name] / 255, rel=1e-3)


def test_a_sample_of_tokens_is_the_same_in_any_batches():
    from lowrank_lab.quantization.inputs import Sample

    x = random(12, 30, 4)
    samples = []
    for size in (1, 4, 5, 12):
        sample = Sample(360, 100)
        for batch in x.split(size):
            sample.add(batch)
        samples.append(sample.rows)
    assert samples[0].shape == (100, 4)
    assert all(torch.equal(one, samples[0]) for one in samples)


@pytest.mark.parametrize(("method", "dtype"), [("svdllm", "float16"), ("dobi_untrained", "bfloat16")])
def test_a_checkpoint_in_16_bits_is_the_model_in_memory(lab, method, dtype):
    overrides = [
        "quantization=smoothquant",
        "quantization.transform.where=all",
        "quantization/activations=int8_static",
    ]
    made = lab.run(f"method={method}", "ratio=0.6", f"dtype={dtype}", *overrides, "save=true")
    loaded = lab.run(f"model.path={lab.root / made['checkpoint']}", f"dtype={dtype}")
    assert loaded["metrics"]["ppl"]["value"] == made["metrics"]["ppl"]["value"]
    assert loaded["sizes"]["bytes"] == made["sizes"]["bytes"]


def test_remapped_factors_stay_so_where_only_activations_are_rounded(lab):
    plain = lab.run("method=dobi_untrained", "ratio=0.6")
    made = lab.run(
        "method=dobi_untrained", "ratio=0.6", "quantization=kv4", "quantization/activations=int8", "save=true"
    )
    assert made["sizes"]["bytes"] == plain["sizes"]["bytes"]
    loaded = lab.run(f"model.path={lab.root / made['checkpoint']}")
    assert loaded["metrics"]["ppl"]["value"] == made["metrics"]["ppl"]["value"]


def test_settings_without_influence_are_in_no_key(lab):
    same = lambda *jobs: len({lab.cells(*job.split())[0].key for job in jobs}) == 1
    spin = "method=dense quantization=spinquant"
    assert same(spin, f"{spin} quantization.transform.micro_batch=2")
    assert not same(spin, f"{spin} seed=1 calibration.seed=0")
    smooth = "method=dense quantization=smoothquant calibration.seed=0"
    assert same(smooth, f"{smooth} seed=1")
    assert same("method=dense quantization=int4", "method=dense quantization=int4 quantization.left.bits=8")
    assert same("method=dense quantization=int4", "method=dense quantization=int4 grouping=qkv")
    assert not same("method=dense quantization=int4", "method=dense quantization=int4 targets=kv")
    for unread in ("int4 quantization.sequential=false", "kv4 quantization.weights.bits=3"):
        assert same(f"method=svdllm quantization={unread.split()[0]}", f"method=svdllm quantization={unread}")
    assert not same(
        "method=svdllm quantization=gptq", "method=svdllm quantization=gptq quantization.sequential=false"
    )


def test_a_method_that_draws_has_its_seed_in_the_key(lab, monkeypatch):
    """And draws the same, whatever drew before it."""
    from lowrank_lab.quantization.method.rtn import RoundToNearest
    from lowrank_lab.records.results import Record
    from lowrank_lab.running.context import Context, pick_device

    one, other = (lab.cells("method=dense", "quantization=int4", f"seed={seed}")[0] for seed in (0, 1))
    assert one.key == other.key
    monkeypatch.setattr(RoundToNearest, "needs_seed", True)
    one, other = (lab.cells("method=dense", "quantization=int4", f"seed={seed}")[0] for seed in (0, 1))
    assert one.key != other.key
    drawn = []
    plain = RoundToNearest.quantize
    draw = lambda *given: (drawn.append(float(torch.rand(1))), plain(*given))[1]
    monkeypatch.setattr(RoundToNearest, "quantize", draw)
    torch.manual_seed(7)
    one.compressions["quantization"].apply(Context(one, Record(one, None), pick_device("cpu")), {})
    torch.manual_seed(0)
    assert drawn[0] == float(torch.rand(1))


def test_a_number_that_is_not_finite_stays_so():
    from lowrank_lab.modules.steps import Round

    x = random(3, 8)
    x[1, 2] = math.inf
    found = Round({"bits": 4, "scale_dtype": "float32"})(x)
    assert found[[0, 2]].isfinite().all() and found[1].isnan().all()
