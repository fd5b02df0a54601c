"""The ``eval=truncation`` evaluator: its protocol as data. one_truncated.py, which needs torch, computes it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from lowrank_lab import checks
from lowrank_lab.cells import versions
from lowrank_lab.evaluation.windows import WindowEvaluator

if TYPE_CHECKING:
    from lowrank_lab.running.context import Context


class Truncation(WindowEvaluator):
    """Truncating one linear's activations against truncating its weight (Dobi-SVD, Figure 11 and A.10).

    The value is the mean, over all linears, blocks and ratios, of how much higher the negative log-likelihood is
    with the weight truncated than with the activations truncated to the same rank, in nats a token: above 0 where
    the paper's claim holds. The activations are those of one window at a time: their best approximation is made
    from the window itself, its later tokens too, and saves nothing. It is a bound, not a compressed model.

    linears  roles of models/families.py or paths of linears within a block; None for all
    blocks   their indices; None for the first, the middle and the last
    ratios   the ranks, as fractions of min(out, in). A rank from ``seqlen`` on truncates no activation, since
             a window has no more tokens; these are left out
    """

    version = versions.TRUNCATION
    component = "TRUNCATION"
    models = ("dense",)

    def __init__(
        self,
        seqlen: int,
        max_windows: int | None,
        bos: Literal["text", "window"],
        linears: list[str] | None,
        blocks: list[int] | None,
        ratios: list[float],
    ) -> None:
        super().__init__(seqlen, max_windows, bos, batch_size=1)
        checks.filled(optional=True, linears=linears)
        checks.indices(blocks=blocks)
        checks.filled(ratios=ratios)
        for ratio in ratios:
            if not checks.is_number(ratio) or not 0 < ratio <= 1:
                raise ValueError(f"ratios={ratio} is not valid; it must be a list of numbers in (0, 1]")
        self.linears = linears
        self.blocks = blocks
        self.ratios = ratios

    def check(self, context: Context) -> None:
        from lowrank_lab.evaluation.one_truncated import chosen_sites

        chosen_sites(context.skeleton(), context.tower, self.linears, self.blocks)

    def __call__(self, context: Context, part: str) -> dict[str, Any]:
        """Measure it: the value, the losses it is made of, and its protocol."""
        from lowrank_lab.evaluation.one_truncated import chosen_sites, compare
        from lowrank_lab.evaluation.robust import NotFiniteError

        windows, protocol = self.windows(context)
        sites = chosen_sites(context.model, context.tower, self.linears, self.blocks)
        protocol |= {
            "linears": list(dict.fromkeys(site.key for site in sites.values())),
            "blocks": sorted({site.block for site in sites.values()}),
            "ratios": list(self.ratios),
        }
        try:
            found = compare(context.model, context.tower, sites, windows, self.ratios, context.device)
        except NotFiniteError as error:
            return {"metric": "truncation", "value": None, "not_finite": error.layer, "protocol": protocol}
        gains = [point["weight_nll"] - point["activation_nll"] for point in found["points"]]
        return {"metric": "truncation", "value": sum(gains) / len(gains), **found, "protocol": protocol}
