"""Every architecture row on a tiny random model: the walk, the statistics, the replacement of layers."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from lowrank_lab.calibration.gradients import load_gradients, make_gradients
from lowrank_lab.calibration.statistics import load_statistics, make_statistics
from lowrank_lab.cells import config
from lowrank_lab.lowrank.metric.fisher_kron import FisherKron
from lowrank_lab.lowrank.metric.identity import Identity
from lowrank_lab.lowrank.ranks import rank_for_ratio, total_cost
from lowrank_lab.lowrank.solver import decompose
from lowrank_lab.lowrank.spectra import compress, make_spectra
from lowrank_lab.lowrank.storage.absorb import Absorb
from lowrank_lab.models import tiny
from lowrank_lab.models.families import FAMILIES, kv_cache_values_per_token
from lowrank_lab.models.load import load_model
from lowrank_lab.models.walk import blocks_of, walk
from lowrank_lab.modules.factorized import FactorizedLinear, dense_weight, factorize
from tests.sites import site as plain_site
from tests.sites import sites_in

CPU = torch.device("cpu")
NAMES = sorted(FAMILIES)
IDS = torch.randint(4, 260, (5, 40), generator=torch.Generator().manual_seed(1))  # longer than Gemma's windows


@pytest.fixture(params=NAMES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def model(family: str, checkpoints: dict[str, Path]) -> Any:
    return load_model(str(checkpoints[family]), None, "float32", False)


@pytest.fixture
def batches() -> list[torch.Tensor]:
    return list(IDS.split(2))  # the last batch is smaller


def test_every_row_has_a_tiny_model():
    assert sorted(tiny.CONFIGS) == NAMES


def test_the_row_names_every_linear_of_a_block(model, family):
    """A linear that a row forgets would silently stay dense."""
    tower = FAMILIES[family].tower
    for block in blocks_of(model, tower):
        linears = {n for n, m in block.named_modules() if type(m).__name__ in ("Linear", "Conv1D")}
        assert linears == set(tower.linears)


def test_walking_equals_the_models_own_forward(model, family, batches):
    """Block by block, with each block's own masks and position embeddings."""
    tower = FAMILIES[family].tower
    expected: dict[int, list[torch.Tensor]] = {}
    hooks = [
        block.register_forward_hook(lambda _m, _a, out, i=i: expected.setdefault(i, []).append(out))
        for i, block in enumerate(blocks_of(model, tower))
    ]
    with torch.no_grad():
        for ids in batches:
            model(ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    seen = 0
    for index, block, run in walk(model, tower, batches, CPU):
        outputs: list[torch.Tensor] = []
        hook = block.register_forward_hook(lambda _m, _a, out, outputs=outputs: outputs.append(out))
        run()
        hook.remove()
        for ours, theirs in zip(outputs, expected[index], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        seen += 1
    assert seen == len(blocks_of(model, tower))


def test_linears_of_a_group_share_their_input_and_its_statistics(model, family, batches, tmp_path):
    tower = FAMILIES[family].tower
    inputs: dict[str, list[torch.Tensor]] = {}
    hooks = []
    for index, block in enumerate(blocks_of(model, tower)):
        for name in tower.linears:
            seen = inputs.setdefault(f"{tower.blocks}.{index}.{name}", [])
            linear = block.get_submodule(name)
            hooks.append(linear.register_forward_pre_hook(lambda _m, args, seen=seen: seen.append(args[0])))
    with torch.no_grad():
        for ids in batches:
            model(ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    make_statistics(tmp_path, model, tower, batches, CPU)
    for index in range(len(blocks_of(model, tower))):
        for group in tower.inputs:
            statistics = load_statistics(tmp_path, index, group, CPU)
            for name in group:
                seen = inputs[f"{tower.blocks}.{index}.{name}"]
                x = torch.cat([t.reshape(-1, t.shape[-1]) for t in seen]).double()
                assert statistics.tokens == len(x)
                close = {"rtol": 1e-5, "atol": 1e-7}
                torch.testing.assert_close(statistics.second_moment, x.T @ x / len(x), **close)
                torch.testing.assert_close(statistics.abs_mean, x.abs().mean(0), **close)
                torch.testing.assert_close(statistics.abs_max, x.abs().amax(0), **close)


def test_full_rank_factors_reproduce_the_dense_logits(model, family, batches):
    tower = FAMILIES[family].tower
    with torch.no_grad():
        dense = model(batches[0]).logits
        for block in blocks_of(model, tower):
            for name in tower.linears:
                weight = dense_weight(block.get_submodule(name)).double()
                factors = decompose(weight, None, None).factors(weight, min(weight.shape))
                Absorb(0.5).install(block, plain_site(*weight.shape, name), *factors)
                assert isinstance(block.get_submodule(name), FactorizedLinear)
        torch.testing.assert_close(model(batches[0]).logits, dense, rtol=1e-4, atol=1e-4)


CONF = Path(__file__).parent.parent / "conf" / "metric"
METRICS = {file.stem: config.build(OmegaConf.load(file)) for file in sorted(CONF.glob("*.yaml"))}
METRICS["fisher_kron_full"] = FisherKron("full")


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory, checkpoints: dict[str, Path]) -> Any:
    """The statistics and the gradients of a family, made once for all metrics."""

    @cache
    def of(family: str) -> tuple[Path, Path]:
        model = load_model(str(checkpoints[family]), None, "float32", False)
        statistics, gradients = (tmp_path_factory.mktemp(name) for name in ("statistics", "gradients"))
        make_statistics(statistics, model, FAMILIES[family].tower, IDS.split(2), CPU)
        make_gradients(gradients, model, FAMILIES[family].tower, IDS, CPU, outer=True)
        return statistics, gradients

    return of


# Every metric with families of its own in turn, and so every family with some.
IN_TURN = [
    (family, METRICS[metric])
    for first, family in enumerate(NAMES)
    for second, metric in enumerate(METRICS)
    if (first + second) % 3 == 0
]


@pytest.mark.parametrize(("family", "metric"), IN_TURN, indirect=["family"])
def test_compression_measures_what_it_reports(model, family, calibrated, tmp_path, metric):
    """The reported squared error is that of the deployed tensors, and they are as many as planned."""
    tower = FAMILIES[family].tower
    sites = sites_in(model, tower)
    ranks = {name: rank_for_ratio(site, 0.5) for name, site in sites.items()}
    statistics, gradients = calibrated(family)
    spectra = tmp_path
    make_spectra(spectra, model, tower, sites, metric, statistics, gradients, CPU)
    dense = {name: dense_weight(model.get_submodule(name)).detach().double() for name in sites}
    reported = compress(model, tower, sites, ranks, spectra, Absorb(0.5), CPU)

    measured = 0.0
    for index in range(len(blocks_of(model, tower))):
        for group in tower.inputs:
            inputs = load_statistics(statistics, index, group, CPU)
            for linear in group:
                name = f"{tower.blocks}.{index}.{linear}"
                c, r = metric(inputs, load_gradients(gradients, index, linear, CPU))
                layer = model.get_submodule(name)
                assert layer.right.out_features == ranks[name]
                error = dense[name] - (layer.left.weight.double() @ layer.right.weight.double())
                weighted = error if c is None else error * c if c.ndim == 1 else error @ c
                if r is not None:
                    weighted = r[:, None] * weighted if r.ndim == 1 else r @ weighted
                measured += float((weighted * error).sum())
    assert measured == pytest.approx(reported, rel=1e-4)  # factors and statistics are kept in float32
    tensors = sum(model.get_submodule(n).left.weight.numel() for n in sites)
    tensors += sum(model.get_submodule(n).right.weight.numel() for n in sites)
    assert tensors == total_cost(sites, ranks)


def test_biases_survive(checkpoints, batches):
    model = load_model(str(checkpoints["gpt2"]), None, "float32", False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
        block = model.transformer.h[0]
        expected = block.mlp.c_fc(torch.ones(1, 48))
        weight = dense_weight(block.mlp.c_fc).double()
        left, right, _ = decompose(weight, None, None).factors(weight, 48)
        factorize(block, plain_site(80, 48, "mlp.c_fc"), left, right)
        torch.testing.assert_close(block.mlp.c_fc(torch.ones(1, 48)), expected, rtol=1e-5, atol=1e-5)


def test_embeddings_and_head_are_left_alone_and_tied(model, family):
    shapes = sites_in(model, FAMILIES[family].tower)
    assert not any("lm_head" in name or "embed" in name or "wte" in name for name in shapes)
    if model.config.tie_word_embeddings:
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_kv_cache_is_counted_under_grouped_query_attention(model, batches):
    """Against the cache that the model itself fills."""
    with torch.no_grad():
        cache = model(batches[0][:1, :8], use_cache=True).past_key_values
    cached = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    assert kv_cache_values_per_token(model.config) == cached / 8


def test_activations_that_are_not_finite_raise_with_a_name(checkpoints, batches, tmp_path):
    model = load_model(str(checkpoints["llama"]), None, "float32", False)
    with torch.no_grad():
        model.model.layers[1].mlp.gate_proj.weight[0, 0] = torch.inf
    with pytest.raises(FloatingPointError, match=r"layers\.1.*down_proj"):
        make_statistics(tmp_path, model, FAMILIES["llama"].tower, batches, CPU)


def test_the_linear_that_made_gradients_infinite_is_named(checkpoints, tmp_path):
    """Not those before it, to which the backward pass carries them on."""
    model = load_model(str(checkpoints["llama"]), None, "float32", False)
    model.model.layers[1].mlp.down_proj.register_full_backward_hook(lambda _, inputs, __: (inputs[0] * torch.inf,))
    tokens = torch.arange(3, 19).view(1, 16)
    with pytest.raises(FloatingPointError, match=r"layers\.1\.mlp\.up_proj: its gradient"):
        make_gradients(tmp_path, model, FAMILIES["llama"].tower, tokens, CPU)


def test_weights_that_are_not_finite_raise_with_a_name(checkpoints, tmp_path):
    model = load_model(str(checkpoints["llama"]), None, "float32", False)
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[0, 0] = torch.nan
    tower = FAMILIES["llama"].tower
    sites = sites_in(model, tower)
    with pytest.raises(FloatingPointError, match=r"model\.layers\.2\.mlp\.up_proj"):
        make_spectra(tmp_path, model, tower, sites, Identity(), None, None, CPU)


def test_dense_weight_rejects_what_is_not_linear():
    with pytest.raises(TypeError, match="LayerNorm"):
        dense_weight(nn.LayerNorm(3))


@pytest.mark.parametrize("shape", [(40, 64), (64, 40)])
def test_rank_beyond_the_samples_is_spent_on_the_plain_error(shape):
    out, inp = shape
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(out, inp, dtype=torch.float64, generator=generator)
    x = torch.randn(inp, 12, generator=generator)
    in_float32 = (x @ x.T).double()  # rank 12, and rounding
    for rank in (15, 25):
        left, right, _ = decompose(w, in_float32, None, samples=12).factors(w, rank)
        rest = w - left @ right
        assert (rest @ x.double()).norm() < 1e-4 * (w @ x.double()).norm()
        # What remains after the 12 directions of the data are kept, truncated by a plain SVD.
        u = torch.linalg.svd(w @ x.double(), full_matrices=False)[0]
        best = torch.linalg.svdvals(w - u @ (u.T @ w))[rank - 12 :].norm()
        assert rest.norm() == pytest.approx(float(best), rel=1e-3)


@pytest.mark.parametrize("linear", ["mlp.up_proj", "mlp.down_proj"])
def test_weights_with_a_wide_range_of_singular_values(checkpoints, tmp_path, linear):
    """What is stored must not magnify rounding: the error on the tensors stays the reported one."""
    model = load_model(str(checkpoints["llama"]), None, "float32", False)
    tower = FAMILIES["llama"].tower
    weight = model.model.layers[0].get_submodule(linear).weight
    with torch.no_grad():
        u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
        weight.copy_((u * torch.logspace(0, -6, len(s), dtype=torch.float64)) @ vh)
    dense = weight.detach().double()
    sites = sites_in(model, tower)
    make_spectra(tmp_path, model, tower, sites, Identity(), None, None, CPU)
    ranks = dict.fromkeys(sites)
    ranks[f"{tower.blocks}.0.{linear}"] = 24
    reported = compress(model, tower, sites, ranks, tmp_path, Absorb(0.5), CPU)
    layer = model.model.layers[0].get_submodule(linear)
    measured = (dense - layer.left.weight.double() @ layer.right.weight.double()).square().sum()
    assert float(measured) == pytest.approx(reported, rel=1e-2)


def test_gradients_are_those_of_autograd(model, family, batches, tmp_path):
    """Row Fisher from the weights' own gradients under transformers' loss, which shifts the labels once."""
    tower = FAMILIES[family].tower
    ids = torch.cat(batches)[:3]
    make_gradients(tmp_path, model, tower, ids, CPU, outer=True)
    names = list(sites_in(model, tower))
    fisher = dict.fromkeys(names, 0)
    outer = dict.fromkeys(names, 0)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    outputs: dict[str, torch.Tensor] = {}
    for name in names:
        hook = lambda _m, _a, out, name=name: (out.retain_grad(), outputs.update({name: out}))[0]
        model.get_submodule(name).register_forward_hook(hook)
    for sequence in ids:
        model.zero_grad()
        loss = model(sequence[None], labels=sequence[None]).loss * (len(sequence) - 1)
        loss.backward()
        for name in names:
            layer = model.get_submodule(name)
            gradient = layer.weight.grad.T if type(layer).__name__ == "Conv1D" else layer.weight.grad
            fisher[name] = fisher[name] + gradient.double().square().sum(1)
            g = outputs[name].grad.reshape(-1, gradient.shape[0]).double()
            outer[name] = outer[name] + g.T @ g
    for index in range(len(blocks_of(model, tower))):
        for linear in tower.linears:
            name = f"{tower.blocks}.{index}.{linear}"
            found = load_gradients(tmp_path, index, linear, CPU)
            assert found.tokens == ids.numel()
            close = {"rtol": 1e-4, "atol": 1e-4 * float(fisher[name].max()) / len(ids)}
            torch.testing.assert_close(found.row_fisher, fisher[name] / len(ids), **close)
            close["atol"] = 1e-4 * float(outer[name].diagonal().max()) / ids.numel()
            torch.testing.assert_close(found.outer, outer[name] / ids.numel(), **close)
            torch.testing.assert_close(found.square, found.outer.diagonal(), **close)


def test_the_gradient_pass_leaves_the_model_as_it_was(checkpoints, batches, tmp_path):
    model = load_model(str(checkpoints["llama"]), None, "float32", False)
    wanted = [parameter.requires_grad for parameter in model.parameters()]
    before = model(batches[0]).logits
    make_gradients(tmp_path, model, FAMILIES["llama"].tower, batches[0], CPU, outer=False)
    assert [parameter.requires_grad for parameter in model.parameters()] == wanted
    assert all(parameter.grad is None for parameter in model.parameters())
    torch.testing.assert_close(model(batches[0]).logits, before, rtol=0, atol=0)
