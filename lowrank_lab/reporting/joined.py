"""A published table joined with our records of its recipes: ours, the difference, and where protocols differ."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
from omegaconf import OmegaConf

from lowrank_lab.reporting import measured
from lowrank_lab.reporting.published import Published
from lowrank_lab.reporting.tables import outdated, quantized
from lowrank_lab.results import Results
from lowrank_lab.store import fingerprint

T = TypeVar("T")

MODELS = Path(__file__).resolve().parents[2] / "conf" / "model"
# Published names of models by the option of conf/model/ that is the same model.
OPTIONS = {
    "llama-7b": "llama_7b",
    "llama-13b": "llama_13b",
    "llama-2-7b": "llama2_7b",
    "llama-2-13b": "llama2_13b",
    "llama-3-8b": "llama3_8b",
    "llama-3.1-8b": "llama3_1_8b",
    "opt-125m": "opt_125m",
    "opt-2.7b": "opt_2_7b",
}
QUANTIZATIONS = {"NF4": "NF4 g64", "bnb4": "bitsandbytes NF4", "bnb8": "bitsandbytes INT8"}  # as records name them
HARDWARE = ("gpu",)  # variants that tell of the machine
COLUMNS = [
    "model",
    "method",
    "ratio",
    "quantization",
    "metric",
    "dataset",
    "variant",
    "unit",
    "published",
    "note",
    "ours",
    "spread",
    "seeds",
    "difference",
    "our_model",
    "differs",
    "status",
    "keys",
]


@dataclass(frozen=True)
class Cell:
    """A cell that a recipe asked for: its label, and its record where there is one."""

    key: str
    label: str
    record: dict[str, Any] | None

    @property
    def status(self) -> str:
        """Why there is no number; "done" where there may be one."""
        if self.record is None:
            return "missing"
        if outdated(self.record):
            return "outdated"
        if self.record["status"] == "done":
            return "done"
        return f"{self.record['status']} ({self.record['reason']})"


@dataclass(frozen=True)
class Ours:
    """One number of ours: what it is of, and in what its protocol is another than the published one."""

    record: dict[str, Any]
    metric: str
    dataset: str
    variant: str
    value: float
    protocol: dict[str, Any]
    differs: str


def join(table: Published, results: Results, methods: Collection[str] = ()) -> pd.DataFrame:
    """Each row of ``table`` with our number, and below them those of our cells that the table does not have.

    A frame with COLUMNS. ``published`` is text as printed, ``ours`` a float in the unit of the row, the mean over
    seeds (``seeds`` of them) with the sample standard deviation as ``spread``; ``difference`` is ours − published.
    ``differs`` says in what our protocol is another than the published one. Where there is no number, ``status``
    says what became of the cell, and is "missing" for one that nobody has run. ``keys`` are those of the records,
    of one without a number too.
    Ours are measured on the published model where records of it exist, else on one that no paper has (SmolLM2).
    Of runs with other settings the latest counts. Of ``methods`` all records count, not only those of the recipes.
    """
    cells = recipe_cells(table, results, methods)
    records = [cell.record for cell in cells if cell.record and cell.status == "done"]
    numbers = [ours for record in records for ours in _numbers(record, table)]
    rows = [_with_ours(row, table, cells, numbers) for row in _dicts(table.rows)]
    rows += _beyond(table, numbers)
    _add_derived(rows)
    frame = pd.DataFrame(rows, columns=COLUMNS)
    frame["difference"] = frame["ours"] - pd.to_numeric(frame["published"].str.replace(",", ""), errors="coerce")
    return frame


def _dicts(rows: pd.DataFrame) -> list[dict[str, Any]]:
    return [dict(zip(rows.columns, row, strict=True)) for row in rows.itertuples(index=False)]


def recipe_cells(table: Published, results: Results, methods: Collection[str] = ()) -> list[Cell]:
    """The cells of all grids that were run with a recipe of the table, and all of ``methods``; later ones first."""
    asked: dict[str, str] = {}
    for grid in results.grids():
        if experiment_of(grid["name"]) in table.recipes:
            asked |= grid["cells"]
    asked |= {r["key"]: r["label"] for r in (results.records() if methods else []) if r["method"] in methods}
    records = {key: results.find(key) for key in asked}
    cells = [Cell(key, label, records[key]) for key, label in sorted(asked.items())]
    return sorted(cells, key=lambda cell: (cell.record or {}).get("started", ""), reverse=True)


def experiment_of(grid_name: str) -> str | None:
    """The experiment that a grid's command line names."""
    found = re.search(r"(?:^|\s)\+?experiment=(\w+)", grid_name)
    return found and found.group(1)


