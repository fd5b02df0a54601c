"""The gradient of the loss with respect to every singular value, one calibration sequence after the other."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lowrank_lab import progress
from lowrank_lab.lowrank.masked import mask_directions
from lowrank_lab.lowrank.spectra import load_singular_values
from lowrank_lab.models.families import Tower
from lowrank_lab.models.tasks.base import Task
from lowrank_lab.models.tasks.causal_lm import CAUSAL_LM
from lowrank_lab.models.walk import as_batch, block_file, blocks_of
from lowrank_lab.modules.site import Sites, by_block


def make_sigma_gradients(
    folder: Path,
    model: nn.Module,
    tower: Tower,
    sites: Sites,
    spectra: Path,
    ids: Tensor,
    device: torch.device,
    task: Task = CAUSAL_LM,
) -> None:
    """Means of |dL/dσ| and (dL/dσ)² over the sequences ``ids`` (samples, length); one file a block.

    L is the mean negative log-likelihood of a sequence's predicted tokens, σ the singular values of the metric's
    decomposition at full rank. ``model`` is changed. Raises FloatingPointError, naming the site.
    """
    sigma = {name: load_singular_values(spectra, site).to(device) for name, site in sites.items()}
    leaves = {name: value.clone().requires_grad_() for name, value in sigma.items()}
    masks = {name: partial(_relative, leaves[name], sigma[name]) for name in sites}
    full = {name: site.full for name, site in sites.items()}
    model.requires_grad_(False)
    mask_directions(model, tower, sites, spectra, full, masks, device)
    model.to(device)
    mean_abs = {name: torch.zeros_like(value) for name, value in sigma.items()}
    mean_square = {name: torch.zeros_like(value) for name, value in sigma.items()}
    for sequence in progress.track(ids.split(1), "singular value gradients", "sequence"):
        task.loss(model, as_batch(sequence.to(device))).backward()
        for name, leaf in leaves.items():
            assert leaf.grad is not None
            if not torch.isfinite(leaf.grad).all():
                raise FloatingPointError(f"{name}: the gradient of a singular value is not finite")
            mean_abs[name] += leaf.grad.abs() / len(ids)
            mean_square[name] += leaf.grad.square() / len(ids)
            leaf.grad = None
    for index, here in enumerate(by_block(sites, len(blocks_of(model, tower)))):
        tensors = {}
        for name, site in here.items():
            found = {"sigma": sigma[name], "abs": mean_abs[name], "square": mean_square[name]}
            tensors.update({f"{site.key}.{key}": value.cpu() for key, value in found.items()})
        save_file(tensors, folder / block_file(index))


def load_sigma_gradients(
    folder: Path, sites: Sites
) -> tuple[Mapping[str, Any], Mapping[str, Any], Mapping[str, Any]]:
    """By site, numpy arrays (full,) of σ and of the means of |dL/dσ| and (dL/dσ)²."""
    found: tuple[dict[str, Any], ...] = ({}, {}, {})
    for name, site in sites.items():
        with safe_open(folder / block_file(site.block), framework="np") as file:
            for values, key in zip(found, ("sigma", "abs", "square"), strict=True):
                values[name] = file.get_tensor(f"{site.key}.{key}").astype("float64")
    return found[0], found[1], found[2]


def _relative(leaf: Tensor, sigma: Tensor, count: int) -> Tensor:
    """The factor that puts ``leaf`` in the place of ``sigma``; a direction without a singular value stays out."""
    safe = torch.where(sigma > 0, sigma, torch.ones_like(sigma))
    return torch.where(sigma > 0, leaf / safe, torch.zeros_like(sigma))[:count]
