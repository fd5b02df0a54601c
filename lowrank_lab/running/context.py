"""What a cell works on: the model, its sites, texts and statistics, each loaded or computed at its first use."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from lowrank_lab.artifacts.store import fingerprint
from lowrank_lab.basics.errors import SkippedCell, UserError
from lowrank_lab.calibration.gradients import make_gradients
from lowrank_lab.calibration.image_corpora import LabelledImages
from lowrank_lab.calibration.image_texts import questions_of
from lowrank_lab.calibration.images import images_of
from lowrank_lab.calibration.question_corpora import Questions
from lowrank_lab.calibration.statistics import make_means, make_statistics
from lowrank_lab.calibration.tokens import check_in_vocabulary, load_tokens, make_text_tokens
from lowrank_lab.cells import versions
from lowrank_lab.cells.cell import Cell, corpus_part
from lowrank_lab.cells.targets import sites_of
from lowrank_lab.checkpoints import checkpoint
from lowrank_lab.models.changes import Snapshot
from lowrank_lab.models.discovery import family_of
from lowrank_lab.models.families import Family, Tower, heads_of
from lowrank_lab.models.load import convert, load_config
from lowrank_lab.models.tasks.base import Batch, Task
from lowrank_lab.models.tasks.named import task_named
from lowrank_lab.models.vision_families import row_of
from lowrank_lab.models.walk import chosen, in_parts, walk
from lowrank_lab.modules.linears import linear_shapes
from lowrank_lab.modules.site import Site
from lowrank_lab.process import progress
from lowrank_lab.records.results import Record

log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass
class Context:
    """``model`` is dense until it is compressed in place; evaluators find the compressed one.

    Compressions and evaluators get a context, and read from it what they need. The running compression adds to
    ``facts`` what the record should say of it, as plain data. ``cached`` keeps what several of its parts use.
    """

    cell: Cell
    record: Record
    device: torch.device
    evaluator: str = field(default="", init=False)
    facts: dict[str, Any] = field(default_factory=dict, init=False)
    _snapshot: Snapshot | None = field(default=None, init=False)
    _cache: dict[str, Any] = field(default_factory=dict, init=False)

    def cached(self, name: str, make: Callable[[], T]) -> T:
        """The result of ``make()``, which is called at the first use of ``name`` in this cell."""
        if name not in self._cache:
            self._cache[name] = make()
        return self._cache[name]

    @cached_property
    def location(self) -> str:
        """A hub name or a checkpoint folder: GGUF, ONNX and tiny models are converted first, once."""
        source = self.cell.source
        if source.kind in ("hub", "folder"):
            return source.location
        make = lambda folder: convert(source, folder)
        return str(self.cached_artifact("model conversion", "model", self.cell.keys.model, make))

    @cached_property
    def model_config(self) -> Any:
        return load_config(self.location, **self._remote)

    @cached_property
    def model(self) -> nn.Module:
        log.info("loading %s", self.cell.source.name)
        with self.record.stage("model loading"):
            model = self.task.load(self.location, dtype=self.cell.cfg.dtype, **self._remote)
        self._snapshot = Snapshot(model)
        return model

    def model_was_changed(self) -> None:
        """Note that ``model`` is no longer the dense one, whatever its snapshot says."""
        self._snapshot = None

    @contextmanager
    def dense(self, dtype: str) -> Iterator[nn.Module]:
        """The dense model in ``dtype``, for artifacts: ``model`` itself while nothing has changed it.

        The caller may move it to another device, but must not change what it computes.
        """
        loaded = "model" in self.__dict__
        changed = loaded and (self._snapshot is None or self._snapshot.changed(self.model))
        if dtype == self.cell.cfg.dtype and not changed:
            model = self.model
            yield model
            self._snapshot = Snapshot(model)  # as it may be on another device now
        else:
            yield self.task.load(self.location, dtype=dtype, **self._remote)

    def dense_model(self) -> nn.Module:
        """A separate dense model in the cell's dtype, whether or not ``model`` has been changed.

        For a compressed checkpoint it is the model with the products of its factors.
        """
        loaded = self.task.load(self.location, dtype=self.cell.cfg.dtype, **self._remote)
        saved = self.cell.saved
        return loaded if saved is None else checkpoint.merge(loaded, saved)

    def take_model(self) -> nn.Module:
        """The dense model for the caller to change; ``model`` is loaded again at its next use."""
        model = self.model
        del self.__dict__["model"]
        self._snapshot = None
        return model

    @property
    def ratio(self) -> float:
        return self.cell.ratio

    @cached_property
    def family(self) -> Family:
        """Raises UserError for a model without blocks whose linears can be compressed."""
        if (row := row_of(self.model_config)) is not None:
            return row.of_tower(self.cell.tower)
        family = family_of(self.skeleton())
        tower = family.tower
        self.record.data["discovered"] = {
            "blocks": tower.blocks,
            "inputs": [list(group) for group in tower.inputs],
            "stays_dense": list(tower.stays_dense),
        }
        return family

    @property
    def tower(self) -> Tower:
        return self.family.tower

    @property
    def task(self) -> Task:
        return task_named(self.cell.task, self.cell.tower)

    @cached_property
    def sites(self) -> dict[str, Site]:
        """The sites to factor, by full name, in the order of the model. Raises UserError where there are none."""
        if self.cell.saved is not None:
            return self.cell.saved.sites
        heads = heads_of(self.family, self.model_config)
        return sites_of_cell(self.cell, self.tower, linear_shapes(self.skeleton(), self.tower), heads)

    @cached_property
    def calibration(self) -> Batch:
        """All calibration samples as one batch; warns where they are few for the widest input."""
        calibration = self.cell.cfg.calibration
        stage = f"calibration {self.cell.data.artifact}"
        batch, facts = self._samples(stage, calibration, self.cell.keys.calibration_tokens)
        positions = self.task.positions(self.skeleton, self.tower.blocks, batch)
        widest = max(inp for site in self.sites.values() for _, inp in site.shapes.values())
        warning = None
        if positions < 4 * widest:
            warning = (
                f"{positions} calibration tokens are fewer than four times the widest input ({widest}): "
                "the second moments are poorly determined; raise calibration.samples"
            )
            log.warning(warning)
        self.record.data["calibration"] = {"dataset": calibration.dataset.name, **facts, "warning": warning}
        return batch

    @property
    def calibration_ids(self) -> torch.Tensor:
        """The calibration tokens (samples, seqlen) of a language model."""
        return self.calibration["input_ids"]

    @cached_property
    def calibration_positions(self) -> int:
        """How many hidden states the calibration samples have in a block: tokens, patches."""
        return self.task.positions(self.skeleton, self.tower.blocks, self.calibration)

    def text(self, name: str) -> Batch:
        """All samples of the text that a compression calls ``name`` (``Compression.texts``), as one batch."""
        node, key, stage = self.cell.texts[name], self.cell.keys.text_windows(name), self.cell.data.artifact
        batch, facts = self.cached(f"text {name}", lambda: self._samples(f"training {stage}", node, key))
        self.record.data["training"] = {"dataset": node.dataset.name, **facts}
        return batch

    def _samples(self, stage: str, sampling: Any, key: str) -> tuple[Batch, dict[str, Any]]:
        """Samples of the calibration part of ``sampling.dataset``, and the facts about them."""
        corpus, part = corpus_part(sampling.dataset, "calibration")
        data, root = self.cell.data, self.cell.cfg.data_root
        make = lambda folder: data.make_samples(folder, self.processor, corpus, part, root, sampling, self.bos_id)
        return data.load_samples(self.cached_artifact(stage, data.artifact, key, make), self.model_config)

    def calibration_batches(self, samples: int | None = None) -> list[Batch]:
        """The calibration samples, or the first ``samples`` of them, in batches."""
        return in_parts(chosen(self.calibration, slice(samples)), self.cell.cfg.calibration.batch_size)

    @property
    def offload(self) -> Path | None:
        """The folder for hidden states of the calibration text; None where they stay in memory."""
        return self.cell.store.root if self.cell.cfg.calibration.offload else None

    def walk(
        self, model: nn.Module, samples: int | None = None, hidden: list[torch.Tensor] | None = None
    ) -> Iterator[tuple[int, nn.Module, Callable[..., None]]]:
        """``model`` block by block over the calibration text, or its first ``samples`` (models/walk.py)."""
        batches = self.calibration_batches(samples)
        return walk(model, self.tower, batches, self.device, hidden, self.offload, self.task)

    @cached_property
    def statistics(self) -> Path:
        """The artifact of the input statistics of the dense model."""
        batches, offload = self.calibration_batches(), self.offload

        def make(folder: Path) -> None:
            with self.dense(self.cell.cfg.dtype) as model:
                make_statistics(folder, model, self.tower, batches, self.device, offload, self.task)

        return self.cached_artifact("calibration", "statistics", self.cell.keys.statistics, make)

    @cached_property
    def input_means(self) -> Path:
        """The artifact of the mean inputs of the dense model."""
        batches, offload = self.calibration_batches(), self.offload

        def make(folder: Path) -> None:
            with self.dense(self.cell.cfg.dtype) as model:
                make_means(folder, model, self.tower, batches, self.device, offload, self.task)

        return self.cached_artifact("calibration means", "means", self.cell.keys.input_means, make)

    def gradients(self, outer: bool) -> Path:
        """The artifact of the output gradients' statistics of the dense model, with or without the mean of g gᵀ."""
        key, make = self.cell.keys.gradients(outer), self._make_gradients(outer, weight=False)
        return self.cached(f"gradients {outer}", lambda: self.cached_artifact("gradients", "gradients", key, make))

    @cached_property
    def weight_fisher(self) -> Path:
        """The artifact of the mean (dL/dW)² of every compressible linear, as large as the model."""
        make = self._make_gradients(outer=False, weight=True)
        return self.cached_artifact("weight gradients", "gradients", self.cell.keys.weight_fisher, make)

    def _make_gradients(self, outer: bool, weight: bool) -> Callable[[Path], None]:
        sequences = in_parts(self.calibration, 1)

        def make(folder: Path) -> None:
            with self.dense("float32") as model:
                make_gradients(folder, model, self.tower, sequences, self.device, outer, weight, self.task)

        return make

    def artifact(
        self, stage: str, kind: str, parts: Mapping[str, Any], make: Callable[[Path], None], resumable: bool = False
    ) -> Path:
        """An artifact of an allocation or refinement. ``parts`` is all that its numbers depend on, for its key.

        With ``resumable`` the folder keeps what ``make`` wrote before it was stopped; the next ``make`` continues.
        """
        key = fingerprint({**parts, "version": versions.COMPRESSION})
        return self.cached_artifact(stage, kind, key, make, resumable)

    def cached_artifact(
        self, stage: str, kind: str, key: str, make: Callable[[Path], None], resumable: bool = False
    ) -> Path:
        """The folder of an artifact, which is computed if it does not exist; the record lists it as ``stage``."""
        with progress.doing(stage):
            made = self.cell.store.get_or_make(kind, key, make, resumable)
        return self.record.artifact(stage, made).path

    @cached_property
    def processor(self) -> Any:
        """What makes the model's inputs: its tokenizer or its image processor."""
        return self.task.processor(self.location, **self._remote)

    @property
    def tokenizer(self) -> Any:
        """The processor of a language model."""
        return self.processor

    @property
    def _remote(self) -> dict[str, Any]:
        model = self.cell.cfg.model
        return {"revision": self.cell.source.revision, "trust_remote_code": model.trust_remote_code}

    def skeleton(self) -> nn.Module:
        """The model without weights, for shapes: ranks are chosen before any weight is read."""
        return self.task.skeleton(self.model_config, self.cell.cfg.model.trust_remote_code)

    def make_text_tokens(self) -> Path:
        """The artifact of the evaluation text's tokens. Raises UserError for those that the model does not have."""
        corpus, part = corpus_part(self.cell.text_of(self.evaluator), "eval")
        special = self.cell.evaluators[self.evaluator].add_special_tokens
        artifact = self.cached_artifact(
            "evaluation tokens",
            "tokens",
            self.cell.keys.text_tokens(self.evaluator),
            lambda folder: make_text_tokens(folder, self.tokenizer, corpus, part, self.cell.cfg.data_root, special),
        )
        ids, _ = load_tokens(artifact)
        if ids.size:
            check_in_vocabulary(int(ids.max()), self.model_config)
        return artifact

    def evaluation_images(self) -> LabelledImages:
        """The images that the evaluator reads."""
        return images_of(*corpus_part(self.cell.text_of(self.evaluator), "eval"), self.cell.cfg.data_root)

    def evaluation_questions(self) -> Questions:
        """The questions that the evaluator asks."""
        return questions_of(*corpus_part(self.cell.text_of(self.evaluator), "eval"), self.cell.cfg.data_root)

    def text_tokens(self) -> tuple[np.ndarray, dict[str, Any]]:
        """The tokens of the evaluation text, and what the protocol says about them."""
        return load_tokens(self.cell.store.path("tokens", self.cell.keys.text_tokens(self.evaluator)))

    def bos_id(self) -> int:
        if self.tokenizer.bos_token_id is None:
            raise SkippedCell(f"{self.cell.source.name} has no BOS token for bos=window; use bos=text")
        return self.tokenizer.bos_token_id


def sites_of_cell(
    cell: Cell, tower: Tower, shapes: list[dict[str, tuple[int, int]]], heads: int | None
) -> dict[str, Site]:
    """The sites that a cell chooses among linears of ``shapes``, of attentions with so many ``heads``.

    Raises UserError where there are none.
    """
    if found := sites_of(tower, shapes, *cell.site_rules, heads):
        return found
    raise UserError(f"model {cell.source.name} has no compressible layer")


def pick_device(name: str) -> torch.device:
    """``auto`` is the GPU if there is one. Raises UserError for a device that this machine does not have."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device={name}: this machine has {torch.cuda.device_count()} GPUs; use device=auto or cpu")
    return device
