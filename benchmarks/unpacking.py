"""How much slower is a linear layer for keeping its weight packed in few bits?

    OMP_NUM_THREADS=1 python benchmarks/unpacking.py

A weight of 1536 × 576 in each format and a window of 512 tokens. Prints a line a format: milliseconds to unpack the
codes, to make the weight of them (which unpacks), and the time of a forward pass over that of the dense layer.
Last, four tokens through look-up tables (quantization/look_up.py), over the dense product of the same tokens.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import torch

from lowrank_lab.lowrank.quantized import QuantizedLinear
from lowrank_lab.quantization.codec import Quantized, quantize, unpack
from lowrank_lab.quantization.formats import Format
from lowrank_lab.quantization.look_up import look_up_linear

OUT, INP, TOKENS, REPEATS = 1536, 576, 512, 41
FORMATS = [
    *(Format(bits) for bits in (8, 6, 4, 3, 2)),
    Format(4, granularity=64),
    Format(4, grid="nf4", granularity=64),
    Format(4, grid="codebook"),
]


def milliseconds(call: Callable[[], object]) -> float:
    """Processor time of the fastest of many calls, which other work on the machine disturbs least."""
    times = []
    for _ in range(REPEATS):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return 1000 * min(times)


def quantized(weight: torch.Tensor, form: Format) -> Quantized:
    """``weight`` in the format; its values do not matter here, so that a codebook may be any."""
    if form.grid != "codebook":
        return quantize(weight, form)
    nearest = quantize(weight, Format(form.bits))
    codebook = torch.randn(*form.scales((OUT, INP)), 2**form.bits)
    return Quantized(form, nearest.codes, torch.ones_like(nearest.scale), None, codebook)


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(OUT, INP), torch.randn(TOKENS, INP)
    for form in FORMATS:
        layer = QuantizedLinear.of(quantized(weight, form), None)
        dense = milliseconds(lambda: torch.nn.functional.linear(x, weight))
        forward = milliseconds(lambda layer=layer: layer(x))
        line = {
            "format": form.name,
            "unpack_ms": milliseconds(lambda layer=layer: unpack(layer.codes, layer.format.bits, (OUT, INP))),
            "weight_ms": milliseconds(lambda layer=layer: layer.weight),
            "forward_ms": forward,
            "forward_over_dense": forward / dense,
        }
        print(json.dumps({name: round(value, 3) if value != form.name else value for name, value in line.items()}))
    few = quantize(x[:4], Format(4))
    clustered = quantized(weight, Format(4, grid="codebook"))
    tables = milliseconds(lambda: look_up_linear(few, clustered))
    dense = milliseconds(lambda: torch.nn.functional.linear(x[:4], weight))
    print(json.dumps({"look_up_ms_of_4_tokens": round(tables, 3), "look_up_over_dense": round(tables / dense, 1)}))


if __name__ == "__main__":
    main()
