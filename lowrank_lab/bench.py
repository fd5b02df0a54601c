"""What a cell works on: the model, its tokenizer, its texts and the device, each made when first asked for."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from lowrank_lab.calibration.tokens import load_tokens, make_text_tokens
from lowrank_lab.cell import Cell, corpus_part
from lowrank_lab.errors import SkippedCell, UserError
from lowrank_lab.models.load import convert, load_model, load_tokenizer
from lowrank_lab.results import Record


@dataclass
class Bench:
    """``model`` is dense until it is compressed in place; evaluators find the compressed one."""

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
        made = self.cell.store.get_or_make("model", self.cell.model_key, lambda folder: convert(source, folder))
        return str(self.record.artifact("model conversion", made).path)

    @cached_property
    def model_config(self) -> Any:
        return AutoConfig.from_pretrained(self.location, **self._remote)

    @cached_property
    def model(self) -> nn.Module:
        with self.record.stage("model loading"):
            return load_model(self.location, dtype=self.cell.cfg.dtype, **self._remote)

    def float32_model(self) -> nn.Module:
        """The dense model in float32: ``model`` itself where that is its dtype."""
        if self.cell.cfg.dtype == "float32":
            return self.model
        return load_model(self.location, dtype="float32", **self._remote)

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
            lambda folder: make_text_tokens(folder, self.tokenizer, corpus, part, self.cell.cfg.data_root, special),
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
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device={name}: this machine has {torch.cuda.device_count()} GPUs; use device=auto or cpu")
    return device
