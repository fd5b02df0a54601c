"""Published tables beside our records: joined, marked where protocols differ, and never broken by a record."""

from __future__ import annotations

import json
import math
import shutil
import statistics

import pandas as pd
import pytest

from lowrank_lab.artifacts.store import write_json
from lowrank_lab.cells import versions
from lowrank_lab.records.results import Results
from lowrank_lab.records.seal import sealed
from lowrank_lab.reporting import coverage, matching, measured, paper_tables, published
from lowrank_lab.reporting.joined import join
from lowrank_lab.reporting.matching import Ours
from lowrank_lab.reporting.recipe_cells import experiment_of

from .conftest import FORKS, Lab

RECIPE = "experiment=asvd_table6"  # ASVD with three ways to absorb the singular values, in 6 bits, on WikiText-2


@pytest.fixture(scope="module")
def ran(tmp_path_factory, data_root):
    """A results folder in which the recipe of ASVD's Table 6 has run on a tiny model with two seeds."""
    lab = Lab(tmp_path_factory.mktemp("papers") / "results", data_root)
    lab_cli(lab, "-m", RECIPE, "ratio=0.9", "seed=0,1", "storage=uv,v")
    return lab.results


def lab_cli(lab, *words):
    small = [
        "calibration.seqlen=32",
        "calibration.samples=4",
        "eval.wikitext2.seqlen=32",
        "eval.wikitext2.max_windows=4",
    ]
    base = ["model=tiny", f"data_root={lab.data_root}", f"results={lab.root}", *small]
    done = FORKS.run("run.py", *words, *base)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def copied(ran, tmp_path):
    """A copy of these results that a test may change."""
    shutil.copytree(ran.root, tmp_path / "results", ignore=shutil.ignore_patterns("artifacts", "logs"))
    return Results(tmp_path / "results")


def row_of(frame, share, ratio="0.9", model="opt-125m"):
    variant = f"storage.left_share={share}"
    [row] = frame[(frame["variant"] == variant) & (frame["ratio"] == ratio) & (frame["model"] == model)].to_dict(
        "records"
    )
    return row


def change(results, key, edit):
    record = json.loads(results.path(key).read_text())
    edit(record)
    results.write(record)


def test_our_number_is_the_mean_over_seeds_beside_the_published_one(ran):
    row = row_of(join(published.load("asvd/table6"), ran), "0.5")
    values = [
        record["metrics"]["wikitext2"]["value"]
        for record in ran.records()
        if record["config"]["storage"]["left_share"] == 0.5
    ]
    assert len(values) == row["seeds"] == 2
    assert row["ours"] == pytest.approx(statistics.mean(values), rel=1e-12)
    assert row["spread"] == pytest.approx(statistics.stdev(values), rel=1e-12)
    assert row["published"] == "37.58"
    assert row["difference"] == pytest.approx(row["ours"] - 37.58)
    assert set(row["keys"].split()) == {
        r["key"] for r in ran.records() if r["config"]["storage"]["left_share"] == 0.5
    }


def test_the_mark_says_model_windows_and_calibration(ran):
    row = row_of(join(published.load("asvd/table6"), ran), "0.5")
    assert "model tiny" in row["differs"]
    assert "4 of" in row["differs"]
    assert "windows of 32 tokens, not 2048" in row["differs"]
    assert "calibrated on 4 × 32 tokens of wikitext2, not 32 × 2048 of wikitext2" in row["differs"]


def test_what_has_not_run_is_a_dash_and_what_failed_is_told(copied):
    table = published.load("asvd/table6")
    frame = join(table, copied)
    assert row_of(frame, "1")["status"] == "missing"
    assert row_of(frame, "0.5", ratio="0.85")["status"] == "missing"
    for key in row_of(frame, "0")["keys"].split():
        change(copied, key, lambda record: record.update(status="failed", reason="ValueError: too small"))
    frame = join(table, copied)
    assert row_of(frame, "0")["status"] == "failed (ValueError: too small)"
    assert math.isnan(row_of(frame, "0")["ours"])
    text = paper_tables.markdown(table, frame, copied)
    assert "failed (ValueError: too small)" in text
    assert "| failed " in text
    assert "37.58" in text


