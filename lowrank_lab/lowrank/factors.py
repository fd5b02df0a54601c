"""Refined factors as an artifact, with other parameters that were trained, and their installation in a model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lowrank_lab.artifacts.store import open_to_others
from lowrank_lab.basics.errors import named
from lowrank_lab.lowrank.spectra import blocks_with_sites, check_finite
from lowrank_lab.lowrank.storage.base import Storage
from lowrank_lab.models.families import Tower
from lowrank_lab.models.walk import block_file, blocks_of
from lowrank_lab.modules.base import CompressedLinear, bias_of, dense_weight, factors_of_linear
from lowrank_lab.modules.factorized import factors_to_rebuild, orthogonal_factors
from lowrank_lab.modules.site import Site, Sites, by_block, members_in

PARAMETERS = "parameters.safetensors"  # those beside the factors, where they were trained


def save_factors(folder: Path, index: int, factors: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Write the ``left`` and ``right`` of the sites of a block, by their keys, in float32."""
    tensors = {}
    for key, (left, right) in factors.items():
        tensors[f"{key}.left"], tensors[f"{key}.right"] = left, right
    _write(folder / block_file(index), tensors)


def save_all_factors(folder: Path, model: nn.Module, tower: Tower, sites: Sites) -> None:
    """Write all factors of ``model``. Raises FloatingPointError, naming a site with one that is not finite."""
    blocks = blocks_of(model, tower)
    for index, (block, of_block) in enumerate(zip(blocks, by_block(sites, len(blocks)), strict=True)):
        found = {}
        for name, site in of_block.items():
            if (pair := factors_to_rebuild(site, block)) is not None:
                check_finite(name, *pair)
                found[site.key] = pair
        save_factors(folder, index, found)


def save_trained_parameters(folder: Path, model: nn.Module, tower: Tower, sites: Sites) -> None:
    """Write what was trained beside the factors of ``model``, by the names that it has in the dense model.

    These are its parameters that have a gradient, but for those of linears that were replaced. Of these it is the
    bias, and the weight where they have no factors of their own. Raises FloatingPointError, naming one that is not
    finite.
    """
    tensors, replaced = {}, []
    for index, member in members_in(sites):
        path = f"{tower.blocks}.{index}.{member}"
        linear = model.get_submodule(path)
        if isinstance(linear, CompressedLinear):
            replaced.append(f"{path}.")
            if (bias := bias_of(linear)) is not None:
                tensors[f"{path}.bias"] = bias
            if factors_of_linear(linear) is None:
                tensors[f"{path}.weight"] = dense_weight(linear)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not name.startswith(tuple(replaced)):
            tensors[name] = parameter
    for name, tensor in tensors.items():
        check_finite(name, tensor)
    _write(folder / PARAMETERS, tensors)


def _write(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors in float32.

    The file is complete or absent whenever the process ends: it is written under another name and renamed.
    """
    work = file.with_name(f".{file.name}.tmp")
    save_file({name: tensor.detach().float().cpu().contiguous() for name, tensor in tensors.items()}, work)
    open_to_others(work)  # another user may go on from it
    os.replace(work, file)


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
    """Replace every site that ``ranks`` gives a rank by refined factors, in place, after other trained parameters.

    They have no singular values of a metric any more; ``storage`` gets those of their product.
    """
    if (factors / PARAMETERS).exists():
        _load_parameters(factors / PARAMETERS, model)
    for block, of_block in blocks_with_sites(model, tower, sites):
        for name, site in of_block.items():
            if ranks[name] is None:
                continue
            left, right = (factor.to(device, torch.float64) for factor in load_factors(factors, site))
            check_finite(name, left, right)
            with named(name):
                storage.install(block, site, *orthogonal_factors(left, right))


def _load_parameters(file: Path, model: nn.Module) -> None:
    """Give the parameters that ``file`` names their trained values, in their dtype, in place."""
    for name, trained in load_file(file).items():
        parameter = model.get_parameter(name)
        parameter.data = trained.to(parameter)
        check_finite(name, parameter)
