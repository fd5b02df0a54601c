"""Speed and memory: what is counted is what runs, dense and compressed take turns, QSVD's hardware cost."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from lowrank_lab.evaluation import speed as timing
from lowrank_lab.evaluation.macs import count_macs, prefill_macs
from lowrank_lab.evaluation.speed import Speed
from lowrank_lab.lowrank.storage.absorb import Absorb
from lowrank_lab.lowrank.storage.remap import Remap
from lowrank_lab.models import tiny
from lowrank_lab.models.families import FAMILIES
from lowrank_lab.models.load import load_model
from lowrank_lab.models.walk import blocks_of
from lowrank_lab.modules.counts import count
from lowrank_lab.process import environment
from lowrank_lab.records.rank_sizes import sizes_of_ranks
from lowrank_lab.records.sizes import sizes
from lowrank_lab.reporting import figures, tables
from lowrank_lab.reporting.sections import SPEED
from lowrank_lab.running.context import Context
from lowrank_lab.running.runner import summary

from .sites import sites_in

CPU = torch.device("cpu")
PROMPT = torch.randint(0, 260, (1, 12), generator=torch.Generator().manual_seed(0))  # inside all sliding windows
SMALL = (
    "eval=[ppl,speed]",
    "eval.speed.batch_sizes=[1,3]",
    "eval.speed.seqlens=[6,10]",
    "eval.speed.new_tokens=2",
    "eval.speed.repeats=2",
)


def load(checkpoints, family):
    return load_model(str(checkpoints[family]), None, "float32", False)


def with_random_factors(model, tower, sites, ranks, storage):
    """Put factors of these ranks into ``model``: what they hold does not matter here."""
    for name, site in sites.items():
        left, right = torch.randn(site.out, ranks[name]).double(), torch.randn(ranks[name], site.inp).double()
        storage.install(blocks_of(model, tower)[site.block], site, left, right, torch.ones(ranks[name]).double())


@pytest.mark.parametrize("family", tiny.CONFIGS)
def test_torch_counts_what_the_shapes_say(checkpoints, family):
    model = load(checkpoints, family)
    with torch.no_grad():
        counted = count_macs(model, PROMPT)
    config = model.config
    heads, layers = config.num_attention_heads, config.num_hidden_layers
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    rotary = sum(type(module).__name__.endswith("RotaryEmbedding") for module in model.modules())
    kinds = 2 if family == "gemma3_text" else rotary  # one set of angles for each kind of its layers
    assert counted["linears"] == count(model).macs
    assert counted["context"] == 13
    assert counted["attention"] == 2 * layers * heads * size * 13 + kinds * size // 2


@pytest.mark.parametrize("storage", [Absorb(0.5), Remap()], ids=["uv", "remap"])
@pytest.mark.parametrize("joint", [[], ["qkv"], ["kv", "gate_up"]], ids=["each", "qkv", "kv+gate_up"])
def test_macs_are_those_of_the_factors(checkpoints, storage, joint):
    """k (m + n) summed over the sites, here under grouped-query attention, and lm_head."""
    model, tower = load(checkpoints, "llama"), FAMILIES["llama"].tower
    sites = sites_in(model, tower, joint, storage=storage)
    ranks = {name: 3 + number % 5 for number, name in enumerate(sites)}
    with_random_factors(model, tower, sites, ranks, storage)
    expected = sum(ranks[name] * (site.out + site.inp) for name, site in sites.items()) + 260 * 48
    assert sizes(model, tower, sites)["macs_per_token"] == expected
    with torch.no_grad():
        assert count_macs(model, PROMPT)["linears"] == expected
    assert prefill_macs(model, 7) == 7 * (expected - 260 * 48) + 260 * 48


def test_a_linear_that_does_not_run_is_noticed(checkpoints):
    model = load(checkpoints, "llama")
    model.unused = nn.Linear(3, 5)
    with torch.no_grad(), pytest.raises(RuntimeError, match="multiply-accumulates, their shapes say"):
        count_macs(model, PROMPT)


# papers/000, the table of QSVD's performance: (R1, R2) in percent. There E = q = k = v; ASVD and SVD-LLM compress k
# and v and leave q dense, and so have R1 = 1/3 + 4r / 3E and R2 = r / E.
E = 40
KV_APART, QKV_JOINT = ([], "kv", E), (["qkv"], "qkv", 2 * E)  # joint, linears, what a latent is a fraction of
LECTURE = [
    (*KV_APART, [(100, 50), (90, 42.5), (80, 35), (70, 27.5)]),  # SmolVLM
    (*QKV_JOINT, [(100, 37.5), (90, 33.75), (80, 30), (70, 26.25)]),
    (*KV_APART, [(63.3, 22.5), (60, 20), (56.7, 17.5), (53.3, 15)]),  # LLaVA
    (*QKV_JOINT, [(60, 22.5), (53.3, 20), (46.7, 17.5), (40, 15)]),
]


@pytest.mark.parametrize(("joint", "linears", "cached", "published"), LECTURE)
def test_hardware_costs_are_those_of_the_lecture(joint, linears, cached, published):
    shape = {"hidden_size": E, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 8}
    for r1, r2 in published:
        model, tower = LlamaForCausalLM(LlamaConfig(vocab_size=9, **shape)), FAMILIES["llama"].tower
        sites = sites_in(model, tower, joint, linears)
        ranks = dict.fromkeys(sites, round(r2 / 100 * cached))
        with_random_factors(model, tower, sites, ranks, Absorb(0.5))
        cost = sizes_of_ranks(model, tower, sites, ranks, 0.5)["hardware_cost"]
        assert 100 * cost["r1"] == pytest.approx(r1, abs=0.05)
        assert 100 * cost["r2"] == pytest.approx(r2)


def test_hardware_costs_under_grouped_query_attention(lab):
    e, q, k, v, layers = 48, 48, 24, 24, 3
    dense = layers * e * (q + k + v)
    assert lab.run("method=dense")["sizes"]["hardware_cost"] == {"r1": 1.0, "r2": 1.0}
    record = lab.run("method=qsvd", "ratio=0.6")
    ranks = record["compressions"]["lowrank"]["plan"].values()
    cost = record["sizes"]["hardware_cost"]
    assert cost["r1"] == pytest.approx(sum(r * (e + q + k + v) for r in ranks) / dense)
    assert cost["r2"] == pytest.approx(sum(min(r, k + v) for r in ranks) / (layers * (k + v)))
    record = lab.run("method=svd", "ratio=0.6")
    widths = {"q_proj": q, "k_proj": k, "v_proj": v}
    of_qkv = [(r, name.split(".")[-1]) for name, r in record["compressions"]["lowrank"]["plan"].items()]
    of_qkv = [(r, widths[name]) for r, name in of_qkv if name in widths]
    cost = record["sizes"]["hardware_cost"]
    assert cost["r1"] == pytest.approx(sum(r * (e + width) for r, width in of_qkv) / dense)
    assert cost["r2"] == pytest.approx(sum(r for r, width in of_qkv if width == k) / (layers * (k + v)))
    mlp_alone = lab.run("method=svd", "ratio=0.6", "targets=mlp")["sizes"]["hardware_cost"]
    assert mlp_alone == {"r1": 1.0, "r2": 1.0}
    fused = lab.run("method=svd", "ratio=0.6", "model.path=tiny:gpt2")["sizes"]["hardware_cost"]
    assert fused["r1"] == pytest.approx(21 / 36, abs=0.03)  # rank 21 of (144 + 48) / 144 · 48
    assert fused["r2"] is None


def test_a_record_has_all_that_was_measured(lab):
    record = lab.run("method=svdllm", "ratio=0.6", *SMALL)
    speed, counted = record["metrics"]["speed"], record["sizes"]
    assert [(one["batch_size"], one["prompt"]) for one in speed["settings"]] == [(1, 6), (3, 6), (1, 10)]
    for one in speed["settings"]:
        for name in ("model", "dense"):
            measured = one[name]
            assert measured["kv_cache_bytes_per_token"] == counted["kv_cache_bytes_per_token"]
            for phase, tokens in (("prefill", one["prompt"]), ("decode", 2)):
                seconds = measured[phase]["seconds"]
                assert len(seconds) == 2
                middle = sum(seconds) / 2
                assert measured[phase]["tokens_per_second"] == pytest.approx(one["batch_size"] * tokens / middle)
        for phase in timing.PHASES:
            pairs = zip(one["dense"][phase]["seconds"], one["model"][phase]["seconds"], strict=True)
            ratio, (low, high) = one[f"{phase}_ratio"], sorted(dense / model for dense, model in pairs)
            assert ratio["median"] == pytest.approx((low + high) / 2)
            assert 0 < low <= ratio["q1"] <= ratio["median"] <= ratio["q3"] <= high
    assert speed["value"] == speed["settings"][0]["decode_ratio"]["median"]
    dense = lab.run("method=dense")["sizes"]
    assert speed["macs"]["model"]["linears"] == counted["macs_per_token"]
    assert speed["macs"]["dense"]["linears"] == dense["macs_per_token"]
    assert speed["weight_bytes"] == {"dense": dense["bytes"], "model": counted["bytes"]}
    ideal = dense["macs_per_token"] / counted["macs_per_token"]
    assert speed["ideal"] == pytest.approx({"macs": ideal, "bytes": ideal})  # all in one dtype
    assert speed["protocol"]["threads"] == torch.get_num_threads()
    assert set(environment.machine()) <= set(speed["protocol"])
    json.dumps(record, allow_nan=False)


def test_remapped_factors_are_read_in_fewer_bytes_and_multiplied_as_often(lab):
    speed = lab.run("method=dobi_untrained", "ratio=0.6", *SMALL)["metrics"]["speed"]
    ideal = speed["ideal"]
    macs = speed["macs"]
    assert ideal["macs"] == macs["dense"]["linears"] / macs["model"]["linears"]
    assert ideal["bytes"] > 1.5 * ideal["macs"]  # 8 and 16 bits against 32


@pytest.mark.own_artifacts
def test_the_dense_model_is_measured_once(lab, monkeypatch):
    runs = []
    monkeypatch.setattr(timing, "_run", lambda model, **_: runs.append(model) or {"prefill": 0.5, "decode": 0.25})
    speed = lab.run("method=dense", *SMALL, "eval.speed.seqlens=[6]", "eval.speed.batch_sizes=[2]")["metrics"][
        "speed"
    ]
    assert len({id(model) for model in runs}) == 1
    assert len(runs) == 1 + 2  # warm-up, repeats
    assert speed["value"] == 1.0
    [one] = speed["settings"]
    assert one["prefill_ratio"] == one["decode_ratio"] == {"median": 1.0, "q1": 1.0, "q3": 1.0}
    assert one["model"] == one["dense"]
    assert one["model"]["prefill"]["tokens_per_second"] == 2 * 6 / 0.5
    assert one["model"]["decode"]["tokens_per_second"] == 2 * 2 / 0.25
    assert speed["ideal"] == {"macs": 1.0, "bytes": 1.0}


def test_dense_and_compressed_take_turns(checkpoints, monkeypatch):
    models = {name: load(checkpoints, "llama") for name in ("dense", "model")}
    names = {id(model): name for name, model in models.items()}
    runs = []
    monkeypatch.setattr(
        timing, "_run", lambda model, **_: runs.append(names[id(model)]) or {"prefill": 1.0, "decode": 1.0}
    )
    timing.measure(models, [(1, 4)], new_tokens=1, repeats=4, warmup=1, device=CPU)
    turns = ["dense", "model", "model", "dense"]
    assert runs == ["dense", "model", *turns, *turns]


class Small(nn.Module):
    """A model for which only so many sequences fit into memory."""

    def __init__(self, model, fit):
        super().__init__()
        self.model, self.config, self.fit = model, model.config, fit

    def get_output_embeddings(self):
        return self.model.get_output_embeddings()

    def forward(self, ids, **options):
        if len(ids) > self.fit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return self.model(ids, **options)


def measured_where_dense_fits(checkpoints, fit):
    models = {"dense": Small(load(checkpoints, "llama"), fit), "model": load(checkpoints, "llama")}
    return timing.measure(models, [(2, 4), (5, 4)], new_tokens=1, repeats=1, warmup=0, device=CPU)


def test_a_setting_that_does_not_fit_is_noted_and_the_others_go_on(checkpoints):
    speed = measured_where_dense_fits(checkpoints, 2)
    fits, not_there = speed["settings"]
    assert speed["value"] == fits["decode_ratio"]["median"] > 0
    assert not_there["dense"] is not_there["decode_ratio"] is not_there["prefill_ratio"] is None
    assert not_there["model"]["decode"]["tokens_per_second"] > 0
    rows = SPEED.cells({**speed, "metric": "speed"})
    assert [row["decode ×"] == "—" for row in rows] == [False, True]
    assert rows[1]["decode (tokens/s, dense)"].endswith(", out of memory")


def test_without_its_first_setting_there_is_no_number(checkpoints):
    speed = measured_where_dense_fits(checkpoints, 1)
    assert speed["value"] is None
    assert summary({"metrics": {"speed": {"metric": "speed", **speed}}}) == (
        "speed nan (out of memory in the first setting)"
    )


def test_another_machine_is_another_key(lab, monkeypatch):
    overrides = ("method=svd", *SMALL)
    [here] = lab.cells(*overrides)
    assert lab.cells(*overrides)[0].key == here.key
    monkeypatch.setattr(environment, "_cpu_name", lambda: "another")
    [there] = lab.cells(*overrides)
    assert there.keys.metrics("speed") != here.keys.metrics("speed")
    assert there.keys.metrics("ppl") == here.keys.metrics("ppl")
    monkeypatch.setattr(environment, "_gpu_names", lambda: ("a GPU",))
    [on_gpu] = lab.cells(*overrides)
    assert on_gpu.keys.metrics("speed") != there.keys.metrics("speed")
    assert lab.cells(*overrides, "device=cuda")[0].keys.metrics("speed") == on_gpu.keys.metrics("speed")
    assert lab.cells(*overrides, "device=cpu")[0].keys.metrics("speed") != on_gpu.keys.metrics("speed")


def test_a_checkpoint_is_compared_with_its_merged_weights(lab):
    made = lab.run("method=svd", "ratio=0.6", "save=true")
    folder = lab.root / made["checkpoint"]
    [cell] = lab.cells(f"model.path={folder}", *SMALL)
    context = Context(cell, None, CPU)
    dense = context.dense_model()
    compressed = load_model(str(folder), None, "float32", False)
    assert count(dense).macs - count(compressed).macs == (
        made["sizes"]["sites"]["parameters_dense"] - made["sizes"]["sites"]["parameters"]
    )
    with torch.no_grad():
        torch.testing.assert_close(dense(PROMPT).logits, compressed(PROMPT).logits, rtol=1e-4, atol=1e-5)


def test_a_prompt_longer_than_the_positions_is_left_out(lab):
    record = lab.run("method=svd", *SMALL, "eval.speed.seqlens=[2047]")
    assert list(record["metrics"]) == ["ppl"]
    assert "longer than the 2048 positions" in record["left_out"]["speed"]


@pytest.mark.parametrize(
    "change",
    [{"batch_sizes": []}, {"batch_sizes": 3}, {"seqlens": [0]}, {"seqlens": [True]}, {"new_tokens": 0},
     {"repeats": 0}, {"warmup": 0}],
)  # fmt: skip
def test_values_out_of_range_are_rejected(change):
    good = {"batch_sizes": [1, 4], "seqlens": [8], "new_tokens": 1, "repeats": 1, "warmup": 1}
    Speed(**good)
    with pytest.raises(ValueError, match=f"{next(iter(change))}=.* is not valid"):
        Speed(**{**good, **change})


def test_memory_on_top_is_what_the_work_held_and_the_outer_peak_is_kept():
    environment.reset_peak_memory()
    torch.ones(96 * 2**18)  # 96 MiB, freed again
    outer = environment.peak_memory()["resident_mib"]
    held = environment.memory_on_top(lambda: torch.ones(64 * 2**18), CPU)
    if held is None:
        pytest.skip("this system does not reset the peak of the resident set")
    assert 63 * 2**20 <= held < 80 * 2**20
    assert environment.peak_memory()["resident_mib"] >= outer


def test_reports_have_a_row_a_setting_and_a_line_a_cell(lab):
    for overrides in (["method=dense"], ["method=svd", "ratio=0.6"]):
        lab.run(*overrides, *SMALL)
    records = lab.results.records()
    [(caption, group)] = list(tables.groups(records, SPEED))
    table = tables.presentable(group, SPEED)
    assert list(table["method"]) == ["dense", "svd"] * 3
    assert list(zip(table["batch"], table["prompt"], strict=True))[::2] == [("1", "6"), ("3", "6"), ("1", "10")]
    [svd] = [r["metrics"]["speed"] for r in records if r["method"] == "svd"]
    both = [svd["settings"][1][name]["decode"]["tokens_per_second"] for name in ("model", "dense")]
    assert table["decode (tokens/s, dense)"].iloc[3] == ", ".join(map("{:.4g}".format, both))
    figure = figures.speed_against_settings(group, caption)
    axes = figure.axes[2]  # decode over batch sizes
    [[line, _, bars]] = axes.containers
    assert axes.containers[0].get_label() == "svd 0.6"
    assert line.get_xdata().tolist() == [1, 3]
    ratios = [svd["settings"][i]["decode_ratio"] for i in (0, 1)]
    assert line.get_ydata().tolist() == [ratio["median"] for ratio in ratios]
    for segment, ratio in zip(bars[0].get_segments(), ratios, strict=True):
        assert segment[:, 1].tolist() == pytest.approx([ratio["q1"], ratio["q3"]])
    assert "dense" in [line.get_label() for line in axes.get_lines()]
