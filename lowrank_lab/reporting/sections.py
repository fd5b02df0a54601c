"""How each kind of measurement is shown: one ``Section`` a metric, which tables and figures go through."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Measured = Mapping[str, Any]  # what an evaluator returned: metric, value, protocol and more


@dataclass(frozen=True)
class Section:
    """One kind of measurement in reports.

    metric        the evaluators' ``metric`` that it shows
    title         what stands in captions: "<model>, <title> <describe(protocol)>"
    must_agree    the entries of the protocol that must agree for two numbers to stand in one table
    describe      the protocol in one line
    cells         the measurement's columns as people read them, in order
    details       its numbers in full precision, by the name of their column in the CSV, beside ``value``
    ascending     whether the lowest value ranks first
    """

    metric: str
    title: str
    must_agree: tuple[str, ...]
    describe: Callable[[Mapping[str, Any]], str]
    cells: Callable[[Measured], dict[str, str]]
    details: Callable[[Measured], dict[str, float]] = lambda measured: {}
    ascending: bool = True


def number(value: float | None, form: str = "{:.4g}") -> str:
    """A number as text; nan for the None of a model whose logits are not finite."""
    return "nan" if value is None else form.format(value)


JOINS = {"\n\n": "blank lines", " ": "spaces"}


def _describe_perplexity(protocol: Mapping[str, Any]) -> str:
    count = str(protocol["windows"])
    if protocol["windows"] < protocol["windows_available"]:
        count = f"the first {count} of {protocol['windows_available']}"
    windows = f"{count} windows of {protocol['window']} tokens"
    bos = "" if protocol["bos"] == "text" else ", BOS in every window"
    documents = f"{protocol['documents']} documents joined by {JOINS.get(protocol['join'], repr(protocol['join']))}"
    return f"{protocol['dataset']} {protocol['split']}, {documents}, {windows}{bos}"


PERPLEXITY = Section(
    metric="perplexity",
    title="perplexity on",
    must_agree=("dataset", "split", "join", "documents", "sha256", "window", "stride", "windows", "bos"),
    describe=_describe_perplexity,
    cells=lambda measured: {"perplexity": number(measured["value"])},
)


def fraction(value: float | None) -> str:
    """A fraction as text; — where there is none."""
    return "—" if value is None else f"{value:.3f}"


def _describe_generation(protocol: Mapping[str, Any]) -> str:
    asked = [f"{protocol['zero_shot']} questions alone"] if protocol["zero_shot"] else []
    asked += [f"{protocol['few_shot']} after {protocol['shots']} examples"] if protocol["few_shot"] else []
    chat = " in the chat template" if protocol["chat"] else ""
    return (
        f"{' and '.join(asked)}{chat}, at most {protocol['max_new_tokens']} tokens, sampled at temperature "
        f"{protocol['temperature']:g} and top_p {protocol['top_p']:g} with seed {protocol['seed']}"
    )


def _generation_cells(measured: Measured) -> dict[str, str]:
    if "too_short" not in measured:  # the logits are not finite
        return {"repetition (greedy)": number(None), "repetition (sampled)": number(None), "too short": "—"}
    short = measured["too_short"]
    return {
        "repetition (greedy)": fraction(measured["value"]),
        "repetition (sampled)": fraction(measured["sampled"]),
        "too short": f"{short['greedy']} and {short['sampled']} of {len(measured['answers'])}",
    }


REPETITION = Section(
    metric="repetition",
    title="answers to",
    must_agree=("prompts", "chat", "max_new_tokens", "temperature", "top_p", "seed", "ngram"),
    describe=_describe_generation,
    cells=_generation_cells,
    details=lambda measured: {"sampled": measured["sampled"]} if "sampled" in measured else {},
)

SECTIONS = (PERPLEXITY, REPETITION)
