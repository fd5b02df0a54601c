"""QSVD's allocation: rank goes where the loss depends on the singular values (papers/000)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lowrank_lab.basics import checks
from lowrank_lab.basics.lazy_module import LazyModule
from lowrank_lab.lowrank import artifacts
from lowrank_lab.lowrank.allocation.global_tail import water_fill
from lowrank_lab.lowrank.keys import LowRankKeys
from lowrank_lab.lowrank.ranks import Ranks, budget, fit
from lowrank_lab.modules.site import Sites, by_block
from lowrank_lab.process import progress

if TYPE_CHECKING:
    import numpy as np
    import safetensors
    import torch
    from safetensors import torch as safetensors_torch
    from torch import Tensor

    from lowrank_lab.lowrank import masked, spectra
    from lowrank_lab.models import walk
    from lowrank_lab.models.tasks.base import Batch
    from lowrank_lab.running.context import Context
else:
    np = LazyModule("numpy")
    safetensors = LazyModule("safetensors")
    safetensors_torch = LazyModule("safetensors.torch")
    torch = LazyModule("torch")
    masked = LazyModule("lowrank_lab.lowrank.masked")
    spectra = LazyModule("lowrank_lab.lowrank.spectra")
    walk = LazyModule("lowrank_lab.models.walk")


class SigmaGradient:
    """Importance from the gradient of the loss with respect to the singular values of every site.

    form     ``layer``: the rank of a site in proportion to Σ_i E|dL/dσ_i|, as in the lecture;
             ``global``: over all sites the directions of largest σ·√E[(dL/dσ)²], by their cost
    samples  the first so many calibration sequences; None takes all
    """

    needs_calibration = True

    def __init__(self, form: Literal["layer", "global"], samples: int | None) -> None:
        checks.one_of(("layer", "global"), form=form)
        checks.whole(1, optional=True, samples=samples)
        self.form = form
        self.samples = samples

    def __call__(self, context: Context) -> Ranks:
        if context.ratio >= 1:
            return dict.fromkeys(context.sites)
        samples = walk.chosen(context.calibration, slice(self.samples))
        artifacts.spectra(context)  # so that their time does not count to that of the gradients
        parts = {
            "sigma": self.samples,
            "spectra": LowRankKeys(context.cell).spectra,
            "tokens": context.cell.keys.calibration_tokens,
        }
        make = lambda folder: make_sigma_gradients(folder, context, samples)
        folder = context.artifact("singular value gradients", "sigma", parts, make)
        sigma, mean_abs, mean_square = load_sigma_gradients(folder, context.sites)
        limit = budget(context.sites, context.ratio)
        if self.form == "layer":
            return fit(context.sites, {name: float(g.sum()) for name, g in mean_abs.items()}, limit)
        return water_fill(context.sites, score_tails(context.sites, sigma, mean_square), limit)


def score_tails(
    sites: Sites, sigma: Mapping[str, np.ndarray], mean_square: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """What cutting a site to each rank 0 … full does to the loss to first order: Σ_{i>k} σ_i² E[(dL/dσ_i)²].

    Directions are kept in the order of their singular values, so the only choice of a site is its rank. Where a
    later direction scores higher than an earlier one, both are kept or both are cut.
    """
    tails = {}
    for name in sites:
        scores = sigma[name] ** 2 * mean_square[name]
        tails[name] = np.append(np.cumsum(scores[::-1])[::-1], 0.0)
    return tails


def make_sigma_gradients(folder: Path, context: Context, samples: Batch | Tensor) -> None:
    """Means of |dL/dσ| and (dL/dσ)² over the sequences or images ``samples``; one file a block.

    L is the mean negative log-likelihood of a sequence's predicted tokens, σ the singular values of the metric's
    decomposition at full rank. In float32. Raises FloatingPointError, naming the site.
    """
    model, tower, sites = context.take_model().float(), context.tower, context.sites
    decomposed, device = artifacts.spectra(context), context.device
    sigma = {name: spectra.load_singular_values(decomposed, site).to(device) for name, site in sites.items()}
    leaves = {name: value.clone().requires_grad_() for name, value in sigma.items()}
    masks = {name: partial(_relative, leaves[name], sigma[name]) for name in sites}
    full = {name: site.full for name, site in sites.items()}
    model.requires_grad_(False)
    masked.mask_directions(model, tower, sites, decomposed, full, masks, device)
    model.to(device)
    mean_abs = {name: torch.zeros_like(value) for name, value in sigma.items()}
    mean_square = {name: torch.zeros_like(value) for name, value in sigma.items()}
    sequences = walk.in_parts(samples, 1)
    for sequence in progress.track(sequences, "singular value gradients", "sequence"):
        context.task.loss(model, walk.as_batch(sequence, device)).backward()
        for name, leaf in leaves.items():
            assert leaf.grad is not None
            if not torch.isfinite(leaf.grad).all():
                raise FloatingPointError(f"{name}: the gradient of a singular value is not finite")
            mean_abs[name] += leaf.grad.abs() / len(sequences)
            mean_square[name] += leaf.grad.square() / len(sequences)
            leaf.grad = None
    for index, of_block in enumerate(by_block(sites, len(walk.blocks_of(model, tower)))):
        tensors = {}
        for name, site in of_block.items():
            found = {"sigma": sigma[name], "abs": mean_abs[name], "square": mean_square[name]}
            tensors.update({f"{site.key}.{key}": value.cpu() for key, value in found.items()})
        safetensors_torch.save_file(tensors, folder / walk.block_file(index))


def load_sigma_gradients(
    folder: Path, sites: Sites
) -> tuple[Mapping[str, Any], Mapping[str, Any], Mapping[str, Any]]:
    """By site, numpy arrays (full,) of σ and of the means of |dL/dσ| and (dL/dσ)²."""
    found: tuple[dict[str, Any], ...] = ({}, {}, {})
    for name, site in sites.items():
        with safetensors.safe_open(folder / walk.block_file(site.block), framework="np") as file:
            for values, key in zip(found, ("sigma", "abs", "square"), strict=True):
                values[name] = file.get_tensor(f"{site.key}.{key}").astype("float64")
    return found[0], found[1], found[2]


def _relative(leaf: Tensor, sigma: Tensor, count: int) -> Tensor:
    """The factor that replaces ``sigma`` by ``leaf``; 0 for a direction whose singular value is 0."""
    safe = torch.where(sigma > 0, sigma, torch.ones_like(sigma))
    return torch.where(sigma > 0, leaf / safe, torch.zeros_like(sigma))[:count]
