"""Answers to prompts, by ``generate`` of transformers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from lowrank_lab import progress
from lowrank_lab.evaluation.robust import check_output


@dataclass(frozen=True)
class Answer:
    """The token ids that a model wrote after a prompt, without the end token, and their text.

    ``cut`` says that it was stopped at ``max_new_tokens``.
    """

    ids: list[int]
    text: str
    cut: bool


@torch.inference_mode()
def write(
    model: Any,
    tokenizer: Any,
    prompts: list[tuple[list[int], bool]],
    max_new_tokens: int,
    sampling: dict[str, float],
    seed: int,
    device: torch.device,
) -> list[tuple[Answer, Answer]]:
    """The greedy and the sampled answer to each of ``prompts``: its token ids, and whether an answer is one line.

    ``sampling`` has the temperature and top_p; all tokens may be sampled (no top_k), and the checkpoint's own
    settings (a repetition penalty, say) are not used. ``seed`` is set anew for every prompt, and torch's random
    state is left as it was. Raises NotFiniteError where logits are not finite.
    """
    model.to(device)
    ends = _end_tokens(model, tokenizer)
    check = LogitsProcessorList([CheckScores(model)])
    ways: tuple[dict[str, Any], ...] = ({"do_sample": False}, {"do_sample": True, "top_k": 0, **sampling})
    written = []
    with _without_checkpoint_settings(model), torch.random.fork_rng([device] if device.type == "cuda" else []):
        for ids, one_line in progress.track(prompts, "generation", "prompt"):
            prompt = torch.tensor([ids], device=device)
            pair = []
            for way in ways:
                torch.manual_seed(seed)
                settings = GenerationConfig(
                    max_new_tokens=max_new_tokens,
                    stop_strings=["\n"] if one_line else None,
                    eos_token_id=ends,
                    pad_token_id=ends[0] if ends else 0,  # only to be quiet: a single prompt needs no padding
                    use_cache=True,
                    **way,
                )
                whole = model.generate(
                    prompt,
                    attention_mask=torch.ones_like(prompt),
                    generation_config=settings,
                    logits_processor=check,
                    tokenizer=tokenizer,
                )
                new = whole[0, len(ids) :].tolist()
                pair.append(_answer(new, ends, tokenizer, one_line, full=len(new) == max_new_tokens))
            written.append((pair[0], pair[1]))
    return written


def _answer(new: list[int], ends: list[int], tokenizer: Any, one_line: bool, full: bool) -> Answer:
    """What was written as an answer; ``full`` says that no more tokens were allowed."""
    ended = new[-1] in ends
    ids = new[:-1] if ended else new
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    if one_line:
        text, newline, _ = text.partition("\n")  # the token that ends the line may hold more than its end
        ended = ended or bool(newline)
    return Answer(ids, text, cut=full and not ended)


def _end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end an answer: those that the checkpoint names and that of its tokenizer."""
    named = model.generation_config.eos_token_id
    ends = [*(named if isinstance(named, list) else [named]), tokenizer.eos_token_id]
    return sorted({token for token in ends if token is not None})


@contextmanager
def _without_checkpoint_settings(model: Any) -> Iterator[None]:
    """Without the checkpoint's own generation settings, which would fill in what ours leave open."""
    kept, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = kept


class CheckScores(LogitsProcessor):
    """Looks at the scores of every generated token, and changes none."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        check_output(self.model, input_ids, scores.amax(-1))  # -inf is how other processors forbid a token
        return scores
