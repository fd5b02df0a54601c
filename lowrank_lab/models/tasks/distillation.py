"""Losses of a student that has a teacher, for every task (Hinton et al. 2015; DeiT, Touvron et al. 2021, §4)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from lowrank_lab.models.tasks.base import Batch, Task


def soft(student: Tensor, teacher: Tensor, tau: float) -> Tensor:
    """τ² KL(teacher ‖ student) of logits (predictions, classes) divided by τ, the mean; DeiT, Eq. (2)."""
    of_student, of_teacher = log_softmax(student / tau, -1), log_softmax(teacher / tau, -1)
    return tau**2 * kl_div(of_student, of_teacher, reduction="batchmean", log_target=True)


def hard(student: Tensor, teacher: Tensor) -> Tensor:
    """The mean cross-entropy of the classes that the teacher finds most likely; DeiT, Eq. (3)."""
    return cross_entropy(student, teacher.argmax(-1))


def loss(
    task: Task, student: nn.Module, teacher: nn.Module, batch: Batch, alpha: float, tau: float | None
) -> Tensor:
    """(1 − α) · the loss of the task + α · that of the teacher, in nats, float32; hard where ``tau`` is None.

    The teacher is computed without gradients.
    """
    logits, classes = task.predictions(student, batch)
    with torch.no_grad():
        taught, _ = task.predictions(teacher, batch)
    distilled = hard(logits, taught) if tau is None else soft(logits, taught, tau)
    return (1 - alpha) * cross_entropy(logits, classes) + alpha * distilled
