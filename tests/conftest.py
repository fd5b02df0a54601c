"""A small lab for tests: tiny models, a small text in the mirror's layout, a results folder of its own."""

from __future__ import annotations

import gc
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may need a network
os.environ["WANDB_ERROR_REPORTING"] = "false"

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowrank_lab.cells import grid
from lowrank_lab.cells.cell import Cell
from lowrank_lab.models import tiny
from lowrank_lab.models.load import load_model
from lowrank_lab.models.vision_families import VISION_FAMILIES
from lowrank_lab.process.garbage import collect_rarely
from lowrank_lab.records.results import Results
from lowrank_lab.running import runner

from .composed import composed, map_choices_where_needed, parse_yaml_once
from .forked import REPOSITORY, Forks

SMALL = (
    "eval.ppl.seqlen=32",
    "eval.ppl.max_windows=6",
    "calibration.seqlen=32",
    "calibration.samples=12",
)


FORKS = Forks()
parse_yaml_once()
map_choices_where_needed()
collect_rarely()


def pytest_collection_finish() -> None:
    """What is imported and collected stays to the end: do not look through it again at every collection."""
    gc.collect()
    gc.freeze()


@dataclass(frozen=True)
class Lab:
    """A results folder, and the folder of its artifacts where they are not in it."""

    root: Path
    data_root: Path
    artifacts: Path | None = None

    @property
    def results(self) -> Results:
        return Results(self.root)

    def overrides(self, *overrides: str) -> list[str]:
        base = ["model=tiny", "dataset=wikitext2", f"data_root={self.data_root}", f"results={self.root}"]
        if self.artifacts is not None:
            base.append(f"artifacts={self.artifacts}")
        return [*base, *SMALL, *overrides]

    def cells(self, *overrides: str, multirun: bool = False) -> list[Cell]:
        return planned(self.overrides(*overrides), multirun)

    def run(self, *overrides: str) -> dict[str, Any]:
        """Run one cell in this process; returns its record."""
        [cell] = self.cells(*overrides)
        return runner.run(cell)

    def command(self, *overrides: str) -> list[str]:
        return [sys.executable, "run.py", *self.overrides(*overrides)]

    def cli(self, *overrides: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run run.py as a user does, in a process of its own."""
        done = FORKS.run("run.py", *self.overrides(*overrides))
        assert not check or done.returncode == 0, done.stderr
        return done


def planned(overrides: list[str], multirun: bool = False) -> list[Cell]:
    """The cells of a command line; what is no grid is composed out of what the session has composed before."""
    if multirun:
        return grid.plan(REPOSITORY / "conf", "config", overrides, True)
    with patch.object(grid, "compose", composed):
        return grid.plan(REPOSITORY / "conf", "config", overrides, False)


def mirror() -> str:
    """The mirror of the real data sets, for slow tests; skips the test where there is none."""
    if not (folder := os.environ.get("LOWRANK_LAB_DATA")):
        pytest.skip("set LOWRANK_LAB_DATA to a mirror of the data sets")
    return folder


def run_on_mirror(root: Path, data_root: str, *overrides: str) -> dict[str, Any]:
    """The record of one job through run.py, as a user runs it, with its results in ``root``."""
    command = [sys.executable, "run.py", *overrides, f"data_root={data_root}", f"results={root}"]
    subprocess.run(command, cwd=REPOSITORY, check=True)
    [record] = Results(root).records()
    return record


def broken_checkpoint(folder: Path) -> Path:
    """A tiny model one of whose weights is not a number, so that to compress it fails."""
    folder.mkdir()
    tiny.build("llama", folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def load_lively(folder: Path, weights: float, bias: float) -> Any:
    """The tiny model in ``folder`` with its matrices times ``weights``, so that they matter to its outputs, and all
    biases set to ``bias``."""
    model = load_model(str(folder), None, "float32", False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.fill_(bias)
            elif parameter.ndim == 2:
                parameter.mul_(weights)
    return model


@pytest.fixture(scope="session")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mirror with a WikiText-2 of a few thousand words: training and test splits that differ."""
    root = tmp_path_factory.mktemp("data")
    folder = root / "wikitext" / "wikitext-2-raw-v1"
    folder.mkdir(parents=True)
    words = [
        "the",
        "a",
        "of",
        "rank",
        "value",
        "matrix",
        "error",
        "model",
        "text",
        "small",
        "large",
        "first",
        "low",
        "high",
        "sum",
        "square",
    ]
    for seed, split in enumerate(("train", "validation", "test")):
        generator = random.Random(seed)
        rows = [" ".join(generator.choices(words, k=12)) + ".\n" for _ in range(60)]
        (folder / f"{split}.jsonl").write_text(
            "".join(json.dumps({"text": row, "other": row}) + "\n" for row in rows)
        )
    return root


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint folder of every tiny family."""
    folders = {}
    for family in tiny.CONFIGS:
        folders[family] = tmp_path_factory.mktemp(family)
        tiny.build(family, folders[family])
    return folders


@pytest.fixture(scope="session")
def vision_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint folder of every family of tiny image classifiers."""
    folders = {family: tmp_path_factory.mktemp(family) for family in VISION_FAMILIES}
    for family, folder in folders.items():
        tiny.build(family, folder)
    return folders


@contextmanager
def stopped_at_block_one(monkeypatch: pytest.MonkeyPatch, module: ModuleType) -> Iterator[None]:
    """Expect the body to be interrupted when it comes to ``module.save_factors`` of block 1."""
    save = module.save_factors

    def stop(folder: Path, index: int, factors: Any) -> None:
        if index == 1:
            raise KeyboardInterrupt
        save(folder, index, factors)

    with monkeypatch.context() as patch:
        patch.setattr(module, "save_factors", stop)
        with pytest.raises(KeyboardInterrupt):
            yield


@pytest.fixture(scope="session", autouse=True)
def forks() -> Iterator[None]:
    yield
    FORKS.stop()


@pytest.fixture(scope="session")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The artifacts of all labs that have none of their own."""
    return tmp_path_factory.mktemp("artifacts")


@pytest.fixture
def lab(request: pytest.FixtureRequest, tmp_path: Path, data_root: Path, artifacts: Path) -> Lab:
    """A results folder of its own, with the session's artifacts.

    A test that looks at them, or changes how they are made, is marked ``own_artifacts``: its lab has its own.
    """
    own = request.node.get_closest_marker("own_artifacts") is not None
    return Lab(tmp_path / "results", data_root, None if own else artifacts)


@pytest.fixture(scope="session")
def grid_lab(tmp_path_factory: pytest.TempPathFactory, data_root: Path) -> Lab:
    """A lab in which a grid of three methods and two ratios has run once, through the command line."""
    lab = Lab(tmp_path_factory.mktemp("grid") / "results", data_root)
    lab.cli("-m", "method=dense,svd,asvd,svdllm", "ratio=0.8,0.6")
    return lab
