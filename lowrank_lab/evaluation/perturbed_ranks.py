"""The perplexity that is lost when a few ranks are moved from where the method put them (Dobi-SVD, Table 10)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from lowrank_lab.basics import checks
from lowrank_lab.basics.errors import SkippedCell
from lowrank_lab.basics.lazy_module import LazyModule
from lowrank_lab.cells import versions
from lowrank_lab.evaluation.low_rank_alone import check_low_rank_alone, ranks_of
from lowrank_lab.evaluation.perplexity import perplexity
from lowrank_lab.evaluation.windows import WindowEvaluator
from lowrank_lab.lowrank.answers import answers_of
from lowrank_lab.lowrank.artifacts import spectra
from lowrank_lab.lowrank.ranks import Ranks
from lowrank_lab.modules.site import Sites

if TYPE_CHECKING:
    from torch import Tensor

    from lowrank_lab.lowrank import spectra as decomposition
    from lowrank_lab.running.context import Context
else:
    decomposition = LazyModule("lowrank_lab.lowrank.spectra")


class PerturbedRanks(WindowEvaluator):
    """Perplexity with x added to the ranks of half of some random linears, and taken from those of the other half.

    A.7.4 of the paper: ten random layers, x added to the first five and taken from the last five, so that the sum
    of all ranks stays. The layers are read as linears in the order in which they are drawn; drawn are only those
    whose rank may change by the largest x. Each model is factored and stored as that of the cell is. The value is
    the relative rise of the perplexity at the last of ``shifts``.

    linears  how many are drawn, an even number (paper: 10)
    shifts   the x, in ranks (paper: 1, 5, 10 and 50, where the width is 4096)
    seed     of the draw
    """

    version = versions.PERTURBED_RANKS
    component = "PERTURBED_RANKS"
    models = ("compressed",)

    def __init__(
        self,
        seqlen: int,
        max_windows: int | None,
        bos: Literal["text", "window"],
        batch_size: int,
        linears: int,
        shifts: list[int],
        seed: int,
        dataset: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(seqlen, max_windows, bos, batch_size, dataset)
        if not checks.is_count(linears, 2) or linears % 2:
            raise ValueError(f"linears={linears} is not valid; it must be an even whole number from 2")
        checks.filled(shifts=shifts)
        for shift in shifts:
            if not checks.is_count(shift, 1):
                raise ValueError(f"shifts={shifts} is not valid; it must be a list of whole numbers from 1")
        checks.whole(0, seed=seed)
        self.linears = linears
        self.shifts = shifts
        self.seed = seed

    def check(self, context: Context) -> None:
        """Raises SkippedCell for a cell whose model is not made of ranks alone."""
        check_low_rank_alone(context, "perturbed_ranks")
        if answers_of(context.cell).refinement is not None:
            raise SkippedCell("eval=perturbed_ranks needs refinement=none: each model would have to be refined")

    def __call__(self, context: Context, part: str) -> dict[str, Any]:
        """Measure it: the perplexity without and with each shift, the relative rises, which linears were drawn."""
        windows, protocol = self.windows(context)
        ranks = ranks_of(context)
        raised, lowered = draw(context.sites, ranks, self.linears, max(self.shifts), self.seed)
        unshifted = self._perplexity(context, windows, ranks)
        of_shifts = [
            self._perplexity(context, windows, shifted(ranks, raised, lowered, shift)) for shift in self.shifts
        ]
        measured = {
            "metric": "perplexity lost to perturbed ranks",
            "shifts": list(self.shifts),
            "raised": raised,
            "lowered": lowered,
            "perplexity": [unshifted["value"], *(one["value"] for one in of_shifts)],
            "protocol": {**protocol, "linears": self.linears},
        }
        for one in (unshifted, *of_shifts):
            if one["value"] is None:
                return {**measured, "value": None, "rises": None, "not_finite": one["not_finite"]}
        rises = [one["value"] / unshifted["value"] - 1 for one in of_shifts]
        return {**measured, "value": rises[-1], "rises": rises}

    def _perplexity(self, context: Context, windows: Tensor, ranks: Ranks) -> dict[str, Any]:
        """The measurement of the model that the cell would have with ``ranks``."""
        model, storage = context.dense_model(), answers_of(context.cell).storage
        what = (model, context.tower, context.sites, ranks)
        decomposition.compress(*what, spectra(context), storage, context.device)
        return perplexity(model, windows, self.batch_size, context.device)


def draw(sites: Sites, ranks: Ranks, count: int, shift: int, seed: int) -> tuple[list[str], list[str]]:
    """``count`` random sites: half whose rank can rise by ``shift``, and half whose rank can fall by it.

    Raises SkippedCell where there are too few.
    """
    drawn = [name for name, rank in ranks.items() if rank is not None]
    random.Random(seed).shuffle(drawn)
    half = count // 2
    raised = [name for name in drawn if (ranks[name] or 0) + shift <= sites[name].full][:half]
    lowered = [name for name in drawn if name not in raised and (ranks[name] or 0) - shift >= 1][:half]
    if len(raised) < half or len(lowered) < half:
        raise SkippedCell(
            f"eval.perturbed_ranks.shifts: fewer than {count} linears can gain or lose {shift} ranks; "
            "use smaller shifts or fewer linears"
        )
    return raised, lowered


def shifted(ranks: Ranks, raised: Sequence[str], lowered: Sequence[str], shift: int) -> Ranks:
    """``ranks`` with ``shift`` added for each of ``raised`` and taken for each of ``lowered``."""
    moved = {**dict.fromkeys(raised, shift), **dict.fromkeys(lowered, -shift)}
    return {name: None if rank is None else rank + moved.get(name, 0) for name, rank in ranks.items()}
