"""Linears take over the scale s of what they read, W diag(s); diag(s)⁻¹ goes where no output changes.

That is into the norm before them; into the rows of the linear whose outputs come to them channel by channel (as the
architecture's ``feeds`` says; for the latent that left factors read: the right factor); else into a step in front.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from lowrank_lab.calibration.statistics import Accumulator, gather
from lowrank_lab.models.families import Tower, head_size
from lowrank_lab.models.walk import blocks_of
from lowrank_lab.modules.base import dense_weight
from lowrank_lab.modules.linears import (
    change_bias,
    change_weight,
    input_side,
    is_factored,
    linears_in,
    output_side,
    set_steps,
)
from lowrank_lab.modules.steps import Scale
from lowrank_lab.process import progress
from lowrank_lab.quantization.inputs import Inputs, Sample, gather_inputs
from lowrank_lab.quantization.targets import members_by_block

if TYPE_CHECKING:
    from lowrank_lab.running.context import Context

Source = Literal["norm", "linear", "step", "latent"]
SOURCES: dict[str, tuple[Source, ...]] = {  # what the setting ``where`` of a transform allows
    "norms": ("norm",),
    "foldable": ("norm", "linear"),
    "all": ("norm", "linear", "step"),
}


@dataclass(frozen=True)
class Input:
    """What linears of a block read.

    readers  those that take its scale over, dense ones or factors, by their paths
    rounded  those of them that will be quantized
    source   what is divided by the scale: a ``norm``, a ``linear`` by its rows, the right factor of a ``latent``
             likewise, or the input itself, by a ``step``
    path     of the source, within the block
    heads    (key-value heads, query heads of each, head size) where the source gives each channel to several heads
    """

    readers: list[str]
    rounded: list[str]
    source: Source
    path: str = ""
    heads: tuple[int, int, int] | None = None

    def shared(self, values: Tensor, combine: Callable[[Tensor], Tensor]) -> Tensor:
        """``values`` (width,) where all channels that are one of the source have one value.

        ``combine`` makes it of the values (key-value heads, query heads of each, head size), along the second.
        """
        if self.heads is None:
            return values
        return combine(values.view(self.heads)).unsqueeze(1).expand(self.heads).reshape(-1)

    def of_source(self, values: Tensor) -> Tensor:
        """Of such ``values`` (width,) the one of each channel of the source."""
        return values if self.heads is None else values.view(self.heads)[:, 0].reshape(-1)


def inputs_in(block: nn.Module, tower: Tower, config: Any, targets: Collection[str]) -> list[Input]:
    """The inputs in ``block`` that linears of ``targets`` read, then the latents of those that are factored.

    ``config`` is the model's.
    """
    quantized = set(linears_in(block, targets))
    found = []
    norms = tower.folding.norms if tower.folding is not None else (None,) * len(tower.inputs)
    feeds = tower.folding.feeds if tower.folding is not None else {}
    for members, norm in zip(tower.inputs, norms, strict=True):
        readers = list(dict.fromkeys(input_side(block, member) for member in members))
        rounded = [path for path in readers if path in quantized]
        if norm is not None and _scales(block, norm, config):
            found.append(Input(readers, rounded, "norm", norm))
        elif norm is None and members[0] in feeds:
            path = output_side(block, feeds[members[0]])
            found.append(Input(readers, rounded, "linear", path, _heads(block, readers[0], path, config)))
        else:
            found.append(Input(rounded, rounded, "step"))
    found += [
        Input(left, [path for path in left if path in quantized], "latent", right)
        for right, left in latents_in(block, tower).items()
    ]
    return [one for one in found if one.rounded]


def latents_in(block: nn.Module, tower: Tower) -> dict[str, list[str]]:
    """By the path of every right factor in ``block``, those of the left factors that read what it gives."""
    latents: dict[str, list[str]] = {}
    for member in tower.linears:
        if is_factored(block, member):
            latents.setdefault(input_side(block, member), []).append(output_side(block, member))
    return latents


def any_factored(model: nn.Module, tower: Tower) -> bool:
    """Whether any site of the model is factored."""
    return any(latents_in(block, tower) for block in blocks_of(model, tower))


def _scales(block: nn.Module, norm: str, config: Any) -> bool:
    """Whether the norm at the path ``norm`` has a weight, and what it gives is the linears' alone.

    In OPT-350m the norms stand behind attention and MLP: what they give is the residual stream.
    """
    has_weight = getattr(block.get_submodule(norm), "weight", None) is not None
    return has_weight and getattr(config, "do_layer_norm_before", True)


def _heads(block: nn.Module, reader: str, source: str, config: Any) -> tuple[int, int, int] | None:
    """How many channels of its input ``reader`` has for each output of ``source``; None: one."""
    width, given = (
        dense_weight(block.get_submodule(reader)).shape[1],
        len(dense_weight(block.get_submodule(source))),
    )
    if width == given:
        return None
    head = head_size(config)
    return given // head, width // given, head


def fold(block: nn.Module, tower: Tower, scales: Sequence[tuple[Input, Tensor]]) -> None:
    """Multiply the columns of the readers of each input by its scale, and divide what they read by it, in place.

    A scale (width,) is above 0, with one value for all channels that are one of the source (``Input.shared``).
    """
    for at, scale in scales:
        for reader in at.readers:
            change_weight(block, reader, partial(torch.mul, scale))
        rows = at.of_source(scale)
        if at.source == "norm":
            plus_one = tower.folding is not None and tower.folding.norm == "rms_plus_one"
            _divide_norm(block.get_submodule(at.path), scale, plus_one)
        elif at.source != "step":
            change_weight(block, at.path, partial(torch.mul, 1 / rows.unsqueeze(1)))
            change_bias(block, at.path, partial(torch.mul, 1 / rows))
    for at, scale in scales:  # last, for steps change the paths of the linears behind them
        if at.source == "step":
            step = Scale(len(scale)).to(scale.device)
            step.factor.data = (1 / scale).float()
            set_steps(block, at.readers, [step])


def _divide_norm(norm: Any, scale: Tensor, plus_one: bool) -> None:
    """Divide what a norm gives by ``scale``. Gemma's multiplies by 1 + weight."""
    weight = norm.weight.data.double()
    norm.weight.data = ((weight + 1) / scale - 1 if plus_one else weight / scale).to(norm.weight.dtype)
    bias = getattr(norm, "bias", None)
    if bias is not None:
        bias.data = (bias.data.double() / scale).to(bias.dtype)