@pytest.mark.parametrize(
    ("edit", "status"),
    [
        (lambda record: record.update(metrics={}), "not measured"),
        (lambda record: record.update(components={**record["components"], "SPECTRA": -1}), "outdated"),
        (lambda record: record.update(status="skipped", reason="makes no sense"), "skipped (makes no sense)"),
    ],
)
def test_a_record_without_its_number_never_breaks_a_table(copied, edit, status):
    table = published.load("asvd/table6")
    for key in row_of(join(table, copied), "0")["keys"].split():
        change(copied, key, edit)
    frame = join(table, copied)
    assert row_of(frame, "0")["status"] == status
    assert status.split(" (")[0] in paper_tables.markdown(table, frame, copied)


def test_a_model_that_is_not_finite_is_nan_in_the_table(copied):
    table = published.load("asvd/table6")
    for key in row_of(join(table, copied), "0")["keys"].split():
        change(copied, key, lambda record: record["metrics"]["wikitext2"].update(value=None, not_finite="block 1"))
    frame = join(table, copied)
    assert row_of(frame, "0")["status"] == "done"
    assert "nan [" in paper_tables.markdown(table, frame, copied)


def test_records_of_the_published_model_stand_before_others(copied):
    table = published.load("asvd/table6")
    keys = sorted(row_of(join(table, copied), "0.5")["keys"].split())
    change(copied, keys[0], lambda record: record["config"]["model"].update(path="facebook/opt-125m"))
    row = row_of(join(table, copied), "0.5")
    assert row["keys"] == keys[0]
    assert "model" not in row["differs"].split(";")[0]


def test_a_method_of_ones_own_gets_lines_of_its_own(copied):
    table = published.load("asvd/table6")
    keys = row_of(join(table, copied), "0")["keys"].split()
    for key in keys:
        change(copied, key, lambda record: record.update(method="mine"))
    frame = join(table, copied)
    mine = frame[frame["method"] == "mine"]
    assert list(mine["published"]) == [""]
    assert set(mine["keys"].iloc[0].split()) == set(keys)
    assert "| mine " in paper_tables.markdown(table, frame, copied)


def test_ours_are_the_cells_of_the_tables_recipes_alone(ran):
    assert join(published.load("asvd/table1"), ran)["ours"].isna().all()
    assert experiment_of("experiment=asvd_table6 ratio=0.9") == "asvd_table6"
    assert experiment_of("method=asvd") is None


def test_averages_and_drops_are_those_of_our_accuracies(tmp_path):
    """Dobi-SVD's Table 2 from records with accuracies that were made up: 0.5 dense, 0.4 compressed."""
    results = _with_records(
        tmp_path,
        [_invented("dense", 1.0, dict.fromkeys(TASKS, 0.5)), _invented("dobi", 0.8, dict.fromkeys(TASKS, 0.4))],
    )
    frame = join(published.load("dobi/table2"), results)
    ours = frame[(frame["method"] == "dobi") & (frame["ratio"] == "0.8") & (frame["model"] == "llama-7b")]
    by_column = ours.set_index(["metric", "dataset"])
    assert by_column.loc[("accuracy", "average"), "ours"] == pytest.approx(0.4)
    assert by_column.loc[("drop", "average"), "ours"] == pytest.approx(20.0)
    assert by_column.loc[("drop", "average"), "published"] == "3.84"
    assert by_column.loc[("perplexity", "c4"), "status"] == "not measured"


