"""One cell of a grid, as far as it is known without torch: what it needs, found and checked."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

from lowrank_lab.artifacts.store import Store
from lowrank_lab.calibration.corpora import Corpus, Part
from lowrank_lab.cells import config
from lowrank_lab.cells.keys import Keys, text_of
from lowrank_lab.checkpoints.description import Saved
from lowrank_lab.errors import UserError
from lowrank_lab.models.source import resolve
from lowrank_lab.redaction import redacted

KINDS = {
    "dense": "the dense model",
    "quantized": "a dense model in few bits",
    "compressed": "a compressed model",
    "checkpoint": "a model that is compressed already, whose dense original is not known",
}
LONGEST_NAME = 150  # bytes of a checkpoint's folder: file systems allow 255


@dataclass(frozen=True)
class Cell(Keys):
    """A validated configuration with its model and data found, and by ``Keys`` the keys of what it makes."""

    @classmethod
    def from_config(cls, cfg: DictConfig) -> Cell:
        """Check the configuration and find its model and data. Raises UserError for what a user can mend.

        Interpolations in ``cfg`` are resolved in place: else each is parsed again whenever it is read.
        """
        OmegaConf.resolve(cfg)
        cfg = config.with_asked_evaluators(config.with_save(cfg))
        built = config.validated(cfg)
        store = Store(cfg.artifacts)
        source = resolve(cfg.model.path, cfg.model.revision, store)
        if source.saved is not None:
            cfg = _evaluation_only(cfg, source.saved)
        metric = allocation = refinement = calibration_data = training_data = None
        if cfg.allocation is not None:
            metric, allocation, refinement = (built[name] for name in ("metric", "allocation", "refinement"))
            if refinement is not None and "dataset" in cfg.refinement:
                training_data = _content(cfg.refinement.dataset, "calibration", cfg.data_root, store)
        quantization = built["quantization"]
        if quantization is not None and source.saved is not None and source.saved.is_quantized:
            raise UserError(f"model.path={cfg.model.path} is quantized already; use quantization=none")
        if quantization is not None:
            quantization.check_installed()
        if quantization is not None and quantization.online and cfg.save.merge:
            raise UserError(f"save.merge=true: dense weights cannot hold {quantization.name}; use save=true")
        if source.saved is not None and source.saved.online and cfg.save.merge:
            raise UserError(f"save.merge=true: {cfg.model.path} does more than dense weights can hold")
        if _calibrates(metric, allocation, refinement, quantization):
            calibration_data = _content(cfg.calibration.dataset, "calibration", cfg.data_root, store)
        kind = "compressed" if cfg.allocation is not None else "dense" if quantization is None else "quantized"
        kind = "checkpoint" if source.saved is not None else kind
        asked = {name: built[f"eval.{name}"] for name in cfg.eval}
        evaluators = {name: evaluator for name, evaluator in asked.items() if kind in evaluator.models}
        evaluation_data = {
            name: _content(text_of(cfg, name), "eval", cfg.data_root, store) if evaluator.reads_text else None
            for name, evaluator in evaluators.items()
        }
        parts = {name: evaluator.parts(cfg, store) for name, evaluator in evaluators.items()}
        return cls(
            cfg,
            store,
            source,
            kind,
            metric,
            allocation,
            refinement,
            quantization,
            calibration_data,
            evaluators,
            tuple(name for name in asked if name not in evaluators),
            evaluation_data,
            training_data,
            parts,
        )

    @property
    def why_left_out(self) -> str:
        """One line about the evaluators that measure nothing on this cell's model."""
        return f"eval={','.join(self.left_out)} measures nothing on {KINDS[self.kind]}"

    @property
    def label(self) -> str:
        name = self.cfg.method.name
        what = f"{name} ratio={self.ratio:g}" if self.compressed else name
        what += self.described.removeprefix(redacted(name))
        return f"{what} {self.source.name} {self.cfg.dataset.name}"

    @property
    def described(self) -> str:
        """The method and the quantization, as a checkpoint tells them."""
        name = redacted(self.cfg.method.name)
        return name if self.quantization is None else f"{name} {self.quantization.name}"

    @property
    def asks_for_checkpoint(self) -> bool:
        return bool(self.cfg.save.checkpoint or self.cfg.save.merge)

    @property
    def checkpoints(self) -> dict[str, str]:
        """The checkpoints asked for, by their names in the record: ``checkpoint`` is compressed,
        ``merged_checkpoint`` the same as dense weights.

        Each is a folder in <results>/checkpoints. The dense model has none; a checkpoint can only be merged.
        """
        name = self.source.name
        if self.compresses:
            name = f"{self.cfg.method.name}-{self.ratio:g}-{name}"
        if self.quantization is not None:
            name += f"-{self.quantization.name}"
        short = redacted(name).encode()[:LONGEST_NAME].decode(errors="ignore")
        readable = re.sub(r"[^\w.-]+", "_", f"{short}-{self.compressed_key[:8]}")
        asked = {}
        changed = self.compresses or self.quantization is not None
        if self.cfg.save.checkpoint and changed:
            asked["checkpoint"] = readable
        if self.cfg.save.merge and (changed or self.compressed):
            asked["merged_checkpoint"] = f"{readable}-merged"
        return asked


def _evaluation_only(cfg: DictConfig, saved: Saved) -> DictConfig:
    """The configuration of a compressed checkpoint: nothing is compressed, and what was is reported."""
    cfg = cfg.copy()
    cfg.method.name, cfg.ratio = saved.method, saved.ratio
    cfg.allocation = cfg.refinement = None
    return cfg


def corpus_part(dataset: DictConfig, which: str) -> tuple[Corpus, Part]:
    """The corpus of a dataset config and its ``eval`` or ``calibration`` part."""
    return config.build(dataset.corpus), Part(**config.plain(dataset[which]))


def _content(dataset: DictConfig, which: str, data_root: str | None, store: Store) -> str:
    corpus, part = corpus_part(dataset, which)
    return corpus.content(part.split, data_root, store)


def _calibrates(metric: Any, *answers: Any) -> bool:
    """Whether any answer that there is reads the calibration text."""
    of_metric = metric is not None and (metric.needs_inputs or metric.needs_gradients)
    return of_metric or any(answer is not None and answer.needs_calibration for answer in answers)
