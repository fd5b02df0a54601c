"""Detect that memory ran out, on a GPU or in the machine, and free the memory after it. No torch."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

ADVICE = (
    "out of memory: lower calibration.batch_size, calibration.seqlen or the batch size of the evaluation or "
    "training that needed it, or use device=cpu or a smaller dtype"
)
# Messages that accelerate does not know: of the CUDA runtime, and of the libraries behind eigh and cholesky.
OUT_OF_MEMORY = ("CUDA error: out of memory", "CUSOLVER_STATUS_ALLOC_FAILED", "CUBLAS_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error says that memory ran out."""
    if isinstance(error, MemoryError):
        return True
    if "torch" not in sys.modules or not isinstance(error, RuntimeError):
        return False
    import torch
    from accelerate.utils.memory import should_reduce_batch_size

    if isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error):
        return True
    return any(words in str(error) for words in OUT_OF_MEMORY)


def unless_out_of_memory(work: Callable[[], T]) -> T | None:
    """What ``work()`` returns; None where memory ran out."""
    try:
        return work()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    _empty_caches()  # here the error, whose frames referred to the tensors, no longer exists
    return None


def without_frames(error: Exception) -> Exception:
    """``error`` without its traceback, whose frames refer to models: a launcher keeps the errors of all cells."""
    link: BaseException | None = error
    while link is not None:
        link.__traceback__ = None
        link = link.__cause__ or link.__context__
    if "torch" in sys.modules:
        _empty_caches()
    return error


def _empty_caches() -> None:
    from accelerate.utils.memory import clear_device_cache

    clear_device_cache(garbage_collection=True)
