"""How much slower is a linear layer for keeping its weight packed in few bits?

    OMP_NUM_THREADS=1 python benchmarks/unpacking.py

A weight of 1536 × 576 in each format and a window of 512 tokens. Prints a line a format: milliseconds to unpack the
codes, to make the weight of them (which unpacks), and the time of a forward pass over that of the dense layer.
Last, four tokens through look-up tables (modules/look_up.py), over the dense product of the same tokens.
"""

from __future__ import annotations

import json

import torch
from timing import fastest

from lowrank_lab.modules.codec import Quantized, quantize, unpack
from lowrank_lab.modules.formats import Format
from lowrank_lab.modules.look_up import look_up_linear
from lowrank_lab.modules.quantized import QuantizedLinear

OUT, INP, TOKENS, REPEATS = 1536, 576, 512, 41
FORMATS = [
    *(Format(bits) for bits in (8, 6, 4, 3, 2)),
    Format(4, granularity=64),
    Format(4, grid="nf4", granularity=64),
    Format(4, grid="codebook"),
]


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
        calls = {
            "unpack": lambda layer=layer: unpack(layer.codes, layer.format.bits, (OUT, INP)),
            "weight": lambda layer=layer: layer.weight,
            "forward": lambda layer=layer: layer(x),
            "dense": lambda: torch.nn.functional.linear(x, weight),
        }
        took = fastest(calls, REPEATS)
        line = {f"{name}_ms": round(1000 * took[name], 3) for name in ("unpack", "weight", "forward")}
        over = {"forward_over_dense": round(took["forward"] / took["dense"], 3)}
        print(json.dumps({"format": form.name, **line, **over}))
    few = quantize(x[:4], Format(4))
    clustered = quantized(weight, Format(4, grid="codebook"))
    calls = {
        "tables": lambda: look_up_linear(few, clustered),
        "dense": lambda: torch.nn.functional.linear(x[:4], weight),
    }
    took = fastest(calls, REPEATS)
    over_dense = round(took["tables"] / took["dense"], 1)
    print(json.dumps({"look_up_ms_of_4_tokens": round(1000 * took["tables"], 3), "look_up_over_dense": over_dense}))


if __name__ == "__main__":
    main()
