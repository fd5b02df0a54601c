"""A model's linears replaced by quantized ones, block by block."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lowrank_lab import progress
from lowrank_lab.calibration.statistics import gather
from lowrank_lab.lowrank.factorized import FactorizedLinear, SharedLatent, dense_weight, plain_linear
from lowrank_lab.lowrank.mixed import MixedLinear
from lowrank_lab.lowrank.quantized import QuantizedLinear
from lowrank_lab.lowrank.spectra import by_block
from lowrank_lab.models.walk import blocks_of, walk

if TYPE_CHECKING:
    from lowrank_lab.bench import Bench
    from lowrank_lab.quantization.base import WeightQuantizer


def quantize_linears(bench: Bench, method: WeightQuantizer) -> None:
    """Quantize the linears of every site: its factors, or its members where it is dense.

    A method that needs calibration sees the inputs that the blocks quantized before give; within a block all
    linears see those of the block as it was. Raises FloatingPointError, naming the linear, where something is not
    finite.
    """
    model, spec, device = bench.model, bench.spec, bench.device
    sites = by_block(bench.sites, len(blocks_of(model, spec)))
    members = [[member for site in here.values() for member in site.members] for here in sites]
    if not method.needs_calibration:
        for block, names in progress.track(
            list(zip(blocks_of(model, spec), members, strict=True)), "quantization", "block"
        ):
            for name in linears_in(block, names):
                replace(block, name, method, None)
        return
    batches = bench.calibration_ids.split(bench.cell.cfg.calibration.batch_size)
    for index, block, run in progress.track(
        walk(model, spec, batches, device), "quantization", "block", len(members)
    ):
        names = linears_in(block, members[index])
        inputs = gather(block, names, partial(run, advance=False), device)
        for name in names:
            replace(block, name, method, inputs.pop(name).second_moment())
        run()


def linears_in(block: nn.Module, members: list[str]) -> list[str]:
    """The names within ``block`` of the linears that make up its ``members``: themselves, or their factors.

    Remapped factors become plain ones.
    """
    found = []
    for name in members:
        module: Any = block.get_submodule(name)
        if not isinstance(module, FactorizedLinear):
            found.append(name)
            continue
        if "right" in module._modules:  # else it belongs to another member of the site
            found.append(f"{name}.right.linear" if isinstance(module.right, SharedLatent) else f"{name}.right")
        found.append(f"{name}.left")
    for name in found:
        mixed = block.get_submodule(name)
        if isinstance(mixed, MixedLinear):  # remapped factors are quantized anew, from the values they stand for
            block.set_submodule(name, plain_linear(mixed.weight, mixed.bias))
    return found


def replace(block: nn.Module, name: str, method: WeightQuantizer, second_moment: Tensor | None) -> None:
    """Put the quantized linear in the place of the linear ``name``."""
    linear: Any = block.get_submodule(name)
    weight = dense_weight(linear).detach()
    try:
        quantized = method.quantize(weight, second_moment)
    except FloatingPointError as error:
        raise FloatingPointError(f"{name}: {error}") from None
    block.set_submodule(name, QuantizedLinear.of(quantized, linear.bias).to(weight.device))
