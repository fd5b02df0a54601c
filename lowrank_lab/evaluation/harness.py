"""Tasks of EleutherAI's lm-eval as evaluators, each task an artifact that all sets of tasks share.

tasks.py resolves a name, task_data.py finds its data, and lm.py, which needs torch, measures it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from omegaconf import DictConfig

from lowrank_lab.artifacts.store import Store, fingerprint
from lowrank_lab.basics import checks
from lowrank_lab.basics.errors import UserError
from lowrank_lab.basics.lazy_module import LazyModule
from lowrank_lab.cells import versions
from lowrank_lab.cells.evaluator import Evaluator
from lowrank_lab.evaluation.task_data import TaskData, find
from lowrank_lab.evaluation.tasks import Leaf, NamedTask, harness_version, named_task, task_manager

if TYPE_CHECKING:
    from lowrank_lab.evaluation import lm
    from lowrank_lab.running.context import Context
else:
    lm = LazyModule("lowrank_lab.evaluation.lm")


class Harness(Evaluator):
    """The mean over tasks of lm-eval of a metric of each.

    tasks       by name, the metric that enters the mean, such as acc or acc_norm; None: the task's first
    shots       few-shot examples; None: the number that the task sets, mostly 0
    limit       only the first so many documents of every task, and of every member of a group; None: all
    batch_size  sequences a forward, or ``auto``
    """

    version = versions.HARNESS
    component = "HARNESS"

    def __init__(
        self, tasks: dict[str, str | None], shots: int | None, limit: int | None, batch_size: int | Literal["auto"]
    ) -> None:
        if not isinstance(tasks, Mapping) or not tasks:
            raise ValueError(f"tasks={tasks} is not valid; it must be names with metrics, as in {{piqa: acc}}")
        checks.whole(0, optional=True, shots=shots)
        checks.whole(1, optional=True, limit=limit)
        if batch_size != "auto" and not checks.is_count(batch_size, 1):
            raise ValueError(f"batch_size={batch_size} is not valid; it must be auto or a whole number from 1")
        self.tasks = tasks
        self.shots = shots
        self.limit = limit
        self.batch_size = batch_size

    def settings(self, node: DictConfig) -> Any:
        """Nothing: all that a number depends on is in its part, so that different sets of tasks share parts."""
        return None

    def combination(self) -> Any:
        return self.tasks

    def parts(self, cfg: DictConfig, store: Store) -> dict[str, Any]:
        """One for each task."""
        parts = {}
        for name, metric in self.tasks.items():
            task = named_task(name, store)
            _check_metric(name, metric, task)
            data = self._data(task, cfg.data_root, store)
            parts[name] = {
                "task": name,
                "leaves": {leaf: data[leaf].content for leaf in task.leaves},
                "shots": {leaf: self._shots(leaf, facts) for leaf, facts in task.leaves.items()},
                "limit": self.limit,
                "lm_eval": harness_version(),
            }
        return parts

    def __call__(self, context: Context, part: str) -> dict[str, Any]:
        """Measure the task ``part``: lm.evaluate's results, and how they were obtained."""
        store = context.cell.store
        task = named_task(part, store)
        data = self._data(task, context.cell.cfg.data_root, store)
        manager = task_manager(store, {leaf: found.yaml for leaf, found in data.items()})
        measured = lm.evaluate(
            context.model, context.tokenizer, context.device, part, manager, self.shots, self.limit, self.batch_size
        )
        protocol: dict[str, Any] = {
            "shots": {leaf: self._shots(leaf, facts) for leaf, facts in task.leaves.items()},
            "data": fingerprint({leaf: found.content for leaf, found in data.items()}),
            "source": " and ".join(sorted({found.source for found in data.values()})),
            **{name: measured.pop(name) for name in ("seeds", "task_versions") if name in measured},
        }
        return {"metrics": [_plain(metric) for metric in task.metrics], **measured, "protocol": protocol}

    def combine(self, measured: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """The mean over the tasks of the metric of each, with a standard error where all have one."""
        tasks = {name: _shown(name, metric, measured[name]) for name, metric in self.tasks.items()}
        protocols = {name: one["protocol"] for name, one in measured.items()}
        shots = {count for protocol in protocols.values() for count in protocol["shots"].values()}
        value, stderr = _mean(list(tasks.values()))
        if len({protocol["data"] for protocol in protocols.values()}) < len(protocols):
            stderr = None  # the errors of two tasks on the same documents are not independent
        combined: dict[str, Any] = {
            "metric": "accuracy",
            "value": value,
            "stderr": stderr,
            "tasks": tasks,
            "protocol": {
                "tasks": {name: task["metric"] for name, task in tasks.items()},
                "shots": min(shots) if len(shots) == 1 else sorted(shots),
                "limit": self.limit,
                "harness": harness_version(),
                "data": {name: protocol["data"] for name, protocol in protocols.items()},
                "source": {name: protocol["source"] for name, protocol in protocols.items()},
                "seeds": next(iter(protocols.values())).get("seeds"),
            },
        }
        if broken := [one["not_finite"] for one in measured.values() if "not_finite" in one]:
            combined["not_finite"] = broken[0]
        elif value is None:
            without = [f"{name}: {task['metric']}" for name, task in tasks.items() if task["value"] is None]
            combined["reason"] = f"no finite number for {', '.join(without)}"
        return combined

    def _data(self, task: NamedTask, data_root: str | None, store: Store) -> dict[str, TaskData]:
        """The data of every leaf."""
        return {
            name: find(name, leaf, self._shots(name, leaf), data_root, store) for name, leaf in task.leaves.items()
        }

    def _shots(self, name: str, leaf: Leaf) -> int:
        """How many few-shot examples a leaf gets."""
        if leaf.own_shots == 0 and self.shots:
            raise UserError(f"shots={self.shots}: task {name} is always measured with none; use shots=0 or null")
        return (leaf.own_shots or 0) if self.shots is None else self.shots


def _check_metric(name: str, metric: str | None, task: NamedTask) -> None:
    known = [_plain(one) for one in task.metrics]
    if known and _chosen(metric, known) is None:
        raise UserError(f"task {name} has no metric '{metric}'; choose one of {', '.join(known)}")
    lower = [_plain(one) for one in task.lower_is_better]
    if known and (chosen := _chosen(metric, known)) in lower:
        better = [one for one in known if one not in lower]
        raise UserError(
            f"task {name}: {chosen} is no accuracy, less of it is better; it has {', '.join(better) or 'no other'}"
        )


def _chosen(metric: str | None, known: Iterable[str]) -> str | None:
    """The metric of this name, with or without its filter, or the first one for None; None where none matches."""
    return next((one for one in known if metric in (None, one, one.partition(",")[0])), None)


def _plain(metric: str) -> str:
    """lm-eval's name of a metric without the filter that does nothing."""
    return metric.removesuffix(",none")


def _shown(name: str, metric: str | None, measured: Mapping[str, Any]) -> dict[str, Any]:
    """The number of a task, and all its results."""
    if "not_finite" in measured:
        chosen = _chosen(metric, measured["metrics"]) or metric
        return {"metric": chosen, "value": None, "stderr": None, **measured}
    found = measured["results"][name]
    known = measured["metrics"] or found["metrics"]
    chosen = _chosen(metric, known)
    if chosen is None:
        raise UserError(f"task {name} has no metric '{metric}'; it has {', '.join(known)}")
    return {
        "metric": chosen,
        "value": found["metrics"][chosen],
        "stderr": found["stderr"].get(chosen),
        **measured,
    }


def _mean(tasks: list[dict[str, Any]]) -> tuple[float | None, float | None]:
    """The mean of the tasks' values, None where one is missing, and its standard error, likewise."""
    values, errors = [task["value"] for task in tasks], [task["stderr"] for task in tasks]
    value = None if None in values else sum(values) / len(values)
    return value, None if None in errors else math.hypot(*errors) / len(errors)
