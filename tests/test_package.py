"""The wheel in an empty environment: its two commands run from any folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from .forked import REPOSITORY


def run(*words: str | Path, cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([str(word) for word in words], cwd=cwd, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_wheel_runs_a_cell_and_a_report(tmp_path, data_root):
    """Installs everything the wheel asks for, with the constraints: minutes."""
    source = tmp_path / "source"  # building leaves a folder beside the code
    shutil.copytree(REPOSITORY, source, ignore=shutil.ignore_patterns(".*", "results", "build", "_build"))
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    run(*pip, "wheel", "--no-deps", "-w", tmp_path, source, cwd=tmp_path)
    [wheel] = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    options = {str(file.relative_to(REPOSITORY)) for file in (REPOSITORY / "conf").rglob("*.yaml")}
    assert {f"lowrank_lab/{option}" for option in options} <= set(names)
    run(sys.executable, "-m", "venv", tmp_path / "new", cwd=tmp_path)
    binaries = tmp_path / "new" / "bin"
    pinned = ["-c", REPOSITORY / "constraints.txt", f"lowrank_lab[embedded] @ {wheel.as_uri()}"]
    run(binaries / "python", "-m", "pip", "-q", "--disable-pip-version-check", "install", *pinned, cwd=tmp_path)
    folder = tmp_path / "anywhere"
    folder.mkdir()
    small = ["eval.ppl.seqlen=32", "eval.ppl.max_windows=4", "calibration.samples=4", "calibration.seqlen=32"]
    text = ["dataset=wikitext2", f"data_root={data_root}"]
    run(binaries / "lowrank-lab", "run", "-m", "model=tiny", "method=dense,svd", *text, *small, cwd=folder)
    assert len(list((folder / "results" / "records").glob("*.json"))) == 2
    assert "perplexity" in run(binaries / "lowrank-lab", "report", cwd=folder)
    local = ["ratio=0.6", "hydra/launcher=local", "hydra.launcher.workers=1"]
    run(binaries / "lowrank-lab", "run", "-m", "model=tiny", "method=svd", *local, *text, *small, cwd=folder)
    assert len(list((folder / "results" / "records").glob("*.json"))) == 3
