"""The answers that define a low-rank method. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lowrank_lab.cells.cell import Cell


@dataclass(frozen=True)
class Answers:
    """The answers of a method: one file each in metric/, allocation/, refinement/ and storage/.

    metric      which error is measured
    grouping    which linears are factored as one matrix
    targets     which linears are compressed, and what the ratio counts
    allocation  where rank is spent
    refinement  what is adjusted afterwards; None: nothing
    storage     how the factors are stored
    """

    metric: Any
    grouping: Any
    targets: Any
    allocation: Any
    refinement: Any
    storage: Any

    @property
    def needs_calibration(self) -> bool:
        """Whether any answer reads the calibration text."""
        answers = (self.allocation, self.refinement)
        of_answers = any(answer is not None and answer.needs_calibration for answer in answers)
        return of_answers or bool(self.metric.needs_inputs or self.metric.needs_gradients)

    @property
    def needs_weight_fisher(self) -> bool:
        """Whether the refinement reads the mean (dL/dW)²."""
        return getattr(self.refinement, "needs_weight_fisher", False)

    @property
    def one_backward_pass(self) -> bool:
        """Whether the backward pass for the mean (dL/dW)² also gives all statistics that the metric needs."""
        return self.needs_weight_fisher and not self.metric.needs_outer


def answers_of(cell: Cell) -> Answers:
    """The answers of a cell that has a low-rank compression."""
    compression: Any = cell.compressions["lowrank"]
    return compression.answers
