"""Repetition of generated text; the text itself is in generation.md."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lowrank_lab.reporting.section import Measured, Section, fraction, number


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
