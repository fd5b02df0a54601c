"""How close is a factorized linear to the time that its multiplications would lead one to expect?

    OMP_NUM_THREADS=1 python benchmarks/factorized_forward.py

For the shapes of SmolLM2-135M and of LLaMA-7B at --scale, at three ratios: the forward of a FactorizedLinear
over the ideal, which is k(m+n)/(mn) of the dense linear's time in the same run, for a window of 512 tokens and
for one token (decoding). A line a shape and ratio; 1 is the ideal, below 1 is faster than it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import torch
from llama7b import RATIOS, options, rank, scaled
from timing import fastest, rounded

from lowrank_lab.modules.factorized import FactorizedLinear, plain_linear

SMOLLM2 = ((576, 576), (1536, 576), (576, 1536))  # (out, in)
TOKENS = {"prefill": 512, "decode": 1}


def over_ideal(out: int, inp: int, k: int, tokens: int, repeats: int) -> dict[str, float]:
    """Milliseconds of the dense and of the factorized linear, and the latter over the ideal."""
    dense = plain_linear(torch.randn(out, inp), None)
    factorized = FactorizedLinear(plain_linear(torch.randn(out, k), None), plain_linear(torch.randn(k, inp), None))
    x = torch.randn(1, tokens, inp)
    calls = max(1, round(512 / tokens / 8))  # many calls a measurement where one is too short for the clock
    repeat = lambda linear: [linear(x) for _ in range(calls)]
    took = fastest({"dense": lambda: repeat(dense), "factorized": lambda: repeat(factorized)}, repeats)
    ideal = took["dense"] * k * (out + inp) / (out * inp)
    return {"over_ideal": took["factorized"] / ideal, **{name: 1000 * t / calls for name, t in took.items()}}


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> None:
    asked = options(arguments, repeats=21)
    torch.manual_seed(0)
    for out, inp in (*SMOLLM2, *scaled(asked.scale)):
        for ratio in RATIOS:
            for name, tokens in TOKENS.items():
                facts = over_ideal(out, inp, rank(ratio, out, inp), tokens, asked.repeats)
                print(json.dumps({"out": out, "in": inp, "ratio": ratio, "tokens": name, **rounded(facts)}))


if __name__ == "__main__":
    main()
