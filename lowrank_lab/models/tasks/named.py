"""Tasks by the names that families give them."""

from __future__ import annotations

from lowrank_lab.models.tasks.base import Task
from lowrank_lab.models.tasks.causal_lm import CAUSAL_LM

TASKS: dict[str, Task] = {"causal_lm": CAUSAL_LM}
