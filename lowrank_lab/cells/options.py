"""What the YAML files of conf/ say about an option, without composing them: its name, its values. No torch."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

from omegaconf import OmegaConf

from lowrank_lab.basics.paths import CONF
from lowrank_lab.cells.moved import original_target


def name_of(axis: str, node: Any) -> Any:
    """The option of an axis that ``node``, plain data, is: "loss_based"; of another class, its name in that style.

    Of several options of one class, such as abs_mean and abs_max, it is the one with most of the node's values.
    """
    if not isinstance(node, dict) or "_target_" not in node:
        return node
    target = original_target(node["_target_"])
    options = {name: read(axis, name) for name in names(axis)}
    of_class = [name for name, values in options.items() if _class_of(values) == target]
    if not of_class:
        return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", str(node["_target_"]).rpartition(".")[2]).lower()
    return max(of_class, key=lambda name: sum(node.get(entry) == value for entry, value in options[name].items()))


def _class_of(values: dict[str, Any]) -> str:
    return original_target(values["_target_"]) if "_target_" in values else ""


@cache
def names(axis: str) -> tuple[str, ...]:
    """The options of an axis that are in conf/."""
    return tuple(sorted(file.stem for file in (CONF / axis).glob("*.yaml")))


@cache
def read(axis: str, option: str | None) -> dict[str, Any]:
    """The YAML file of an option as it stands; empty where there is none."""
    file = CONF / axis / f"{option}.yaml"
    return dict(OmegaConf.to_container(OmegaConf.load(file))) if file.is_file() else {}  # type: ignore[arg-type]


def default(axis: str, option: str | None, entry: str) -> Any:
    """The value of an entry in the file of an option; None where it does not stand there."""
    value: Any = read(axis, option)
    for name in entry.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def own_option(method: str, axis: str) -> str | None:
    """The option of an axis that a method has; None for a method that is not in conf/."""
    if method not in names("method"):
        return None
    return (_chosen(".", "config") | _chosen("method", method)).get(axis)


def _chosen(folder: str, name: str) -> dict[str, str]:
    """By axis, the option that a file chooses in its list of defaults."""
    entries = read(folder, name).get("defaults", ())
    pairs = [pair for entry in entries if isinstance(entry, dict) for pair in entry.items()]
    return {str(axis).removeprefix("override ").lstrip("/"): str(option) for axis, option in pairs}
