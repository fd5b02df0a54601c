"""The flow of one cell, read from top to bottom. Everything that needs torch begins here.

model → shapes → statistics*, gradients* → spectra* → ranks → factors → metrics*      (* a cached artifact)
"""

from __future__ import annotations

import json
import logging
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowrank_lab import config, environment
from lowrank_lab.allocation.base import Shapes
from lowrank_lab.bench import Bench, pick_device
from lowrank_lab.calibration.gradients import make_gradients
from lowrank_lab.calibration.statistics import make_statistics
from lowrank_lab.calibration.tokens import load_tokens, make_calibration_tokens
from lowrank_lab.cell import Cell, corpus_part
from lowrank_lab.errors import SkippedCell, UserError
from lowrank_lab.lowrank.ranks import total_parameters
from lowrank_lab.lowrank.spectra import compress, load_tails, make_spectra, site_shapes
from lowrank_lab.models.arch import ArchSpec, kv_cache_values_per_token, spec_for
from lowrank_lab.results import Record

log = logging.getLogger(__name__)


def compute(cell: Cell, record: Record) -> None:
    """Compute a cell and fill its record. Raises SkippedCell where the combination makes no sense."""
    torch.manual_seed(cell.cfg.seed)
    device = pick_device(cell.cfg.device)
    record.data["hardware"] = environment.hardware(device)
    bench = Bench(cell, record, device)
    _check_lengths(cell, bench.model_config)

    if cell.compresses:
        spec = spec_for(bench.model_config.model_type)
        shapes = site_shapes(bench.skeleton(), spec)
        if not shapes:
            raise UserError(f"model {cell.source.name} has no compressible layer")
        allocation = config.build(cell.cfg.allocation)
        spectra = _spectra(cell, record, bench, spec, shapes) if allocation.needs_tails else None
        with record.stage("allocation"):
            ranks = allocation(shapes, cell.ratio, load_tails(spectra, spec) if spectra else None)
        squared_error = 0.0
        if any(rank is not None for rank in ranks.values()):
            spectra = spectra or _spectra(cell, record, bench, spec, shapes)
            with record.stage("factorization"):
                storage = config.build(cell.cfg.storage)
                squared_error = compress(bench.model, spec, ranks, spectra, storage, device)
        record.data["compression"] = {"ranks": ranks, "squared_error": squared_error}
        record.data["sizes"] = _sizes(bench.model, shapes, ranks, cell.ratio)
    else:
        record.data["sizes"] = _sizes(bench.model, {}, {}, 1.0)

    for name, evaluator in cell.evaluators.items():
        bench.evaluator = name
        if evaluator.reads_text:
            bench.make_text_tokens()  # before the metric, so that its seconds are its own
        metric = cell.store.get_or_make("metric", cell.metric_key(name), partial(_measure, evaluator, bench))
        record.artifact(f"eval.{name}", metric)
        measured = json.loads((metric.path / "metric.json").read_text())
        if evaluator.reads_text:
            measured["protocol"] = {"dataset": cell.cfg.dataset.name, **measured["protocol"]}
        record.data["metrics"][name] = measured


def _check_lengths(cell: Cell, model_config: Any) -> None:
    positions = getattr(model_config, "max_position_embeddings", None)
    lengths = {f"eval.{name}.seqlen": getattr(e, "seqlen", 0) for name, e in cell.evaluators.items()}
    if cell.calibration_data is not None:
        lengths["calibration.seqlen"] = cell.cfg.calibration.seqlen
    for name, length in lengths.items():
        if positions is not None and length > positions:
            raise SkippedCell(f"{name}={length} is longer than the {positions} positions of {cell.source.name}")


