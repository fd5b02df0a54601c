"""Questions about images: their data sets, calibration on them, and how many are rightly answered."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration

import lowrank_lab
from lowrank_lab.basics import packages
from lowrank_lab.basics.errors import UserError
from lowrank_lab.calibration.image_texts import answer_tokens, asked, prompt_of
from lowrank_lab.calibration.question_corpora import EasyVQA, Question, Questions, ScienceQA
from lowrank_lab.evaluation.answering import read
from lowrank_lab.models import tiny
from lowrank_lab.modules.attention import RoundedCache
from lowrank_lab.planning.shapes import shapes_of, with_sites
from tests.images import science_qa, vlm_words


def corpus(only: str = "images") -> ScienceQA:
    return ScienceQA("derek-thomas/ScienceQA/default", "derek-thomas/ScienceQA", None, only, "Answer.")


@pytest.fixture(scope="module")
def mirror(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return science_qa(tmp_path_factory.mktemp("mirror") / "data")


def test_questions_are_written_as_llava_asks_them(mirror):
    found = corpus().questions("test", str(mirror))
    assert found.rows[1].text == "Context: Look.\nWhich is 1?\nA. one\nB. two\nC. three\nAnswer."
    assert found.rows[0].text == "Which is 0?\nA. one\nB. two\nAnswer."
    assert found.rows[1].answers == ("A", "B", "C") and found.rows[1].answer == 1
    assert found.open(found.rows[0].image).size == (20, 16)


def test_questions_whose_image_is_not_here_are_counted(mirror):
    counts = {only: corpus(only).questions("test", str(mirror)) for only in ("images", "texts", "all")}
    assert {only: (len(one.rows), one.missing) for only, one in counts.items()} == {
        "images": (6, 1),
        "texts": (1, 0),
        "all": (7, 1),
    }


def test_shuffled_images_are_those_of_others():
    rows = [Question("", ("a",), 0, f"{number % 5}.png", "open") for number in range(20)]
    rows.append(Question("", ("a",), 0, None, "open"))
    shuffled = Questions(rows, Path).with_images("shuffled", 0).rows
    assert all(one.image != other.image for one, other in zip(rows[:-1], shuffled[:-1], strict=True))
    assert {row.image for row in shuffled} == {row.image for row in rows} and shuffled[-1].image is None
    assert all(row.image is None for row in Questions(rows, Path).with_images("none", 0).rows)


def test_files_that_are_missing_are_named_before_work_starts(lab, tmp_path, monkeypatch):
    words = vlm_words(tmp_path / "data")
    folder = tmp_path / "data/derek-thomas/ScienceQA/default"
    (folder / "images/test2.png").rename(tmp_path / "test2.png")
    with pytest.raises(UserError, match=r"names an image that is not there: .*test2.png"):
        lab.cells(*words)
    (tmp_path / "test2.png").rename(folder / "images/test2.png")
    (folder / "train.jsonl").rename(folder / "validation.jsonl")
    with pytest.raises(UserError, match=r"no file .*train.jsonl; .* \(dataset.calibration.split="):
        lab.cells(*words, "method=svdllm")
    lab.cells(*words, "method=svdllm", "dataset.calibration.split=validation")
    with pytest.raises(UserError, match="reads questions about images, and that data set has none"):
        lab.cells("model.path=tiny:llava", "eval=[ppl,scienceqa]", "dataset=wikitext2")
    monkeypatch.setattr(packages, "file_of", lambda *_: None)
    with pytest.raises(UserError, match="easy-vqa, which is not installed; run: pip install --no-deps easy-vqa"):
        lab.cells(*words, "dataset=easy_vqa", "eval=[ppl,questions]")
    with pytest.raises(UserError, match="its processor needs torchvision; run: pip install torchvision"):
        lab.run(*words, "model.path=tiny:idefics3", "method=dense")


def test_easy_vqa_is_read_as_its_package_has_it(tmp_path, monkeypatch):
    data = tmp_path / "easy_vqa" / "data"
    (data / "test/images").mkdir(parents=True)
    (data / "answers.txt").write_text("circle\nno\nyes\n")
    (data / "test/questions.json").write_text(json.dumps([["what?", "circle", 7], ["is it?", "no", 7]]))
    Image.new("RGB", (64, 64)).save(data / "test/images/7.png")
    monkeypatch.setattr(packages, "file_of", lambda _package, name: data / name)
    first, second = EasyVQA("One word.").questions("test", None).rows
    assert first == Question("what?\nOne word.", ("circle", "no", "yes"), 0, "7.png", "open")
    assert (second.answer, second.kind) == (1, "yes or no")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("B", 1),
        ("B.", 1),
        (" B. two\n", 1),
        ("The answer is B.", 1),
        ("The answer is B because", 1),
        ("b", None),
        ("Because", None),
        ("C", None),
        ("", None),
    ],
)
def test_a_letter_is_read_as_llavas_evaluation_does(text, answer):
    assert read(text, ("A", "B")) == answer


def test_a_word_is_read_whatever_its_case():
    assert read("Blue.", ("red", "blue")) == 1 and read("bluebell", ("red", "blue")) is None


def test_answers_follow_the_prompt_of_the_template():
    processor = tiny.processor("llava")
    question = Question("Why?", ("A", "B"), 0, "image", "open")
    assert prompt_of(processor, question) == "USER: <image>\nWhy? ASSISTANT:"
    decoded = [processor.tokenizer.decode(answer_tokens(processor, question, "A", end)[0]) for end in (False, True)]
    assert [text.strip() for text in decoded] == ["A", "A</s>"]
    processor.chat_template = None
    assert prompt_of(processor, question) == "USER: <image>\nWhy? ASSISTANT:"


def accuracy_by_hand(folder: Path, data_root: Path) -> tuple[float, float]:
    """Of the letters, and of what is written, by whole forwards with transformers alone, one question at a time."""
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    processor, found = AutoProcessor.from_pretrained(folder), corpus().questions("test", str(data_root))
    right, written = [], []
    for row in found.rows:
        text = row.text.removesuffix("Answer.") + (
            "Answer with the option's letter from the given choices directly."
        )
        prompt, image, scores = f"USER: <image>\n{text} ASSISTANT:", found.open(row.image), []
        for letter in row.answers:
            inputs = processor(text=f"{prompt} {letter}", images=[image], return_tensors="pt")
            with torch.no_grad():
                logits = model(**inputs).logits.log_softmax(-1)[0, :-1]
            count = len(f" {letter}")  # a byte is a token
            ids = inputs["input_ids"][0, -count:]
            scores.append(float(logits[-count:].gather(1, ids[:, None]).sum()))
        right.append(max(range(len(scores)), key=scores.__getitem__) == row.answer)
        inputs = processor(text=prompt, images=[image], return_tensors="pt")
        new = model.generate(**inputs, max_new_tokens=3, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        written.append(read(processor.tokenizer.decode(new, skip_special_tokens=True), row.answers) == row.answer)
    return sum(right) / len(right), sum(written) / len(written)


def test_accuracy_is_that_of_the_models_own_forward(lab, tmp_path):
    """Question by question; of a compressed model that was saved and loaded, too."""
    words = [*vlm_words(tmp_path / "data"), "eval=[ppl,scienceqa,scienceqa_generation]"]
    words += ["eval.scienceqa.batch_size=4", "eval.scienceqa_generation.max_new_tokens=3"]
    record = lab.run(*words, "method=svdllm", "ratio=0.6", "save=true")
    assert record["status"] == "done", record.get("reason")
    measured = record["metrics"]["scienceqa"]
    by_hand = accuracy_by_hand(lab.root / record["checkpoint"], tmp_path / "data")
    assert (measured["value"], record["metrics"]["scienceqa_generation"]["value"]) == pytest.approx(by_hand)
    assert measured["protocol"]["questions"] == 6 and measured["protocol"]["questions_missing"] == 1
    assert measured["images"].keys() == {"right", "shuffled", "none"}
    assert record["calibration"]["questions"] == record["calibration"]["images"] == 10
    assert record["components"].keys() >= {"QUESTIONS", "IMAGE_TEXTS"}
    config = tiny.EVERY_CONFIG["llava"]["text_config"]
    cached = 2 * 3 * config["num_key_value_heads"] * config["hidden_size"] // config["num_attention_heads"]
    assert record["sizes"]["kv_cache_bytes_per_token"] == 4 * cached
    again = lab.run(*words, f"model.path={lab.root / record['checkpoint']}", "method=dense")
    assert again["metrics"] == record["metrics"]


@pytest.mark.parametrize(
    "words",
    [
        ["method=qsvd"],
        ["method=kron", "quantization=gptq"],
        pytest.param(["method=wsvd", "quantization=smoothquant", "pruning=magnitude"], marks=pytest.mark.slow),
        ["method=svdllm", "targets.tower=vision", "quantization=int8"],
        pytest.param(["method=kron", "targets.tower=vision"], marks=pytest.mark.slow),
        pytest.param(["method=asvd", "model.path=tiny:llava_next"], marks=pytest.mark.slow),
        pytest.param(["method=dobi", "allocation.steps=2"], marks=pytest.mark.slow),
    ],
    ids=lambda words: " ".join(words),
)
def test_every_kind_of_compression(lab, tmp_path, words):
    words = [*vlm_words(tmp_path / "data"), "eval.scienceqa.images=[right]", *words]
    record = lab.run(*words, "ratio=0.6")
    assert record["status"] == "done", record.get("reason")
    assert 0 <= record["metrics"]["scienceqa"]["value"] <= 1
    assert record["sizes"]["ratio_reached"] <= 0.6
    assert ("vision tower" in record["counts"]["unit"]) == ("targets.tower=vision" in words)


def test_what_cannot_be_done_is_skipped(lab, tmp_path):
    words = vlm_words(tmp_path / "data")
    rotated = lab.run(*words, "method=dense", "quantization=quarot")
    assert rotated["status"] == "skipped" and "features of images" in rotated["reason"]
    merged = lab.run(*words, "method=dense", "tokens=tome", "targets.tower=vision")
    assert merged["status"] == "skipped"
    with pytest.raises(UserError, match=r"targets.tower=all: this model has no such tower; choose lang"):
        lab.run(*words, "method=svd", "targets.tower=all")


def test_keys_tell_towers_apart_and_change_no_others(lab, tmp_path):
    words = vlm_words(tmp_path / "data")
    [first], [language], [vision] = (
        lab.cells(*words, *more) for more in ([], ["targets.tower=language"], ["targets.tower=vision"])
    )
    assert first.keys.targets_for_key == "all"
    assert first.key == language.key and first.keys.statistics == language.keys.statistics
    assert first.keys.statistics != vision.keys.statistics and first.keys.compressed != vision.keys.compressed
    assert first.keys.gradients(True) != vision.keys.gradients(True)


def test_a_loaded_model_from_python(tmp_path):
    folder = tmp_path / "llava"
    tiny.build("llava", folder)
    given = {"results": tmp_path / "results", "data_root": str(science_qa(tmp_path / "data"))}
    given |= {"calibration": "scienceqa", "calibration.samples": 10}
    model: Any = LlavaForConditionalGeneration.from_pretrained(folder)
    smaller = lowrank_lab.compress(model, "svdllm", 0.6, **given)
    assert isinstance(smaller, LlavaForConditionalGeneration)
    sample = asked(tiny.processor("llava"), Question("Why?", ("A",), 0, "x", "open"), Image.new("RGB", (40, 30)))
    inputs = {"input_ids": sample["input_ids"], "pixel_values": sample["pixel_values"][0]}
    with torch.no_grad():
        assert not torch.allclose(smaller(**inputs).logits, model(**inputs).logits, atol=1e-3)
    measured_on = {name: value for name, value in given.items() if not name.startswith("calibration")}
    measured = lowrank_lab.evaluate(smaller, "scienceqa", dataset="scienceqa", **measured_on)
    assert measured["scienceqa"]["protocol"]["questions"] == 6


def test_a_dry_run_knows_both_towers(lab, tmp_path):
    words = vlm_words(tmp_path / "data")
    found = {}
    for tower in ("language", "vision"):
        [cell] = lab.cells(*words, "method=svdllm", f"targets.tower={tower}")
        found[tower] = with_sites(shapes_of(cell), cell)
    assert {name.rpartition(".layers.")[0] for name in found["language"].sites} == {"model.language_model"}
    assert {name.rpartition(".layers.")[0] for name in found["vision"].sites} == {"model.vision_tower.encoder"}
    assert found["vision"].positions == 1 + (28 // 7) ** 2 < found["language"].positions


def test_keys_and_values_of_the_language_model_alone_are_rounded(lab, tmp_path):
    words = [*vlm_words(tmp_path / "data"), "eval.scienceqa.images=[right]", "method=svdllm", "quantization=kv4"]
    record = lab.run(*words, "save=true")
    assert record["status"] == "done", record.get("reason")
    model = AutoModelForImageTextToText.from_pretrained(lab.root / record["checkpoint"])
    rounded = [name for name, module in model.named_modules() if isinstance(module, RoundedCache)]
    assert len(rounded) == 3 and all(name.startswith("model.language_model.layers.") for name in rounded)
    again = lab.run(*words[:-2], f"model.path={lab.root / record['checkpoint']}", "method=dense")
    assert again["metrics"] == record["metrics"]
