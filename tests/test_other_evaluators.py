"""Numbers of evaluators that reports know nothing of."""

from __future__ import annotations

import csv
from typing import Any

import pytest

from lowrank_lab.cells.evaluator import Evaluator
from lowrank_lab.reporting import page, tables
from lowrank_lab.reporting.fitting import fitted, width_of

HASH = "0123456789abcdef" * 4


class Vowels(Evaluator):
    """A number of a metric that nobody has heard of."""

    version = 1

    def __init__(self, value: Any, metric: str = "vowels a word", protocol: dict[str, Any] | None = None) -> None:
        self.value, self.metric, self.protocol = value, metric, protocol

    def __call__(self, context: Any, part: str) -> dict[str, Any]:
        measured = {"metric": self.metric, "value": self.value, "words": 12, "each": [1, 2]}
        return {**measured, "protocol": self.protocol}


def run(lab: Any, method: str, **settings: Any) -> dict[str, Any]:
    words = {"_target_": f"{__name__}.Vowels", **settings}
    node = ",".join(f"{name}:{'null' if value is None else value}" for name, value in words.items())
    return lab.run(f"method={method}", "+eval.mine={" + node.replace("'", "").replace("None", "null") + "}")


def test_a_number_of_an_unknown_evaluator_is_in_the_tables_the_csv_and_the_page(lab, tmp_path):
    protocol = {"letters": "aeiou", "sha256": HASH, "limit": None}
    run(lab, "dense", value=2.5, protocol=protocol)
    run(lab, "svd", value=None, protocol=protocol)
    records = lab.results.records()
    text = tables.markdown(records)
    assert "**tiny-llama, vowels a word with letters=aeiou, sha256=01234567, limit=None**" in text
    assert "| 2.5 " in text and "| nan " in text
    files = {file.name: file for file in tables.write(records, tmp_path)}
    rows = list(csv.DictReader(files["vowels_a_word.csv"].open()))
    assert [(row["method"], row["value"], row["words"]) for row in rows] == [
        ("dense", "2.5", "12"),
        ("svd", "", "12"),
    ]
    assert rows[0]["protocol_letters"] == "aeiou"
    assert "vowels a word" in files["table.tex"].read_text()
    html = page.write(lab.results, tmp_path / "index.html").read_text()
    assert "vowels a word with letters=aeiou" in html


@pytest.mark.parametrize("settings", [{"value": 3, "metric": "accuracy"}, {"value": "many"}, {"value": 0.5}])
def test_a_known_name_text_and_no_protocol_stop_no_report(lab, settings):
    """The metric of another section without what that section reads, a value that is no number, and no protocol."""
    record = run(lab, "dense", **settings)
    text = tables.markdown([record])
    assert "no protocol on record" in text
    assert "| perplexity " in text  # of the evaluator that every cell here has


def test_a_table_has_the_columns_that_its_width_allows(lab):
    record = lab.run(
        *("method=asvd", "metric.alpha=0.25", "allocation=uniform", "refinement=lora", "quantization=int4"),
        *("refinement.samples=4", "refinement.seqlen=16", "refinement.epochs=1"),
    )
    [(section, _, group)] = tables.all_groups([record])
    table = tables.presentable(group, section)
    assert len(table.columns) == 10
    wide = fitted(table, width_of(table), "x.csv")
    assert max(map(len, wide.splitlines())) == width_of(table)  # nothing is left out, and nothing is wider
    for width in (100, 80, 60):
        text = tables.markdown([record], width)
        assert max(map(len, text.splitlines())) <= width
        assert "evaluation (s)" not in text.partition("(not in")[0]
        assert "perplexity.csv has all)" in text.replace("\n", " ")
        for kept in ("asvd", "metric.alpha=0.25", f"{record['metrics']['ppl']['value']:.4g}"):
            assert kept in text
