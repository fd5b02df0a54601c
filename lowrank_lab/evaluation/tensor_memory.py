"""The peak memory of a computation's tensors."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def peak_bytes(run: Callable[[], Any]) -> int:
    """The most bytes that tensors created in ``run()`` have at one time, on whatever device.

    Counted after every operation on the storages that are alive, views once. So it is the same on every machine,
    where what a process takes from the system depends on its allocator. Memory that a
    kernel allocates and frees within itself, such as LAPACK's workspace, is not seen.
    """
    with torch.no_grad(), _Storages() as storages:
        run()
    return storages.peak


class _Storages(TorchDispatchMode):
    """Adds up the storages that operations return, until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: set[int] = set()
        self.now = 0
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._see(tensor.untyped_storage())
        return result

    def _see(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self.alive:
            self.alive.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self.alive.discard(key)
        self.now -= size
