"""The positions of a batch that are not padding, while it runs through a model: only these count in statistics."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

_rows: ContextVar[Tensor | None] = ContextVar("rows", default=None)


@contextmanager
def batch_rows(rows: Tensor | None) -> Iterator[None]:
    """Within it a batch runs whose positions ``rows`` (batch, length), bool, are not padding; None: all."""
    token = _rows.set(rows)
    try:
        yield
    finally:
        _rows.reset(token)


def current_rows() -> Tensor | None:
    """The positions (batch, length) of the running batch that are not padding; None: all."""
    return _rows.get()


def without_padding(x: Tensor, rows: Tensor | None) -> Tensor:
    """The rows (n, width) of ``x`` (…, width), a module's input or output, without padding.

    ``rows`` are the positions of the batch that are not padding.

    Raises ValueError where the batch has padding and the module gets another number of rows than the batch has, as
    experts do: which of them are padding is not known.
    """
    x = x.reshape(-1, x.shape[-1])
    if rows is None:
        return x
    if len(x) != rows.numel():
        raise ValueError(f"{len(x)} rows of a batch of {rows.numel()}: which of them are padding is not known")
    return x[rows.reshape(-1).to(x.device)]
