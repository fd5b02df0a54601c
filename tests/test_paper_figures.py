"""The papers' figures, from records of real runs of their recipes on a tiny model."""

from __future__ import annotations

import copy
import io
import json
import math
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from matplotlib import pyplot as plt
from safetensors.torch import load_file

from lowrank_lab.basics.errors import SkippedCell, UserError
from lowrank_lab.cells.cell import Cell
from lowrank_lab.evaluation.factors import distribution
from lowrank_lab.evaluation.ipca_memory import WAYS, directions
from lowrank_lab.evaluation.tensor_memory import peak_bytes
from lowrank_lab.lowrank.allocation.strs import perplexity_of
from lowrank_lab.lowrank.keys import LowRankKeys
from lowrank_lab.lowrank.ranks import budget, fit
from lowrank_lab.records.results import Record
from lowrank_lab.reporting.paper_figures import PAPER_FIGURES
from lowrank_lab.running import runner
from lowrank_lab.running.context import Context, pick_device

from .conftest import Lab

# What a recipe needs beside conftest's settings to suit a model of 3 blocks and a text of a few thousand bytes.
SMALLER = {
    "dobi_figure3_left": ("scale.rank_training.steps=8",),
    "dobi_figure3_middle": (
        "allocation.learning_rate=0.5",
        "batches_of.small.large={batch_size: 12, steps: 2}",
        "batches_of.small.small={batch_size: 2, steps: 12}",
    ),
    "dobi_figure3_right": ("eval.ipca_memory.widths=[16,32,64]",),
    "dobi_figure4": (
        "allocation.steps=4",
        "eval.speed.batch_sizes=[3,1,2]",
        "eval.speed.seqlens=[8,12,16]",
        "eval.speed.repeats=2",
        "eval.speed.new_tokens=2",
    ),
    "dobi_figure5": ("allocation.steps=4",),
    "dobi_figure11": ("eval.truncation.seqlen=64",),
    "dobi_figure8": (
        "scale.rank_training.steps=40",
        "eval.learned_ranks.seqlen=32",
        "eval.learned_ranks.max_windows=6",
        "allocation.learning_rate=0.3",
    ),
}
Run = Callable[..., list[dict[str, Any]]]


@pytest.fixture(scope="module")
def paper_lab(tmp_path_factory: pytest.TempPathFactory, data_root: Path) -> Lab:
    return Lab(tmp_path_factory.mktemp("papers") / "results", data_root)


@pytest.fixture(scope="module")
def run(paper_lab: Lab) -> Run:
    """The records of a recipe, run once."""

    @cache
    def run(recipe: str, *overrides: str) -> list[dict[str, Any]]:
        overrides = (f"experiment={recipe}", *SMALLER.get(recipe, ()), *overrides)
        cells = paper_lab.cells(*overrides, multirun=True)
        return [runner.run(c) for c in cells]

    return run


def context_of(lab: Lab, *overrides: str) -> Context:
    """The dense model and the artifacts of one cell."""
    [cell] = lab.cells(*overrides)
    return Context(cell, Record(cell, None), pick_device("cpu"))


def png(figure: plt.Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=50, metadata={"Software": None})
    plt.close(figure)
    return file.getvalue()


def without_entries(record: dict[str, Any]) -> dict[str, Any]:
    """A record as it was written before figures were made of it, and without measurements."""
    old = copy.deepcopy(record)
    old["metrics"] = {}
    if "lowrank" in old["compressions"]:
        found = old["compressions"]["lowrank"]
        old["compressions"]["lowrank"] = {name: found[name] for name in ("plan", "squared_error")}
    return old


OF_TEXT = [name for name in PAPER_FIGURES if not name.startswith("slides/")]  # test_comcat.py has that of images
TRAINED = ("dobi/figure3_left", "dobi/figure3_middle", "dobi/figure4", "dobi/figure7")  # of trainings and speeds


SOME_SLOW = [pytest.param(name, marks=pytest.mark.slow if name in TRAINED else ()) for name in OF_TEXT]


@pytest.mark.parametrize("name", SOME_SLOW)
def test_a_figure_is_made_of_its_data_alone(name: str, run: Run):
    """Its data comes out the same whatever the order of the records, and as a CSV gives the same picture."""
    figure = PAPER_FIGURES[name]
    records = run(figure.recipe)
    assert all(record["status"] == "done" for record in records)
    frame = figure.data(records)
    csv = frame.to_csv(index=False)
    assert len(frame) > 0
    assert figure.data(records[::-1]).to_csv(index=False) == csv
    again = pd.read_csv(io.StringIO(csv))
    assert list(again.columns) == list(frame.columns)
    assert png(figure.draw(again)) == png(figure.draw(frame))


