"""The page: what stands in it, that nothing in a record can break it, and how it behaves in a browser."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
import subprocess
import sys
from html import escape as html_of
from html.parser import HTMLParser
from urllib.parse import parse_qs

import pandas as pd
import pytest
from matplotlib import pyplot as plt

from lowrank_lab.basics.errors import UserError
from lowrank_lab.cells import config
from lowrank_lab.commands import report
from lowrank_lab.records.results import Results, other_compressions
from lowrank_lab.reporting import page
from lowrank_lab.reporting.page import tags
from lowrank_lab.reporting.page.papers import _colour, _ours, _relative, _without_number
from lowrank_lab.reporting.page.table import number_in
from lowrank_lab.reporting.published import load

from .conftest import REPOSITORY, Lab

VOID = {"meta", "link", "input", "img", "br", "hr"}
HOSTILE = """</script><script>document.documentElement.dataset.hacked = "yes"</script><b>"'&{{ 1 }}\u2028"""


@pytest.fixture(scope="module")
def results(tmp_path_factory, data_root) -> Results:
    """A grid of ASVD's Table 1 with a cell in every state, and hostile records that belong to no grid."""
    lab = Lab(tmp_path_factory.mktemp("page") / "results", data_root)
    done = [
        lab.run(*cell) for cell in (["method=dense"], ["method=svd", "ratio=0.95"], ["method=svd", "ratio=0.8"])
    ]
    asked = [cell for ratio in (0.95, 0.9, 0.85, 0.8) for cell in lab.cells("method=asvd", f"ratio={ratio}")]
    cells = [*lab.cells("method=svd", "ratio=0.95,0.8", multirun=True), *lab.cells("method=dense"), *asked]
    lab.results.write_grid(["experiment=asvd_table1"], cells)
    lab.results.write_grid(["experiment=asvd_figure5"], lab.cells("method=dense"))
    failed, skipped, outdated, _ = asked
    ran = done[1]
    for cell, facts in (
        (
            failed,
            {"status": "failed", "reason": "RuntimeError: out of luck", "traceback": "in luck.py", "metrics": {}},
        ),
        (skipped, {"status": "skipped", "reason": "no rank is left", "metrics": {}}),
        (outdated, {"components": {**ran["components"], "SPECTRA": 0}}),
    ):
        own = {"key": cell.key, "label": cell.label, "method": "asvd", "ratio": cell.ratio}
        lab.results.write({**ran, **own, "config": config.plain(cell.cfg), **facts})
    lab.run("method=svdllm", "ratio=0.8")
    lab.run("method=svd", "ratio=0.8", "quantization=int8")
    lab.run("method=svd", "pruning=magnitude", "eval=[ppl,generation]", "eval.generation.max_new_tokens=4")
    named = {"label": HOSTILE, "model": HOSTILE, "method": HOSTILE, "command": ["run.py", HOSTILE]}
    lab.results.write({**ran, **named, "key": "hostile1"})
    why = {"status": "failed", "reason": HOSTILE, "traceback": HOSTILE, "metrics": {}, "stages": []}
    lab.results.write({**ran, **named, **why, "key": "hostile2"})
    return lab.results


@pytest.fixture(scope="module")
def html(results) -> str:
    return page.html(results)


