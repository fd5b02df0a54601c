"""One cell of a grid: its configuration, checked, with its model and data found. No torch."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from omegaconf import DictConfig, OmegaConf

from lowrank_lab.artifacts.store import Store
from lowrank_lab.basics.errors import UserError
from lowrank_lab.basics.redaction import redacted
from lowrank_lab.calibration.corpora import Part
from lowrank_lab.calibration.data import DATA, Data, check_corpus
from lowrank_lab.cells import config, paths, told
from lowrank_lab.cells.compression import Compression
from lowrank_lab.cells.evaluator import Evaluator
from lowrank_lab.cells.keys import Keys
from lowrank_lab.checkpoints.description import Saved, saved_in
from lowrank_lab.models.origin import dtype_of
from lowrank_lab.models.source import ModelSource, block_count, resolve
from lowrank_lab.models.vision_families import ROWS, task_of

LONGEST_NAME = 150  # bytes of a checkpoint's folder: file systems allow 255


@dataclass(frozen=True)
class Cell:
    """A validated configuration with its model and data found.

    ``saved`` describes how the model was compressed, where it is a checkpoint of ``save=true``.
    ``compressions`` change the model in this order, by name; empty for the dense model.
    ``evaluators`` are those that can measure such a model; ``left_out`` has the names of the others.
    ``calibration_data`` is the content hash of the calibration text (None where nothing reads it),
    ``training_data`` that of each other text that a compression reads, ``evaluation_data`` that of the text of each
    evaluator that reads one. ``parts`` has what each evaluator measures separately, with all that it depends on.
    ``words`` are those of the command line that made the cell, by name, and ``apart`` has the names of those that
    tell it from other cells of its grid.
    """

    cfg: DictConfig
    store: Store
    source: ModelSource
    saved: Saved | None
    compressions: dict[str, Compression]
    calibration_data: str | None
    training_data: dict[str, str]
    evaluators: dict[str, Evaluator]
    left_out: tuple[str, ...]
    evaluation_data: dict[str, str | None]
    parts: dict[str, dict[str, Any]]
    words: dict[str, str] = field(default_factory=dict)
    apart: tuple[str, ...] = ()

    @classmethod
    def from_config(cls, cfg: DictConfig) -> Cell:
        """Check the configuration and find its model and data. Raises UserError for what a user can correct.

        Interpolations in ``cfg`` and ~ in its paths are resolved in place, not at every access.
        """
        OmegaConf.resolve(cfg)
        cfg = config.with_chosen_evaluators(config.with_save(cfg))
        compressions, chosen = config.validated(cfg)
        paths.expand(cfg)
        store = Store(cfg.artifacts)
        source = resolve(cfg.model.path, cfg.model.revision, store)
        if cfg.dtype == config.AUTO:  # keys, records and all that compute have a dtype
            cfg.dtype = dtype_of(source)
        saved = _saved(cfg.model.path, source)
        if saved is not None:
            cfg = _for_checkpoint(cfg, saved)
            for name in [name for name, one in compressions.items() if not one.on_checkpoints]:
                compressions.pop(name).switch_off(cfg)
        texts = _texts_of(compressions, cfg)
        task = task_of(source.model_type)
        content = lambda dataset, which: _content(dataset, which, cfg.data_root, store, DATA[task])
        calibrates = any(one.needs_calibration for one in compressions.values())
        kind = kind_of(compressions, saved)
        evaluators = {name: one for name, one in chosen.items() if _measures(one, kind, task)}
        cell = cls(
            cfg,
            store,
            source,
            saved,
            compressions,
            calibration_data=content(cfg.calibration.dataset, "calibration") if calibrates else None,
            training_data={name: content(node.dataset, "calibration") for name, node in texts.items()},
            evaluators=evaluators,
            left_out=tuple(name for name in chosen if name not in evaluators),
            evaluation_data={
                name: content(text_of(cfg, name), "eval") if one.reads_text else None
                for name, one in evaluators.items()
            },
            parts={name: one.parts(cfg, store) for name, one in evaluators.items()},
        )
        if compressions:
            _check_blocks(cell)
        for compression in compressions.values():
            compression.check_cell(cell)
            if compression.online and cfg.save.merge:
                raise UserError(f"save.merge=true: dense weights cannot hold {compression.name}; use save=true")
        if saved is not None and saved.online and cfg.save.merge:
            raise UserError(f"save.merge=true: dense weights cannot hold all that {cfg.model.path} computes")
        return cell

    @cached_property
    def keys(self) -> Keys:
        return Keys(self)

    @property
    def key(self) -> str:
        """Identifies the record."""
        return self.keys.record

    @property
    def kind(self) -> str:
        """What the evaluated model is: ``dense``, ``quantized``, ``compressed``, a ``checkpoint``, …"""
        return kind_of(self.compressions, self.saved)

    @property
    def task(self) -> str:
        """What the model is for: the name of its task (models/tasks/)."""
        return task_of(self.source.model_type)

    @property
    def tower(self) -> str | None:
        """The tower of the model that is compressed (models/families.py); None: its first."""
        row, tower = ROWS.get(self.source.model_type or ""), self.cfg.targets.get("tower")
        return None if row is not None and tower == next(iter(row.towers)) else tower

    @property
    def data(self) -> Data:
        """The kind of data that its task reads."""
        return DATA[self.task]

    @property
    def is_factored(self) -> bool:
        """Whether the model that is evaluated has factors."""
        if self.saved is not None:
            return any(rank is not None for rank in self.saved.ranks.values())
        return any(one.makes_factors for one in self.compressions.values())

    @property
    def ratio(self) -> float:
        """The ratio of the configuration, of a checkpoint its own; 1 where no compression has a ratio."""
        return 1.0 if self._asked_ratio is None else self._asked_ratio

    @property
    def _asked_ratio(self) -> float | None:
        if self.saved is not None:
            return self.saved.ratio
        ratios = (one.ratio(self.cfg) for one in self.compressions.values())
        return next((ratio for ratio in ratios if ratio is not None), None)

    @property
    def texts(self) -> dict[str, DictConfig]:
        """The nodes of the texts that compressions read, by name, without the calibration text."""
        return _texts_of(self.compressions, self.cfg)

    @cached_property
    def site_rules(self) -> tuple[Any, Any, Any]:
        """The settings that determine which linears are compressed together: grouping, targets, storage."""
        for compression in self.compressions.values():
            if compression.site_rules is not None:
                return compression.site_rules
        grouping, targets, storage = (config.build(self.cfg[name]) for name in ("grouping", "targets", "storage"))
        return grouping, targets, storage

    def text_of(self, evaluator: str) -> DictConfig:
        """The data set that an evaluator reads: its own, or that of the cell."""
        return text_of(self.cfg, evaluator)

    @property
    def left_out_message(self) -> str:
        """One line about the evaluators that cannot measure this cell's model."""
        kinds = [one.kind_in_words for one in self.compressions.values()]
        model = kinds[0] if kinds else "the dense model"
        if self.saved is not None:
            model = "a model that is compressed already, whose dense original is not known"
        return f"eval={','.join(self.left_out)} measures nothing on {model} of {self.data.what}"

    @cached_property
    def label(self) -> str:
        """One line for logs, status and tables: "asvd ratio=0.6 INT4 metric.alpha=0.25 SmolLM2 wikitext2"."""
        name = self.cfg.method.name
        has_ratio = self.is_factored and self._asked_ratio is not None
        what = f"{name} ratio={self.ratio:g}" if has_ratio else name
        what += self.method_in_words.removeprefix(redacted(name))
        shown = (*told.told(self), *self.apart)
        words = [redacted(f"{name}={value}") for name, value in self.words.items() if name in shown]
        return " ".join([what, *words, self.source.name, self.cfg.dataset.name])

    @property
    def method_in_words(self) -> str:
        """The method and the other compressions, as a checkpoint names them."""
        names = (one.name for one in self.compressions.values())
        return " ".join([redacted(self.cfg.method.name), *(name for name in names if name)])

    @property
    def wants_checkpoint(self) -> bool:
        return bool(self.cfg.save.checkpoint or self.cfg.save.merge)

    @cached_property
    def save_dtype(self) -> str:
        """The dtype of the weights in checkpoints."""
        return dtype_of(self.source) if self.cfg.save.dtype == config.AUTO else self.cfg.save.dtype

    @property
    def checkpoints(self) -> dict[str, str]:
        """The checkpoints to save, by their names in the record: ``checkpoint`` is compressed,
        ``merged_checkpoint`` the same as dense weights.

        Each is a folder in <results>/checkpoints, whose name says the dtype where it is not that of the
        computation. The dense model has none; a checkpoint can only be merged.
        """
        if not self.wants_checkpoint:
            return {}
        name = self.source.name
        if any(one.makes_factors for one in self.compressions.values()):
            name = f"{self.cfg.method.name}-{self.ratio:g}-{name}"
        for one in self.compressions.values():
            name += f"-{one.name}" if one.name else ""
        short = redacted(name).encode()[:LONGEST_NAME].decode(errors="ignore")
        readable = re.sub(r"[^\w.-]+", "_", f"{short}-{self.keys.compressed[:8]}")
        readable += f"-{self.save_dtype}" if self.save_dtype != self.cfg.dtype else ""
        folders = {}
        if self.cfg.save.checkpoint and self.compressions:
            folders["checkpoint"] = readable
        if self.cfg.save.merge and (self.compressions or self.saved is not None):
            folders["merged_checkpoint"] = f"{readable}-merged"
        return folders


