"""How a record describes its cell to tables, in new records and in those that older versions have written."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from lowrank_lab.cells import config
from lowrank_lab.records import old
from lowrank_lab.records.labels import labels
from lowrank_lab.records.results import Results

from .test_faults import OLD

COMMANDS = (
    "method=dense",
    "method=svdllm_lora",
    "method=dobi",
    "method=qsvd targets.blocks=[-1]",
    "method=asvd_kv",
    "method=dense quantization=int4 targets=kv",
    "method=svdllm quantization=w4a4 quantization.left.bits=3",
    "method=dense quantization=quarot seed=1",
    "method=dense quantization=duquant quantization.weights.granularity=32",
    "method=svdllm quantization=qsvd_w4a4",
    *(f"method=dense quantization={name}" for name in ("nf4", "gptq3", "awq", "kmeans", "kv4", "spinquant")),
)


def without_labels(cell: Any) -> dict[str, Any]:
    """The part of a record that older versions wrote too, with a label as theirs."""
    cfg, cell = config.plain(cell.cfg), replace(cell, words={})
    named = {"label": cell.label, "method": cfg["method"]["name"], "ratio": cell.ratio, "model": cell.source.name}
    calibrated = {"calibration": {}} if cell.calibration_data is not None else {}
    return {"config": cfg, "dataset": cfg["dataset"]["name"], **named, **calibrated}


@pytest.mark.parametrize("command", COMMANDS)
def test_an_old_record_is_described_as_a_new_one(lab, command):
    [cell] = lab.cells(*command.split(), "ratio=0.6")
    new, derived = labels(cell), old.with_labels(without_labels(cell))
    for entry in ("quantization", "counts", "settings"):
        assert derived[entry] == new[entry]
    assert list(derived["settings"]) == list(new["settings"])  # tables show them in this order


def test_a_new_record_is_read_as_it_is(lab):
    described = without_labels(lab.cells("method=svd")[0]) | {"settings": {"metric": "Mine"}}
    assert old.with_labels(described) is described


def test_a_record_with_names_of_classes_is_read_with_those_of_options(lab):
    described = without_labels(lab.cells("method=asvd", "metric.alpha=0.25")[0])
    classes = {"metric": "ActivationScale", "allocation": "Strs"}
    described |= {"settings": classes, "variant": {"metric.alpha": 0.25}}
    read = old.with_labels(described)
    assert read["settings"] == {"metric": "abs_mean", "allocation": "strs"}
    assert read["variant"] == {"metric.alpha": 0.25}


@pytest.mark.parametrize("root", OLD, ids=lambda root: root.name)
def test_outdated_records_have_all_entries(root):
    records = Results(root).records()
    assert records
    for record in records:
        assert record["quantization"] == {"name": "none", "family": "none"}
        assert record["variant"] == {}
        assert {"counts", "settings"} <= record.keys()


def test_a_variant_is_what_differs_from_the_method(lab):
    def variant(command: str) -> dict[str, Any]:
        return labels(lab.cells(*command.split())[0])["variant"]

    assert variant("method=svdllm ratio=0.6 calibration.samples=3") == {}
    assert variant("method=asvd metric.alpha=0.25") == {"metric.alpha": 0.25}
    # settings of another refinement than the method's are part of it
    assert variant("method=svdllm refinement=lora") == {"refinement": "lora"}
    assert variant("method=svdllm refinement=lora refinement.r=4") == {"refinement": "lora", "refinement.r": 4}
    assert variant("method=dense quantization=int4") == {"quantization": "INT4"}
    assert variant("method=asvd metric.alpha=0.25 method.name=mine") == {"metric.alpha": 0.25}


def label(lab: Any, command: str) -> str:
    """What a cell is called, between its method with its ratio, and its model."""
    [cell] = lab.cells(*command.split(), "ratio=0.6")
    return cell.label.removesuffix(" tiny-llama wikitext2")


def test_a_label_tells_what_was_changed_of_a_method_as_it_was_typed(lab):
    told = {
        "method=svdllm": "svdllm ratio=0.6",
        "method=svdllm allocation=uniform metric.cholesky=false": "svdllm ratio=0.6",  # as it is anyway
        "method=svdllm allocation=loss_based seed=1": "svdllm ratio=0.6 allocation=loss_based seed=1",
        "method=svd seed=1": "svd ratio=0.6",  # draws no random numbers
        "method=asvd metric=abs_max metric.alpha=0.25": "asvd ratio=0.6 metric=abs_max metric.alpha=0.25",
        "method=svdllm_lora refinement.micro_batch=1": "svdllm_lora ratio=0.6",  # changes no number
        "method=dense metric.cholesky=true metric=second_moment": "dense",  # which has no metric
        "method=dense quantization=gptq quantization.method.damping=0.1": (
            "dense GPTQ INT4 quantization.method.damping=0.1"
        ),
        "method=dense quantization=int4 quantization.weights.bits=3": "dense INT3",
    }
    assert {command: label(lab, command) for command in told} == told


def test_an_option_and_a_method_of_ones_own_are_told_too(lab, tmp_path):
    (tmp_path / "allocation").mkdir()
    (tmp_path / "method").mkdir()
    target = "lowrank_lab.lowrank.allocation.sigma_gradient.SigmaGradient"
    (tmp_path / "allocation" / "slopes.yaml").write_text(f"_target_: {target}\nform: layer\nsamples: 3\n")
    method = "# @package _global_\ndefaults:\n  - override /allocation: slopes\nmethod:\n  name: mine\n"
    (tmp_path / "method" / "mine.yaml").write_text(method)
    where = f"hydra.searchpath=[file://{tmp_path}]"
    assert label(lab, f"{where} method=mine allocation.samples=2") == "mine ratio=0.6 allocation.samples=2"
    assert label(lab, f"{where} method=svdllm allocation=slopes") == "svdllm ratio=0.6 allocation=slopes"
    [cell] = lab.cells(where, "method=svdllm", "allocation=slopes", "allocation.samples=2")
    assert labels(cell)["variant"] == {"allocation": "slopes", "allocation.samples": 2}


GRIDS = (
    "method=svdllm seed=0,1 targets=all,mlp dtype=float32,bfloat16 metric.cholesky=true,false",
    "calibration.samples=4,8 eval.ppl.seqlen=16,32 eval.ppl.batch_size=1,2 dataset.eval.max_documents=null,3",
    "method=dense quantization=gptq quantization.method.act_order=true,false quantization.weights.granularity=8,16 "
    "pruning=magnitude sparsity=0.25,0.250000001",
)


@pytest.mark.parametrize("words", GRIDS)
def test_two_cells_of_a_grid_never_share_a_label(lab, words):
    cells = lab.cells(*words.split(), multirun=True)
    of_labels: dict[str, set[str]] = {}
    of_keys: dict[str, set[str]] = {}
    for cell in cells:
        of_labels.setdefault(cell.label, set()).add(cell.key)
        of_keys.setdefault(cell.key, set()).add(cell.label)
    assert all(len(keys) == 1 for keys in of_labels.values())
    assert len(of_labels) == len(of_keys) > 3
