"""Hypothesis strategies that make what users get wrong: settings, names, words of the command line, files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import load_file, save_file

from .forked import REPOSITORY

CONF = REPOSITORY / "conf"

# Choices of options which together have most settings. A recipe's own options are left out.
BASES = (
    (),
    *((f"method={file.stem}",) for file in sorted((CONF / "method").glob("*.yaml"))),
    *((f"quantization={file.stem}",) for file in sorted((CONF / "quantization").glob("*.yaml"))),
    *((f"eval={file.stem}",) for file in sorted((CONF / "eval").glob("*.yaml"))),
    ("pruning=magnitude",),
    ("tracker=wandb",),
)

# What is no value of an entry whose own value is of the type.
WRONG: dict[type, tuple[str, ...]] = {
    bool: ("maybe", "2", "-1", "0.5", "[true]", "{a:1}", "''"),
    int: ("many", "true", "1.5", "nan", "inf", "[1]", "{a:1}", "''", "-7"),
    float: ("much", "true", "nan", "-inf", "[0.5]", "{a:1}", "''"),
    str: ("7", "true", "0.5", "[a]", "{a:1}", "''", "null"),
    list: ("word", "3", "true", "{a:1}"),
}


@cache
def entries(base: tuple[str, ...]) -> dict[str, Any]:
    """The settings with the options of ``base``, by name: those that have a value, whose type is then known."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", [*base, "dataset=wikitext2"])
    OmegaConf.resolve(cfg)
    found: dict[str, Any] = {}

    def visit(node: DictConfig, prefix: str) -> None:
        for name in node:
            if OmegaConf.is_missing(node, name):
                continue
            key, value = f"{prefix}{name}", node[name]
            if OmegaConf.is_dict(value):
                visit(value, f"{key}.")
            elif value is not None:
                found[key] = OmegaConf.to_container(value) if OmegaConf.is_list(value) else value

    visit(cfg, "")
    return {
        key: value
        for key, value in found.items()
        if not key.startswith(("compressions.", "scale.", "calibration.dataset.", "hydra."))
        and not key.endswith("_target_")
    }


@st.composite
def wrong_values(draw: DrawFn) -> tuple[str, ...]:
    """A choice of options, and a value of the wrong type for one of their settings."""
    base = draw(st.sampled_from(BASES))
    settings = entries(base)
    key = draw(st.sampled_from(sorted(settings)))
    wrong = WRONG[type(settings[key])]
    if key.endswith((".join", ".granularity")):  # texts may be joined by nothing; a group's size is a number
        wrong = [value for value in wrong if value not in ("''", "7")]
    return (*base, f"{key}={draw(st.sampled_from(wrong))}")


def misspelled(name: str) -> SearchStrategy[str]:
    """``name`` with one letter missing, doubled, or changed with the next."""

    def edit(place: int, how: int) -> str:
        left, letter, right = name[:place], name[place], name[place + 1 :]
        if how == 0:
            return left + right
        if how == 1:
            return left + letter + letter + right
        return left + right[:1] + letter + right[1:]

    return st.builds(edit, st.integers(0, len(name) - 1), st.integers(0, 2)).filter(
        lambda other: other not in ("", name) and other[0].isalpha()
    )


@st.composite
def wrong_options(draw: DrawFn) -> tuple[str, str]:
    """A misspelled option of an axis, and the option that was meant."""
    axes = [f.name for f in CONF.iterdir() if f.is_dir() and f.name not in ("hydra", "scale")]
    axis = draw(st.sampled_from(sorted(axes)))
    options = [f.stem for f in (CONF / axis).glob("*.yaml") if not f.stem.startswith("_")]
    option = draw(st.sampled_from(sorted(options)))
    wrong = draw(misspelled(option).filter(lambda other: other not in options))
    return f"{axis}={wrong}", option


