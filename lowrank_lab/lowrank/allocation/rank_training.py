"""Training of the ranks: one number a site, everything else frozen (Dobi-SVD, Algorithm 1)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor, nn

from lowrank_lab.artifacts.store import write_json
from lowrank_lab.lowrank.artifacts import spectra
from lowrank_lab.lowrank.masked import mask_activations, mask_directions
from lowrank_lab.lowrank.ranks import cost_line, starting_share
from lowrank_lab.models.walk import as_batch
from lowrank_lab.modules.site import Site
from lowrank_lab.running.training import Recipe, train

if TYPE_CHECKING:
    from lowrank_lab.running.context import Context


class Settings(Protocol):
    """What the training reads of ``allocation=differentiable``, whose class says what each is."""

    forward: Literal["pooled", "per_batch"]
    beta: float
    gamma: float
    steps: int
    batch_size: int
    learning_rate: float
    seed: int


class LearnedRank:
    """A rank k between 1 and the last that saves anything, as a function of one unbounded parameter."""

    def __init__(self, site: Site, ratio: float, beta: float, device: torch.device) -> None:
        """Start at the rank that ``ratio`` gives the site alone."""
        self.last = site.last
        self.beta = beta
        lines = [cost_line(site, rank) for rank in range(site.full)]
        self.starts, self.steps = torch.tensor(lines, dtype=torch.float32, device=device).unbind(1)
        share = starting_share(site, ratio)
        self.parameter = nn.Parameter(torch.tensor(math.log(share / (1 - share)), device=device))

    @property
    def k(self) -> Tensor:
        return 1 + (self.last - 1) * torch.sigmoid(self.parameter)

    @property
    def cost(self) -> Tensor:
        """The cost at k, with a gradient to it; between whole ranks it is interpolated."""
        k = self.k
        whole = k.detach().long().clamp(0, len(self.steps) - 1)
        # torch.take: an index would be read by the CPU, at every step for every site.
        return torch.take(self.starts, whole) + k * torch.take(self.steps, whole)

    def mask(self, count: int) -> Tensor:
        """0.5·tanh(β(k − i)) + 0.5 for the directions i, (count,).

        The paper counts i from 1, where rank k would keep half of direction k; at i − ½ whole ranks keep whole
        directions.
        """
        i = torch.arange(1, count + 1, device=self.parameter.device) - 0.5
        return 0.5 * torch.tanh(self.beta * (self.k - i)) + 0.5


def train_ranks(folder: Path, context: Context, ids: Tensor, settings: Settings) -> None:
    """Write ``history.json``, the loss and all k of each step, then ``ranks.json``, the learned k of every site.

    Training is in float32 whatever the model's dtype: the gradients of single directions are small.
    """
    if (folder / "ranks.json").exists():  # an earlier call was stopped while it tidied up
        (folder / "ranks.state").unlink(missing_ok=True)
        return
    device, sites = context.device, context.sites
    learned = {name: LearnedRank(site, context.ratio, settings.beta, device) for name, site in sites.items()}
    masks = {name: rank.mask for name, rank in learned.items()}
    model = context.take_model().float().requires_grad_(False)
    if settings.forward == "pooled":
        last = {name: site.last for name, site in sites.items()}
        mask_directions(model, context.tower, sites, spectra(context), last, masks, device)
    else:
        mask_activations(model, context.tower, sites, masks)
    model.to(device)
    dense = sum(site.dense for site in sites.values())

    def ratio_now() -> Tensor:
        return torch.stack([rank.cost for rank in learned.values()]).sum() / dense

    def loss_of(rows: Tensor) -> Tensor:
        loss = context.task.loss(model, as_batch(rows.to(device)))
        return loss + settings.gamma * (ratio_now() - context.ratio).abs()  # Algorithm 1, line 11

    def after_step() -> dict[str, Any]:
        return {"ratio": ratio_now().item(), "k": [round(rank.k.item(), 3) for rank in learned.values()]}

    recipe = Recipe(
        steps=settings.steps,
        batch_size=settings.batch_size,
        # The activations of a whole batch are what per_batch decomposes.
        micro_batch=1 if settings.forward == "pooled" else settings.batch_size,
        learning_rate=settings.learning_rate,
        schedule="cosine",
        seed=settings.seed,
    )
    parameters = [rank.parameter for rank in learned.values()]
    history = train(folder, "ranks", parameters, loss_of, ids, recipe, after_step)
    write_json(folder / "history.json", {"sites": list(sites), "steps": history})
    write_json(folder / "ranks.json", {name: rank.k.item() for name, rank in learned.items()})
    (folder / "ranks.state").unlink()
