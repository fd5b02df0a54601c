"""How each kind of measurement is shown: one ``Section`` a metric, which tables and figures go through."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

Measured = Mapping[str, Any]  # what an evaluator returned: metric, value, protocol and more


@dataclass(frozen=True)
class Section:
    """One kind of measurement in reports.

    metric        the evaluators' ``metric`` that it shows
    title         what stands in captions: "<model>, <title> <describe(protocol)>"
    must_agree    the entries of the protocol that must agree for two numbers to stand in one table
    describe      the protocol in one line
    cells         the measurement's columns as people read them, in order
    details       its numbers in full precision, by the name of their column in the CSV, beside ``value``
    ascending     whether the lowest value ranks first
    """

    metric: str
    title: str
    must_agree: tuple[str, ...]
    describe: Callable[[Mapping[str, Any]], str]
    cells: Callable[[Measured], dict[str, str]]
    details: Callable[[Measured], dict[str, float]] = lambda measured: {}
    ascending: bool = True


def number(value: float | None, form: str = "{:.4g}") -> str:
    """A number as text; nan for the None of a model whose logits are not finite."""
    return "nan" if value is None else form.format(value)


def _describe_perplexity(protocol: Mapping[str, Any]) -> str:
    count = str(protocol["windows"])
    if protocol["windows"] < protocol["windows_available"]:
        count = f"the first {count} of {protocol['windows_available']}"
    windows = f"{count} windows of {protocol['window']} tokens"
    bos = "" if protocol["bos"] == "text" else ", BOS in every window"
    return f"{protocol['dataset']} {protocol['split']}, {protocol['documents']} documents, {windows}{bos}"


PERPLEXITY = Section(
    metric="perplexity",
    title="perplexity on",
    must_agree=("dataset", "split", "join", "documents", "sha256", "window", "stride", "windows", "bos"),
    describe=_describe_perplexity,
    cells=lambda measured: {"perplexity": number(measured["value"])},
)


def linear_names(linears: Iterable[str]) -> dict[str, str]:
    """By the path of a linear within its block, a short name: its last part where that is enough."""
    paths = list(linears)
    last = [path.rpartition(".")[2].removesuffix("_proj") for path in paths]
    return dict(zip(paths, last if len(set(last)) == len(last) else paths, strict=True))


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _error_details(measured: Measured) -> dict[str, float]:
    """Of each linear the mean over its blocks, and what the storage adds."""
    of_linears = {name: _mean(errors) for name, errors in measured.get("linears", {}).items()}
    details = {f"linear_{name}": mean for name, mean in of_linears.items() if mean is not None}
    for name, of_storage in measured.get("storage", {}).items():
        details |= {f"storage_{kind}_{name}": error for kind, error in of_storage.items()}
    return details


def _error_cells(measured: Measured) -> dict[str, str]:
    cells = {"last block": number(measured["value"])}
    if measured["value"] is None:
        return cells
    cells["by token"] = number(measured["blocks"]["accumulated_of_tokens"][-1])
    for path, name in linear_names(measured["linears"]).items():
        mean = _mean(measured["linears"][path])
        cells[name] = "—" if mean is None else number(mean, "{:.3f}")
    for kind in ("mse", "mae"):
        mean = _mean(of_storage[kind] for of_storage in measured["storage"].values())
        cells[f"storage {kind.upper()}"] = "—" if mean is None else number(mean, "{:.1e}")
    return cells


OUTPUT_ERROR = Section(
    metric="output error",
    title="relative output error of the last block, and of each linear (mean over blocks), on",
    must_agree=PERPLEXITY.must_agree,
    describe=_describe_perplexity,
    cells=_error_cells,
    details=_error_details,
)


def _truncation_cells(measured: Measured) -> dict[str, str]:
    cells = {"weights − activations (nats)": number(measured["value"])}
    if measured["value"] is not None:
        better = sum(point["activation_nll"] < point["weight_nll"] for point in measured["points"])
        cells["activations better"] = f"{better} of {len(measured['points'])}"
    return cells


TRUNCATION = Section(
    metric="truncation",
    title="one linear's weight truncated against its activations, on",
    must_agree=(*PERPLEXITY.must_agree, "linears", "blocks", "ratios"),
    describe=_describe_perplexity,
    cells=_truncation_cells,
    ascending=False,
)

SECTIONS = (PERPLEXITY, OUTPUT_ERROR, TRUNCATION)
