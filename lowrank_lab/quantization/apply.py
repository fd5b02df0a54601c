"""A quantization applied to a model: transforms, then activations and weights block by block, then the cache."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lowrank_lab import progress
from lowrank_lab.lowrank.spectra import by_block
from lowrank_lab.models.walk import blocks_of
from lowrank_lab.modules.factorized import dense_weight
from lowrank_lab.modules.formats import Format
from lowrank_lab.modules.linears import linears_in, make_plain, set_steps, shared_inputs
from lowrank_lab.modules.quantized import QuantizedLinear
from lowrank_lab.modules.steps import Round
from lowrank_lab.quantization.inputs import Inputs, fix_scales, gather_inputs

if TYPE_CHECKING:
    from lowrank_lab.quantization.base import Quantization
    from lowrank_lab.running.context import Context


@torch.no_grad()
def apply(context: Context, quantization: Quantization) -> None:
    """Quantize ``context.model`` in place; the linears of its sites alone are rounded.

    Raises FloatingPointError, naming the linear, where something is not finite.
    """
    torch.manual_seed(context.cell.cfg.seed)  # what a method draws must not depend on what was done before
    members = members_by_block(context)
    if any(part is not None for part in (quantization.transform, quantization.latent, quantization.method)):
        for block, names in zip(blocks_of(context.model, context.tower), members, strict=True):
            make_plain(block, names, getattr(torch, context.cell.cfg.dtype))
    if quantization.transform is not None:
        quantization.transform(context, quantization)
    if quantization.latent is not None:
        quantization.latent(context, quantization)
    if quantization.activations is not None or quantization.method is not None:
        _round(context, quantization, members)
    if quantization.kv_cache is not None:
        quantization.kv_cache(context)


def members_by_block(context: Context) -> list[list[str]]:
    """The linears that the cell targets, by block: names within it."""
    sites = by_block(context.sites, len(blocks_of(context.model, context.tower)))
    return [[member for site in here.values() for member in site.members] for here in sites]


def _round(context: Context, quantization: Quantization, members: list[list[str]]) -> None:
    """Round inputs and weights, block by block.

    What needs calibration sees the outputs of the blocks before, quantized if ``sequential``; within a block all
    linears see its inputs rounded and its weights as they were.
    """
    model, tower, method = context.model, context.tower, quantization.method
    activations = quantization.activations
    calibrates = method is not None and (method.needs_inputs or method.needs_rows)
    static = activations is not None and activations.static
    if not (calibrates or static):
        blocks = list(zip(blocks_of(model, tower), members, strict=True))
        for block, names in progress.track(blocks, "quantization", "block"):
            _round_inputs(context, quantization, block, names)
            _round_weights(context, quantization, block, names, {})
        return
    hidden: list[Tensor] = []
    blocks_run = context.walk(model, hidden=hidden)
    for index, block, run in progress.track(blocks_run, "quantization", "block", len(members)):
        names, passed = members[index], partial(run, advance=False)
        entering, leaving = list(hidden), None
        if not quantization.sequential:
            run()
            leaving, hidden[:] = list(hidden), entering
        _round_inputs(context, quantization, block, names)
        if static:
            fix_scales(block, linears_in(block, names), passed)
        inputs = {}
        if method is not None and calibrates:
            paths = linears_in(block, names)
            tokens = context.calibration_ids.numel()
            inputs = gather_inputs(block, paths, passed, tokens, method.needs_rows, context.device)
        _round_weights(context, quantization, block, names, inputs)
        if leaving is None:
            run()
        else:
            hidden[:] = leaving


def _round_inputs(context: Context, quantization: Quantization, block: nn.Module, members: list[str]) -> None:
    if quantization.activations is None:
        return
    device = next(block.parameters()).device
    for group in shared_inputs(block, context.tower, members):
        set_steps(block, group, [Round(asdict(quantization.activations.form)).to(device)])


def _round_weights(
    context: Context, quantization: Quantization, block: nn.Module, members: list[str], inputs: dict[str, Inputs]
) -> None:
    """Put quantized linears in the place of those that make up ``members``; ``inputs`` are by path, if any."""
    method = quantization.method
    if method is None:
        return
    for group in shared_inputs(block, context.tower, members):
        linears: dict[str, Any] = {path: block.get_submodule(path) for path in group}
        weights = {path: dense_weight(linear).detach() for path, linear in linears.items()}
        forms = {path: format_of(path, quantization) for path in group}
        theirs = [inputs.pop(path, None) for path in group]
        for path, quantized in method.quantize_together(weights, forms, theirs[0]).items():
            made = QuantizedLinear.of(quantized, linears[path].bias).to(weights[path].device)
            block.set_submodule(path, made)


def format_of(path: str, quantization: Quantization) -> Format:
    """The format of the weight at ``path``: that of left or right factors, or of dense linears."""
    parts = path.split(".")
    return (
        quantization.left if "left" in parts else quantization.right if "right" in parts else quantization.weights
    )
