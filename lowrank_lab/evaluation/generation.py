"""Answers to prompts, by ``generate`` of transformers, and how much they repeat themselves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

from lowrank_lab.artifacts.store import fingerprint
from lowrank_lab.basics import checks
from lowrank_lab.basics.errors import SkippedCell
from lowrank_lab.basics.lazy_module import LazyModule
from lowrank_lab.cells import versions
from lowrank_lab.cells.evaluator import Evaluator
from lowrank_lab.evaluation.robust import NotFiniteError
from lowrank_lab.process import progress

if TYPE_CHECKING:
    import torch
    import transformers

    from lowrank_lab.evaluation import score_check
    from lowrank_lab.running.context import Context
else:
    torch = LazyModule("torch")
    transformers = LazyModule("transformers")
    score_check = LazyModule("lowrank_lab.evaluation.score_check")

NGRAM = 4
KINDS = ("greedy", "sampled")


@dataclass(frozen=True)
class Prompt:
    """A question as a conversation: messages of the user and the assistant in turn, the question last."""

    messages: tuple[str, ...]

    @property
    def question(self) -> str:
        return self.messages[-1]

    @property
    def shots(self) -> int:
        """How many questions with answers precede it."""
        return len(self.messages) // 2

    def text(self) -> str:
        """The bare question; after shots, in the layout of TruthfulQA's QA prompt."""
        if not self.shots:
            return self.question
        pairs = zip(self.messages[::2], self.messages[1::2], strict=False)
        return "".join(f"Q: {question}\nA: {answer}\n\n" for question, answer in pairs) + f"Q: {self.question}\nA:"

    def ids(self, tokenizer: Any, chat: bool) -> list[int]:
        """The tokens of ``text``, or with ``chat`` those of the tokenizer's chat template."""
        if not chat:
            return tokenizer(self.text())["input_ids"]
        roles = ("user", "assistant")
        turns = [{"role": roles[i % 2], "content": message} for i, message in enumerate(self.messages)]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return tokenizer(text, add_special_tokens=False)["input_ids"]


@dataclass(frozen=True)
class Answer:
    """The token ids that a model generated after a prompt, without the end token, and their text.

    ``cut`` says that generation stopped at ``max_new_tokens``.
    """

    ids: list[int]
    text: str
    cut: bool


class Generation(Evaluator):
    """Greedy and sampled answers to prompts, and how much they repeat themselves.

    prompts             ``zero_shot``: questions; ``few_shot``: ``questions`` that follow all ``shots``,
                        whose answers end with their line
    max_new_tokens      where an answer is cut
    temperature, top_p  of the sampled answer
    seed                of the sampled answer, set again for every prompt
    chat                prompts in the tokenizer's chat template, else as they are
    """

    version = versions.GENERATION
    component = "GENERATION"

    def __init__(
        self, prompts: dict[str, Any], max_new_tokens: int, temperature: float, top_p: float, seed: int, chat: bool
    ) -> None:
        checks.whole(NGRAM, max_new_tokens=max_new_tokens)
        checks.seeds(seed=seed)
        checks.above(0, temperature=temperature, top_p=top_p)
        if top_p > 1:
            raise ValueError(f"top_p={top_p} is not valid; it must be a number above 0, at most 1")
        checks.flag(chat=chat)
        self.prompts = _prompts(prompts)
        self.max_new_tokens = max_new_tokens
        self.temperature = float(temperature)
        self.top_p = float(top_p)
        self.seed = seed
        self.chat = chat

    def check(self, context: Context) -> None:
        name = context.cell.source.name
        if self.chat and not context.tokenizer.chat_template:
            raise SkippedCell(f"{name} has no chat template; use eval.{context.evaluator}.chat=false")
        positions = getattr(context.model_config, "max_position_embeddings", None)
        longest = max(len(ids) for ids, _ in self._asked(context)) + self.max_new_tokens
        if positions is not None and longest > positions:
            raise SkippedCell(
                f"a prompt and its answer are up to {longest} tokens; {name} has {positions} positions"
            )

    def _asked(self, context: Context) -> list[tuple[list[int], bool]]:
        """The tokens of every prompt, and whether its answer ends with its line."""
        return [(prompt.ids(context.tokenizer, self.chat), prompt.shots > 0) for prompt in self.prompts]

    def __call__(self, context: Context, part: str) -> dict[str, Any]:
        """Generate all answers and measure them."""
        prompts = self._asked(context)
        protocol = {
            "prompts": fingerprint([prompt.messages for prompt in self.prompts]),
            "zero_shot": sum(not prompt.shots for prompt in self.prompts),
            "few_shot": sum(prompt.shots > 0 for prompt in self.prompts),
            "shots": max(prompt.shots for prompt in self.prompts),
            "chat": self.chat,
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "seed": self.seed,
            "ngram": NGRAM,
        }
        sampling = {"temperature": self.temperature, "top_p": self.top_p}
        try:
            written = write(
                context.model, context.tokenizer, prompts, self.max_new_tokens, sampling, self.seed, context.device
            )
        except NotFiniteError as error:
            return {"metric": "repetition", "value": None, "not_finite": error.layer, "protocol": protocol}
        answers = [
            {"question": prompt.question, "shots": prompt.shots, "greedy": _kept(greedy), "sampled": _kept(sampled)}
            for prompt, (greedy, sampled) in zip(self.prompts, written, strict=True)
        ]
        return {"metric": "repetition", **summary(answers), "answers": answers, "protocol": protocol}


