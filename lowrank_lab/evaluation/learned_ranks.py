"""The perplexity with learned ranks during their training (Dobi-SVD, Figure 7)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from lowrank_lab.basics import checks
from lowrank_lab.basics.errors import SkippedCell
from lowrank_lab.basics.lazy_module import LazyModule
from lowrank_lab.cells import versions
from lowrank_lab.evaluation.perplexity import perplexity
from lowrank_lab.evaluation.windows import WindowEvaluator
from lowrank_lab.lowrank.allocation.differentiable import STATES, Differentiable
from lowrank_lab.lowrank.answers import answers_of
from lowrank_lab.lowrank.artifacts import spectra
from lowrank_lab.lowrank.ranks import budget, compressible, fit

if TYPE_CHECKING:
    from lowrank_lab.lowrank import masked
    from lowrank_lab.running.context import Context
else:
    masked = LazyModule("lowrank_lab.lowrank.masked")


class LearnedRanks(WindowEvaluator):
    """Perplexity with the ranks after some steps of their training.

    The ranks of every state are rounded and scaled to the ratio of the cell, like the final ones: during training
    the ratio differs, which would hide the quality of the ranks. The factors are those of the metric, without
    refinement and storage. The value is the perplexity after the last step.

    points  how many states, from the untrained to the last, evenly between; the record keeps no more than 21
    """

    version = versions.LEARNED_RANKS
    component = "LEARNED_RANKS"
    models = ("compressed",)

    def __init__(
        self,
        seqlen: int,
        max_windows: int | None,
        bos: Literal["text", "window"],
        batch_size: int,
        points: int,
        dataset: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(seqlen, max_windows, bos, batch_size, dataset)
        checks.whole(2, points=points)
        if points > STATES:
            raise ValueError(f"points={points} is not valid; it must be a whole number from 2 to {STATES}")
        self.points = points

    def check(self, context: Context) -> None:
        """Raises SkippedCell where no ranks are trained."""
        if not isinstance(answers_of(context.cell).allocation, Differentiable) or context.ratio >= 1:
            raise SkippedCell("eval=learned_ranks needs allocation=differentiable and a ratio below 1")

    def __call__(self, context: Context, part: str) -> dict[str, Any]:
        """Measure it: ``states``, steps of the training, and the perplexity after each."""
        windows, protocol = self.windows(context)
        training = context.record.data["compressions"]["lowrank"]["training"]
        sites = compressible(context.sites)  # the others stay dense
        last = {name: site.last for name, site in sites.items()}
        ranks: dict[str, int | None] = {}

        def mask(name: str) -> Any:
            return lambda count: masked.first(ranks[name] or last[name])(count)

        masks = {name: mask(name) for name in sites}
        model = context.dense_model()
        masked.mask_directions(model, context.tower, sites, spectra(context), last, masks, context.device)
        limit, known = budget(context.sites, context.ratio), len(training["states"])
        places = sorted({round(number * (known - 1) / (self.points - 1)) for number in range(self.points)})
        found = []
        for place in places:
            ranks.update(fit(context.sites, {name: k[place] for name, k in training["k"].items()}, limit))
            found.append(perplexity(model, windows, self.batch_size, context.device))
        return {
            "metric": "perplexity of learned ranks",
            "value": found[-1]["value"],
            **{name: why for name, why in found[-1].items() if name == "not_finite"},
            "states": [training["states"][place] for place in places],
            "perplexity": [one["value"] for one in found],
            "protocol": {**protocol, "points": len(places)},
        }
