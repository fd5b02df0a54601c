"""Questions about images that are rightly answered, with the right images, with others and with none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lowrank_lab.reporting.section import Measured, Section, number

IN_WORDS = {"right": "accuracy", "shuffled": "shuffled images", "none": "no image"}


def _describe(protocol: Mapping[str, Any]) -> str:
    count = str(protocol["questions"])
    if protocol["questions"] < protocol["questions_available"]:
        count = f"the first {count} of {protocol['questions_available']}"
    missing = protocol["questions_missing"]
    absent = f" ({missing} more have an image that is not here)" if missing else ""
    return f"{protocol['dataset']} {protocol['split']}, {count} questions{absent}, by {protocol['by']}"


def _share(one: Mapping[str, Any]) -> str:
    return "nan" if one["value"] is None else f"{one['value']:.4f} ± {one['stderr']:.4f}"


def _cells(measured: Measured) -> dict[str, str]:
    cells = {IN_WORDS[which]: _share(one) for which, one in measured["images"].items()}
    kinds = measured.get("kinds", {})
    cells |= {kind: _share(one) for kind, one in kinds.items() if len(kinds) > 1}
    loss = measured.get("mean_nll")
    return cells if loss is None else {**cells, "loss (nats)": number(loss)}


def _details(measured: Measured) -> dict[str, float]:
    shares = {which: one["value"] for which, one in measured["images"].items() if which != "right"}
    shares |= {kind: one["value"] for kind, one in measured.get("kinds", {}).items()}
    others = {name: measured.get(name) for name in ("stderr", "mean_nll")}
    return {name: value for name, value in {**shares, **others}.items() if value is not None}


QUESTIONS = Section(
    metric="question accuracy",
    title="answers to",
    must_agree=("dataset", "split", "questions", "sha256", "by", "prompt", "images"),
    describe=_describe,
    cells=_cells,
    details=_details,
    ascending=False,
    entries=("images",),
)
