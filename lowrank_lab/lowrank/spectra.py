"""The spectra of every compressible linear of a model, as an artifact, and the compression made from them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from lowrank_lab import progress
from lowrank_lab.calibration.gradients import load_gradients
from lowrank_lab.calibration.statistics import load_statistics
from lowrank_lab.lowrank.factorized import dense_weight, factorize
from lowrank_lab.lowrank.solver import Spectrum, decompose
from lowrank_lab.metric.base import Metric
from lowrank_lab.models.arch import ArchSpec
from lowrank_lab.models.walk import block_file, blocks_of
from lowrank_lab.storage.absorb import Absorb


def site_name(spec: ArchSpec, index: int, linear: str) -> str:
    """The full module path of a compressible linear, such as model.layers.3.mlp.up_proj."""
    return f"{spec.blocks}.{index}.{linear}"


def site_shapes(model: nn.Module, spec: ArchSpec) -> dict[str, tuple[int, int]]:
    """(out, in) of every compressible linear by its full name, in the order of the model."""
    shapes = {}
    for index, block in enumerate(blocks_of(model, spec)):
        for linear in spec.linears:
            out, inp = dense_weight(block.get_submodule(linear)).shape
            shapes[site_name(spec, index, linear)] = (int(out), int(inp))
    return shapes


def make_spectra(
    folder: Path,
    model: nn.Module,
    spec: ArchSpec,
    metric: Metric,
    statistics: Path | None,
    gradients: Path | None,
    device: torch.device,
) -> None:
    """Decompose every compressible linear under ``metric``; each block's file is written as it is done.

    ``statistics`` and ``gradients`` are the folders of ``make_statistics`` and ``make_gradients``, or None where
    the metric does not need them. Bases are kept in float32 where they are the left factor itself, and in float64
    where the left factor is W · basis: an ill-conditioned W would magnify their rounding.
    """
    blocks = blocks_of(model, spec)
    for index, block in enumerate(progress.track(blocks, "decomposition", "block")):
        tensors = {}
        for group in spec.inputs:
            inputs = load_statistics(statistics, index, group, device) if statistics is not None else None
            for linear in group:
                weight = dense_weight(block.get_submodule(linear)).detach().to(device, torch.float64)
                outputs = load_gradients(gradients, index, linear, device) if gradients is not None else None
                c, r = metric(inputs, outputs)
                samples = inputs.tokens if inputs is not None and c is not None and c.ndim == 2 else None
                try:
                    spectrum = decompose(weight, c, r, samples)
                except FloatingPointError as error:
                    raise FloatingPointError(f"{site_name(spec, index, linear)}: {error}") from None
                tensors[f"{linear}.eigenvalues"] = spectrum.eigenvalues.cpu()
                out, inp = weight.shape
                kept_in = torch.float32 if out <= inp else torch.float64
                tensors[f"{linear}.basis"] = spectrum.basis.to("cpu", kept_in).contiguous()
                if spectrum.output_metric is not None:
                    tensors[f"{linear}.output_metric"] = spectrum.output_metric.float().cpu()
        save_file(tensors, folder / block_file(index))


def load_tails(folder: Path, spec: ArchSpec) -> dict[str, np.ndarray]:
    """By linear, its squared error at every rank 0 … min(out, in), float64."""
    tails = {}
    for index, path in enumerate(sorted(folder.glob("block_*.safetensors"))):
        with safe_open(path, framework="np") as file:
            for linear in spec.linears:
                eigenvalues = file.get_tensor(f"{linear}.eigenvalues")
                errors = np.cumsum(eigenvalues[::-1])[::-1]
                tails[site_name(spec, index, linear)] = np.append(errors, 0.0)
    return tails


def compress(
    model: nn.Module,
    spec: ArchSpec,
    ranks: Mapping[str, int | None],
    spectra: Path,
    storage: Absorb,
    device: torch.device,
) -> float:
    """Replace every linear that ``ranks`` gives a rank, in place.

    Returns the summed squared error ‖R^½ (W − W') C^½‖²_F over all linears, in the metric's own units.
    """
    squared_error = 0.0
    for index, block in enumerate(progress.track(blocks_of(model, spec), "factorization", "block")):
        with safe_open(spectra / block_file(index), framework="pt") as file:
            for linear in spec.linears:
                name = site_name(spec, index, linear)
                rank = ranks[name]
                if rank is None:
                    continue
                spectrum = _load(file, linear, device)
                weight = dense_weight(block.get_submodule(linear)).detach().to(device, torch.float64)
                left, right = storage(*spectrum.factors(weight, rank))
                if not (torch.isfinite(left).all() and torch.isfinite(right).all()):
                    raise FloatingPointError(f"{name}: a factor is not finite")
                factorize(block, linear, left, right)
                squared_error += spectrum.squared_error(rank)
    return squared_error


def _load(file: Any, linear: str, device: torch.device) -> Spectrum:
    read = lambda part: file.get_tensor(f"{linear}.{part}").to(device, torch.float64)
    weighted = f"{linear}.output_metric" in file.keys()  # noqa: SIM118 (safe_open is no mapping)
    return Spectrum(read("eigenvalues"), read("basis"), read("output_metric") if weighted else None)
