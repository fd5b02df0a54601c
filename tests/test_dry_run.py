"""What ``dry_run=true`` tells, against what a run then writes, computes and holds."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from lowrank_lab.basics.errors import UserError
from lowrank_lab.calibration.gradients import make_gradients
from lowrank_lab.calibration.statistics import make_statistics
from lowrank_lab.cells.cell import Cell
from lowrank_lab.evaluation.macs import counter
from lowrank_lab.evaluation.perplexity import perplexity
from lowrank_lab.models.families import FAMILIES
from lowrank_lab.models.load import load_model
from lowrank_lab.models.tiny import byte_tokenizer
from lowrank_lab.planning.dry_run import Machine, print_needs
from lowrank_lab.planning.shapes import shapes_of, with_sites
from lowrank_lab.planning.steps import Planner
from lowrank_lab.running import context, runner
from tests.conftest import REPOSITORY

pytestmark = pytest.mark.own_artifacts

CPU = torch.device("cpu")
PLENTY = 10**15


@pytest.fixture(scope="module")
def medium(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model large enough for matrices to outweigh the headers of files."""
    folder = tmp_path_factory.mktemp("medium")
    config = LlamaConfig(
        vocab_size=260,
        hidden_size=96,
        intermediate_size=208,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def steps(cell: Cell, on_gpu: bool = False) -> dict[str, Any]:
    return {step.name: step for step in Planner(cell, with_sites(shapes_of(cell), cell), on_gpu).steps()}


def bytes_below(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))


