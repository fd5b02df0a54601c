"""One backward pass over the calibration tokens: statistics of the output gradients of every linear.

The loss is that of the task, summed: for text the negative log-likelihood of a sequence, each token predicted from
those before it. With x the inputs and g = dL/dy the output gradients of a linear, the weight gradient of a
sequence is Σ g xᵀ. The pass runs in float32 whatever the model's dtype, one sequence or image at a time. Unlike
the statistics pass it needs the whole model on the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lowrank_lab.calibration.statistics import tokens_metadata, tokens_of
from lowrank_lab.calibration.summaries import OutputStatistics
from lowrank_lab.models.families import Tower
from lowrank_lab.models.rows import batch_rows, current_rows, without_padding
from lowrank_lab.models.tasks.base import Batch, Task
from lowrank_lab.models.tasks.causal_lm import CAUSAL_LM
from lowrank_lab.models.walk import as_batch, block_file, blocks_of, in_parts
from lowrank_lab.modules.base import dense_weight
from lowrank_lab.process import progress


class Accumulator:
    """Running sums over the sequences for one linear, in float64."""

    def __init__(self, out: int, inp: int, outer: bool, weight: bool, device: torch.device) -> None:
        self.tokens = 0
        self.sequences = 0
        self.square = torch.zeros(out, dtype=torch.float64, device=device)
        self.row_fisher = torch.zeros(out, dtype=torch.float64, device=device)
        self.outer = torch.zeros(out, out, dtype=torch.float64, device=device) if outer else None
        # As large as the model, so in float32: sums of squares of at most a few hundred sequences.
        self.weight = torch.zeros(out, inp, device=device) if weight else None

    def count(self, tokens: int) -> None:
        """Count one sequence of so many tokens, also where the loss does not depend on the output.

        Its gradient is then 0, as in the last block of LLaVA's image encoder, whose features are of one before.
        """
        self.tokens += tokens
        self.sequences += 1

    def add(self, inputs: Tensor, gradient: Tensor) -> None:
        """Add the inputs (..., in) and the output gradients (..., out) of one sequence, float32."""
        x = inputs.reshape(-1, inputs.shape[-1])
        g = gradient.reshape(-1, gradient.shape[-1])
        self.square += g.square().sum(0, dtype=torch.float64)
        of_weight = (g.T @ x).square()
        self.row_fisher += of_weight.sum(1, dtype=torch.float64)
        if self.weight is not None:
            self.weight += of_weight
        if self.outer is not None:
            self.outer += g.T @ g

    def tensors(self) -> dict[str, Tensor]:
        found = {"square": self.square / self.tokens, "row_fisher": self.row_fisher / self.sequences}
        if self.outer is not None:
            found["outer"] = self.outer / self.tokens
        if self.weight is not None:
            found["weight"] = self.weight / self.sequences
        return {name: tensor.float().cpu().contiguous() for name, tensor in found.items()}


def make_gradients(
    folder: Path,
    model: nn.Module,
    tower: Tower,
    sequences: Tensor | Sequence[Batch],
    device: torch.device,
    outer: bool = False,
    weight: bool = False,
    task: Task = CAUSAL_LM,
) -> None:
    """Compute the output statistics of every compressible linear; one file a block.

    ``model`` is in float32; ``sequences`` are batches of one, or token ids (samples, length). ``outer`` keeps the
    mean of g gᵀ as well, (out, out) a linear, and ``weight`` the mean over sequences of (dL/dW)², as large as the
    model. Raises FloatingPointError, naming the linear, where a gradient is not finite.
    """
    model.to(device)
    accumulators: list[dict[str, Accumulator]] = []
    hooks = []
    for block in blocks_of(model, tower):
        of_block = {}
        for name in tower.linears:
            linear = block.get_submodule(name)
            out, inp = dense_weight(linear).shape
            of_block[name] = Accumulator(out, inp, outer, weight, device)
            hooks.append(linear.register_forward_hook(partial(_watch, of_block[name])))
        accumulators.append(of_block)
    hooks.append(blocks_of(model, tower)[0].register_forward_pre_hook(_start_gradient, with_kwargs=True))
    wanted_gradient = [parameter.requires_grad for parameter in model.parameters()]
    try:
        model.requires_grad_(False)  # only activations need gradients; Σ g xᵀ gives those of the weights
        sequences = in_parts(sequences, 1) if isinstance(sequences, Tensor) else sequences
        for sequence in progress.track(sequences, "gradients", "sequence"):
            batch = as_batch(sequence, device)
            with batch_rows(task.rows(batch)):
                task.loss(model, batch, "sum").backward()
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, wanted in zip(model.parameters(), wanted_gradient, strict=True):
            parameter.requires_grad_(wanted)
    _check_finite(accumulators, tower)
    for index, of_block in enumerate(accumulators):
        tensors = {}
        for name, accumulator in of_block.items():
            for key, tensor in accumulator.tensors().items():
                if not torch.isfinite(tensor).all():
                    raise FloatingPointError(f"{tower.blocks}.{index}.{name}: its gradient is not finite")
                tensors[f"{name}.{key}"] = tensor
        tokens = {name: accumulator.tokens for name, accumulator in of_block.items()}
        save_file(tensors, folder / block_file(index), metadata=tokens_metadata(tokens))


def _check_finite(accumulators: list[dict[str, Accumulator]], tower: Tower) -> None:
    """Raises FloatingPointError, naming the last linear without finite gradients: backward begins there."""
    for index, of_block in reversed(list(enumerate(accumulators))):
        for name, accumulator in reversed(of_block.items()):
            if not torch.isfinite(accumulator.square).all():
                raise FloatingPointError(f"{tower.blocks}.{index}.{name}: its gradient is not finite")


def load_gradients(folder: Path, index: int, linear: str, device: torch.device) -> OutputStatistics:
    """The output statistics of one linear of block ``index``, float64."""
    with safe_open(folder / block_file(index), framework="pt") as file:
        names = set(file.keys())
        read = lambda key: file.get_tensor(f"{linear}.{key}").to(device, torch.float64)
        return OutputStatistics(
            tokens=tokens_of(file.metadata(), linear),
            square=read("square"),
            row_fisher=read("row_fisher"),
            outer=read("outer") if f"{linear}.outer" in names else None,
        )


def load_weight_fisher(folder: Path, index: int, linear: str, device: torch.device) -> Tensor:
    """The mean over sequences of (dL/dW)², (out, in) float32, of one linear of block ``index``."""
    with safe_open(folder / block_file(index), framework="pt") as file:
        return file.get_tensor(f"{linear}.weight").to(device)


def _start_gradient(_block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A hook that lets the hidden states have a gradient from where they enter the first block."""
    (args[0] if args else kwargs["hidden_states"]).requires_grad_()


def _watch(accumulator: Accumulator, _module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
    rows = current_rows()  # here, as a hook of the backward pass may run in another thread
    inputs = without_padding(args[0].detach(), rows)
    accumulator.count(len(inputs))
    output.register_hook(lambda gradient: accumulator.add(inputs, without_padding(gradient, rows)))
