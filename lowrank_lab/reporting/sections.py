"""All kinds of measurement that reports show, in their order."""

from __future__ import annotations

from typing import Any

from lowrank_lab.reporting.kinds.accuracy import ACCURACY
from lowrank_lab.reporting.kinds.errors import OUTPUT_ERROR, TRUNCATION
from lowrank_lab.reporting.kinds.other import other
from lowrank_lab.reporting.kinds.perplexity import PERPLEXITY
from lowrank_lab.reporting.kinds.questions import QUESTIONS
from lowrank_lab.reporting.kinds.repetition import REPETITION
from lowrank_lab.reporting.kinds.speed import SPEED
from lowrank_lab.reporting.kinds.top1 import TOP1
from lowrank_lab.reporting.section import Measured, Section

SECTIONS = (PERPLEXITY, ACCURACY, TOP1, QUESTIONS, SPEED, REPETITION, OUTPUT_ERROR, TRUNCATION)


def section_of(measured: Measured) -> Section:
    """The section that shows a measurement: one of SECTIONS, or one for its metric alone."""
    return next((section for section in SECTIONS if section.shows(measured)), other(measured["metric"]))


def sections_of(records: list[dict[str, Any]]) -> list[Section]:
    """SECTIONS, and one for each other metric in ``records``."""
    found = [section_of(measured) for record in records for measured in record["metrics"].values()]
    others = {section.metric: section for section in found if section not in SECTIONS}
    return [*SECTIONS, *(others[metric] for metric in sorted(others))]