def in_bytes(shown: str) -> float:
    value, unit = shown.removeprefix("≥ ").split()
    return float(value) * {"kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}[unit]


def rows(printed: str) -> list[list[str]]:
    """The cells of the printed table without its head."""
    lines = [line for line in printed.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_disk_it_tells_is_what_a_grid_writes_and_what_is_there_costs_nothing(lab, medium, capsys):
    asked = [("method=svdllm_u", "ratio=0.8"), ("method=svdllm", "ratio=0.6"), ("method=kron", "ratio=0.6")]
    words = [(f"model.path={medium}", *answers, "save=true") for answers in asked]
    cells = [cell for one in words for cell in lab.cells(*one)]
    assert print_needs(cells)
    *each, total = rows(capsys.readouterr().out)
    assert [row[1] for row in each] == ["to be computed"] * 3
    assert not lab.results.records() and bytes_below(lab.root) == 0
    told = [in_bytes(row[4]) for row in each]
    assert sum(told) == pytest.approx(in_bytes(total[4]), rel=0.01)
    for one, size in zip(words, told, strict=True):
        before = bytes_below(lab.root)
        lab.run(*one)
        assert bytes_below(lab.root) - before == pytest.approx(size, rel=0.05), one
    assert print_needs(cells)
    assert [row[1:] for row in rows(capsys.readouterr().out)] == [
        *[["finished", "0", "0", "0", "0"]] * 3,
        ["3 of 3 finished", "0", "0", "0", "0"],
    ]


def test_the_flops_of_passes_are_those_of_torchs_counter(lab, medium, tmp_path):
    words = (f"model.path={medium}", "method=kron", "ratio=0.6", "save=true", "metric.output=full")
    [cell] = lab.cells(*words)
    told = steps(cell)
    samples, length = cell.cfg.calibration.samples, cell.cfg.calibration.seqlen
    model, tower = load_model(str(medium), None, "float32", False), FAMILIES["llama"].tower
    ids = torch.randint(4, 260, (samples, length))
    with counter() as counted:
        make_statistics(tmp_path, model, tower, ids.split(4), CPU)
    assert told["calibration"].flops == pytest.approx(counted.get_total_flops(), rel=0.03)
    with counter() as counted:
        make_gradients(tmp_path, model, tower, ids, CPU, outer=True)
    assert told["gradients"].flops == pytest.approx(counted.get_total_flops(), rel=0.05)
    record = lab.run(*words)
    compressed = AutoModelForCausalLM.from_pretrained(lab.root / record["checkpoint"])
    evaluator = cell.evaluators["ppl"]
    windows = torch.randint(4, 260, (record["metrics"]["ppl"]["protocol"]["windows"], evaluator.seqlen))
    with counter() as counted:
        perplexity(compressed, windows, 1, CPU)
    assert steps(cell)["eval.ppl"].flops == pytest.approx(counted.get_total_flops(), rel=0.05)


def test_what_does_not_fit_is_refused_by_resource_before_anything_is_made(lab, medium, capsys, monkeypatch):
    """Of a machine that has too little of one thing at a time, with what would help."""
    [cell] = lab.cells(f"model.path={medium}", "ratio=0.6", "save=true")
    refusals = {}
    for short in ("memory", "gpu", "disk"):
        machine = Machine(
            memory=10**8 if short == "memory" else PLENTY,
            gpu={"memory": 0, "gpu": 10**8, "disk": PLENTY}[short],
            free={lab.data_root.stat().st_dev: 1000 if short == "disk" else PLENTY},
        )
        monkeypatch.setattr(Machine, "here", lambda _, machine=machine: machine)
        assert not print_needs([cell]), short
        printed = capsys.readouterr().out
        assert rows(printed)[0][1] == "does not fit"
        refusals[short] = [line for line in printed.splitlines() if line.startswith("does not fit: ")]
    [memory], [gpu], [artifacts, results] = refusals.values()  # of the disk, what is kept and the checkpoint
    assert re.search(r"needs 1(\.\d+)? GB of memory, .* calibration\.offload=true, smaller batches or", memory)
    assert re.search(r"of GPU memory, .* smaller batches or device=cpu", gpu)
    assert re.search(r"the disk of artifacts=.* lacks \d.*, or use artifacts=FOLDER", artifacts)
    assert re.search(r"the disk of results=.* lacks \d.*, or use results=FOLDER", results)


def test_only_the_configuration_of_a_model_is_read_and_the_exit_status_tells(lab, tmp_path):
    """A model that no machine holds, whose weights are not there."""
    folder = tmp_path / "huge"
    folder.mkdir()
    sizes = {"hidden_size": 2**17, "intermediate_size": 2**19, "num_hidden_layers": 2, "vocab_size": 1000}
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "dtype": "bfloat16", **sizes}))
    save_file({}, folder / "model.safetensors")
    byte_tokenizer().save_pretrained(folder)
    done = lab.cli(f"model.path={folder}", "dtype=bfloat16", "dry_run=true", check=False)
    assert done.returncode == 1
    [row, _] = rows(done.stdout)
    assert row[1] == "does not fit"
    assert float(row[5]) > 1e18
    assert "does not fit: svdllm ratio=0.8 dtype=bfloat16 huge wikitext2: decomposition needs" in done.stdout
    assert not (lab.root / "records").exists()


def test_a_model_without_linears_to_compress_is_told_as_the_run_would(lab, medium, monkeypatch):
    monkeypatch.setattr(context, "sites_of", lambda *_: {})
    [cell] = lab.cells(f"model.path={medium}")
    for compute in (print_needs, lambda cells: runner.run(cells[0])):
        with pytest.raises(UserError, match=f"model {medium.name} has no compressible layer"):
            compute([cell])


def test_offloading_takes_the_hidden_states_out_of_what_must_fit_and_a_mapped_dtype_the_weights(lab, medium):
    held = {}
    for words in ((), ("calibration.offload=true",), ("dtype=bfloat16",)):
        [cell] = lab.cells(f"model.path={medium}", "calibration.samples=4096", *words)
        step = steps(cell)["calibration"]
        held[words] = step.host - step.mapped
    weights = steps(lab.cells(f"model.path={medium}")[0])["factorization"].mapped
    assert weights == 4 * sum(p.numel() for p in load_model(str(medium), None, "float32", False).parameters())
    states = 4096 * 32 * 96 * 4
    assert held[()] - held[("calibration.offload=true",)] == states
    assert held[("dtype=bfloat16",)] > held[()] - states / 2 + weights / 2 - 10**6


