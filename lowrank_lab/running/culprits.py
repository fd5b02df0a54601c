"""Which weight of a model is to blame where numbers cease to be finite."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from lowrank_lab.process.out_of_memory import is_out_of_memory
from lowrank_lab.running.context import Context


@contextmanager
def weights_named(context: Context) -> Iterator[None]:
    """Within it, an error names the weight of the dense model that is not finite, if there is one.

    What fails is often another linear, which gets its outputs, or a decomposition that does not converge.
    """
    try:
        yield
    except (ArithmeticError, ValueError, RuntimeError) as error:  # of torch.linalg they are RuntimeErrors
        if is_out_of_memory(error):
            raise
        name = weight_not_finite(context.dense_model())
        if name is None or str(error).startswith(f"{name}:"):
            raise
        raise FloatingPointError(f"{name}: the weight is not finite ({error})") from error


def weight_not_finite(model: nn.Module) -> str | None:
    """The path of the first module with a weight or bias that is not finite; None if all are."""
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            return name.rpartition(".")[0]
    return None
