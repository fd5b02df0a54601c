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
    cells         the measurement's columns as people read them, in order; of a measurement in several settings one
                  dict for each, which is a row of its own
    details       its numbers in full precision, by the name of their column in the CSV, beside ``value``
    ascending     whether the lowest value ranks first
    """

    metric: str
    title: str
    must_agree: tuple[str, ...]
    describe: Callable[[Mapping[str, Any]], str]
    cells: Callable[[Measured], dict[str, str] | list[dict[str, str]]]
    details: Callable[[Measured], dict[str, float]] = lambda measured: {}
    ascending: bool = True


def number(value: float | None, form: str = "{:.4g}") -> str:
    """A number as text; nan for the None of a model whose logits are not finite."""
    return "nan" if value is None else form.format(value)


JOINS = {"\n\n": "blank lines", " ": "spaces"}


def _describe_perplexity(protocol: Mapping[str, Any]) -> str:
    count = str(protocol["windows"])
    if protocol["windows"] < protocol["windows_available"]:
        count = f"the first {count} of {protocol['windows_available']}"
    windows = f"{count} windows of {protocol['window']} tokens"
    bos = "" if protocol["bos"] == "text" else ", BOS in every window"
    documents = f"{protocol['documents']} documents joined by {JOINS.get(protocol['join'], repr(protocol['join']))}"
    return f"{protocol['dataset']} {protocol['split']}, {documents}, {windows}{bos}"


PERPLEXITY = Section(
    metric="perplexity",
    title="perplexity on",
    must_agree=("dataset", "split", "join", "documents", "sha256", "window", "stride", "windows", "bos"),
    describe=_describe_perplexity,
    cells=lambda measured: {"perplexity": number(measured["value"])},
)


def _describe_speed(protocol: Mapping[str, Any]) -> str:
    where = protocol["cpu"] if protocol["device"] == "cpu" else f"{protocol['device']} of {protocol['gpus']}"
    how = f"threads: {protocol['threads']}, {protocol['new_tokens']} tokens decoded after each prompt"
    return f"{where}, {how}, median of {protocol['repeats']}"


def _speed_cells(measured: Measured) -> list[dict[str, str]]:
    """A row a setting; × is against the dense model in the same run, with the quartiles of the repeats."""
    ideal = measured["ideal"]
    rows = []
    for one in measured["settings"]:
        row = {"batch": str(one["batch_size"]), "prompt": str(one["prompt"])}
        for phase, ideals in (("prefill", [one["ideal_prefill"]]), ("decode", [ideal["macs"], ideal["bytes"]])):
            model, ratio = one["model"], one[f"{phase}_ratio"]
            row[f"{phase} (tokens/s)"] = (
                number(model[phase]["tokens_per_second"]) if model is not None else "out of memory"
            )
            row[f"{phase} ×"] = "{median:.2f} ({q1:.2f}–{q3:.2f})".format(**ratio) if ratio is not None else "—"
            row[f"ideal {phase} ×"] = " / ".join(dict.fromkeys(map("{:.2f}".format, ideals)))
        memory = one["model"] and one["model"]["memory_bytes"]
        row["memory on top (MB)"] = "—" if memory is None else number(memory / 1e6, "{:.3g}")
        rows.append(row)
    return rows


def _speed_details(measured: Measured) -> dict[str, float]:
    details = {f"ideal_decode_{name}": value for name, value in measured["ideal"].items()}
    for one in measured["settings"]:
        setting = f"batch{one['batch_size']}_prompt{one['prompt']}"
        for phase in ("prefill", "decode"):
            for name in ("model", "dense"):
                if one[name] is not None:
                    details[f"{name}_{phase}_{setting}"] = one[name][phase]["tokens_per_second"]
            for name, value in (one[f"{phase}_ratio"] or {}).items():
                details[f"{phase}_ratio_{name}_{setting}"] = value
    return details


SPEED = Section(
    metric="speed",
    title="speed on",
    must_agree=("cpu", "cores", "gpus", "device", "threads", "settings", "new_tokens", "repeats", "warmup"),
    describe=_describe_speed,
    cells=_speed_cells,
    details=_speed_details,
    ascending=False,
)


def fraction(value: float | None) -> str:
    """A fraction as text; — where there is none."""
    return "—" if value is None else f"{value:.3f}"


def _describe_generation(protocol: Mapping[str, Any]) -> str:
    asked = [f"{protocol['zero_shot']} questions alone"] if protocol["zero_shot"] else []
    asked += [f"{protocol['few_shot']} after {protocol['shots']} examples"] if protocol["few_shot"] else []
    chat = " in the chat template" if protocol["chat"] else ""
    return (
        f"{' and '.join(asked)}{chat}, at most {protocol['max_new_tokens']} tokens, sampled at temperature "
        f"{protocol['temperature']:g} and top_p {protocol['top_p']:g} with seed {protocol['seed']}"
    )


def _generation_cells(measured: Measured) -> dict[str, str]:
    if "too_short" not in measured:  # the logits are not finite
        return {"repetition (greedy)": number(None), "repetition (sampled)": number(None), "too short": "—"}
    short = measured["too_short"]
    return {
        "repetition (greedy)": fraction(measured["value"]),
        "repetition (sampled)": fraction(measured["sampled"]),
        "too short": f"{short['greedy']} and {short['sampled']} of {len(measured['answers'])}",
    }


REPETITION = Section(
    metric="repetition",
    title="answers to",
    must_agree=("prompts", "chat", "max_new_tokens", "temperature", "top_p", "seed", "ngram"),
    describe=_describe_generation,
    cells=_generation_cells,
    details=lambda measured: {"sampled": measured["sampled"]} if "sampled" in measured else {},
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

SECTIONS = (PERPLEXITY, SPEED, REPETITION, OUTPUT_ERROR, TRUNCATION)
