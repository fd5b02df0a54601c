"""What an allocation is given and what it returns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from lowrank_lab.lowrank.ranks import Ranks

if TYPE_CHECKING:
    from lowrank_lab.running.context import Bench


class Allocation(Protocol):
    """Spends ``bench.ratio`` of the cost of ``bench.sites``. Raises SkippedCell where that leaves no rank.

    All that it may need is made when first asked for: ``bench.tails`` and ``bench.spectra`` by the metric,
    ``bench.calibration_ids``, ``bench.model``, and artifacts of its own through ``bench.artifact``.
    What it finds beside the ranks it leaves in ``bench.facts``, for the record. ``needs_calibration`` says that it
    reads calibration tokens, whatever the metric does.
    """

    needs_calibration: bool

    def __call__(self, bench: Bench) -> Ranks: ...