@pytest.mark.parametrize("name", SOME_SLOW)
def test_records_without_its_data_give_an_empty_frame(name: str, run: Run):
    figure = PAPER_FIGURES[name]
    records = run(figure.recipe)
    of_old = figure.data([without_entries(record) for record in records])
    failed = [{**record, "status": "failed"} for record in records]
    assert of_old.empty
    assert figure.data([]).empty
    assert figure.data(failed).empty
    assert list(of_old.columns) == list(figure.data(records).columns)


def test_sensitivities_are_those_that_strs_measured(paper_lab: Lab, run: Run):
    """Of every linear at every candidate; at least one of them is a perplexity computed here by hand."""
    [record] = run("asvd_figure4")
    frame = PAPER_FIGURES["asvd/figure4"].data([record])
    context = context_of(paper_lab, "experiment=asvd_figure4")
    assert len(frame) == sum(len(found) for found in record["compressions"]["lowrank"]["sensitivities"].values())
    assert set(zip(frame["block"], frame["linear"], strict=True)) == {
        (s.block, s.key) for s in context.sites.values()
    }
    sites = {(site.block, site.key): name for name, site in context.sites.items()}
    for _, row in frame.iloc[[0, 50, 188]].iterrows():
        name = sites[row["block"], row["linear"]]
        site = context.sites[name]
        assert row["ratio"] == pytest.approx(row["rank"] * (site.out + site.inp) / (site.out * site.inp))
        ranks = {**dict.fromkeys(context.sites), name: row["rank"]}
        by_hand = perplexity_of(context, ranks, [context.calibration_ids[:1]])
        assert row["perplexity"] == pytest.approx(by_hand, rel=1e-5)
        assert math.log(row["perplexity"]) == pytest.approx(
            record["compressions"]["lowrank"]["sensitivities"][name][str(row["rank"])]
        )


def test_perplexity_by_ratio_begins_with_the_dense_model(run: Run):
    records = run("asvd_figure5")
    frame = PAPER_FIGURES["asvd/figure5"].data(records)
    of_records = {record["ratio"]: record["metrics"]["ppl"]["value"] for record in records}
    assert list(frame["ratio"]) == [0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 1.0]  # the dense model once
    assert dict(zip(frame["ratio"], frame["perplexity"], strict=True)) == of_records


def test_what_is_kept_of_the_parts_adds_up_to_the_ratio_reached(run: Run):
    records = [record for record in run("asvd_figure5") if record["method"] == "asvd"]
    frame = PAPER_FIGURES["asvd/figure6"].data(records)
    assert len(frame) == len(records) * (7 + 3)  # types of linear, blocks
    for record in records:
        for by in ("linear", "block"):
            parts = frame[(frame["ratio"] == record["ratio"]) & (frame["by"] == by)]
            mean = (parts["kept"] * parts["dense"]).sum() / parts["dense"].sum()
            assert mean == pytest.approx(record["sizes"]["ratio_reached"], rel=1e-12)
    assert frame["kept"].nunique() > 10  # STRS spends it unevenly


def test_only_the_targeted_blocks_are_compressed(run: Run):
    """The ratio is of their linears alone; all others, and every other block, keep all they have."""
    records = [record for record in run("dobi_figure3_left") if record["method"] != "dense"]
    frame = PAPER_FIGURES["dobi/figure3_left"].data(run("dobi_figure3_left"))
    assert list(frame["method"]) == ["dense", *["dobi_noremap"] * 4, *["svd"] * 4]
    assert set(frame["linears"]) == {"none", "attention"}
    for record in records:
        asked = record["config"]["targets"]["blocks"]
        sites = record["compressions"]["lowrank"]["sites"]
        assert {site["block"] for site in sites.values()} == {index % 3 for index in asked}
        assert len(sites) == 4 * len(asked)
        of_one_block = 48 * 48 * 2 + 48 * 24 * 2
        assert record["sizes"]["sites"]["parameters_dense"] == of_one_block * len(asked)
        ranks = record["compressions"]["lowrank"]["plan"]
        assert list(ranks) == list(sites)
        cost = sum(site["cost"] for site in sites.values())
        assert record["sizes"]["ratio_reached"] == cost / sum(site["dense"] for site in sites.values())
        assert record["ratio"] - 0.05 < record["sizes"]["ratio_reached"] <= record["ratio"]  # uniform rounds down
        blocks = ",".join(map(str, asked))
        row = frame[(frame["method"] == record["method"]) & (frame["blocks"] == blocks)]
        [value] = row["perplexity"][row["ratio"] == record["ratio"]]
        assert value == record["metrics"]["ppl"]["value"]


