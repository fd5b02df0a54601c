"""What an allocation is given and what it returns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from lowrank_lab.modules.site import Ranks

if TYPE_CHECKING:
    from lowrank_lab.running.context import Context


class Allocation(Protocol):
    """Spends ``context.ratio`` of the cost of ``context.sites``. Raises SkippedCell where that leaves no rank.

    All that it may need is made when first asked for: ``tails(context)`` and ``spectra(context)`` of
    lowrank/artifacts.py, ``context.calibration_ids``, ``context.model``, and artifacts of its own through
    ``context.artifact``. What it finds apart from the ranks it puts into ``context.facts``, for the record.
    ``needs_calibration`` says that it reads calibration tokens, whatever the metric does.
    """

    needs_calibration: bool

    def __call__(self, context: Context) -> Ranks: ...
