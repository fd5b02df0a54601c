"""In what our protocol differs from the published one, in words: what a reader must know of a number of ours."""

from __future__ import annotations

from typing import Any

from lowrank_lab.records.results import compression_of
from lowrank_lab.reporting import models_of_papers
from lowrank_lab.reporting.published import Published

# What ours are, where the sources do not say what theirs are.
OURS_ARE = {
    "memory": "the memory of the weights",
    "flops": "2 FLOPs a multiply-accumulate, of one token that is decoded after a prompt",
    "flops_removed": "of a forward of one image, embedding and classifier too",
    "mse": "of the product of both factors, the mean over the blocks",
    "mae": "of the product of both factors, the mean over the blocks",
}


def differs(record: dict[str, Any], metric: str, source: dict[str, Any], table: Published) -> str:
    """In what a number's protocol differs from the published one, as far as the source gives that.

    ``metric`` is the published name of the number, ``source`` the measurement that it is from.
    """
    expected, protocol, differences = table.expected, source.get("protocol", {}), []
    if metric in OURS_ARE:
        differences.append(OURS_ARE[metric])
    if metric in ("mse", "mae") and table.ratio is not None:
        differences.append(f"at ratio {table.ratio:g}, the source gives none")
    if metric in ("size", "memory") and record["config"].get("dtype") == "float32":
        differences.append("what is not quantized has 32 bits, not 16")
    if metric == "parameters" and record.get("counts", {}).get("unit") == "16-bit words":
        differences.append(
            "weights of 8 and of 16 bits, where the source multiplies those of the dense model by the ratio"
        )
    if "windows_available" in protocol:
        if protocol["windows"] < protocol["windows_available"]:
            differences.append(f"{protocol['windows']} of {protocol['windows_available']} windows")
        if protocol["window"] != expected.get("window", protocol["window"]):
            differences.append(f"windows of {protocol['window']} tokens, not {expected['window']}")
    if protocol.get("images", 0) < protocol.get("images_available", 0):
        differences.append(f"the first {protocol['images']} of {protocol['images_available']} images")
    if source.get("metric") == "accuracy" and protocol["limit"] is not None:
        differences.append(f"the first {protocol['limit']} documents of each task {_standard_error(source)}")
    if metric in ("tokens_per_second", "speedup"):
        differences += _speed(record, protocol)
    if "calibration" in record and compression_of(record, "lowrank") and "samples" in expected:
        calibration = record["config"]["calibration"]
        ours = (calibration["samples"], calibration["seqlen"], calibration["dataset"]["name"])
        if ours != (expected["samples"], expected["seqlen"], expected["calibration"]):
            paper = "{samples} × {seqlen} of {calibration}".format(**expected)
            differences.append(f"calibrated on {ours[0]} × {ours[1]} tokens of {ours[2]}, not {paper}")
    if record["method"] in table.ours_are:
        differences.append(table.ours_are[record["method"]])
    return "; ".join(differences)


def _speed(record: dict[str, Any], protocol: dict[str, Any]) -> list[str]:
    prompts = ", ".join(str(length) for length in sorted({length for _, length in protocol["settings"]}))
    found = [
        f"on {record['hardware'].get('gpu') or record['hardware']['cpu']}",
        f"{protocol['new_tokens']} tokens decoded after prompts of {prompts} in {protocol['dtype']}",
    ]
    return [*found, "with our kernels for few bits"] if record["quantization"]["name"] != "none" else found


def _standard_error(source: dict[str, Any]) -> str:
    """How exact an accuracy near a half on the first documents is; a group of tasks has those of all its tasks."""
    members = max(
        len(set(task.get("results", {})) - set(task.get("groups", {}))) for task in source["tasks"].values()
    )
    return f"(standard error up to {0.5 / (source['protocol']['limit'] * max(1, members)) ** 0.5:.2f})"


def marks(model: str, record: dict[str, Any], differs: str) -> str:
    """What a reader must know of our number next to one of ``model``: another model, and another protocol."""
    same = record["config"]["model"]["path"] == models_of_papers.paths().get(model)
    return "; ".join(text for text in ("" if same else _of_model(record["model"]), differs) if text)


def another_model(marks: str, our_model: str) -> bool:
    """Whether ``marks`` say that ours is another model, so that a difference would say nothing."""
    return _of_model(our_model) in marks.split("; ")


def _of_model(name: str) -> str:
    return f"model {name}"
