"""The notebooks: without outputs in git, executed on tiny runs, and one line where there is nothing to read."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from lowrank_lab.records.results import Results
from lowrank_lab.reporting import ranks

from .conftest import REPOSITORY

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
AsyncKernelManager = pytest.importorskip("jupyter_client").AsyncKernelManager

NOTEBOOKS = sorted((REPOSITORY / "notebooks").glob("*.ipynb"))
NAMES = [notebook.stem for notebook in NOTEBOOKS]
READERS = ["compare_methods", "ranks_and_spectra"]  # these have nothing to show without records


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str, Path], Any]]:
    """Executes a notebook on a results folder. All share a kernel, which has torch then, but no names."""
    home = tmp_path_factory.mktemp("home")
    kernel = AsyncKernelManager()
    with pytest.MonkeyPatch.context() as patch:  # it imports this repository, and writes nothing to the user's home
        patch.setenv("PYTHONPATH", str(REPOSITORY))
        for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_DATA_DIR", "JUPYTER_CONFIG_DIR"):
            patch.setenv(name, str(home / name))
        yield partial(_executed, kernel)
        nbclient.util.run_sync(kernel.shutdown_kernel)(now=True)


def _executed(kernel: AsyncKernelManager, name: str, results: Path) -> Any:
    """The notebook with its outputs. A cell that raises ends it, as "run all" does."""
    file = REPOSITORY / "notebooks" / f"{name}.ipynb"
    notebook = nbformat.read(file, as_version=4)
    given = {"LOWRANK_LAB_RESULTS": str(results), "LOWRANK_LAB_MODEL": "tiny:llama"}
    begin = f"%reset -f\nimport os\nos.environ.update({given})"
    notebook.cells.insert(0, nbformat.v4.new_code_cell(begin))
    folder = {"metadata": {"path": str(file.parent)}}
    client = nbclient.NotebookClient(notebook, km=kernel, timeout=240, resources=folder)
    try:
        client.execute()
    except nbclient.exceptions.CellExecutionError as error:
        if error.ename != "UserError":
            raise
    return notebook


def outputs(notebook: Any) -> list[Any]:
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def shown(notebook: Any) -> str:
    """All that is printed or displayed, as text; tables with a style have HTML alone."""
    texts = [output.get("text", "") for output in outputs(notebook)]
    data = [output.get("data", {}) for output in outputs(notebook)]
    return "\n".join([*texts, *(d.get("text/html", d.get("text/plain", "")) for d in data)])


def errors(notebook: Any) -> list[Any]:
    return [output for output in outputs(notebook) if output.output_type == "error"]


def images(notebook: Any) -> int:
    return sum("image/png" in output.get("data", {}) for output in outputs(notebook))


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=NAMES)
def test_git_keeps_no_outputs(notebook):
    cells = nbformat.read(notebook, as_version=4).cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    assert code and all(cell.outputs == [] and cell.execution_count is None for cell in code)
    assert all(not cell.metadata for cell in cells)


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_an_empty_folder_ends_with_one_line(name, tmp_path, executed):
    empty = tmp_path / "results"
    notebook = executed(name, empty)
    [error] = errors(notebook)
    assert error.traceback == [f"error: no records in {empty}; run something first: make demo"]
    assert not shown(notebook).strip()


def test_methods_are_compared(grid_lab, executed):
    notebook = executed("compare_methods", grid_lab.root)
    assert not errors(notebook)
    assert images(notebook) == 1
    [best] = [r for r in grid_lab.results.records() if r["method"] == "svdllm" and r["ratio"] == 0.8]
    assert f"{best['metrics']['ppl']['value']:.4g}" in shown(notebook)


@pytest.mark.slow
def test_seeds_are_averaged(lab, executed):
    values = [lab.run("method=svdllm", f"seed={seed}")["metrics"]["ppl"]["value"] for seed in (0, 1)]
    assert values[0] != values[1]
    text = shown(executed("compare_methods", lab.root))
    last = re.sub(r"\s+", " ", re.sub("<[^>]*>", " ", text[text.rindex("<thead") :]))
    assert f"svdllm 0.8 {pd.Series(values).mean():.4g} {pd.Series(values).std():.2g} 2" in last


def test_ranks_and_spectra_are_shown(grid_lab, executed):
    notebook = executed("ranks_and_spectra", grid_lab.root)
    assert not errors(notebook)
    assert images(notebook) == 2
    assert "21 spectra" in shown(notebook)


@pytest.mark.slow
def test_where_artifacts_are_gone_one_line_says_what_to_run(grid_lab, tmp_path, executed):
    shutil.copytree(grid_lab.root / "records", tmp_path / "results" / "records")
    results = Results(tmp_path / "results")
    for record in results.records():
        record["config"]["artifacts"] = str(tmp_path / "gone")
        record["command"] = ["run.py", "-m", "model=tiny"]  # other tests add cells to this grid without a command
        results.write(record)
    notebook = executed("ranks_and_spectra", tmp_path / "results")
    [error] = errors(notebook)
    [line] = error.traceback
    assert "not on this machine; to have them, move" in line
    assert "run.py -m model=tiny" in line
    assert images(notebook) == 1  # the ranks need the record alone


def test_an_own_method_joins_a_papers_table(grid_lab, executed):
    notebook = executed("to_your_table", grid_lab.root)
    assert not errors(notebook)
    text = shown(notebook)
    records = {(r["method"], r["ratio"]): r for r in grid_lab.results.records()}
    own = records["svdllm", 0.8]["metrics"]["ppl"]["value"]
    assert re.search(rf"0.8 & SVD-LLM[^&]* & ours & .*{own:.4g}", text)
    assert "5.68" in text  # the published dense model
    assert r"\toprule" in text
    assert "model tiny-llama; 6 of" in text


@pytest.mark.slow
def test_without_records_a_papers_table_has_the_published_numbers(tmp_path, executed):
    notebook = executed("to_your_table", tmp_path / "none")
    assert not errors(notebook)
    text = shown(notebook)
    assert "so published numbers alone are shown" in text
    assert "5.68" in text
    assert r"\toprule" in text


def test_a_model_is_compressed_and_measured_from_nothing(tmp_path, executed):
    notebook = executed("start_here", tmp_path)
    assert not errors(notebook)
    values = {r["method"]: r["metrics"]["ppl"]["value"] for r in Results(tmp_path).records() if r["metrics"]}
    assert f"'dense': {values['dense']:.2f}" in shown(notebook)


def test_weights_add_up_to_those_of_the_record(grid_lab):
    """Counted by shape and rank here, on the tensors there."""
    for record in grid_lab.results.records():
        if "lowrank" in record["compressions"]:
            table = ranks.weights_and_bytes(record, ranks.sites(record, grid_lab.results))
            assert table["weights"].sum() == record["sizes"]["sites"]["parameters"]
            assert table["dense"].sum() == record["sizes"]["sites"]["parameters_dense"]
            assert (table["bytes"] == 4 * table["weights"]).all()  # float32


def test_a_spectrum_is_that_of_the_weight(grid_lab):
    """Of plain SVD: the singular values of the matrix, and the error of its truncation."""
    from lowrank_lab.models.load import load_model

    results = grid_lab.results
    [record] = [r for r in results.records() if r["method"] == "svd" and r["ratio"] == 0.8]
    folder = ranks.artifact(record, "decomposition", results).path
    location = ranks.artifact(record, "model conversion", results).path
    model = load_model(str(location), None, "float32", False)
    for name, site in ranks.sites(record, results).items():
        weight = model.get_submodule(name).weight.detach().double()
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        curve = ranks.spectrum(folder, site)
        assert len(curve) == site.full + 1
        assert curve["singular_value"][1:].to_numpy() == pytest.approx((values / values[0]).numpy(), abs=1e-5)
        truncated = left[:, :3] * values[:3] @ right[:3]
        assert curve["tail_error"][3] == pytest.approx(float((weight - truncated).norm() / weight.norm()), rel=1e-4)
