"""All kinds of measurement that reports show, in their order."""

from __future__ import annotations

from lowrank_lab.reporting.kinds.accuracy import ACCURACY
from lowrank_lab.reporting.kinds.errors import OUTPUT_ERROR, TRUNCATION
from lowrank_lab.reporting.kinds.perplexity import PERPLEXITY
from lowrank_lab.reporting.kinds.repetition import REPETITION
from lowrank_lab.reporting.kinds.speed import SPEED

SECTIONS = (PERPLEXITY, ACCURACY, SPEED, REPETITION, OUTPUT_ERROR, TRUNCATION)