def test_averages_and_drops_have_the_spread_of_their_seeds(tmp_path):
    """They were printed as "± nan"; and the compressed model is compared with the dense one in 16 bits."""
    records = [_invented("dense", 1.0, dict.fromkeys(TASKS, 0.5))]
    for seed, accuracy in ((0, 0.4), (1, 0.3)):
        records.append(_invented("dobi", 0.8, dict.fromkeys(TASKS, accuracy), key=f"seed{seed}", seed=seed))
    table = published.load("dobi/table2")
    results = _with_records(tmp_path, records)
    frame = join(table, results)
    ours = frame[(frame["method"] == "dobi") & (frame["ratio"] == "0.8") & (frame["model"] == "llama-7b")]
    by_column = ours.set_index(["metric", "dataset"])
    average, drop = by_column.loc[("accuracy", "average")], by_column.loc[("drop", "average")]
    assert (average["ours"], average["seeds"]) == (pytest.approx(0.35), 2)
    assert average["spread"] == pytest.approx(statistics.stdev([0.4, 0.3]))
    assert (drop["ours"], drop["spread"]) == (pytest.approx(30.0), pytest.approx(statistics.stdev([20.0, 40.0])))
    assert average["keys"] == "seed0 seed1"
    assert "± nan" not in paper_tables.markdown(table, frame, results)


def test_an_average_tells_the_marks_of_all_its_parts_and_mixes_no_models(tmp_path):
    first = _invented("dobi", 0.8, dict.fromkeys(TASKS, 0.4))
    later = _invented("dobi", 0.8, {"piqa": 0.9}, key="later", started="2027")
    later["metrics"]["zeroshot"]["protocol"]["limit"] = 25

    def average():
        frame = join(published.load("dobi/table2"), _with_records(tmp_path, [first, later]))
        shown = frame[(frame["method"] == "dobi") & (frame["ratio"] == "0.8") & (frame["model"] == "llama-7b")]
        return shown.set_index(["metric", "dataset"]).loc[("accuracy", "average")]

    assert average()["ours"] == pytest.approx((6 * 0.4 + 0.9) / 7)
    assert "the first 25 documents" in average()["differs"]
    assert average()["keys"] == "dobi later"
    first["metrics"]["zeroshot"]["tasks"].pop("piqa")
    later["config"]["model"]["path"] = "another"
    later["model"] = "another"
    assert average()["status"] == "not measured"


def test_the_mean_over_seeds_is_of_one_protocol_and_nan_where_one_is_nan(tmp_path):
    records = [
        _invented("dobi", 0.8, {"piqa": value}, key=f"seed{seed}", seed=seed)
        for seed, value in enumerate((0.4, 0.6))
    ]

    def piqa():
        frame = join(published.load("dobi/table2"), _with_records(tmp_path, records))
        shown = frame[(frame["method"] == "dobi") & (frame["ratio"] == "0.8") & (frame["model"] == "llama-7b")]
        return shown.set_index(["metric", "dataset"]).loc[("accuracy", "piqa")]

    assert (piqa()["ours"], piqa()["seeds"]) == (pytest.approx(0.5), 2)
    records[0]["metrics"]["zeroshot"]["tasks"]["piqa"]["value"] = None
    assert math.isnan(piqa()["ours"])
    records[0]["metrics"]["zeroshot"]["tasks"]["piqa"]["value"] = 0.4
    records[0]["metrics"]["zeroshot"]["protocol"]["limit"] = 25
    records[1]["started"] = "2027"
    assert (piqa()["ours"], piqa()["seeds"]) == (0.6, 1)
    assert "documents" not in piqa()["differs"]


def test_an_earlier_run_of_the_published_model_gets_no_second_line(tmp_path):
    """It stood in the place of the published number."""
    table = published.load("dobi/table2")
    first = _invented("dobi", 0.8, dict.fromkeys(TASKS, 0.4))
    later = _invented("dobi", 0.8, {"piqa": 0.9}, key="later", started="2027")
    frame = join(table, _with_records(tmp_path, [first, later]))
    assert len(frame) == len(table.rows)
    wide = paper_tables.lines(frame, {})
    of_line = wide[(wide["ratio"] == "0.8") & (wide["method"] == "Dobi-SVD")].set_index("")
    assert list(of_line["piqa"]) == ["0.77", "0.900", "+0.13"]


def test_our_own_lines_tell_the_settings_that_the_table_tells(ran):
    frame = join(published.load("asvd/table6"), ran)
    own = frame[frame["model"] == "tiny-llama"]
    assert sorted(own["variant"]) == ["storage.left_share=0", "storage.left_share=0.5"]
    for share in ("0", "0.5"):
        assert row_of(frame, share, model="tiny-llama")["ours"] == row_of(frame, share)["ours"]


