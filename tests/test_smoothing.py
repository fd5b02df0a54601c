"""Scales that move the difficulty of rounding from activations to weights, and the split of σ between factors."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lowrank_lab.basics.errors import SkippedCell, UserError
from lowrank_lab.models import tiny
from lowrank_lab.models.walk import blocks_of
from lowrank_lab.modules.codec import quantize
from lowrank_lab.modules.factorized import dense_weight, factorize, site_weight
from lowrank_lab.modules.formats import Format
from lowrank_lab.modules.linears import input_side, linears_in, shared_inputs
from lowrank_lab.quantization.base import quantize_model
from lowrank_lab.quantization.latent.beta import latent_loss, low_factors, splits, weight_loss
from lowrank_lab.quantization.scales import largest, smoothing
from lowrank_lab.quantization.transform.awq import awq_candidates, awq_losses
from lowrank_lab.quantization.transform.smooth import smoothing_losses
from lowrank_lab.records.results import Record
from lowrank_lab.running.context import Context, pick_device
from tests.conftest import load_lively
from tests.prepared import prepared_in

pytestmark = pytest.mark.own_artifacts  # models are changed here under the keys of those that they were


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rounded(weight: torch.Tensor, form: Format) -> torch.Tensor:
    return quantize(weight, form).dequantize().double()


def test_smoothing_by_hand():
    """Figure 5 of SmoothQuant: α = ½, s_j = √(max|X_j| / max|W_j|)."""
    weights = largest([torch.tensor([[1.0, -4.0]]), torch.tensor([[-2.0, 1.0]])])
    assert weights.tolist() == [2, 4]
    for alpha, scales in ((0.5, [3, 0.5]), (1.0, [18, 1]), (0.0, [0.5, 0.25])):
        # Powers differ in the last bit between processors: float64's default tolerance is 1e-7.
        expected = torch.tensor(scales, dtype=torch.float64)
        torch.testing.assert_close(smoothing(torch.tensor([18.0, 1.0]), weights, alpha), expected)


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
        outputs = [rounded(w * scale, form) @ (x / scale).T - w @ x.T for w, form in weights]
        assert float(loss) == pytest.approx(sum(float(one.square().sum()) for one in outputs) / 500, rel=1e-4)
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
    low = low_factors((left, right), [6, 3], form, Format(8))
    assert torch.equal(low[0], torch.cat([rounded(left[:6], form), rounded(left[6:], form)]))
    exact = x @ (left @ right).T
    error = (x @ low[1].T @ low[0].T - exact).square().sum() / 50
    assert float(weight_loss((left, right), low, x.T @ x / 50)) == pytest.approx(float(error))
    latent = rounded(x @ low[1].T, Format(8, scale_dtype="float32"))  # a token is a row
    error = (latent @ low[0].T - exact).square().sum() / 50
    found = latent_loss((left, right), low, x, Format(8, scale_dtype="float32"))
    assert float(found) == pytest.approx(float(error), rel=1e-4)
    assert low_factors((left, right), [9], None, None) == (left, right)


FAMILIES = ["llama", "qwen2", "gemma2", "opt", "gpt2", "phi3"]


def context_of(lab, folder, *overrides: str, rank: int | None = None) -> Context:
    """A context whose model has lively weights, norms and biases; with a ``rank``, its sites are factored."""
    [cell] = lab.cells(f"model.path={folder}", "method=dense", *overrides)
    context = Context(cell, Record(cell, None), pick_device("cpu"))
    model = load_lively(folder, 3.0, 0.0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
        if rank is not None:
            for site in context.sites.values():
                block = blocks_of(model, context.tower)[site.block]
                u, sigma, vt = torch.linalg.svd(site_weight(block, site), full_matrices=False)
                factorize(block, site, u[:, :rank] * sigma[:rank], vt[:rank])
    context.__dict__["model"] = model
    return context


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(torch.arange(3, 67).view(2, 32)).logits


TRANSFORMS = [("smoothquant", "norms"), ("smoothquant", "all"), ("awq", "foldable")]


# Every family with every transform, and each of both dense and factored.
MIXED = [
    (family, *transform, (None, 20)[(first + second) % 2])
    for first, family in enumerate(FAMILIES)
    for second, transform in enumerate(TRANSFORMS)
]


@pytest.mark.parametrize(("family", "quantization", "where", "rank"), MIXED)
def test_a_scaled_model_computes_the_same(lab, checkpoints, family, quantization, where, rank):
    options = [f"quantization={quantization}", f"quantization.transform.where={where}"]
    context = context_of(lab, checkpoints[family], *options, rank=rank)
    expected, before = logits(context.model), copy.deepcopy(context.model.state_dict())
    context.cell.compressions["quantization"].transform(context, context.cell.compressions["quantization"])
    assert_same(logits(context.model), expected)
    after = context.model.state_dict()
    assert sum(not torch.equal(after[name], value) for name, value in before.items() if name in after) > 4
    online = [steps for block in blocks_of(context.model, context.tower) for _, steps in prepared_in(block)]
    unfolded = {"opt": 1, "gpt2": 2, "phi3": 2}.get(family, 0) if where == "all" else 0
    assert len(online) == unfolded * len(blocks_of(context.model, context.tower))
    assert context.cell.compressions["quantization"].online == (where == "all" or quantization == "smoothquant")


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


LATENTS = ["smooth", "beta", "beta quantization.latent.rotate=true"]


@pytest.mark.parametrize(("family", "grouping"), [("llama", "qkv"), ("opt", "each"), ("phi3", "qkv")])
@pytest.mark.parametrize("latent", LATENTS)
def test_latents_change_the_factors_but_not_the_model(lab, checkpoints, family, latent, grouping):
    options = ["quantization=w8a8", *f"quantization/latent={latent}".split(), f"grouping={grouping}"]
    context = context_of(lab, checkpoints[family], *options, rank=20)
    expected, before = logits(context.model), copy.deepcopy(context.model.state_dict())
    context.cell.compressions["quantization"].latent(context, context.cell.compressions["quantization"])
    assert_same(logits(context.model), expected)
    changed = {name for name, value in context.model.state_dict().items() if not torch.equal(value, before[name])}
    factors = {name for name in before if ".left." in name or ".right." in name}
    assert changed == {name for name in factors if name.endswith("weight")}


@pytest.mark.parametrize("latent", ["smooth", "beta"])
def test_a_latent_of_a_dense_model_is_nothing(lab, checkpoints, latent):
    context = context_of(lab, checkpoints["llama"], "quantization=w8a8", f"quantization/latent={latent}")
    before = copy.deepcopy(context.model.state_dict())
    context.cell.compressions["quantization"].latent(context, context.cell.compressions["quantization"])
    assert all(torch.equal(value, before[name]) for name, value in context.model.state_dict().items())


@pytest.mark.parametrize("where", ["foldable", "all"])
def test_a_norm_behind_attention_is_not_folded_into(lab, tmp_path, where):
    """OPT-350m's norms give the residual stream."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model("opt", **tiny.CONFIGS["opt"], do_layer_norm_before=False)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    tiny.byte_tokenizer().save_pretrained(tmp_path / "model")
    context = context_of(
        lab, tmp_path / "model", "quantization=smoothquant", f"quantization.transform.where={where}"
    )
    expected, before = logits(context.model), copy.deepcopy(context.model.state_dict())
    context.cell.compressions["quantization"].transform(context, context.cell.compressions["quantization"])
    assert_same(logits(context.model), expected)
    after = context.model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items() if "norm" in name)
    assert len(prepared_in(blocks_of(context.model, context.tower)[0])) == (3 if where == "all" else 0)
    name = "model.decoder.layers.0.self_attn.v_proj.weight"
    assert where == "all" or not torch.equal(after[name], before[name])


