"""Evaluators that give the dense model other ranks: all activations truncated at once, and some ranks moved."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lowrank_lab.basics.errors import SkippedCell
from lowrank_lab.evaluation.perturbed_ranks import PerturbedRanks, draw, shifted
from lowrank_lab.lowrank.allocation.strs import perplexity_of
from lowrank_lab.models.families import FAMILIES
from lowrank_lab.records.results import Record
from lowrank_lab.reporting import published
from lowrank_lab.reporting.joined import join
from lowrank_lab.running import runner
from lowrank_lab.running.context import Context, pick_device
from tests.sites import sites_in

from .conftest import Lab, load_lively, planned


@pytest.fixture(scope="module")
def lively(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose perplexity depends on its weights."""
    folder = tmp_path_factory.mktemp("lively") / "model"
    model = load_lively(checkpoints["llama"], weights=4, bias=0.0)
    model.save_pretrained(folder)
    for file in checkpoints["llama"].glob("*token*"):
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.fixture(scope="module")
def table_lab(tmp_path_factory: pytest.TempPathFactory, data_root: Path) -> Lab:
    return Lab(tmp_path_factory.mktemp("tables") / "results", data_root)


def recipe(lab: Lab, *words: str) -> tuple[list[dict[str, Any]], Context]:
    """The records of a recipe, run as a grid, and a context of its last cell with its dense model."""
    small = ("calibration.seqlen=32", "calibration.samples=12")
    cells = planned(["model=tiny", f"data_root={lab.data_root}", f"results={lab.root}", *small, *words], True)
    lab.results.write_grid(list(words), cells)
    records = [runner.run(cell) for cell in cells]
    return records, Context(cells[-1], Record(cells[-1], None), pick_device("cpu"))


def windows_of(context: Context, evaluator: str) -> torch.Tensor:
    context.evaluator = evaluator
    context.make_text_tokens()
    windows, _ = context.cell.evaluators[evaluator].windows(context)
    return windows


