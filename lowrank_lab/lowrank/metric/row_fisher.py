"""FWSVD: each row of W weighted by how much the loss depends on it (Hsu et al. 2022; papers/002 §A.6)."""

from __future__ import annotations

from lowrank_lab.lowrank.metric.base import InputStatistics, OutputStatistics, Weights


class RowFisher:
    """R = diag(Σ_j Fisher_ij) with the empirical Fisher information (dL/dW_ij)², averaged over sequences.

    FWSVD minimises ‖Î (W − W')‖ with Î = diag(√ row sums), because a weighted SVD has no closed form for weights
    of single entries.
    """

    needs_inputs = False
    needs_gradients = True
    needs_outer = False

    def __call__(self, inputs: InputStatistics | None, outputs: OutputStatistics | None) -> Weights:
        assert outputs is not None
        return None, outputs.row_fisher
