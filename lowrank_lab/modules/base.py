"""The interface of modules that replace original modules of a model.

Checkpoints, sizes and speeds name no class: they use the ``kind``, the counts and the description of a module. So a
new way to store a linear is one class, in this package or in another.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lowrank_lab.basics.errors import SkippedCell, UserError

T = TypeVar("T", bound="Described")


@dataclass(frozen=True)
class Counts:
    """The costs of a linear layer, without its bias.

    parameters  how many weights it has, whatever their bits
    bytes       of all its tensors, with scales and the tensors of steps before it
    macs        multiply-accumulates a token
    weights     the stored tensors of its weights, which a forward has to read at least: one that first makes a
                dense weight of them, as those in few bits and the pruned ones do, also writes and reads that
    """

    parameters: int = 0
    bytes: int = 0
    macs: int = 0
    weights: tuple[Tensor, ...] = ()

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.parameters + other.parameters,
            self.bytes + other.bytes,
            self.macs + other.macs,
            self.weights + other.weights,
        )

    @classmethod
    def of_weights(cls, *weights: Tensor) -> Counts:
        """The counts of one or more matrices, each used once for a token."""
        count = sum(weight.numel() for weight in weights)
        return cls(count, nbytes(*weights), count, weights)


class Described(nn.Module):
    """A module that checkpoints name by its ``kind``, and rebuild from ``describe()`` without its values.

    A subclass that defines ``kind`` is registered. Raises TypeError where another class has that kind.
    """

    kind: ClassVar[str]
    kinds: ClassVar[dict[str, type[Any]]]  # of each direct subclass: its registered subclasses

    def __init_subclass__(cls, **rest: Any) -> None:
        super().__init_subclass__(**rest)
        if Described in cls.__bases__:
            cls.kinds = {}
        if "kind" not in cls.__dict__:
            return
        known = cls.kinds.setdefault(cls.kind, cls)
        if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise TypeError(f"{cls.__qualname__}: the kind '{cls.kind}' is {known.__qualname__}'s already")
        cls.kinds[cls.kind] = cls  # the same class again, as its module was reloaded

    @classmethod
    def of_kind(cls: type[T], kind: Any) -> type[T]:
        """The subclass with this ``kind``. Raises UserError where there is none."""
        if kind not in cls.kinds:
            raise UserError(
                f"the checkpoint has a module of kind '{kind}', which lowrank_lab does not know; "
                "import the package that defines it first"
            )
        return cls.kinds[kind]

    def describe(self) -> dict[str, Any]:
        """Plain data for JSON, enough to build the same module without its values."""
        raise NotImplementedError


class Replacement(Described):
    """A module that replaces one of the model's original modules, or is added to one.

    All its tensors are parameters, which are saved, counted and moved between devices. Its bias, if it has one, is
    the parameter ``bias``.

    online     whether its forward does more than multiply, which dense weights cannot hold
    quantized  whether a model with it must not be quantized again
    trainable  whether its parameters can be trained
    shareable  names of submodules that several modules may use; only one of them lists it
    """

    online: ClassVar[bool] = False
    quantized: ClassVar[bool] = False
    trainable: ClassVar[bool] = False
    shareable: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def empty(cls, description: dict[str, Any], replaced: Any) -> Replacement:
        """An instance without values for a checkpoint to fill, instead of ``replaced`` (on the meta device).

        ``replaced`` is None for a module that is added to the model. Modules within it that have a kind are added
        afterwards, each from its own description.
        """
        raise NotImplementedError

    @classmethod
    def set_up(cls, model: Any) -> None:
        """Have ``model``, which has modules of this kind, use them. By default it does already."""

    def borrow(self, name: str, module: nn.Module) -> None:
        """Use ``module`` as ``name`` without listing it as a submodule; another module lists it.

        So it is saved, counted and moved between devices once.
        """
        self._modules.pop(name, None)
        self.__dict__[name] = module

    def borrowed(self) -> dict[str, nn.Module]:
        """By name, the modules that it uses and another module lists."""
        return {name: self.__dict__[name] for name in self.shareable if name in self.__dict__}


class CompressedLinear(Replacement):
    """A linear layer that is not one dense weight: factors, few bits, zeros left out, …

    A subclass that consists of other linears names the one that reads its input and the one that gives its output;
    these may be compressed too. A subclass with its own tensors leaves both None. One that replaces a factor has
    ``in_features``, as a Linear has.
    """

    input_part: ClassVar[str | None] = None
    output_part: ClassVar[str | None] = None

    @property
    def rank(self) -> int | None:
        """The rank of its factors; None where it has none."""
        return None

    def dense_weight(self) -> Tensor:
        """The weight (out, in), float32, that it multiplies with."""
        raise NotImplementedError

    def counts(self) -> Counts:
        """Its counts, without parts that another module lists."""
        raise NotImplementedError

    def dense_bias(self) -> Tensor | None:
        """The bias (out,) that it adds."""
        return getattr(innermost(self, "output_part"), "bias", None)

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """The factors (out, k) and (k, in) of its weight as stored; None where it has none."""
        return None

    def to_plain(self, dtype: torch.dtype) -> nn.Module:
        """The same layer made of plain linears of ``dtype``, for quantization. Raises SkippedCell by default."""
        raise SkippedCell(f"linears of kind '{self.kind}' cannot be quantized")

    def parts(self) -> dict[str, nn.Module]:
        """By name the linears that it consists of and lists, the one that reads its input first."""
        names = dict.fromkeys(name for name in (self.input_part, self.output_part) if name is not None)
        return {name: self._modules[name] for name in names if self._modules.get(name) is not None}  # type: ignore[misc]


def is_linear(module: nn.Module) -> bool:
    """Whether it is a dense linear layer: a Linear, or GPT-2's transposed Conv1D."""
    return isinstance(module, (nn.Linear, Conv1D))


def dense_weight(linear: nn.Module) -> Tensor:
    """The weight (out, in) of a linear layer: a dense one's own, or float32 from a compressed one.

    Raises TypeError for any other module.
    """
    if isinstance(linear, CompressedLinear):
        return linear.dense_weight()
    if isinstance(linear, Conv1D):
        return linear.weight.T
    if isinstance(linear, nn.Linear):
        return linear.weight
    raise TypeError(f"{type(linear).__name__} is not a linear layer")


def bias_of(linear: nn.Module) -> Tensor | None:
    """The bias (out,) of a linear layer, also where a part of it has the bias."""
    return linear.dense_bias() if isinstance(linear, CompressedLinear) else getattr(linear, "bias", None)


def factors_of_linear(linear: nn.Module) -> tuple[Tensor, Tensor] | None:
    """The factors (out, k) and (k, in) of a linear layer as stored; None where it is not kept as two factors."""
    return linear.factors() if isinstance(linear, CompressedLinear) else None


def rank_of(linear: nn.Module) -> int | None:
    """The rank of a linear layer that is kept as factors; else None."""
    return linear.rank if isinstance(linear, CompressedLinear) else None


def innermost(linear: Any, side: str) -> Any:
    """The linear within a linear that reads its input (``side`` is input_part) or gives its output."""
    while (name := getattr(linear, side, None)) is not None:
        linear = getattr(linear, name)
    return linear


def plain_parts(linear: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    """The path and the module of each innermost linear of the one at ``path``."""
    parts = linear.parts() if isinstance(linear, CompressedLinear) else {}
    if not parts:
        yield path, linear
    for name, part in parts.items():
        yield from plain_parts(part, f"{path}.{name}")


def nbytes(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
