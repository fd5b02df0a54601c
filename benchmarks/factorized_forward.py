"""How close is a factorized linear to the time that its multiplications would lead one to expect?

    OMP_NUM_THREADS=1 python benchmarks/factorized_forward.py

For the shapes of SmolLM2-135M and of LLaMA-7B at --scale, at three ratios: the forward of a FactorizedLinear
over the ideal, which is k(m+n)/(mn) of the dense linear's time in the same run, for a window of 512 tokens and
for one token (decoding). A line a shape and ratio; 1 is the ideal, below 1 is faster than it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

import torch
from timing import fastest, rounded

from lowrank_lab.lowrank.factorized import FactorizedLinear, plain_linear

SMOLLM2 = ((576, 576), (1536, 576), (576, 1536))  # (out, in)
LLAMA_7B = ((4096, 4096), (11008, 4096), (4096, 11008))
RATIOS = (0.8, 0.6, 0.4)
TOKENS = {"prefill": 512, "decode": 1}


def over_ideal(out: int, inp: int, rank: int, tokens: int, repeats: int) -> dict[str, float]:
    """Milliseconds of the dense and of the factorized linear, and the latter over the ideal."""
    dense = plain_linear(torch.randn(out, inp), None)
    factorized = FactorizedLinear(
        plain_linear(torch.randn(out, rank), None), plain_linear(torch.randn(rank, inp), None)
    )
    x = torch.randn(1, tokens, inp)
    calls = max(1, round(512 / tokens / 8))  # many calls a measurement where one is too short for the clock
    repeat = lambda linear: [linear(x) for _ in range(calls)]
    took = fastest({"dense": lambda: repeat(dense), "factorized": lambda: repeat(factorized)}, repeats)
    ideal = took["dense"] * rank * (out + inp) / (out * inp)
    return {"over_ideal": took["factorized"] / ideal, **{name: 1000 * t / calls for name, t in took.items()}}


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--scale", type=float, default=0.25, help="of the widths of LLaMA-7B")
    parser.add_argument("--repeats", type=int, default=21)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    scaled = [(round(out * options.scale), round(inp * options.scale)) for out, inp in LLAMA_7B]
    for out, inp in (*SMOLLM2, *scaled):
        for ratio in RATIOS:
            rank = int(ratio * out * inp / (out + inp))
            for name, tokens in TOKENS.items():
                facts = over_ideal(out, inp, rank, tokens, options.repeats)
                print(json.dumps({"out": out, "in": inp, "ratio": ratio, "tokens": name, **rounded(facts)}))


if __name__ == "__main__":
    main()
