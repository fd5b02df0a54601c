"""Does the memory of the statistics pass grow with the depth of the model?

    python benchmarks/statistics_memory.py

Random LLaMA-shaped models of 4 and of 16 layers, the same calibration set, each in a process of its own.
Prints for each the peak memory of the pass over the weights, and the ratio of the two (1: not at all).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

HIDDEN, INTERMEDIATE, VOCABULARY, SAMPLES, LENGTH = 512, 1536, 1000, 16, 256
MIB = 1024**2


def resident() -> int:
    """Bytes of memory this process holds now."""
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * 4096


def measure(layers: int) -> float:
    """Peak MiB over the weights of one statistics pass, in this process."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from lowrank_lab.calibration.statistics import make_statistics
    from lowrank_lab.models.families import LLAMA
    from lowrank_lab.process import environment

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
    )
    model = LlamaForCausalLM(config).eval()
    batches = list(torch.randint(VOCABULARY, (SAMPLES, LENGTH)).split(4))
    with torch.no_grad():
        model(batches[0])  # whatever torch sets up at the first forward belongs to no pass
    before = resident()
    environment.reset_peak_memory()
    with tempfile.TemporaryDirectory() as folder:
        make_statistics(Path(folder), model, LLAMA, batches, torch.device("cpu"))
    return environment.peak_memory()["resident_mib"] - before / MIB


def main() -> None:
    if len(sys.argv) > 1:
        print(measure(int(sys.argv[1])))
        return
    peaks = {}
    for layers in (4, 16):
        # Let glibc return freed tensors at once: else the peak depends on how it happens to reuse its heaps.
        environ = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
        command = [sys.executable, __file__, str(layers)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environ)
        peaks[layers] = float(done.stdout)
    print(json.dumps({"peak_mib": peaks, "ratio_16_to_4_layers": peaks[16] / peaks[4]}))


if __name__ == "__main__":
    main()