def best_of_rank(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    u, s, vt = torch.linalg.svd(matrix.double(), full_matrices=False)
    return ((u[:, :rank] * s[:rank]) @ vt[:rank]).to(matrix)


def test_activations_of_all_linears_are_truncated_to_the_ranks_of_the_weights(table_lab: Lab, lively: Path):
    """Dobi-SVD's Table 1 by hand: a hook on every linear; and our numbers stand in its two rows."""
    small = ("eval.truncated_activations.seqlen=32", "eval.truncated_activations.max_windows=2")
    of_weights = ("eval.wikitext2.seqlen=32", "eval.wikitext2.max_windows=2")
    words = ("experiment=dobi_table1", f"model.path={lively}", "ratio=1,0.4", *small, *of_weights)
    (whole, record), context = recipe(table_lab, *words)
    measured = record["metrics"]["truncated_activations"]

    windows, model = windows_of(context, "truncated_activations"), context.model
    for name, rank in record["compressions"]["lowrank"]["plan"].items():

        def truncate(_linear: Any, _inputs: Any, output: torch.Tensor, rank: int = rank) -> torch.Tensor:
            return best_of_rank(output[0], rank).unsqueeze(0)

        model.get_submodule(name).register_forward_hook(truncate)
    with torch.no_grad():
        losses = [model(window, labels=window, use_cache=False).loss.item() for window in windows.split(1)]
    assert measured["value"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)

    of_weight = record["metrics"]["wikitext2"]["value"]
    dense = whole["metrics"]["wikitext2"]["value"]
    assert measured["dense"] == pytest.approx(dense, rel=1e-6)
    assert whole["metrics"]["truncated_activations"]["value"] == pytest.approx(dense, rel=1e-6)
    assert abs(math.log(measured["value"] / dense)) > 5e-3  # none of the three could be taken for another
    assert abs(math.log(measured["value"] / of_weight)) > 5e-3

    rows = join(published.load("dobi/table1"), table_lab.results)
    rows = rows[rows["published"] != ""].set_index(["method", "ratio"])
    assert rows.loc[("activation_truncation", "0.4"), "ours"] == measured["value"]
    assert rows.loc[("svd", "0.4"), "ours"] == of_weight
    assert rows.loc[("activation_truncation", "1"), "ours"] == pytest.approx(dense, rel=1e-6)
    assert "2 of " in rows.loc[("activation_truncation", "0.4"), "differs"]
    assert rows.loc[("activation_truncation", "0.6"), "status"] == "missing"


def test_moved_ranks_are_measured_as_the_cell_would_be_with_them(table_lab: Lab, lively: Path):
    """Dobi-SVD's Table 10: the sum of all ranks stays, and our rises stand in its rows, in percent."""
    small = [
        f"eval.{name}.{what}"
        for name in ("perturbed_ranks", "wikitext2")
        for what in ("seqlen=32", "max_windows=4")
    ]
    words = ["experiment=dobi_table10", f"model.path={lively}", "method=dobi_noremap", "allocation.steps=2", *small]
    [record], context = recipe(table_lab, *words, "eval.perturbed_ranks.shifts=[1,5]")
    measured, plan = record["metrics"]["perturbed_ranks"], record["compressions"]["lowrank"]["plan"]
    assert len(set(measured["raised"])) == len(set(measured["lowered"])) == 5
    assert not set(measured["raised"]) & set(measured["lowered"])
    moved = shifted(plan, measured["raised"], measured["lowered"], 5)
    assert sum(moved.values()) == sum(plan.values())
    assert sorted(moved[name] - plan[name] for name in plan) == [-5] * 5 + [0] * (len(plan) - 10) + [5] * 5

    unmoved, _, by_five = measured["perplexity"]
    assert unmoved == pytest.approx(record["metrics"]["wikitext2"]["value"], rel=1e-6)
    windows = windows_of(context, "perturbed_ranks")
    assert by_five == pytest.approx(perplexity_of(context, moved, windows.split(1)), rel=1e-5)
    assert measured["value"] == measured["rises"][-1] == pytest.approx(by_five / unmoved - 1)
    assert abs(measured["value"]) > 1e-3

    frame = join(replace(published.load("dobi/table10"), also={"dobi": "dobi_noremap"}), table_lab.results)
    rows = frame[frame["published"] != ""].set_index("variant")
    assert list(rows.loc[["shift=0", "shift=1", "shift=5"], "ours"]) == pytest.approx(
        [0, *(100 * rise for rise in measured["rises"])]
    )
    assert "windows of 32 tokens" in rows.loc["shift=5", "differs"]
    assert rows.loc["shift=50", "status"] == "not measured"


def test_only_linears_that_can_move_are_drawn(checkpoints):
    sites = sites_in(load_lively(checkpoints["llama"], weights=1, bias=0.0), FAMILIES["llama"].tower)
    ranks = dict.fromkeys(sites)
    names = list(sites)
    ranks |= {names[0]: 1, names[1]: 1, names[2]: sites[names[2]].full, names[3]: sites[names[3]].full}
    for seed in range(5):
        raised, lowered = draw(sites, ranks, 4, 3, seed)
        assert (set(raised), set(lowered)) == (set(names[:2]), set(names[2:4]))
    with pytest.raises(SkippedCell, match="fewer than 6 linears"):
        draw(sites, ranks, 6, 3, 0)


@pytest.mark.parametrize(
    "change", [{"linears": 5}, {"linears": 0}, {"shifts": []}, {"shifts": [0]}, {"seed": -1}], ids=str
)
def test_values_out_of_range_are_rejected(change):
    good: dict[str, Any] = {"seqlen": 16, "max_windows": None, "bos": "text", "batch_size": 1}
    good |= {"linears": 4, "shifts": [1, 2], "seed": 0}
    PerturbedRanks(**good)
    with pytest.raises(ValueError, match=next(iter(change))):
        PerturbedRanks(**{**good, **change})


def test_cells_whose_model_is_more_than_ranks_are_left_out(lab):
    asked = "eval=[ppl,truncated_activations,perturbed_ranks]"
    pruned = lab.run("method=svd", "pruning=magnitude", asked)
    assert set(pruned["left_out"]) == {"truncated_activations", "perturbed_ranks"}
    refined = lab.run(
        "method=svd",
        "refinement=weighted_descent",
        "refinement.steps=1",
        asked,
        "eval.truncated_activations.seqlen=16",
    )
    assert set(refined["left_out"]) == {"perturbed_ranks"}
