"""Walk a model block by block: one block on the device at a time, hidden states carried forward.

Memory does not grow with depth: beside the weights, a walk holds one block, the hidden states of all
sequences (in files, if asked), and whatever the caller keeps of the current block.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_lab import progress
from lowrank_lab.errors import UserError
from lowrank_lab.models.families import Tower
from lowrank_lab.models.rows import counting
from lowrank_lab.models.tasks.base import Batch, Task
from lowrank_lab.models.tasks.causal_lm import CAUSAL_LM, of_tokens


@dataclass(frozen=True)
class BlockCall:
    """What the model passes to one block beside the hidden states: masks, position embeddings and so on.

    It differs between the blocks of one model, as Gemma alternates sliding and full attention masks, and between
    batches with padding.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def blocks_of(model: nn.Module, tower: Tower) -> nn.ModuleList:
    blocks = model.get_submodule(tower.blocks)
    assert isinstance(blocks, nn.ModuleList)
    return blocks


def block_file(index: int) -> str:
    """The file of one block in an artifact that keeps one file a block."""
    return f"block_{index:03d}.safetensors"


@dataclass(frozen=True)
class Batches:
    """What is passed through the blocks: the hidden states of every batch, and all that goes with them.

    hidden  by batch, what enters the next block
    calls   by batch and block; equal ones are one object
    rows    by batch, the positions that count (batch, length) bool; None: all
    """

    hidden: list[Tensor]
    calls: list[list[BlockCall]]
    rows: list[Tensor | None]


def walk(
    model: nn.Module,
    tower: Tower,
    batches: Iterable[Batch | Tensor],
    device: torch.device,
    hidden: list[Tensor] | None = None,
    offload: Path | None = None,
    task: Task = CAUSAL_LM,
) -> Iterator[tuple[int, nn.Module, Callable[..., None]]]:
    """Carry ``batches`` through the blocks of ``model``. A batch may be token ids (batch, length) alone.

    Yields ``(index, block, run)`` for each block in turn, with the block on ``device``. The caller must call
    ``run()`` exactly once: it passes every batch through the block and so moves the hidden states one on. Before
    that, ``run(advance=False)`` passes them through it for what hooks see, and leaves them where they are. A list
    given as ``hidden`` holds at each stop the states that enter the block, one tensor a batch. With ``offload``
    they are kept in files in that folder instead of memory.

    The caller may change a block: replace its modules, assign to a parameter's ``data``, write into a parameter;
    but not write into its ``data``, which leaves no trace. Raises UserError for a model that does something between
    its blocks.
    """
    hidden = [] if hidden is None else hidden
    keep = partial(offloaded, folder=offload) if offload is not None else lambda states: states
    passed = _embed(model, tower, batches, keep, task)
    hidden[:] = passed.hidden
    passed = replace(passed, hidden=hidden)
    for index, block in enumerate(blocks_of(model, tower)):
        with on_device(block, device):
            yield index, block, partial(_advance, block, index, passed, device, keep)


def as_batch(batch: Batch | Tensor) -> Batch:
    """A batch, also of token ids (batch, length) alone."""
    return of_tokens(batch) if isinstance(batch, Tensor) else batch


def hidden_states(output: Any) -> Tensor:
    """The hidden states that a block gives, alone or as the first of a tuple."""
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def on_device(block: nn.Module, device: torch.device) -> Iterator[None]:
    """Within it, ``block`` is on ``device``. What was not changed there comes back without being copied.

    So weights that are mapped from a file stay so: a copy would be in memory for good.
    """
    home = next(block.parameters()).device
    at_home = [(parameter, parameter.data) for parameter in block.parameters()]
    block.to(device)
    there = [(parameter.data, parameter._version) for parameter, _ in at_home]
    try:
        yield
    finally:
        for (parameter, data), (moved, version) in zip(at_home, there, strict=True):
            if parameter.data_ptr() == moved.data_ptr() and parameter._version == version:
                parameter.data = data
        block.to(home)


def offloaded(states: Tensor, folder: Path) -> Tensor:
    """The same states, mapped from a file in ``folder`` that has no name: it goes with the tensor, also where the
    process is killed."""
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryFile(dir=folder, prefix=".hidden-states-") as file:
        file.write(states.contiguous().view(torch.uint8).numpy().data)
        file.flush()
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # so that who writes into it changes no file
    return torch.frombuffer(mapped, dtype=states.dtype).view(states.shape)


