"""The interface of tasks, for compressions and evaluators. No torch at import."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from torch import Tensor, nn

Batch = Mapping[str, "Tensor"]  # what a model takes by name: input_ids, attention_mask, labels, …
Reduction = Literal["none", "sum", "mean"]


class Task(Protocol):
    def load(self, location: str, revision: str | None, dtype: str, trust_remote_code: bool) -> nn.Module:
        """The model in evaluation mode, on the CPU, in ``dtype``.

        Raises UserError for one whose weights or files would run code that the user has not allowed.
        """
        ...

    def check(self, location: str, revision: str | None, trust_remote_code: bool) -> None:
        """Raises UserError as ``load`` and ``processor`` do; no values of weights are read."""
        ...

    def processor(self, location: str, revision: str | None, trust_remote_code: bool) -> Any:
        """What makes inputs of data: the tokenizer, the image processor. It has ``save_pretrained``."""
        ...

    def skeleton(self, model_config: Any, trust_remote_code: bool) -> nn.Module:
        """The model of a transformers configuration without weights, for shapes."""
        ...

    def forward(self, model: nn.Module, batch: Batch) -> None:
        """Run ``model`` at least through all blocks of all towers."""
        ...

    def predictions(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """What the loss of a batch is of: logits (predictions, classes), float32, and classes (predictions,)."""
        ...

    def loss(self, model: nn.Module, batch: Batch, reduction: Reduction = "mean") -> Tensor:
        """The loss of a batch, float32: the ``mean`` or ``sum`` over all predictions, or each (``none``)."""
        ...

    def predicted(self, batch: Batch) -> int:
        """The number of predictions in the loss of a batch."""
        ...

    def positions(self, skeleton: Callable[[], nn.Module], blocks: str, batch: Batch) -> int:
        """How many hidden states ``batch`` has in ``blocks`` (a path), padding too.

        ``skeleton`` makes the model without weights.
        """
        ...

    def rows(self, batch: Batch) -> Tensor | None:
        """The positions (batch, length), bool, of a batch that are not padding; None: all."""
        ...
