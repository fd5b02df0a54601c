"""Dobi-SVD's allocation: the rank of every site is learned by gradient descent (papers/003 §3.1, Algorithm 1)."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Literal

from lowrank_lab import checks
from lowrank_lab.lowrank.ranks import Ranks, budget, fit

if TYPE_CHECKING:
    from lowrank_lab.bench import Bench


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

    def __call__(self, bench: Bench) -> Ranks:
        if bench.ratio >= 1:
            return dict.fromkeys(bench.sites)
        from lowrank_lab.allocation.rank_training import train_ranks

        cell = bench.cell
        parts = {
            "differentiable": vars(self),
            "spectra": cell.spectra_key,
            "tokens": cell.calibration_tokens_key,
            "counted": cell.allocation_key["counted"],
            "ratio": bench.ratio,
        }
        ids, _ = bench.calibration_ids, bench.spectra  # made before the training, so that its seconds are its own
        make = lambda folder: train_ranks(folder, bench, ids, self)
        folder = bench.artifact("rank training", "ranks", parts, make, resumable=True)
        learned = json.loads((folder / "ranks.json").read_text())
        return fit(bench.sites, learned, budget(bench.sites, bench.ratio))