@pytest.mark.parametrize("targets", ["kv", "mlp"])
@pytest.mark.parametrize("quantization", ["smoothquant", "awq"])
def test_linears_that_are_no_targets_follow(lab, checkpoints, targets, quantization):
    context = context_of(lab, checkpoints["llama"], f"quantization={quantization}", f"targets={targets}")
    expected, before = logits(context.model), copy.deepcopy(context.model.state_dict())
    context.cell.compressions["quantization"].transform(context, context.cell.compressions["quantization"])
    assert_same(logits(context.model), expected)
    same = {name for name, value in context.model.state_dict().items() if torch.equal(value, before[name])}
    norm = {"kv": "post_attention_layernorm", "mlp": "input_layernorm"}[targets]
    assert f"model.layers.0.{norm}.weight" in same
    if targets == "kv":
        assert "model.layers.0.self_attn.q_proj.weight" not in same


def with_outliers(context: Context, factor: float) -> None:
    """A few channels that norms give become so many times larger; or nothing: factor 0."""
    for block in blocks_of(context.model, context.tower):
        for norm in context.tower.folding.norms:
            if norm is not None:
                block.get_submodule(norm).weight.data[[3, 17]] *= factor


def with_massive_activations(context: Context) -> None:
    """The same model with channels that weigh little in the weights and much in their input, as large ones have."""
    with_outliers(context, 100.0)
    for block in blocks_of(context.model, context.tower):
        for members, norm in zip(context.tower.inputs, context.tower.folding.norms, strict=True):
            for path in {input_side(block, member) for member in members if norm is not None}:
                block.get_submodule(path).weight.data[:, [3, 17]] /= 100.0


