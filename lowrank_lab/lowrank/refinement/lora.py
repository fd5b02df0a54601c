"""Sequential low-rank fine-tuning (SVD-LLM, papers/001): first of all left factors, then of all right ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowrank_lab.artifacts.store import write_json
from lowrank_lab.basics import checks
from lowrank_lab.basics.lazy_module import LazyModule
from lowrank_lab.lowrank import artifacts
from lowrank_lab.lowrank.ranks import Ranks
from lowrank_lab.lowrank.storage.absorb import Absorb

if TYPE_CHECKING:
    import peft
    import torch
    from peft.tuners import lora as peft_lora
    from torch import Tensor, nn

    from lowrank_lab.lowrank import factors, spectra
    from lowrank_lab.models import walk
    from lowrank_lab.models.tasks.base import Batch, Task
    from lowrank_lab.modules import linears
    from lowrank_lab.running import training
    from lowrank_lab.running.context import Context
else:
    peft = LazyModule("peft")
    torch = LazyModule("torch")
    peft_lora = LazyModule("peft.tuners.lora")
    factors = LazyModule("lowrank_lab.lowrank.factors")
    spectra = LazyModule("lowrank_lab.lowrank.spectra")
    walk = LazyModule("lowrank_lab.models.walk")
    linears = LazyModule("lowrank_lab.modules.linears")
    training = LazyModule("lowrank_lab.running.training")

SIDES = ("left", "right")  # in the order of their training: U, then V


class Lora:
    """peft's LoRA on the left factors, trained and merged, then on the right ones. The ranks stay what they are.

    r, alpha, dropout  of LoRA
    learning_rate, epochs, batch_size, warmup (steps), max_norm (of the gradient; null for any)
                       of each of the two phases: AdamW, rising linearly for ``warmup`` and falling to 0
    micro_batch        sequences a forward; changes speed and memory, and which activations dropout takes
    seed               of the windows, their order, LoRA's initial values and dropout

    The other settings are the windows of text (``context.text``). The loss is that of the next token, every
    token counts, and training is in float32.
    """

    needs_calibration = False

    def __init__(
        self,
        r: int,
        alpha: float,
        dropout: float,
        learning_rate: float,
        epochs: int,
        batch_size: int,
        micro_batch: int,
        warmup: int,
        max_norm: float | None,
        seed: int,
        **windows: Any,
    ) -> None:
        checks.whole(1, r=r, epochs=epochs, batch_size=batch_size, micro_batch=micro_batch)
        checks.whole(0, warmup=warmup)
        checks.above(0, alpha=alpha, learning_rate=learning_rate)
        checks.above(0, optional=True, max_norm=max_norm)
        if not checks.is_number(dropout) or not 0 <= dropout < 1:
            raise ValueError(f"dropout={dropout} is not valid; it must be a number in [0, 1)")
        self.r = r
        self.alpha = alpha
        self.dropout = dropout
        self.learning_rate = learning_rate
        self.epochs = epochs
        self.batch_size = batch_size
        self.micro_batch = micro_batch
        self.warmup = warmup
        self.max_norm = max_norm
        self.seed = seed

    def prepare(self, context: Context) -> None:
        context.text("refinement")

    def __call__(self, context: Context, ranks: Ranks, folder: Path) -> None:
        """Write the fine-tuned factors of every site, a file a block, and ``facts.json``.

        The facts are by side the steps and losses. The state of a phase stays in ``folder/<side>.state`` until the
        end; only a call after an interruption reads it again.
        """
        if not (folder / "facts.json").exists():
            samples, decomposed = context.text("refinement"), artifacts.spectra(context)
            model = context.take_model().float()  # the weights that the spectra are of, whatever their dtype
            # √Σ in each factor, whatever the storage: both phases then start from factors of one scale.
            storage = Absorb(0.5)
            spectra.compress(model, context.tower, context.sites, ranks, decomposed, storage, context.device)
            model.to(context.device)
            facts = {side: train_side(model, side, samples, folder, self, context.task) for side in SIDES}
            factors.save_all_factors(folder, model, context.tower, context.sites)
            write_json(folder / "facts.json", facts)  # the last file: once it exists, all factors do
        # The state of a phase must be there as long as that of the phase after it.
        for leftover in (*(folder / f"{side}.state" for side in reversed(SIDES)), *folder.glob(".*.tmp-*")):
            leftover.unlink(missing_ok=True)


def train_side(
    model: nn.Module, side: str, samples: Batch | Tensor, folder: Path, settings: Lora, task: Task
) -> dict[str, Any]:
    """Train LoRA on one side of all factors of ``model`` (float32), and merge it into them, in place.

    ``samples`` are a batch, or token ids (samples, length), on the CPU. Returns the steps and the loss of the
    first and last epoch.
    """
    layers = attach(model, linears_of(model, side), settings)
    parameters = [p for p in model.parameters() if p.requires_grad]
    device = parameters[0].device

    def loss_of(batch: Batch) -> Tensor:
        return task.loss(model, walk.as_batch(batch, device))

    an_epoch = training.steps_of_epoch(samples, settings.batch_size)
    recipe = training.Recipe(
        steps=settings.epochs * an_epoch,
        batch_size=settings.batch_size,
        micro_batch=settings.micro_batch,
        learning_rate=settings.learning_rate,
        warmup=settings.warmup,
        seed=settings.seed,
        max_norm=settings.max_norm,
    )
    history = training.train(folder, side, parameters, loss_of, samples, recipe)
    merge(model, layers)
    return training.of_epochs(history, an_epoch)


def linears_of(model: nn.Module, side: str) -> list[str]:
    """The names of all left or all right factors; the right one of a joint site is named once."""
    return linears.factor_paths(model)[side]


def attach(model: nn.Module, names: Sequence[str], settings: Lora) -> dict[str, peft_lora.LoraLayer]:
    """Put LoRA around the linears ``names``, and make its matrices alone trainable. Returns the layers by name."""
    lora = peft.LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]  # peft divides by it, whole or not
        lora_dropout=settings.dropout,
        target_modules=list(names),
        bias="none",
    )
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        peft.inject_adapter_in_model(lora, model)
    found = {name: module for name, module in model.named_modules() if isinstance(module, peft_lora.LoraLayer)}
    assert sorted(found) == sorted(names), "peft matched other linears than were named"
    model.eval()  # the model's own dropout (GPT-2, OPT) stays off
    for layer in found.values():
        layer.train()  # type: ignore[attr-defined]
    return found


def merge(model: nn.Module, layers: dict[str, peft_lora.LoraLayer]) -> None:
    """Add what LoRA learned to the weights of its linears, and take LoRA out of the model."""
    for name, layer in layers.items():
        layer.merge()
        model.set_submodule(name, layer.get_base_layer())
    del model.peft_config  # peft's note of what it injected
    model.requires_grad_(False)