@st.composite
def wrong_keys(draw: DrawFn) -> tuple[tuple[str, ...], str]:
    """A choice of options with a misspelled setting, and the setting that was meant."""
    base = draw(st.sampled_from(BASES))
    settings = entries(base)
    key = draw(st.sampled_from(sorted(settings)))
    path, dot, last = key.rpartition(".")
    wrong = path + dot + draw(misspelled(last))
    known = {name[: len(wrong)] for name in settings} | {folder.name for folder in CONF.iterdir()}
    value = settings[key]
    words = (*base, f"{wrong}={json.dumps(value) if isinstance(value, bool) else value}")
    is_word = not isinstance(value, list) and "\n" not in str(value)  # which would have to be quoted
    return (words, key) if wrong not in known and is_word else draw(wrong_keys())


@st.composite
def wrong_words(draw: DrawFn) -> tuple[str, ...]:
    """A command line with something that is no override."""
    text = st.text("abz09 .,:=+~@/#$%&*!?()[]{}<>'\"\\|;^`-éß模", min_size=1, max_size=12)
    word = draw(st.sampled_from(("method=svd", "ratio=0.5", "seed=1", "calibration.samples=4")))
    kind = draw(st.integers(0, 3))
    if kind == 0:
        return (draw(text.filter(lambda t: not t.startswith("-"))),)
    if kind == 1:
        return (word + draw(text.filter(lambda t: not t[0].isdigit() and t.strip() != "" and t != ".")),)
    if kind == 2:
        return (draw(text.filter(lambda t: not t.startswith(("-", "+", "~", "/")) and t.strip() != "")) + word,)
    return (word.replace("=", draw(st.sampled_from(("", "==", ":", " ", "=[", "={", "='", '="', "=$", "=${"))), 1),)


@dataclass(frozen=True)
class Broken:
    """One way to break a folder or a file: ``words`` say how, ``break_it`` does it."""

    words: str
    break_it: Callable[[Path], None]

    def __repr__(self) -> str:
        return self.words


def _config(change: Callable[[dict[str, Any]], Any], words: str) -> Broken:
    def break_it(folder: Path) -> None:
        file = folder / "config.json"
        changed = json.loads(file.read_text())
        change(changed)
        file.write_text(json.dumps(changed))

    return Broken(words, break_it)


def _weights(change: Callable[[dict[str, Any]], Any], words: str) -> Broken:
    def break_it(folder: Path) -> None:
        file = folder / "model.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file({k: v.contiguous() for k, v in tensors.items()}, file, metadata={"format": "pt"})

    return Broken(words, break_it)


def _file(name: str, change: Callable[[Path], Any], words: str) -> Broken:
    return Broken(f"{name} {words}", lambda folder: change(folder / name))


