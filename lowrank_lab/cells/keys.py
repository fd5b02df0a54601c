"""The keys of all that a cell makes: artifacts, checkpoints and its record.

Each key hashes what changes the artifact's numbers (content of model and data, protocol, component versions,
dtype, seed) and nothing else: no path, no device, no tracker. Where a setting has no influence (calibration
on plain SVD, ratio on the dense model) it is left out, so that equal cells are recognised as equal.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from omegaconf import DictConfig

from lowrank_lab.artifacts.store import Store, fingerprint
from lowrank_lab.cells import config, versions
from lowrank_lab.evaluation.base import Evaluator
from lowrank_lab.models.source import ModelSource


@dataclass(frozen=True)
class Keys:
    """What a cell is and needs.

    ``metric``, ``allocation`` and ``refinement`` are None for the dense model, and for a checkpoint that is
    compressed already, whatever was asked for; the last also for no refinement.
    ``kind`` is what the evaluated model is: ``dense``, the dense one ``quantized``, ``compressed`` here, or a
    compressed ``checkpoint``.
    ``evaluators`` are those that measure something on that kind; ``left_out`` are the names of the others.
    ``calibration_data`` is the content hash of the calibration text (None where nothing reads it),
    ``evaluation_data`` that of the text of each evaluator that reads one, ``training_data`` that of the text that
    the refinement trains on (None where it has no data set of its own). ``parts`` is what each evaluator measures
    separately, with what that depends on.
    """

    cfg: DictConfig
    store: Store
    source: ModelSource
    kind: str
    metric: Any
    allocation: Any
    refinement: Any
    quantization: Any
    calibration_data: str | None
    evaluators: dict[str, Evaluator]
    left_out: tuple[str, ...]
    evaluation_data: dict[str, str | None]
    training_data: str | None
    parts: dict[str, dict[str, Any]]

    @property
    def compresses(self) -> bool:
        return self.metric is not None

    @property
    def compressed(self) -> bool:
        """Whether the model that is evaluated is a compressed one."""
        return self.compresses or self.source.saved is not None

    @property
    def ratio(self) -> float:
        """The ratio asked for; the dense model has 1 whatever was asked, a checkpoint what was asked of it."""
        return float(self.cfg.ratio) if self.compressed else 1.0

    @cached_property
    def key(self) -> str:
        """Identifies the record: what was measured on which model, and the name it is reported under.

        The artifacts know no names: a method composed by hand reuses all of the one it equals.
        """
        texts = {self.text_of(name).name for name, evaluator in self.evaluators.items() if evaluator.reads_text}
        return fingerprint(
            {
                "names": [self.cfg.method.name, *sorted(texts)],
                "model": self.compressed_key,
                "metrics": {name: self.metric_keys(name) for name in self.evaluators},
                "combined": {name: evaluator.combination() for name, evaluator in self.evaluators.items()},
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
        return self._windows_key(self.cfg.calibration, self.calibration_data)

    @property
    def training_tokens_key(self) -> str | None:
        """Identifies the windows that the refinement trains on; None where it has no data set of its own."""
        return self._windows_key(self.cfg.refinement, self.training_data) if self.training_data else None

    def _windows_key(self, sampling: DictConfig, data: str | None) -> str:
        return fingerprint(
            {
                "tokenizer": self.model_key,
                "data": data,
                "part": config.for_key(sampling.dataset.calibration),
                "sampling": {name: config.for_key(sampling[name]) for name in config.SAMPLING},
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
    def needs_weight_fisher(self) -> bool:
        """Whether the refinement reads the mean (dL/dW)²."""
        return getattr(self.refinement, "needs_weight_fisher", False)

    @property
    def one_backward_pass(self) -> bool:
        """Whether the pass for the mean (dL/dW)² gives all that the metric asks for as well."""
        return self.needs_weight_fisher and not self.metric.needs_outer

    @property
    def weight_fisher_key(self) -> str:
        """Identifies the mean (dL/dW)² of every compressible linear (always in float32)."""
        content = {"model": self.model_key, "tokens": self.calibration_tokens_key, "weight": True}
        return fingerprint({**content, "version": versions.GRADIENTS})

    @property
    def targeted(self) -> Any:
        """Which linears are targeted: their role, and the blocks where these are not all."""
        targets = self.cfg.targets
        return [targets.linears, config.plain(targets.blocks)] if targets.get("blocks") else targets.linears

    @property
    def spectra_key(self) -> str:
        return fingerprint(
            {
                **self._weights,
                "sites": [config.for_key(self.cfg.grouping), self.targeted],
                "metric": config.for_key(self.cfg.metric),
                "statistics": self.statistics_key,
                "gradients": self.gradients_key,
                "version": versions.SPECTRA,
            }
        )

    @property
    def allocation_key(self) -> dict[str, Any]:
        """What the ranks depend on, apart from the ratio."""
        return {
            "spectra": self.spectra_key,
            "allocation": config.for_key(self.cfg.allocation),
            "tokens": self.calibration_tokens_key if self.allocation.needs_calibration else None,
            "counted": self._counted,
        }

    @property
    def _counted(self) -> list[Any]:
        """What the ratio counts; storages whose ranks cost the same share the ranks that are found."""
        cost = config.build(self.cfg.storage).cost
        counted = [self.cfg.targets.ratio_of, cost(2, 3, 1)]
        if all(cost(64, 96, rank) == rank * cost(64, 96, 1) for rank in range(65)):
            return counted
        return [*counted, config.for_key(self.cfg.storage)]  # one number does not tell such costs apart

    @property
    def factors_key(self) -> str:
        """Identifies the factors after refinement, before they are stored."""
        assert self.refinement is not None
        return fingerprint(
            {
                "ranks": self.allocation_key,
                "ratio": self.ratio,
                "refinement": config.for_key(self.cfg.refinement, without=("dataset",)),
                "text": self.training_tokens_key,
                "tokens": self.calibration_tokens_key if self.refinement.needs_calibration else None,
                "version": versions.COMPRESSION,
            }
        )

    @cached_property
    def compressed_key(self) -> str:
        """Identifies the weights that are evaluated."""
        if self.quantization is None:
            return self.factored_key
        factors = ("left", "right") if not self.compressed or self.quantization.method is None else ()
        answers = config.for_key(self.cfg.quantization, without=factors)
        if self.quantization.method is None:
            answers["weights"] = None
        if not self.quantization.calibrates_blocks:
            answers["sequential"] = True
        transforms = {name: getattr(self.quantization, name) for name in ("transform", "latent")}
        for name, transform in transforms.items():
            if transform is not None:
                answers[name] = config.for_key(self.cfg.quantization[name], without=transform.no_influence)
        return fingerprint(
            {
                "model": self.factored_key,
                "targets": None if self.compressed else self.targeted,
                "quantization": answers,
                "seed": self.cfg.seed if self.quantization.needs_seed else None,
                "tokens": self.calibration_tokens_key if self.quantization.needs_calibration else None,
                "version": versions.QUANTIZATION,
            }
        )

    @property
    def factored_key(self) -> str:
        """Identifies the weights before they are quantized."""
        if not self.compresses:
            return fingerprint(self._weights)
        return fingerprint(
            {
                "ranks": self.allocation_key,
                "ratio": self.ratio,
                "refinement": self.factors_key if self.refinement is not None else None,
                "storage": config.for_key(self.cfg.storage),
                "version": versions.COMPRESSION,
            }
        )

    def text_tokens_key(self, evaluator: str) -> str:
        """Identifies the tokens of the evaluation text."""
        return fingerprint(
            {
                "tokenizer": self.model_key,
                "data": self.evaluation_data[evaluator],
                "part": config.for_key(self.text_of(evaluator).eval),
                "special": self.evaluators[evaluator].add_special_tokens,
                "version": versions.TOKENS,
            }
        )

    def text_of(self, evaluator: str) -> DictConfig:
        """The data set that an evaluator reads: its own, or that of the cell."""
        return text_of(self.cfg, evaluator)

    def metric_keys(self, name: str) -> dict[str, str]:
        """Identify what an evaluator measures, by part."""
        evaluator = self.evaluators[name]
        shared = {
            "model": self.compressed_key,
            "evaluator": evaluator.settings(self.cfg.eval[name]),
            "tokens": self.text_tokens_key(name) if evaluator.reads_text else None,
            "version": evaluator.version,
        }
        return {part: fingerprint({**shared, "part": depends}) for part, depends in self.parts[name].items()}


def text_of(cfg: DictConfig, evaluator: str) -> DictConfig:
    """The data set that an evaluator of ``cfg`` reads: its own, or that of the cell."""
    return cfg.eval[evaluator].get("dataset") or cfg.dataset