def kind_of(compressions: dict[str, Compression], saved: Saved | None) -> str:
    """See ``Cell.kind``; where several compressions change the model, the kind is that of the first."""
    if saved is not None:
        return "checkpoint"
    return next((one.kind for one in compressions.values()), "dense")


def text_of(cfg: DictConfig, evaluator: str) -> DictConfig:
    """The data set that an evaluator of ``cfg`` reads: its own, or that of the cell."""
    return cfg.eval[evaluator].get("dataset") or cfg.dataset


def corpus_part(dataset: DictConfig, which: str) -> tuple[Any, Part]:
    """The corpus of a dataset config and its ``eval`` or ``calibration`` part."""
    return config.build(dataset.corpus), Part(**config.plain(dataset[which]))


def _texts_of(compressions: dict[str, Compression], cfg: DictConfig) -> dict[str, DictConfig]:
    return {name: node for one in compressions.values() for name, node in one.texts(cfg).items()}


def _check_blocks(cell: Cell) -> None:
    """Raises UserError where the cell's targets name a block that its model does not have, as far as is known."""
    if cell.cfg.targets.get("blocks") and (count := block_count(cell.source, cell.tower)) is not None:
        cell.site_rules[1].blocks_of(count)


def _saved(path: str, source: ModelSource) -> Saved | None:
    """How the model was compressed by lowrank_lab, if it was. Raises UserError where that cannot be read."""
    try:
        return None if source.settings is None else saved_in(source.settings)
    except UserError as error:
        raise UserError(f"model.path={path}: {error}") from None


def _for_checkpoint(cfg: DictConfig, saved: Saved) -> DictConfig:
    """The configuration of a compressed checkpoint, with the method and the ratio that it had."""
    cfg = cfg.copy()
    cfg.method.name, cfg.ratio = saved.method, saved.ratio
    return cfg


def _measures(evaluator: Evaluator, kind: str, task: str) -> bool:
    """Whether an evaluator measures models of a kind (``Cell.kind``) and a task."""
    return (evaluator.models is None or kind in evaluator.models) and task in evaluator.model_tasks


def _content(dataset: DictConfig, which: str, data_root: str | None, store: Store, data: Data) -> str:
    corpus, part = config.build_checked("corpus", dataset.corpus), Part(**config.plain(dataset[which]))
    config.has("corpus", corpus, "content")
    check_corpus(dataset.name, corpus, data)
    return corpus.content(part.split, data_root, store)
