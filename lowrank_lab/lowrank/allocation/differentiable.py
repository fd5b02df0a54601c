"""Dobi-SVD's allocation: the rank of every site is learned by gradient descent (papers/003 §3.1, Algorithm 1)."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Literal

from lowrank_lab import checks
from lowrank_lab.lowrank.artifacts import spectra
from lowrank_lab.lowrank.keys import LowRankKeys
from lowrank_lab.lowrank.ranks import budget, cost_at, fit, starting_share
from lowrank_lab.modules.site import Ranks, Sites

if TYPE_CHECKING:
    from lowrank_lab.running.context import Context

STATES = 21  # of a training, whose ranks the record keeps: the first, the last, and evenly between


class Differentiable:
    """Learn real-valued ranks k on the loss L_task + γ·|R_now − R_target| with everything else frozen.

    forward        ``pooled``: each site is its own factors with the directions masked, so that what is trained is
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
        checks.whole(0, seed=seed)
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
        from lowrank_lab.lowrank.allocation.rank_training import train_ranks

        keys = LowRankKeys(context.cell)
        parts = {
            "differentiable": vars(self),
            "spectra": keys.spectra,
            "tokens": context.cell.keys.calibration_tokens,
            "counted": keys.counted,
            "ratio": context.ratio,
        }
        spectra(context)  # before the training, whose seconds are its own
        ids = context.calibration_ids
        make = lambda folder: train_ranks(folder, context, ids, self)
        folder = context.artifact("rank training", "ranks", parts, make, resumable=True)
        learned = json.loads((folder / "ranks.json").read_text())
        history = json.loads((folder / "history.json").read_text())
        context.facts["training"] = training_facts(history, context.sites, context.ratio, self.gamma)
        return fit(context.sites, learned, budget(context.sites, context.ratio))


def training_facts(history: dict[str, Any], sites: Sites, ratio: float, gamma: float) -> dict[str, Any]:
    """What a record keeps of a training with target ``ratio`` and weight ``gamma``, from its ``history.json``.

    steps   after so many steps as it stands in the list, the ``ratio`` that the ranks spend, and on the next batch
            the ``loss`` and its part without the distance from the target, ``task_loss``, in nats
    states  numbers of steps, from 0 (untrained) to the last, at most ``STATES`` of them
    k       by site, its rank after each of ``states``
    """
    start = {name: 1 + (site.last - 1) * starting_share(site, ratio) for name, site in sites.items()}
    dense = sum(site.dense for site in sites.values())
    ratios = [sum(cost_at(sites[name], k) for name, k in start.items()) / dense]
    steps = []
    for step in history["steps"]:  # the loss there is of the ranks before the step, the ratio of those after it
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
