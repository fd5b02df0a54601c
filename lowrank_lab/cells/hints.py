"""What a user is told of a mistake on the command line: one line that says what to write. No torch."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob
from omegaconf import DictConfig, OmegaConf

from lowrank_lab.basics.errors import UserError
from lowrank_lab.basics.paths import RUN
from lowrank_lab.cells.paths import PATHS
from lowrank_lab.cells.spelling import is_parsed, quoted

MERGING = "Error merging override "
NOT_ONE_PATH = re.compile(r"[,{}\[\]()$\\]|^\d+$")  # Hydra does not read it as this text


def one_line(
    error: Exception, config_dir: Path, words: list[str], composed: Callable[[list[str]], DictConfig]
) -> str:
    """The error of Hydra or OmegaConf on ``words``; ``composed`` gives the configuration of some of them."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    first = lines[0]
    for beginning in ("Could not load '", "Could not find '"):
        if beginning in first:
            group, _, option = first.split(beginning)[1].partition("'")[0].rpartition("/")
            return _no_option(config_dir, group, option, _listed(lines))
    if first.startswith("Could not override '"):
        return _no_setting(config_dir, first.split("'")[1], words, composed)
    if first.startswith(MERGING):
        return _other_kind(first.removeprefix(MERGING), words, composed)
    if first.startswith("Ambiguous value"):
        return _several(first.removesuffix("."), words)
    if first == "ConfigLoader is not set":
        return "glob() of an experiment's own sweep is not read; list the options in its YAML"
    if wrong := [word for word in words if not is_parsed(word)]:
        return _not_parsed(config_dir, wrong[0])
    if "nterpolation" in str(error) and any("${" in word for word in words):
        return f"{' '.join(lines)}; a folder with ${{ in its name needs a link with another name"
    return " ".join(lines)


def amended(message: str, words: list[str]) -> str:
    """A message on a path that Hydra has read otherwise than it was meant, with how to write it."""
    for word in words:
        key, _, value = word.partition("=")
        is_path = key in PATHS and value[:1] not in ("'", '"')
        if is_path and message.startswith(f"{key}=") and NOT_ONE_PATH.search(value):
            return f"{message}; if it is one name, write {quoted(word)}"
    if message.startswith("ratio=") and any(re.fullmatch(r"ratio=0,\d+", word) for word in words):
        return f"{message}; write a decimal point, as in ratio=0.8"
    return message


def unknown_flag(flag: str, words: list[str]) -> str:
    """A word with dashes that is none of Hydra's."""
    name, equals, value = flag.lstrip("-").partition("=")
    following = words[words.index(flag) + 1 :][:1] if flag in words else []
    if not equals and following and "=" not in following[0] and not following[0].startswith("-"):
        value = following[0]
    return f"{flag}: no such flag; settings have no dashes, write {name or 'key'}={value or '...'}"


def options_of(config_dir: Path, group: str) -> list[str]:
    """The options of an axis, without what only other options include."""
    return sorted(file.stem for file in (config_dir / group).glob("*.yaml") if not file.stem.startswith("_"))


def without_globs(config_dirs: list[Path], words: list[str]) -> list[str]:
    """``words`` with each ``axis=glob(...)`` as the list of the options that it chooses.

    Hydra finds these only where it parses words itself, and includes those that only other options include.
    Raises UserError where there is no such option.
    """
    return [_without_glob(config_dirs, word) if "=glob(" in word and is_parsed(word) else word for word in words]


def _without_glob(config_dirs: list[Path], word: str) -> str:
    override = OverridesParser.create().parse_override(word)
    group, glob = override.key_or_group, override.value()
    if not isinstance(glob, Glob):
        return word
    options = sorted({option for folder in config_dirs for option in options_of(folder, group)})
    if not options:
        raise UserError(
            f"{word}: glob() chooses among the options of an axis, and {group} is none; list the values"
        )
    if not (chosen := glob.filter(options)):
        raise UserError(f"{word}: no such option; choose some of {', '.join(options)}")
    listed = ",".join(chosen)
    return f"{override.get_key_element()}={f'[{listed}]' if group == 'eval' else listed}"


def described(config_dir: Path, group: str) -> str:
    """A line for each option of an axis: its name, and the first sentence of its YAML."""
    lines = []
    for option in options_of(config_dir, group):
        text = (config_dir / group / f"{option}.yaml").read_text(encoding="utf-8")
        comments = [line[2:] for line in text.splitlines() if line.startswith("# ") and "@package" not in line]
        sentence = re.match(r".*?\.(?= +[A-Z(]|$)", first := comments[0].partition("   ")[0])
        lines.append(f"  {option:22}{sentence[0] if sentence else first}")
    return "\n".join(lines)


def _axes_with(config_dir: Path, option: str) -> list[str]:
    """The axes that have such an option."""
    return [axis.name for axis in sorted(config_dir.iterdir()) if option in options_of(config_dir, axis.name)]


def _near(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name.lower().replace("-", "_"), [*known], n=1, cutoff=0.5)
    return near[0] if near else ""


def _listed(lines: list[str]) -> list[str]:
    """The options that Hydra's message lists, of folders of the user's own too."""
    end = lines.index("Config search path:") if "Config search path:" in lines else 2
    return [option for option in lines[2:end] if not option.startswith("_")]


