"""Which model of conf/model/ is which of the papers', by its place on the hub."""

from __future__ import annotations

from functools import cache

from omegaconf import OmegaConf

from lowrank_lab.basics.paths import CONF

MODELS = CONF / "model"
# Published names of models by the option of conf/model/ that is the same model.
OPTIONS = {
    "llama-7b": "llama_7b",
    "llama-13b": "llama_13b",
    "llama-2-7b": "llama2_7b",
    "llama-2-13b": "llama2_13b",
    "llama-3-8b": "llama3_8b",
    "llama-3.1-8b": "llama3_1_8b",
    "opt-125m": "opt_125m",
    "opt-2.7b": "opt_2_7b",
    "vit": "vit_base",  # the slides name no size
    "deit-small": "deit_small",
    "deit-base": "deit_base",
}


@cache
def paths() -> dict[str, str]:
    """By the published name of a model, where ours is on the hub."""
    return {name: path(option) for name, option in OPTIONS.items()}


def path(option: str) -> str:
    """Of the option of conf/model/, the place on the hub."""
    node = OmegaConf.load(MODELS / f"{option}.yaml")
    return str(OmegaConf.select(node, "path") or OmegaConf.select(node, "model.path"))  # that of images sets more