@pytest.mark.parametrize("rank", [None, 20], ids=["dense", "factored"])
def test_smoothing_helps_where_channels_stand_out(lab, checkpoints, rank):
    errors = []
    for quantization in ("w8a8", "smoothquant"):
        context = context_of(lab, checkpoints["llama"], f"quantization={quantization}", rank=rank)
        with_massive_activations(context)
        expected = logits(context.model)
        quantize_model(context, context.cell.compressions["quantization"])
        errors.append(float((logits(context.model) - expected).norm() / expected.norm()))
    assert errors[1] < 0.5 * errors[0]


def test_smoothing_losses_are_those_of_the_outputs():
    rows, w, s = random(6, 4).float(), random(3, 4, seed=1).float(), random(4, seed=2).abs().float() + 0.5
    form, activations = (
        Format(4, "integer", True, "channel", "float32"),
        Format(8, "integer", True, "channel", "float32"),
    )
    given, weight = quantize(rows / s, activations).dequantize(), quantize(w * s, form).dequantize()
    expected = (given @ weight.T - rows @ w.T).double().square().sum()
    ones = torch.ones_like(s)
    found = smoothing_losses([s, ones], rows, [(w, form)], activations)
    torch.testing.assert_close(found[0], expected, rtol=1e-5, atol=0.0)
    assert smoothing_losses([s, ones], rows, [(w, None)], None).max() < 1e-9
    assert smoothing_losses([ones], rows, [(w, form), (w, form)], activations)[0] == 2 * found[1]


def test_a_searched_alpha_is_the_best_of_the_list(lab, checkpoints):
    errors = {}
    for alpha in ("[0.0,0.5,1.0]", "0.0", "0.5", "1.0"):
        options = ["quantization=smoothquant", f"quantization.transform.alpha={alpha}", "calibration.samples=4"]
        context = context_of(lab, checkpoints["llama"], *options)
        with_massive_activations(context)
        exact = seen(context)
        quantize_model(context, context.cell.compressions["quantization"])
        low = seen(context)
        first = len(context.tower.inputs[0])  # nothing is rounded before these linears
        before, after = ([x @ w.T for x, w in list(found.values())[:first]] for found in (exact, low))
        errors[alpha] = sum(float((low - exact).square().sum()) for low, exact in zip(after, before, strict=True))
    assert errors.pop("[0.0,0.5,1.0]") == pytest.approx(min(errors.values()), rel=1e-5)
    assert len(set(errors.values())) == 3


@torch.no_grad()
def seen(context: Context) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """By path, what every linear is given on the calibration text (tokens, in), and its weight."""
    found, hooks = {}, []
    for index, block in enumerate(blocks_of(context.model, context.tower)):
        for path in linears_in(block, context.tower.linears):
            linear = block.get_submodule(path)

            def note(module, args, name=f"{index}.{path}"):
                found[name] = (
                    args[0].reshape(-1, args[0].shape[-1]).double(),
                    dense_weight(module).detach().double(),
                )

            hooks.append(linear.register_forward_pre_hook(note))
    context.model(context.calibration_ids)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("rank", [None, 20], ids=["dense", "factored"])
