"""The flow of one cell, read from top to bottom. Everything that needs torch begins here.

checks → texts → compressions, one after the other → sizes → checkpoint → measurements → merged checkpoint → cards
"""

from __future__ import annotations

import json
import logging
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lowrank_lab.artifacts.locks import LockedByAnother
from lowrank_lab.artifacts.store import Store, disk_full, write_text
from lowrank_lab.basics.errors import SkippedCell, UserError
from lowrank_lab.cells.cell import Cell
from lowrank_lab.checkpoints import checkpoint
from lowrank_lab.checkpoints.casting import bytes_in
from lowrank_lab.checkpoints.description import Saved
from lowrank_lab.models.origin import format_of, size_of, weights_in
from lowrank_lab.models.own_config import CARD
from lowrank_lab.modules.image_macs import macs_of_image
from lowrank_lab.process import environment
from lowrank_lab.records.model_card import card, megabytes
from lowrank_lab.records.rank_sizes import sizes_of_ranks
from lowrank_lab.records.results import CHECKPOINTS, SAVED, Record, Results
from lowrank_lab.records.sizes import sizes
from lowrank_lab.running.context import Context, pick_device
from lowrank_lab.running.culprits import weights_named

log = logging.getLogger(__name__)


def compute(cell: Cell, record: Record) -> None:
    """Compute a cell and fill its record. Raises SkippedCell where the settings do not go together."""
    if not cell.evaluators and not cell.checkpoints:
        raise SkippedCell(cell.left_out_message)
    context = _prepared(cell, record)
    _check(context)
    _read_texts(context)
    with weights_named(context):
        for name, compression in cell.compressions.items():
            context.facts.clear()
            plan = compression.plan(context)
            facts = compression.apply(context, plan)
            context.model_was_changed()
            record.data["compressions"][name] = {"plan": plan, **facts, **context.facts}
    ranks = _count(context)
    saved = None
    with _failing_alone(context, *cell.checkpoints):
        saved = _describe(context, ranks)
    if saved is not None and "checkpoint" in cell.checkpoints:
        with _failing_alone(context, "checkpoint"):
            _save(context, "checkpoint", saved)
    _evaluate(context)
    if saved is not None and "merged_checkpoint" in cell.checkpoints:
        with _failing_alone(context, "merged_checkpoint"):
            checkpoint.merge(context.model, saved)  # changes the model, so it comes last
            _save(context, "merged_checkpoint", None)
    _write_cards(context)