@pytest.mark.parametrize(
    "edit",
    [
        lambda config: config.pop("quantization"),
        lambda config: config.update(quantization={"bits": 4}),
        lambda config: config.update(quantization={"_target_": "lowrank_lab.quantization.gone.Gone"}),
    ],
)
def test_an_outdated_record_with_settings_that_are_no_more_breaks_nothing(copied, edit):
    table = published.load("asvd/table6")
    for key in row_of(join(table, copied), "0")["keys"].split():
        change(copied, key, lambda record: (record["components"].update(RECORD=1), edit(record["config"])))
    frame = join(table, copied)
    assert row_of(frame, "0.5")["status"] == "done"
    assert "outdated" in paper_tables.markdown(table, frame, copied)


@pytest.mark.parametrize("entry", ["config", "metrics", "model", "ratio", "label"])
def test_a_file_that_is_no_whole_record_counts_as_missing(copied, entry, caplog):
    table = published.load("asvd/table6")
    for key in row_of(join(table, copied), "0")["keys"].split():
        whole = copied.find(key)
        write_json(copied.path(key), sealed({name: value for name, value in whole.items() if name != entry}))
    assert row_of(join(table, copied), "0")["status"] == "missing"
    assert "cannot be read and is left out" in caplog.text
    assert len(copied.records()) == 2


def test_a_table_whose_cells_all_failed_is_written_and_not_counted(copied):
    for record in copied.records():
        change(copied, record["key"], lambda record: record.update(status="failed", reason="no", metrics={}))
    counted = coverage.coverage(copied).set_index("name").loc["asvd/table6"]
    assert (counted["ran"], counted["ours"]) == (4, 0)
    done = FORKS.run("report.py", "all", f"--results={copied.root}")
    assert done.returncode == 0, done.stderr
    assert "| failed " in (copied.root / "report" / "papers" / "asvd_table6.md").read_text()


def test_outdated_cells_count_as_no_results(copied):
    for record in copied.records():
        change(copied, record["key"], lambda record: record["components"].update(SPECTRA=-1))
    counted = coverage.coverage(copied).set_index("name").loc["asvd/table6"]
    assert (counted["ran"], counted["ours"]) == (4, 0)


def test_a_folder_that_cannot_be_written_is_one_line(ran, tmp_path):
    (tmp_path / "file").touch()
    done = FORKS.run("report.py", "table=asvd/table6", f"--results={ran.root}", f"--out={tmp_path / 'file'}")
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1


TASKS = ["openbookqa", "arc_easy", "arc_challenge", "winogrande", "hellaswag", "piqa", "mathqa"]


def _with_records(root, records, experiment="dobi_table2"):
    results = Results(root)
    for record in records:
        results.write(record)
    (root / "grids").mkdir(exist_ok=True)
    cells = {record["key"]: record["label"] for record in records}
    (root / "grids" / "one.json").write_text(json.dumps({"name": f"experiment={experiment}", "cells": cells}))
    return results


def _invented(method, ratio, accuracies, key=None, seed=0, started="2026"):
    measured = {
        "metric": "accuracy",
        "value": statistics.mean(accuracies.values()),
        "tasks": {task: {"value": value, "metric": "acc"} for task, value in accuracies.items()},
        "protocol": {"limit": None},
    }
    config = {
        "allocation": None if method == "dense" else {},
        "quantization": None,
        "model": {"path": "huggyllama/llama-7b"},
        "calibration": {"samples": 256, "seqlen": 2048, "dataset": {"name": "wikitext2"}},
    }
    shared = {
        "status": "done",
        "started": started,
        "seed": seed,
        "dataset": "wikitext2",
        "label": f"{method} {ratio:g}",
        "content": {"model": "x"},
        "components": versions.current(),
    }
    return {
        "key": key or method,
        "method": method,
        "ratio": ratio,
        "model": "llama-7b",
        "config": config,
        "metrics": {"zeroshot": measured},
        **shared,
    }


