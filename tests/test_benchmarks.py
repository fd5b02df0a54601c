"""The benchmarks run, at a tiny size, and print what they say they print. No timing is asserted."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from .conftest import REPOSITORY, SMALL


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run a benchmark with some arguments and constants of its own; returns the JSON lines that it prints."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))

    def run(name: str, arguments: list[str], **constants: Any) -> list[dict[str, Any]]:
        module = importlib.import_module(name)
        for constant, value in constants.items():
            monkeypatch.setattr(module, constant, value)
        module.main(arguments)
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    return run


def test_statistics_time(lines):
    sizes = {"hidden": 64, "intermediate": 96, "layers": 1, "vocabulary": 50, "samples": 2, "seqlen": 16}
    [line] = lines("statistics_time", [f"--{name}={size}" for name, size in sizes.items()])
    assert line["over_blocks"] == pytest.approx(line["statistics"] / line["blocks"], rel=0.02)
    assert line["over_logits"] == pytest.approx(line["statistics"] / line["logits"], rel=0.02)


def test_solver_speed(lines):
    *shapes, total = lines("solver_speed", ["--scale", "0.01"])
    assert [(line["out"], line["in"]) for line in shapes] == [(41, 41), (110, 41), (41, 110)]
    assert total["ours"] == pytest.approx(sum(line["ours"] for line in shapes), rel=0.02)
    for line in (*shapes, total):
        assert line["3_svd_float64_over_ours"] == pytest.approx(3 * line["svd_float64"] / line["ours"], rel=0.02)


def test_factorized_forward(lines):
    found = lines("factorized_forward", ["--scale", "0.01", "--repeats", "1"])
    assert {(line["ratio"], line["tokens"]) for line in found} == {
        (ratio, tokens) for ratio in (0.8, 0.6, 0.4) for tokens in ("prefill", "decode")
    }
    square = next(line for line in found if line["out"] == line["in"] == 576)  # rank 230 of 288 that break even
    ideal = square["dense"] * 230 / 288
    assert square["over_ideal"] == pytest.approx(square["factorized"] / ideal, rel=0.02)


@pytest.mark.slow
def test_grid_overhead(lines, data_root):
    words = ["model=tiny", "dataset=wikitext2", f"data_root={data_root}", *SMALL]
    *cells, measured, stages = lines("grid_overhead", words, METHODS=("svd", "svdllm"), RATIOS=(0.8, 0.6))
    assert len(cells) == 4
    assert measured["grid"] == pytest.approx(sum(cell["seconds"] for cell in cells), rel=0.02)
    assert measured["ratio"] == pytest.approx(measured["grid"] / measured["unavoidable"], rel=0.02)
    assert {"calibration", "decomposition", "eval.ppl"} <= stages["shares"].keys()


@pytest.mark.slow
def test_startup(lines, data_root):
    cell = ("model=tiny", "method=dense", "dataset=wikitext2", f"data_root={data_root}", *SMALL)
    grids = {"small": ("method=svd,asvd", "ratio=0.8,0.6", "dataset=wikitext2", f"data_root={data_root}")}
    finished, planned = lines("startup", ["--repeats", "1"], CELL=cell, GRIDS=grids)
    over = finished["finished_cell"] / finished["import_hydra"]
    assert finished["over_import_hydra"] == pytest.approx(over, rel=0.02)
    assert planned["cells"] == 4


def test_gpu_llama7b_on_the_cpu(lines, tmp_path: Path, data_root):
    sizes = ["--device", "cpu", "--layers", "1", "--hidden", "128", "--intermediate", "160"]
    words = ["dataset=wikitext2", f"data_root={data_root}", *SMALL]
    *ratios, total = lines("gpu_llama7b", [str(tmp_path / "model"), *sizes, *words])
    assert [line["ratio"] for line in ratios] == [0.8, 0.6, 0.4]
    assert "decomposition" in ratios[0]["minutes"]
    assert "decomposition" not in ratios[1]["minutes"]
    assert total["longest"] in total["minutes"]
