"""The page docs/families.md, from the tiny models that the tests run:

python -m lowrank_lab.models.families_page > docs/families.md
"""

from __future__ import annotations

from typing import Any

import pandas as pd
from transformers import AutoConfig

from lowrank_lab.models.discovery import family_of
from lowrank_lab.models.families import Tower, kv_cache_shape
from lowrank_lab.models.tasks.named import TASKS
from lowrank_lab.models.tiny import EVERY_CONFIG
from lowrank_lab.models.vision_families import ROWS, language_config, task_of

TEXT = """# Families

The families of models that the tests run, each as a tiny random model (`model.path=tiny:NAME`), and what is
compressed in them. Linears in one pair of brackets are given the same input: they share a statistic.

A **row** of `lowrank_lab/models/families.py`, for images `vision_families.py`, also says what rotations
and scales of activations fold into weights. `tests/test_models.py`, `tests/test_vision.py` and
`tests/test_image_text.py` check each row, and other tests compress, quantize, save and load these families. Of CLIP
and SigLIP the vision tower is compressed; the text tower has a row too. Models of images and text (`llava`,
`llava_next`, `idefics3`, `smolvlm`) are put together of the row of their language model, which is compressed, and
that of their image encoder (`targets.tower=vision`).

Any other causal language model of transformers with one list of like blocks is known by **discovery**: a forward
of a few tokens shows which linears are given the same tensor. QuaRot, SpinQuant, SmoothQuant and AWQ need a row,
and are skipped without one. `tests/test_discovery.py` takes each of these families through `method=svdllm` and
`method=kron`, saves it, and loads it to the same logits.

{table}

This page is written by `python -m lowrank_lab.models.families_page`; a test holds it up to date.
"""


def page() -> str:
    rows = [_row(family) for family in sorted(EVERY_CONFIG, key=lambda family: (family not in ROWS, family))]
    return TEXT.format(table=pd.DataFrame(rows).to_markdown(index=False, disable_numparse=True))


def _row(family: str) -> dict[str, Any]:
    task = TASKS[task_of(family)]
    model: Any = task.skeleton(AutoConfig.for_model(family, **EVERY_CONFIG[family]), False)
    tower = family_of(model).tower
    return {
        "model_type": f"`{family}`",
        "known by": "row" if family in ROWS else "discovery",
        "blocks": f"`{tower.blocks}`",
        "compressed, by input": " ".join(f"[{_short(group)}]" for group in tower.inputs),
        "stays dense in a block": _short(tower.stays_dense),
        "rotations": _rotations(tower),
        "keys and values": "none" if kv_cache_shape(language_config(model.config)) is None else "counted",
    }


def _short(paths: tuple[str, ...]) -> str:
    return ", ".join(path.rpartition(".")[2] for path in paths)


def _rotations(tower: Tower) -> str:
    """Whether the residual stream can be rotated (quantization/rotation.py)."""
    if tower.folding is None:
        return "not known"
    return "yes" if tower.folding.norm != "layer" and tower.folding.residual else "no"


if __name__ == "__main__":
    print(page(), end="")
