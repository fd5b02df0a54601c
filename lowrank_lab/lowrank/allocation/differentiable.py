"""Dobi-SVD's allocation: the rank of every site is learned by gradient descent (papers/003 §3.1, Algorithm 1)."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lowrank_lab.artifacts.store import write_json
from lowrank_lab.basics import checks
from lowrank_lab.basics.lazy_module import LazyModule
from lowrank_lab.lowrank.artifacts import spectra
from lowrank_lab.lowrank.keys import LowRankKeys
from lowrank_lab.lowrank.ranks import (
    Ranks,
    budget,
    budget_of_ranks,
    compressible,
    cost_at,
    cost_line,
    fit,
    starting_share,
)
from lowrank_lab.modules.site import Site, Sites

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from lowrank_lab.lowrank import masked
    from lowrank_lab.models import walk
    from lowrank_lab.models.tasks.base import Batch
    from lowrank_lab.running import training
    from lowrank_lab.running.context import Context
else:
    torch = LazyModule("torch")
    nn = LazyModule("torch.nn")
    masked = LazyModule("lowrank_lab.lowrank.masked")
    walk = LazyModule("lowrank_lab.models.walk")
    training = LazyModule("lowrank_lab.running.training")

STATES = 21  # of a training, whose ranks the record keeps: the first, the last, and evenly between


class Differentiable:
    """Learn real-valued ranks k on the loss L_task + γ·|R_now − R_target| with everything else frozen.

    forward        ``pooled``: each site becomes its factors with the directions masked, so that what is trained is
                   what is deployed and no SVD is in the loop; ``per_batch``: the paper's, which truncates the
                   activations of every batch by their own SVD, so that no rank above the batch's tokens is seen
    beta           sharpness of the mask 0.5·tanh(β(k − i)) + 0.5 over the directions i (paper: 10)
    gamma          weight γ of the distance from the target ratio, in nats for the whole of it
    steps          optimizer steps (paper: 20 epochs of 8)
    batch_size     sequences a step (paper: 32)
    learning_rate  of Adam with a cosine schedule (paper: 0.1)
    seed           of the order of the sequences
    """

    needs_calibration = True

    def __init__(
        self,
        forward: Literal["pooled", "per_batch"],
        beta: float,
        gamma: float,
        steps: int,
        batch_size: int,
        learning_rate: float,
        seed: int,
    ) -> None:
        checks.one_of(("pooled", "per_batch"), forward=forward)
        checks.above(0, beta=beta, gamma=gamma, learning_rate=learning_rate)
        checks.whole(1, steps=steps, batch_size=batch_size)
        checks.seeds(seed=seed)
        self.forward = forward
        self.beta = beta
        self.gamma = gamma
        self.steps = steps
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.seed = seed

    def __call__(self, context: Context) -> Ranks:
        if context.ratio >= 1:
            return dict.fromkeys(context.sites)
        budget_of_ranks(context.sites, budget(context.sites, context.ratio))  # before hours of training
        keys = LowRankKeys(context.cell)
        parts = {
            "differentiable": vars(self),
            "spectra": keys.spectra,
            "tokens": context.cell.keys.calibration_tokens,
            "counted": keys.counted,
            "ratio": context.ratio,
        }
        spectra(context)  # computed before the training, so that its time does not count to that of the training
        samples = context.calibration
        make = lambda folder: train_ranks(folder, context, samples, self)
        folder = context.artifact("rank training", "ranks", parts, make, resumable=True)
        learned = json.loads((folder / "ranks.json").read_text())
        history = json.loads((folder / "history.json").read_text())
        context.facts["training"] = training_facts(history, context.sites, context.ratio, self.gamma)
        return fit(context.sites, learned, budget(context.sites, context.ratio))


def training_facts(history: dict[str, Any], sites: Sites, ratio: float, gamma: float) -> dict[str, Any]:
    """What a record keeps of a training with target ``ratio`` and weight ``gamma``, from its ``history.json``.

    steps   entry i is about the ranks after i steps: the ``ratio`` that they cost, and on the next batch the
            ``loss`` and its part without the distance from the target, ``task_loss``, in nats
    states  numbers of steps, from 0 (untrained) to the last, at most ``STATES`` of them
    k       by site that some rank makes cheaper, its rank after each of ``states``
    """
    ranked = compressible(sites)
    start = {name: 1 + (site.last - 1) * starting_share(site, ratio) for name, site in ranked.items()}
    dense = sum(site.dense for site in sites.values())
    fixed = dense - sum(site.dense for site in ranked.values())
    ratios = [(sum(cost_at(sites[name], k) for name, k in start.items()) + fixed) / dense]
    steps = []
    for step in history["steps"]:  # its loss is of the ranks before the step, its ratio of those after it
        task_loss = step["loss"] - gamma * abs(ratios[-1] - ratio)
        steps.append({"ratio": ratios[-1], "loss": step["loss"], "task_loss": task_loss})
        ratios.append(step["ratio"])
    count = len(steps)
    last = min(STATES - 1, count)
    states = [round(number * count / last) for number in range(last + 1)]
    k = {}
    for number, name in enumerate(history["sites"]):
        of_steps = [round(start[name], 3), *(step["k"][number] for step in history["steps"])]
        k[name] = [of_steps[state] for state in states]
    return {"steps": steps, "states": states, "k": k}


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


def train_ranks(folder: Path, context: Context, samples: Batch | Tensor, settings: Differentiable) -> None:
    """Write ``history.json``, the loss and all k of each step, then ``ranks.json``, the learned k of every site.

    Training is in float32 whatever the model's dtype: the gradients of single directions are small. Sites for which
    no rank saves anything stay dense; their cost counts.
    """
    if (folder / "ranks.json").exists():  # an earlier call was stopped before it removed the state
        (folder / "ranks.state").unlink(missing_ok=True)
        return
    device, sites = context.device, compressible(context.sites)
    learned = {name: LearnedRank(site, context.ratio, settings.beta, device) for name, site in sites.items()}
    masks = {name: rank.mask for name, rank in learned.items()}
    model = context.take_model().float().requires_grad_(False)
    if settings.forward == "pooled":
        last = {name: site.last for name, site in sites.items()}
        masked.mask_directions(model, context.tower, sites, spectra(context), last, masks, device)
    else:
        masked.mask_activations(model, context.tower, sites, masks)
    model.to(device)
    dense = sum(site.dense for site in context.sites.values())
    fixed = dense - sum(site.dense for site in sites.values())

    def ratio_now() -> Tensor:
        return (torch.stack([rank.cost for rank in learned.values()]).sum() + fixed) / dense

    def loss_of(batch: Batch) -> Tensor:
        loss = context.task.loss(model, walk.as_batch(batch, device))
        return loss + settings.gamma * (ratio_now() - context.ratio).abs()  # Algorithm 1, line 11

    def after_step() -> dict[str, Any]:
        k = {name: rank.k.item() for name, rank in learned.items()}
        for name, value in k.items():
            if not math.isfinite(value):
                raise FloatingPointError(f"{name}: the gradient of its rank is not finite")
        return {"ratio": ratio_now().item(), "k": [round(value, 3) for value in k.values()]}

    recipe = training.Recipe(
        steps=settings.steps,
        batch_size=settings.batch_size,
        # The activations of a whole batch are what per_batch decomposes.
        micro_batch=1 if settings.forward == "pooled" else settings.batch_size,
        learning_rate=settings.learning_rate,
        schedule="cosine",
        seed=settings.seed,
    )
    parameters = [rank.parameter for rank in learned.values()]
    history = training.train(folder, "ranks", parameters, loss_of, samples, recipe, after_step)
    write_json(folder / "history.json", {"sites": list(sites), "steps": history})
    write_json(folder / "ranks.json", {name: rank.k.item() for name, rank in learned.items()})
    (folder / "ranks.state").unlink()
