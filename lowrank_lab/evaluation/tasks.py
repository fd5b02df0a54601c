"""The tasks behind a name of lm-eval, and lm-eval's tasks on data from other places.

lm-eval reads some 14,000 YAML files to know its tasks, which takes ten seconds and more. So their index
and the description of a name are small artifacts, each written once for a version of lm-eval. No torch, and lm-eval
only where one is written. No other file uses private parts of lm-eval.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowrank_lab.artifacts.store import Store, fingerprint
from lowrank_lab.basics.errors import UserError
from lowrank_lab.basics.lazy_module import LazyModule
from lowrank_lab.cells import versions

if TYPE_CHECKING:
    from lm_eval import tasks as lm_eval_tasks
    from lm_eval.api import group as lm_eval_group
    from lm_eval.api import registry
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks import _factory as factories
    from lm_eval.tasks import _index as entries
    from lm_eval.tasks import _yaml_loader as yaml_loader
else:
    lm_eval_tasks = LazyModule("lm_eval.tasks")
    lm_eval_group = LazyModule("lm_eval.api.group")
    registry = LazyModule("lm_eval.api.registry")
    factories = LazyModule("lm_eval.tasks._factory")
    entries = LazyModule("lm_eval.tasks._index")
    yaml_loader = LazyModule("lm_eval.tasks._yaml_loader")

SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")
# Entries of a task's YAML that are not supported, and why.
UNSUPPORTED = {
    "class": "is a Python class, whose data cannot be known beforehand",
    "custom_dataset": "makes its data with code, so that it cannot be known beforehand",
    "unsafe_code": "runs code that the model has written",
    "doc_to_image": "shows images",
    "doc_to_audio": "plays sounds",
}


def harness_version() -> str:
    return importlib.metadata.version("lm_eval")


@dataclass(frozen=True)
class Leaf:
    """A task that is evaluated: no group.

    path, name    of its data set on the hub, with ``kwargs`` for ``load_dataset``
    splits        by the names of SPLITS, None where it has no such split
    evaluated     the split that is evaluated
    fewshot       the split that few-shot examples are drawn from; None where they are written into the task
    own_shots     the number of examples that it sets itself; 0 can not be changed
    """

    path: str
    name: str | None
    kwargs: dict[str, Any]
    splits: dict[str, str | None]
    evaluated: str
    fewshot: str | None
    own_shots: int | None


@dataclass(frozen=True)
class NamedTask:
    """The leaves of a task or group, by name (itself, where it is no group), and the ``metrics`` it may have.

    ``metrics`` are named as in lm-eval's results, its own first; empty where they are not known beforehand. Of
    ``lower_is_better`` there is no accuracy to average.
    """

    leaves: dict[str, Leaf]
    metrics: list[str]
    lower_is_better: list[str]


def named_task(name: str, store: Store) -> NamedTask:
    """The task or group ``name``. Raises UserError where it cannot be evaluated."""
    key = fingerprint({"task": name, "lm_eval": harness_version(), "version": versions.HARNESS})

    def make(folder: Path) -> None:
        _write(folder / "task.json", _describe(name, store))

    described = json.loads((store.get_or_make("tasks", key, make).path / "task.json").read_text(encoding="utf-8"))
    leaves = {leaf: Leaf(**facts) for leaf, facts in described["leaves"].items()}
    return NamedTask(leaves, described["metrics"], described["lower_is_better"])


def task_manager(store: Store, data: Mapping[str, Mapping[str, Any]]) -> TaskManager:
    """lm-eval's tasks; those in ``data``, by name, with these entries of their YAML replaced.

    The overrides of a group apply first: they cannot undo the replacement.
    """

    class OnOtherData(factories.TaskFactory):
        def _load_full_config(self, entry: Any, overrides: dict[str, Any] | None = None) -> dict[str, Any]:
            return {**super()._load_full_config(entry, overrides), **data.get(entry.name, {})}

    return _manager(store, OnOtherData())


def _manager(store: Store, factory: Any) -> TaskManager:
    """A TaskManager that reads only the YAML files it needs."""
    root = Path(lm_eval_tasks.__file__).parent
    manager = lm_eval_tasks.TaskManager(include_defaults=False)
    for name, (kind, file, tags) in _index(store).items():
        path = root / file if file else None
        manager.task_index[name] = entries.Entry(name, entries.Kind[kind], path, tags=set(tags))
    manager._factory = factory
    return manager


def _index(store: Store) -> dict[str, tuple[str, str | None, list[str]]]:
    """By name of every task, group and tag: its kind, its YAML file, and its tags (of a tag, its tasks)."""

    def make(folder: Path) -> None:
        root = Path(lm_eval_tasks.__file__).parent
        index = {
            name: (entry.kind.name, entry.yaml_path and str(entry.yaml_path.relative_to(root)), sorted(entry.tags))
            for name, entry in lm_eval_tasks.TaskManager().task_index.items()
        }
        _write(folder / "index.json", index)

    key = fingerprint({"index": harness_version(), "version": versions.HARNESS})
    return json.loads((store.get_or_make("tasks", key, make).path / "index.json").read_text(encoding="utf-8"))


def _describe(name: str, store: Store) -> dict[str, Any]:
    """The ``NamedTask`` as plain data."""
    index = _index(store)
    if name not in index:
        near = difflib.get_close_matches(name, index, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "lm-eval ls tasks lists all names"
        raise UserError(f"task '{name}': lm-eval {harness_version()} has no such task; {hint}")
    kind, _, tags = index[name]
    if kind == "TAG":
        raise UserError(f"task '{name}' is lm-eval's name for several tasks; name these: {', '.join(tags)}")
    try:
        groups, leaves = _built(name, store)
    except UserError:
        raise
    except Exception as error:  # a task may contain code of any kind, which runs at set-up
        raise UserError(f"task '{name}' cannot be set up: {error}".splitlines()[0]) from None
    if not groups:
        metrics = _metrics(leaves[name])
    elif not groups[name]:
        raise UserError(f"task '{name}' is a group without a number; name its tasks: {', '.join(leaves)}")
    else:
        filters = {metric.partition(",")[2] for metric in _metrics(next(iter(leaves.values())))}
        metrics = [f"{metric},{name}" for metric in groups[name] for name in sorted(filters)]
    listed = [one for cfg in leaves.values() for one in cfg.get("metric_list") or []]
    lower = {str(_name_of(one)) for one in listed if _lower_is_better(one)}
    return {
        "leaves": {leaf: _leaf(cfg) for leaf, cfg in leaves.items()},
        "metrics": metrics,
        "lower_is_better": [metric for metric in metrics if metric.partition(",")[0] in lower],
    }


def _built(name: str, store: Store) -> tuple[dict[str, list[str]], dict[str, dict[str, Any]]]:
    """The groups within a task or group, by name with the metrics they aggregate, and its leaves' whole YAML."""
    groups: dict[str, list[str]] = {}
    leaves: dict[str, dict[str, Any]] = {}

    class Described:
        """Takes the place of lm-eval's task, which would load its data."""

        def __init__(self, cfg: dict[str, Any]) -> None:
            self.task_name = cfg["task"]
            leaves[self.task_name] = cfg

    class Describing(factories.TaskFactory):
        def _build_task(self, entry: Any, overrides: dict[str, Any] | None) -> Any:
            # Before code of the task runs.
            _refuse(entry.name, yaml_loader.load_yaml(entry.yaml_path, resolve_func=False))
            return Described(self._load_full_config(entry, overrides))

        def _build_group(self, group_name: str, *arguments: Any) -> lm_eval_group.Group:
            group = super()._build_group(group_name, *arguments)
            groups[group_name] = [one.metric for one in group.aggregate_metric_list or []]
            return group

        def _build_group_members(self, members: list[Any], group_name: str, *arguments: Any) -> Any:
            for member in members:
                names = member if isinstance(member, dict) else {"task": member}
                if names.get("group", names.get("task")) not in manager.task_index:
                    raise UserError(f"task '{name}': in group {group_name} are tasks without names; not supported")
            return super()._build_group_members(members, group_name, *arguments)

    manager = _manager(store, Describing())
    manager.load([name])
    return groups, leaves