def test_latex_has_the_best_in_bold_and_the_second_underlined():
    table = published.load("dobi/table9")
    frame = join(table, Results("no-such-folder"))
    text = paper_tables.latex(table, frame)
    assert r"\textbf{46.18}" in text
    assert r"\uline{58.02}" in text
    assert r"\textbf{145.41}" in text  # C4 at 0.4, where training made it worse
    assert text.count(r"\toprule") == 1


def test_latex_ranks_methods_of_the_same_bits_alone():
    """One method in 16, 8, 6 and 4 bits at each ratio: there is nothing to be best at."""
    table = published.load("asvd/table3")
    assert "textbf" not in paper_tables.latex(table, join(table, Results("no-such-folder")))


def test_a_second_run_changes_no_byte(ran, tmp_path):
    first = paper_tables.write("asvd/table6", ran, tmp_path / "a")
    second = paper_tables.write("asvd/table6", ran, tmp_path / "b")
    assert [file.read_bytes() for file in first] == [file.read_bytes() for file in second]
    assert [file.suffix for file in first] == [".md", ".csv", ".tex"]
    read = pd.read_csv(first[1], dtype={"published": str, "ratio": str})
    assert list(read["published"].dropna()) == list(published.load("asvd/table6").rows["value"])


def test_settings_that_the_table_varies_tell_our_own_lines_apart(ran):
    frame = join(published.load("asvd/table6"), ran)
    own = frame[frame["model"] == frame["our_model"]]
    assert sorted(own["variant"]) == ["storage.left_share=0", "storage.left_share=0.5"]
    assert own["ours"].nunique() == 2
    assert list(own["seeds"]) == [2, 2]


def _recorded(root, experiment, **entries):
    """The only record of a recipe, of dobi at 0.4, with other entries than those of ``_invented``."""
    record = _invented("dobi", 0.4, {"piqa": 0.5}) | {"metrics": {}} | entries
    record["config"]["dtype"] = "float32"
    return _with_records(root, [record], experiment)


def test_errors_of_the_storage_stand_beside_the_published_ones(tmp_path):
    """Dobi-SVD's Table 8 gives no ratio, and names linears by their last part."""
    errors = {"self_attn.q_proj": {"mse": 1e-7, "mae": 2e-4}, "mlp.up_proj": {"mse": 3e-8, "mae": 4e-4}}
    measured = {"metric": "output error", "value": 0.1, "storage": errors, "protocol": {}}
    frame = join(published.load("dobi/table8"), _recorded(tmp_path, "dobi_table8", metrics={"error": measured}))
    ours = frame[frame["status"] == "done"].set_index(["metric", "variant"])
    assert list(ours["ours"]) == [1e-7, 2e-4, 3e-8, 4e-4]
    assert list(ours["published"]) == ["2.37e-07", "4e-04", "7.54e-08", "2e-04"]
    assert "at ratio 0.4, the source gives none" in ours.loc[("mse", "linear=q_proj"), "differs"]
    assert "incremental PCA" in ours.loc[("mse", "linear=q_proj"), "differs"]


def test_memory_and_flops_are_in_the_units_of_the_tables_and_say_what_they_are(tmp_path):
    macs = {"model": {"linears": 5 * 10**9, "steps": 0, "attention": 10**9, "context": 33}}
    lost = {"model": None, "dense": None, "decode_ratio": None}  # out of memory
    settings = [{"batch_size": batch, "prompt": 32, **lost} for batch in (1, 16)]
    speed = {"metric": "speed", "settings": settings, "macs": macs, "protocol": {}}
    sites = {"parameters_dense": 16 * 10**8, "parameters": 6 * 10**8}  # half of all parameters are gone
    sizes = {"bytes": 5_500_000_000, "parameters": 10**9, "sites": sites}
    assert (("parameters_removed", "", "", 50.0), {}) in measured.numbers({"metrics": {}, "sizes": sizes})
    results = _recorded(tmp_path, "dobi_table21", metrics={"speed": speed}, sizes=sizes)
    change(results, "dobi", lambda record: record["config"]["model"].update(path="meta-llama/Llama-2-7b-hf"))
    frame = join(published.load("dobi/table21"), results).set_index(["method", "ratio", "metric", "variant"])
    flops, size = (frame.loc[("dobi", "0.4", metric, "")] for metric in ("flops", "size"))
    assert (flops["ours"], flops["published"]) == (12.0, "18.47")
    assert "2 FLOPs a multiply-accumulate" in flops["differs"]
    assert (size["ours"], size["published"]) == (5.5, "6.8")
    assert "32 bits, not 16" in size["differs"]


