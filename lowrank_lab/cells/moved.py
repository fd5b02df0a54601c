"""Classes that have moved since cells first named them in keys and records.

A key must not change because a file moves, so keys name a class by its first place. A record names it by the place
that it had when the record was written, so readers look it up by its present one.
"""

from __future__ import annotations

FIRST_PLACES = {  # by the present place of a package or class, the place under which keys know it
    "lowrank_lab.lowrank.metric.": "lowrank_lab.metric.",
    "lowrank_lab.lowrank.allocation.": "lowrank_lab.allocation.",
    "lowrank_lab.lowrank.refinement.": "lowrank_lab.refinement.",
    "lowrank_lab.lowrank.storage.": "lowrank_lab.storage.",
}


def first_place(target: str) -> str:
    """The ``_target_`` under which keys know a class."""
    return _replaced(target, FIRST_PLACES)


def present_place(target: str) -> str:
    """The ``_target_`` by which a class of a record, old or new, is found today."""
    return _replaced(target, {first: present for present, first in FIRST_PLACES.items()})


def _replaced(target: str, places: dict[str, str]) -> str:
    for start, other in places.items():
        if target.startswith(start):
            return other + target.removeprefix(start)
    return target