def test_blocks_by_index_or_from_the_last(paper_lab: Lab):
    """A checkpoint of them can be read; cells that name no blocks have the keys they had before there were any."""
    by_index = paper_lab.run("method=svd", "targets.blocks=[2]", "save=true")
    from_last = paper_lab.run("method=svd", "targets.blocks=[-1]")
    assert by_index["metrics"]["ppl"]["value"] == from_last["metrics"]["ppl"]["value"]
    read = paper_lab.run(f"model.path={paper_lab.root / by_index['checkpoint']}")
    assert read["metrics"]["ppl"]["value"] == by_index["metrics"]["ppl"]["value"]
    [of_all] = paper_lab.cells("method=svd")
    [of_one] = paper_lab.cells("method=svd", "targets.blocks=[0]")
    config = copy.deepcopy(of_all.cfg)
    for node in (config, config.compressions.lowrank):
        del node.targets["blocks"]
    without_setting = Cell.from_config(config)
    assert LowRankKeys(of_one).spectra != LowRankKeys(of_all).spectra
    assert of_one.key != of_all.key
    assert without_setting.key == of_all.key
    with pytest.raises(UserError, match=r"targets\.blocks=3: this model has the blocks 0 to 2"):
        paper_lab.run("method=svd", "targets.blocks=[3]")
    with pytest.raises(UserError, match=r"blocks=.* is not valid"):
        paper_lab.cells("method=svd", "targets.blocks=[]")


def test_training_in_batches_of_two_sizes_sees_as_many_sequences(run: Run):
    records = run("dobi_figure3_middle")
    frame = PAPER_FIGURES["dobi/figure3_middle"].data(records)
    assert list(zip(frame["batch_size"], frame["steps"], strict=True)) == [(2, 12)] * 2 + [(12, 2)] * 2
    assert set(frame["batch_size"] * frame["steps"]) == {24}
    assert sorted(frame["perplexity"]) == sorted(record["metrics"]["ppl"]["value"] for record in records)
    assert frame["perplexity"][frame["ratio"] == 0.4].nunique() == 2  # two trainings


def test_bytes_held_in_closed_form():
    """Of 8 bytes a number: a view and what an operation writes in place are nothing new, what is freed is gone."""

    def work() -> None:
        a = torch.ones(10, dtype=torch.float64)  # 80
        b = (a + 1)[:5]  # 160: the whole sum is alive
        del a  # 80
        c = torch.ones(6, dtype=torch.float64)  # 128
        c += b.sum()  # 136
        del b, c

    assert peak_bytes(work) == 160
    assert peak_bytes(lambda: torch.ones(3, dtype=torch.float64).add_(1)) == 24


def test_memory_of_pca_grows_with_the_samples_and_that_of_ipca_does_not():
    width, rank = 32, 16
    made = directions(width, rank, "cpu")
    peaks = {
        name: [peak_bytes(lambda: run(made, samples, rank)) for samples in (8, 16)]  # noqa: B023
        for name, run in WAYS.items()
    }
    assert peaks["PCA"][1] - peaks["PCA"][0] == 8 * width * rank * 8  # 8 samples more, of 8 bytes a number
    for name in ("IPCA", "PCA of the summed Gram matrices"):
        assert peaks[name][0] == peaks[name][1] < peaks["PCA"][0]


def test_both_ways_of_pca_span_the_same_directions():
    """Those of the sum of all V_i V_iᵀ, which no other k directions have more of."""
    made = directions(12, 4, "cpu")
    gram = sum(made(number) @ made(number).T for number in range(5))
    most = torch.linalg.eigvalsh(gram)[-4:].sum().item()
    for name in ("PCA", "PCA of the summed Gram matrices"):
        found = WAYS[name](made, 5, 4)
        assert (found.T @ gram @ found).trace().item() == pytest.approx(most, rel=1e-10)
    assert (lambda v: (v.T @ gram @ v).trace().item())(WAYS["IPCA"](made, 5, 4)) < most * (1 - 1e-6)


def test_figure_3_right_has_every_width_and_way(run: Run):
    [record] = run("dobi_figure3_right")
    frame = PAPER_FIGURES["dobi/figure3_right"].data([record])
    assert list(frame["width"]) == [16, 32, 64] * 3
    last = frame[frame["width"] == 64].set_index("way")["bytes"]
    assert record["metrics"]["ipca_memory"]["value"] == last["PCA"] / last["IPCA"]