def _spectra(cell: Cell, record: Record, bench: Bench, spec: ArchSpec, shapes: Shapes) -> Path:
    """The artifact of all spectra, with the calibration passes that its metric asks for."""
    statistics = gradients = None
    if cell.statistics_key or cell.gradients_key:
        ids = _calibration_ids(cell, record, bench, widest=max(inp for _, inp in shapes.values()))
        if cell.statistics_key:
            batches = ids.split(cell.cfg.calibration.batch_size)
            make = lambda folder: make_statistics(folder, bench.model, spec, batches, bench.device)
            made = cell.store.get_or_make("statistics", cell.statistics_key, make)
            statistics = record.artifact("calibration", made).path
        if cell.gradients_key:
            outer = cell.metric.needs_outer
            make = lambda folder: make_gradients(folder, bench.float32_model(), spec, ids, bench.device, outer)
            made = cell.store.get_or_make("gradients", cell.gradients_key, make)
            gradients = record.artifact("gradients", made).path
    make = lambda folder: make_spectra(folder, bench.model, spec, cell.metric, statistics, gradients, bench.device)
    return record.artifact("decomposition", cell.store.get_or_make("spectra", cell.spectra_key, make)).path


def _calibration_ids(cell: Cell, record: Record, bench: Bench, widest: int) -> torch.Tensor:
    """The calibration tokens (samples, seqlen); warns where they are few for the widest input."""
    calibration = cell.cfg.calibration
    corpus, part = corpus_part(calibration.dataset, "calibration")
    made = cell.store.get_or_make(
        "tokens",
        cell.calibration_tokens_key,
        lambda folder: make_calibration_tokens(
            folder,
            bench.tokenizer,
            corpus,
            part,
            cell.cfg.data_root,
            samples=calibration.samples,
            seqlen=calibration.seqlen,
            seed=calibration.seed,
            sampling=calibration.sampling,
            bos_id=bench.bos_id() if calibration.bos == "window" else None,
        ),
    )
    ids, facts = load_tokens(record.artifact("calibration tokens", made).path)
    warning = None
    if ids.size < 4 * widest:
        warning = (
            f"{ids.size} calibration tokens are fewer than four times the widest input ({widest}): "
            "the second moments are poorly determined; raise calibration.samples"
        )
        log.warning(warning)
    record.data["calibration"] = {"dataset": calibration.dataset.name, **facts, "warning": warning}
    return torch.from_numpy(ids)


def _measure(evaluator: Any, bench: Bench, folder: Path) -> None:
    (folder / "metric.json").write_text(json.dumps(evaluator(bench), indent=1))


def _sizes(
    model: nn.Module, shapes: dict[str, tuple[int, int]], ranks: dict[str, int | None], ratio: float
) -> dict[str, Any]:
    """What was asked for and what came out, counted on the tensors of ``model``.

    parameters, bytes        of the whole model; tied tensors count once
    sites                    weights of the compressible linears, biases apart: dense, and as they are now
    macs_per_token           multiply-accumulates of all linear layers with lm_head, attention products apart
    kv_cache_bytes_per_token keys and values of all layers in the model's dtype
    """
    dense = sum(out * inp for out, inp in shapes.values())
    now = 0
    for name in shapes:
        now += sum(p.numel() for n, p in model.get_submodule(name).named_parameters() if n.endswith("weight"))
    assert not shapes or now == total_parameters(shapes, ranks), "the tensors do not have the planned ranks"
    tensors = list(model.parameters())
    value_bytes = next(p.element_size() for p in tensors if p.is_floating_point())
    return {
        "ratio_asked": ratio,
        "ratio_reached": now / dense if shapes else 1.0,
        "parameters": sum(p.numel() for p in tensors),
        "bytes": sum(p.numel() * p.element_size() for p in tensors),
        "sites": {
            "count": len(shapes),
            "parameters_dense": dense,
            "parameters": now,
            "bytes": now * value_bytes,
        },
        "macs_per_token": _macs_per_token(model),
        "kv_cache_bytes_per_token": kv_cache_values_per_token(model.config) * value_bytes,
    }


def _macs_per_token(model: nn.Module) -> int:
    from transformers.pytorch_utils import Conv1D

    linears = (m for m in model.modules() if isinstance(m, (nn.Linear, Conv1D)))
    return sum(linear.weight.numel() for linear in linears)
