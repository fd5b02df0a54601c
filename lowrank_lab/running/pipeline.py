"""The flow of one cell, read from top to bottom. Everything that needs torch begins here.

model → sites → statistics*, gradients* → spectra* → ranks → factors → refinement* → storage → checkpoint → metrics*
(* a cached artifact; context.py makes the first ones when an answer asks for them)
"""

from __future__ import annotations

import json
import logging
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lowrank_lab import environment
from lowrank_lab.artifacts.store import Store
from lowrank_lab.cells import config
from lowrank_lab.cells.cell import Cell
from lowrank_lab.checkpoints import checkpoint
from lowrank_lab.checkpoints.description import Saved
from lowrank_lab.errors import SkippedCell
from lowrank_lab.lowrank.factors import install_factors
from lowrank_lab.lowrank.ranks import Ranks, Site
from lowrank_lab.lowrank.sizes import sizes_of_ranks
from lowrank_lab.lowrank.spectra import compress
from lowrank_lab.records.results import CHECKPOINTS, Record
from lowrank_lab.records.sizes import sizes
from lowrank_lab.running.context import Context, pick_device

log = logging.getLogger(__name__)


def compute(cell: Cell, record: Record) -> None:
    """Compute a cell and fill its record. Raises SkippedCell where the combination makes no sense."""
    if not cell.evaluators and not cell.checkpoints:
        raise SkippedCell(cell.why_left_out)
    torch.manual_seed(cell.cfg.seed)
    device = pick_device(cell.cfg.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # what counts memory by the current device then counts on this one
    record.data["hardware"] = environment.hardware(device)
    context = Context(cell, record, device)
    _check_lengths(cell, context.model_config)
    if cell.quantization is not None:
        cell.quantization.check(context.tower)
    left_out = record.data["left_out"]
    for context.evaluator, evaluator in cell.evaluators.items():
        try:
            _check_positions(f"eval.{context.evaluator}", evaluator.lengths(), cell, context.model_config)
            evaluator.check(context)
        except SkippedCell as why:
            left_out[context.evaluator] = str(why)
    _stop_without_numbers(cell, record)

    saved = cell.source.saved
    ranks: Ranks = dict(saved.ranks) if saved is not None else {}
    if cell.compresses:
        with record.stage("allocation"):
            ranks = cell.allocation(context)
        squared_error = _compress(cell, record, context, ranks)
        record.data["compression"] = {
            "ranks": ranks,
            "squared_error": squared_error,
            "sites": {name: _described(site) for name, site in context.sites.items()},
            **context.facts,
        }
    if cell.quantization is not None:
        ranks = ranks or dict.fromkeys(context.sites)
        with record.stage("quantization"):
            cell.quantization(context)
    changed = bool(ranks)
    tower, sites = (context.tower, context.sites) if changed else (None, {})
    of_ranks = sizes_of_ranks(context.model, tower, sites, ranks, cell.ratio)
    record.data["sizes"] = {**of_ranks, **sizes(context.model, tower, sites)}
    if changed and cell.checkpoints:
        saved = checkpoint.describe(context.model, sites, ranks, cell.described, cell.ratio)
    if "checkpoint" in cell.checkpoints:
        _save(cell, record, context, "checkpoint", saved)

    for name in cell.evaluators:
        if name not in left_out:
            try:
                record.data["metrics"][name] = _measured(cell, context, name)
            except SkippedCell as why:  # the other numbers of the job are kept
                left_out[name] = str(why)
    _stop_without_numbers(cell, record)

    if saved is not None and "merged_checkpoint" in cell.checkpoints:
        checkpoint.merge(context.model, saved)  # the last thing that is done with it
        _save(cell, record, context, "merged_checkpoint", None)


def _compress(cell: Cell, record: Record, context: Context, ranks: Ranks) -> float | None:
    """Put the factors into the model; returns their squared error, None once refinement has changed it."""
    if all(rank is None for rank in ranks.values()):
        return 0.0
    storage = config.build(cell.cfg.storage)
    spectra = context.spectra
    if cell.refinement is None:
        with record.stage("factorization"):
            return compress(context.model, context.tower, context.sites, ranks, spectra, storage, context.device)
    cell.refinement.prepare(context)
    refine = partial(cell.refinement, context, ranks)
    factors = context.made("refinement", "factors", cell.factors_key, refine, resumable=True)
    if (facts := factors / "facts.json").exists():
        record.data["refinement"] = json.loads(facts.read_text())
    with record.stage("factorization"):
        install_factors(context.model, context.tower, context.sites, ranks, factors, storage, context.device)
    return None


def _described(site: Site) -> dict[str, Any]:
    """Where a site is and what it costs; with its rank, what is kept of it."""
    return {
        "block": site.block,
        "linears": list(site.members),
        "dense": site.dense,
        "per_rank": site.per_rank,
    }


def _save(cell: Cell, record: Record, context: Context, what: str, saved: Saved | None) -> None:
    """Write one of the checkpoints that are asked for, unless it is there already."""
    name, store = cell.checkpoints[what], Store(cell.cfg.results)
    use_cache = getattr(context.model_config, "use_cache", True)
    make = lambda folder: checkpoint.save(folder, context.model, context.tokenizer, use_cache, saved)
    made = record.artifact(what.replace("_", " "), store.get_or_make(CHECKPOINTS, name, make))
    record.data[what] = f"{CHECKPOINTS}/{name}"
    log.info("%s: %s", what.replace("_", " "), made.path)


def _stop_without_numbers(cell: Cell, record: Record) -> None:
    """Raises SkippedCell where every evaluator is left out and no checkpoint is asked for."""
    left_out = record.data["left_out"]
    if cell.evaluators and set(left_out) == set(cell.evaluators) and not cell.checkpoints:
        raise SkippedCell("; ".join(left_out.values()))


def _check_lengths(cell: Cell, model_config: Any) -> None:
    for of, text in (("calibration", cell.calibration_data), ("refinement", cell.training_data)):
        if text is not None:
            _check_positions(of, {"seqlen": cell.cfg[of].seqlen}, cell, model_config)


def _check_positions(of: str, lengths: dict[str, int], cell: Cell, model_config: Any) -> None:
    """Raises SkippedCell where one of ``lengths``, by setting, is more than the model has positions."""
    positions = getattr(model_config, "max_position_embeddings", None)
    for setting, length in lengths.items():
        if positions is not None and length > positions:
            raise SkippedCell(
                f"{of}.{setting}={length} is longer than the {positions} positions of {cell.source.name}"
            )


def _measured(cell: Cell, context: Context, name: str) -> dict[str, Any]:
    """What an evaluator finds, each of its parts an artifact."""
    evaluator, context.evaluator = cell.evaluators[name], name
    if evaluator.reads_text:
        context.make_text_tokens()  # before the metric, so that its seconds are its own

    def measure(part: str, folder: Path) -> None:
        (folder / "metric.json").write_text(json.dumps(evaluator(context, part), indent=1, allow_nan=False))

    measured = {}
    for part, key in cell.metric_keys(name).items():
        stage = f"eval.{name}.{part}" if part else f"eval.{name}"
        folder = context.made(stage, "metric", key, partial(measure, part))
        measured[part] = json.loads((folder / "metric.json").read_text())
    combined = evaluator.combine(measured)
    if evaluator.reads_text:
        combined["protocol"] = {"dataset": cell.text_of(name).name, **combined["protocol"]}
    return combined
