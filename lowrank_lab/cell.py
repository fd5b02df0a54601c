"""One cell of a grid, as far as it is known without torch: what it needs, and the keys of all it will make.

Each key hashes what changes the artifact's numbers (content of model and data, protocol, component versions,
dtype, seed) and nothing else: no path, no device, no tracker. Where a setting has no influence (calibration
on plain SVD, ratio on the dense model) it is left out, so that equal cells are recognised as equal.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from omegaconf import DictConfig

from lowrank_lab import config, versions
from lowrank_lab.calibration.corpora import Corpus, Part
from lowrank_lab.models.arch import spec_for
from lowrank_lab.models.source import ModelSource, resolve
from lowrank_lab.store import Store, fingerprint


@dataclass(frozen=True)
class Cell:
    """A validated configuration with its model and data found.

    ``metric`` is None for the dense model. ``calibration_data`` is the content hash of the calibration text (None
    where the metric needs none), ``evaluation_data`` that of the text of each evaluator that reads one.
    """

    cfg: DictConfig
    store: Store
    source: ModelSource
    metric: Any
    calibration_data: str | None
    evaluators: dict[str, Any]
    evaluation_data: dict[str, str | None]

    @classmethod
    def from_config(cls, cfg: DictConfig) -> Cell:
        """Check the configuration and find its model and data. Raises UserError for what a user can mend."""
        config.validate(cfg)
        store = Store(cfg.artifacts)
        source = resolve(cfg.model.path, cfg.model.revision, store)
        metric = None
        calibration_data = None
        if cfg.allocation is not None:
            if source.model_type is not None:
                spec_for(source.model_type)
            metric = config.build(cfg.metric)
            if metric.needs_inputs or metric.needs_gradients:
                calibration_data = _content(cfg.calibration.dataset, "calibration", cfg.data_root, store)
        evaluators = {name: config.build(node) for name, node in cfg.eval.items()}
        evaluation_data = {
            name: _content(cfg.dataset, "eval", cfg.data_root, store) if evaluator.reads_text else None
            for name, evaluator in evaluators.items()
        }
        return cls(cfg, store, source, metric, calibration_data, evaluators, evaluation_data)

    @property
    def compresses(self) -> bool:
        return self.metric is not None

    @property
    def ratio(self) -> float:
        """The ratio asked for; the dense model has 1 whatever was asked."""
        return float(self.cfg.ratio) if self.compresses else 1.0

    @property
    def label(self) -> str:
        what = f"{self.cfg.method.name} ratio={self.ratio:g}" if self.compresses else self.cfg.method.name
        return f"{what} {self.source.name} {self.cfg.dataset.name}"

    @cached_property
    def key(self) -> str:
        """Identifies the record: what was measured on which model, and the name it is reported under.

        The artifacts know no names: a method composed by hand reuses all of the one it equals.
        """
        return fingerprint(
            {
                "names": [self.cfg.method.name, self.cfg.dataset.name],
                "model": self.compressed_key,
                "metrics": {name: self.metric_key(name) for name in self.evaluators},
                "version": versions.RECORD,
            }
        )

    @property
    def model_key(self) -> str:
        """Identifies a model and its tokenizer, and the converted checkpoint of a GGUF or tiny model."""
        remote_code = bool(self.cfg.model.trust_remote_code)
        content = {"model": self.source.content, "remote_code": remote_code}
        return fingerprint({**content, "version": versions.MODEL})

    @property
    def _weights(self) -> dict[str, Any]:
        return {"model": self.model_key, "dtype": self.cfg.dtype}

    @property
    def calibration_tokens_key(self) -> str:
        return fingerprint(
            {
                "tokenizer": self.model_key,
                "data": self.calibration_data,
                "part": config.for_key(self.cfg.calibration.dataset.calibration),
                "sampling": config.for_key(self.cfg.calibration, without=("dataset", "batch_size")),
                "version": versions.TOKENS,
            }
        )

    @property
    def statistics_key(self) -> str | None:
        """Identifies the input statistics; None where the metric needs none."""
        if not (self.compresses and self.metric.needs_inputs):
            return None
        return fingerprint({**self._weights, "tokens": self.calibration_tokens_key, "version": versions.STATISTICS})

    @property
    def gradients_key(self) -> str | None:
        """Identifies the output gradients' statistics (always in float32); None where the metric needs none."""
        if not (self.compresses and self.metric.needs_gradients):
            return None
        return fingerprint(
            {
                "model": self.model_key,
                "tokens": self.calibration_tokens_key,
                "outer": self.metric.needs_outer,
                "version": versions.GRADIENTS,
            }
        )

    @property
    def spectra_key(self) -> str:
        return fingerprint(
            {
                **self._weights,
                "metric": config.for_key(self.cfg.metric),
                "statistics": self.statistics_key,
                "gradients": self.gradients_key,
                "version": versions.SPECTRA,
            }
        )

    @cached_property
    def compressed_key(self) -> str:
        """Identifies the weights that are evaluated."""
        if not self.compresses:
            return fingerprint(self._weights)
        return fingerprint(
            {
                "spectra": self.spectra_key,
                "allocation": config.for_key(self.cfg.allocation),
                "storage": config.for_key(self.cfg.storage),
                "ratio": self.ratio,
                "version": versions.COMPRESSION,
            }
        )

    def text_tokens_key(self, evaluator: str) -> str:
        """Identifies the tokens of the evaluation text."""
        return fingerprint(
            {
                "tokenizer": self.model_key,
                "data": self.evaluation_data[evaluator],
                "part": config.for_key(self.cfg.dataset.eval),
                "special": self.evaluators[evaluator].add_special_tokens,
                "version": versions.TOKENS,
            }
        )

    def metric_key(self, evaluator: str) -> str:
        """Identifies one measured number."""
        reads_text = self.evaluators[evaluator].reads_text
        return fingerprint(
            {
                "model": self.compressed_key,
                "evaluator": config.for_key(self.cfg.eval[evaluator], without=("batch_size",)),
                "tokens": self.text_tokens_key(evaluator) if reads_text else None,
                "version": self.evaluators[evaluator].version,
            }
        )


def corpus_part(dataset: DictConfig, which: str) -> tuple[Corpus, Part]:
    """The corpus of a dataset config and its ``eval`` or ``calibration`` part."""
    return config.build(dataset.corpus), Part(**config.plain(dataset[which]))


def _content(dataset: DictConfig, which: str, data_root: str | None, store: Store) -> str:
    corpus, part = corpus_part(dataset, which)
    return corpus.content(part.split, data_root, store)
