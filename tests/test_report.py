"""Tables, figures and status from records alone."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
from pathlib import Path

import pandas as pd
import pytest
from matplotlib import pyplot as plt

from lowrank_lab.cells import grid, versions
from lowrank_lab.records.labels import labels
from lowrank_lab.records.results import Results
from lowrank_lab.reporting import drawing, figures, perplexity_figures, tables
from lowrank_lab.reporting.fitting import fitted
from lowrank_lab.reporting.sections import PERPLEXITY
from lowrank_lab.reporting.status import status
from lowrank_lab.running import runner

from .conftest import FORKS, REPOSITORY


@pytest.fixture
def records(grid_lab):
    done = [r for r in grid_lab.results.records() if r["status"] == "done"]  # other tests may have added some
    return [r for r in done if r["method"] == "dense" or r["ratio"] in (0.8, 0.6)]


def test_the_table_holds_the_records_numbers(records):
    rows = tables.comparison(records)
    assert len(rows) == len(records)
    for record in records:
        [row] = rows[rows["key"] == record["key"]].to_dict("records")
        assert row["value"] == record["metrics"]["ppl"]["value"]
        assert row["parameters"] == record["sizes"]["parameters"]
        assert row["bytes"] == record["sizes"]["bytes"]
    assert rows["method"].iloc[0] == "dense"


def test_csv_keeps_full_precision_and_the_protocol(records):
    table = pd.read_csv(io.StringIO(tables.csv(records, PERPLEXITY)))
    values = {r["key"]: r["metrics"]["ppl"]["value"] for r in records}
    assert dict(zip(table["key"], table["value"], strict=True)) == pytest.approx(values, rel=1e-12)
    assert set(table["protocol_window"]) == {32}


def test_markdown_and_latex_have_a_row_a_cell(records):
    markdown = tables.markdown(records)
    assert sum(line.startswith("| svdllm") for line in markdown.splitlines()) == 2
    assert "the first 6 of" in markdown  # a limited evaluation says so
    latex = tables.latex(records)
    assert latex.count("svdllm &") == 2
    assert r"\toprule" in latex


def test_other_protocols_and_models_never_share_a_table(records):
    other = json.loads(json.dumps(records[0]))
    other["key"] = "other"
    other["metrics"]["ppl"]["protocol"]["window"] = 64
    assert tables.comparison([*records, other])["group"].nunique() == 2
    other["metrics"]["ppl"]["protocol"]["window"] = 32
    other["model"] = "another"
    assert tables.comparison([*records, other])["group"].nunique() == 2


def test_cells_of_one_method_are_told_apart_by_what_differs(records):
    [asvd] = [r for r in records if r["method"] == "asvd" and r["ratio"] == 0.8]
    other = json.loads(json.dumps(asvd))
    other["key"] = "other"
    other["settings"]["metric.alpha"] = 0.25
    rows = tables.comparison([*records, other])
    assert set(rows.loc[rows["method"] == "asvd", "variant"]) == {"metric.alpha=0.5", "metric.alpha=0.25"}
    assert set(rows.loc[rows["method"] != "asvd", "variant"]) == {""}


def test_an_overridden_answer_is_shown_even_where_it_is_alone(lab):
    asvd = lab.run("method=asvd", "ratio=0.8", "metric.alpha=0.25", "metric.statistic=abs_max")
    [row] = tables.comparison([asvd]).to_dict("records")
    assert row["variant"] == "metric=abs_max, metric.alpha=0.25"


def test_dense_models_of_two_dtypes_are_told_apart(records):
    [dense] = [r for r in records if r["method"] == "dense"]
    other = json.loads(json.dumps(dense))
    other["key"], other["settings"]["dtype"] = "other", "bfloat16"
    rows = tables.comparison([dense, other])
    assert list(rows["variant"]) == ["dtype=bfloat16", "dtype=float32"]


def test_records_of_other_component_versions_are_left_out_and_named(records):
    old = json.loads(json.dumps(records[0]))
    old["key"], old["components"]["SPECTRA"] = "old", 0
    assert len(tables.comparison([*records, old])) == len(records)
    assert "outdated (made by other component versions" in tables.markdown([*records, old])


def test_models_of_one_name_and_other_content_never_share_a_table(records):
    other = json.loads(json.dumps(records[0]))
    other["key"], other["content"]["model"] = "other", "another commit"
    assert tables.comparison([*records, other])["group"].nunique() == 2


def test_a_measurement_in_two_records_is_one_row(records):
    """As when a job is run again with one more evaluator: the first perplexity is in both records."""
    again = json.loads(json.dumps(records[0]))
    again["key"] = "again"
    assert len(tables.comparison([*records, again])) == len(records)
    again["metrics"]["ppl"]["value"] += 1  # another measurement, whatever else agrees
    assert len(tables.comparison([*records, again])) == len(records) + 1


def test_another_version_of_an_evaluator_that_was_not_used_outdates_nothing(records, monkeypatch):
    monkeypatch.setattr(versions, "SPEED", versions.SPEED + 1)
    assert not any(tables.outdated(record) for record in records)
    monkeypatch.setattr(versions, "SPECTRA", versions.SPECTRA + 1)
    assert {record["method"] for record in records if not tables.outdated(record)} == {"dense"}
    monkeypatch.setattr(versions, "PERPLEXITY", versions.PERPLEXITY + 1)
    assert all(tables.outdated(record) for record in records)


def test_an_evaluator_that_does_not_suit_the_model_leaves_the_others_their_numbers(lab):
    record = lab.run("method=svd", "eval=ppl,generation", "eval.generation.chat=true")
    assert record["status"] == "done"
    assert list(record["metrics"]) == ["ppl"]
    assert "no chat template" in record["left_out"]["generation"]
    markdown = tables.markdown([record])
    assert "| svd " in markdown
    assert "eval=generation (tiny-llama has no chat template" in markdown
    alone = ["model=tiny", f"results={lab.root}", "method=svd", "eval=generation", "eval.generation.chat=true"]
    [cell] = grid.plan(REPOSITORY / "conf", "config", alone, False)
    skipped = runner.run(cell)
    assert (skipped["status"], skipped["metrics"]) == ("skipped", {})


def test_failed_and_skipped_cells_stay_visible(records):
    failed = {**records[1], "status": "failed", "reason": "RuntimeError: broken", "metrics": {}, "key": "f"}
    skipped = {**records[2], "status": "skipped", "reason": "no rank", "metrics": {}, "key": "s"}
    del failed["sizes"]
    markdown = tables.markdown([*records, failed, skipped])
    assert "failed (RuntimeError: broken)" in markdown
    assert "skipped (no rank)" in markdown
    alone = tables.markdown([failed])
    assert "failed (RuntimeError: broken)" in alone


def test_a_number_in_doubt_is_named(records):
    [dense] = [record for record in records if record["method"] == "dense"]
    doubtful = json.loads(json.dumps(dense))
    doubtful["metrics"]["ppl"]["warning"] = "its tokenizer may be wrong"
    assert "in doubt" not in tables.markdown([doubtful])  # a tiny model is random
    doubtful["config"]["model"]["path"] = "somebody/model"
    assert tables.markdown([doubtful]).endswith(
        f"**Numbers in doubt**\n\n- {dense['label']}: eval=ppl: its tokenizer may be wrong\n"
    )


def test_files_are_the_same_when_written_again(records, tmp_path):
    for name in ("one", "two"):
        tables.write(records, tmp_path / name)
        figures.write(records, tmp_path / name)
    one, two = ({f.name: f.read_bytes() for f in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert one == two
    assert {Path(name).suffix for name in one} == {".md", ".csv", ".tex", ".png", ".pdf"}


def test_the_figure_shows_every_method_and_the_dense_line(records):
    [(caption, group)] = list(tables.groups(records, PERPLEXITY))
    axes = perplexity_figures.perplexity_against_ratio(group, caption).axes[0]
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert [label.split(" ")[0] for label in labels] == ["asvd", "svd", "svdllm", "dense"]
    assert axes.get_yscale() == "log"
    line = axes.get_lines()[0]
    shown = group[group["method"] == "asvd"].sort_values("ratio_reached")
    assert line.get_xdata().tolist() == shown["ratio_reached"].tolist()
    assert line.get_ydata().tolist() == shown["value"].tolist()


def report(*arguments: str) -> subprocess.CompletedProcess[str]:
    return FORKS.run("report.py", *arguments)


def test_the_command_writes_and_names_its_files(grid_lab, tmp_path):
    done = report("--results", str(grid_lab.root), "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "| svdllm" in done.stdout
    written = {line.removeprefix("wrote ") for line in done.stdout.splitlines() if line.startswith("wrote ")}
    assert written == {str(f) for f in tmp_path.iterdir()}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("results={root}", "error: results={root}: write --results {root}"),
        (
            "table --results {root}",
            "error: table: which one? write table=NAME; names are asvd/table1,",
        ),
    ],
)
def test_a_report_that_is_none_is_told_how_it_is_written(grid_lab, words, said):
    done = FORKS.run("report.py", *words.format(root=grid_lab.root).split())
    assert done.returncode == 1
    assert done.stderr.startswith(said.format(root=grid_lab.root))


def test_no_records_is_one_line(tmp_path):
    done = report("--results", str(tmp_path))
    assert done.returncode != 0
    assert done.stderr.strip() == f"error: no records in {tmp_path}; run something first: python run.py"


def test_status_tells_done_failed_skipped_and_missing(grid_lab, tmp_path):
    results = Results(tmp_path / "results")
    shutil.copytree(grid_lab.root / "records", results.root / "records")
    shutil.copytree(grid_lab.root / "grids", results.root / "grids")
    grid = next(g for g in results.grids() if len(g["cells"]) == 7)
    keys = sorted(grid["cells"])
    results.path(keys[0]).unlink()
    for key, state in ((keys[1], "failed"), (keys[2], "skipped")):
        record = {**results.find(key), "status": state, "reason": "because"}
        results.write(record)
    text = status(results)
    assert text.splitlines()[-1].endswith("1 failed, 1 skipped, 1 missing")
    assert f"(because; traceback in {results.path(keys[1])})" in text
    assert "missing" in next(line for line in text.splitlines() if grid["cells"][keys[0]] in line)
    old = results.find(keys[3])
    old["components"]["MODEL"] = 0
    results.write(old)
    assert status(results).splitlines()[-1].endswith("1 failed, 1 skipped, 1 missing, 1 outdated")
    assert "no grid has been run" in status(Results(tmp_path / "nothing"))


def told(lab, *commands: str) -> list[str]:
    """What a table would tell of cells that were asked for so, without running them."""
    cells = [lab.cells(*command.split())[0] for command in commands]
    records = [{"key": cell.key, "method": cell.cfg.method.name, **labels(cell)} for cell in cells]
    variants = tables.variants(records)
    return [variants[record["key"]] for record in records]


def test_a_table_tells_answers_by_name_and_settings_where_they_differ(lab):
    assert told(lab, "method=svdllm ratio=0.8", "method=svdllm ratio=0.6") == ["", ""]
    assert told(lab, "method=svdllm ratio=1", "method=svdllm ratio=0.6") == ["", ""]
    assert told(lab, "method=svdllm refinement=lora") == ["refinement=lora"]
    assert told(lab, "method=svdllm grouping=qkv") == ["grouping=qkv"]
    assert told(lab, "method=svdllm_lora refinement.r=4") == ["refinement.r=4"]
    assert told(lab, "method=svdllm allocation=none") == ["allocation=none"]
    assert told(lab, "method=dense") == [""]
    assert told(lab, "method=svdllm quantization=int4") == ["quantization=INT4"]
    assert told(lab, "method=dense", "method=dense quantization=gptq") == [
        "quantization=none",
        "quantization=GPTQ INT4",
    ]
    both = told(lab, "method=svdllm allocation=strs", "method=svdllm allocation=strs allocation.samples=2")
    assert both == ["allocation=strs, allocation.samples=1", "allocation=strs, allocation.samples=2"]
    [joined] = told(lab, "method=svdllm dataset.calibration.join=x")
    assert joined == ""
    assert "\n" not in "".join(
        told(lab, "method=svdllm dataset.calibration.join=x", "method=svdllm dataset.calibration.max_documents=9")
    )


def test_a_table_tells_what_a_ratio_counts(lab):
    expected = {
        "method=dense": "weights",
        "method=svdllm": "weights",
        "method=dobi": "16-bit words",
        "method=qsvd": "weights of qkv",
        "method=asvd_kv": "cached values",
    }
    found = {command: labels(lab.cells(command)[0])["counts"]["unit"] for command in expected}
    assert found == expected


def test_quantized_dense_models_are_told_apart(lab):
    """By what they are calibrated on, their seed, and which linears are in few bits, which are not all bits."""
    jobs = ("gptq", "gptq calibration.samples=6", "quarot", "quarot seed=1", "int4 targets=kv")
    for job in jobs:
        lab.run("method=dense", *f"quantization={job}".split())
    [(_, _, group)] = tables.all_groups(lab.results.records())
    counted = dict(zip(group["variant"], group["counted"], strict=True))
    assert counted == {
        "calibration.samples=12, quantization=GPTQ INT4": "weights",
        "calibration.samples=6, quantization=GPTQ INT4": "weights",
        "quantization=QuaRot INT4 A4, seed=0": "weights",
        "quantization=QuaRot INT4 A4, seed=1": "weights",
        "quantization=INT4": "weights of kv",
    }


def test_quantized_cells_are_compared_by_the_bits_they_keep(lab):
    """The ratio times the bits, with scales and zero points: the axis that low rank and few bits share."""
    for job in (["method=dense"], ["method=dense", "quantization=int4"], ["method=svdllm", "ratio=0.6"]):
        lab.run(*job)
    lab.run("method=svdllm", "ratio=0.6", "quantization=int4")
    [(_, caption, group)] = tables.all_groups(lab.results.records())
    found = {(row["method"], row["quantized"]): row for _, row in group.iterrows()}
    assert found["dense", "none"]["bits"] == 32
    assert found["svdllm", "none"]["bits"] == pytest.approx(32 * found["svdllm", "none"]["ratio_reached"])
    sites = {key: record["sizes"]["sites"] for record in lab.results.records() for key in [record["key"]]}
    for row in found.values():
        if row["quantized"] == "RTN":
            here = sites[row["key"]]
            least = 4 * here["parameters"] / here["parameters_dense"]
            assert least < row["bits"] == 8 * here["bytes"] / here["parameters_dense"] < 2 * least
    assert "bits a weight" in tables.presentable(group, PERPLEXITY)
    unquantized = group[group["quantized"] == "none"]
    assert "bits a weight" not in tables.presentable(unquantized, PERPLEXITY)
    assert perplexity_figures.perplexity_against_bits(unquantized, caption) is None


def test_perplexities_have_two_figures_and_one_colour_a_method(lab):
    """Against the ratio without quantized cells; against bits the ratio has the style of the line."""
    for job in ("method=dense", "method=svd ratio=0.8", "method=svdllm ratio=0.8", "method=svdllm ratio=0.6"):
        lab.run(*job.split())
    for job in ("method=svdllm ratio=0.8", "method=svdllm ratio=0.6", "method=svd ratio=0.8", "method=dense"):
        lab.run(*job.split(), "quantization=int4")
    by_ratio, by_bits = figures.drawn(lab.results.records())
    assert [one.name.split("_")[0] for one in (by_ratio, by_bits)] == ["perplexity", "perplexity-by-bits"]
    assert len(pd.read_csv(io.StringIO(by_ratio.csv))) == len(by_ratio.rows) == 4
    assert len(pd.read_csv(io.StringIO(by_bits.csv))) == len(by_bits.rows) == 8
    lines = {line.get_label(): line for one in (by_ratio, by_bits) for line in one.figure.axes[0].get_lines()}
    of_bits = {name: line for name, line in lines.items() if ", ratio " in name}
    assert set(of_bits) == {"dense, ratio 1", "svd, ratio 0.8", "svdllm, ratio 0.8", "svdllm, ratio 0.6"}
    assert {line.get_color() for name, line in of_bits.items() if "svdllm" in name} == {lines["svdllm"].get_color()}
    assert lines["svd"].get_color() != lines["svdllm"].get_color()
    styles = {line._dash_pattern[1] and tuple(line._dash_pattern[1]) for line in of_bits.values()}
    assert len(styles) == 3  # one a ratio


def test_no_two_lines_look_the_same():
    looks = [drawing.look(number) for number in range(60)]
    assert len({look["color"] for look in looks}) == len(drawing.COLOURS) == len(set(drawing.COLOURS))
    assert len({(look["color"], look["linestyle"]) for look in looks}) == 60
    of_one = [drawing.look(3, line)["linestyle"] for line in range(len(drawing.LINES))]
    assert len(set(of_one)) == len(of_one)


@pytest.mark.parametrize(
    ("values", "ticks"),
    [
        ((23, 40), {"25", "30", "35", "40"}),
        ((23, 4000), {"50", "100", "200", "500", "1,000", "2,000"}),
        ((23, 4e6), {"100", "1,000", "10 k", "100 k", "1 M"}),
    ],
)
def test_ticks_are_numbers_as_people_read_them(values, ticks):
    figure, axes = plt.subplots()
    axes.plot([0, 1], values)
    drawing.log_scale(axes, pd.Series(values))
    figure.canvas.draw()
    assert ticks <= {text.get_text() for text in axes.get_yticklabels()}
    plt.close(figure)


QUANTIZED = pd.DataFrame(
    {
        "method": ["dense", "svdllm", "svdllm"],
        "variant": ["quantization=none", "pruning=magnitude 50%, quantization=AWQ INT4 g128", "quantization=INT4"],
        "ratio": ["1", "0.8", "0.6"],
        "counts": ["weights", "weights", "16-bit words"],
        "reached": ["1.0000", "0.7917", "0.5911"],
        "perplexity": ["23.5", "29.1", "40.2"],
        "by token": ["7", "8", "9"],
        "parameters (M)": ["106", "90", "70"],
        "bits a weight": ["16.00", "3.69", "2.86"],
        "size (MB)": ["269", "76", "70"],
        "compression (s)": ["0", "12", "13"],
        "evaluation (s)": ["40", "40", "40"],
    }
)


def test_a_narrow_table_of_quantized_rows_keeps_what_they_are_compared_by():
    text = fitted(QUANTIZED, 120, "x.csv")
    head = text.splitlines()[0]
    assert all(name in head for name in ("counts", "size (MB)", "bits a weight", "perplexity"))
    assert "evaluation (s) = 40" in text  # the same in all rows: told once
    assert max(map(len, text.splitlines())) <= 120
    narrow = fitted(QUANTIZED, 80, "x.csv").splitlines()[0]
    assert "bits a weight" in narrow and "by token" not in narrow


def test_a_narrow_table_without_quantized_rows_gives_up_sizes_before_measurements():
    plain = QUANTIZED.drop(columns=["bits a weight", "variant"])
    head = fitted(plain, 70, "x.csv").splitlines()[0]
    assert "by token" in head and "size (MB)" not in head


def test_a_grid_is_named_without_the_folders_of_its_command(lab):
    [cell] = lab.cells("method=svd")
    assert (
        lab.results.write_grid(["method=svd", "results=/home/me/results", "data_root=/data"], [cell])
        == "method=svd"
    )
    assert lab.results.write_grid(["results=/home/me/results"], [cell]) == "defaults"
