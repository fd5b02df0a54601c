"""The model card of a checkpoint, README.md: what it is, how large, how good, how it is loaded, how it was made.

It may be published with the checkpoint, so it has no path of this machine and no secret.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable
from typing import Any

from lowrank_lab.basics.redaction import redacted
from lowrank_lab.cells.cell import Cell
from lowrank_lab.models.origin import base_model_of, format_of, licence_of
from lowrank_lab.records.results import CHECKPOINTS, FOLDER_SETTINGS, SAVED

NOT_TOLD = (*FOLDER_SETTINGS, "device", "tracker", "dry_run")  # settings that the checkpoint does not depend on
PROTOCOL = ("dataset", "split", "window", "stride", "windows", "bos")  # what of a protocol fits into a table's row
DIRECTORIES = re.compile(r"[^,'\"\[\]{}:=]*[/\\]")

COMPRESSED = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "{name}"  # this folder, or its name on the hub
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder)
```

`trust_remote_code=True` runs `modeling_lowrank_lab.py`, the code beside the weights, without which transformers
refuses the model. After `import lowrank_lab` it is not needed. `model.dequantize()` makes dense weights of it."""
MERGED = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "{name}"  # this folder, or its name on the hub
model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
```

The weights are dense: a plain model for every program that knows the base model, and no smaller than that one."""


def card(cell: Cell, record: dict[str, Any], what: str, others: Iterable[dict[str, Any]] = ()) -> str:
    """The card of the checkpoint ``what`` of ``record``, which need not be finished.

    ``others`` are records that may have measured the same checkpoint.
    """
    base_model, licence = base_model_of(cell.source), licence_of(cell.source)
    name, saved = record[what].removeprefix(f"{CHECKPOINTS}/"), record[SAVED][what]
    measured = [one for one in others if one.get(what) == record[what] and one["key"] != record["key"]]
    same = "" if saved["dtype"] == cell.cfg.dtype else f", before its weights were rounded to {saved['dtype']}"
    parts = [
        _front_matter(base_model, licence, what),
        f"# {name}",
        f"{base_model}, compressed with {_title(cell)} by lowrank_lab {record['versions']['lowrank_lab']}.",
        _facts(cell, record, saved, base_model, licence),
        "## Measured",
        f"In {cell.cfg.dtype}{same}.\n\n{_metrics([*measured, record])}"
        if any(one["metrics"] for one in (*measured, record))
        else "Nothing was measured.",
        "## How to load it",
        (COMPRESSED if what == "checkpoint" else MERGED).format(name=name),
        "## How it was made",
        f"```\n{_command(cell, base_model)}\n```\n\nWith {_software(record)}.",
    ]
    return redacted("\n\n".join(parts)) + "\n"


def megabytes(count: int | None) -> str:
    if count is None:
        return "not known"
    return f"{count / 1e9:.3g} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"


def _front_matter(base_model: str, licence: dict[str, str], what: str) -> str:
    """As the hub reads it: https://huggingface.co/docs/hub/model-cards."""
    entries = {
        "base_model": base_model,
        **licence,
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
    }
    tags = ["lowrank_lab", "compressed" if what == "checkpoint" else "merged"]
    lines = [f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in entries.items()]
    return "\n".join(["---", *lines, "tags:", *(f"- {tag}" for tag in tags), "---"])


def _title(cell: Cell) -> str:
    name = cell.method_in_words.removeprefix("dense ")
    return f"{name} at ratio {cell.ratio:g}" if cell.is_factored else name


def _facts(
    cell: Cell, record: dict[str, Any], saved: dict[str, Any], base_model: str, licence: dict[str, str]
) -> str:
    sizes = record["sizes"]
    dense = sizes["parameters"] - sizes["sites"]["parameters"] + sizes["sites"]["parameters_dense"]
    of_base = (
        f"{licence['license']}, that of the base model" if licence else "that of the base model, not known here"
    )
    rows = {
        "base model": base_model,
        "licence": of_base,
        "method": _title(cell),
        "ratio counts": record["counts"]["unit"] if cell.is_factored else None,
        "other settings": ", ".join(f"{name}={value}" for name, value in record["variant"].items()) or None,
        "parameters": f"{sizes['parameters']:,}, of {dense:,} of the base model",
        "weights": f"{megabytes(saved['bytes'])} in {saved['dtype']}",
        "those it was made from": f"{megabytes(saved['source_bytes'])} ({format_of(cell.source)})",
    }
    lines = [f"| {name} | {_cell(value)} |" for name, value in rows.items() if value is not None]
    return "\n".join(["| | |", "|---|---|", *lines])


def _metrics(records: Iterable[dict[str, Any]]) -> str:
    """A table with a row for each measurement; the last of those with the same protocol."""
    rows: dict[str, str] = {}
    for record in records:
        for measured in record["metrics"].values():
            protocol = measured.get("protocol") or {}
            told = ", ".join(f"{name} {_short(protocol[name])}" for name in PROTOCOL if name in protocol)
            number = measured["value"]
            number = f"{number:.4g}" if isinstance(number, int | float) else "not a number"
            key = json.dumps([measured["metric"], protocol], sort_keys=True, default=str)
            rows[key] = f"| {_cell(measured['metric'])} | {number} | {_cell(told)} |"
    return "\n".join(["| measure | value | protocol |", "|---|---|---|", *rows.values()])


def _command(cell: Cell, base_model: str) -> str:
    """The command line that makes the same checkpoint; the folders of this machine are left out."""
    told = {"model.path": base_model if cell.source.kind == "hub" else None, "save.dtype": cell.save_dtype}
    words = []
    for name, value in cell.words.items():
        if name not in NOT_TOLD:
            words.append(shlex.quote(f"{name}={told.get(name) or DIRECTORIES.sub('', value)}"))
    return " ".join(["python run.py", *words])


def _software(record: dict[str, Any]) -> str:
    found = [f"{name} {record['versions'][name]}" for name in ("lowrank_lab", "torch", "transformers")]
    commit = record["git"]["commit"]
    return ", ".join([*found, *([f"commit {commit[:12]}"] if commit else [])])


def _short(value: Any) -> str:
    return DIRECTORIES.sub("", str(value))


def _cell(value: Any) -> str:
    """A value in a table's cell."""
    return " ".join(str(value).split()).replace("|", "\\|")