def test_speeds_are_those_of_both_models_in_each_run(run: Run):
    """A line a ratio over batch sizes and over lengths; the first setting is a point of both."""
    records = run("dobi_figure4")
    frame = PAPER_FIGURES["dobi/figure4"].data(records)
    settings = {"batch size": [(1, 8), (2, 8), (3, 8)], "sequence length": [(3, 8), (3, 12), (3, 16)]}
    assert len(frame) == 3 * 2 * 6
    for record in records:
        measured = {(one["batch_size"], one["prompt"]): one for one in record["metrics"]["speed"]["settings"]}
        for panel, of_panel in settings.items():
            for of, ratio in (("dense", 1.0), ("model", record["ratio"])):
                same = (frame["run"] == record["ratio"]) & (frame["panel"] == panel) & (frame["ratio"] == ratio)
                line = frame[same]
                assert list(zip(line["batch_size"], line["prompt"], strict=True)) == of_panel
                expected = [measured[setting][of]["decode"]["tokens_per_second"] for setting in of_panel]
                assert list(line["tokens_per_second"]) == expected


def test_distribution_in_closed_form():
    """Two values as often as each other have kurtosis 1; a histogram counts each once, its edges too."""
    found = distribution(torch.tensor([[-2.0, 2.0], [2.0, -2.0]]), bins=4)
    assert found == {
        "shape": [2, 2],
        "mean": 0.0,
        "std": 2.0,
        "excess_kurtosis": -2.0,
        "largest": 2.0,
        "counts": [2, 0, 0, 2],
    }
    with pytest.raises(SkippedCell, match="equal"):
        distribution(torch.zeros(3, 2), bins=4)


def test_values_are_those_of_the_stored_factors(paper_lab: Lab):
    """Counted and described from the tensors of the checkpoint."""
    of_recipe = ("experiment=dobi_figure5", "method=svdllm", "save=true", "eval.factors.linears=[mlp]")
    record = paper_lab.run(*of_recipe, "eval.factors.blocks=[2]", "eval.factors.bins=10")
    tensors = load_file(paper_lab.root / record["checkpoint"] / "model.safetensors")
    found = record["metrics"]["factors"]["linears"]
    assert [one["linear"] for one in found] == ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    for one in found:
        for factor in ("left", "right"):
            values = tensors[f"model.layers.2.{one['linear']}.{factor}.weight"].double().numpy()
            largest = abs(values).max()
            assert one[factor]["shape"] == list(values.shape)
            assert one[factor]["largest"] == largest
            assert one[factor]["std"] == pytest.approx(values.std(), rel=1e-9)
            from_mean = values - values.mean()
            kurtosis = (from_mean**4).mean() / (from_mean**2).mean() ** 2
            assert one[factor]["excess_kurtosis"] == pytest.approx(kurtosis - 3, rel=1e-6)
            edges = [-largest + 2 * largest * number / 10 for number in range(11)]
            below = [(values < edge).sum() for edge in edges[1:-1]]
            counts = [below[0], *(b - a for a, b in pairwise(below)), values.size - below[-1]]
            assert one[factor]["counts"] == counts
    frame = PAPER_FIGURES["dobi/figure6"].data([record])
    assert len(frame) == 3 * 2 * 10
    assert PAPER_FIGURES["dobi/figure5"].data([record]).empty  # no linear of the attention was asked for


def test_factors_need_a_factored_linear(paper_lab: Lab):
    record = paper_lab.run("method=svd", "targets=mlp", "eval=[ppl,factors]", "eval.factors.linears=[attention]")
    assert "none of the linears" in record["left_out"]["factors"]
    with pytest.raises(UserError, match=r"eval\.factors\.linears=other: this model has"):
        paper_lab.run("method=svd", "eval=[ppl,factors]", "eval.factors.linears=[other]")


def test_figure_11_has_all_that_was_truncated(run: Run):
    [record] = run("dobi_figure11")
    frame = PAPER_FIGURES["dobi/figure11"].data([record])
    measured = record["metrics"]["truncation"]
    gains = frame["weight_nll"] - frame["activation_nll"]
    assert len(frame) == 7 * 3 * 5  # linears, blocks, ratios
    assert gains.mean() == pytest.approx(measured["value"], rel=1e-9)
    assert set(frame["dense_nll"]) == {measured["dense_nll"]}


