"""Hydra's compose for tests: the same choice of options is put together once, which takes a tenth of a second.

Values are then set in copies, as lowrank_lab.cells.grid does for the cells of a large grid. And the same YAML is
parsed once in a process, which is a quarter of that time.
"""

from __future__ import annotations

import pickle
import re
from functools import cache
from typing import Any

import yaml
from hydra import compose
from hydra._internal import defaults_list
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

# A plain value of a setting. Lists, dictionaries, interpolations and new entries are left to Hydra.
VALUE = re.compile(r"(?!hydra\.)(results|artifacts|data_root|ratio|seed|dtype|\w+(\.\w+)+)=([\w./-]+)")


def composed(config_name: str, words: list[str], _with_hydra: bool) -> DictConfig:
    """The configuration of one job, without Hydra's part but with an entry for it. Raises what Hydra raises."""
    values = [word for word in words if VALUE.fullmatch(word)]
    others = tuple(word for word in words if word not in values)
    if not all(re.fullmatch(r"[\w/]+=[\w,\[\]]+", word) for word in others):  # its place among the values counts
        return compose(config_name, words, True)
    plain, groups = chosen(config_name, others)
    cfg = OmegaConf.create(plain)
    OmegaConf.set_struct(cfg, True)
    for key, value in map(parsed, values):
        if key in groups or not is_leaf(cfg, key):
            return compose(config_name, words, True)
        OmegaConf.update(cfg, key, value)
    OmegaConf.set_struct(cfg, None)
    return cfg


@cache
def chosen(config_name: str, words: tuple[str, ...]) -> tuple[Any, frozenset[str]]:
    """The configuration of a choice of options as plain data, and the names of all groups."""
    cfg = compose(config_name, list(words), True)
    groups = frozenset(cfg.hydra.runtime.choices)
    plain = OmegaConf.to_container(cfg, resolve=False)
    assert isinstance(plain, dict)
    return {**plain, "hydra": None}, groups


@cache
def parsed(word: str) -> tuple[str, Any]:
    override = OverridesParser.create().parse_override(word)
    return override.key_or_group, override.value()


def is_leaf(cfg: DictConfig, key: str) -> bool:
    *path, last = key.split(".")
    node: Any = cfg
    for name in path:
        if not OmegaConf.is_dict(node) or name not in node:
            return False
        node = node._get_node(name)
    return OmegaConf.is_dict(node) and last in node and not OmegaConf.is_config(node._get_node(last))


def map_choices_where_needed() -> None:
    """Have Hydra map all choices only for defaults with an interpolation: a fifth of the time to compose."""
    make = defaults_list._create_interpolation_map

    def only_where_needed(overrides: Any, defaults: list[Any], self_added: bool) -> Any:
        needed = any("$" in str(value) for default in defaults for value in vars(default).values())
        return make(overrides, defaults, self_added) if needed else None

    defaults_list._create_interpolation_map = only_where_needed


def parse_yaml_once() -> None:
    """Have ``yaml.load`` give OmegaConf a copy of what it has made of the same text before."""
    parse = yaml.load
    known: dict[str, bytes] = {}

    def load(stream: Any, Loader: Any) -> Any:
        if Loader.__name__ != "OmegaConfLoader":  # others may make objects of it
            return parse(stream, Loader=Loader)
        text = stream if isinstance(stream, str) else stream.read()
        if text not in known:
            known[text] = pickle.dumps(parse(text, Loader=Loader))
        return pickle.loads(known[text])

    yaml.load = load
