"""The training behind ``refinement=lora``: one side of all factors at a time, through peft."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from lowrank_lab.artifacts.store import write_json
from lowrank_lab.lowrank.artifacts import spectra
from lowrank_lab.lowrank.factors import save_factors
from lowrank_lab.lowrank.spectra import check_finite, compress
from lowrank_lab.lowrank.storage.absorb import Absorb
from lowrank_lab.models.families import Tower
from lowrank_lab.models.tasks.base import Task
from lowrank_lab.models.tasks.causal_lm import CAUSAL_LM
from lowrank_lab.models.walk import as_batch, blocks_of
from lowrank_lab.modules.factorized import factors_of
from lowrank_lab.modules.linears import factor_paths
from lowrank_lab.modules.site import Ranks, Sites, by_block
from lowrank_lab.running.training import Recipe, train

if TYPE_CHECKING:
    from lowrank_lab.running.context import Context

SIDES = ("left", "right")  # in the order of their training: U, then V


class Settings(Protocol):
    """What the training reads of ``refinement=lora``, whose class says what each is."""

    r: int
    alpha: float
    dropout: float
    learning_rate: float
    epochs: int
    batch_size: int
    micro_batch: int
    warmup: int
    max_norm: float | None
    seed: int


def refine(context: Context, ranks: Ranks, folder: Path, settings: Settings) -> None:
    """Write the fine-tuned factors of every site, a file a block, and ``facts.json``: by side, steps and losses.

    A finished phase is kept in ``folder/<side>.state`` until the end, and is only read again after an interruption.
    """
    if not (folder / "facts.json").exists():
        ids, made = context.text_ids("refinement"), spectra(context)
        model = context.take_model().float()  # the weights that the spectra are of, whatever their dtype
        # √Σ in each factor, whatever the storage: both phases then start from factors of one scale.
        compress(model, context.tower, context.sites, ranks, made, Absorb(0.5), context.device)
        model.to(context.device)
        facts = {side: train_side(model, side, ids, folder, settings, context.task) for side in SIDES}
        save_all(model, context.tower, context.sites, folder)
        write_json(folder / "facts.json", facts)  # the last: with it all factors are there
    # A phase whose successor's state is still there must not lose its own.
    for leftover in (*(folder / f"{side}.state" for side in reversed(SIDES)), *folder.glob(".*.tmp-*")):
        leftover.unlink(missing_ok=True)


def train_side(
    model: nn.Module, side: str, ids: Tensor, folder: Path, settings: Settings, task: Task = CAUSAL_LM
) -> dict[str, Any]:
    """Train LoRA on one side of all factors of ``model`` (float32), and merge it into them, in place.

    ``ids`` (samples, length) are token ids on the CPU. Returns the steps and the loss of the first and last epoch.
    """
    layers = attach(model, linears_of(model, side), settings)
    parameters = [p for p in model.parameters() if p.requires_grad]
    device = parameters[0].device

    def loss_of(rows: Tensor) -> Tensor:
        return task.loss(model, as_batch(rows.to(device)))

    an_epoch = -(-len(ids) // settings.batch_size)
    recipe = Recipe(
        steps=settings.epochs * an_epoch,
        batch_size=settings.batch_size,
        micro_batch=settings.micro_batch,
        learning_rate=settings.learning_rate,
        warmup=settings.warmup,
        seed=settings.seed,
        max_norm=settings.max_norm,
    )
    history = train(folder, side, parameters, loss_of, ids, recipe)
    merge(model, layers)
    losses = [step["loss"] for step in history]
    mean = lambda some: sum(some) / len(some)
    return {
        "steps": len(losses),
        "first_epoch_loss": mean(losses[:an_epoch]),
        "last_epoch_loss": mean(losses[-an_epoch:]),
    }


def linears_of(model: nn.Module, side: str) -> list[str]:
    """The names of all left or all right factors; the right one of a joint site is named once."""
    return factor_paths(model)[side]


def attach(model: nn.Module, names: Sequence[str], settings: Settings) -> dict[str, LoraLayer]:
    """Put LoRA around the linears ``names``; only its matrices are trainable then. Returns the layers by name."""
    lora = LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]  # peft divides by it, whole or not
        lora_dropout=settings.dropout,
        target_modules=list(names),
        bias="none",
    )
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        inject_adapter_in_model(lora, model)
    found = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    assert sorted(found) == sorted(names), "peft matched other linears than were named"
    model.eval()  # the model's own dropout (GPT-2, OPT) stays off
    for layer in found.values():
        layer.train()  # type: ignore[attr-defined]
    return found


def merge(model: nn.Module, layers: dict[str, LoraLayer]) -> None:
    """Add what LoRA learned to its linears, and put these back in its place."""
    for name, layer in layers.items():
        layer.merge()
        model.set_submodule(name, layer.get_base_layer())
    del model.peft_config  # peft's note of what it injected, which is gone
    model.requires_grad_(False)


def save_all(model: nn.Module, tower: Tower, sites: Sites, folder: Path) -> None:
    """Write the factors of every site that has them. Raises FloatingPointError, naming one that is not finite."""
    blocks = blocks_of(model, tower)
    for index, (block, here) in enumerate(zip(blocks, by_block(sites, len(blocks)), strict=True)):
        factors = {}
        for name, site in here.items():
            if (found := factors_of(block, site)) is not None:
                check_finite(name, *found)
                factors[site.key] = found
        save_factors(folder, index, factors)
