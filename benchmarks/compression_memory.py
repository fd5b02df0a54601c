"""Does a compression hold more than it must: the weights, one block with its statistics, the hidden states?

    OMP_NUM_THREADS=1 python benchmarks/compression_memory.py

Random LLaMA-shaped models of 4 and of 8 layers, compressed by ``method=svdllm`` and evaluated, each in a process
of its own, with the hidden states of the calibration set in memory and in files. Prints for each, in MiB, the peak
over what the process holds once a tiny model has been through it: ``resident`` all, ``anonymous`` without the files
that are mapped, which the system could take back; ``must`` is what the weights, one block in float64 with its
statistics, and the hidden states in memory have; and ``told`` what ``dry_run=true`` tells, less its constant.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

HIDDEN, INTERMEDIATE, SAMPLES, LENGTH = 512, 1408, 64, 512
MIB = 1024**2
ROOT = Path(__file__).resolve().parent.parent


def resident(kind: str) -> float:
    """MiB that this process holds now: ``VmRSS`` all, ``RssAnon`` without files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{kind}:")) / 1024


class Peaks:
    """The highest of each kind while it is entered, looked at every few milliseconds."""

    def __enter__(self) -> Peaks:
        self.highest = {"VmRSS": 0.0, "RssAnon": 0.0}
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while not self.done.wait(0.003):
            self.highest = {kind: max(most, resident(kind)) for kind, most in self.highest.items()}

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.thread.join()


def build(layers: int, folder: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from lowrank_lab.models.tiny import byte_tokenizer

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=260,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def cell_of(model: str, root: Path, offload: bool) -> Any:
    from lowrank_lab.cells import grid

    words = [
        f"model.path={model}",
        f"results={root}",
        "method=svdllm",
        f"calibration.samples={SAMPLES}",
        f"calibration.seqlen={LENGTH}",
        f"calibration.offload={offload}",
        "dataset.calibration.max_documents=4",
        "eval.ppl.seqlen=64",
        "eval.ppl.max_windows=2",
        "device=cpu",
    ]
    [cell] = grid.plan(ROOT / "conf", "config", words, False)
    return cell


def measure(model: str, offload: bool) -> dict[str, float]:
    """In this process, MiB."""
    from lowrank_lab.planning.shapes import shapes_of, with_sites
    from lowrank_lab.planning.steps import BASE, Planner
    from lowrank_lab.running import runner

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        runner.run(cell_of("tiny:llama", root, offload))
        before = {kind: resident(kind) for kind in ("VmRSS", "RssAnon")}
        cell = cell_of(model, root, offload)
        shapes = shapes_of(cell)
        told = max(step.host for step in Planner(cell, with_sites(shapes, cell), on_gpu=False).steps()) - BASE
        with Peaks() as peaks:
            runner.run(cell)
    weights, block = 4 * shapes.parameters, 8 * shapes.block
    statistics = 8 * sum(width**2 for width in shapes.inputs[0])
    states = 0 if offload else 4 * SAMPLES * LENGTH * HIDDEN
    return {
        "resident": peaks.highest["VmRSS"] - before["VmRSS"],
        "anonymous": peaks.highest["RssAnon"] - before["RssAnon"],
        "must": (weights + block + statistics + states) / MIB,
        "told": told / MIB,
    }


def main() -> None:
    match sys.argv[1:]:
        case ["build", layers, folder]:
            build(int(layers), Path(folder))
        case ["measure", folder, offload]:
            print(json.dumps({name: round(mib) for name, mib in measure(folder, offload == "True").items()}))
        case _:
            # Let glibc return freed tensors at once: else the peak depends on how it happens to reuse its heaps.
            environ = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
            again = lambda *words: subprocess.run(
                [sys.executable, __file__, *words], check=True, text=True, stdout=subprocess.PIPE, env=environ
            )
            for layers in (4, 8):
                with tempfile.TemporaryDirectory() as folder:
                    again("build", str(layers), folder)
                    for offload in (False, True):
                        found = again("measure", folder, str(offload)).stdout.splitlines()[-1]
                        print(json.dumps({"layers": layers, "offload": offload, **json.loads(found)}), flush=True)


if __name__ == "__main__":
    main()