class Read(HTMLParser):
    """Elements, the text of every cell by table, links and ids; raises AssertionError where tags do not match."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict]] = []
        self.rows: dict[str, list[list[str]]] = {}
        self.texts: dict[str, str] = {}
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        assert len(dict(attributes)) == len(attributes), f"<{tag}> has an attribute twice"
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.table = self.rows.setdefault(dict(attributes)["id"], [])
        if tag == "tr":
            self.table.append([])
        if tag in ("td", "th"):
            self.table[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if {"td", "th"} & set(self.open):
            self.table[-1][-1] += data if "small" not in self.open else f"|{data}"
        elif self.open:
            self.texts[self.open[-1]] = self.texts.get(self.open[-1], "") + data

    def all(self, name):
        return [attributes[name] for _, attributes in self.elements if name in attributes]


@pytest.fixture(scope="module")
def read(html) -> Read:
    return Read(html)


@pytest.fixture(scope="module")
def records(html) -> dict:
    return json.loads(
        re.search(r'<script type="application/json" id="records">(.*?)</script>', html, re.S).group(1)
    )


def test_every_link_has_a_target(read, records):
    ids = read.all("id")
    assert len(ids) == len(set(ids))
    links = [link.removeprefix("#") for link in read.all("href") if link.startswith("#")]
    asked = [parse_qs(link) for link in links if "=" in link]
    keys = [key for one in asked for key in one.get("record", ())]
    assert len(keys) > 20
    assert set(keys) <= set(records)
    assert {figure for one in asked for figure in one.get("large", ())} <= set(ids)
    assert {link for link in links if "=" not in link} <= set(ids)
    assert set(read.all("aria-labelledby")) <= set(ids)


def test_nothing_is_loaded_from_elsewhere(html, read):
    assert all(source.startswith("data:image/png;base64,") for source in read.all("src"))
    assert all(link.startswith(("#", "data:")) for link in read.all("href"))
    style = re.search(r"<style>(.*?)</style>", html, re.S).group(1)
    assert "url(" not in style and "@import" not in style
    assert all(image["alt"].count("against") == 1 for tag, image in read.elements if tag == "img")


def test_figures_can_be_taken_away(read, results):
    figures = [attributes["id"] for tag, attributes in read.elements if tag == "figure"]
    assert figures[0].startswith("figure-perplexity_tiny-llama_")  # that of the headline
    assert figures[1] == "figure-asvd_figure5"  # then the papers', and ours
    assert any(name.startswith("figure-perplexity-by-bits_tiny-llama_") for name in figures)
    pictures = [found for tag, found in read.elements if tag == "img"]
    assert len(pictures) == len(figures)
    for picture in pictures:  # nothing moves when they are decoded
        png = plt.imread(io.BytesIO(base64.b64decode(picture["src"].partition(",")[2])))
        assert png.shape[:2] == (int(picture["height"]), int(picture["width"]))
    files = {found["download"]: found.get("href") for _, found in read.elements if "download" in found}
    for name in (figure.removeprefix("figure-") for figure in figures):
        assert f"{name}.png" in files  # its content is that of the picture; the script gives it
        assert base64.b64decode(files[f"{name}.pdf"].partition(",")[2]).startswith(b"%PDF")
    csv = base64.b64decode(files[f"{figures[0].removeprefix('figure-')}.csv"].partition(",")[2])
    shown = pd.read_csv(io.BytesIO(csv))
    assert set(shown["quantized"]) == {"none"}
    assert set(shown["key"]) <= {record["key"] for record in results.records()}


def test_the_page_begins_with_what_came_out(read, results):
    unpruned = [r for r in results.records() if not other_compressions(r)]
    found = {(r["method"], r["ratio"], r["quantization"]["name"]): r for r in unpruned}
    value = {of: record["metrics"].get("ppl", {}).get("value") for of, record in found.items()}
    of_ratio = {method: value[method, 0.8, "none"] for method in ("svd", "svdllm")}
    best, dense = min(of_ratio, key=of_ratio.get), value["dense", 1.0, "none"]
    said = read.texts["p"]
    assert f"{best} has the lowest perplexity of 2 cells: {of_ratio[best]:.4g}, " in said
    assert f"{of_ratio[best] / dense:.3g} × the dense model's {dense:.4g}." in said


def test_the_best_of_cells_compressed_alike_is_marked_and_perplexities_are_told_by_dense(read, results):
    [table] = [t for t in read.rows.values() if t[0][2:4] == ["perplexity", "× dense"] and len(t) > 4]
    rows = {(row[0], row[1]): row for row in table[1:]}
    assert table[0][:4] == ["method", "ratio", "perplexity", "× dense"]  # in view on a phone
    numbers = {name: float(row[2].removesuffix("★")) for name, row in rows.items()}
    dense = next(r["metrics"]["ppl"]["value"] for r in results.records() if r["method"] == "dense")
    assert rows["dense", "1"][3] == "1"
    for name, row in rows.items():
        assert float(row[3]) == pytest.approx(numbers[name] / dense, rel=0.01)
    alike = [("svd", "0.8"), ("svdllm", "0.8")]
    starred = [name for name, row in rows.items() if row[2].endswith("★")]
    assert starred == [min(alike, key=numbers.get)]
    assert ("svd|INT8", "0.8") in rows  # alone with its bits


def test_answers_are_a_table_a_question(read, results):
    [record] = [r for r in results.records() if "generation" in r["metrics"]]
    answers = record["metrics"]["generation"]["answers"]
    tables = [rows for name, rows in read.rows.items() if name.startswith("answers-")]
    assert len(tables) == len(answers)
    for rows in tables:
        assert rows[0] == ["method", "ratio", "greedy", "repetition", "sampled", "repetition"]
        assert [row[:2] for row in rows[1:]] == [["svd|pruning=magnitude 50%", "0.8"]]
    first = answers[0]["greedy"]["text"].strip()
    assert tables[0][1][2].startswith(first[:1])


def test_every_row_has_values_for_every_filter(read):
    """Also those of cells that have not run, of which there is the label alone."""
    names = {found["data-of"] for _, found in read.elements if "data-of" in found}
    assert names == {"model", "dataset", "method", "ratio", "quantization", "variant"}
    offered = {(found["name"], found["value"]) for tag, found in read.elements if tag == "input"}
    rows = [found for tag, found in read.elements if tag == "tr" and "data-method" in found]
    for row in rows:
        tags = {name: json.loads(row[f"data-{name}"]) for name in names - {"variant"}}
        assert all(tags.values())
        assert {(name, value) for name, values in tags.items() for value in values} <= offered
    assert {("quantization", "INT8"), ("variant", "pruning=magnitude 50%"), ("variant", "none")} <= offered


def test_a_label_alone_gives_its_values():
    found = tags.of_label(
        "svdllm ratio=0.6 metric.alpha=1 GPTQ INT4 llama-7b ptb_validation", ["INT8", "GPTQ INT4"]
    )
    assert found["quantization"] == ["GPTQ INT4"]
    assert (found["method"], found["ratio"], found["model"]) == (["svdllm"], ["0.6"], ["llama-7b"])
    assert found["dataset"] == ["ptb"]  # as tables have it
    assert tags.of_label("dense llama-7b c4", ["INT8"])["quantization"] == ["none"]


def test_states_come_last_are_folded_and_only_those_there_are(html, read):
    ids = [found["id"] for _, found in read.elements if "id" in found]
    tables = [name for name in ids if name in read.rows]
    of_states = [name for name in tables if name.startswith(("grid-", "without-number"))]
    assert of_states == tables[-len(of_states) :]
    [cells] = [found for tag, found in read.elements if tag == "details" and found.get("id") == "cells"]
    assert "open" not in cells
    assert "1 failed" in html and "0 running" not in html and "waits for its turn" not in html


def test_the_state_of_each_cell_of_a_grid(read):
    rows = {(row[0], row[1], row[2]): row[-1] for row in read.rows["grid-2"][1:]}
    assert rows == {
        ("failed", "asvd", "0.95"): "RuntimeError: out of luck",
        ("outdated", "asvd", "0.85"): "made by other component versions; run it again",
        ("skipped", "asvd", "0.9"): "no rank is left",
        ("missing", "asvd", "0.8"): "",
        ("done", "dense", "1"): "",
        ("done", "svd", "0.95"): "",
        ("done", "svd", "0.8"): "",
    }
    assert next(iter(rows))[0] == "failed"  # what needs a look comes first


def test_published_numbers_stand_beside_ours_and_cells_without_one_say_why(read, results):
    lines = {tuple(row[:2]): row for row in read.rows["asvd-table1"][2:]}
    heads = read.rows["asvd-table1"][0]
    place = 2 + 2 * (heads.index("wikitext2") - 2)
    [svd] = [r for r in results.records() if r["method"] == "svd" and r["ratio"] == 0.95]
    published, ours = lines["SVD|llama-7b", "0.95"][place : place + 2]
    assert published == "2800"
    assert re.fullmatch(
        re.escape(f"{svd['metrics']['ppl']['value']:.4g}") + "[a-z]", ours
    )  # no difference: another model
    states = [lines["ASVD|llama-7b", ratio][place + 1] for ratio in ("0.95", "0.9", "0.85", "0.8", "0.75")]
    assert states == ["failed", "skipped", "outdated", "missing", "missing"]
    assert lines[f"SVD|{svd['model']}", "0.8"][place] == "—"  # what the paper does not have


def test_a_difference_is_shown_where_ours_is_of_the_same_model():
    row = {"published": "2800", "ours": 2240.0, "difference": -560.0, "status": "done", "keys": "k", "seeds": 1}
    row |= {"metric": "perplexity", "unit": "", "our_model": "llama-7b", "spread": float("nan")}
    same = _ours(pd.Series({**row, "differs": "8 of 100 windows"}), load("asvd/table1"), {})
    assert (same.text, same.below, same.kind) == ("2240", "−560 · −20 %", "under3 muted")
    another = _ours(pd.Series({**row, "differs": "model llama-7b; 8 of 100 windows"}), load("asvd/table1"), {})
    assert (another.text, another.below, another.kind) == ("2240", "", "")


def test_a_method_that_is_not_ours_is_not_missing(read):
    """LLM-Pruner in a table of which nothing else has run either."""
    assert _without_number("missing", (), "llm_pruner", load("dobi/table3")).text == "—"
    assert _without_number("missing", (), "dobi", load("dobi/table3")).text == "missing"
    failed = _without_number("failed (ValueError: f(x) (no))", ("k",), "dobi", load("dobi/table3"))
    assert (failed.text, failed.title, failed.link) == ("failed", "ValueError: f(x) (no)", "#record=k")


def test_own_tables_have_every_done_cell_and_the_others_their_reason(read, results):
    done = [r for r in results.records() if r["status"] == "done" and r["components"].get("SPECTRA") != 0]
    own = [row for name, rows in read.rows.items() if name.startswith("own-") for row in rows[1:]]
    assert len(own) == sum(len(r["metrics"]) for r in done)
    without = {row[0]: row[-1] for row in read.rows["without-number"][1:]}
    assert set(without) == {"failed", "skipped", "outdated"}
    assert any(HOSTILE in row for row in read.rows["without-number"])


def test_a_records_facts_are_enough_to_repeat_it_and_no_bulk(records, results):
    for record in results.records():
        told = records[record["key"]]
        assert told["configuration"] == record["config"]
        assert told["command"].startswith("python ")
        assert told["about"]["git commit"].startswith(str(record["git"]["commit"]))
        assert told["stages"] == record["stages"]
        assert {name: found["protocol"] for name, found in told["metrics"].items()} == {
            name: found["protocol"] for name, found in record["metrics"].items()
        }
        assert "ranks" not in json.dumps(told["sizes"]) and "compressions" not in told
    assert {told["state"] for told in records.values()} == {"done", "failed", "skipped", "outdated"}


def test_text_from_records_is_text(html, read, records):
    assert sum(tag == "script" for tag, _ in read.elements) == 2
    assert not any(tag == "b" for tag, _ in read.elements)
    assert any(cell == HOSTILE for rows in read.rows.values() for row in rows for cell in row)
    assert records["hostile2"]["reason"] == HOSTILE
    assert "49" not in HOSTILE and "{{ 1 }}" in read.texts["h3"]  # nor is it a template


def test_numbers_that_json_does_not_have_do_not_break_the_page(results, tmp_path):
    folder = shutil.copytree(results.root, tmp_path / "results")
    record = Results(folder).find("hostile1")
    record["config"]["clip"] = [float("inf"), 1.0]  # as YAML's .inf
    Results(folder).write(record)
    text = page.html(Results(folder))
    found = re.search(r'id="records">(.*?)</script>', text, re.S).group(1)
    assert json.loads(found, parse_constant=pytest.fail)["hostile1"]["configuration"]["clip"] == ["inf", 1.0]


def test_the_same_records_give_the_same_bytes(results, html):
    """In another process, whose sets have another order, at the end of all reports."""
    command = [sys.executable, "report.py", f"--results={results.root}"]
    subprocess.run(command, cwd=REPOSITORY, check=True, env={**os.environ, "PYTHONHASHSEED": "1"})
    assert (results.root / "index.html").read_text() == html


def test_the_page_goes_where_it_is_told(results, html, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["report.py", "page", f"--results={results.root}", f"--out={tmp_path}"])
    report.main()
    assert capsys.readouterr().out == f"wrote {tmp_path / 'index.html'}\n"
    assert (tmp_path / "index.html").read_text() == html


def test_nothing_measured_is_one_line(tmp_path):
    with pytest.raises(UserError, match="run something first"):
        page.write(Results(tmp_path), tmp_path / "index.html")
    assert not (tmp_path / "index.html").exists()


@pytest.mark.parametrize(
    ("relative", "colour", "text"),
    [
        (0.0099, "agrees", "+1.0 %"),
        (0.01, "over1", "+1.0 %"),
        (-0.05, "under2", "−5.0 %"),
        (-0.2, "under3", "−20 %"),
        (8.5, "over3", "+850 %"),
        (99, "over3", "× 100"),
        (18108, "over3", "× 18,109"),
        (2e7, "over3", "× 2.00e+07"),
    ],
)
def test_differences_have_steps_of_colour(relative, colour, text):
    assert (_colour(relative), _relative(relative)) == (colour, text)


def test_numbers_are_found_where_a_text_begins_with_one():
    texts = ("0.24 ± 0.04", "27,660", "6.4e+05", "1.18 (1.10–1.20)", "-3", "nan", "—", "missing", "3-bit")
    assert [number_in(text) for text in texts] == [0.24, 27660, 6.4e5, 1.18, -3, None, None, None, 3]


# ---- in a browser

PROBE = """<script>
const errors = [];
window.addEventListener("error", (event) => errors.push(event.message));
console.error = console.warn = (...words) => errors.push(words.join(" "));
</script>"""
TOLD = """<script>
addEventListener("load", () => setTimeout(() => {
  const table = (id) => [...document.querySelectorAll(`#${id} tbody tr`)].filter((row) => !row.hidden)
    .map((row) => [...row.cells].map((cell) => cell.firstChild?.textContent ?? ""));
  const click = (selector) => document.querySelector(selector).click();
  const told = (() => { %s })();
  const root = document.documentElement;
  parent.postMessage({
    ...told, errors, hash: location.hash, inner: innerWidth, width: root.scrollWidth,
    count: document.getElementById("shown").textContent, hacked: root.dataset.hacked ?? "no",
  }, "*");
}, 100));
</script>"""
# Windows are at least 500 px wide, frames are not.
FRAME = """<!doctype html><body style="margin: 0"><script>
addEventListener("message", (event) => { document.body.dataset.told = JSON.stringify(event.data); });
</script><iframe src="%s" style="width: %dpx; height: 800px; border: 0"></iframe></body>"""


@pytest.fixture(scope="module")
def chromium() -> str:
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("no Chromium here; install it with: apt-get install chromium")
    return found


@pytest.fixture
def browse(chromium, html, tmp_path):
    """Open the page at an address in a window of some width, run a script in it, and return what it tells."""

    def browse(address: str = "", script: str = "return {}", width: int = 1300) -> dict:
        file, frame = tmp_path / "index.html", tmp_path / "frame.html"
        frame.write_text(FRAME % (html_of(f"{file.as_uri()}{address}", quote=True), width))
        file.write_text(html.replace("<head>", f"<head>{PROBE}").replace("</body>", f"{TOLD % script}</body>"))
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr"]
        flags += [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1300,900", "--virtual-time-budget=3000"]
        command = [chromium, *flags, "--dump-dom", frame.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
        [body] = [attributes for tag, attributes in Read(done.stdout).elements if tag == "body"]
        told = json.loads(body["data-told"])
        assert told["errors"] == []
        assert "CONSOLE" not in done.stderr
        assert told["hacked"] == "no"
        return told

    return browse


def test_filters_in_the_address_hide_the_other_rows_of_all_tables(browse, read):
    told = browse("#method=svd&ratio=0.8", "return { papers: table('asvd-table1'), grid: table('grid-2') }")
    assert told["papers"] and {tuple(row[:2]) for row in told["papers"]} == {("SVD", "0.8")}
    assert [row[:3] for row in told["grid"]] == [["done", "svd", "0.8"]]
    total = sum(tag == "tr" and "data-method" in attributes for tag, attributes in read.elements)
    left, rows = map(int, re.fullmatch(r"(\d+) of (\d+) rows", told["count"]).groups())
    assert rows == total
    fitting = [
        attributes
        for tag, attributes in read.elements
        if tag == "tr" and "svd" in json.loads(attributes.get("data-method", "[]"))
    ]
    assert left == sum(json.loads(attributes["data-ratio"]) == ["0.8"] for attributes in fitting)


def test_controls_change_the_address_and_reset_shows_all_again(browse):
    script = """
      click("input[name=method][value=svd]");
      const filtered = [location.hash, document.getElementById("shown").textContent, table("grid-2").length];
      click("#reset");
      return { filtered, rows: table("grid-2").length };
    """
    told = browse("", script)
    assert told["filtered"][0] == "#method=svd"
    assert " of " in told["filtered"][1]
    assert told["filtered"][2] == 2
    assert told["rows"] == 7
    assert re.fullmatch(r"\d+ rows", told["count"])


def test_figures_and_columns_follow_the_filters_too(browse):
    script = """
      const shown = (selector) => [...document.querySelectorAll(selector)].filter((one) => one.checkVisibility());
      return {
        heads: shown("#asvd-table1 th[scope=colgroup]").map((one) => one.textContent),
        row: shown("#asvd-table1 tbody tr")[0]?.cells.length,
        cells: shown("#asvd-table1 tbody tr:first-of-type td").length,
        figures: shown("figure").map((one) => one.id.split("_")[0]),
      };
    """
    every, of_text, quantized = (browse(at, script) for at in ("", "#dataset=wikitext2", "#quantization=INT8"))
    assert len(every["heads"]) > 1 and of_text["heads"] == ["wikitext2"]
    assert of_text["cells"] == 4 < of_text["row"]
    assert every["figures"] == of_text["figures"]
    assert {"figure-perplexity", "figure-asvd", "figure-perplexity-by-bits"} == set(every["figures"])
    assert quantized["figures"] == ["figure-asvd", "figure-perplexity-by-bits"]  # the paper's knows no quantization


def test_filters_that_leave_nothing_say_so(browse):
    script = "return { said: document.getElementById('nothing').checkVisibility() }"
    assert browse("#method=svd&ratio=0.85", script)["said"] is True
    assert browse("#method=svd&ratio=0.8", script)["said"] is False


def test_a_figure_opens_large_and_closes(browse):
    script = """
      document.querySelector("figure a").click();
      const large = document.getElementById("large");
      const opened = [large.open, large.querySelector("img").getBoundingClientRect().width, location.hash];
      const png = document.querySelector("a.png").href === document.querySelector("figure img").src;
      large.querySelector("button").click();
      return { opened, png, closed: large.open };
    """
    told = browse("", script, width=390)
    assert told["opened"][0] is True and told["opened"][1] > 700
    assert told["opened"][2].startswith("#large=figure-perplexity_")
    assert (told["png"], told["closed"]) == (True, False)


def test_method_and_perplexity_are_in_view_on_a_phone(browse):
    script = """
      const tables = [...document.querySelectorAll("[id^=own-]")];
      const table = tables.find((one) => one.rows[0].cells[2].textContent === "perplexity");
      const right = table.rows[1].cells[2].getBoundingClientRect().right;
      table.closest(".box").scrollLeft = 1000;
      const box = table.closest(".box").getBoundingClientRect().left;
      return { right, moved: table.rows[1].cells[2].getBoundingClientRect().left - box,
        first: table.rows[1].cells[0].getBoundingClientRect().left - box };
    """
    told = browse("", script, width=390)
    assert told["right"] <= 390
    assert told["moved"] < 50 and 0 <= told["first"] < 3  # the first column stays


def test_a_click_on_a_header_sorts_numbers_as_numbers_and_empty_cells_last(browse):
    script = """
      const button = document.querySelector("#asvd-table1 button[aria-label='wikitext2, published']");
      const column = Number(button.dataset.column);
      const read = () => [table("asvd-table1").map((row) => row[column]), button.parentElement.ariaSort];
      const found = [read()];
      for (const turn of [1, 2, 3]) { button.click(); found.push(read()); }
      return { found };
    """
    before, ascending, descending, after = browse("", script)["found"]
    assert [state for _, state in (before, ascending, descending)] == ["none", "ascending", "descending"]
    assert after == before
    numbers = [float(text) for text in before[0] if number_in(text) is not None]
    assert len(numbers) > 15 and numbers != sorted(numbers)
    rest = [text for text in before[0] if number_in(text) is None]
    assert set(rest) == {"nan", "—"}
    last = rest.count("nan") * ["nan"] + rest.count("—") * ["—"]
    assert [float(text) for text in ascending[0][: len(numbers)]] == sorted(numbers)
    assert [float(text) for text in descending[0][: len(numbers)]] == sorted(numbers, reverse=True)
    assert ascending[0][len(numbers) :] == descending[0][len(numbers) :] == last


def test_an_address_holds_filters_sorting_and_the_open_record(browse, results):
    [svd, *_] = [r for r in results.records() if r["method"] == "svd" and r["ratio"] == 0.8]
    script = """
      const dialog = document.getElementById("record");
      const shown = [dialog.open, dialog.textContent];
      const order = table("grid-2").map((row) => row[2]);
      dialog.close();
      return { shown, order };
    """
    told = browse(f"#method=svd&sort=grid-2.2.ascending&record={svd['key']}", script)
    assert told["order"] == ["0.8", "0.95"]
    assert told["shown"][0] is True
    for text in (svd["label"], svd["git"]["commit"], "window: 32", "model conversion", "_target_: lowrank_lab."):
        assert text in told["shown"][1]


def test_a_number_opens_its_record_beside_the_filters_and_closing_returns_to_it(browse):
    script = """
      const link = [...document.querySelectorAll("[id^=own-] a")].find((one) => one.checkVisibility());
      link.focus();
      link.click();
      const dialog = document.getElementById("record");
      const opened = [dialog.open, location.hash];
      dialog.querySelector("button").click();
      return { opened, closed: dialog.open, focus: document.activeElement === link };
    """
    told = browse("#ratio=1", script)
    assert told["opened"][0] is True
    assert re.fullmatch(r"#ratio=1&record=\w+", told["opened"][1])
    assert told["closed"] is False
    assert told["focus"] is True


def test_hostile_records_are_shown_as_they_are(browse):
    script = 'return { text: document.getElementById("record-content").textContent }'
    assert HOSTILE in browse("#record=hostile2", script)["text"]


@pytest.mark.parametrize(
    ("address", "script"),
    [
        ("", "return {}"),
        ("#record=hostile2", "return {}"),
        ("", 'document.querySelectorAll("details").forEach((one) => { one.open = true; }); return {}'),
    ],
    ids=["page", "record", "unfolded"],
)
def test_nothing_but_tables_scrolls_sideways_on_a_phone(browse, address, script):
    boxes = """for (const box of document.querySelectorAll(".box"))
      if (box.getBoundingClientRect().right > innerWidth) errors.push("a box is wider than the screen");"""
    told = browse(address, f"{boxes} {script}", width=390)
    assert told["inner"] == 390
    assert told["width"] <= 390


def test_what_is_pressed_is_large_enough_for_a_finger(browse):
    script = """
      const small = [...document.querySelectorAll("button, summary, .filter label")]
        .filter((one) => one.checkVisibility() && one.getBoundingClientRect().height < 38);
      return { small: small.map((one) => one.textContent) };
    """
    assert browse("#ratio=1", script, width=390)["small"] == []
