"""Which of the words on the command line a cell's label tells, so that two cells do not share one. No torch.

A ``cell`` is a cells.cell.Cell.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from omegaconf import OmegaConf

from lowrank_lab.cells import config
from lowrank_lab.cells.options import default, own_option
from lowrank_lab.cells.settings import ANSWERS, EXCLUDED, flattened

# Words that the label has in another place.
SAID = ("method", "method.name", "ratio", "sparsity", "model", "dataset", "pruning", "quantization", "scale")
AS_TYPED = {"True": "true", "False": "false", "None": "null"}  # a sweep has the words as Python has them


def words_of(overrides: Iterable[str]) -> dict[str, str]:
    """The overrides of one cell by name, without those for Hydra: {"metric.alpha": "0.25"}."""
    pairs = (word.lstrip("+").partition("=") for word in overrides)
    named = ((name, AS_TYPED.get(value, value)) for name, _, value in pairs)
    return {name: value for name, value in named if not name.lstrip("~").startswith("hydra")}


def told(cell: Any) -> list[str]:
    """The words of a cell that its label always tells.

    These are other parts than the method's own, their settings where they are not the defaults, the dtype and the
    seed. What a study has in common (calibration, evaluation) is told only where it differs within a grid
    (``told_apart``).
    """
    if not cell.words:
        return []
    plain = config.plain(cell.cfg)
    settings: dict[str, Any] = {}
    for one in cell.compressions.values():
        settings |= one.settings(plain)
    return [name for name, value in cell.words.items() if _is_told(cell, settings, name, value)]


def _is_told(cell: Any, settings: dict[str, Any], name: str, value: str) -> bool:
    axis, _, entry = name.partition(".")
    if name in SAID:
        return False
    if name == "dtype":
        return value != "float32"
    if name == "seed":
        return value != "0" and _draws_random_numbers(cell, settings)
    if name == "model.revision":
        return value != "null"
    if axis in ANSWERS and not (axis in settings or (axis == "targets" and cell.compressions)):
        return False  # nothing uses this part
    if name in ANSWERS:
        return value != _own_option(cell, axis)
    if axis in ANSWERS:
        return name not in EXCLUDED and _value(value) != default(axis, _option(cell, axis), entry)
    if axis == "compressions":
        axis, _, entry = entry.partition(".")
    if axis not in cell.compressions or not entry:
        return False
    in_name = cell.compressions[axis].in_name
    return entry not in in_name and (name in settings or entry.partition(".")[0] not in in_name)


def _draws_random_numbers(cell: Any, settings: dict[str, Any]) -> bool:
    """Whether a seed changes a number of the cell."""
    nodes = [flattened(f"eval.{name}", config.plain(cell.cfg.eval[name])) for name in cell.evaluators]
    names = [*settings, *(name for node in nodes for name in node)]
    calibrates = cell.calibration_data is not None
    return calibrates or any(name.rpartition(".")[2] == "seed" for name in names)


def _option(cell: Any, axis: str) -> str | None:
    """The option of an axis that a cell has: as typed, or its method's own."""
    return cell.words.get(axis) or _own_option(cell, axis)


def _own_option(cell: Any, axis: str) -> str | None:
    """The option of an axis that the method of a cell chooses; None where that is not known."""
    return None if "experiment" in cell.words else own_option(cell.words.get("method", cell.cfg.method.name), axis)


def _value(text: str) -> Any:
    """What a word on the command line says."""
    return OmegaConf.from_dotlist([f"value={text}"]).value


def told_apart(cells: Sequence[Any]) -> list[Any]:
    """The cells of a grid with labels that differ wherever their keys do."""
    sharing = defaultdict(list)
    for cell in cells:
        sharing[cell.label].append(cell)
    named: dict[int, Any] = {}
    for same_label in sharing.values():
        if len(same_label) > 1 and len({cell.key for cell in same_label}) > 1:
            apart = _distinguishing(same_label)
            named |= {id(cell): replace(cell, apart=apart) for cell in same_label}
    return [named.get(id(cell), cell) for cell in cells]


def _distinguishing(cells: Sequence[Any]) -> tuple[str, ...]:
    """The names of words that determine the keys of the cells, without those that are not needed for it."""
    names = list(dict.fromkeys(name for cell in cells for name in cell.words))
    for name in reversed(names):
        others = [other for other in names if other != name]
        pairs = {(tuple(cell.words.get(other) for other in others), cell.key) for cell in cells}
        if len(pairs) == len({values for values, _ in pairs}):
            names = others
    return tuple(names)
