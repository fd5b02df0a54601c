"""Classes that have moved since cells first named them in keys and records.

A key must not change because a file moves, so keys name a class by its first place.
"""

from __future__ import annotations

FIRST_PLACES = {  # by the present place of a package or class, the place under which keys know it
    "lowrank_lab.cells.targets.": "lowrank_lab.lowrank.sites.",
    "lowrank_lab.lowrank.metric.": "lowrank_lab.metric.",
    "lowrank_lab.lowrank.allocation.": "lowrank_lab.allocation.",
    "lowrank_lab.lowrank.refinement.": "lowrank_lab.refinement.",
    "lowrank_lab.lowrank.storage.": "lowrank_lab.storage.",
    "lowrank_lab.evaluation.perplexity.": "lowrank_lab.evaluation.ppl.",
}


def first_place(target: str) -> str:
    """The ``_target_`` under which keys know a class."""
    for present, first in FIRST_PLACES.items():
        if target.startswith(present):
            return first + target.removeprefix(present)
    return target