def _numbers(record: dict[str, Any], table: Published) -> Iterator[Ours]:
    """All numbers of a record; those of the dense model beside a compressed one as of a record of its own."""
    for (metric, dataset, variant, value), source in measured.numbers(record):
        protocol = source.get("protocol", {})
        yield Ours(record, metric, dataset, variant, value, protocol, _differs(record, source, table))
    config = {**record["config"], "allocation": None, "quantization": None}
    dense = {**record, "method": "dense", "ratio": 1.0, "config": config}
    for (metric, dataset, variant, value), source in measured.of_dense(record):
        protocol = source.get("protocol", {})
        yield Ours(dense, metric, dataset, variant, value, protocol, _differs(dense, source, table))


def _with_ours(row: dict[str, Any], table: Published, cells: list[Cell], numbers: list[Ours]) -> dict[str, Any]:
    """A published row as one of the frame."""
    found = [
        ours
        for ours in numbers
        if (ours.metric, ours.dataset) == (row["metric"], row["dataset"])
        and _within(row["variant"], ours.variant)
        and _is_cell(row, ours.record, table)
    ]
    found = _of_model(row["model"], found, lambda ours: ours.record)
    if found:
        return _row(row, _latest(found), "done")
    ran = [(cell.status, cell.record) for cell in cells if cell.record and _is_cell(row, cell.record, table)]
    ran = _of_model(row["model"], ran, lambda one: one[1])
    status = ran[0][0] if ran else "missing"
    keys = ran[0][1]["key"] if ran else ""
    return {**_row(row, [], "not measured" if status == "done" else status), "keys": keys}


def _row(row: dict[str, Any], found: list[Ours], status: str) -> dict[str, Any]:
    scale = 100.0 if row["unit"] == "%" and row["metric"] in ("accuracy", "drop") else 1.0
    scale = 1000.0 if row["unit"] == "MB" and row["metric"] == "size" else scale
    of_seed = {ours.record["seed"]: ours.value * scale for ours in found}
    record = found[0].record if found else None
    return {
        **{name: row[name] for name in ("model", "method", "ratio", "quantization", "metric", "dataset")},
        **{name: row[name] for name in ("variant", "unit", "note")},
        "published": row["value"],
        **_over_seeds(of_seed),
        "our_model": record["model"] if record else "",
        "differs": _marks(row["model"], found),
        "status": "done" if found else status,
        "keys": " ".join(sorted({ours.record["key"] for ours in found})),
    }


def _over_seeds(of_seed: dict[int, float]) -> dict[str, Any]:
    """A number's columns from its values by seed. The mean over seeds of which one is nan is nan."""
    values = pd.Series(list(of_seed.values()), dtype=float)
    mean, spread = values.mean(skipna=False), values.std(skipna=False)
    return {"ours": mean, "spread": spread, "seeds": len(values), "of_seed": of_seed}


def _add_derived(rows: list[dict[str, Any]]) -> None:
    """Averages over the accuracies of a line of the table, and relative drops of averages, from ours.

    They are taken by seed where all parts have the same seeds, and from the means, without a spread, where not.
    No average goes over accuracies of different models.
    """
    tasks = {row["dataset"] for row in rows if row["metric"] == "accuracy" and row["dataset"] != "average"}
    for row in rows:
        if row["dataset"] == "average" and row["metric"] == "accuracy" and row["status"] != "done":
            parts = [r for r in rows if _line(r) == _line(row) and r["metric"] == "accuracy" and r is not row]
            of_one_model = len({part["our_model"] for part in parts}) == 1
            if len(parts) == len(tasks) and of_one_model and all(part["status"] == "done" for part in parts):
                _derive(row, parts, lambda values: sum(values) / len(values))
    averages = [
        r for r in rows if r["dataset"] == "average" and r["metric"] == "accuracy" and r["status"] == "done"
    ]
    for row in rows:
        if (row["metric"], row["dataset"]) == ("drop", "average"):
            own = [r for r in averages if _line(r) == _line(row)]
            dense = [r for r in averages if r["model"] == row["model"] and r["method"] == "dense"]
            dense = [r for r in dense if r["quantization"] == "none"]
            dense = [r for r in dense if r["our_model"] == own[0]["our_model"]] if own else []
            if own and dense:
                _derive(row, own[:1], partial(_drop, dense[0]["ours"], 100.0 if row["unit"] == "%" else 1.0))


