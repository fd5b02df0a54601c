"""Whether a model is still as it was loaded: artifacts of the dense model must not be made of another one."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

SAMPLE = 16  # values of each tensor that are looked at


class Watched:
    """What is noted of a ``model``, so that a change of it shows.

    That is the types of its modules, which tensors its parameters and buffers are, where they lie, how often they
    were written into, and some of their values, as a write into ``parameter.data`` leaves no other trace. A model
    that was only moved to another device counts as changed too: what is in doubt is loaded anew.
    """

    def __init__(self, model: nn.Module) -> None:
        self.noted = _noted(model)

    def changed(self, model: nn.Module) -> bool:
        return self.noted != _noted(model)


def _noted(model: nn.Module) -> list[Any]:
    return [*_types(model), *(_of_tensor(name, tensor) for name, tensor in _tensors(model))]


def _types(model: nn.Module) -> Iterator[tuple[str, type, bool]]:
    for name, module in model.named_modules():
        yield name, type(module), "forward" in module.__dict__


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))


def _of_tensor(name: str, tensor: Tensor) -> tuple[Any, ...]:
    flat = tensor.detach().flatten()
    values = flat[:: max(1, len(flat) // SAMPLE)].cpu().contiguous().view(torch.uint8).numpy().tobytes()
    return name, id(tensor), tensor.data_ptr(), tensor.dtype, tensor._version, values
