"""The seven zero-shot tasks on SmolLM2 equal lm-eval's own command line, to the digit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lowrank_lab.artifacts.store import Store
from lowrank_lab.evaluation import tasks

from .conftest import mirror, run_on_mirror

TASKS = ("openbookqa", "arc_easy", "arc_challenge", "winogrande", "hellaswag", "piqa", "mathqa")
LIMIT = int(os.environ.get("LOWRANK_LAB_LIMIT", "5"))  # documents a task; 100: ten minutes of processor time


def other_data(task: str, data_root: Path, store: Store) -> dict:
    """The task's YAML with the files of the mirror in place of its data set, and no splits but those it has."""
    import lm_eval.tasks

    _, file, _ = tasks._index(store)[task]
    [leaf] = tasks.named_task(task, store).leaves.values()
    folder = data_root / leaf.path / (leaf.name or "default")
    files = {split: str(folder / f"{split}.jsonl") for split in ("train", "validation", "test")}
    files = {split: name for split, name in files.items() if Path(name).is_file()}
    splits = {entry: split if split in files else None for entry, split in leaf.splits.items()}
    return {
        "include": str(Path(lm_eval.tasks.__file__).parent / file),
        "task": task,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": files},
        **splits,
    }


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_accuracies_equal_those_of_lm_evals_command_line(tmp_path):
    data_root = mirror()
    job = ["method=dense", "model=smollm2", "eval=zeroshot", f"eval.zeroshot.limit={LIMIT}"]
    record = run_on_mirror(tmp_path / "results", data_root, *job)
    ours = record["metrics"]["zeroshot"]["tasks"]

    store = Store(tmp_path / "results" / "artifacts")
    (tmp_path / "yaml").mkdir()
    for task in TASKS:
        (tmp_path / "yaml" / f"{task}.yaml").write_text(yaml.safe_dump(other_data(task, Path(data_root), store)))
    [model] = (store.root / "model").glob("[0-9a-f]*")
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--device", "cpu", "--limit", str(LIMIT)]
    command += ["--model_args", f"pretrained={model},dtype=float32", "--tasks", ",".join(TASKS)]
    command += ["--include_path", str(tmp_path / "yaml"), "--output_path", str(tmp_path / "out")]
    subprocess.run(command, check=True)
    [file] = (tmp_path / "out").rglob("results_*.json")
    theirs = json.loads(file.read_text())["results"]

    for task in TASKS:
        found = ours[task]["results"][task]
        print(task, found["metrics"], "of", found["documents"], "of", found["available"])
        assert found["documents"] == LIMIT
        assert found["metrics"] == {m: theirs[task][f"{m},none"] for m in found["metrics"]}
        assert found["stderr"] == {m: theirs[task][f"{m}_stderr,none"] for m in found["metrics"]}
        assert ours[task]["value"] == theirs[task]["acc,none"]
    assert set(ours) == set(TASKS)
