"""SpinQuant's training (Liu et al. 2024): the rotations with which a rounded network predicts text best."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from lowrank_lab.artifacts.store import write_json
from lowrank_lab.models.families import folding_of
from lowrank_lab.models.walk import as_batch, blocks_of
from lowrank_lab.modules.formats import Format
from lowrank_lab.modules.linears import linears_in, set_steps, shared_inputs
from lowrank_lab.quantization.apply import format_of, members_by_block
from lowrank_lab.quantization.cayley import CayleySgd
from lowrank_lab.quantization.rotation import Turn, start, turned, turned_rows, turns, values_width
from lowrank_lab.quantization.scales import rounded
from lowrank_lab.running.training import Recipe, train

if TYPE_CHECKING:
    from lowrank_lab.quantization.base import Quantization
    from lowrank_lab.quantization.transform.spinquant import SpinQuant
    from lowrank_lab.running.context import Context

log = logging.getLogger(__name__)
JUDGED = 4  # sequences whose loss is told before and after


def load(folder: Path) -> tuple[Tensor, Tensor]:
    """R1 and R2 as ``learn`` wrote them."""
    found = load_file(folder / "rotations.safetensors")
    return found["r1"], found["r2"]


@torch.enable_grad()
def learn(context: Context, quantization: Quantization, settings: SpinQuant, folder: Path) -> None:
    """Write R1 and R2, and ``facts.json``: the losses before and after of the first sequences.

    ``context.model``, whose norms are folded already, stays as it is: a copy of it in float32 is trained.
    """
    model: Any = copy.deepcopy(context.model)
    nn.Module.float(model)  # transformers' own refuses the model of a checkpoint with a quantization_config
    model.to(context.device).requires_grad_(False)
    r1, r2 = (nn.Parameter(r.to(context.device)) for r in start(model, context.cell.cfg.seed))
    attach(model, context, quantization, settings.round_weights, r1, r2)
    ids = context.calibration_ids

    def loss_of(rows: Tensor) -> Tensor:
        return context.task.loss(model, as_batch(rows.to(context.device)))

    def judged() -> float:
        with torch.no_grad():
            return sum(loss_of(row).item() for row in ids[:JUDGED].split(1)) / len(ids[:JUDGED])

    recipe = Recipe(
        steps=settings.steps,
        batch_size=settings.batch_size,
        micro_batch=settings.micro_batch,
        learning_rate=settings.learning_rate,
        seed=context.cell.cfg.seed,
    )
    before = judged()
    train(folder, "rotations", [r1, r2], loss_of, ids, recipe, optimizer_of=CayleySgd)
    facts = {"steps": settings.steps, "loss_before": before, "loss_after": judged()}
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
        following = turns(block, context.tower)
        rounded_here = linears_in(block, members[index])
        groups = shared_inputs(block, context.tower, members[index])
        for path in dict.fromkeys([*following, *rounded_here]):
            linear: Any = block.get_submodule(path)
            form = format_of(path, quantization) if round_weights and path in rounded_here else None
            turn = following.get(path, Turn())
            register_parametrization(linear, "weight", Following(turn, r1, r2, index, values, form))
            if linear.bias is not None:
                register_parametrization(linear, "bias", Following(turn, r1, r2, index, values, None))
        if quantization.activations is not None:
            for group in groups:
                set_steps(block, group, [Rounded(quantization.activations.form)])
    norm = model.get_submodule(folding_of(context.tower).final_norm)
    gain = norm.weight.detach().clone()
    norm.weight.data = torch.ones_like(gain)
    norm.register_forward_hook(lambda _module, _inputs, states: (states @ r1.T.to(states)) * gain)
    model.get_input_embeddings().register_forward_hook(lambda _module, _inputs, states: states @ r1.to(states))


class Following(nn.Module):
    """A weight (out, in) or bias (out,) as the rotations leave it, rounded if there is a format."""

    def __init__(
        self, turn: Turn, r1: nn.Parameter, r2: nn.Parameter, block: int, values: int, form: Format | None
    ) -> None:
        super().__init__()
        self.turn, self.r1, self.r2, self.block, self.values, self.form = turn, r1, r2, block, values, form

    def forward(self, tensor: Tensor) -> Tensor:
        here = self.turn, self.r1.to(tensor), self.r2[self.block].to(tensor), self.values
        if tensor.ndim == 1:
            return turned_rows(tensor, *here)
        followed = turned(tensor, *here)
        return followed if self.form is None else straight_through(followed, self.form)


class Rounded(nn.Module):
    """A step that rounds activations straight through; fixed scales are those of each batch here."""

    def __init__(self, form: Format) -> None:
        super().__init__()
        self.form = form

    def forward(self, x: Tensor) -> Tensor:
        return straight_through(x, self.form)


def straight_through(x: Tensor, form: Format) -> Tensor:
    """``x`` rounded, with the gradient of ``x``."""
    rows = x.detach().reshape(-1, x.shape[-1])
    return x + (rounded(rows, form).view_as(x) - x.detach())
