"""The flow of one cell, read from top to bottom. Everything that needs torch begins here.

model → shapes → ranks → statistics* → spectra* → factors → metrics*         (* a cached artifact)
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from lowrank_lab import config, environment
from lowrank_lab.calibration.statistics import make_statistics
from lowrank_lab.calibration.tokens import load_tokens, make_calibration_tokens, make_text_tokens
from lowrank_lab.cell import Cell, corpus_part
from lowrank_lab.errors import SkippedCell, UserError
from lowrank_lab.lowrank.ranks import total_parameters
from lowrank_lab.lowrank.spectra import compress, make_spectra, site_shapes
from lowrank_lab.models.arch import ArchSpec, kv_cache_values_per_token, spec_for
from lowrank_lab.models.load import convert, load_model, load_tokenizer
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
        ranks = config.build(cell.cfg.allocation)(shapes, cell.ratio)
        squared_error = 0.0
        if any(rank is not None for rank in ranks.values()):
            widest = max(inp for _, inp in shapes.values())
            statistics = _statistics(cell, record, bench, spec, widest) if cell.statistics_key else None
            spectra = record.artifact(
                "decomposition",
                cell.store.get_or_make(
                    "spectra",
                    cell.spectra_key,
                    lambda folder: make_spectra(folder, bench.model, spec, cell.metric, statistics, device),
                ),
            )
            with record.stage("factorization"):
                storage = config.build(cell.cfg.storage)
                squared_error = compress(bench.model, spec, ranks, spectra.path, storage, device)
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


@dataclass
class Bench:
    """What evaluators work on: the model (compressed by then), its tokenizer, the device and the texts."""

    cell: Cell
    record: Record
    device: torch.device
    evaluator: str = field(default="", init=False)

    @cached_property
    def location(self) -> str:
        """A hub name or a checkpoint folder: GGUF and tiny models are converted first, once."""
        source = self.cell.source
        if source.kind in ("hub", "folder"):
            return source.location
        made = self.cell.store.get_or_make(
            "model", self.cell.model_key, lambda folder: convert(source, folder)
        )
        return str(self.record.artifact("model conversion", made).path)

    @cached_property
    def model_config(self) -> Any:
        return AutoConfig.from_pretrained(self.location, **self._remote)

    @cached_property
    def model(self) -> nn.Module:
        with self.record.stage("model loading"):
            return load_model(self.location, dtype=self.cell.cfg.dtype, **self._remote)

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.location, **self._remote)

    @property
    def _remote(self) -> dict[str, Any]:
        model = self.cell.cfg.model
        return {"revision": self.cell.source.revision, "trust_remote_code": model.trust_remote_code}

    def skeleton(self) -> nn.Module:
        """The model without weights, for shapes: ranks are settled before any weight is read."""
        trust = self.cell.cfg.model.trust_remote_code
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(self.model_config, trust_remote_code=trust)

    def make_text_tokens(self) -> Path:
        """The artifact of the evaluation text's tokens."""
        corpus, part = corpus_part(self.cell.cfg.dataset, "eval")
        special = self.cell.evaluators[self.evaluator].add_special_tokens
        made = self.cell.store.get_or_make(
            "tokens",
            self.cell.text_tokens_key(self.evaluator),
            lambda folder: make_text_tokens(
                folder, self.tokenizer, corpus, part, self.cell.cfg.data_root, special
            ),
        )
        return self.record.artifact("evaluation tokens", made).path

    def text_tokens(self) -> tuple[np.ndarray, dict[str, Any]]:
        """The tokens of the evaluation text, and what the protocol says about them."""
        return load_tokens(self.cell.store.path("tokens", self.cell.text_tokens_key(self.evaluator)))

    def bos_id(self) -> int:
        if self.tokenizer.bos_token_id is None:
            raise SkippedCell(f"{self.cell.source.name} has no BOS token for bos=window; use bos=text")
        return self.tokenizer.bos_token_id


def pick_device(name: str) -> torch.device:
    """``auto`` is the GPU if there is one. Raises UserError for a device that this machine lacks."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device={name} is not valid; use auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"device={name}: this machine has {torch.cuda.device_count()} GPUs; use device=auto or cpu"
        )
    return device


def _check_lengths(cell: Cell, model_config: Any) -> None:
    positions = getattr(model_config, "max_position_embeddings", None)
    lengths = {f"eval.{name}.seqlen": getattr(e, "seqlen", 0) for name, e in cell.evaluators.items()}
    if cell.statistics_key:
        lengths["calibration.seqlen"] = cell.cfg.calibration.seqlen
    for name, length in lengths.items():
        if positions is not None and length > positions:
            raise SkippedCell(
                f"{name}={length} is longer than the {positions} positions of {cell.source.name}"
            )


def _statistics(cell: Cell, record: Record, bench: Bench, spec: ArchSpec, widest: int) -> Path:
    calibration = cell.cfg.calibration
    corpus, part = corpus_part(calibration.dataset, "calibration")
    tokens = cell.store.get_or_make(
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
    ids, facts = load_tokens(record.artifact("calibration tokens", tokens).path)
    warning = None
    if ids.size < 4 * widest:
        warning = (
            f"{ids.size} calibration tokens are fewer than four times the widest input ({widest}): "
            "the second moments are poorly determined; raise calibration.samples"
        )
        log.warning(warning)
    record.data["calibration"] = {"dataset": calibration.dataset.name, **facts, "warning": warning}
    batches = torch.from_numpy(ids).split(calibration.batch_size)
    statistics = cell.store.get_or_make(
        "statistics",
        str(cell.statistics_key),
        lambda folder: make_statistics(folder, bench.model, spec, batches, bench.device),
    )
    return record.artifact("calibration", statistics).path


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
