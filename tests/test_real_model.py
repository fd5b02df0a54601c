"""The embedded SmolLM2-135M on real text."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch.nn.functional import cross_entropy

from lowrank_lab.calibration.tokens import load_tokens
from lowrank_lab.lowrank.ranks import rank_for_ratio
from lowrank_lab.models.load import load_model
from lowrank_lab.records.results import Results
from lowrank_lab.reporting import tables
from tests.sites import site

from .conftest import REPOSITORY, mirror, run_on_mirror

REAL = ("model=smollm2", "dataset=wikipedia")


@pytest.mark.own_artifacts
@pytest.mark.timeout(540)
def test_svd_svdllm_and_the_dense_model(lab):
    """Ordered as they must be, and plain SVD equal to a truncation by torch.linalg.svd made here."""
    blocks = [0, 3]
    text = ("eval.ppl.seqlen=128", "eval.ppl.max_windows=3", "dataset.eval.max_documents=4")
    calibration = ("calibration.seqlen=128", "calibration.samples=12", "dataset.calibration.max_documents=12")
    small = (*REAL, *text, *calibration, f"targets.blocks={blocks}")
    values = {}
    for method in ("dense", "svdllm", "svd"):
        record = lab.run(*small, f"method={method}")
        values[method] = record["metrics"]["ppl"]["value"]
        assert record["sizes"]["kv_cache_bytes_per_token"] == 2 * 30 * 3 * 64 * 4
        assert record["sizes"]["sites"]["count"] == (0 if method == "dense" else 7 * len(blocks))
    assert 10 < values["dense"] < 40
    assert values["dense"] < values["svdllm"] < values["svd"] / 10

    [model_folder] = (lab.root / "artifacts" / "model").glob("[0-9a-f]*")
    [cell] = lab.cells(*small, "method=svd")
    ids, _ = load_tokens(cell.store.path("tokens", cell.keys.text_tokens("ppl")))
    model = load_model(str(model_folder), None, "float32", False)
    losses = []
    with torch.inference_mode():
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and any(f".{block}." in name for block in blocks):
                weight = module.weight.double()
                u, s, vh = torch.linalg.svd(weight, full_matrices=False)
                k = rank_for_ratio(site(*weight.shape), 0.8)
                module.weight.copy_((u[:, :k] * s[:k]) @ vh[:k])
        for window in torch.from_numpy(ids[: 3 * 128]).view(3, 128):
            losses.append(cross_entropy(model(window[None]).logits[0, :-1], window[1:]).item())
    assert values["svd"] == pytest.approx(math.exp(sum(losses) / 3), rel=2e-3)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_dense_perplexity_on_wikitext2(tmp_path):
    """23.48 on the first 20 windows of 1024 tokens of the official test split."""
    limits = ["eval.ppl.seqlen=1024", "eval.ppl.max_windows=20"]
    record = run_on_mirror(tmp_path, mirror(), "method=dense", "model=smollm2", "dataset=wikitext2", *limits)
    assert record["metrics"]["ppl"]["value"] == pytest.approx(23.48, abs=0.02)
    assert record["metrics"]["ppl"]["protocol"]["windows"] == 20


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killing_the_demo_in_the_middle_changes_nothing(tmp_path):
    """kill -9 during a statistics pass and again during an evaluation; the table is the undisturbed one."""

    def grid(root) -> list[str]:
        return [
            sys.executable,
            "run.py",
            "-m",
            "experiment=demo",
            "eval.ppl.max_windows=4",
            f"results={root}",
        ]

    def killed_when(root, condition) -> None:
        process = subprocess.Popen(grid(root), cwd=REPOSITORY, start_new_session=True)
        while not condition() and process.poll() is None:
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    killed = tmp_path / "killed"
    killed_when(killed, lambda: list(killed.glob("artifacts/statistics/.*.tmp-*/block_005*")))
    killed_when(killed, lambda: len(list(killed.glob("records/*.json"))) >= 5)
    assert 5 <= len(Results(killed).records()) < 7
    subprocess.run(grid(killed), cwd=REPOSITORY, check=True)
    shutil.copytree(killed / "artifacts" / "model", tmp_path / "undisturbed" / "artifacts" / "model")
    subprocess.run(grid(tmp_path / "undisturbed"), cwd=REPOSITORY, check=True)

    def numbers(root) -> str:
        rows = tables.comparison(Results(root).records())
        return rows.drop(columns=["compression_seconds", "evaluation_seconds"]).to_csv()

    assert numbers(killed) == numbers(tmp_path / "undisturbed")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_memory_of_the_statistics_pass_does_not_grow_with_depth():
    done = subprocess.run(
        [sys.executable, "benchmarks/statistics_memory.py"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout)["ratio_16_to_4_layers"] == pytest.approx(1, abs=0.1)
