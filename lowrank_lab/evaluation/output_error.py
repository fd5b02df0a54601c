"""The ``eval=output_error`` evaluator: its protocol as data. block_errors.py, which needs torch, computes it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lowrank_lab.cells import versions
from lowrank_lab.errors import SkippedCell
from lowrank_lab.evaluation.windows import WindowEvaluator

if TYPE_CHECKING:
    from lowrank_lab.running.context import Context


class OutputError(WindowEvaluator):
    """How far a compressed model is from its dense original on the text of ``dataset``, layer by layer.

    The value is the relative error of the last block's output in the compressed model. The record also has, as
    block_errors.py defines them, the errors of every linear and block, and of the storage (Dobi-SVD, Table 8).
    """

    version = versions.OUTPUT_ERROR
    component = "OUTPUT_ERROR"
    models = ("compressed",)

    def check(self, context: Context) -> None:
        """Raises SkippedCell where linears are given something else than those of the dense model."""
        for compression in context.cell.compressions.values():
            if not compression.changes_inputs:
                continue
            raise SkippedCell(
                f"{compression.name} changes the inputs of linears, so that they cannot be compared one by one"
            )

    def __call__(self, context: Context, part: str) -> dict[str, Any]:
        """Measure it: the value, what it is made of, and its protocol."""
        from lowrank_lab.evaluation.block_errors import output_errors, storage_errors
        from lowrank_lab.evaluation.robust import NotFiniteError

        windows, protocol = self.windows(context)
        dense, batches = context.dense_model(), windows.split(self.batch_size)
        try:
            found = output_errors(dense, context.model, context.tower, batches, context.device)
        except NotFiniteError as error:
            return {"metric": "output error", "value": None, "not_finite": error.layer, "protocol": protocol}
        value = found["blocks"]["accumulated"][-1]
        storage = storage_errors(context, dense)
        return {"metric": "output error", "value": value, **found, "storage": storage, "protocol": protocol}
