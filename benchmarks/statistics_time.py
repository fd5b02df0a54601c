"""How much longer does a statistics pass take than a forward of the same tokens?

    OMP_NUM_THREADS=1 python benchmarks/statistics_time.py

A random model with the blocks of SmolLM2-135M (or --hidden, --intermediate and --layers of another one), by
turns: the pass as a cell runs it, with its files written, and the model's own forward. Prints the processor
seconds of both and their ratio, over the blocks alone (``over_blocks``) and over a forward that goes on to the
logits.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from timing import fastest, rounded

from lowrank_lab.calibration.statistics import make_statistics
from lowrank_lab.models.families import LLAMA


def random_llama(hidden: int, intermediate: int, layers: int, vocabulary: int) -> torch.nn.Module:
    """A LLaMA with random weights, heads of 64 channels, and a third as many keys and values as SmolLM2 has."""
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = hidden // 64
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 3),
        use_cache=False,
    )
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--intermediate", type=int, default=1536)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    model = random_llama(options.hidden, options.intermediate, options.layers, options.vocabulary)
    batches = list(torch.randint(options.vocabulary, (options.samples, options.seqlen)).split(4))

    def statistics() -> None:
        with tempfile.TemporaryDirectory() as folder:
            make_statistics(Path(folder), model, LLAMA, batches, torch.device("cpu"))

    calls = {
        "statistics": statistics,
        "blocks": lambda: [model.model(ids) for ids in batches],
        "logits": lambda: [model(ids) for ids in batches],
    }
    took = fastest(calls, options.repeats)
    over = {f"over_{of}": took["statistics"] / took[of] for of in ("blocks", "logits")}
    print(json.dumps(rounded({**took, **over})))


if __name__ == "__main__":
    main()
