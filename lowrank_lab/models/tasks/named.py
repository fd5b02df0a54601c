"""Tasks by the names that families give them."""

from __future__ import annotations

from lowrank_lab.models.tasks.base import Task
from lowrank_lab.models.tasks.causal_lm import CAUSAL_LM
from lowrank_lab.models.tasks.image_classification import IMAGE_CLASSIFICATION
from lowrank_lab.models.vision_families import IMAGE_TASK, TEXT_TASK

TASKS: dict[str, Task] = {TEXT_TASK: CAUSAL_LM, IMAGE_TASK: IMAGE_CLASSIFICATION}
