"""Steps before a linear, which change its input: small modules x (…, width) → (…, width).

``describe()`` is plain data from which a checkpoint builds the same step without its values.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_lab.modules.base import Counts, Described, nbytes
from lowrank_lab.modules.codec import Quantized, check_finite, decode, encode, grids, quantize, spread
from lowrank_lab.modules.formats import Format
from lowrank_lab.modules.hadamard import transform


class Step(Described):
    """The arguments of a subclass are the entries of its ``describe()``. Its tensors are parameters."""

    def counts(self) -> Counts:
        """A step has no weights: its tensors count only as bytes."""
        return Counts(bytes=nbytes(*self.parameters()))


class Scale(Step):
    """x · factor, one a channel."""

    kind = "scale"

    def __init__(self, width: int) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(width, dtype=torch.float32), requires_grad=False)

    def describe(self) -> dict[str, Any]:
        return {"width": len(self.factor)}

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor.to(x.dtype)


class Permute(Step):
    """Channel i of the output is channel ``order[i]`` of the input."""

    kind = "permute"

    def __init__(self, width: int) -> None:
        super().__init__()
        self.order = nn.Parameter(torch.arange(width, dtype=torch.int32), requires_grad=False)

    def describe(self) -> dict[str, Any]:
        return {"width": len(self.order)}

    def forward(self, x: Tensor) -> Tensor:
        return x.index_select(-1, self.order)


class Rotate(Step):
    """x R with R block-diagonal, of blocks of ``size`` channels; the last block may be used only in part.

    ``blocks`` is (⌈width / size⌉, size, size); with size = width it is one full matrix.
    """

    kind = "rotate"

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.width, self.size = width, size
        self.blocks = nn.Parameter(torch.eye(size).repeat(math.ceil(width / size), 1, 1), requires_grad=False)

    def describe(self) -> dict[str, Any]:
        return {"width": self.width, "size": self.size}

    def forward(self, x: Tensor) -> Tensor:
        whole = nn.functional.pad(x, (0, len(self.blocks) * self.size - self.width))
        blocked = whole.unflatten(-1, (len(self.blocks), self.size))
        rotated = torch.einsum("...bi,bij->...bj", blocked, self.blocks.to(x.dtype))
        return rotated.flatten(-2)[..., : self.width]


class Hadamard(Step):
    """x H with the orthogonal Hadamard matrix of the channels that are ``stride`` apart.

    With stride 1 it is one of all channels; with that of a head it mixes the heads, and leaves each as it is.
    """

    kind = "hadamard"

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.width, self.stride = width, stride

    def describe(self) -> dict[str, Any]:
        return {"width": self.width, "stride": self.stride}

    def forward(self, x: Tensor) -> Tensor:
        strided = x.unflatten(-1, (self.width // self.stride, self.stride))
        return transform(strided.mT).mT.flatten(-2)


class Round(Step):
    """x rounded to the values of an integer format and back; a group of the format is one of a token's channels.

    With one scale for the whole tensor it is a fixed one: ``scale`` and ``zero`` (1, 1), to be set by ``fix``.
    """

    kind = "round"

    def __init__(self, form: dict[str, Any]) -> None:
        super().__init__()
        self.form = Format(**form)
        self.static = self.form.granularity == "tensor"
        for name, exists in (("scale", self.static), ("zero", self.static and self.form.has_zero)):
            value = nn.Parameter(torch.ones(1, 1, dtype=torch.float32), requires_grad=False) if exists else None
            self.register_parameter(name, value)

    def describe(self) -> dict[str, Any]:
        return {"form": asdict(self.form)}

    def fix(self, lowest: Tensor, highest: Tensor) -> None:
        """Choose the scale of a static format for inputs between these two (0-dimensional)."""
        scale, zero = grids(torch.stack([lowest, highest]).view(1, 2).float(), self.form)
        self.get_parameter("scale").data = scale
        if zero is not None:
            self.get_parameter("zero").data = zero

    def fixed(self) -> tuple[Tensor, Tensor | None]:
        """The scale and the zero point of a static format, (1, 1) each."""
        return self.get_parameter("scale"), self.get_parameter("zero") if self.form.has_zero else None

    def codes(self, rows: Tensor) -> Quantized:
        """What ``forward`` rounds ``rows`` (tokens, width) to, as codes.

        Raises FloatingPointError where a row is not finite.
        """
        if not self.static:
            return quantize(rows, self.form)
        check_finite(rows, "an input")
        scale, zero = self.fixed()
        return Quantized(self.form, encode(rows.float(), self.form, scale, zero), scale, zero)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).float()
        not_finite = ~rows.isfinite().all(1, keepdim=True)  # stays so, as evaluators look for the first such layer
        rows = rows.masked_fill(not_finite, 0.0)
        scale, zero = self.fixed() if self.static else grids(rows, self.form)
        if not self.static:
            scale = spread(scale, self.form, rows.shape[1])
            zero = None if zero is None else spread(zero, self.form, rows.shape[1])
        values = decode(encode(rows, self.form, scale, zero), self.form, scale, zero)
        return values.masked_fill(not_finite, torch.nan).to(x.dtype).view(x.shape)


def steps_in(model: nn.Module) -> dict[str, Step]:
    """All steps in ``model``, by path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, Step)}


def describe_steps(steps: nn.Sequential) -> list[dict[str, Any]]:
    """Their kinds and settings, as plain data for JSON."""
    return [{"step": step.kind, **step.describe()} for step in steps if isinstance(step, Step)]


def empty_steps(description: Iterable[dict[str, Any]]) -> list[Step]:
    """Steps without memory, on the meta device, for a checkpoint to fill. Raises UserError for an unknown kind."""
    with torch.device("meta"):
        return [Step.of_kind(one["step"])(**{k: v for k, v in one.items() if k != "step"}) for one in description]