def _derive(row: dict[str, Any], parts: list[dict[str, Any]], of: Callable[[list[float]], float]) -> None:
    """Fill ``row`` with what ``of`` makes of the values of ``parts``, and with the marks and keys of them all."""
    seeds = parts[0]["of_seed"]
    if all(part["of_seed"].keys() == seeds.keys() for part in parts):
        row.update(_over_seeds({seed: of([part["of_seed"][seed] for part in parts]) for seed in seeds}))
    else:
        row.update(ours=of([part["ours"] for part in parts]), spread=float("nan"), seeds=1)
    texts = [text for part in parts for text in part["differs"].split("; ") if text]
    keys = sorted({key for part in parts for key in part["keys"].split()})
    row.update(differs="; ".join(dict.fromkeys(texts)), keys=" ".join(keys))
    row.update(our_model=parts[0]["our_model"], status="done")


def _drop(whole: float, scale: float, values: list[float]) -> float:
    return (whole - values[0]) / whole * scale


def _line(row: dict[str, Any]) -> tuple[str, ...]:
    return tuple(row[name] for name in ("model", "method", "ratio", "quantization", "variant"))


def _beyond(table: Published, numbers: list[Ours]) -> list[dict[str, Any]]:
    """Our numbers in the table's columns that belong beside none of its rows, such as of a method of one's own.

    Of a model that no paper has, all our numbers: beside published ones stand only those of the same cells.
    A number of a paper's model that belongs beside a row gets no second line, even where a later one stands there.
    A setting that the table tells of its lines is told of ours too.
    """
    rows = _dicts(table.rows)

    def beside(model: str, record: dict[str, Any], metric: str, dataset: str, variant: str) -> bool:
        return any(
            (row["model"], row["metric"], row["dataset"]) == (model, metric, dataset)
            and _within(row["variant"], variant)
            and _is_cell(row, record, table)
            for row in rows
        )

    columns = {(row["metric"], row["dataset"]): row["unit"] for row in rows}
    told = sorted({name for row in rows for name, _ in _settings(row["variant"])})
    papers = {path: name for name, path in _paths().items()}
    found: dict[tuple[str, ...], dict[tuple[str, str, str], list[Ours]]] = {}
    for ours in numbers:
        record, where = ours.record, (ours.metric, ours.dataset)
        model = papers.get(record["config"]["model"]["path"], "")
        if where in columns and not (model and beside(model, record, *where, ours.variant)):
            settings = ";".join(f"{name}={_setting(record['config'], name)}" for name in _answered(told, record))
            line = (record["method"], f"{record['ratio']:g}", quantized(record["config"], "name"), settings)
            of_line = found.setdefault((model or record["model"], *line), {})
            of_line.setdefault((*where, ours.variant), []).append(ours)
    beyond = []
    for (model, method, ratio, quantization, settings), of_line in sorted(found.items(), key=_dense_first):
        shared = {"model": model, "method": method, "ratio": ratio, "quantization": quantization, "note": ""}
        for (metric, dataset), unit in columns.items():
            cell = {**shared, "metric": metric, "dataset": dataset, "unit": unit, "value": ""}
            record = next(iter(of_line.values()))[0].record
            derived = metric == "drop" or dataset == "average"
            if derived and not beside(model, record, metric, dataset, ""):
                beyond.append(_row({**cell, "variant": settings}, [], "missing"))
            for (of_metric, of_dataset, variant), same in of_line.items():
                if (of_metric, of_dataset) == (metric, dataset):
                    both = ";".join(part for part in (settings, variant) if part)
                    beyond.append(_row({**cell, "variant": both}, _latest(same), "done"))
    return beyond


def _dense_first(item: tuple[tuple[str, ...], Any]) -> tuple[Any, ...]:
    model, method, ratio, *rest = item[0]
    return model, method != "dense", -float(ratio), method, *rest


def _answered(names: list[str], record: dict[str, Any]) -> list[str]:
    """Those of the settings that have a value in a record's compression; none of the dense model."""
    if record["config"]["allocation"] is None:
        return []
    return [name for name in names if _setting(record["config"], name) != "None"]


def _is_cell(row: dict[str, Any], record: dict[str, Any], table: Published) -> bool:
    """Whether a record is of the method, ratio, quantization and settings of a published row; of any model."""
    method = table.also.get(row["method"], row["method"])
    quantization = table.also.get(row["quantization"], row["quantization"])
    quantization = QUANTIZATIONS.get(quantization, quantization) or "none"
    config = record["config"]
    return (
        record["method"] == method
        and (method == "dense" or record["ratio"] == row["kept"])
        and _quantized(record) == quantization
        and all(_setting(config, name) == value for name, value in _settings(row["variant"]))
    )


def _settings(variant: str) -> list[tuple[str, str]]:
    """The parts of a variant that are settings of ours, by their dotted names."""
    parts = [part.partition("=") for part in variant.split(";")]
    return [(name, value) for name, _, value in parts if "." in name]


def _quantized(record: dict[str, Any]) -> str:
    """The name of a record's quantization; that of an outdated one may be settings that are no more."""
    try:
        return quantized(record["config"], "name")
    except Exception:
        if outdated(record):
            return "unknown"
        raise