def _prepared(cell: Cell, record: Record) -> Context:
    torch.manual_seed(cell.cfg.seed)
    device = pick_device(cell.cfg.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # memory statistics are of the current device
    record.data["hardware"] = environment.hardware(device)
    return Context(cell, record, device)


def _check(context: Context) -> None:
    """Check what the model allows before its weights are read. Raises SkippedCell where nothing can be measured."""
    cell, left_out = context.cell, context.record.data["left_out"]
    if cell.calibration_data is not None and "seqlen" in cell.data.sampling:
        _check_positions(context, "calibration", {"seqlen": cell.cfg.calibration.seqlen})
    for name, node in cell.texts.items():
        if "seqlen" in cell.data.sampling:
            _check_positions(context, name, {"seqlen": node.seqlen})
    for compression in cell.compressions.values():
        compression.check(context)
    for context.evaluator, evaluator in cell.evaluators.items():
        try:
            _check_positions(context, f"eval.{context.evaluator}", evaluator.lengths())
            evaluator.check(context)
        except SkippedCell as why:
            left_out[context.evaluator] = str(why)
    _stop_without_numbers(context)


def _check_positions(context: Context, of: str, lengths: dict[str, int]) -> None:
    """Raises SkippedCell where one of ``lengths``, by setting, exceeds the positions of the model."""
    positions = getattr(context.model_config, "max_position_embeddings", None)
    for setting, length in lengths.items():
        if positions is not None and length > positions:
            raise SkippedCell(
                f"{of}.{setting}={length} is longer than the {positions} positions of {context.cell.source.name}"
            )


def _read_texts(context: Context) -> None:
    """Read what evaluators will read: a text that cannot be read is found before any compression."""
    left_out = context.record.data["left_out"]
    for name, evaluator in context.cell.evaluators.items():
        if evaluator.reads_text and name not in left_out:
            context.evaluator = name
            evaluator.read(context)


def _count(context: Context) -> dict[str, int | None]:
    """Count the sizes of the compressed model; returns its ranks."""
    ranks = _ranks(context)
    tower, sites = (context.tower, context.sites) if ranks else (None, {})
    of_ranks = sizes_of_ranks(context.model, tower, sites, ranks, context.cell.ratio)
    context.record.data["sizes"] = {
        **of_ranks,
        **sizes(context.model, tower, sites),
        "image": _sizes_of_image(context),
    }
    return ranks


def _sizes_of_image(context: Context) -> dict[str, Any] | None:
    """The tokens and multiply-accumulates of a forward of one image; None for a model of texts."""
    example = context.cell.data.example(lambda: context.processor)
    if example is None:
        return None
    return macs_of_image(context.model, context.skeleton(), context.family, context.task, example["pixel_values"])


def _describe(context: Context, ranks: dict[str, int | None]) -> Saved | None:
    """Describe the compressed model for a checkpoint; None where it is dense, or none is wanted."""
    cell = context.cell
    if ranks and cell.checkpoints:
        return checkpoint.describe(context.model, context.sites, ranks, cell.method_in_words, cell.ratio)
    return cell.saved


@contextmanager
def _failing_alone(context: Context, *checkpoints: str) -> Iterator[None]:
    """An error of the body is why these checkpoints are not saved; the cell goes on to its numbers."""
    try:
        yield
    except LockedByAnother:
        raise
    except Exception as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        if disk_full(error):
            reason = f"no space left for results={context.cell.cfg.results}"
        elif not isinstance(error, (UserError, OSError)):
            log.error("%s", traceback.format_exc().rstrip())
        context.record.data.setdefault("not_saved", {}).update(dict.fromkeys(checkpoints, reason))


def _ranks(context: Context) -> dict[str, int | None]:
    """The rank of every site of a compressed model, None where it stays dense; empty for the dense model."""
    if (saved := context.cell.saved) is not None:
        return dict(saved.ranks)
    compressions = context.cell.compressions
    for name, compression in compressions.items():
        planned = compression.ranks(context.record.data["compressions"][name]["plan"])
        if planned is not None:
            return planned
    return dict.fromkeys(context.sites) if compressions else {}


def _evaluate(context: Context) -> None:
    """Run the cell's evaluators. Raises SkippedCell where none can measure the model."""
    left_out = context.record.data["left_out"]
    for name in context.cell.evaluators:
        if name not in left_out:
            try:
                context.record.data["metrics"][name] = _measured(context, name)
            except SkippedCell as why:  # the other evaluators still run
                left_out[name] = str(why)
    _stop_without_numbers(context)


def _measured(context: Context, name: str) -> dict[str, Any]:
    """The measurement of an evaluator, each of its parts an artifact."""
    evaluator, context.evaluator = context.cell.evaluators[name], name

    def measure(part: str, folder: Path) -> None:
        (folder / "metric.json").write_text(json.dumps(evaluator(context, part), indent=1, allow_nan=False))

    measured = {}
    for part, key in context.cell.keys.metrics(name).items():
        stage = f"eval.{name}.{part}" if part else f"eval.{name}"
        folder = context.cached_artifact(stage, "metric", key, partial(measure, part))
        measured[part] = json.loads((folder / "metric.json").read_text())
    combined = evaluator.combine(measured)
    if evaluator.reads_text:
        combined["protocol"] = {"dataset": context.cell.text_of(name).name, **combined["protocol"]}
    return combined


def _stop_without_numbers(context: Context) -> None:
    """Raises SkippedCell where every evaluator is left out and no checkpoint is to be saved."""
    cell, left_out = context.cell, context.record.data["left_out"]
    if cell.evaluators and set(left_out) == set(cell.evaluators) and not cell.checkpoints:
        raise SkippedCell("; ".join(left_out.values()))


def _save(context: Context, what: str, saved: Saved | None) -> None:
    """Write one of the cell's checkpoints, unless it exists already."""
    cell, store = context.cell, Store(context.cell.cfg.results)
    name, dtype = cell.checkpoints[what], cell.save_dtype
    use_cache = getattr(context.model_config, "use_cache", None)
    make = lambda folder: checkpoint.save(folder, context.model, context.processor, use_cache, saved, dtype)
    made = store.get_or_make(CHECKPOINTS, name, make, manifest_beside=True)
    artifact = context.record.artifact(what.replace("_", " "), made)
    context.record.data[what] = f"{CHECKPOINTS}/{name}"
    log.info("%s: %s", what.replace("_", " "), artifact.path)
    facts = {
        "dtype": dtype,
        "bytes": sum(file.stat().st_size for file in weights_in(artifact.path, {})),
        "source_bytes": size_of(cell.source),
    }
    context.record.data.setdefault(SAVED, {})[what] = facts
    others = {other: size for other, size in bytes_in(context.model, saved).items() if other != dtype}
    log.info("%s: %s", what.replace("_", " "), _sizes_in_words(cell, what, facts, others))
    _write_card(context, what)


def _sizes_in_words(cell: Cell, what: str, facts: dict[str, Any], others: dict[str, int]) -> str:
    """What the weights were, are, and would be in the ``others``, by dtype."""
    was = f"from {megabytes(facts['source_bytes'])} ({format_of(cell.source)}); "
    would = ", ".join(f"save.dtype={dtype} {megabytes(size)}" for dtype, size in others.items())
    merged = (
        "; dense weights are no smaller than the dense model's: save=true keeps factors"
        if what == "merged_checkpoint"
        else ""
    )
    return f"{megabytes(facts['bytes'])} in {facts['dtype']}, {was}with {would}{merged}"


def _write_card(context: Context, what: str, others: Sequence[dict[str, Any]] = ()) -> None:
    """Write the model card of a checkpoint; it belongs to the user, who may change it, and not to the manifest."""
    folder = Path(context.cell.cfg.results, context.record.data[what])
    try:
        write_text(folder / CARD, card(context.cell, context.record.data, what, others))
    except OSError as error:  # the checkpoint is whole without it
        log.warning("the model card of %s is not written (%s)", folder, error.strerror)


def _write_cards(context: Context) -> None:
    """Write the cards again, now that the numbers are known."""
    record = context.record.data
    wanted = [what for what in context.cell.checkpoints if what not in record.get("not_saved", {})]
    saved = [what for what in wanted if what in record.get(SAVED, {})]
    others = Results(context.cell.cfg.results).records() if saved else []
    for what in saved:
        _write_card(context, what, others)
