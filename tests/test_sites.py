"""What is factored together, what the ratio counts, and how the factors are stored."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lowrank_lab.basics.errors import SkippedCell, UserError
from lowrank_lab.lowrank.metric.identity import Identity
from lowrank_lab.lowrank.ranks import rank_for_ratio, total_cost
from lowrank_lab.lowrank.spectra import compress, make_spectra
from lowrank_lab.lowrank.storage.absorb import Absorb
from lowrank_lab.lowrank.storage.remap import Remap
from lowrank_lab.models import tiny
from lowrank_lab.models.families import FAMILIES
from lowrank_lab.models.load import load_model
from lowrank_lab.models.walk import blocks_of
from lowrank_lab.modules.factorized import (
    FactorizedLinear,
    SharedLatent,
    factors_of,
    orthogonal_factors,
    site_weight,
)
from lowrank_lab.modules.mixed import MixedLinear
from lowrank_lab.records.rank_sizes import sizes_of_ranks
from lowrank_lab.records.sizes import sizes
from tests.sites import site as plain_site
from tests.sites import sites_in

CPU = torch.device("cpu")
IDS = torch.randint(0, 260, (2, 20), generator=torch.Generator().manual_seed(0))


def load(checkpoints: dict[str, Path], family: str) -> nn.Module:
    return load_model(str(checkpoints[family]), None, "float32", False)


def compressed(model, tower, sites, ranks, folder, storage):
    make_spectra(folder, model, tower, sites, Identity(), None, None, CPU)
    return compress(model, tower, sites, ranks, folder, storage, CPU)


@pytest.mark.parametrize("family", tiny.CONFIGS)
@pytest.mark.parametrize("joint", [["qkv"], ["qkv", "gate_up"], ["kv"]])
def test_joint_sites_at_full_rank_reproduce_the_dense_logits(checkpoints, family, joint, tmp_path):
    model, tower = load(checkpoints, family), FAMILIES[family].tower
    if any(role not in tower.roles for role in joint):
        with pytest.raises(SkippedCell, match="no separate"):
            sites_in(model, tower, joint)
        return
    sites = sites_in(model, tower, joint)
    members = sorted(name for site in sites.values() for name in site.members)
    assert members == sorted(tower.linears * model.config.num_hidden_layers)
    with torch.no_grad():
        dense = model(IDS).logits
        full = {name: site.full for name, site in sites.items()}
        error = compressed(model, tower, sites, full, tmp_path, Absorb(0.5))
        assert error == pytest.approx(0, abs=1e-9)
        torch.testing.assert_close(model(IDS).logits, dense, rtol=1e-4, atol=1e-4)


def test_a_joint_site_is_the_truncated_svd_of_the_stacked_weights(checkpoints, tmp_path):
    """QSVD: one down-projection for q, k and v, under grouped-query attention too."""
    model, tower = load(checkpoints, "llama"), FAMILIES["llama"].tower
    sites = sites_in(model, tower, ["qkv"], "qkv")
    block = blocks_of(model, tower)[0]
    site = next(iter(sites.values()))
    assert site.outs == (48, 24, 24)
    weight = site_weight(block, site).double()
    u, s, vh = torch.linalg.svd(weight)
    ranks = dict.fromkeys(sites, 20)
    error = compressed(model, tower, sites, ranks, tmp_path, Absorb(0.5))
    left, right = factors_of(block, site)
    torch.testing.assert_close((left @ right).double(), (u[:, :20] * s[:20]) @ vh[:20], rtol=1e-4, atol=1e-5)
    assert error == pytest.approx(
        sum(float(torch.linalg.svdvals(w)[20:].square().sum()) for w in stacked(checkpoints, sites)), rel=1e-6
    )


def stacked(checkpoints, sites):
    dense = load(checkpoints, "llama")
    return [site_weight(blocks_of(dense, FAMILIES["llama"].tower)[s.block], s).double() for s in sites.values()]


def test_the_shared_latent_is_stored_once_and_computed_once(checkpoints, tmp_path):
    model, tower = load(checkpoints, "llama"), FAMILIES["llama"].tower
    before = sum(p.numel() for p in model.parameters())
    with FlopCounterMode(display=False) as dense:
        model(IDS)
    sites = sites_in(model, tower, ["qkv"], "qkv")
    compressed(model, tower, sites, dict.fromkeys(sites, 10), tmp_path, Absorb(0.5))
    saved = 3 * (48 * 96 - 10 * (48 + 96))  # r (E + q + k + v), the lecture's 4 r E under equal heads
    assert before - sum(p.numel() for p in model.parameters()) == saved
    assert sum("right" in name for name in model.state_dict()) == 3
    with FlopCounterMode(display=False) as now:
        model(IDS)
    assert dense.get_total_flops() - now.get_total_flops() == 2 * IDS.numel() * saved
    attention = blocks_of(model, tower)[0].self_attn
    assert attention.q_proj.right is attention.k_proj.right is attention.v_proj.right
    assert attention.q_proj.right._input is None, "an activation is held on to after the block"


def test_a_shared_latent_is_not_mixed_up_between_inputs():
    linear = nn.Linear(3, 2, bias=False)
    latent = SharedLatent(linear, users=2)
    x, y = torch.randn(1, 3), torch.randn(1, 3)
    torch.testing.assert_close(latent(x), linear(x))
    torch.testing.assert_close(latent(y), linear(y))  # before the second user of x came
    torch.testing.assert_close(latent(y), linear(y))
    torch.testing.assert_close(latent(x), linear(x))


def test_the_costs_of_qsvd_are_those_of_the_lecture(lab):
    """R1 = r (E + q + k + v) / E (q + k + v) of the weights, R2 = r / (k + v) of the cache.

    With as many key and value heads as query heads that is 4rE / 3E² and r / 2E.
    """
    record = lab.run("method=qsvd", "ratio=0.6")
    ranks = record["compressions"]["lowrank"]["plan"]
    e, q, k, v, layers = 48, 48, 24, 24, 3
    assert len(ranks) == layers
    total = sum(ranks.values())
    assert record["sizes"]["ratio_reached"] == pytest.approx(total * (e + q + k + v) / (layers * e * (q + k + v)))
    assert record["sizes"]["ratio_reached"] <= 0.6
    assert record["sizes"]["kv_latent_bytes_per_token"] == 4 * sum(min(r, k + v) for r in ranks.values())
    assert record["sizes"]["kv_cache_bytes_per_token"] == 4 * layers * (k + v)
    square = plain_site(3 * 64, 64)
    assert square.cost(48) / square.dense == 4 * 48 * 64 / (3 * 64**2)


def test_asvd_for_the_cache_counts_latents(lab):
    for ratio in (0.9, 0.5):
        record = lab.run("method=asvd_kv", f"ratio={ratio}")
        ranks = record["compressions"]["lowrank"]["plan"]
        assert {name.rsplit(".", 1)[-1] for name in ranks} == {"k_proj", "v_proj"}
        kept = sum(24 if rank is None else rank for rank in ranks.values())
        assert record["sizes"]["kv_latent_bytes_per_token"] == 4 * kept
        assert ratio - 1 / 24 < kept / (6 * 24) <= ratio


def test_targets_leave_the_rest_dense(lab):
    record = lab.run("method=svd", "targets=mlp", "ratio=0.5")
    assert {name.split(".")[3] for name in record["compressions"]["lowrank"]["plan"]} == {"mlp"}
    assert record["sizes"]["ratio_reached"] <= 0.5


def test_a_role_that_an_architecture_lacks_is_skipped_with_its_reason(lab):
    record = lab.run("method=asvd_kv", "model.path=tiny:gpt2")
    assert record["status"] == "skipped"
    assert "no separate kv" in record["reason"]


def test_a_ratio_of_the_cache_needs_targets_that_are_cached(lab):
    with pytest.raises(UserError, match="needs linears=kv"):
        lab.run("method=svd", "targets=kv_cache", "targets.linears=mlp")


SHAPES = [(40, 24), (24, 40), (32, 32), (24, 24)]


@pytest.mark.parametrize(("out", "inp"), SHAPES)
@pytest.mark.parametrize("rank", [1, 7, 23])
def test_remapped_storage_has_its_byte_count_and_a_small_error(out, inp, rank):
    torch.manual_seed(0)
    block = nn.ModuleDict({"linear": nn.Linear(inp, out)})
    bias = block["linear"].bias.detach().clone()
    site = plain_site(out, inp, "linear", storage=Remap())
    weight = block["linear"].weight.detach().double()
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    left, right = u[:, :rank], s[:rank, None] * vh[:rank]
    Remap().install(block, site, left, right, s[:rank])
    layer = block["linear"]
    assert isinstance(layer, FactorizedLinear)
    tensors = dict(layer.named_parameters())
    short, long = min(out, inp), max(out, inp)
    words = sum(t.numel() * t.element_size() for n, t in tensors.items() if n.endswith(("int8", "float16"))) / 2
    assert words == rank * long == site.cost(rank)
    assert sum(t.numel() for n, t in tensors.items() if n.endswith("int8")) == 2 * rank * short
    assert sum(t.numel() for n, t in tensors.items() if n.endswith("scale")) == 2 * rank
    x = torch.randn(5, inp)
    product = layer.left.weight @ layer.right.weight
    torch.testing.assert_close(layer(x), x @ product.T + bias, rtol=1e-4, atol=1e-5)
    assert (product - left @ right).norm() < 0.01 * (left @ right).norm()
    largest = (u[:short, :rank] * s[:rank]).abs().amax(0)  # no 8-bit entry is off by more than half a step
    within = (layer.left.weight[:short] - u[:short, :rank] * s[:rank] * signs(layer, u, rank)).abs()
    assert bool((within <= largest / 127 * 0.51).all())


def signs(layer: FactorizedLinear, u: torch.Tensor, rank: int) -> torch.Tensor:
    """Singular vectors are defined up to their signs."""
    return (layer.left.weight[: len(u)].double() * u[:, :rank][: len(layer.left.weight)]).sum(0).sign()


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
@pytest.mark.parametrize("joint", [[], ["qkv"]])
def test_remapped_models_are_counted_and_close_to_unquantized_ones(checkpoints, family, joint, tmp_path):
    tower = FAMILIES[family].tower
    models = {}
    for storage in (Remap(), Absorb(0.5)):
        model = load(checkpoints, family)
        sites = sites_in(model, tower, joint, storage=Remap())
        ranks = {name: rank_for_ratio(site, 0.7) for name, site in sites.items()}
        compressed(model, tower, sites, ranks, tmp_path, storage)
        models[type(storage)] = model
    remapped = models[Remap]
    assert any(isinstance(module, MixedLinear) for module in remapped.modules())
    with torch.no_grad():
        ours, theirs = remapped(IDS).logits, models[Absorb](IDS).logits
    assert (ours - theirs).norm() < 0.02 * theirs.norm()
    measured = sizes_of_ranks(remapped, tower, sites, ranks, 0.7) | sizes(remapped, tower, sites)
    words = total_cost(sites, ranks)
    scales = 4 * sum(rank * (1 + len(sites[name].members)) for name, rank in ranks.items())
    assert measured["sites"]["bytes"] == 2 * words + scales
    assert measured["ratio_reached"] == words / sum(site.out * site.inp for site in sites.values())
    assert measured["sites"]["parameters"] == sum(
        ranks[name] * (site.out + site.inp) for name, site in sites.items()
    )


def test_too_large_for_float16_raises():
    block = nn.ModuleDict({"linear": nn.Linear(4, 8, bias=False)})
    left, right = torch.full((8, 1), 1e3, dtype=torch.float64), torch.full((1, 4), 1e3, dtype=torch.float64)
    with pytest.raises(FloatingPointError, match="float16"):
        Remap().install(block, plain_site(8, 4, "linear"), left, right, torch.ones(1))


def test_orthogonal_factors_keep_the_product():
    left, right = torch.randn(9, 4, dtype=torch.float64), torch.randn(4, 7, dtype=torch.float64)
    u, sigma_vt, sigma = orthogonal_factors(left, right)
    torch.testing.assert_close(u @ sigma_vt, left @ right)
    torch.testing.assert_close(sigma, torch.linalg.svdvals(left @ right)[:4])
    torch.testing.assert_close(u.T @ u, torch.eye(4, dtype=torch.float64))
