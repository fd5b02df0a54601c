"""Refined factors as an artifact, and their installation in a model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lowrank_lab.artifacts.store import open_to_others
from lowrank_lab.basics.errors import named
from lowrank_lab.lowrank.spectra import blocks_with_sites, check_finite
from lowrank_lab.lowrank.storage.base import Storage
from lowrank_lab.models.families import Tower
from lowrank_lab.models.walk import block_file
from lowrank_lab.modules.factorized import orthogonal_factors
from lowrank_lab.modules.site import Site, Sites


def save_factors(folder: Path, index: int, factors: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Write the ``left`` and ``right`` of the sites of a block, by their keys, in float32.

    The file is complete or absent whenever the process ends: it is written under another name and renamed.
    """
    tensors = {}
    for key, (left, right) in factors.items():
        tensors[f"{key}.left"] = left.float().cpu().contiguous()
        tensors[f"{key}.right"] = right.float().cpu().contiguous()
    work = folder / f".{block_file(index)}.tmp"
    save_file(tensors, work)
    open_to_others(work)  # another user may go on from it
    os.replace(work, folder / block_file(index))


def load_factors(folder: Path, site: Site) -> tuple[Tensor, Tensor]:
    """``left`` (out, k) and ``right`` (k, in) as ``save_factors`` wrote them."""
    with safe_open(folder / block_file(site.block), framework="pt") as file:
        return file.get_tensor(f"{site.key}.left"), file.get_tensor(f"{site.key}.right")


def install_factors(
    model: nn.Module,
    tower: Tower,
    sites: Sites,
    ranks: Mapping[str, int | None],
    factors: Path,
    storage: Storage,
    device: torch.device,
) -> None:
    """Replace every site that ``ranks`` gives a rank by refined factors, in place.

    They have no singular values of a metric any more; ``storage`` gets those of their product.
    """
    for block, of_block in blocks_with_sites(model, tower, sites):
        for name, site in of_block.items():
            if ranks[name] is None:
                continue
            left, right = (factor.to(device, torch.float64) for factor in load_factors(factors, site))
            check_finite(name, left, right)
            with named(name):
                storage.install(block, site, *orthogonal_factors(left, right))
