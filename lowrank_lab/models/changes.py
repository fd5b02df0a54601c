"""Whether a model has changed since it was loaded: artifacts of the dense model need the unchanged one."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

SAMPLE = 16  # values of each tensor that are compared


class Snapshot:
    """The state of a ``model`` at one moment, to find later changes.

    It has the types of the modules, the identity, address and version of each parameter and buffer, and some of
    their values, because a write into ``parameter.data`` changes nothing else. It misses such a write into a few
    other values, so the pipeline says itself when a compression has been applied. A model that was only moved to
    another device counts as changed too: in doubt it is loaded again.
    """

    def __init__(self, model: nn.Module) -> None:
        self.state = _state_of(model)

    def changed(self, model: nn.Module) -> bool:
        return self.state != _state_of(model)


def _state_of(model: nn.Module) -> list[Any]:
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