def _kept(answer: Answer) -> dict[str, Any]:
    """The part of an answer that the record has."""
    how_long = {"tokens": len(answer.ids), "cut": answer.cut}
    return {"text": answer.text, **how_long, "repetition": repetition(answer.ids, NGRAM)}


def summary(answers: list[dict[str, Any]]) -> dict[str, Any]:
    """The mean repetition of the greedy answers (``value``) and of the sampled ones.

    Answers that are too short for one are counted in ``too_short``. A mean of nothing is None.
    """
    means: dict[str, float | None] = {}
    too_short = {}
    for kind in KINDS:
        known = [answer[kind]["repetition"] for answer in answers if answer[kind]["repetition"] is not None]
        means[kind] = fmean(known) if known else None
        too_short[kind] = len(answers) - len(known)
    why = {"reason": f"no greedy answer has {NGRAM} tokens"} if means["greedy"] is None else {}
    return {"value": means["greedy"], **why, "sampled": means["sampled"], "too_short": too_short}


def repetition(ids: list[int], n: int) -> float | None:
    """The fraction of the n-grams of ``ids`` that occurred before in them; None where there are no n.

    1 - distinct / all: seq-rep-n of Welleck et al., Neural Text Generation with Unlikelihood Training (2020).
    """
    ngrams = [tuple(ids[start : start + n]) for start in range(len(ids) - n + 1)]
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else None


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

    ``sampling`` has the temperature and top_p; all tokens may be sampled (no top_k), and the settings of the
    checkpoint (such as a repetition penalty) are not used. ``seed`` is set before every answer, and torch's random
    state is the same afterwards. Raises NotFiniteError where logits are not finite.
    """
    model.to(device)
    ends = _end_tokens(model, tokenizer)
    check = transformers.LogitsProcessorList([score_check.CheckScores(model)])
    greedy: dict[str, Any] = {"do_sample": False}
    sampled: dict[str, Any] = {"do_sample": True, "top_k": 0, **sampling}

    def answer(ids: list[int], one_line: bool, way: dict[str, Any]) -> Answer:
        torch.manual_seed(seed)
        settings = transformers.GenerationConfig(
            max_new_tokens=max_new_tokens,
            stop_strings=["\n"] if one_line else None,
            eos_token_id=ends,
            pad_token_id=ends[0] if ends else 0,  # avoids a warning: a single prompt needs no padding
            use_cache=True,
            **way,
        )
        prompt = torch.tensor([ids], device=device)
        whole = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            generation_config=settings,
            logits_processor=check,
            tokenizer=tokenizer,
        )
        new = whole[0, len(ids) :].tolist()
        return _answer(new, ends, tokenizer, one_line, full=len(new) == max_new_tokens)

    random_state = torch.random.fork_rng([device] if device.type == "cuda" else [])
    with torch.inference_mode(), without_checkpoint_settings(model), random_state:
        return [
            (answer(ids, one_line, greedy), answer(ids, one_line, sampled))
            for ids, one_line in progress.track(prompts, "generation", "prompt")
        ]


def _answer(new: list[int], ends: list[int], tokenizer: Any, one_line: bool, full: bool) -> Answer:
    """The generated tokens as an answer; ``full`` says that generation reached its limit of tokens."""
    ended = new[-1] in ends
    ids = new[:-1] if ended else new
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    if one_line:
        text, newline, _ = text.partition("\n")  # the token that ends the line may contain more
        ended = ended or bool(newline)
    return Answer(ids, text, cut=full and not ended)


def _end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end an answer: those that the checkpoint names and that of its tokenizer."""
    named = model.generation_config.eos_token_id
    ends = [*(named if isinstance(named, list) else [named]), tokenizer.eos_token_id]
    return sorted({token for token in ends if token is not None})


@contextmanager
def without_checkpoint_settings(model: Any) -> Iterator[None]:
    """Without the generation settings of the checkpoint, which would apply wherever ours name none."""
    kept, model.generation_config = model.generation_config, transformers.GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = kept


def _prompts(prompts: dict[str, Any]) -> list[Prompt]:
    """All prompts, those without shots first. Raises ValueError where they are not as in the YAML."""
    try:
        if not (isinstance(prompts["zero_shot"], list) and isinstance(prompts["few_shot"]["questions"], list)):
            raise TypeError("a text is no list of questions")
        shots = [text for shot in prompts["few_shot"]["shots"] for text in (shot["question"], shot["answer"])]
        found = [Prompt((question,)) for question in prompts["zero_shot"]]
        found += [Prompt((*shots, question)) for question in prompts["few_shot"]["questions"]]
    except (KeyError, TypeError) as error:
        raise ValueError(
            "prompts is not valid; it must be zero_shot: [...], "
            "few_shot: {shots: [{question, answer}], questions: [...]}"
        ) from error
    if not found or not all(isinstance(text, str) and text.strip() for p in found for text in p.messages):
        raise ValueError("prompts is not valid; it must have at least one question, and none may be empty")
    return found
