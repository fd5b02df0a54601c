"""The model card of a checkpoint, README.md: what it is, how large, how good, how it is loaded, how it was made.

It may be published with the checkpoint, so it has no path of this machine and no secret.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable
from typing import Any

from lowrank_lab.basics.paths import RUN
from lowrank_lab.basics.redaction import redacted
from lowrank_lab.cells.cell import Cell
from lowrank_lab.models.origin import base_model_of, format_of, licence_of
from lowrank_lab.models.vision_families import AUTO, IMAGE_TASK, IMAGE_TEXT_TASK, TEXT_TASK
from lowrank_lab.records.results import CHECKPOINTS, FOLDER_SETTINGS, SAVED

NOT_TOLD = (*FOLDER_SETTINGS, "device", "tracker", "dry_run")  # settings that the checkpoint does not depend on
PROTOCOL = ("dataset", "split", "window", "stride", "windows", "bos")  # what of a protocol fits into a table's row
DIRECTORIES = re.compile(r"[^,'\"\[\]{}:=]*[/\\]")

LOADED_BY = {  # by task: the classes of transformers, and the name of what makes inputs
    TEXT_TASK: {
        "auto": AUTO[TEXT_TASK],
        "reader": "AutoTokenizer",
        "processor": "tokenizer",
        "tag": "text-generation",
    },
    IMAGE_TASK: {
        "auto": AUTO[IMAGE_TASK],
        "reader": "AutoImageProcessor",
        "processor": "processor",
        "tag": "image-classification",
    },
    IMAGE_TEXT_TASK: {
        "auto": AUTO[IMAGE_TEXT_TASK],
        "reader": "AutoProcessor",
        "processor": "processor",
        "tag": "image-text-to-text",
    },
}
COMPRESSED = """\
```python
from transformers import {auto}, {reader}

folder = "{name}"  # this folder, or its name on the hub
model = {auto}.from_pretrained(folder, trust_remote_code=True)
{processor} = {reader}.from_pretrained(folder, trust_remote_code=True)
```

`trust_remote_code=True` runs `modeling_lowrank_lab.py`, the code beside the weights, without which transformers
refuses the model. After `import lowrank_lab` it is not needed. `model.dequantize()` makes dense weights of it."""
MERGED = """\
```python
from transformers import {auto}, {reader}

folder = "{name}"  # this folder, or its name on the hub
model = {auto}.from_pretrained(folder)
{processor} = {reader}.from_pretrained(folder)
```

The weights are dense: a plain model for every program that knows the base model, and no smaller than that one."""


def card(cell: Cell, record: dict[str, Any], what: str, others: Iterable[dict[str, Any]] = ()) -> str:
    """The card of the checkpoint ``what`` of ``record``, which need not be finished.

    ``others`` are records that may have measured the same checkpoint.
    """
    base_model, licence = base_model_of(cell.source), licence_of(cell.source)
    name, saved = record[what].removeprefix(f"{CHECKPOINTS}/"), record[SAVED][what]
    others = list(others)
    measured = [one for one in others if one.get(what) == record[what] and one["key"] != record["key"]]
    parts = [
        _front_matter(base_model, licence, what, LOADED_BY[cell.task]["tag"]),
        f"# {name}",
        f"{base_model}, compressed with {_title(cell)} by lowrank_lab {record['versions']['lowrank_lab']}.",
        _facts(cell, record, what, base_model, licence),
        "## Measured",
        _measured(cell, saved, [*measured, record], [one for one in others if _is_of_source(one, record)]),
        "## How to load it",
        (COMPRESSED if what == "checkpoint" else MERGED).format(name=name, **LOADED_BY[cell.task]),
        "## How it was made",
        f"```\n{_command(cell, base_model)}\n```\n\nWith {_software(record)}.",
    ]
    return redacted("\n\n".join(parts)) + "\n"


def megabytes(count: int | None) -> str:
    if count is None:
        return "not known"
    return f"{count / 1e9:.3g} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"


def _front_matter(base_model: str, licence: dict[str, str], what: str, tag: str) -> str:
    """As the hub reads it: https://huggingface.co/docs/hub/model-cards."""
    entries = {
        "base_model": base_model,
        **licence,
        "library_name": "transformers",
        "pipeline_tag": tag,
    }
    tags = ["lowrank_lab", "compressed" if what == "checkpoint" else "merged"]
    lines = [f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in entries.items()]
    return "\n".join(["---", *lines, "tags:", *(f"- {tag}" for tag in tags), "---"])


