"""The weights files of a model folder: which of them transformers reads, and the tensors that they say to hold.

Only headers are read, never values, and nothing in a file is executed. No torch.
"""

from __future__ import annotations

import json
import pickletools
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

NAMES = (  # in the order in which transformers looks for them
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
LARGEST_HEADER = 100_000_000  # bytes, as safetensors itself allows
LEGACY_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # how torch.save began before version 1.6
REBUILT = "torch._utils _rebuild_tensor"  # how the pickle of a tensor begins
STORED = {  # the dtypes of torch.save, as safetensors calls them
    "FloatStorage": "F32",
    "DoubleStorage": "F64",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "ShortStorage": "I16",
    "IntStorage": "I32",
    "LongStorage": "I64",
    "BoolStorage": "BOOL",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
}
TENSOR_PICKLES = ("torch", "collections", "numpy", "_codecs")  # the packages that a pickle of tensors names
POINTER = "is a pointer of Git LFS and not the file itself; get it with: git lfs pull"
RUNS_CODE = (
    "its .bin weights hold more than tensors and are not read, since reading them would run code; convert them to "
    "safetensors where you trust them"
)


class DamagedFile(Exception):
    """What is wrong with a file, to be said after its name: ``is empty``."""


class RunsCode(Exception):
    """A pickle holds more than tensors: what it names."""


def found_in(folder: Path, settings: Mapping[str, Any]) -> Path | None:
    """The file of weights, or the index of several, that transformers reads; None where there is none.

    ``settings`` is the folder's config.json, which may name another file.
    """
    named = settings.get("transformers_weights")
    names = [named] if isinstance(named, str) and Path(named).name == named else NAMES
    return next((folder / name for name in names if (folder / name).is_file()), None)


def tensors_in(file: Path) -> dict[str, str]:
    """The tensors of a safetensors or .bin file, by name, with their dtype as safetensors calls it.

    A .bin file has other strings too: they, and tensors of unusual dtypes, have an empty dtype. Raises DamagedFile,
    and RunsCode for a pickle that holds more than tensors.
    """
    if file.stat().st_size == 0:
        raise DamagedFile("is empty")
    if is_pointer(file):
        raise DamagedFile(POINTER)
    return _in_safetensors(file) if file.suffix == ".safetensors" else _in_pickle(file)


def is_pointer(file: Path) -> bool:
    """Whether Git LFS has left the address of a file in its place."""
    with open(file, "rb") as stream:
        return stream.read(40).startswith(b"version https://git-lfs")


def _in_safetensors(file: Path) -> dict[str, str]:
    size = file.stat().st_size
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > LARGEST_HEADER:
            raise DamagedFile("is not a safetensors file")
        text = stream.read(length)
    if len(text) < length or size < 8:
        raise DamagedFile("ends within its header: it is not complete")
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        dtypes = {name: str(entry["dtype"]) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        raise DamagedFile("is not a safetensors file") from None
    if size != 8 + length + end:
        raise DamagedFile(f"has {size} bytes where its header says {8 + length + end}: it is not complete")
    return dtypes


def _in_pickle(file: Path) -> dict[str, str]:
    """All strings in a pickle of torch.save, in their order, and the dtypes of those that name a tensor."""
    try:
        instructions = _instructions(file)
    except (ValueError, zipfile.BadZipFile, EOFError, NotImplementedError):
        raise DamagedFile("is not a complete file of torch.save") from None
    for name, value in instructions:
        if name in ("GLOBAL", "INST") and str(value).partition(" ")[0].partition(".")[0] not in TENSOR_PICKLES:
            raise RunsCode(str(value).replace(" ", "."))
    strings = {value: "" for _, value in instructions if isinstance(value, str)}
    return {**strings, **_dtypes(instructions)}


def _instructions(file: Path) -> list[tuple[str, Any]]:
    """The instructions of the pickle that has the tensors' names, without the tensors' values."""
    with open(file, "rb") as stream:
        if stream.read(len(LEGACY_TORCH)) == LEGACY_TORCH:
            stream.seek(0)
            for _ in range(3):  # the magic number, the version, and the sizes of integers come first
                list(pickletools.genops(stream))
            return [(code.name, value) for code, value, _ in pickletools.genops(stream)]
    with zipfile.ZipFile(file) as archive:
        [pickled] = [name for name in archive.namelist() if name.rpartition("/")[2] == "data.pkl"]
        return [(code.name, value) for code, value, _ in pickletools.genops(archive.read(pickled))]


def _dtypes(instructions: list[tuple[str, Any]]) -> dict[str, str]:
    """The dtypes of the tensors by name: a name comes just before its tensor, which says its storage's class."""
    memo: dict[int, Any] = {}
    found: dict[str, str] = {}
    value, text, name = None, "", ""
    for code, argument in instructions:
        if code in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = value
            continue
        value = memo.get(argument) if code in ("BINGET", "LONG_BINGET") else argument
        if not isinstance(value, str):
            continue
        dtype = STORED.get(value.removeprefix("torch "))
        if value.startswith(REBUILT):
            name = text
        elif dtype is not None and name:
            found[name] = dtype
        elif " " not in value:  # a class or a function has one
            text = value
    return found