@pytest.mark.parametrize("grouping", ["each", "qkv"])
def test_awq_loses_no_more_than_rounding_at_any_input(lab, checkpoints, rank, grouping):
    """Measured on what the linears are given, in units of the outputs before their rows were scaled."""
    options = ["quantization=awq", f"grouping={grouping}", "quantization.weights.scale_dtype=float32"]
    options.append("quantization.weights.granularity=32")
    context = context_of(lab, checkpoints["llama"], *options, rank=rank)
    with_outliers(context, 30.0)
    quantization = context.cell.compressions["quantization"]
    before = seen(context)
    quantization.transform(context, quantization)
    after = seen(context)
    ratios = []
    for index, block in enumerate(blocks_of(context.model, context.tower)):
        for group in shared_inputs(block, context.tower, context.tower.linears):
            plain = scaled = 0.0
            for path in group:
                (x, weight), (x2, weight2) = before[f"{index}.{path}"], after[f"{index}.{path}"]
                form = quantization.format_of(path)
                rows = ((x @ weight.T).norm(dim=0) / (x2 @ weight2.T).norm(dim=0)).unsqueeze(1)
                torch.testing.assert_close(rows.T * (x2 @ weight2.T), x @ weight.T, rtol=1e-3, atol=1e-3)
                plain += float(((rounded(weight, form) - weight) @ x.T).square().sum())
                scaled += float((rows * ((rounded(weight2, form) - weight2) @ x2.T)).square().sum())
            ratios.append(scaled / plain)
    assert max(ratios) <= 1 + 1e-3
    assert min(ratios) < 0.8


@pytest.mark.parametrize("options", [["quantization=int4"], ["quantization=w4a4"]], ids=["weights", "latent too"])
def test_the_best_beta_of_the_grid_is_taken(lab, checkpoints, options):
    """By the error of every site on what it is given in the model as it was, rounded after each split."""
    errors = {}
    for betas in ("[0.0]", "[0.5]", "[1.0]", "[0.0,0.5,1.0]"):
        latent = ["quantization/latent=beta", f"quantization.latent.betas={betas}"]
        context = context_of(lab, checkpoints["llama"], "grouping=qkv", *options, *latent, rank=20)
        quantization = context.cell.compressions["quantization"]
        inputs = seen(context)
        quantization.latent(context, quantization)
        weights, errors[betas] = {path: weight for path, (_, weight) in seen(context).items()}, []
        for right, lefts in latent_paths(context):
            x, right_weight = inputs[right]
            latents = x @ rounded(weights[right], quantization.right).T
            if quantization.activations is not None:
                latents = rounded(latents, quantization.activations.form)
            of_lefts = [latents @ rounded(weights[left], quantization.left).T for left in lefts]
            exact = [x @ right_weight.T @ inputs[left][1].T for left in lefts]
            errors[betas].append(sum(float((a - b).square().sum()) for a, b in zip(of_lefts, exact, strict=True)))
    alone = torch.tensor([errors["[0.0]"], errors["[0.5]"], errors["[1.0]"]])
    torch.testing.assert_close(torch.tensor(errors["[0.0,0.5,1.0]"]), alone.amin(0), rtol=1e-3, atol=0)
    assert len(alone.argmin(0).unique()) > 1  # not the same everywhere


def latent_paths(context: Context) -> list[tuple[str, list[str]]]:
    """The right factor of every site and the left ones that read its latent."""
    found = []
    for index, block in enumerate(blocks_of(context.model, context.tower)):
        for group in shared_inputs(block, context.tower, context.tower.linears):
            if group[0].endswith(".left"):
                right = group[0].replace(".left", ".right.linear" if len(group) > 1 else ".right")
                found.append((f"{index}.{right}", [f"{index}.{path}" for path in group]))
    return found


def test_a_beta_of_one_half_is_the_square_root_in_each_factor(lab, checkpoints):
    options = ["quantization=int4", "quantization/latent=beta", "quantization.latent.betas=[0.5]"]
    context = context_of(lab, checkpoints["llama"], *options, rank=20)
    context.cell.compressions["quantization"].latent(context, context.cell.compressions["quantization"])
    site = blocks_of(context.model, context.tower)[0].mlp.down_proj
    left, right = site.left.weight.norm(dim=0), site.right.weight.norm(dim=1)
    torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)
    assert (left[:-1] > left[1:]).all()


