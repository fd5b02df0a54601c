"""Fine-tuning with the dense model as teacher (DeiT, Touvron et al. 2021; COMCAT, papers/001)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lowrank_lab.artifacts.store import write_json
from lowrank_lab.basics import checks
from lowrank_lab.basics.lazy_module import LazyModule
from lowrank_lab.lowrank import artifacts
from lowrank_lab.lowrank.ranks import Ranks
from lowrank_lab.lowrank.storage.absorb import Absorb

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from lowrank_lab.lowrank import factors, spectra
    from lowrank_lab.models import walk
    from lowrank_lab.models.tasks import distillation
    from lowrank_lab.models.tasks.base import Batch, Task
    from lowrank_lab.modules import base
    from lowrank_lab.running import training
    from lowrank_lab.running.context import Context
else:
    torch = LazyModule("torch")
    factors = LazyModule("lowrank_lab.lowrank.factors")
    spectra = LazyModule("lowrank_lab.lowrank.spectra")
    walk = LazyModule("lowrank_lab.models.walk")
    distillation = LazyModule("lowrank_lab.models.tasks.distillation")
    base = LazyModule("lowrank_lab.modules.base")
    training = LazyModule("lowrank_lab.running.training")

NAME = "distillation"  # of the training


class Distill:
    """The compressed model trained on labels and on what the dense model says. The ranks stay what they are.

    trains         ``all`` parameters of the model, or those of its ``compressed`` linears, factors and biases
    alpha          the teacher's share in the loss; the rest is of the labels, for text of the next tokens
    tau            the temperature of soft distillation; null: hard, the teacher's class counts as the label
    learning_rate, weight_decay, epochs, batch_size, warmup (steps), max_norm (of the gradient; null for any)
                   of AdamW, rising linearly for ``warmup`` and falling to 0 as a cosine. Only matrices decay
    micro_batch    sequences or images a forward; changes speed and memory only
    seed           of the samples and their order

    The other settings choose the samples (``context.text``). Training is in float32, without the model's own
    dropout. The teacher answers batch by batch, so that its logits are never kept.
    """

    needs_calibration = False
    products = True

    def __init__(
        self,
        trains: Literal["all", "compressed"],
        alpha: float,
        tau: float | None,
        learning_rate: float,
        weight_decay: float,
        epochs: int,
        batch_size: int,
        micro_batch: int,
        warmup: int,
        max_norm: float | None,
        seed: int,
        **samples: Any,
    ) -> None:
        checks.one_of(("all", "compressed"), trains=trains)
        checks.whole(1, epochs=epochs, batch_size=batch_size, micro_batch=micro_batch)
        checks.whole(0, warmup=warmup)
        checks.above(0, learning_rate=learning_rate)
        checks.above(0, optional=True, tau=tau, max_norm=max_norm)
        if not checks.is_number(alpha) or not 0 <= alpha <= 1:
            raise ValueError(f"alpha={alpha} is not valid; it must be a number in [0, 1]")
        if not checks.is_number(weight_decay) or weight_decay < 0:
            raise ValueError(f"weight_decay={weight_decay} is not valid; it must be a number from 0")
        self.trains = trains
        self.alpha = alpha
        self.tau = tau
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.epochs = epochs
        self.batch_size = batch_size
        self.micro_batch = micro_batch
        self.warmup = warmup
        self.max_norm = max_norm
        self.seed = seed

    def prepare(self, context: Context) -> None:
        context.text("refinement")

    def __call__(self, context: Context, ranks: Ranks, folder: Path) -> None:
        """Write the trained factors of every site, the other trained parameters, and ``facts.json``.

        The facts are the steps and losses. The state of the training stays in ``folder`` until the end; only a call
        after an interruption reads it again.
        """
        if not (folder / "facts.json").exists():
            samples, decomposed = context.text("refinement"), artifacts.spectra(context)
            teacher = context.dense_model().float().requires_grad_(False).to(context.device)
            student = context.take_model().float()  # the weights that the spectra are of, whatever their dtype
            what = (student, context.tower, context.sites)
            spectra.compress(*what, ranks, decomposed, Absorb(0.5), context.device)
            facts = train(student.to(context.device), teacher, samples, folder, self, context.task)
            factors.save_all_factors(folder, *what)
            factors.save_trained_parameters(folder, *what)
            write_json(folder / "facts.json", facts)  # the last file: once it exists, all others do
        for leftover in (folder / f"{NAME}.state", *folder.glob(".*.tmp-*")):
            leftover.unlink(missing_ok=True)


def train(
    student: nn.Module, teacher: nn.Module, samples: Batch | Tensor, folder: Path, settings: Distill, task: Task
) -> dict[str, Any]:
    """Train ``student`` (float32) in place. Returns the steps and the loss of the first and last epoch.

    ``samples`` are a batch, or token ids (samples, length), on the CPU.
    """
    parameters = set_trainable(student, settings.trains == "all")
    device = parameters[0].device

    def loss_of(batch: Batch) -> Tensor:
        moved = walk.as_batch(batch, device)
        return distillation.loss(task, student, teacher, moved, settings.alpha, settings.tau)

    an_epoch = training.steps_of_epoch(samples, settings.batch_size)
    recipe = training.Recipe(
        steps=settings.epochs * an_epoch,
        batch_size=settings.batch_size,
        micro_batch=settings.micro_batch,
        learning_rate=settings.learning_rate,
        schedule="cosine",
        warmup=settings.warmup,
        seed=settings.seed,
        max_norm=settings.max_norm,
    )
    adamw = partial(_adamw, settings.weight_decay)
    history = training.train(folder, NAME, parameters, loss_of, samples, recipe, optimizer_of=adamw)
    return training.of_epochs(history, an_epoch)


def set_trainable(model: nn.Module, everything: bool) -> list[nn.Parameter]:
    """Let all parameters of ``model`` have gradients, or those of its compressed linears alone; returns these."""
    model.requires_grad_(everything)
    for module in model.modules():
        if isinstance(module, base.CompressedLinear):
            module.requires_grad_(True)
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _adamw(weight_decay: float, parameters: Sequence[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    """AdamW under which norms and biases do not decay."""
    matrices = [parameter for parameter in parameters if parameter.ndim > 1]
    vectors = [parameter for parameter in parameters if parameter.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr)
