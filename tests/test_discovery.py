"""Families that are no row: what is discovered of them, and that they are compressed, saved and loaded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from lowrank_lab.basics.errors import UserError
from lowrank_lab.checkpoints import checkpoint
from lowrank_lab.models import tiny
from lowrank_lab.models.discovery import discovered, family_of
from lowrank_lab.models.families import FAMILIES, kv_cache_shape, kv_cache_values_per_token
from lowrank_lab.models.families_page import page
from lowrank_lab.models.load import skeleton
from lowrank_lab.models.walk import blocks_of, hidden_states, walk
from lowrank_lab.modules.factorized import FactorizedLinear

from .conftest import REPOSITORY, Lab

CPU = torch.device("cpu")
OTHERS = sorted(tiny.DISCOVERED_CONFIGS)
IDS = torch.randint(4, 260, (3, 24), generator=torch.Generator().manual_seed(3))


def bare(family: str) -> Any:
    return skeleton(AutoConfig.for_model(family, **tiny.ALL_CONFIGS[family]), False)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(IDS, use_cache=False).logits


def tensors(model: Any) -> dict[str, torch.Tensor]:
    """Its weights and buffers, also those that no checkpoint has."""
    return {**model.state_dict(), **dict(model.named_buffers())}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for family in OTHERS:
        made[family] = tmp_path_factory.mktemp(family)
        tiny.build(family, made[family])
    return made


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_discovery_finds_what_the_row_says(family):
    """But for what rotations and products of queries with keys need, which takes a row."""
    model = bare(family)
    found, row = discovered(type(model), model.config).tower, FAMILIES[family].tower
    assert row.attention is not None
    assert found == replace(row, folding=None, attention=replace(row.attention, plain=False))
    assert found.roles == row.roles  # no part of the comparison of towers, as it is a dictionary
    assert list(found.roles) == list(row.roles)


def test_linears_that_are_given_one_tensor_are_one_group():
    """In Cohere's parallel blocks attention and MLP read the same norm, in Falcon's too; in GPT-NeoX's two."""
    assert family_of(bare("cohere")).tower.inputs[0] == (
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
    )
    assert family_of(bare("falcon")).tower.inputs[0] == ("self_attention.query_key_value", "mlp.dense_h_to_4h")
    assert all(len(group) == 1 for group in family_of(bare("gpt_neox")).tower.inputs)


def test_experts_and_routers_stay_dense_and_are_named():
    mixtral, qwen = family_of(bare("mixtral")).tower, family_of(bare("qwen2_moe")).tower
    assert set(mixtral.stays_dense) == {"mlp.gate", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"}
    assert not any("experts" in name for name in mixtral.linears)
    assert qwen.roles["gate_up"] == ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj")
    assert "mlp.shared_expert_gate" in qwen.stays_dense


def test_mamba_has_no_attention():
    tower = family_of(bare("mamba")).tower
    assert tower.linears == ("mixer.in_proj", "mixer.x_proj", "mixer.out_proj")
    assert (tower.attention, dict(tower.roles)) == (None, {})
    assert "mixer.dt_proj" in tower.stays_dense  # the model multiplies with its weight itself


def test_of_blocks_that_differ_what_all_have_is_found():
    sizes = {
        **tiny.DISCOVERED_CONFIGS["mixtral"],
        "num_local_experts": 0,
        "layer_types": ["mamba", "attention", "mamba"],
    }
    config = AutoConfig.for_model("granitemoehybrid", **sizes, mamba_n_heads=12, mamba_d_head=8)
    tower = family_of(skeleton(config, False)).tower
    assert tower.inputs == (("shared_mlp.input_linear",), ("shared_mlp.output_linear",))
    assert {"mamba.in_proj", "self_attn.q_proj"} <= set(tower.stays_dense)
    assert kv_cache_shape(config) is None


def test_a_model_without_a_list_of_blocks():
    class Unrolled(nn.Module):
        def __init__(self, config: Any) -> None:
            super().__init__()
            self.config, self.layer = config, nn.Linear(4, 4)

    config = LlamaConfig(**tiny.CONFIGS["llama"])
    config.model_type = "unrolled"
    with pytest.raises(UserError, match=r"'unrolled' has no compressible layer .*no list of blocks"):
        family_of(Unrolled(config))


def test_a_model_that_needs_more_than_the_hidden_states_of_its_blocks():
    """RWKV's blocks also give the state that the next one continues."""
    config = AutoConfig.for_model("rwkv", vocab_size=260, hidden_size=48, num_hidden_layers=2, context_length=64)
    with pytest.raises(UserError, match=r"'rwkv' has no compressible layer .*more of its blocks than their hidden"):
        family_of(skeleton(config, False))


def test_a_model_that_does_something_between_its_blocks_is_not_walked():
    class Between(LlamaForCausalLM):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.model.layers[0].register_forward_hook(lambda _module, _args, states: states * 2)

    model = Between(LlamaConfig(**tiny.CONFIGS["llama"])).eval()
    with pytest.raises(UserError, match="Between computes something between its blocks"):
        next(walk(model, FAMILIES["llama"].tower, [IDS], CPU))


@pytest.mark.parametrize("family", OTHERS)
@torch.no_grad()
def test_walking_a_discovered_family_equals_its_own_forward(folders, family):
    model = AutoModelForCausalLM.from_pretrained(folders[family]).eval()
    tower = family_of(model).tower
    expected: list[torch.Tensor] = []
    hooks = [
        block.register_forward_hook(lambda _m, _a, out: expected.append(hidden_states(out)))
        for block in blocks_of(model, tower)
    ]
    model(IDS, use_cache=False)
    for hook in hooks:
        hook.remove()
    hidden: list[torch.Tensor] = []
    for index, _, run in walk(model, tower, [IDS], CPU, hidden):
        run()
        torch.testing.assert_close(hidden[0], expected[index], rtol=1e-5, atol=1e-6)
    assert len(expected) == len(blocks_of(model, tower))


@pytest.mark.parametrize("family", OTHERS)
@torch.no_grad()
def test_the_cache_is_counted_as_it_is(folders, family):
    model = AutoModelForCausalLM.from_pretrained(folders[family]).eval()
    if family == "mamba":
        assert kv_cache_values_per_token(model.config) is None
        return
    cache = model(IDS, use_cache=True).past_key_values
    cached = sum(tensor.numel() for layer in cache.layers for tensor in (layer.keys, layer.values))
    assert kv_cache_values_per_token(model.config) == cached / IDS.numel()


# Traits that others lack: parallel blocks, fused linears, experts, norms of queries, no attention.
TELLING = ["bloom", "cohere", "falcon", "gpt_neo", "gpt_neox", "mamba", "mpt", "olmo2", "qwen2_moe"]
EACH_ONCE = [
    pytest.param(family, method, marks=() if quick else pytest.mark.slow)
    for family in OTHERS
    for method, quick in (("svdllm", family in TELLING), ("kron", family in ("falcon", "mamba")))
]


@pytest.mark.parametrize(("family", "method"), EACH_ONCE)
def test_a_discovered_family_is_compressed_saved_and_loaded(lab: Lab, monkeypatch, family, method):
    expected: list[Any] = []
    save = checkpoint.save

    def look_and_save(folder: Path, model: Any, *rest: Any) -> None:
        expected.extend((logits(model), {name: tensor.clone() for name, tensor in tensors(model).items()}))
        save(folder, model, *rest)

    monkeypatch.setattr(checkpoint, "save", look_and_save)
    record = lab.run(f"model.path=tiny:{family}", f"method={method}", "ratio=0.6", "save=true")
    assert record["status"] == "done"
    tower = family_of(bare(family)).tower
    sites = record["compressions"]["lowrank"]["sites"]
    assert {name.removeprefix(f"{tower.blocks}.").partition(".")[2] for name in sites} == set(tower.linears)
    reloaded = AutoModelForCausalLM.from_pretrained(lab.root / record["checkpoint"])
    assert any(isinstance(module, FactorizedLinear) for module in reloaded.modules())
    in_memory, before = expected
    assert tensors(reloaded).keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors(reloaded).items())
    # Weights that lie elsewhere in memory may be summed in another order, as Mamba's are.
    torch.testing.assert_close(logits(reloaded.eval()), in_memory, rtol=1e-5, atol=1e-5)
    assert record["discovered"]["inputs"] == [list(group) for group in tower.inputs]
    again = lab.run(f"model.path={lab.root / record['checkpoint']}")
    assert again["metrics"]["ppl"]["value"] == pytest.approx(record["metrics"]["ppl"]["value"], rel=1e-5)
    assert again["sizes"]["macs_per_token"] == record["sizes"]["macs_per_token"]


