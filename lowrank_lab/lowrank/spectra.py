"""The spectra of every site of a model, as an artifact, and the factors computed from them."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, singledispatch
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lowrank_lab.basics.errors import named
from lowrank_lab.calibration.gradients import load_gradients
from lowrank_lab.calibration.statistics import load_mean, load_statistics
from lowrank_lab.lowrank.head_spectra import spectrum_of_head
from lowrank_lab.lowrank.metric.base import InputStatistics, Metric, OutputStatistics
from lowrank_lab.lowrank.solver import Spectrum, decompose, decompose_by_cholesky
from lowrank_lab.lowrank.storage.base import Storage
from lowrank_lab.models.families import Tower
from lowrank_lab.models.walk import block_file, blocks_of
from lowrank_lab.modules.factorized import site_weight
from lowrank_lab.modules.site import HeadSite, Site, Sites, by_block
from lowrank_lab.process import progress
from lowrank_lab.process.out_of_memory import unless_out_of_memory

log = logging.getLogger(__name__)


def make_spectra(
    folder: Path,
    model: nn.Module,
    tower: Tower,
    sites: Sites,
    metric: Metric,
    statistics: Path | None,
    gradients: Path | None,
    device: torch.device,
    means: Path | None = None,
) -> None:
    """Decompose every site under ``metric``; the file of each block is written when the block is done.

    ``statistics``, ``means`` and ``gradients`` are the folders of ``make_statistics``, ``make_means`` and
    ``make_gradients``, or None where the metric, or for ``means`` the sites, do not need them. Bases are stored in
    float32 where they are the left factor itself, and in float64 where the left factor is W · basis: an
    ill-conditioned W would magnify their rounding.
    """
    blocks = blocks_of(model, tower)
    pairs = list(zip(blocks, by_block(sites, len(blocks)), strict=True))
    for index, (block, of_block) in enumerate(progress.track(pairs, "decomposition", "block")):
        tensors = {}
        for name, site in of_block.items():
            source = Source(tower, metric, statistics, means, gradients)
            solve = partial(_spectrum, name, block, site, source)
            spectrum = unless_out_of_memory(partial(solve, device)) if device.type != "cpu" else solve(device)
            if spectrum is None:
                log.warning(
                    "%s: out of memory on %s; it is decomposed on the CPU, which takes longer", name, device
                )
                spectrum = solve(torch.device("cpu"))
            tensors[f"{site.key}.eigenvalues"] = spectrum.eigenvalues.cpu()
            kept_in = torch.float32 if site.out <= site.inp else torch.float64
            metric_in = torch.float64 if site.between else torch.float32
            kept_in = torch.float64 if site.between else kept_in
            tensors[f"{site.key}.basis"] = spectrum.basis.to("cpu", kept_in).contiguous()
            if spectrum.output_metric is not None:
                tensors[f"{site.key}.output_metric"] = spectrum.output_metric.to("cpu", metric_in)
        save_file(tensors, folder / block_file(index))


@dataclass(frozen=True)
class Source:
    """What spectra are made from: a metric, and the folders of the statistics that it needs."""

    tower: Tower
    metric: Metric
    statistics: Path | None
    means: Path | None
    gradients: Path | None

    def group(self, linear: str) -> tuple[str, ...]:
        """The linears that share the input of ``linear``."""
        return next(group for group in self.tower.inputs if linear in group)

    def inputs(self, index: int, linear: str, device: torch.device) -> InputStatistics | None:
        if self.statistics is None:
            return None
        return load_statistics(self.statistics, index, self.group(linear), device)

    def mean(self, index: int, linear: str, device: torch.device) -> Tensor | None:
        return None if self.means is None else load_mean(self.means, index, self.group(linear), device)

    def outputs(self, index: int, linears: Sequence[str], device: torch.device) -> OutputStatistics | None:
        if self.gradients is None:
            return None
        return _stack([load_gradients(self.gradients, index, linear, device) for linear in linears])


def _spectrum(name: str, block: nn.Module, site: Site, source: Source, device: torch.device) -> Spectrum:
    """The spectrum of one site, computed on ``device``."""
    with named(name):
        return spectrum_of(site, block, source, device)


@singledispatch
def spectrum_of(site: Site, block: nn.Module, source: Source, device: torch.device) -> Spectrum:
    """The spectrum of a site, by its kind."""
    weight = site_weight(block, site).to(device, torch.float64)
    inputs = source.inputs(site.block, site.members[0], device)
    c, r = source.metric(inputs, source.outputs(site.block, site.members, device))
    samples = inputs.tokens if inputs is not None and c is not None and c.ndim == 2 else None
    if c is not None and getattr(source.metric, "cholesky", False):
        return decompose_by_cholesky(weight, c)
    return decompose(weight, c, r, samples)


@spectrum_of.register
def _(site: HeadSite, block: nn.Module, source: Source, device: torch.device) -> Spectrum:
    first, second = site.members
    inputs, mean = source.inputs(site.block, second, device), source.mean(site.block, second, device)
    attended = source.inputs(site.block, first, device) if site.product == "vo" else None
    outputs = source.outputs(site.block, [first], device)
    return spectrum_of_head(block, site, source.metric, inputs, mean, attended, outputs, device)


def _stack(members: list[OutputStatistics]) -> OutputStatistics:
    """The output statistics of a site of several linears. What g gᵀ has between two of them is left out."""
    outers = [one.outer for one in members]
    return OutputStatistics(
        tokens=members[0].tokens,
        square=torch.cat([one.square for one in members]),
        row_fisher=torch.cat([one.row_fisher for one in members]),
        outer=torch.block_diag(*(o for o in outers if o is not None)) if outers[0] is not None else None,
    )


def load_tails(folder: Path, sites: Sites) -> dict[str, np.ndarray]:
    """By site, its squared error at every rank 0 … min(out, in), float64."""
    tails = {}
    for name, site in sites.items():
        with safe_open(folder / block_file(site.block), framework="np") as file:
            eigenvalues = file.get_tensor(f"{site.key}.eigenvalues")
        tails[name] = np.append(np.cumsum(eigenvalues[::-1])[::-1], 0.0)
    return tails


def load_singular_values(folder: Path, site: Site) -> Tensor:
    """σ (p,) of R^½ W C^½, descending, float32 on the CPU."""
    with safe_open(folder / block_file(site.block), framework="pt") as file:
        return file.get_tensor(f"{site.key}.eigenvalues").sqrt().float()


def load_spectrum(folder: Path, site: Site, device: torch.device) -> Spectrum:
    """One spectrum of ``make_spectra``, float64."""
    with safe_open(folder / block_file(site.block), framework="pt") as file:
        read: Any = lambda part: file.get_tensor(f"{site.key}.{part}").to(device, torch.float64)
        weighted = f"{site.key}.output_metric" in file.keys()  # noqa: SIM118 (safe_open is no mapping)
        return Spectrum(read("eigenvalues"), read("basis"), read("output_metric") if weighted else None)


def compress_block(
    block: nn.Module,
    sites: Sites,
    ranks: Mapping[str, int | None],
    spectra: Path,
    storage: Storage,
    device: torch.device,
) -> float:
    """Replace every site of one block that ``ranks`` gives a rank, in place; returns the summed squared error."""
    squared_error = 0.0
    for name, site in sites.items():
        rank = ranks[name]
        if rank is None:
            continue
        spectrum = load_spectrum(spectra, site, device)
        left, right, singular_values = spectrum.factors(site_weight(block, site).to(device, torch.float64), rank)
        check_finite(name, left, right)
        with named(name):
            storage.install(block, site, left, right, singular_values)
        squared_error += spectrum.squared_error(rank)
    return squared_error


def compress(
    model: nn.Module,
    tower: Tower,
    sites: Sites,
    ranks: Mapping[str, int | None],
    spectra: Path,
    storage: Storage,
    device: torch.device,
) -> float:
    """Replace every site that ``ranks`` gives a rank, in place.

    Returns the summed squared error ‖R^½ (W − W') C^½‖²_F over all sites, in the units of the metric.
    """
    return sum(
        compress_block(block, of_block, ranks, spectra, storage, device)
        for block, of_block in blocks_with_sites(model, tower, sites)
    )


def check_finite(name: str, *tensors: Tensor) -> None:
    """Raises FloatingPointError, naming the site, where a factor is not finite."""
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
        raise FloatingPointError(f"{name}: a factor is not finite")


def blocks_with_sites(model: nn.Module, tower: Tower, sites: Sites) -> Iterator[tuple[nn.Module, dict[str, Site]]]:
    """Each block with its sites, shown as progress of the factorization."""
    blocks = blocks_of(model, tower)
    pairs = list(zip(blocks, by_block(sites, len(blocks)), strict=True))
    yield from progress.track(pairs, "factorization", "block")