def test_losses_of_the_training_are_those_of_its_history(paper_lab: Lab, run: Run):
    """The task loss is the loss without γ times the distance of the ratio that it was measured at."""
    for record in run("dobi_figure8"):
        [artifact] = [s["artifact"] for s in record["stages"] if s["stage"] == "rank training"]
        history = json.loads((paper_lab.root / "artifacts" / artifact / "history.json").read_text())
        lowrank = record["compressions"]["lowrank"]
        training, gamma = lowrank["training"], record["config"]["allocation"]["gamma"]
        assert [step["loss"] for step in training["steps"]] == [step["loss"] for step in history["steps"]]
        for before, step in zip(history["steps"], training["steps"][1:], strict=False):
            assert step["ratio"] == before["ratio"]
            distance = abs(before["ratio"] - record["ratio"])
            assert step["loss"] == pytest.approx(step["task_loss"] + gamma * distance, rel=1e-12)
        # A model that knows nothing has the loss of a guess, which only the whole loss could be far above.
        assert all(step["task_loss"] == pytest.approx(5.55, abs=0.15) for step in training["steps"])
        assert max(step["loss"] - step["task_loss"] for step in training["steps"]) > 0.02
        for number, name in enumerate(history["sites"]):
            for state, k in list(zip(training["states"], training["k"][name], strict=True))[1:]:
                assert k == history["steps"][state - 1]["k"][number]


def test_ranks_start_at_the_target_ratio_and_end_at_what_is_deployed(run: Run):
    for figure, ratio in (("dobi/figure8", 0.4), ("dobi/figure9", 0.2), ("dobi/figure10", 0.6)):
        frame = PAPER_FIGURES[figure].data(run("dobi_figure8"))
        [record] = [record for record in run("dobi_figure8") if record["ratio"] == ratio]
        lowrank = record["compressions"]["lowrank"]
        assert set(frame["ratio"]) == {ratio}
        assert sorted(frame["step"].unique()) == list(range(0, 41, 2))  # 40 steps in 21 states
        assert frame["epoch"].max() == 40 * 2 / 12
        sites = {
            name: (s["block"], "+".join(s["linears"]), s["dense"], s["cost"] / lowrank["plan"][name])
            for name, s in lowrank["sites"].items()
        }
        k = {(row["block"], row["linear"], row["step"]): row["k"] for _, row in frame.iterrows()}
        start = {name: k[block, key, 0] for name, (block, key, _, _) in sites.items()}
        cost = sum(start[name] * per_rank for name, (_, _, _, per_rank) in sites.items())
        assert cost / sum(dense for _, _, dense, _ in sites.values()) == pytest.approx(ratio, abs=1e-4)
        # Every site has the rank that the ratio gives it alone.
        for name, (_, _, dense, per_rank) in sites.items():
            assert start[name] == pytest.approx(ratio * dense / per_rank, abs=2e-3)


def test_perplexity_of_learned_ranks_ends_at_the_deployed_model(paper_lab: Lab, run: Run):
    """And begins at uniform ranks; both by the ordinary evaluator, in cells without remapping."""
    overrides = ("ratio=0.4", "method=dobi_noremap", "eval.learned_ranks.points=3")
    [record] = run("dobi_figure8", *overrides)
    along = record["metrics"]["learned_ranks"]
    assert along["states"] == [0, 20, 40]
    assert along["value"] == along["perplexity"][-1]
    assert along["value"] == pytest.approx(record["metrics"]["ppl"]["value"], rel=1e-6)

    context = context_of(paper_lab, "experiment=dobi_figure8", *SMALLER["dobi_figure8"], *overrides)
    context.evaluator = "ppl"
    context.make_text_tokens()
    windows, _ = context.cell.evaluators["ppl"].windows(context)
    uniform = {name: 0.4 * site.dense / site.cost(1) for name, site in context.sites.items()}
    untrained = perplexity_of(context, fit(context.sites, uniform, budget(context.sites, 0.4)), windows.split(1))
    assert along["perplexity"][0] == pytest.approx(untrained, rel=1e-6)
    assert abs(along["perplexity"][0] / along["value"] - 1) > 1e-4  # neither could be taken for the other


def test_learned_ranks_need_a_training(paper_lab: Lab):
    record = paper_lab.run("method=svdllm", "eval=[ppl,learned_ranks]", "eval.learned_ranks.seqlen=32")
    assert "allocation=differentiable" in record["left_out"]["learned_ranks"]
    assert set(record["metrics"]) == {"ppl"}
