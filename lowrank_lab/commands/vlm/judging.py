"""What the model answers to easy-VQA's test questions with the right image, with that of another, and with none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from lowrank_lab.calibration import easy_vqa
from lowrank_lab.calibration.easy_vqa import Question
from lowrank_lab.commands.vlm.packing import prompt
from lowrank_lab.models.smollm2_vlm import IMAGE_TOKEN
from lowrank_lab.process import progress

COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")


def judge(folder: Path, count: int) -> dict[str, dict[str, tuple[float, float, int]]]:
    """Accuracy, its standard error and the number of questions, by image and by kind of question; printed too.

    The answer is the likeliest of all 13. The questions are ``count`` of the test split in an order of seed 0; the
    other image is that of the next question.
    """
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder, backend="pil")
    asked = easy_vqa.questions("test")
    order = torch.randperm(len(asked), generator=torch.Generator().manual_seed(0))[:count].tolist()
    chosen = [asked[number] for number in order]
    shown: dict[str, Callable[[int], int | None]] = {
        "right image": lambda i: chosen[i].image,
        "other image": lambda i: chosen[(i + 1) % len(chosen)].image,
        "no image": lambda i: None,
    }
    results = {}
    for what, image_of in shown.items():
        right: dict[str, list[bool]] = {}
        for i in progress.track(range(len(chosen)), what, "question"):
            answer = likeliest(model, processor, chosen[i].text, image_of(i))
            right.setdefault(kind(chosen[i]), []).append(answer == chosen[i].answer)
        results[what] = {name: _accuracy(right[name]) for name in sorted(right)}
        text = (f"{name} {100 * p:.1f} ± {100 * e:.1f} % of {n}" for name, (p, e, n) in results[what].items())
        print(f"{what}: {', '.join(text)}", flush=True)
    return results


def kind(question: Question) -> str:
    if not question.is_open:
        return "yes/no"
    return "colour" if question.answer in COLOURS else "shape"


@torch.no_grad()
def likeliest(model: Any, processor: Any, question: str, image: int | None) -> str:
    """The answer with the largest likelihood behind the question, all its tokens counted."""
    text = prompt(question) if image is None else IMAGE_TOKEN + prompt(question)
    images = None if image is None else [Image.open(easy_vqa.image_file("test", image))]
    plain = lambda answer: processor.tokenizer.encode(f" {answer}", add_special_tokens=False)
    tokens = {answer: plain(answer) for answer in easy_vqa.answers()}
    longer = [answer for answer in tokens if len(tokens[answer]) > 1]
    scores: dict[str, float] = {}
    for spoken in longer or list(tokens)[:1]:
        inputs = processor(text=text + f" {spoken}", images=images, return_tensors="pt")
        logs = model(**inputs).logits[0, -len(tokens[spoken]) - 1 : -1].log_softmax(-1)
        # Any forward gives the answers of one token, each longer one needs its own.
        scores |= {answer: logs[0, ids[0]].item() for answer, ids in tokens.items() if len(ids) == 1}
        scores[spoken] = sum(logs[place, token].item() for place, token in enumerate(tokens[spoken]))
    return max(scores, key=lambda answer: scores[answer])


def _accuracy(right: list[bool]) -> tuple[float, float, int]:
    mean = sum(right) / len(right)
    return mean, (mean * (1 - mean) / len(right)) ** 0.5, len(right)
