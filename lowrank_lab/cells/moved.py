"""Classes that have moved to another module.

A key must not change because a file moves, so keys name a class by its original module.
"""

from __future__ import annotations

ORIGINAL_TARGETS = {  # by the present name of a package or class, its name in keys
    "lowrank_lab.cells.targets.": "lowrank_lab.lowrank.sites.",
    "lowrank_lab.lowrank.metric.": "lowrank_lab.metric.",
    "lowrank_lab.lowrank.allocation.": "lowrank_lab.allocation.",
    "lowrank_lab.lowrank.refinement.": "lowrank_lab.refinement.",
    "lowrank_lab.lowrank.storage.": "lowrank_lab.storage.",
    "lowrank_lab.evaluation.perplexity.": "lowrank_lab.evaluation.ppl.",
}


def original_target(target: str) -> str:
    """The name of a class in keys, from its present ``_target_``."""
    for present, original in ORIGINAL_TARGETS.items():
        if target.startswith(present):
            return original + target.removeprefix(present)
    return target
