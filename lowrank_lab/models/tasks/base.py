"""What compressions and evaluations ask of a task. No torch at import."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from torch import Tensor, nn

Batch = Mapping[str, "Tensor"]  # what a model takes by name: input_ids, attention_mask, labels, …
Reduction = Literal["none", "sum", "mean"]


class Task(Protocol):
    def load(self, location: str, revision: str | None, dtype: str, trust_remote_code: bool) -> nn.Module:
        """The model in evaluation mode, on the CPU, in ``dtype``.

        Raises UserError for one whose weights or files would run code that was not asked for.
        """
        ...

    def skeleton(self, model_config: Any, trust_remote_code: bool) -> nn.Module:
        """The model of a transformers configuration without weights, for shapes."""
        ...

    def forward(self, model: nn.Module, batch: Batch) -> None:
        """Run ``model`` as far as all blocks of all towers are reached."""
        ...

    def loss(self, model: nn.Module, batch: Batch, reduction: Reduction = "mean") -> Tensor:
        """The loss of a batch, float32: its ``mean`` or ``sum`` over all that is predicted, or each (``none``)."""
        ...

    def predicted(self, batch: Batch) -> int:
        """How many predictions the loss of a batch is of."""
        ...

    def rows(self, batch: Batch) -> Tensor | None:
        """Which positions (batch, length) of a batch count, bool; None: all."""
        ...