def _title(cell: Cell) -> str:
    name = cell.method_in_words.removeprefix("dense ")
    return f"{name} at ratio {cell.ratio:g}" if cell.is_factored else name


def _facts(cell: Cell, record: dict[str, Any], what: str, base_model: str, licence: dict[str, str]) -> str:
    sizes, saved = record["sizes"], record[SAVED][what]
    dense = sizes["parameters"] - sizes["sites"]["parameters"] + sizes["sites"]["parameters_dense"]
    of_base = (
        f"{licence['license']}, that of the base model" if licence else "that of the base model, not known here"
    )
    now = sizes["parameters"] if what == "checkpoint" else dense
    rows = {
        "base model": base_model,
        "licence": of_base,
        "method": _title(cell),
        "ratio counts": record["counts"]["unit"] if cell.is_factored else None,
        "other settings": ", ".join(f"{name}={value}" for name, value in record["variant"].items()) or None,
        "parameters": f"{now:,}" + (f" of the base model's {dense:,}" if now != dense else ", as the base model"),
        "weights": f"{megabytes(saved['bytes'])} in {saved['dtype']}",
        "those it was made from": f"{megabytes(saved['source_bytes'])} ({format_of(cell.source)})",
    }
    lines = [f"| {name} | {_cell(value)} |" for name, value in rows.items() if value is not None]
    return "\n".join(["| | |", "|---|---|", *lines])


def _measured(
    cell: Cell, saved: dict[str, Any], records: list[dict[str, Any]], of_source: list[dict[str, Any]]
) -> str:
    if not any(record["metrics"] for record in records):
        return "Nothing was measured."
    rounded = "" if saved["dtype"] == cell.cfg.dtype else f", before its weights were rounded to {saved['dtype']}"
    return f"In {cell.cfg.dtype}{rounded}.\n\n{_metrics(records, of_source)}"


def _metrics(records: Iterable[dict[str, Any]], of_source: Iterable[dict[str, Any]]) -> str:
    """A table with a row for each measurement, beside that of the model that it was made from where it is known."""
    before = {protocol: number for record in of_source for protocol, (_, number) in _numbers(record).items()}
    found = {protocol: row for record in records for protocol, row in _numbers(record).items()}
    rows = [f"| {name} | {number} | {before.get(protocol, '')} |" for protocol, (name, number) in found.items()]
    return "\n".join(["| measure | value | before the compression |", "|---|---|---|", *rows])


def _numbers(record: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """By metric and protocol each measurement of a record: what it is in words, and the number."""
    found = {}
    for measured in record["metrics"].values():
        protocol, value = measured.get("protocol") or {}, measured["value"]
        told = ", ".join(f"{name} {_without_folders(protocol[name])}" for name in PROTOCOL if name in protocol)
        number = f"{value:.4g}" if isinstance(value, int | float) else "not a number"
        key = json.dumps([measured["metric"], protocol], sort_keys=True, default=str)
        found[key] = _cell(measured["metric"] + (f" ({told})" if told else "")), number
    return found


def _is_of_source(one: dict[str, Any], record: dict[str, Any]) -> bool:
    """Whether ``one`` is a record of the model that was compressed, in the same dtype."""
    same_model = one.get("content", {}).get("model") == record["content"]["model"]
    return same_model and one["config"].get("dtype") == record["config"]["dtype"] and one.get("compressions") == {}


def _command(cell: Cell, base_model: str) -> str:
    """The command line that makes the same checkpoint; the folders of this machine are left out."""
    told = {"model.path": base_model if cell.source.kind == "hub" else None, "save.dtype": cell.save_dtype}
    words = []
    for name, value in cell.words.items():
        if name not in NOT_TOLD:
            words.append(shlex.quote(f"{name}={told.get(name) or _without_folders(value)}"))
    return " ".join([RUN, *words])


def _software(record: dict[str, Any]) -> str:
    found = [f"{name} {record['versions'][name]}" for name in ("lowrank_lab", "torch", "transformers")]
    commit = record["git"]["commit"]
    changed = " with changes" if record["git"]["dirty"] else ""
    return ", ".join([*found, *([f"commit {commit[:12]}{changed}"] if commit else [])])


def _without_folders(value: Any) -> str:
    return DIRECTORIES.sub("", str(value))


def _cell(value: Any) -> str:
    """A value in a table's cell."""
    return " ".join(str(value).split()).replace("|", "\\|")
