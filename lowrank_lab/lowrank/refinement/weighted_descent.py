"""Weighted SVD (papers/000): every weight has its own importance, so gradient descent finds the factors.

Among the products of rank k, it looks for the one of least weighted error, Σ a²ᵢⱼ (W − L R)²ᵢⱼ, by scaled
alternating steepest descent. With R fixed every row of L is a separate least-squares problem, with the matrix
R diag(a²ᵢ) Rᵀ. Alternating least squares solves these exactly, at out · in · k² a sweep. This method takes one
gradient step of exact length for each row instead, at out · in · k. All rows share one preconditioner: with
a² ≈ p qᵀ (its mean over rows times its mean over columns) the problems have the matrices pᵢ R diag(q) Rᵀ, so that
in the scaled factors √p L and R √q it is (R Rᵀ)⁻¹ for all. The error never rises, there is no learning rate, and
the settings carry over between sites and models.

On SmolLM2's linears ten steps end where 100 of Adam at its best learning rate do, for a fifth of the
multiplications, and lower than two sweeps of exact alternating least squares, for a twentieth of theirs
(conf/refinement/weighted_descent.yaml has the numbers). The idea is Tanner and Wei's (2016, for matrix completion).
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowrank_lab.artifacts.store import write_json
from lowrank_lab.basics import checks
from lowrank_lab.basics.lazy_module import LazyModule
from lowrank_lab.lowrank import artifacts
from lowrank_lab.lowrank.ranks import Ranks
from lowrank_lab.modules.site import Site, Sites, by_block
from lowrank_lab.process import progress

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from lowrank_lab.calibration import gradients
    from lowrank_lab.lowrank import factors, spectra
    from lowrank_lab.models import walk
    from lowrank_lab.modules import factorized, positive
    from lowrank_lab.running.context import Context
else:
    torch = LazyModule("torch")
    gradients = LazyModule("lowrank_lab.calibration.gradients")
    factors = LazyModule("lowrank_lab.lowrank.factors")
    spectra = LazyModule("lowrank_lab.lowrank.spectra")
    walk = LazyModule("lowrank_lab.models.walk")
    factorized = LazyModule("lowrank_lab.modules.factorized")
    positive = LazyModule("lowrank_lab.modules.positive")

RIDGE = 1e-6  # of the preconditioner, relative to its mean: float32 must factor it where a direction is empty


class WeightedDescent:
    """Minimise Σ a²ᵢⱼ (W − W')²ᵢⱼ over the factors of W', from the closed form's on.

    The importance is that of the first-order change L(w) − L(w') ≈ dL/dw (w − w'): a² = mean over the calibration
    sequences of (dL/dW)².

    steps  of each site; one moves both factors
    floor  added to a², as a fraction of its mean over the site: a weight without a gradient in any calibration
           sequence then still stays near its value, and no problem is singular
    """

    needs_calibration = True
    needs_weight_fisher = True

    def __init__(self, steps: int, floor: float) -> None:
        checks.whole(0, steps=steps)
        checks.above(0, floor=floor)
        self.steps = steps
        self.floor = floor

    def prepare(self, context: Context) -> None:
        _ = context.weight_fisher

    def __call__(self, context: Context, ranks: Ranks, folder: Path) -> None:
        """Write the refined factors of every site, a file a block, and ``facts.json``.

        The facts are by site the weighted error of the closed form (``before``) and of the factors as written
        (``after``), each relative to Σ a² W². Raises FloatingPointError, naming the site, where one is not finite.
        """
        if not (folder / "facts.json").exists():  # else an earlier call was stopped while it removed leftovers
            blocks = walk.blocks_of(context.model, context.tower)
            block_sites = by_block(context.sites, len(blocks))
            for index, sites in enumerate(progress.track(block_sites, "refinement", "block")):
                if not _facts_of(folder, index).exists():
                    self._refine_block(context, ranks, folder, index, blocks[index], sites)
            merged: dict[str, Any] = {}
            for index in range(len(blocks)):
                merged.update(json.loads(_facts_of(folder, index).read_text()))
            write_json(folder / "facts.json", {"weighted_error": merged})
        for leftover in (*folder.glob("facts_*.json"), *folder.glob(".*.tmp-*")):
            leftover.unlink()

    def _refine_block(
        self, context: Context, ranks: Ranks, folder: Path, index: int, block: nn.Module, sites: Sites
    ) -> None:
        """Write the factors of one block, then their errors: a block whose errors are there is complete."""
        device, decomposed = context.device, artifacts.spectra(context)
        refined, errors = {}, {}
        for name, site in sites.items():
            rank = ranks[name]
            if rank is None:
                continue
            weight = factorized.site_weight(block, site).to(device, torch.float64)
            left, right, _ = spectra.load_spectrum(decomposed, site, device).factors(weight, rank)
            spectra.check_finite(name, left, right)
            importance = importance_of(context.weight_fisher, site, self.floor, device)
            refined[site.key], errors[name] = _refined(weight.float(), importance, left, right, self.steps)
            spectra.check_finite(name, *refined[site.key])
        factors.save_factors(folder, index, refined)
        write_json(_facts_of(folder, index), errors)


def importance_of(fisher: Path, site: Site, floor: float, device: torch.device) -> Tensor:
    """a² (out, in) float32 of a site, its members stacked: mean 1, and ``floor`` on top.

    All one where no weight of the site has a gradient.
    """
    found = torch.cat([gradients.load_weight_fisher(fisher, site.block, name, device) for name in site.members])
    mean = found.mean(dtype=torch.float64)
    if not mean > 0:
        return torch.ones_like(found)
    return (found / mean).float() + floor


def weighted_error(weight: Tensor, importance: Tensor, left: Tensor, right: Tensor) -> float:
    """Σ a² (W − L R)² / Σ a² W², summed in float64."""
    total = (importance * weight.square()).sum(dtype=torch.float64)
    error = (importance * (weight - left @ right).square()).sum(dtype=torch.float64)
    return float(error / total) if total > 0 else 0.0


def descend(weight: Tensor, importance: Tensor, left: Tensor, right: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """``left`` (out, k) and ``right`` (k, in) after ``steps``; ``weight`` and ``importance`` > 0 are (out, in).

    In the dtype of ``weight``; the weighted error is that of the start or lower, up to rounding.
    """
    rows = importance.mean(1).sqrt()
    columns = (importance.mean(0) / importance.mean()).sqrt()
    scaled = importance / (rows.unsqueeze(1) * columns).square()
    left, right = left * rows.unsqueeze(1), right * columns
    target = weight * rows.unsqueeze(1) * columns
    for _ in range(steps):
        left = _step(target, scaled, left, right)
        right = _step(target.T, scaled.T, right.T, left.T).T
    return left / rows.unsqueeze(1), right / columns


def _step(target: Tensor, importance: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """``left`` after one preconditioned gradient step, of the best length for each of its rows."""
    gram = right @ right.T
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    downhill = (importance * (target - left @ right)) @ right.T
    direction = positive.solve_positive(gram, downhill.T).T
    change = direction @ right
    curvature = (importance * change.square()).sum(1)
    length = torch.where(curvature > 0, (downhill * direction).sum(1) / curvature, 0.0)  # 0: the row is at rest
    return left + length.unsqueeze(1) * direction


def _refined(
    weight: Tensor, importance: Tensor, left: Tensor, right: Tensor, steps: int
) -> tuple[tuple[Tensor, Tensor], dict[str, float]]:
    """The refined factors in float32, their start if that is better, and the errors before and after."""
    unit = _unit_of(weight)
    weight = (weight.double() / unit).float()
    u, sigma_vt, sigma = factorized.orthogonal_factors(left, right / unit)
    start = (u.float(), sigma_vt.float())
    before = weighted_error(weight, importance, *start)
    # √Σ in each factor: what both preconditioners invert is then as well conditioned as it can be.
    root = sigma.clamp(min=sigma.max() * 1e-6).sqrt() if sigma.max() > 0 else torch.ones_like(sigma)
    balanced = ((u * root).float(), (sigma_vt / root.unsqueeze(1)).float())
    found = descend(weight, importance, *balanced, steps)
    after = weighted_error(weight, importance, *found)
    if not after < before:
        found, after = start, before
    return (found[0], (found[1].double() * unit).float()), {"before": before, "after": after}


def _unit_of(weight: Tensor) -> float:
    """The power of 4, which rounds nothing, that brings the largest weight near 1; 1 for a zero weight.

    The descent multiplies squares of weights, which may be beyond the range of float32.
    """
    return 4.0 ** (math.frexp(float(weight.abs().max()))[1] // 2)


def _facts_of(folder: Path, index: int) -> Path:
    """The file of the errors of one block."""
    return folder / f"facts_{index:03d}.json"
