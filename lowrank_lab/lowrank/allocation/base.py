"""The interface of an allocation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from lowrank_lab.lowrank.ranks import Ranks

if TYPE_CHECKING:
    from lowrank_lab.running.context import Context


class Allocation(Protocol):
    """Spends ``context.ratio`` of the cost of ``context.sites``. Raises SkippedCell where that leaves no rank.

    It reads ``tails(context)`` and ``spectra(context)`` of lowrank/artifacts.py, ``context.calibration`` and
    ``context.model``, each computed at its first use, and stores further artifacts by ``context.artifact``. It puts
    whatever else the record should have, besides the ranks, into ``context.facts``.
    ``needs_calibration`` says that it reads calibration tokens, whatever the metric does.
    One that has another target than the ratio has ``meets_ratio = False``: its cells have no ratio.
    One that does little more than read the spectra has ``computes_little = True``: a dry run does not count it.
    """

    needs_calibration: bool

    def __call__(self, context: Context) -> Ranks: ...
