"""Which positions of a batch count while it passes through a model: padding is in no statistic and no gradient."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

_rows: ContextVar[Tensor | None] = ContextVar("rows", default=None)


@contextmanager
def counting(rows: Tensor | None) -> Iterator[None]:
    """Within it, a batch passes of which the positions ``rows`` (batch, length) bool count; None: all."""
    token = _rows.set(rows)
    try:
        yield
    finally:
        _rows.reset(token)


def rows_now() -> Tensor | None:
    """The positions (batch, length) that count of the batch that passes now; None: all."""
    return _rows.get()


def counted(x: Tensor, rows: Tensor | None) -> Tensor:
    """``x`` (…, width), what a module is given of a batch or gives, as rows (n, width) without padding.

    ``rows`` are the positions of the batch that count.

    Raises ValueError where the batch has padding and a module is given another number of rows than the batch has,
    as experts are: which of them are padding is not known.
    """
    x = x.reshape(-1, x.shape[-1])
    if rows is None:
        return x
    if len(x) != rows.numel():
        raise ValueError(f"{len(x)} rows of a batch of {rows.numel()}: which of them are padding is not known")
    return x[rows.reshape(-1).to(x.device)]
