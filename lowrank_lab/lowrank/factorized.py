"""A linear layer kept as two thin ones, and the replacement of a dense layer by it."""

from __future__ import annotations

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


class FactorizedLinear(nn.Module):
    """y = left(right(x)): a linear of shape (out, in) at rank k, with k · (out + in) weights.

    ``right`` (k, in) maps the input to k latent values, ``left`` (out, k) maps these to the output and
    carries the bias, if there is one.
    """

    def __init__(self, left: Tensor, right: Tensor, bias: Tensor | None) -> None:
        """``left`` (out, k), ``right`` (k, in), ``bias`` (out,) or None, all of one dtype."""
        super().__init__()
        self.right = _linear(right, None)
        self.left = _linear(left, bias)

    @property
    def rank(self) -> int:
        return self.right.out_features

    def forward(self, x: Tensor) -> Tensor:
        return self.left(self.right(x))


def dense_weight(linear: nn.Module) -> Tensor:
    """The weight of a dense layer as (out, in), whether it is a Linear or GPT-2's transposed Conv1D."""
    if isinstance(linear, Conv1D):
        return linear.weight.T
    if isinstance(linear, nn.Linear):
        return linear.weight
    raise TypeError(f"{type(linear).__name__} is not a dense linear layer")


def factorize(block: nn.Module, name: str, left: Tensor, right: Tensor) -> None:
    """Replace the dense linear ``name`` of ``block`` by its factors, in its dtype and on its device."""
    dense = block.get_submodule(name)
    weight = dense_weight(dense)
    bias = dense.bias.detach() if isinstance(dense.bias, Tensor) else None
    block.set_submodule(name, FactorizedLinear(left.to(weight), right.to(weight), bias))


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    out, inp = weight.shape
    linear = nn.Linear(inp, out, bias=bias is not None, device="meta", dtype=weight.dtype)
    linear.weight = nn.Parameter(weight.detach().contiguous(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.clone(), requires_grad=False)
    return linear