EVERYTHING = [
    ["quantization=smoothquant", "quantization.transform.where=all"],
    ["quantization=awq", "quantization.transform.where=all"],
    ["quantization=awq", "quantization/activations=int8_static", "quantization/latent=smooth"],
    ["quantization=smoothquant", "quantization/latent=beta"],
    ["quantization=w8a8", "quantization/activations=int8_static", "quantization/latent=beta"],
    ["quantization=w4a4", "quantization/latent=beta", "quantization.latent.rotate=true"],
    ["quantization=int4", "quantization/latent=beta", "quantization.weights.granularity=tensor"],
]


@pytest.mark.parametrize("options", EVERYTHING, ids=" ".join)
@pytest.mark.parametrize(("factor", "rank"), [(0.0, 1), (1e4, None)], ids=["dead, rank one", "outlier, dense"])
def test_dead_and_loud_channels_give_numbers(lab, checkpoints, options, factor, rank):
    context = context_of(lab, checkpoints["opt"], *options, rank=rank)
    with_outliers(context, factor)
    if factor == 0:  # no input at all to fc2 and out_proj, and a matrix of zeros
        block = blocks_of(context.model, context.tower)[0]
        for path in linears_in(block, ["self_attn.v_proj", "fc1"]):
            block.get_submodule(path).weight.data.zero_()
            if block.get_submodule(path).bias is not None:
                block.get_submodule(path).bias.data.fill_(-1.0)
    quantize_model(context, context.cell.compressions["quantization"])
    assert torch.isfinite(logits(context.model)).all()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["quantization/transform=smooth", "quantization.transform.alpha=1.5"], "alpha=1.5"),
        (["quantization/transform=smooth", "quantization.transform.alpha=[]"], "alpha"),
        (["quantization/transform=smooth", "quantization.transform.alpha=[0.5,2]"], "alpha=2"),
        (["quantization/transform=smooth", "quantization.transform.where=some"], "where=some"),
        (["quantization/transform=awq", "quantization.transform.points=0"], "points=0"),
        (["quantization/latent=beta", "quantization.latent.betas=[]"], "betas"),
        (["quantization/latent=beta", "quantization.latent.betas=[2]"], "betas=2"),
        (["quantization/latent=smooth", "quantization.latent.alpha=-1"], "alpha=-1"),
        (["quantization=smoothquant", "quantization.transform.where=all", "save.merge=true"], "cannot hold"),
    ],
)
def test_mistakes_stop_before_work(lab, overrides, message):
    with pytest.raises(UserError, match=message):
        lab.cells("method=dense", "quantization=int4", *overrides)


def test_a_search_without_rounding_is_skipped(lab, checkpoints):
    context = context_of(lab, checkpoints["llama"], "quantization=awq", "quantization/method=none", rank=20)
    with pytest.raises(SkippedCell, match="AWQ"):
        context.cell.compressions["quantization"].check(context)
    options = ["quantization/method=none", "quantization/latent=beta"]
    context = context_of(lab, checkpoints["llama"], "quantization=int4", *options, rank=20)
    with pytest.raises(SkippedCell, match="beta"):
        context.cell.compressions["quantization"].check(context)


@pytest.mark.parametrize(
    ("model", "method", "options"),
    [
        ("gpt2", "dense", ["quantization=smoothquant", "quantization.transform.where=all"]),
        ("llama", "svdllm", ["quantization=awq", "quantization.transform.where=all", "quantization/latent=beta"]),
        ("llama", "dobi_untrained", ["quantization=smoothquant", "quantization/latent=smooth"]),
        ("llama", "qsvd", ["quantization=qsvd_w4a4"]),
    ],
)
def test_a_scaled_checkpoint_is_the_model_in_memory(lab, model, method, options):
    made = lab.run(f"model.path=tiny:{model}", f"method={method}", "ratio=0.8", *options, "save=true")
    loaded = lab.run(f"model.path={lab.root / made['checkpoint']}")
    assert loaded["metrics"]["ppl"]["value"] == made["metrics"]["ppl"]["value"]
    assert loaded["sizes"]["bytes"] == made["sizes"]["bytes"]