@st.composite
def broken_folders(draw: DrawFn, folder: Path) -> Broken:
    """A way in which the model in ``folder`` (one safetensors file) is broken or contradicts itself."""
    tensors = load_file(folder / "model.safetensors")
    settings = json.loads((folder / "config.json").read_text())
    names = sorted(tensors)
    kind = draw(st.integers(0, 10))
    if kind == 0:
        name = draw(st.sampled_from(names))
        return _weights(lambda t: t.pop(name), f"lacks {name}")
    if kind == 1:
        name, new = draw(st.sampled_from(names)), draw(st.sampled_from(("module.", "base_model.model.", "x.")))
        return _weights(lambda t: t.update({new + name: t.pop(name)}), f"{name} begins with {new}")
    if kind == 2:
        name = draw(st.sampled_from(names))
        rows = draw(st.integers(1, 3))
        return _weights(lambda t: t.update({name: t[name][:-rows]}), f"{name} lacks {rows} rows")
    if kind == 3:
        name, end = (
            draw(st.sampled_from(names)),
            draw(st.sampled_from(("qweight", "weight_packed", "absmax", "lora_A"))),
        )
        return _weights(
            lambda t: t.update({name.rpartition(".")[0] + "." + end: t.pop(name)}), f"{name} is called {end}"
        )
    if kind == 4:
        numbers = sorted(
            k for k, v in settings.items() if isinstance(v, int) and not isinstance(v, bool) and k in SIZES
        )
        key = draw(st.sampled_from(numbers))
        by = draw(st.sampled_from((-1, 1, 7)))
        return _config(lambda c: c.update({key: c[key] + by}), f"{key} is changed by {by}")
    if kind == 5:
        key = draw(st.sampled_from(("model_type", "hidden_size", "num_hidden_layers", "vocab_size")))
        value = draw(st.sampled_from((None, "large", -3, [1], {}, 0, 1.5, True)))
        return _config(lambda c: c.update({key: value}), f"{key} is {value!r}")
    if kind == 6:
        method = draw(st.sampled_from(("gptq", "awq", "bitsandbytes", "fp8", "hqq", "compressed-tensors", "new")))
        return Broken(f"quantized by {method}", lambda f: _quantized(f, method))
    files = sorted(
        f.name for f in folder.iterdir() if f.name in ("config.json", "model.safetensors", "tokenizer.json")
    )
    name = draw(st.sampled_from(files))
    if kind == 7:
        return _file(name, lambda f: f.unlink(), "is missing")
    if kind == 8:
        share = draw(st.floats(0, 0.99))
        return _file(
            name, lambda f: f.write_bytes(f.read_bytes()[: int(share * f.stat().st_size)]), f"ends at {share}"
        )
    if kind == 9:
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{64 * 'a'}\nsize 268\n"
        return _file(name, lambda f: f.write_text(pointer), "is an LFS pointer")
    garbage = draw(st.binary(min_size=1, max_size=30))
    return _file(name, lambda f: f.write_bytes(garbage), f"holds {garbage!r}")


SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)


def _quantized(folder: Path, method: str) -> None:
    """Make a folder as ``method`` leaves it: packed codes in place of weights, and an entry of config.json."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for name in [name for name in tensors if name.endswith("proj.weight")]:
        weight = tensors.pop(name)
        tensors[name.removesuffix("weight") + "qweight"] = weight.new_zeros(weight.numel() // 8).int()
        tensors[name.removesuffix("weight") + "scales"] = weight.new_ones(1, weight.shape[0])
    save_file(tensors, file, metadata={"format": "pt"})
    settings = json.loads((folder / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": method, "bits": 4, "group_size": 128}
    (folder / "config.json").write_text(json.dumps(settings))


BAD_ROWS = (
    '{"text": null}',
    '{"text": 7}',
    '{"text": ["a"]}',
    '{"text": {"a": 1}}',
    '{"other": "a"}',
    '["a"]',
    "7",
    "null",
    '"text"',
    "{",
    "text",
    '{"text": "a"',
    "{'text': 'a'}",
    '{"text": "a"} {"text": "b"}',
    '{"text": NaN}',
    '{"text": "\\ud800"}',
)


@st.composite
def broken_data(draw: DrawFn, root: Path) -> Broken:
    """A way in which a JSONL of the mirror ``root`` is broken."""
    file = draw(st.sampled_from(sorted(str(f.relative_to(root)) for f in root.rglob("t*.jsonl"))))
    kind = draw(st.integers(0, 3))
    if kind == 0:
        return _file(file, lambda f: f.write_bytes(b""), "is empty")
    if kind == 1:
        junk = draw(st.binary(min_size=1, max_size=20).map(lambda b: b"\xff" + b))
        return _file(file, lambda f: f.write_bytes(f.read_bytes() + junk), f"ends with {junk!r}")
    row, place = draw(st.sampled_from(BAD_ROWS)), draw(st.integers(0, 59))

    def insert(f: Path) -> None:
        rows = f.read_text().splitlines()
        f.write_text("\n".join([*rows[:place], row, *rows[place:]]) + "\n")

    return _file(file, insert, f"line {place + 1} is {row}")


def copied(folder: Path, new: Path, broken: Broken) -> Path:
    """A copy of ``folder`` at ``new``, broken."""
    shutil.rmtree(new, ignore_errors=True)
    shutil.copytree(folder, new)
    broken.break_it(new)
    return new
