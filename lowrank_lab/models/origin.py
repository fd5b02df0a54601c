"""What the files of a model say of it: the dtype and the size of its weights, its name, its licence. No torch."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowrank_lab.models import gguf, quantized_by_others, weight_files
from lowrank_lab.models.own_config import CARD
from lowrank_lab.models.source import ModelSource

DTYPES = ("float32", "bfloat16", "float16")
STORED = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}  # the same in safetensors and in GGUF files
# A GGUF file of few bits has no dtype for what its codes stand for. In bfloat16 no model overflows, most were
# published in it, and CPUs compute in it; its rounding is far below that of the codes.
OF_CODES = "bfloat16"

LICENCE = ("license", "license_name", "license_link")  # the entries of a model card
LICENCE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "COPYING")
LICENCE_TITLES = {"Apache License": "apache-2.0", "MIT License": "mit"}
HUB = re.compile(r"https?://huggingface\.co/([\w.-]+/[\w.-]+)/?")
# Where a GGUF file says which model it was made from, best first.
GGUF_NAMES = ("general.source.huggingface.repository", "general.source.repo_url", "general.repo_url")


def dtype_of(source: ModelSource) -> str:
    """The dtype of a model's own weights, one of DTYPES.

    That in its config.json; without one, and for a GGUF file of floats, that of most of its weights. OF_CODES for a
    GGUF file of few bits, float32 where nothing is known and for any other dtype.
    """
    if source.kind == "gguf":
        kind = gguf_type(source)
        return STORED.get(kind, OF_CODES)
    settings = source.settings or {}
    nested = [part for part in settings.values() if isinstance(part, Mapping)]
    said = [part.get(name) for part in (settings, *nested) for name in ("dtype", "torch_dtype")]
    found = next((str(dtype).removeprefix("torch.") for dtype in said if isinstance(dtype, str)), None)
    if found is None and source.kind == "folder":
        found = _dtype_of_weights(Path(source.location), settings)
    return found if found in DTYPES else "float32"


def format_of(source: ModelSource) -> str:
    """How its weights are stored, in a word: ``Q4_1`` for a GGUF file, else a dtype."""
    return gguf_type(source) if source.kind == "gguf" else dtype_of(source)


def gguf_type(source: ModelSource) -> str:
    """The ggml type of most weights of a GGUF file."""
    count: Counter[str] = Counter()
    for tensor in gguf.read_header(Path(source.location)).tensors:
        count[gguf.TYPES[tensor.kind][0]] += tensor.values
    return count.most_common(1)[0][0]


def size_of(source: ModelSource) -> int | None:
    """The bytes of the files of its weights; None where they are not here."""
    if source.kind in ("gguf", "onnx"):
        return Path(source.location).stat().st_size
    folder = folder_of(source)
    files = [] if folder is None else weights_in(folder, source.settings or {})
    return sum(file.stat().st_size for file in files) if files and all(file.is_file() for file in files) else None


def weights_in(folder: Path, settings: Mapping[str, Any]) -> list[Path]:
    """The files with the weights of a model folder."""
    file = weight_files.found_in(folder, settings)
    if file is None or not file.name.endswith(".index.json"):
        return [] if file is None else [file]
    shards = json.loads(file.read_text(encoding="utf-8"))["weight_map"].values()
    return [folder / name for name in sorted(set(shards))]


def base_model_of(source: ModelSource) -> str:
    """The name of the model for the card of one that is made from it: that on the hub where it is known."""
    if source.kind == "hub":
        return source.location
    if source.kind == "gguf":
        metadata = gguf.read_header(Path(source.location)).metadata
        said = (_hub_name(metadata.get(name)) for name in GGUF_NAMES)
        return next((name for name in said if name is not None), source.name)
    if quantized_by_others.is_ours(source.settings or {}):  # its own card names the dense model
        return _hub_name(_front_matter(Path(source.location)).get("base_model")) or source.name
    return source.name


def licence_of(source: ModelSource) -> dict[str, str]:
    """Its licence as the entries LICENCE of a model card; empty where it is not known."""
    if source.kind == "gguf":
        metadata = gguf.read_header(Path(source.location)).metadata
        return _licence({name: metadata.get(f"general.{name.replace('_', '.')}") for name in LICENCE})
    folder = folder_of(source, CARD)
    if folder is None:
        return {}
    return _licence(_front_matter(folder)) or _licence({"license": _licence_file(folder)})


def folder_of(source: ModelSource, file: str = "config.json") -> Path | None:
    """The folder of the model's files, for one of the hub in its cache, with ``file``; None where there is none."""
    if source.kind == "folder":
        return Path(source.location)
    if source.kind != "hub":
        return None
    from huggingface_hub import hf_hub_download

    try:  # from the cache, or a small file from the hub
        return Path(hf_hub_download(source.location, file, revision=source.revision)).parent
    except Exception:  # no network, no such file: the hub's client raises many kinds
        return None


def _dtype_of_weights(folder: Path, settings: Mapping[str, Any]) -> str | None:
    """The dtype of most tensors of floats; None where none is known."""
    tensors: dict[str, str] = {}
    for file in weights_in(folder, settings):
        tensors |= weight_files.tensors_in(file)
    count = Counter(STORED[kind] for kind in tensors.values() if kind in STORED)
    return count.most_common(1)[0][0] if count else None


def _front_matter(folder: Path) -> dict[str, Any]:
    """The front matter of a folder's model card; empty where it has none, or a broken one."""
    from huggingface_hub import metadata_load

    try:
        return metadata_load(folder / CARD) or {}
    except Exception:  # no such file, not UTF-8, not YAML, not a mapping
        return {}


def _licence(said: Mapping[str, Any]) -> dict[str, str]:
    """Those entries of ``said`` that another card may have: no path within the model's own folder."""
    found = {
        name: " ".join(said[name].split()) for name in LICENCE if isinstance(said.get(name), str) and said[name]
    }
    if not found.get("license_link", "https://").startswith(("https://", "http://")):
        del found["license_link"]
    return found if "license" in found else {}


def _licence_file(folder: Path) -> str | None:
    """The licence in a folder by its title: ``other`` for an unusual one, None where there is none."""
    file = next((folder / name for name in LICENCE_FILES if (folder / name).is_file()), None)
    if file is None:
        return None
    begin = file.read_text(encoding="utf-8", errors="replace")[:500]
    return next((name for title, name in LICENCE_TITLES.items() if title in begin), "other")


def _hub_name(said: Any) -> str | None:
    """The hub's name in a name or an address of the hub."""
    if not isinstance(said, str):
        return None
    if found := HUB.fullmatch(said):
        return found[1]
    return said if re.fullmatch(r"[\w.-]+/[\w.-]+", said) else None
