"""Does a forward with merged tokens take the share of the time that it has of the multiply-accumulates?

    OMP_NUM_THREADS=1 python benchmarks/token_merging.py

Random models of two shapes, by turns in one run: DINOv2-small at 112 pixels, as the embedded model has them (65
tokens), and DeiT-small at 224 (197). A line a shape and r: the time of a forward of a batch over that of the dense
model, and its multiply-accumulates over those of the dense one.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from copy import deepcopy
from typing import Any

import torch
from timing import fastest, rounded
from transformers import AutoConfig, AutoModelForImageClassification

from lowrank_lab.models.tasks.image_classification import IMAGE_CLASSIFICATION as TASK
from lowrank_lab.models.vision_families import VISION_FAMILIES
from lowrank_lab.modules.image_macs import macs_of_image
from lowrank_lab.modules.token_merging import merge_tokens

SMALL = {"hidden_size": 384, "num_attention_heads": 6, "num_hidden_layers": 12}
SHAPES: dict[
    str, tuple[str, dict[str, Any], tuple[int, ...]]
] = {  # family, configuration, tokens merged in a block
    "dinov2_small": ("dinov2", {**SMALL, "image_size": 112, "patch_size": 14}, (0, 2, 4)),
    "deit_small": ("vit", {**SMALL, "intermediate_size": 1536, "image_size": 224, "patch_size": 16}, (0, 8, 13)),
}


def measure(
    family: str, settings: dict[str, Any], numbers: Sequence[int], batch: int, repeats: int
) -> Iterator[dict[str, Any]]:
    """A line for each r of ``numbers``."""
    row, config = VISION_FAMILIES[family], AutoConfig.for_model(family, **settings)
    dense = AutoModelForImageClassification.from_config(config).eval()
    images = torch.randn(batch, 3, config.image_size, config.image_size)
    models = {r: deepcopy(dense) for r in numbers}
    for r, model in models.items():
        merge_tokens(model, row.tower, [r] * config.num_hidden_layers, True)
    named = {"dense": dense, **{str(r): model for r, model in models.items()}}
    calls = {
        name: lambda model=model: TASK.forward(model, {"pixel_values": images}) for name, model in named.items()
    }
    took = fastest(calls, repeats)
    for r, model in models.items():
        sizes = macs_of_image(model, TASK.skeleton(config, False), row, TASK, images)
        kept = {"time": took[str(r)] / took["dense"], "macs": sizes["macs"] / sizes["macs_dense"]}
        yield {"r": r, "tokens": sizes["tokens"][0], "left": sizes["tokens"][-1], **rounded(kept)}


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    asked = parser.parse_args(arguments)
    torch.manual_seed(0)
    for name, shape in SHAPES.items():
        for line in measure(*shape, asked.batch, asked.repeats):
            print(json.dumps({"model": name, **line}), flush=True)


if __name__ == "__main__":
    main()
