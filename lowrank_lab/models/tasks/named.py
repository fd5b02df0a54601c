"""Tasks by the names that families give them."""

from __future__ import annotations

from lowrank_lab.models.tasks.base import Task
from lowrank_lab.models.tasks.causal_lm import CAUSAL_LM
from lowrank_lab.models.tasks.image_classification import IMAGE_CLASSIFICATION
from lowrank_lab.models.tasks.image_text import IMAGE_TEXT, IMAGES_OF_TEXT
from lowrank_lab.models.vision_families import IMAGE_TASK, IMAGE_TEXT_TASK, TEXT_TASK

TASKS: dict[str, Task] = {TEXT_TASK: CAUSAL_LM, IMAGE_TASK: IMAGE_CLASSIFICATION, IMAGE_TEXT_TASK: IMAGE_TEXT}


def task_named(name: str, tower: str | None = None) -> Task:
    """The task of models whose ``tower`` is compressed; None: their first."""
    return IMAGES_OF_TEXT if name == IMAGE_TEXT_TASK and tower == "vision" else TASKS[name]
