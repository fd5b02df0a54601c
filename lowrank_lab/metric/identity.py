"""Plain SVD: the error is ‖W − W'‖, whatever the inputs are."""

from __future__ import annotations

from lowrank_lab.metric.base import InputStatistics, Weights


class Identity:
    needs_calibration = False

    def __call__(self, statistics: InputStatistics | None) -> Weights:
        return None, None