def test_the_slides_average_six_tasks_and_compare_with_asvd(tmp_path):
    """Their ASVD is ours at one ratio, their TruthfulQA is no part of the average."""
    tasks = ["openbookqa", "arc_easy", "winogrande", "hellaswag", "piqa", "mathqa"]
    records = [
        _invented("svdllm", 0.8, dict.fromkeys(tasks, 0.4) | {"truthfulqa_gen": 0.9, "gsm8k": 0.9}),
        _invented("asvd_uniform", 0.8, dict.fromkeys(tasks, 0.2) | {"truthfulqa_gen": 0.5, "arc_challenge": 0.1}),
    ]
    for record, value in zip(records, (8.0, 10.0), strict=True):
        protocol = {"dataset": "wikitext2", "window": 2048, "windows": 1, "windows_available": 1}
        record["metrics"]["ppl"] = {"metric": "perplexity", "value": value, "protocol": protocol}
    frame = join(published.load("slides/svdllm"), _with_records(tmp_path, records, "slides_svdllm"))
    ours = frame[(frame["method"] == "svdllm") & (frame["ratio"] == "0.8")]
    ours = ours.set_index(["metric", "dataset"])["ours"]
    assert ours[("accuracy", "average")] == pytest.approx(0.4)
    assert ours[("gain", "average")] == pytest.approx(100.0)
    assert ours[("drop", "wikitext2")] == pytest.approx(20.0)
    assert ours[("accuracy_difference", "truthfulqa")] == pytest.approx(0.4)
    assert math.isnan(ours[("accuracy_difference", "gsm8k")])


def test_our_dobi_svd_says_that_it_is_not_quite_the_papers(tmp_path):
    table = published.load("dobi/table2")
    results = _with_records(tmp_path, [_invented("dobi", 0.4, {"piqa": 0.5})])
    frame = join(table, results)
    text = paper_tables.markdown(table, frame, results)
    assert text.count("| Dobi-SVD † ") == 1
    assert paper_tables.latex(table, frame).count(r"Dobi-SVD$^\dagger$ & ours") == 1
    assert "\n† weights in SVD-LLM's closed form, not by the paper's incremental PCA" in text


def test_a_record_of_gptq_with_act_order_has_its_name_whenever_it_was_written(tmp_path):
    record = _invented("dense", 1.0, {"piqa": 0.5})
    record["config"]["quantization"] = {"method": {"act_order": True}}
    record["quantization"] = {"name": "GPTQ INT4 g128", "family": "GPTQ"}
    record |= {entry: {"quantization": "GPTQ INT4 g128", "seed": 1} for entry in ("settings", "variant")}
    [found] = _with_records(tmp_path, [record]).records()
    assert found["quantization"] == {"name": "GPTQ-R INT4 g128", "family": "GPTQ-R"}
    assert found["settings"] == found["variant"] == {"quantization": "GPTQ-R INT4 g128", "seed": 1}


def test_a_source_that_names_no_images_takes_ours_of_any_with_a_mark():
    table = published.load("slides/comcat_mha")
    of = lambda metric, dataset, variant: Ours({}, metric, dataset, variant, 1.0, {}, "few images")
    top1 = "score=top-1;level=head"
    numbers = [of("accuracy", "imagenet", top1), of("accuracy", "mnist", top1), of("accuracy", "piqa", "")]
    found = [(ours.dataset, ours.differs) for ours in matching.named_as_in(table, numbers)]
    told = "few images; on mnist, where the source names no data set"
    assert found == [("", "few images"), ("", told), ("piqa", "few images")]
