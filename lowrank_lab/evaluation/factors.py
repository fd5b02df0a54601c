"""The distribution of the values of factors (Dobi-SVD, A.7, Figures 5 and 6)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lowrank_lab.basics import checks
from lowrank_lab.basics.errors import SkippedCell
from lowrank_lab.basics.lazy_module import LazyModule
from lowrank_lab.cells import versions
from lowrank_lab.cells.evaluator import Evaluator
from lowrank_lab.evaluation.chosen_sites import chosen_sites
from lowrank_lab.modules.site import Site

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from lowrank_lab.models import walk
    from lowrank_lab.modules import base
    from lowrank_lab.running.context import Context
else:
    np = LazyModule("numpy")
    walk = LazyModule("lowrank_lab.models.walk")
    base = LazyModule("lowrank_lab.modules.base")


class Factors(Evaluator):
    """Histogram, mean, standard deviation and excess kurtosis of the left and right factors of some linears.

    They are the stored ones, with which the model multiplies. The value is the mean of the excess kurtoses:
    0 for normal values, which the paper takes its factors to have, more the heavier the tails.

    linears  roles of models/families.py or paths of linears within a block; None: the first of the attention (the
             queries) and the first of the MLP (the gate)
    blocks   their indices; None for the middle one
    bins     of the histograms, which are even and reach as far on both sides of 0 as the largest value
    """

    version = versions.FACTORS
    component = "FACTORS"
    no_influence = ()
    models = ("compressed", "checkpoint")

    def __init__(self, linears: list[str] | None, blocks: list[int] | None, bins: int) -> None:
        checks.filled(optional=True, linears=linears)
        checks.indices(blocks=blocks)
        checks.whole(1, bins=bins)
        self.linears = linears
        self.blocks = blocks
        self.bins = bins

    def check(self, context: Context) -> None:
        self._chosen(context)

    def __call__(self, context: Context, part: str) -> dict[str, Any]:
        """Measure it: the value, and all of ``linears``. Raises SkippedCell where none of them has factors."""
        blocks = walk.blocks_of(context.model, context.tower)
        found: list[dict[str, Any]] = []
        for site in self._chosen(context).values():
            pair = base.factors_of_linear(blocks[site.block].get_submodule(site.key))
            if pair is not None and all(factor.std() > 0 for factor in pair):  # a zero weight has no distribution
                role = "mlp" if site.key in context.tower.roles.get("mlp", ()) else "attention"
                left, right = (distribution(factor, self.bins) for factor in pair)
                found.append({"linear": site.key, "role": role, "block": site.block, "left": left, "right": right})
        if not found:
            raise SkippedCell(
                "eval=factors: none of the linears asked for is factored, or a factor of each has one value"
            )
        kurtoses = [one[factor]["excess_kurtosis"] for one in found for factor in ("left", "right")]
        return {
            "metric": "excess kurtosis of factors",
            "value": sum(kurtoses) / len(kurtoses),
            "linears": found,
            "protocol": {"linears": [one["linear"] for one in found], "blocks": [one["block"] for one in found]},
        }

    def _chosen(self, context: Context) -> dict[str, Site]:
        model, tower = context.skeleton(), context.tower
        roles = [tower.roles[role] for role in ("attention", "mlp") if role in tower.roles]
        linears = self.linears or [members[0] for members in roles] or [tower.linears[0]]
        blocks = self.blocks or [len(walk.blocks_of(model, tower)) // 2]
        return chosen_sites(model, tower, linears, blocks, "eval.factors")


def distribution(values: Tensor, bins: int) -> dict[str, Any]:
    """``shape``, ``mean``, ``std``, ``excess_kurtosis`` E[(x − mean)⁴] / std⁴ − 3, and the histogram of ``values``.

    ``counts`` of the ``bins`` even bins from -``largest`` to ``largest``, the largest |x|. Raises SkippedCell where
    all values are equal.
    """
    x = values.detach().double().cpu().numpy()
    largest, mean, std = float(np.abs(x).max()), float(x.mean()), float(x.std())
    if std == 0:
        raise SkippedCell("eval=factors: all values of a factor are equal")
    counts, _ = np.histogram(x, bins, (-largest, largest))
    return {
        "shape": list(x.shape),
        "mean": mean,
        "std": std,
        "excess_kurtosis": float((((x - mean) / std) ** 4).mean()) - 3,
        "largest": largest,
        "counts": counts.tolist(),
    }