def _setting(config: dict[str, Any], name: str) -> str:
    """A setting by its dotted name, as text."""
    found: Any = config
    for part in name.split("."):
        found = found.get(part) if isinstance(found, dict) else None
    return f"{found:g}" if isinstance(found, int | float) else str(found)


def _within(variant: str, ours: str) -> bool:
    """Whether our measurement is in the published setting; settings of the model and the machine aside."""
    asked = {part for part in variant.split(";") if part}
    asked = {part for part in asked if "." not in part.split("=")[0] and part.split("=")[0] not in HARDWARE}
    return asked <= set(ours.split(";"))


@cache
def _paths() -> dict[str, str]:
    """By the published name of a model, where ours is on the hub."""
    configs = {name: OmegaConf.load(MODELS / f"{option}.yaml") for name, option in OPTIONS.items()}
    return {name: str(OmegaConf.select(config, "path")) for name, config in configs.items()}


def _of_model(model: str, found: list[T], record_of: Callable[[T], dict[str, Any]]) -> list[T]:
    """What is of the published model; where nothing is, what is of a model that no paper has."""
    paths = [record_of(one)["config"]["model"]["path"] for one in found]
    wanted = _paths().get(model)
    if wanted in paths:
        return [one for one, path in zip(found, paths, strict=True) if path == wanted]
    return [one for one, path in zip(found, paths, strict=True) if path not in _paths().values()]


def _latest(found: list[Ours]) -> list[Ours]:
    """One for each seed of those that differ from the latest, which comes first, in their seed alone.

    The evaluators' settings are told apart by the protocol of the number: two records may measure other things too.
    """
    same = [ours for ours in found if _apart_from_seed(ours) == _apart_from_seed(found[0])]
    of_seed: dict[int, Ours] = {}
    for ours in same:
        of_seed.setdefault(ours.record["seed"], ours)
    return list(of_seed.values())


# What changes no number of a cell, and what is told apart elsewhere.
NO_NUMBER = ("device", "tracker", "results", "artifacts", "save", "eval", "models", "scale", "data_root")


def _apart_from_seed(ours: Ours) -> str:
    config = {name: node for name, node in ours.record["config"].items() if name not in NO_NUMBER}
    model = ours.record["content"]["model"]
    return fingerprint([_without_seeds(config), model, ours.variant, _without_seeds(ours.protocol)])


def _without_seeds(node: Any) -> Any:
    if isinstance(node, dict):
        return {name: _without_seeds(inner) for name, inner in node.items() if name != "seed"}
    return node


def _differs(record: dict[str, Any], source: dict[str, Any], table: Published) -> str:
    """In what a number's protocol differs from the published one, as far as the source gives that."""
    expected, protocol, differences = table.expected, source.get("protocol", {}), []
    if source.get("metric") == "perplexity":
        if protocol["windows"] < protocol["windows_available"]:
            differences.append(f"{protocol['windows']} of {protocol['windows_available']} windows")
        if protocol["window"] != expected.get("window", protocol["window"]):
            differences.append(f"windows of {protocol['window']} tokens, not {expected['window']}")
    if source.get("metric") == "accuracy" and protocol["limit"] is not None:
        differences.append(f"the first {protocol['limit']} documents of each task {_standard_error(source)}")
    if source.get("metric") == "speed":
        differences.append(f"on {record['hardware'].get('gpu') or record['hardware']['cpu']}")
    if "calibration" in record and record["config"]["allocation"] is not None and "samples" in expected:
        own = record["config"]["calibration"]
        ours = (own["samples"], own["seqlen"], own["dataset"]["name"])
        if ours != (expected["samples"], expected["seqlen"], expected["calibration"]):
            paper = "{samples} × {seqlen} of {calibration}".format(**expected)
            differences.append(f"calibrated on {ours[0]} × {ours[1]} tokens of {ours[2]}, not {paper}")
    return "; ".join(differences)


def _standard_error(source: dict[str, Any]) -> str:
    """How exact an accuracy near a half on the first documents is; a group of tasks has those of all its tasks."""
    members = max(
        len(set(task.get("results", {})) - set(task.get("groups", {}))) for task in source["tasks"].values()
    )
    return f"(standard error up to {0.5 / (source['protocol']['limit'] * max(1, members)) ** 0.5:.2f})"


def _marks(model: str, found: list[Ours]) -> str:
    """What a reader must know of our number: another model, and another protocol."""
    if not found:
        return ""
    record = found[0].record
    other = [] if record["config"]["model"]["path"] == _paths().get(model) else [f"model {record['model']}"]
    return "; ".join([*other, *([found[0].differs] if found[0].differs else [])])
