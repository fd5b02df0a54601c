"""SpinQuant's training (Liu et al. 2024): the rotations with which a rounded network predicts text best."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from lowrank_lab.artifacts.store import write_json
from lowrank_lab.basics.errors import named
from lowrank_lab.models.families import folding_of
from lowrank_lab.models.tasks.base import Batch
from lowrank_lab.models.walk import as_batch, blocks_of, chosen, in_parts
from lowrank_lab.modules.formats import Format
from lowrank_lab.modules.linears import linears_in, set_steps, shared_inputs
from lowrank_lab.quantization import straight_through
from lowrank_lab.quantization.base import Quantization
from lowrank_lab.quantization.cayley import CayleySgd
from lowrank_lab.quantization.rotation import (
    Rotated,
    rotated_linears,
    rotated_rows,
    rotated_weight,
    start,
    values_width,
)
from lowrank_lab.quantization.targets import members_by_block
from lowrank_lab.running.context import Context
from lowrank_lab.running.training import Recipe, train

log = logging.getLogger(__name__)
REPORTED = 4  # sequences whose mean loss is logged before and after


def load(folder: Path) -> tuple[Tensor, Tensor]:
    """R1 and R2 as ``learn`` wrote them."""
    found = load_file(folder / "rotations.safetensors")
    return found["r1"], found["r2"]


@torch.enable_grad()
def learn(context: Context, quantization: Quantization, recipe: Recipe, round_weights: bool, folder: Path) -> None:
    """Write R1 and R2, and ``facts.json``: the losses before and after of the first sequences.

    ``context.model``, whose norms are folded already, stays as it is: a copy of it in float32 is trained.
    """
    model: Any = copy.deepcopy(context.model)
    nn.Module.float(model)  # transformers' own refuses the model of a checkpoint with a quantization_config
    model.to(context.device).requires_grad_(False)
    r1, r2 = (nn.Parameter(r.to(context.device)) for r in start(model, recipe.seed))
    attach(model, context, quantization, round_weights, r1, r2)
    samples = context.calibration
    first = in_parts(chosen(samples, slice(REPORTED)), 1)

    def loss_of(batch: Batch) -> Tensor:
        return context.task.loss(model, as_batch(batch, context.device))

    def first_losses() -> float:
        with torch.no_grad():
            return sum(loss_of(sequence).item() for sequence in first) / len(first)

    before = first_losses()
    train(folder, "rotations", [r1, r2], loss_of, samples, recipe, optimizer_of=CayleySgd)
    facts = {"steps": recipe.steps, "loss_before": before, "loss_after": first_losses()}
    log.info("rotations: the loss of the rounded model went from %.4f to %.4f", before, facts["loss_after"])
    save_file(
        {"r1": r1.detach().cpu().contiguous(), "r2": r2.detach().cpu().contiguous()},
        folder / "rotations.safetensors",
    )
    write_json(folder / "facts.json", facts)
    (folder / "rotations.state").unlink()


def attach(
    model: Any,
    context: Context,
    quantization: Quantization,
    round_weights: bool,
    r1: nn.Parameter,
    r2: nn.Parameter,
) -> None:
    """Let ``model`` follow ``r1`` and ``r2``, and round straight through what ``quantization`` will round."""
    values = values_width(model.config)
    members = members_by_block(context)
    for index, block in enumerate(blocks_of(model, context.tower)):
        following = rotated_linears(block, context.tower)
        rounded_here = linears_in(block, members[index])
        groups = shared_inputs(block, context.tower, members[index])
        for path in dict.fromkeys([*following, *rounded_here]):
            linear: Any = block.get_submodule(path)
            form = quantization.format_of(path) if round_weights and path in rounded_here else None
            sides = following.get(path, Rotated())
            register_parametrization(linear, "weight", RotatedWeight(sides, r1, r2, index, values, form, path))
            if linear.bias is not None:
                register_parametrization(linear, "bias", RotatedWeight(sides, r1, r2, index, values, None, path))
        if quantization.activations is not None:
            for group in groups:
                set_steps(block, group, [straight_through.RoundInputs(quantization.activations.form)])
    norm = model.get_submodule(folding_of(context.tower).final_norm)
    gain = norm.weight.detach().clone()
    norm.weight.data = torch.ones_like(gain)
    norm.register_forward_hook(lambda _module, _inputs, states: (states @ r1.T.to(states)) * gain)
    model.get_input_embeddings().register_forward_hook(lambda _module, _inputs, states: states @ r1.to(states))


class RotatedWeight(nn.Module):
    """A weight (out, in) or bias (out,) as the rotations leave it, rounded if there is a format."""

    def __init__(
        self,
        sides: Rotated,
        r1: nn.Parameter,
        r2: nn.Parameter,
        block: int,
        values: int,
        form: Format | None,
        path: str,
    ) -> None:
        super().__init__()
        self.path = path
        self.sides, self.r1, self.r2, self.block, self.values, self.form = sides, r1, r2, block, values, form

    def forward(self, tensor: Tensor) -> Tensor:
        here = self.sides, self.r1.to(tensor), self.r2[self.block].to(tensor), self.values
        if tensor.ndim == 1:
            return rotated_rows(tensor, *here)
        followed = rotated_weight(tensor, *here)
        if self.form is None:
            return followed
        with named(f"block {self.block}: {self.path}"):
            return straight_through.rounded_values(followed, self.form)