def _refuse(name: str, cfg: Mapping[str, Any]) -> None:
    for entry, why in UNSUPPORTED.items():
        if cfg.get(entry):
            raise UserError(f"task '{name}' {why}; not supported")


def _leaf(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """The facts of ``Leaf`` from its YAML."""
    splits = {split: cfg.get(split) for split in SPLITS}
    fewshot = splits["fewshot_split"]
    if fewshot is None and not (cfg.get("fewshot_config") or {}).get("samples"):
        fewshot = splits["training_split"] or splits["validation_split"] or splits["test_split"]
    return {
        "path": cfg["dataset_path"],
        "name": cfg.get("dataset_name"),
        "kwargs": cfg.get("dataset_kwargs") or {},
        "splits": splits,
        "evaluated": splits["test_split"] or splits["validation_split"],
        "fewshot": fewshot,
        "own_shots": cfg.get("num_fewshot"),
    }


def _metrics(cfg: Mapping[str, Any]) -> list[str]:
    """The names that the metrics of a leaf have in results; empty where lm-eval chooses them."""
    filters = [one["name"] for one in cfg.get("filter_list") or [{"name": "none"}]]
    return [f"{_name_of(one)},{name}" for one in cfg.get("metric_list") or [] for name in filters]


def _name_of(metric: Mapping[str, Any]) -> Any:
    """The name of an entry of ``metric_list``, which may be a function."""
    return getattr(metric["metric"], "__name__", metric["metric"])


def _lower_is_better(metric: Mapping[str, Any]) -> bool:
    """As the entry says, else lm-eval's default for this metric."""
    return not metric.get("higher_is_better", registry.HIGHER_IS_BETTER_REGISTRY.get(_name_of(metric), True))


def _write(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
