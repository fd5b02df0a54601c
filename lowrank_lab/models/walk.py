"""Walk through a model block by block, with one block at a time on the device.

Memory does not grow with depth: in addition to the weights, a walk holds one block, the hidden states of all
sequences (in files with ``offload``), and what the caller keeps of the current block.
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

from lowrank_lab.basics.errors import UserError
from lowrank_lab.models.families import Tower
from lowrank_lab.models.rows import batch_rows
from lowrank_lab.models.tasks.base import Batch, Task
from lowrank_lab.models.tasks.causal_lm import CAUSAL_LM, of_tokens
from lowrank_lab.process import progress


@dataclass(frozen=True)
class BlockCall:
    """The arguments of a block other than the hidden states: masks, position embeddings and so on.

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
    """The data that a walk passes through the blocks: the hidden states of every batch, and the other arguments.

    hidden  by batch, the input of the next block
    calls   by batch and block; equal ones are one object
    rows    by batch, the positions (batch, length), bool, that are not padding; None: all
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
    """Pass ``batches`` through the blocks of ``model``. A batch may be token ids (batch, length) alone.

    Yields ``(index, block, run)`` for one block after the other, with the block on ``device``. The caller must call
    ``run()`` exactly once: it runs the block on every batch and replaces the hidden states by the outputs. Before
    that, ``run(advance=False)`` runs the block for hooks alone, and keeps the hidden states. A list given as
    ``hidden`` has at each block the states that enter it, one tensor a batch. With ``offload`` they are kept in
    files in that folder instead of memory.

    The caller may change a block: replace its modules, assign to a parameter's ``data``, write into a parameter;
    but not write into its ``data``, which cannot be noticed. Raises UserError for a model that computes something
    between its blocks.
    """
    hidden = [] if hidden is None else hidden
    keep = partial(offloaded, folder=offload) if offload is not None else lambda states: states
    passed = _embed(model, tower, batches, keep, task)
    hidden[:] = passed.hidden
    passed = replace(passed, hidden=hidden)
    for index, block in enumerate(blocks_of(model, tower)):
        with on_device(block, device):
            yield index, block, partial(_advance, block, index, passed, device, keep)


def as_batch(batch: Batch | Tensor, device: torch.device | None = None) -> Batch:
    """A batch, also of token ids (batch, length) alone, on ``device``; None: where it is."""
    batch = of_tokens(batch) if isinstance(batch, Tensor) else batch
    return batch if device is None else {name: tensor.to(device) for name, tensor in batch.items()}


def count_of(batch: Batch | Tensor) -> int:
    """How many sequences or images are in a batch."""
    return len(next(iter(as_batch(batch).values())))


def chosen(batch: Batch | Tensor, rows: Tensor | slice) -> Batch:
    """Some of the sequences or images of a batch."""
    return {name: tensor[rows] for name, tensor in as_batch(batch).items()}


def in_parts(batch: Batch | Tensor, size: int) -> list[Batch]:
    """A batch in smaller ones of at most ``size``, in its order."""
    return [chosen(batch, slice(start, start + size)) for start in range(0, count_of(batch), size)]


def hidden_states(output: Any) -> Tensor:
    """The hidden states that a block gives, alone or as the first of a tuple."""
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def on_device(block: nn.Module, device: torch.device) -> Iterator[None]:
    """Within it, ``block`` is on ``device``. Weights that did not change there are not copied back.

    So weights that are mapped from a file stay mapped: a copy would stay in memory.
    """
    original_device = next(block.parameters()).device
    original = [(parameter, parameter.data) for parameter in block.parameters()]
    block.to(device)
    on_new_device = [(parameter.data, parameter._version) for parameter, _ in original]
    try:
        yield
    finally:
        for (parameter, data), (moved, version) in zip(original, on_new_device, strict=True):
            if parameter.data_ptr() == moved.data_ptr() and parameter._version == version:
                parameter.data = data
        block.to(original_device)


def offloaded(states: Tensor, folder: Path) -> Tensor:
    """The same states, mapped from a file in ``folder`` without a name.

    The system deletes it with the tensor, also when the process is killed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryFile(dir=folder, prefix=".hidden-states-") as file:
        file.write(states.contiguous().view(torch.uint8).numpy().data)
        file.flush()
        mapped = mmap.mmap(
            file.fileno(), 0, access=mmap.ACCESS_COPY
        )  # a write into the tensor does not change the file
    return torch.frombuffer(mapped, dtype=states.dtype).view(states.shape)


@contextmanager
def entering_at(model: nn.Module, tower: Tower, index: int, states: Tensor) -> Iterator[None]:
    """Within it, the model's forward skips the blocks before ``index`` and enters that one with ``states``.

    ``states`` are the hidden states (batch, length, width) that block ``index`` is given for the same token ids.
    Embedding, masks, the last norm and lm_head run as in the model's forward, for every architecture.
    """
    skipped = blocks_of(model, tower)[:index]
    output = (states,) if tower.tuples else states
    try:
        for block in skipped:
            block.forward = lambda *_args, **_kwargs: output
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
    """The inputs of the first block for every batch, and the other arguments of each block.

    The model's forward runs with blocks that only store their arguments and return the hidden states. So masks and
    position embeddings are those of the model, for every architecture.
    """
    blocks = blocks_of(model, tower)
    device = next(model.parameters()).device
    seen_calls: list[tuple[Tensor, BlockCall]] = []

    def note(*args: Any, **kwargs: Any) -> Any:
        states = args[0] if args else kwargs.pop("hidden_states")
        seen_calls.append((states, BlockCall(args[1:], kwargs)))
        return (states,) if tower.tuples else states

    found, shared = Batches([], [], []), _Shared()
    try:
        for block in blocks:
            block.forward = note
        for batch_or_ids in batches:
            batch = as_batch(batch_or_ids, device)
            seen_calls.clear()
            task.forward(model, batch)
            if len(seen_calls) != len(blocks) or any(states is not seen_calls[0][0] for states, _ in seen_calls):
                raise UserError(
                    f"{type(model).__name__} computes something between its blocks; a walk would skip it"
                )
            found.hidden.append(keep(seen_calls[0][0]))
            found.calls.append(shared.calls([call for _, call in seen_calls]))
            found.rows.append(task.rows(batch))
    finally:
        for block in blocks:
            block.__dict__.pop("forward", None)
    return found


class _Shared:
    """Replaces arguments by equal earlier ones, so that batches of one size without padding share their masks."""

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
    """Run ``block`` on every batch of hidden states, and replace these by the outputs if ``advance``."""
    on_device: tuple[BlockCall, BlockCall] | None = None  # the last one, as stored and on the device
    for i, states in enumerate(progress.track(passed.hidden, "sequences", "batch")):
        call = passed.calls[i][index]
        if on_device is None or on_device[0] is not call:
            on_device = call, BlockCall(_to(call.args, device), _to(call.kwargs, device))
        moved = on_device[1]
        with batch_rows(passed.rows[i]):
            output = hidden_states(block(states.to(device), *moved.args, **moved.kwargs))
        if advance:
            passed.hidden[i] = keep(output.to(states.device))


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
