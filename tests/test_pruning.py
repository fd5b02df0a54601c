"""Pruned weights: which, how they are kept, and what becomes of them under low rank, bits, and on disk."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from lowrank_lab.checkpoints import checkpoint
from lowrank_lab.modules.base import bias_of, dense_weight
from lowrank_lab.modules.linears import linears_in
from lowrank_lab.modules.sparse import MaskedLinear, SparseLinear
from lowrank_lab.pruning.magnitude import largest
from lowrank_lab.records.results import Record, other_compressions
from lowrank_lab.reporting import perplexity_figures, tables
from lowrank_lab.reporting.kinds.perplexity import PERPLEXITY
from lowrank_lab.reporting.matching import is_cell
from lowrank_lab.running.context import Context

from .conftest import Lab

CPU = torch.device("cpu")


def test_the_smallest_are_pruned():
    weight = torch.tensor([[3.0, -1.0, 0.5], [-0.25, 2.0, -4.0]])
    assert largest(weight, 0.5).tolist() == [[True, False, False], [False, True, True]]
    assert largest(weight, 0).all()
    assert largest(torch.ones(2, 3), 0.5).sum() == 3  # equal ones too are cut to the fraction asked for
    with pytest.raises(FloatingPointError):
        largest(torch.tensor([[1.0, torch.nan]]), 0.5)


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (8, 8), (7, 13)])
def test_a_sparse_linear_multiplies_with_the_kept_weights(shape):
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(shape, generator=generator), torch.randn(shape[0], generator=generator)
    kept = torch.rand(shape, generator=generator) < 0.4
    sparse, x = SparseLinear.of(weight, kept, bias), torch.randn(2, shape[1], generator=generator)
    expected = nn.functional.linear(x, weight * kept, bias)
    assert torch.equal(dense_weight(sparse), weight * kept)
    assert torch.equal(sparse(x), expected)
    counts = sparse.counts()
    assert counts.parameters == kept.sum()
    assert counts.bytes == 4 * kept.sum() + -(-kept.numel() // 8)
    assert sum(tensor.nbytes for tensor in counts.weights) == counts.bytes  # the mask too is read
    masked = sparse.to_plain(torch.float32)
    assert torch.equal(masked(x), expected)
    assert [tensor.shape for tensor in masked.counts().weights] == [shape]  # it is a dense product
    masked.linear = SparseLinear.of(torch.ones(shape), torch.ones(shape) > 0, bias)  # rounded to something else
    torch.testing.assert_close(masked(x), nn.functional.linear(x, kept.float(), bias))


def compressed(lab: Lab, *overrides: str) -> Context:
    [cell] = lab.cells("pruning=magnitude", "sparsity=0.5", *overrides)
    context = Context(cell, Record(cell, None), CPU)
    for compression in cell.compressions.values():
        compression.check(context)
        compression.apply(context, compression.plan(context))
    return context


@pytest.mark.own_artifacts
@pytest.mark.parametrize(
    ("method", "quantization"),
    [
        ("method=dense", "none"),
        ("method=svdllm grouping=qkv", "none"),
        ("method=kron", "none"),
        ("method=svdllm", "int8"),
        ("method=svdllm grouping=qkv", "gptq"),
        ("method=kron", "kmeans"),
        ("method=dense", "awq"),
    ],
)
def test_half_of_the_weights_are_zero_whatever_rounds_them(lab, method, quantization):
    context = compressed(lab, *method.split(), "ratio=0.6", f"quantization={quantization}")
    for site in context.sites.values():
        block = context.model.get_submodule(f"{context.tower.blocks}.{site.block}")
        for path in linears_in(block, site.members):
            linear = block.get_submodule(path)
            holder = linear if quantization == "none" else block.get_submodule(path.removesuffix(".linear"))
            assert isinstance(holder, SparseLinear if quantization == "none" else MaskedLinear)
            weight = dense_weight(holder)
            assert (weight == 0).sum() >= round(0.5 * weight.numel())


@pytest.mark.own_artifacts
@pytest.mark.parametrize(("method", "quantization"), [("svdllm", "none"), ("dense", "int8")])
def test_it_is_counted_saved_loaded_and_merged(lab, monkeypatch, method, quantization):
    ids, seen, save = torch.arange(4, 36)[None], [], checkpoint.save

    def look_and_save(folder: Path, model: nn.Module, *rest: object) -> None:
        with torch.no_grad():
            seen.append(model(ids).logits)
        save(folder, model, *rest)

    monkeypatch.setattr(checkpoint, "save", look_and_save)
    settings = (f"method={method}", "ratio=0.6", f"quantization={quantization}")
    plain = lab.run(*settings)
    record = lab.run(*settings, "pruning=magnitude", "sparsity=0.5", "save=true", "save.merge=true")
    pruned = record["compressions"]["pruning"]
    assert set(pruned["plan"].values()) == {0.5}
    of_sites, before = record["sizes"]["sites"], plain["sizes"]["sites"]
    weights = before["parameters"] if plain["compressions"] else before["parameters_dense"] or pruned["weights"]
    assert pruned["weights"] == weights
    assert of_sites["parameters"] == weights - pruned["pruned"]
    assert record["sizes"]["macs_per_token"] == plain["sizes"]["macs_per_token"]  # the products are dense
    if quantization == "none":
        assert of_sites["bytes"] < 0.6 * 4 * weights
    in_memory, merged = seen
    loaded = AutoModelForCausalLM.from_pretrained(lab.root / record["checkpoint"])
    dense = AutoModelForCausalLM.from_pretrained(lab.root / record["merged_checkpoint"])
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, in_memory, rtol=0, atol=1e-5)
        torch.testing.assert_close(dense(ids).logits, merged, rtol=0, atol=1e-5)
        torch.testing.assert_close(merged, in_memory, rtol=0, atol=1e-4)
    again = lab.run(f"model.path={lab.root / record['checkpoint']}", "method=dense")
    assert again["sizes"]["sites"] == of_sites
    assert again["metrics"]["ppl"]["value"] == pytest.approx(record["metrics"]["ppl"]["value"], rel=1e-6)


def test_biases_stay(lab):
    context = compressed(lab, "method=dense", "model.path=tiny:opt")
    name = "model.decoder.layers.0.fc1"
    expected = bias_of(context.dense_model().get_submodule(name))
    assert expected is not None
    assert torch.equal(bias_of(context.model.get_submodule(name)), expected)


@pytest.mark.parametrize("quantization", ["quarot", "duquant", "qsvd_w8a8"])
def test_what_mixes_channels_is_skipped_with_the_reason(lab, quantization):
    record = lab.run("method=svdllm", "pruning=magnitude", f"quantization={quantization}")
    assert record["status"] == "skipped"
    assert "mixes channels" in record["reason"]


def test_remapped_factors_are_skipped_with_the_reason(lab):
    record = lab.run("method=dobi_untrained", "pruning=magnitude")
    assert record["status"] == "skipped"
    assert "pruning works on plain weights" in record["reason"]


def test_tables_tell_it(lab):
    lab.run("method=svdllm")
    lab.run("method=svdllm", "pruning=magnitude", "sparsity=0.25")
    lab.run("method=dense", "pruning=magnitude", "sparsity=0.504", "targets=mlp")
    text = tables.markdown(lab.results.records())
    assert "pruning=magnitude 25%" in text
    assert "pruning=none" in text
    assert "pruning=magnitude 50.4%" in text
    assert "of mlp" in text


def test_pruned_cells_have_lines_of_their_own(lab):
    """A line joins cells of one kind; the dense line is that of the dense model."""
    for method in ("method=dense", "method=svdllm"):
        for pruning in ("none", "magnitude"):
            lab.run(method, f"pruning={pruning}", "quantization=int8")
    lab.run("method=dense")
    lab.run("method=dense", "pruning=magnitude")
    [(_, group)] = tables.groups(lab.results.records(), PERPLEXITY)
    [axes] = perplexity_figures.perplexity_against_bits(group, "").axes
    labels = [line.get_label() for line in axes.lines if not line.get_label().startswith("_")]
    assert sum(label.startswith("dense (") and label[7].isdigit() for label in labels) == 1
    pruned = [record for record in lab.results.records() if other_compressions(record)]
    assert len(pruned) == 3
    for record in pruned:  # a paper's line of the same method and bits is not its own
        row = {"method": record["method"], "ratio": "0.8", "kept": record["ratio"], "variant": ""}
        row["quantization"] = "" if record["quantization"]["name"] == "none" else record["quantization"]["name"]
        unpruned = {**record, "config": {**record["config"], "compressions": []}}
        table = SimpleNamespace(also={})
        assert is_cell(row, unpruned, table) and not is_cell(row, record, table)
    kept = {"dense, ratio 1, magnitude 50%", "svdllm, ratio 0.8", "svdllm, ratio 0.8, magnitude 50%"}
    assert kept <= set(labels)


@pytest.mark.parametrize("sparsity", ["1", "-0.1", "half", "1.5"])
def test_a_sparsity_that_makes_no_sense_is_told_at_once(lab, sparsity):
    from lowrank_lab.basics.errors import UserError

    with pytest.raises(UserError, match=r"^sparsity="):
        lab.cells("pruning=magnitude", f"sparsity={sparsity}")
