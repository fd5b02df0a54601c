"""Which of our numbers matches a published one: same cell, same setting, same model, and all from one run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from lowrank_lab.artifacts.store import fingerprint
from lowrank_lab.cells.options import name_of
from lowrank_lab.records.results import others_in
from lowrank_lab.reporting import models_of_papers
from lowrank_lab.reporting.measured import TOP1
from lowrank_lab.reporting.published import Published

T = TypeVar("T")

QUANTIZATIONS = {
    "NF4": "NF4 g64",
    "bnb4": "bitsandbytes NF4 g64",
    "bnb8": "bitsandbytes INT8 sym",
}  # as records name them
DESCRIPTIONS = ("gpu", "kind")  # variants that describe the machine and the method, and no setting


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


def is_cell(row: dict[str, Any], record: dict[str, Any], table: Published) -> bool:
    """Whether a record is of the method, ratio, quantization and settings of a published row; of any model."""
    method = table.also.get(row["method"], row["method"])
    config = record["config"]
    kept = table.ratio if row["ratio"] == "" else row["kept"]
    return (
        method_of(record) == method
        and (method == "dense" or record["ratio"] == kept)
        and record["quantization"]["name"] == quantization_of(row["quantization"], table)
        and all(setting(config, name) == value for name, value in settings_in(row["variant"]))
    )


def method_of(record: dict[str, Any]) -> str:
    """The method of a record as tables name it: another compression of the dense model is one, such as "tome"."""
    options = [str(name_of(axis, record["config"].get(axis)) or axis) for axis in others_in(record)]
    return " + ".join(options if options and record["method"] == "dense" else [record["method"], *options])


def quantization_of(published: str, table: Published) -> str:
    """As records name it; "none" for none."""
    ours = table.also.get(published, published)
    return QUANTIZATIONS.get(ours, ours) or "none"


def settings_in(variant: str) -> list[tuple[str, str]]:
    """The parts of a variant that are settings of ours, by their dotted names."""
    parts = [part.partition("=") for part in variant.split(";")]
    return [(name, value) for name, _, value in parts if "." in name]


def setting(config: dict[str, Any], name: str) -> str:
    """A setting by its dotted name, as text."""
    found: Any = config
    for part in name.split("."):
        found = found.get(part) if isinstance(found, dict) else None
    return f"{found:g}" if isinstance(found, int | float) else str(found)


def named_as_in(table: Published, numbers: list[Ours]) -> list[Ours]:
    """Our numbers with the table's names of data sets."""
    names = {ours: theirs for theirs, ours in table.also.items()}
    named = [replace(ours, dataset=names.get(ours.dataset, ours.dataset)) for ours in numbers]
    return [_of_unnamed_images(ours) for ours in named] if "" in table.also else named


def _of_unnamed_images(ours: Ours) -> Ours:
    """An accuracy on images for a source that names no data set: on any, which its mark names."""
    if not ours.dataset or TOP1 not in ours.variant.split(";"):
        return ours
    told = f"on {ours.dataset}, where the source names no data set"
    return replace(ours, dataset="", differs="; ".join(filter(None, (ours.differs, told))))


def matching(row: dict[str, Any], numbers: list[Ours], table: Published) -> list[Ours]:
    """Those of our ``numbers`` that are what a published row has: of its model, or of one that no paper has."""
    found = [
        ours
        for ours in numbers
        if (ours.metric, ours.dataset) == (row["metric"], row["dataset"])
        and within(row["variant"], ours.variant)
        and is_cell(row, ours.record, table)
    ]
    return of_model(row["model"], found, lambda ours: ours.record)


def within(variant: str, ours: str) -> bool:
    """Whether our measurement is in the published setting; settings of the model and descriptions aside."""
    asked = {part for part in variant.split(";") if part}
    asked = {part for part in asked if "." not in part.split("=")[0] and part.split("=")[0] not in DESCRIPTIONS}
    return asked <= set(ours.split(";"))


def of_model(model: str, found: list[T], record_of: Callable[[T], dict[str, Any]]) -> list[T]:
    """What is of the published model; where nothing is, what is of a model that no paper has."""
    paths = [record_of(one)["config"]["model"]["path"] for one in found]
    wanted = models_of_papers.paths().get(model)
    if wanted in paths:
        return [one for one, path in zip(found, paths, strict=True) if path == wanted]
    return [one for one, path in zip(found, paths, strict=True) if path not in models_of_papers.paths().values()]


def latest(found: list[Ours]) -> list[Ours]:
    """One for each seed of those that differ from the latest, which comes first, in their seed alone.

    The protocol of the number has the evaluators' settings: two records may measure other things too.
    """
    same = [ours for ours in found if apart_from_seed(ours) == apart_from_seed(found[0])]
    of_seed: dict[int, Ours] = {}
    for ours in same:
        of_seed.setdefault(ours.record["seed"], ours)
    return list(of_seed.values())


# Settings that change no number of a cell, or that are compared elsewhere.
NO_NUMBER = ("device", "tracker", "results", "artifacts", "save", "eval", "models", "scale", "data_root")


def apart_from_seed(ours: Ours) -> str:
    """A hash of all that tells a number from others of the same name, but for its seed and for its value."""
    config = {name: node for name, node in ours.record["config"].items() if name not in NO_NUMBER}
    model = ours.record["content"]["model"]
    return fingerprint([_without_seeds(config), model, ours.variant, _without_seeds(ours.protocol)])


def _without_seeds(node: Any) -> Any:
    if isinstance(node, dict):
        return {name: _without_seeds(inner) for name, inner in node.items() if name != "seed"}
    return node
