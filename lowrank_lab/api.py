"""Compress and evaluate models from Python, and read results.

Each call is one cell of the command line: it has the same keys, store, records and errors, and nothing that the
store has is computed twice. What Python alone can give (a loaded model, texts, an answer as an object) is found by
a hash of its content.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import CodeType, ModuleType
from typing import TYPE_CHECKING, Any

from lowrank_lab.artifacts.store import Store, fingerprint, write_text
from lowrank_lab.basics.errors import SkippedCell, UserError
from lowrank_lab.basics.paths import CONF
from lowrank_lab.cells import grid
from lowrank_lab.cells.cell import Cell
from lowrank_lab.cells.settings import ANSWERS
from lowrank_lab.models.vision_families import AUTO, IMAGE_TEXT_TASK, task_of
from lowrank_lab.records.results import Results
from lowrank_lab.running import runner

if TYPE_CHECKING:
    import pandas as pd

GIVEN = "lowrank_lab_given"  # a module for classes that no file can be imported for


def compress(
    model: Any,
    method: str = "svdllm",
    ratio: float = 0.8,
    *,
    calibration: str | Iterable[str] | None = None,
    tokenizer: Any = None,
    image_processor: Any = None,
    processor: Any = None,
    results: str | Path = "results",
    **settings: Any,
) -> Any:
    """Compress a language model, an image classifier or a model of images and text.

    Returns a transformers model, which ``save_pretrained`` keeps whole.

    ``model`` is a hub name, a folder, or whatever ``model.path`` may be; or a loaded transformers model, with its
    ``tokenizer`` (``image_processor``, ``processor``) where it did not come from a folder or the hub.
    ``calibration`` is an option of that name ("wikitext2", "mnist", "scienceqa"), or texts: strings, or a
    ``datasets.Dataset`` with a column ``text``.
    ``settings`` are those of the command line: ``quantization="gptq"``, ``**{"calibration.samples": 64}``. An
    answer (metric, allocation, refinement, storage) may also be an object.

    The compressed model stays in ``<results>/checkpoints``. Raises UserError for a mistake, before any work, and
    SkippedCell where the settings do not go together.
    """
    kept = {"save.checkpoint": True, "save.dtype": "${dtype}"}  # what is returned is what was measured
    wanted = {"method": method, "ratio": ratio, **kept, **settings}
    cell = _cell(
        model, tokenizer or image_processor or processor, results, wanted, {"calibration": calibration}, ()
    )
    if not cell.checkpoints:
        raise UserError(f"method={method}: nothing is compressed; choose another method, quantization or pruning")
    record = _finished(cell)
    import transformers

    auto = getattr(transformers, AUTO[cell.task])
    return auto.from_pretrained(Path(cell.cfg.results, record["checkpoint"]), dtype=cell.cfg.dtype)


def evaluate(
    model: Any,
    *evaluators: str,
    dataset: str | Iterable[str] | None = None,
    tokenizer: Any = None,
    image_processor: Any = None,
    processor: Any = None,
    results: str | Path = "results",
    **settings: Any,
) -> dict[str, Any]:
    """Measure a model; returns what each of ``evaluators`` ("ppl", "zeroshot", …) gives: metric, value, protocol.

    ``model`` is as for ``compress``, dense or compressed. ``dataset`` is an option of that name, or texts.
    """
    wanted = {"method": "dense", **settings}
    cell = _cell(
        model,
        tokenizer or image_processor or processor,
        results,
        wanted,
        {"dataset": dataset},
        evaluators or ("ppl",),
    )
    return dict(_finished(cell)["metrics"])


def results(folder: str | Path = "results") -> pd.DataFrame:
    """All records below ``folder``: a row for each measurement, and for each cell that failed or was skipped."""
    from lowrank_lab.reporting.frame import frame

    return frame(Results(folder).records())


def table(name: str, results: str | Path = "results") -> pd.DataFrame:
    """A published table ("dobi/table2") with our numbers beside it. Raises UserError for an unknown name."""
    from lowrank_lab.reporting import paper_tables

    return paper_tables.table(name, results)


def _cell(
    model: Any,
    reads: Any,
    results: str | Path,
    settings: Mapping[str, Any],
    texts: Mapping[str, str | Iterable[str] | None],
    evaluators: tuple[str, ...],
) -> Cell:
    """The cell of a call.

    ``reads`` is the tokenizer, image processor or processor of a loaded model. ``texts`` are those for
    ``calibration`` and ``dataset``; None leaves the default.
    """
    store = Store(Path(results, "artifacts"))
    path = model if isinstance(model, str | Path) else _saved_model(store, model, reads)
    words = [
        f"results={_quoted(str(results))}",
        f"model.path={_quoted(str(path))}",
        f"eval=[{','.join(evaluators)}]",
    ]
    nodes: dict[str, Any] = {name: _node(value) for name, value in settings.items() if _is_answer(name, value)}
    if not evaluators:
        nodes["eval"] = {}
    for name, given in texts.items():
        if isinstance(given, str):
            words.append(f"{name}={given}")
        elif given is not None:
            corpus = _saved_texts(store, given)
            part = {"split": "all", "join": "\n\n", "max_documents": None}
            dataset = {"name": f"texts-{Path(corpus['file']).stem[:8]}", "corpus": corpus}
            dataset |= {"eval": part, "calibration": part}
            nodes["dataset" if name == "dataset" else "calibration.dataset"] = dataset
    words += [f"{name}={_quoted(value)}" for name, value in settings.items() if name not in nodes]
    return grid.plan_with(CONF, words, nodes)


def _quoted(value: Any) -> str:
    """A value as Hydra's grammar takes it."""
    if isinstance(value, str):
        return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"
    return json.dumps(value)


