"""Walk a model block by block: one block on the device at a time, hidden states carried forward.

Memory does not grow with depth: beside the weights, a walk holds one block, the hidden states of all
sequences (in files, if asked), and whatever the caller keeps of the current block.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_lab import progress
from lowrank_lab.models.families import Tower


@dataclass(frozen=True)
class BlockCall:
    """What the model passes to one block beside the hidden states: masks, position embeddings and so on.

    It differs between the blocks of one model: Gemma alternates sliding and full attention masks.
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


def walk(
    model: nn.Module,
    tower: Tower,
    batches: Iterable[Tensor],
    device: torch.device,
    hidden: list[Tensor] | None = None,
    offload: Path | None = None,
) -> Iterator[tuple[int, nn.Module, Callable[..., None]]]:
    """Carry ``batches`` of token ids (batch, length), all of one length, through the blocks of ``model``.

    Yields ``(index, block, run)`` for each block in turn, with the block on ``device``. The caller must call
    ``run()`` exactly once: it passes every batch through the block and so moves the hidden states one on. Before
    that, ``run(advance=False)`` passes them through it for what hooks see, and leaves them where they are. A list
    given as ``hidden`` holds at each stop the states that enter the block, one tensor a batch. With ``offload``
    they are kept in files in that folder instead of memory.

    The caller may change a block: replace its modules, assign to a parameter's ``data``, write into a parameter;
    but not write into its ``data``, which leaves no trace.
    """
    hidden = [] if hidden is None else hidden
    keep = partial(offloaded, folder=offload) if offload is not None else lambda states: states
    hidden[:], calls = _embed(model, tower, batches, keep)
    for index, block in enumerate(blocks_of(model, tower)):
        with on_device(block, device):
            yield index, block, partial(_advance, block, index, hidden, calls, device, keep)


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
    try:
        for block in skipped:
            block.forward = lambda *_args, **_kwargs: states
        yield
    finally:
        for block in skipped:
            block.__dict__.pop("forward", None)


@torch.no_grad()
def _embed(
    model: nn.Module, tower: Tower, batches: Iterable[Tensor], keep: Callable[[Tensor], Tensor]
) -> tuple[list[Tensor], dict[int, list[BlockCall]]]:
    """The inputs of the first block for every batch, and by batch size what each block is called with.

    The model's own forward runs with blocks that only take notes and pass the hidden states through, so the
    masks and position embeddings are the model's own, whatever the architecture.
    """
    blocks = blocks_of(model, tower)
    backbone = getattr(model, str(model.base_model_prefix))
    home = next(backbone.parameters()).device
    noted: list[tuple[Tensor, BlockCall]] = []

    def note(states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        noted.append((states, BlockCall(args, kwargs)))
        return states

    hidden: list[Tensor] = []
    calls: dict[int, list[BlockCall]] = {}
    try:
        for block in blocks:
            block.forward = note
        for ids in batches:
            noted.clear()
            backbone(ids.to(home), use_cache=False)
            hidden.append(keep(noted[0][0]))
            calls.setdefault(ids.shape[0], [call for _, call in noted])
    finally:
        for block in blocks:
            block.__dict__.pop("forward", None)
    return hidden, calls


@torch.no_grad()
def _advance(
    block: nn.Module,
    index: int,
    hidden: list[Tensor],
    calls: dict[int, list[BlockCall]],
    device: torch.device,
    keep: Callable[[Tensor], Tensor],
    advance: bool = True,
) -> None:
    """Pass every batch of hidden states through ``block``, and replace it by the outcome unless told otherwise."""
    on_device = {
        size: BlockCall(_to(calls_of[index].args, device), _to(calls_of[index].kwargs, device))
        for size, calls_of in calls.items()
    }
    for i, states in enumerate(progress.track(hidden, "sequences", "batch")):
        call = on_device[states.shape[0]]
        after = block(states.to(device), *call.args, **call.kwargs)
        if advance:
            hidden[i] = keep(after.to(states.device))


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, (tuple, list)):
        return type(value)(_to(item, device) for item in value)
    if isinstance(value, dict):
        return {key: _to(item, device) for key, item in value.items()}
    return value
