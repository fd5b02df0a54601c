"""What a quantization is: something that puts a model's linears, dense or factors, into few bits, in place."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lowrank_lab.quantization.formats import Format

if TYPE_CHECKING:
    from torch import Tensor

    from lowrank_lab.bench import Bench
    from lowrank_lab.quantization.codec import Quantized


class WeightQuantizer:
    """Quantizes weights one linear at a time; ``weights`` is the fields of a ``Format``.

    needs_calibration  whether ``quantize`` reads the second moment of the linear's input
    label              what stands before the format in tables; nothing for plain rounding
    """

    needs_calibration = False
    label = ""

    def __init__(self, weights: dict[str, Any]) -> None:
        self.weights = Format(**weights)

    @property
    def name(self) -> str:
        """Method and format in a few letters, as tables show them."""
        return f"{self.label} {self.weights.name}".strip()

    def quantize(self, weight: Tensor, second_moment: Tensor | None) -> Quantized:
        """``weight`` (out, in) in the format, given the mean x xᵀ (in, in), float64, of its inputs."""
        raise NotImplementedError

    def __call__(self, bench: Bench) -> None:
        """Quantize every target of ``bench.model`` in place."""
        from lowrank_lab.quantization.apply import quantize_linears

        quantize_linears(bench, self)
