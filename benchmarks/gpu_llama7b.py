"""How long does a GPU take to compress a model of LLaMA-7B's size, in how much memory, and what bounds it?

    python benchmarks/gpu_llama7b.py /scratch/llama7b                                        # 14 GB, made once
    python benchmarks/gpu_llama7b.py /tmp/small --device cpu --layers 2 --hidden 256 --intermediate 688

Random weights in bfloat16, compressed by ``svdllm`` at three ratios as run.py does it (second moments and
decompositions in float32 and float64), with a short calibration and evaluation. The folder keeps the model; results
are new in every run. Prints for each ratio the minutes of each stage and the peak memory in MiB, then all stages
together and which of them takes longest.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from timing import rounded
from transformers import AutoModelForCausalLM, LlamaConfig

from lowrank_lab.cells import grid
from lowrank_lab.models.tiny import byte_tokenizer
from lowrank_lab.running import runner

CONF = Path(__file__).resolve().parent.parent / "conf"
WORDS = (
    "method=svdllm",
    "ratio=0.8,0.6,0.4",
    "dtype=bfloat16",
    "calibration.samples=16",
    "calibration.seqlen=2048",
    "calibration.batch_size=1",
    "eval.ppl.seqlen=2048",
    "eval.ppl.max_windows=4",
)


def make_model(folder: Path, layers: int, hidden: int, intermediate: int) -> None:
    """A checkpoint of random weights with a tokenizer of bytes; everything else is LLaMA-7B's."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 128,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path, help="where the model is, or is made")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=11008)
    parser.add_argument("words", nargs="*", help="of run.py, for other sizes")
    options = parser.parse_intermixed_args(arguments)
    if not (options.folder / "config.json").exists():
        make_model(options.folder, options.layers, options.hidden, options.intermediate)
    total: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(dir=options.folder.parent) as results:
        places = [f"model.path={options.folder}", f"results={results}", f"device={options.device}"]
        for cell in grid.plan(CONF, "config", [*WORDS, *places, *options.words], multirun=True):
            record = runner.run(cell)
            minutes = {
                stage["stage"]: stage["seconds"] / 60 for stage in record["stages"] if not stage.get("reused")
            }
            total.update(minutes)
            print(json.dumps({"ratio": cell.ratio, "peak_mib": record["peak_memory"], "minutes": rounded(minutes)}))
    [(longest, most)] = total.most_common(1)
    print(json.dumps({"minutes": rounded(total), "longest": longest, "share": round(most / total.total(), 2)}))


if __name__ == "__main__":
    main()