def test_rotations_and_scales_of_a_discovered_family_are_skipped_with_the_reason(lab):
    for quantization in ("quarot", "spinquant", "smoothquant", "awq"):
        record = lab.run("model.path=tiny:granite", "method=dense", f"quantization={quantization}")
        assert record["status"] == "skipped"
        assert "it has no row in models/families.py" in record["reason"]


def test_what_needs_no_row_quantizes_a_discovered_family(lab):
    for quantization in ("gptq", "duquant", "kv4"):
        record = lab.run("model.path=tiny:granite", "method=dense", f"quantization={quantization}")
        assert record["status"] == "done"
    assert record["sizes"]["kv_cache_bytes_per_token"] is not None


def test_what_mamba_lacks_is_skipped(lab):
    small = ("eval.speed.batch_sizes=[1]", "eval.speed.seqlens=[8]", "eval.speed.new_tokens=1")
    record = lab.run("model.path=tiny:mamba", "method=svdllm", "ratio=0.6", "eval=ppl,speed", *small)
    assert "speed" in record["left_out"]
    assert record["sizes"]["kv_cache_bytes_per_token"] is None
    assert record["sizes"]["hardware_cost"] == {"r1": None, "r2": None}
    assert lab.run("model.path=tiny:mamba", "method=dense", "quantization=kv4")["status"] == "skipped"
    assert lab.run("model.path=tiny:mamba", "method=asvd_kv", "ratio=0.6")["status"] == "skipped"


def test_the_page_of_families_is_up_to_date():
    """If not: python -m lowrank_lab.models.families_page > docs/families.md"""
    assert (REPOSITORY / "docs" / "families.md").read_text(encoding="utf-8") == page()


@pytest.mark.parametrize("family", ["falcon", "mamba"])
def test_evaluators_look_into_a_discovered_family(lab, family):
    """Falcon's blocks give tuples; Mamba has no roles that the evaluator of factors chooses from."""
    words = [f"model.path=tiny:{family}", "eval.truncation.seqlen=32", "eval.truncation.max_windows=2"]
    small = ["eval.output_error.seqlen=32", "eval.output_error.max_windows=2"]
    record = lab.run(*words, *small, "method=svdllm", "ratio=0.6", "eval=ppl,output_error,truncation,factors")
    assert set(record["metrics"]) == {"ppl", "output_error", "factors"}  # truncation is of dense models
    assert record["metrics"]["output_error"]["value"] > 0
    dense = lab.run(*words, "method=dense", "eval=ppl,truncation")
    assert dense["metrics"]["truncation"]["points"]
