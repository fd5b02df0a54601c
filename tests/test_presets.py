"""The perplexity presets: three texts in one job, told apart by what each preset says, tokenised once."""

from __future__ import annotations

import json
import random

import pytest
from omegaconf import OmegaConf

from lowrank_lab.evaluation import perplexity
from lowrank_lab.reporting import tables
from lowrank_lab.reporting.frame import frame
from lowrank_lab.reporting.sections import PERPLEXITY
from lowrank_lab.running import runner

from .conftest import Lab

TEXTS = ("wikitext2", "ptb", "c4")
PRESETS = ("standard", "paper_asvd", "paper_svdllm")
SPLITS = {
    "ptb_text_only/penn_treebank/validation": ("sentence", 40),
    "ptb_text_only/penn_treebank/test": ("sentence", 50),
    "allenai/c4/en/validation": ("text", 2100),  # more than any preset takes
}


@pytest.fixture(scope="module")
def three_texts(data_root, tmp_path_factory):
    """A mirror of all three data sets: the WikiText-2 of the other tests, and words drawn at random."""
    root = tmp_path_factory.mktemp("texts")
    (root / "wikitext").symlink_to(data_root / "wikitext")
    for seed, (split, (field, count)) in enumerate(SPLITS.items()):
        draw = random.Random(seed)
        rows = [{field: " ".join(draw.choices(("low", "rank", "sum", "of", "errors"), k=5))} for _ in range(count)]
        file = root / f"{split}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


@pytest.fixture
def lab(tmp_path, three_texts):
    return Lab(tmp_path / "results", three_texts)


def small(*presets: str) -> list[str]:
    """A job of presets with few short windows, beside the usual evaluator."""
    settings = [f"eval.{preset}_{text}" for preset in presets for text in TEXTS]
    windows = [f"{node}.{setting}" for node in settings for setting in ("seqlen=32", "max_windows=2")]
    return [f"eval=[{','.join(('ppl', *presets))}]", "method=dense", *windows]


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_three_perplexities_with_the_settings_of_ppl(lab, preset):
    [alone] = lab.cells()
    [cell] = lab.cells(f"eval=[ppl,{preset}]")
    assert list(cell.evaluators) == ["ppl", *(f"{preset}_{text}" for text in TEXTS)]
    assert cell.keys.metrics("ppl") == alone.keys.metrics("ppl")
    usual = {"seqlen": 2048, "max_windows": None, "bos": "text", "batch_size": 1}
    for text in TEXTS:
        node = OmegaConf.to_container(cell.cfg.eval[f"{preset}_{text}"])
        assert {name: node[name] for name in usual} == usual
        assert cell.text_of(f"{preset}_{text}").name.startswith(text)
    assert cell.text_of("ppl").name == "wikitext2"


@pytest.fixture(scope="module")
def all_presets(tmp_path_factory, three_texts):
    """A lab in which one job has measured all presets, and its record."""
    lab = Lab(tmp_path_factory.mktemp("presets") / "results", three_texts)
    return lab, lab.run(*small(*PRESETS))


def test_protocols_differ_in_exactly_what_the_preset_says(all_presets):
    _, record = all_presets
    protocols = {name: measured["protocol"] for name, measured in record["metrics"].items()}
    of_content = ("characters", "tokens", "sha256", "windows_available", "tokens_in_tail_dropped")

    def differs(preset: str, text: str) -> dict[str, object]:
        ours, standard = (protocols[f"{name}_{text}"] for name in (preset, "standard"))
        assert ours.keys() == standard.keys()
        return {name: ours[name] for name in ours if name not in of_content and ours[name] != standard[name]}

    assert {name: protocols["standard_c4"][name] for name in ("split", "join", "documents")} == {
        "split": "validation",
        "join": " ",
        "documents": 1100,
    }
    assert protocols["standard_ptb"]["split"] == protocols["standard_wikitext2"]["split"] == "test"
    assert differs("paper_asvd", "wikitext2") == {}
    assert differs("paper_asvd", "ptb") == {"dataset": "ptb_validation", "split": "validation", "documents": 40}
    assert differs("paper_asvd", "c4") == {"join": "\n\n", "documents": 2100}
    assert differs("paper_svdllm", "wikitext2") == {}
    assert differs("paper_svdllm", "ptb") == {}
    assert differs("paper_svdllm", "c4") == {"join": "\n\n", "documents": 2000}


def test_a_text_is_tokenised_once_and_a_perplexity_measured_once(all_presets):
    lab, record = all_presets
    values = {name: measured["value"] for name, measured in record["metrics"].items()}
    made = [stage["stage"] for stage in record["stages"] if not stage.get("reused", True)]
    assert made.count("evaluation tokens") == 6
    assert len(list((lab.root / "artifacts" / "tokens").glob("*/tokens.json"))) == 6
    assert sum(stage.startswith("eval.") for stage in made) == 7
    assert values["standard_ptb"] == values["paper_svdllm_ptb"] != values["paper_asvd_ptb"]


def test_each_number_has_its_own_seconds_and_tables_say_what_differs(all_presets):
    _, record = all_presets
    rows = frame([record]).set_index("evaluator")["evaluation_seconds"]
    stages = {stage["stage"]: stage["made_in"] for stage in record["stages"] if stage["stage"].startswith("eval.")}
    assert {f"eval.{name}": seconds for name, seconds in rows.items()} == pytest.approx(stages)
    assert rows["standard_ptb"] == rows["paper_svdllm_ptb"]  # one measurement
    captions = [caption for caption, _ in tables.groups([record], PERPLEXITY)]
    assert len(captions) == len(set(captions)) == 7
    assert any("2000 documents joined by blank lines" in caption for caption in captions)
    assert "standard_c4 " in runner.summary(record)


@pytest.mark.own_artifacts
def test_a_preset_after_another_computes_what_it_alone_has(lab, monkeypatch):
    measure, measured = perplexity.perplexity, []

    def counting(*arguments):
        measured.append(arguments)
        return measure(*arguments)

    monkeypatch.setattr(perplexity, "perplexity", counting)
    for presets, count in ((("standard",), 4), (("standard", "paper_asvd"), 6), (("paper_svdllm",), 7)):
        lab.run(*small(*presets))
        assert len(measured) == count
