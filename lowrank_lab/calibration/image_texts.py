"""From questions about images to what a model of images and text takes, and to calibration samples."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from lowrank_lab.basics.errors import SkippedCell
from lowrank_lab.calibration.corpora import Part
from lowrank_lab.calibration.images import chosen_samples, settings_of
from lowrank_lab.calibration.question_corpora import Question, QuestionCorpus, Questions
from lowrank_lab.models.tasks.base import Batch
from lowrank_lab.models.tasks.image_text import joined, sample_of

PLAIN = "USER: {image}{text} ASSISTANT:"  # of LLaVA-1.5, for a processor without a chat template


def questions_of(corpus: QuestionCorpus, part: Part, data_root: str | None) -> Questions:
    """The questions of a part of a data set."""
    return corpus.questions(part.split, data_root).first(part.max_documents)


def prompt_of(processor: Any, question: Question) -> str:
    """A question as the model is asked it: in the processor's chat template, the image first."""
    if getattr(processor, "chat_template", None):
        return processor.apply_chat_template([_asked(question)], tokenize=False, add_generation_prompt=True)
    return PLAIN.format(image="" if question.image is None else f"{processor.image_token}\n", text=question.text)


def answer_tokens(processor: Any, question: Question, answer: str, end: bool = False) -> tuple[list[int], int]:
    """The tokens of an answer to a question, and how many of the prompt's last tokens they take the place of.

    These are none unless the tokenizer joins the end of the prompt with the answer. With ``end`` the tokens are
    followed by those that end the answer in the chat template.
    """
    prompt = prompt_of(processor, question)
    whole = f"{prompt} {answer}{processor.tokenizer.eos_token or ''}" if end else f"{prompt} {answer}"
    if getattr(processor, "chat_template", None):
        turns = [_asked(question), {"role": "assistant", "content": [{"type": "text", "text": answer}]}]
        written = processor.apply_chat_template(turns, tokenize=False).rstrip()
        if written.startswith(prompt) and answer in written[len(prompt) :]:
            whole = written if end else written[: written.index(answer, len(prompt)) + len(answer)]
    ids = [processor.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, whole)]
    shared = next((i for i, (one, other) in enumerate(zip(*ids, strict=False)) if one != other), len(ids[0]))
    return ids[1][shared:], len(ids[0]) - shared


def asked(processor: Any, question: Question, image: Any) -> Batch:
    """What ``processor`` makes of a question with its image, of PIL (None: there is none): a batch of one."""
    prompt, start = prompt_of(processor, question), processor.tokenizer.bos_token
    # A template may have written the token that begins a text.
    special = not (start and prompt.startswith(start))
    images = {} if image is None else {"images": [image]}
    return sample_of(processor(text=prompt, **images, add_special_tokens=special, return_tensors="pt"))


def answered(sample: Batch, answer: list[int], replaces: int = 0) -> Batch:
    """A sample of ``asked`` with the tokens of ``answer_tokens``, which are what a loss is of."""
    kept = sample["input_ids"].shape[1] - replaces
    processed = {**sample, "input_ids": sample["input_ids"][:, :kept]}
    with_answer = sample_of({"input_ids": processed["input_ids"]}, answer)
    return {**sample, **{name: with_answer[name] for name in ("input_ids", "attention_mask", "labels")}}


def pad_token(processor: Any) -> int:
    found = processor.tokenizer.pad_token_id
    return processor.tokenizer.eos_token_id or 0 if found is None else found


def image_settings(processor: Any) -> dict[str, Any]:
    """How a processor prepares images, as plain data for the protocol."""
    return settings_of(processor.image_processor)


def digest_of(questions: Questions) -> str:
    """A hash of questions, answers and the pixels of images."""
    digest, images = hashlib.sha256(), {}
    for row in questions.rows:
        digest.update(json.dumps([row.text, row.answers, row.answer]).encode())
        if row.image is not None:
            if row.image not in images:
                images[row.image] = hashlib.sha256(questions.open(row.image).tobytes()).digest()
            digest.update(images[row.image])
    return digest.hexdigest()


def make_samples(
    folder: Path, processor: Any, corpus: QuestionCorpus, part: Part, data_root: str | None, samples: int, seed: int
) -> None:
    """The artifact of a calibration set: questions drawn without replacement, with their right answers."""
    found = questions_of(corpus, part, data_root)
    if not found.rows:
        raise SkippedCell(f"the calibration part '{part.split}' has no question whose image is here")
    drawn = [found.rows[int(number)] for number in chosen_samples(len(found.rows), samples, seed)]
    batch = joined([_sample(processor, row, found) for row in drawn], pad_token(processor))
    save_file({name: tensor.contiguous() for name, tensor in batch.items()}, folder / "image_texts.safetensors")
    facts = {
        "split": part.split,
        "questions": samples,
        "questions_available": len(found.rows),
        "questions_missing": found.missing,
        "images": int(sum(row.image is not None for row in drawn)),
        "tokens": int(batch["attention_mask"].sum()),
        "processor": image_settings(processor),
        "sha256": digest_of(Questions(drawn, found.open)),
    }
    (folder / "image_texts.json").write_text(json.dumps(facts, indent=1))


def load_samples(folder: Path) -> tuple[Batch, dict[str, Any]]:
    """The samples as one batch, and the facts about them that go into the record."""
    return load_file(folder / "image_texts.safetensors"), json.loads((folder / "image_texts.json").read_text())


def _sample(processor: Any, question: Question, questions: Questions) -> dict[str, torch.Tensor]:
    image = None if question.image is None else questions.open(question.image)
    tokens, replaces = answer_tokens(processor, question, question.answers[question.answer], end=True)
    return dict(answered(asked(processor, question, image), tokens, replaces))


def _asked(question: Question) -> dict[str, Any]:
    image = [] if question.image is None else [{"type": "image"}]
    return {"role": "user", "content": [*image, {"type": "text", "text": question.text}]}
