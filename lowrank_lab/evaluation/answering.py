"""How a model of images and text answers a question: by the likelihood of given answers, or by what it writes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Tensor

from lowrank_lab.calibration.image_texts import answer_tokens, answered, pad_token
from lowrank_lab.calibration.question_corpora import Question
from lowrank_lab.evaluation.generation import without_checkpoint_settings
from lowrank_lab.evaluation.robust import NotFiniteError, first_not_finite
from lowrank_lab.models.tasks.base import Batch
from lowrank_lab.models.tasks.image_text import IMAGE_TEXT, inputs_of, joined
from lowrank_lab.running.context import Context

Answered = list[tuple[bool, "float | None"]]  # by question: whether it is right, and the loss of the right answer


def by_likelihood(context: Context, questions: Sequence[Question], asked: Sequence[Batch]) -> Answered:
    """By question, whether the right answer is the likeliest, and its loss among the answers, in nats.

    ``asked`` has for each question what the processor makes of it. Of equally likely answers the other one counts:
    a model that says nothing has nothing right. Raises NotFiniteError where logits are not finite.
    """
    read: list[Batch] = []  # the questions with the tokens of answers, one after the other
    of_questions: list[list[tuple[int, int, list[int]]]] = []
    for question, sample in zip(questions, asked, strict=True):
        kept, answers = _answers(context.processor, question, sample)
        begun = _not_begun_by_others([tuple(ids[:-1]) for ids in answers])
        which = [
            next(i for i, one in enumerate(begun) if one[: len(ids) - 1] == tuple(ids[:-1])) for ids in answers
        ]
        of_questions.append([(len(read) + i, kept - 1, ids) for i, ids in zip(which, answers, strict=True)])
        replaces = sample["input_ids"].shape[1] - kept
        read += [answered(sample, list(one), replaces) for one in begun]
    logits = _logits(context, read)
    found: Answered = []
    for question, places in zip(questions, of_questions, strict=True):
        scores = torch.stack([_log_likelihood(logits[row, start:], ids) for row, start, ids in places])
        is_right = int((scores >= scores[question.answer]).sum()) == 1
        found.append((is_right, float(torch.logsumexp(scores, 0) - scores[question.answer])))
    return found


def _answers(processor: Any, question: Question, sample: Batch) -> tuple[int, list[list[int]]]:
    """How many tokens of a question come before all of its answers, and the tokens of each after these."""
    answers = [answer_tokens(processor, question, answer) for answer in question.answers]
    kept = sample["input_ids"].shape[1] - max(replaces for _, replaces in answers)
    between = lambda replaces: sample["input_ids"][0, kept : sample["input_ids"].shape[1] - replaces].tolist()
    return kept, [between(replaces) + ids for ids, replaces in answers]


def _not_begun_by_others(sequences: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Each sequence once that is not how a longer one begins: a forward of these has the logits of all."""
    unique = sorted(set(sequences), key=len, reverse=True)
    return [one for i, one in enumerate(unique) if not any(other[: len(one)] == one for other in unique[:i])]


def _log_likelihood(logits: Tensor, ids: list[int]) -> Tensor:
    """The log-likelihood of the tokens ``ids``, in nats, from the logits (positions, vocabulary) before each."""
    return torch.log_softmax(logits[: len(ids)], -1)[range(len(ids)), ids].double().sum()


def _logits(context: Context, samples: Sequence[Batch]) -> Tensor:
    batch = joined(samples, pad_token(context.processor))
    batch = {name: tensor.to(context.device) for name, tensor in batch.items()}
    logits = IMAGE_TEXT.logits(context.model, batch)
    if not torch.isfinite(logits[batch["attention_mask"].bool()]).all():
        run = lambda: IMAGE_TEXT.forward(context.model, batch)
        raise NotFiniteError(first_not_finite(context.model, run) or "the model")
    return logits


def by_generation(
    context: Context, questions: Sequence[Question], asked: Sequence[Batch], max_new_tokens: int
) -> Answered:
    """By question, whether what the model writes, greedily, is read as the right answer; there is no loss.

    Raises NotFiniteError where scores of tokens are no numbers.
    """
    model: Any = context.model
    pad, tokenizer = pad_token(context.processor), context.processor.tokenizer
    batch = joined(asked, pad, "left")
    ends = model.generation_config.eos_token_id
    settings = transformers.GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        use_cache=True,
        pad_token_id=pad,
        eos_token_id=tokenizer.eos_token_id if ends is None else ends,
    )
    inputs = inputs_of(model, {name: tensor.to(context.device) for name, tensor in batch.items()})
    check = transformers.LogitsProcessorList([_CheckScores()])
    with without_checkpoint_settings(model):
        whole = model.generate(**inputs, generation_config=settings, logits_processor=check)
    written = whole[:, batch["input_ids"].shape[1] :]
    texts = tokenizer.batch_decode(written, skip_special_tokens=True)
    return [(read(text, one.answers) == one.answer, None) for text, one in zip(texts, questions, strict=True)]


class _CheckScores(transformers.LogitsProcessor):
    """Raises NotFiniteError where the scores of the next token are no numbers."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if scores.isnan().any():
            raise NotFiniteError("the model")
        return scores


def read(text: str, answers: Sequence[str]) -> int | None:
    """The number of the answer that a text gives; None where it gives none of them.

    As LLaVA's evaluation of ScienceQA reads a letter: the text is the answer, begins with it and ". ", or says "The
    answer is" it; a last full stop and, but for letters, the case do not matter.
    """
    text = text.strip().replace("\n", ". ")
    said = re.search(r"The answer is (\w+)", text)
    fold = lambda one: one if len(one) == 1 else one.lower()
    for number, answer in enumerate(answers):
        if fold(text.removesuffix(".")) == fold(answer) or text.startswith(f"{answer}. "):
            return number
    return next((n for n, answer in enumerate(answers) if said and fold(said[1]) == fold(answer)), None)