def _no_option(config_dir: Path, group: str, option: str, listed: list[str]) -> str:
    options = listed or options_of(config_dir, group)
    hint = f"did you mean {near}? " if (near := _near(option, options)) else ""
    if elsewhere := _axes_with(config_dir, option):
        hint = f"it is one of {elsewhere[0]}, {elsewhere[0]}={option}. "
    return f"{group}={option}: no such option; {hint}choose one of {', '.join(options)}"


def _no_setting(config_dir: Path, key: str, words: list[str], composed: Callable[[list[str]], DictConfig]) -> str:
    others = [word for word in words if word.partition("=")[0] != key]
    known, swept = [], ""
    with suppress(Exception):  # the other words are wrong as well
        cfg = composed(others)
        known, swept = _settings(cfg), _swept_with(config_dir, key, cfg, others, composed)
    if swept:
        return f"{key}: a setting of options that the experiment sweeps; name those that have it as well: {swept}"
    if "." in key:
        hint = f"did you mean {near}? " if (near := _near(key, known)) and near != key else ""
        return (
            f"{key}: no such setting with these options; {hint}{RUN} ... --cfg job shows them "
            "(an entry that is new begins with +)"
        )
    axis, _, part = key.partition("/")
    if part and (config_dir / axis / part).is_dir():
        return f"{key}: choose an option of {axis} as well ({axis}=...; --help lists them)"
    axes = [folder.name for folder in config_dir.iterdir() if folder.is_dir()]
    if inner := [name for name in known if name.rpartition(".")[2] == key]:
        hint = f"did you mean {' or '.join(sorted(inner)[:3])}?"
    else:
        near = _near(key, [*axes, *_top_settings(config_dir)])
        hint = f"did you mean {near}?" if near else f"{RUN} --help lists the axes"
    return f"{key}: no such setting; {hint}"


def _other_kind(word: str, words: list[str], composed: Callable[[list[str]], DictConfig]) -> str:
    """A list or a single value for what has named entries."""
    key = word.partition("=")[0].lstrip("+")
    entries: list[str] = []
    with suppress(Exception):  # the other words are wrong as well
        node = OmegaConf.select(composed([other for other in words if other != word]), key)
        entries = [name for name in map(str, node) if name[0] != "_"] if isinstance(node, DictConfig) else []
    if entries:
        first = f"{key}.{entries[0]}"
        return (
            f"{word}: {key} has named entries ({', '.join(entries)}); change one with {first}=..., "
            f"leave one out with ~{first}, add one with +{key}.NAME=..."
        )
    return f"{word}: not a value that {key} can have"


def _swept_with(
    config_dir: Path, key: str, cfg: DictConfig, words: list[str], composed: Callable[[list[str]], DictConfig]
) -> str:
    """The options that an experiment sweeps and that have the setting ``key``, as a word; "" where none has it."""
    given = {word.partition("=")[0] for word in words}
    for axis, values in (OmegaConf.select(cfg, "hydra.sweeper.params") or {}).items():
        if not (config_dir / str(axis)).is_dir() or axis in given:
            continue
        options = [option.strip() for option in str(values).split(",")]
        if found := [one for one in options if key in _settings(composed([*words, f"{axis}={one}"]))]:
            return f"{axis}={','.join(found)}"
    return ""


def _settings(cfg: DictConfig) -> list[str]:
    """The names of all values of a configuration, as on the command line."""
    names = []
    nodes: list[tuple[str, Any]] = [("", OmegaConf.to_container(cfg, resolve=False))]
    while nodes:
        prefix, node = nodes.pop()
        for name, value in node.items() if isinstance(node, dict) else ():
            if name not in ("hydra", "compressions", "scale") and not str(name).startswith("_"):
                names.append(f"{prefix}{name}")
                nodes.append((f"{prefix}{name}.", value))
    return names


def _top_settings(config_dir: Path) -> list[str]:
    text = (config_dir / "config.yaml").read_text(encoding="utf-8")
    return [line.split(":")[0] for line in text.splitlines() if line[:1].isalpha()]


def _several(first: str, words: list[str]) -> str:
    """Several values without -m."""
    for word in words:
        key, _, value = word.partition("=")
        if first.startswith("Ambiguous value for argument") and word in first:
            if re.fullmatch(r"\d+,\d+", value) and key in ("ratio", "sparsity"):
                point = value.replace(",", ".")
                return f"{word}: write a decimal point, {key}={point}; several values need -m"
            if key in PATHS:
                return f"{first}: to run several values as a grid, add -m; if it is one name, write {quoted(word)}"
    return f"{first}: to run several values as a grid, add -m"


def _not_parsed(config_dir: Path, word: str) -> str:
    """A word that is no key=value, or whose value Hydra does not take without quotes."""
    key, equals, value = word.partition("=")
    if not equals:
        axes = _axes_with(config_dir, word)
        return f"{word}: write key=value, {f'{axes[0]}={word}' if axes else 'as in method=svdllm'}"
    if not re.fullmatch(r"[+~]{0,2}[\w$./@:-]+", key) or key.endswith("."):
        return f"{word}: '{key}' is no name of a setting; write key=value, as in ratio=0.8"
    if value.endswith(",") and is_parsed(word.rstrip(",")):
        return f"{word}: nothing follows the last comma; write {word.rstrip(',')}"
    return f"{word}: its value must be quoted; write {quoted(word)}"