def _finished(cell: Cell) -> dict[str, Any]:
    record = runner.run(cell)
    if record["status"] == "skipped":
        raise SkippedCell(record["reason"])
    return record


def _saved_model(store: Store, model: Any, reads: Any) -> Path:
    """The folder of a loaded model in the store, found by the content of its weights."""
    if not hasattr(model, "save_pretrained"):
        raise UserError(f"model is a {type(model).__name__}; give a name, a folder or a transformers model")
    import torch

    reads = reads or _read_by(model)
    digest = hashlib.sha256(json.dumps(model.config.to_dict(), sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    described = reads.get_vocab() if hasattr(reads, "get_vocab") else reads.to_dict()
    if hasattr(reads, "tokenizer"):
        described = [described, reads.tokenizer.get_vocab(), reads.chat_template]
    digest.update(json.dumps(described, sort_keys=True, default=str).encode())
    name = Path(model.config.name_or_path).name or type(model).__name__

    def make(folder: Path) -> None:
        model.save_pretrained(folder)
        reads.save_pretrained(folder)

    return store.get_or_make("model", f"{name}-{digest.hexdigest()[:12]}", make).path


def _read_by(model: Any) -> Any:
    """The tokenizer, image processor or processor of a loaded model, from where it came."""
    from lowrank_lab.models.load import load_image_processor, load_processor, load_tokenizer

    if task_of(model.config.model_type) == IMAGE_TEXT_TASK:
        read, what = load_processor, "processor"
    elif model.main_input_name == "pixel_values":
        read, what = load_image_processor, "image_processor"
    else:
        read, what = load_tokenizer, "tokenizer"
    try:
        return read(model.config.name_or_path, None, False)
    except (OSError, ValueError, UserError):
        raise UserError(f"the {what.replace('_', ' ')} of a loaded model is not known; give {what}=...") from None


def _saved_texts(store: Store, texts: Iterable[Any]) -> dict[str, Any]:
    """The corpus of given texts, which the store keeps as JSON lines, found by their content."""
    rows = [row["text"] if isinstance(row, Mapping) else row for row in texts]
    if wrong := [number for number, row in enumerate(rows) if not isinstance(row, str)]:
        raise UserError(f"text {wrong[0]} is a {type(rows[wrong[0]]).__name__}; texts are strings")
    if not rows:
        raise UserError("there is no text; give at least one")
    file = store.root / "texts" / f"{fingerprint(rows)}.jsonl"
    if not file.exists():
        write_text(file, "".join(json.dumps({"text": row}) + "\n" for row in rows))
    return {"_target_": "lowrank_lab.calibration.corpora.JsonLines", "file": str(file)}


def _is_answer(name: str, value: Any) -> bool:
    return name in ANSWERS and not isinstance(value, str | int | float | bool | None)


def _node(answer: Any) -> dict[str, Any]:
    """The configuration of an answer given as an object: its class, and the arguments that it has kept.

    Raises UserError for an object that does not keep the arguments of its class under their names.
    """
    kind = answer if inspect.isclass(answer) else type(answer)
    names = list(inspect.signature(kind).parameters)
    missing = [name for name in names if not inspect.isclass(answer) and not hasattr(answer, name)]
    if missing:
        raise UserError(f"{kind.__name__} must keep its argument {missing[0]} as self.{missing[0]}")
    values = {} if inspect.isclass(answer) else {name: getattr(answer, name) for name in names}
    return {"_target_": _importable(kind), **values}


def _importable(kind: type) -> str:
    """The path of a class for a configuration; that of a class in a notebook or a script changes with its code."""
    if kind.__module__ not in ("__main__", "builtins"):
        return f"{kind.__module__}.{kind.__qualname__}"
    parts = {name: _code(getattr(value, "__code__", value)) for name, value in vars(kind).items()}
    code = {name: text for name, text in parts.items() if name not in ("__doc__", "__dict__", "__weakref__")}
    name = f"{kind.__name__}_{fingerprint(code)[:8]}"
    setattr(sys.modules.setdefault(GIVEN, ModuleType(GIVEN)), name, kind)
    return f"{GIVEN}.{name}"


def _code(value: Any) -> str:
    """What a function does, or a value, as text: a notebook keeps no source of its classes."""
    if not isinstance(value, CodeType):
        return repr(value)
    constants = [_code(constant) for constant in value.co_consts]
    return f"{value.co_code.hex()} {value.co_names} {value.co_varnames} {constants}"
