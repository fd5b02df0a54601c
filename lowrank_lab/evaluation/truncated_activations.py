"""The dense model with the activations of all its linears truncated at once (Dobi-SVD, Table 1)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from lowrank_lab.basics.lazy_module import LazyModule
from lowrank_lab.cells import versions
from lowrank_lab.evaluation.low_rank_alone import check_low_rank_alone, ranks_of
from lowrank_lab.evaluation.perplexity import perplexity
from lowrank_lab.evaluation.windows import WindowEvaluator

if TYPE_CHECKING:
    from lowrank_lab.lowrank import masked
    from lowrank_lab.running.context import Context
else:
    masked = LazyModule("lowrank_lab.lowrank.masked")


class TruncatedActivations(WindowEvaluator):
    """Perplexity of the dense model where the output of every linear is truncated to its rank in the cell.

    The output W x of one window at a time, the bias apart, is replaced by its best approximation of that rank, in
    all linears at once; a linear that the cell leaves dense stays as it is. Beside it stands the perplexity of the
    cell's model, whose weights have these ranks: that of ``method=svd`` is the paper's "Weight".
    The approximation uses the window itself, also its later tokens, and saves nothing: it is a bound, not a
    compressed model. A rank from ``seqlen`` on truncates nothing, since a window has no more tokens;
    ``untruncated`` counts the linears with such a rank.
    """

    version = versions.TRUNCATED_ACTIVATIONS
    component = "TRUNCATED_ACTIVATIONS"
    models = ("compressed",)

    def __init__(
        self,
        seqlen: int,
        max_windows: int | None,
        bos: Literal["text", "window"],
        dataset: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(seqlen, max_windows, bos, batch_size=1, dataset=dataset)  # a decomposition a window

    def check(self, context: Context) -> None:
        check_low_rank_alone(context, "truncated_activations")

    def __call__(self, context: Context, part: str) -> dict[str, Any]:
        """Measure it: the perplexity (``value``), that of the dense model on the same windows, and the protocol."""
        windows, protocol = self.windows(context)
        found: dict[str, Any] = {"metric": "perplexity of truncated activations", "protocol": protocol}
        model = context.dense_model()
        dense = perplexity(model, windows, self.batch_size, context.device)
        if dense["value"] is None:  # no activation to decompose
            return {**found, "value": None, "not_finite": dense["not_finite"]}
        ranks = {name: rank for name, rank in ranks_of(context).items() if rank is not None}
        masks = {name: masked.first(rank) for name, rank in ranks.items()}
        sites = {name: context.sites[name] for name in ranks}
        masked.mask_activations(model, context.tower, sites, masks)
        return {
            **found,
            **perplexity(model, windows, self.batch_size, context.device),
            "dense": dense["value"],
            "untruncated": sum(rank >= self.seqlen for rank in ranks.values()),
        }
