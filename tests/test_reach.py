"""Every published number of a table with a recipe is met by one of its cells, or the catalogue says why not."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd
import pytest

from lowrank_lab.commands import report
from lowrank_lab.evaluation.harness import Harness
from lowrank_lab.records.results import Results
from lowrank_lab.reporting import measured, promised, published, reach
from lowrank_lab.reporting.paper_tables import left_out, ours_text

WITH_RECIPE = [name for name in published.tables() if published.recipes(name)]


@pytest.mark.parametrize("name", WITH_RECIPE)
def test_every_published_number_is_met_once_or_left_out_with_a_reason(name):
    table = published.load(name)
    found = reach.reach(table)
    wrong = found[~found["reach"].isin((reach.MET, reach.LEFT_OUT))]
    assert len(found) == (table.rows["value"] != "").sum()
    assert wrong.empty, wrong[[*reach.PLACE, "reach"]].to_string()
    assert reach.idle(table, found) == []


def test_what_a_recipe_promises_is_what_its_records_have(lab):
    """Each kind of number by its name, of a tiny model; an evaluator that says more or less would hide a fault."""
    words = ["method=dobi_untrained", "eval=[ppl,speed,output_error]", "eval.output_error.seqlen=32"]
    speed = ["eval.speed.batch_sizes=[1,2]", "eval.speed.seqlens=[4,8]", "eval.speed.new_tokens=1"]
    words += ["eval.output_error.max_windows=2", *speed, "eval.speed.repeats=1"]
    [cell] = lab.cells(*words)
    record = lab.run(*words)
    names = {number[:3] for number, _ in measured.numbers(record)}
    assert set(promised.names(record, cell.evaluators)) == names
    assert {"mse", "mae", "flops", "tokens_per_second", "memory"} <= {metric for metric, _, _ in names}


def test_a_task_is_promised_by_its_own_name():
    tasks = {"piqa": "acc", "truthfulqa_gen": "bleu_acc"}
    harness = Harness(tasks, 0, None, "auto")
    one = {"metrics": ["acc", "bleu_acc"], "protocol": {"shots": {"x": 0}, "data": "x", "source": "hub"}}
    found = {name: {name: {"metrics": {"acc": 0.5, "bleu_acc": 0.25}, "stderr": {}}} for name in tasks}
    record = {"metrics": {"all": harness.combine({name: {**one, "results": found[name]} for name in tasks})}}
    numbers = {number[:3]: number[3] for number, _ in measured.numbers(record)}
    assert numbers == {("accuracy", "piqa", ""): 0.5, ("accuracy", "truthfulqa_gen", ""): 0.25}
    of_harness = set(promised.names({"config": {}}, {"all": harness}))
    assert {name for name in of_harness if name[0] == "accuracy"} == set(numbers)


def test_what_no_cell_has_and_what_two_cells_have_are_faults():
    table = published.load("asvd/table6")
    rows = table.rows.copy()
    rows.loc[0, "metric"] = "flops"
    rows.loc[1, "variant"] = ""  # the settings that tell three of the recipe's cells apart
    found = list(reach.reach(replace(table, rows=rows))["reach"])
    assert found[0] == "no cell of the recipe has it"
    assert found[1].startswith("3 of ours would stand here: ")
    assert set(found[2:]) == {"met"}


def test_a_reason_for_a_number_that_is_met_is_a_fault():
    left_out = ({"method": ["asvd"], "ratio": ["0.9"], "why": "because"},)
    found = reach.reach(replace(published.load("asvd/table6"), left_out=left_out))
    assert set(found.loc[found["ratio"] == "0.9", "reach"]) == {"met, although the catalogue leaves it out"}


def test_a_table_says_what_is_left_out_and_why():
    frame = reach.join_numbers(published.load("dobi/table3"), [], [])
    pruned = frame[frame["method"] == "flap"]
    assert set(pruned["status"]) == {"left out (a method of structured pruning)"}
    assert {ours_text(row, {}) for _, row in pruned.iterrows()} == {"—"}
    [line] = left_out(frame)
    assert line.startswith("left out: LLM-Pruner, LLM-Pruner (w/ LoRA), FLAP on llama-7b (24 numbers): ")


@pytest.mark.parametrize(("faults", "status"), [([], None), (["x/table1: llama-7b svd 0.8: no cell has it"], 1)])
def test_the_count_fails_where_a_number_is_neither_met_nor_left_out(faults, status, monkeypatch, tmp_path, capsys):
    rows = {name: {"met": 3, "left out": 2, "faults": faults} for name in published.tables()[:1]}
    monkeypatch.setattr(reach, "counts", lambda: pd.DataFrame.from_dict(rows, orient="index"))
    if status is None:
        report.report("count", Results(tmp_path), tmp_path)
    else:
        with pytest.raises(SystemExit) as ended:
            report.report("count", Results(tmp_path), tmp_path)
        assert ended.value.code == status
    out = capsys.readouterr().out
    assert "| asvd/table1 " in out and "| 3     | 2 " in out
    assert ("fault: x/table1: llama-7b svd 0.8: no cell has it" in out) == bool(faults)