@contextmanager
def entering_at(model: nn.Module, tower: Tower, index: int, states: Tensor) -> Iterator[None]:
    """Within it, the model's forward skips the blocks before ``index`` and enters that one with ``states``.

    ``states`` are the hidden states (batch, length, width) that block ``index`` is given for the same token ids.
    Embedding, masks, the last norm and lm_head are the model's own, whatever the architecture.
    """
    skipped = blocks_of(model, tower)[:index]
    given = (states,) if tower.tuples else states
    try:
        for block in skipped:
            block.forward = lambda *_args, **_kwargs: given
        yield
    finally:
        for block in skipped:
            block.__dict__.pop("forward", None)


@torch.no_grad()
def _embed(
    model: nn.Module,
    tower: Tower,
    batches: Iterable[Batch | Tensor],
    keep: Callable[[Tensor], Tensor],
    task: Task,
) -> Batches:
    """The inputs of the first block for every batch, and what each block is called with.

    The model's own forward runs with blocks that only take notes and pass the hidden states through, so the
    masks and position embeddings are the model's own, whatever the architecture.
    """
    blocks = blocks_of(model, tower)
    home = next(model.parameters()).device
    noted: list[tuple[Tensor, BlockCall]] = []

    def note(*args: Any, **kwargs: Any) -> Any:
        states = args[0] if args else kwargs.pop("hidden_states")
        noted.append((states, BlockCall(args[1:], kwargs)))
        return (states,) if tower.tuples else states

    found, shared = Batches([], [], []), _Shared()
    try:
        for block in blocks:
            block.forward = note
        for given in batches:
            batch = {name: tensor.to(home) for name, tensor in as_batch(given).items()}
            noted.clear()
            task.forward(model, batch)
            if len(noted) != len(blocks) or any(states is not noted[0][0] for states, _ in noted):
                raise UserError(f"{type(model).__name__} does something between its blocks, which no walk would do")
            found.hidden.append(keep(noted[0][0]))
            found.calls.append(shared.calls([call for _, call in noted]))
            found.rows.append(task.rows(batch))
    finally:
        for block in blocks:
            block.__dict__.pop("forward", None)
    return found


class _Shared:
    """Finds what is equal to an earlier one, so that batches of one size without padding share their masks."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self.distinct: list[BlockCall] = []

    def calls(self, calls: Iterable[BlockCall]) -> list[BlockCall]:
        """The calls of one batch, those that are equal to earlier ones replaced by them."""
        seen: dict[int, Tensor] = {}  # within a batch most blocks are given the very same tensors
        return [self._call(BlockCall(*self._of((call.args, call.kwargs), seen))) for call in calls]

    def _call(self, call: BlockCall) -> BlockCall:
        for earlier in self.distinct:
            if _same((earlier.args, earlier.kwargs), (call.args, call.kwargs)):
                return earlier
        self.distinct.append(call)
        return call

    def _of(self, value: Any, seen: dict[int, Tensor]) -> Any:
        if isinstance(value, Tensor):
            if id(value) not in seen:
                seen[id(value)] = self._tensor(value)
            return seen[id(value)]
        return _mapped(value, lambda item: self._of(item, seen))

    def _tensor(self, tensor: Tensor) -> Tensor:
        for earlier in self.tensors:
            if earlier.dtype == tensor.dtype and torch.equal(earlier, tensor):
                return earlier
        self.tensors.append(tensor)
        return tensor


def _same(one: Any, other: Any) -> bool:
    """Whether two calls are equal, whose equal tensors are the same objects."""
    if one is other:
        return True
    if type(one) is not type(other) or isinstance(one, Tensor):
        return False
    if isinstance(one, (tuple, list)):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    return isinstance(one, (int, float, str)) and one == other


@torch.no_grad()
def _advance(
    block: nn.Module,
    index: int,
    passed: Batches,
    device: torch.device,
    keep: Callable[[Tensor], Tensor],
    advance: bool = True,
) -> None:
    """Pass every batch of hidden states through ``block``, and replace it by the outcome if ``advance``."""
    on_device: tuple[BlockCall, BlockCall] | None = None  # the last one, as it is kept, and on the device
    for i, states in enumerate(progress.track(passed.hidden, "sequences", "batch")):
        call = passed.calls[i][index]
        if on_device is None or on_device[0] is not call:
            on_device = call, BlockCall(_to(call.args, device), _to(call.kwargs, device))
        moved = on_device[1]
        with counting(passed.rows[i]):
            after = hidden_states(block(states.to(device), *moved.args, **moved.kwargs))
        if advance:
            passed.hidden[i] = keep(after.to(states.device))


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    return _mapped(value, lambda item: _to(item, device))


def _mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """A tuple, list or dictionary with its items changed; anything else as it is."""
    if isinstance(value, (tuple, list)):
        return type(value)(change(item) for item in value)
    if isinstance(value, dict):
        return {key: change(item) for key, item in value.items()}
    return value
