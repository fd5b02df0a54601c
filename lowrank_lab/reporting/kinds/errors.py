"""Output errors of compressed linears and blocks, and of one truncated linear."""

from __future__ import annotations

from collections.abc import Iterable

from lowrank_lab.reporting.kinds.perplexity import OF_WINDOWS, describe_windows
from lowrank_lab.reporting.section import Measured, Section, number


def linear_names(linears: Iterable[str]) -> dict[str, str]:
    """By the path of a linear within its block, a short name: its last part where that is enough."""
    paths = list(linears)
    last = [path.rpartition(".")[2].removesuffix("_proj") for path in paths]
    return dict(zip(paths, last if len(set(last)) == len(last) else paths, strict=True))


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _error_details(measured: Measured) -> dict[str, float]:
    """Of each linear the mean over its blocks, and what the storage and later compressions add."""
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
        cells[f"stored {kind.upper()}"] = "—" if mean is None else number(mean, "{:.1e}")  # after all compressions
    return cells


OUTPUT_ERROR = Section(
    metric="output error",
    title="relative output error of the last block, and of each linear (mean over blocks), on",
    must_agree=OF_WINDOWS,
    describe=describe_windows,
    cells=_error_cells,
    details=_error_details,
    alike=True,
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
    must_agree=(*OF_WINDOWS, "linears", "blocks", "ratios"),
    describe=describe_windows,
    cells=_truncation_cells,
    ascending=False,
)