def test_hidden_states_in_files_must_fit_on_the_disk_while_they_are_there(lab, medium, monkeypatch, capsys):
    [cell] = lab.cells(f"model.path={medium}", "calibration.offload=true", "calibration.samples=4096")
    told = steps(cell)
    states, batch = 4096 * 32 * 96 * 4, 4 * 32 * 96 * 4
    assert told["calibration"].scratch == states + batch
    assert {step.scratch for name, step in told.items() if name != "calibration"} == {0}
    kept = sum(step.disk for step in told.values())
    assert kept < states / 2
    needed = told["calibration tokens"].disk + told["calibration"].disk + states + batch  # more than is kept
    for free, fits in ((needed, True), (needed - 1, False)):
        machine = Machine(PLENTY, 0, {lab.data_root.stat().st_dev: free})
        monkeypatch.setattr(Machine, "here", lambda _, machine=machine: machine)
        assert print_needs([cell]) is fits
    assert "does not fit: " in (printed := capsys.readouterr().out) and "the disk of artifacts=" in printed


def test_decompositions_count_what_the_solver_does_for_their_metric(lab, medium):
    """A vector needs no root and no product with C; a matrix a root by Cholesky, or, singular, by eigenvectors."""
    count = {
        words: steps(lab.cells(f"model.path={medium}", *words)[0])["decomposition"].flops
        for words in (
            ("method=svd",),
            ("method=asvd",),
            ("method=svdllm",),
            ("method=svdllm", "calibration.samples=2"),
        )
    }
    svd, asvd, regular, singular = count.values()
    wide = 2 * 2  # up and gate of two layers
    assert asvd == svd
    products = 2 * 2 * (2 * 96 * 96 * 96 + 2 * 48 * 96 * 96 + 2 * 208 * 96 * 96 + 96 * 208 * 208)
    assert regular == svd + products + wide * 96**3
    assert singular == regular + wide * 8 * 96**3


@pytest.mark.slow
def test_the_memory_it_tells_is_enough_and_at_most_twice_what_is_held(tmp_path):
    """By the benchmark: a model whose weights and hidden states outweigh what libraries take by the way."""
    benchmark = [sys.executable, str(REPOSITORY / "benchmarks" / "compression_memory.py")]
    environ = {**os.environ, "PYTHONPATH": str(REPOSITORY), "MALLOC_MMAP_THRESHOLD_": "65536"}
    subprocess.run([*benchmark, "build", "4", str(tmp_path)], check=True, env=environ)
    measure = [*benchmark, "measure", str(tmp_path), "False"]
    done = subprocess.run(measure, check=True, env=environ, stdout=subprocess.PIPE, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["resident"] <= found["told"] <= 2 * found["resident"], found
    assert found["resident"] <= 1.5 * found["must"], found


def test_pruning_and_allocations_that_train_are_said_to_be_not_estimated(lab, medium, capsys):
    for words in (["pruning=magnitude"], ["allocation=differentiable"]):
        [cell] = lab.cells(f"model.path={medium}", "eval.ppl.max_windows=1", *words)
        assert {name for name, step in steps(cell).items() if not step.known} <= {"pruning", "allocation"}
        assert print_needs([cell])
        printed = capsys.readouterr().out
        assert rows(printed)[0][2].startswith("≥ ") and "pruning" in printed.splitlines()[-1]
    for allocation in ("uniform", "loss_based", "global_tail"):
        [cell] = lab.cells(f"model.path={medium}", "eval.ppl.max_windows=1", f"allocation={allocation}")
        assert all(step.known for step in steps(cell).values())


def test_on_a_gpu_there_is_one_block_until_the_whole_model_is_evaluated(lab, medium):
    [cell] = lab.cells(f"model.path={medium}")
    cpu, gpu = steps(cell), steps(cell, on_gpu=True)
    shapes = shapes_of(cell)
    assert gpu["calibration"].device - gpu["eval.ppl"].device < cpu["calibration"].host
    work = cpu["calibration"].host - gpu["calibration"].host
    assert gpu["calibration"].device == 6 * 10**8 + 4 * shapes.block + work
    work = cpu["eval.ppl"].host - gpu["eval.ppl"].host
    assert gpu["eval.ppl"].device == 6 * 10**8 + 4 * shapes.parameters + work