def calibrated(
    context: Context, sources: Collection[Source], sample: int = 0
) -> Iterator[tuple[nn.Module, list[tuple[Input, Accumulator, Tensor]]]]:
    """Every block of ``context.model`` with its inputs of these ``sources``, and their statistics.

    These are sums, and a ``sample`` of so many tokens (n, in), float32, evenly taken. They are of the calibration
    text and of the unchanged blocks; the caller may change the block that it gets. Raises FloatingPointError,
    naming the linear, where an input is not finite.
    """
    targets = members_by_block(context)
    blocks = context.walk(context.model)
    for index, block, run in progress.track(blocks, "smoothing", "block", len(targets)):
        inputs = inputs_in(block, context.tower, context.family.config(context.model_config), targets[index])
        inputs = [one for one in inputs if one.source in sources]
        paths = [one.readers[0] for one in inputs]
        samples = {path: Sample(context.calibration_positions, sample) for path in paths}
        hooks = [
            block.get_submodule(path).register_forward_pre_hook(lambda _, args, to=to: to.add(args[0]))
            for path, to in samples.items()
            if sample
        ]
        sums = gather(block, paths, run, context.device)
        for hook in hooks:
            hook.remove()
        for path, accumulator in sums.items():
            if not torch.isfinite(accumulator.abs_max).all():
                raise FloatingPointError(f"block {index}: the input of {path} is not finite during calibration")
        yield block, [(one, sums[path], samples[path].rows) for one, path in zip(inputs, paths, strict=True)]


def calibrated_latents(
    context: Context, rows: bool
) -> Iterator[tuple[nn.Module, list[tuple[str, list[str], Inputs]]]]:
    """Every block of ``context.model`` with its right factors, the left ones that read each, and its inputs.

    ``rows``: whether the inputs have a sample of tokens. The caller may change the block that it gets. Where no
    site is factored, this reads nothing.
    """
    if not any_factored(context.model, context.tower):
        return
    count = len(blocks_of(context.model, context.tower))
    for _, block, run in progress.track(context.walk(context.model), "split", "block", count):
        latents = latents_in(block, context.tower)
        inputs = gather_inputs(block, list(latents), run, context.calibration_positions, rows, context.device)
        yield block, [(right, lefts, inputs.pop(right)) for right, lefts in latents.items()]


def weights_of(block: nn.Module, paths: list[str]) -> list[Tensor]:
    """The weights (out, in) of the plain linears at ``paths``."""
    return [dense_weight(block.get_submodule(path)).detach() for path in paths]
