"""What records measured, by the names that published tables use: metric, data set and the columns' variants."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Number = tuple[str, str, str, float]  # metric, data set, variant, value

PTB = {"ptb_validation": "ptb"}  # the papers say PTB whichever split they take
TOP1 = "score=top-1"  # in the variant of an accuracy on images


def numbers(record: dict[str, Any]) -> Iterator[tuple[Number, dict[str, Any]]]:
    """Each number of a record with the measurement it is from. Numbers that are not finite are nan."""
    for measured in record["metrics"].values():
        kind = measured["metric"]
        if kind == "perplexity":
            yield ("perplexity", _dataset(measured), "", _float(measured["value"])), measured
        elif kind == "accuracy":
            for task, of_task in measured["tasks"].items():
                yield ("accuracy", task, "", _float(of_task["value"])), measured
                for group, found in of_task.get("results", {}).items():
                    if group != task and group in of_task.get("groups", {}):
                        yield ("accuracy", group, "", _float(found["metrics"].get(of_task["metric"]))), measured
        elif kind == "top-1":
            variant = top1_variant(record["config"])
            yield ("accuracy", _dataset(measured), variant, _float(measured["value"])), measured
        elif kind == "speed":
            for number in _speeds(measured):
                yield number, measured
        elif kind == "output error":
            for number in _storage_errors(measured):
                yield number, measured
        elif kind == "perplexity lost to perturbed ranks":
            dataset = _dataset(measured)
            rises = measured["rises"] or [float("nan")] * len(measured["shifts"])
            for shift, rise in zip((0, *measured["shifts"]), (0.0, *rises), strict=True):
                yield ("perplexity_degradation", dataset, shift_variant(shift), rise), measured
    sizes = record.get("sizes")
    if sizes:
        yield ("size", "", "", sizes["bytes"] / 1e9), {}
        yield ("memory", "", "", sizes["bytes"] / 1e9), {}
        yield ("parameters", "", "", sizes["parameters"] / 1e9), {}
        yield ("parameters_removed", "", "", _removed(sizes)), {}
        if image := sizes.get("image"):
            yield ("flops_removed", "", "", 100 * (1 - image["macs"] / image["macs_dense"])), {}


def of_dense(record: dict[str, Any]) -> Iterator[tuple[Number, dict[str, Any]]]:
    """What a compressed model's record says of the dense model that was measured with it."""
    for measured in record["metrics"].values():
        if measured["metric"] == "speed":
            for number in _speeds(measured, "dense"):
                yield number, measured


def of_truncated_activations(record: dict[str, Any]) -> Iterator[tuple[Number, dict[str, Any]]]:
    """What a record says of the dense model whose activations, not weights, were truncated to the cell's ranks."""
    for measured in record["metrics"].values():
        if measured["metric"] == "perplexity of truncated activations":
            yield ("perplexity", _dataset(measured), "", _float(measured["value"])), measured


def truncated(record: dict[str, Any]) -> dict[str, Any]:
    """The record with the name of its method where activations are truncated in the place of weights."""
    return {**record, "method": f"{record['method']}_activations"}


def top1_variant(settings: dict[str, Any]) -> str:
    """The variant of a top-1 accuracy: whether products within heads were factored or matrices."""
    by_head = settings["grouping"]["_target_"].endswith(".Heads")
    return f"{TOP1};level={'head' if by_head else 'matrix'}"


def shift_variant(shift: int) -> str:
    """The variant of a model whose ranks were moved."""
    return f"shift={shift}"


def _dataset(measured: dict[str, Any]) -> str:
    dataset = measured["protocol"]["dataset"]
    return PTB.get(dataset, dataset)


def _speeds(measured: dict[str, Any], of: str = "model") -> Iterator[Number]:
    """Decoded tokens a second, and over those of the dense model, by batch size and prompt length; FLOPs in G."""
    if macs := measured.get("macs", {}).get(of):  # None where memory ran out
        yield "flops", "", "", 2 * (macs["linears"] + macs["steps"] + macs["attention"]) / 1e9
    for setting in measured["settings"]:
        variant = setting_variant(setting["batch_size"], setting["prompt"])
        if setting[of] is not None:
            yield "tokens_per_second", "", variant, float(setting[of]["decode"]["tokens_per_second"])
        if of == "model" and setting["decode_ratio"]:
            yield "speedup", "", variant, float(setting["decode_ratio"]["median"])


def _storage_errors(measured: dict[str, Any]) -> Iterator[Number]:
    """By linear, what the storage adds to its weight; nothing where the model is not finite."""
    for path, errors in measured.get("storage", {}).items():
        for kind, error in errors.items():
            yield kind, "", linear_variant(path), _float(error)


def setting_variant(batch: int, prompt: int) -> str:
    """The variant of a speed by its batch size and the tokens of a prompt."""
    return f"batch={batch};prompt={prompt}"


def linear_variant(path: str) -> str:
    """The variant of a linear by its path within the block."""
    return f"linear={path.rpartition('.')[2]}"


def _removed(sizes: dict[str, Any]) -> float:
    """The share of a model's parameters that was removed, in per cent; biases aside."""
    removed = sizes["sites"]["parameters_dense"] - sizes["sites"]["parameters"]
    return float(100 * removed / (sizes["parameters"] + removed))


def _float(value: float | None) -> float:
    return float("nan") if value is None else float(value)
