"""The keys of a cell's results: artifacts of the dense model and of texts, the compressed weights, the record.

Each key hashes what changes the artifact's numbers (content of model and data, protocol, component versions,
dtype, seed) and nothing else: no path, no device, no tracker. Where a setting has no influence (calibration
on plain SVD, ratio on the dense model) it is left out, so that equal cells have equal keys. A compression defines
the keys of its intermediate results itself (lowrank/keys.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from omegaconf import DictConfig

from lowrank_lab.artifacts.store import fingerprint
from lowrank_lab.cells import config, versions


@dataclass(frozen=True)
class Keys:
    """The keys of ``cell``, a cells.cell.Cell."""

    cell: Any

    @cached_property
    def record(self) -> str:
        """Identifies the record: the measurements, the model, and the names in reports.

        Keys of artifacts contain no names: a method composed by hand reuses all artifacts of an equal named one.
        """
        cell = self.cell
        texts = {cell.text_of(name).name for name, evaluator in cell.evaluators.items() if evaluator.reads_text}
        return fingerprint(
            {
                "names": [cell.cfg.method.name, *sorted(texts)],
                "model": self.compressed,
                "metrics": {name: self.metrics(name) for name in cell.evaluators},
                "combined": {name: evaluator.combination() for name, evaluator in cell.evaluators.items()},
                "version": versions.RECORD,
            }
        )

    @cached_property
    def model(self) -> str:
        """Identifies a model and its tokenizer, and the converted checkpoint of a GGUF, ONNX or tiny model."""
        remote_code = bool(self.cell.cfg.model.trust_remote_code)
        content: dict[str, Any] = {"model": self.cell.source.content, "remote_code": remote_code}
        if self.cell.source.kind in ("gguf", "onnx"):
            content[self.cell.source.kind] = versions.current()[self.cell.source.kind.upper()]
        return fingerprint({**content, "version": versions.MODEL})

    @property
    def dense_weights(self) -> dict[str, Any]:
        """What the weights of the dense model depend on."""
        return {"model": self.model, "dtype": self.cell.cfg.dtype}

    @property
    def dense(self) -> str:
        """Identifies the weights of the dense model."""
        return fingerprint(self.dense_weights)

    @property
    def calibration_tokens(self) -> str:
        return self._windows(self.cell.cfg.calibration, self.cell.calibration_data)

    def text_windows(self, name: str) -> str:
        """Identifies the windows of the text that a compression reads under ``name`` (``Compression.texts``)."""
        return self._windows(self.cell.texts[name], self.cell.training_data[name])

    def _windows(self, sampling: DictConfig, data: str | None) -> str:
        return fingerprint(
            {
                self.cell.data.reader: self.model,
                "data": data,
                "part": config.for_key(sampling.dataset.calibration),
                "sampling": {name: config.for_key(sampling[name]) for name in self.cell.data.sampling},
                "version": versions.current()[self.cell.data.component],
            }
        )

    @property
    def statistics(self) -> str:
        """Identifies the statistics of the inputs of all linears of the dense model."""
        tokens = self.calibration_tokens
        what = {**self.dense_weights, "tokens": tokens, **self._tower}
        return fingerprint({**what, "version": versions.STATISTICS})

    @property
    def input_means(self) -> str:
        """Identifies the mean inputs of all linears of the dense model."""
        return fingerprint({"statistics": self.statistics, "mean": True})

    def gradients(self, outer: bool) -> str:
        """Identifies the statistics of the output gradients (in float32), with the mean of g gᵀ if ``outer``."""
        content = {"model": self.model, "tokens": self.calibration_tokens, "outer": outer, **self._tower}
        return fingerprint({**content, "version": versions.GRADIENTS})

    @property
    def weight_fisher(self) -> str:
        """Identifies the mean (dL/dW)² of every compressible linear (always in float32)."""
        content = {"model": self.model, "tokens": self.calibration_tokens, "weight": True, **self._tower}
        return fingerprint({**content, "version": versions.GRADIENTS})

    @property
    def targets_for_key(self) -> Any:
        """The linears to compress, as plain data: their role; blocks that are not all; a tower not the first."""
        targets = self.cell.cfg.targets
        linears = [targets.linears, config.plain(targets.blocks)] if targets.get("blocks") else targets.linears
        return {"linears": linears, **self._tower} if self._tower else linears

    @property
    def _tower(self) -> dict[str, str]:
        """The tower whose statistics are wanted, where it is not the model's first."""
        return {} if self.cell.tower is None else {"tower": self.cell.tower}

    @cached_property
    def compressed(self) -> str:
        """Identifies the weights that are evaluated."""
        key = self.dense
        for compression in self.cell.compressions.values():
            key = compression.key(self.cell, key)
        return key

    def weights_before(self, compression: str) -> str:
        """Identifies the weights before this compression."""
        key = self.dense
        for name, other in self.cell.compressions.items():
            if name == compression:
                break
            key = other.key(self.cell, key)
        return key

    def text_tokens(self, evaluator: str) -> str:
        """Identifies the tokens of the evaluation text."""
        return fingerprint(
            {
                self.cell.data.reader: self.model,
                "data": self.cell.evaluation_data[evaluator],
                "part": config.for_key(self.cell.text_of(evaluator).eval),
                "special": self.cell.evaluators[evaluator].add_special_tokens,
                "version": versions.current()[self.cell.data.component],
            }
        )

    def metrics(self, name: str) -> dict[str, str]:
        """Identify what an evaluator measures, by part."""
        evaluator = self.cell.evaluators[name]
        shared = {
            "model": self.compressed,
            "evaluator": evaluator.settings(self.cell.cfg.eval[name]),
            "tokens": self.text_tokens(name) if evaluator.reads_text else None,
            "version": evaluator.version,
        }
        parts = self.cell.parts[name]
        return {part: fingerprint({**shared, "part": depends}) for part, depends in parts.items()}
