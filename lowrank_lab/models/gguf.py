"""GGUF files: their header, and what can be known of one before it is converted. No torch.

The format: magic, version, counts, metadata (named values), tensor infos, then the tensors' data, aligned.
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import importlib.util
import math
import mmap
import re
import struct
from collections import defaultdict
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from lowrank_lab.basics.checks import is_count
from lowrank_lab.basics.errors import UserError
from lowrank_lab.models import gguf_vocabulary
from lowrank_lab.models.gguf_vocabulary import short

# The causal language models of which conversions were compared: what they compute is what the model computes that
# llama.cpp's converter was given. transformers reads some more, not all of them rightly.
ARCHITECTURES = (
    "llama",
    "qwen2",
    "qwen3",
    "qwen3moe",
    "gemma2",
    "gemma3",
    "phi3",
    "gpt2",
    "bloom",
    "falcon",
    "stablelm",
    "starcoder2",
    "nemotron",
    "mamba",
)

# What the data of a tensor is called in ggml, by its number, and the values and bytes of one of its blocks.
TYPES = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
}

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_BLOCK = re.compile(r"blk\.(\d+)\.(.+)")


@dataclass(frozen=True)
class Tensor:
    """Where a tensor is: ``shape`` as in torch, ``kind`` its number in TYPES, ``offset`` from the data's begin."""

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int

    @property
    def values(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        _, values, size = TYPES[self.kind]
        return self.values // values * size


@dataclass(frozen=True)
class Header:
    metadata: dict[str, Any]
    tensors: tuple[Tensor, ...]
    data: int  # where the tensors' data begins, in bytes

    @property
    def architecture(self) -> str:
        return short(self.metadata.get("general.architecture"))

    def of_architecture(self, key: str) -> Any:
        """The value of ``key`` among the metadata of the file's architecture, or None."""
        return self.metadata.get(f"{self.architecture}.{key}")


def begins(file: Path) -> bool:
    """Whether a file, whatever its name, begins as a GGUF file."""
    with file.open("rb") as opened:
        return opened.read(4) == b"GGUF"


def read_header(file: Path) -> Header:
    """The header of a GGUF file of version 2 or 3. Raises UserError where it has none, or a broken one."""
    try:
        with file.open("rb") as opened:
            _check_start(file, opened.read(24))
            with mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
                return _Reader(content).header()
    except OSError as error:
        raise UserError(f"model.path={file}: the file cannot be read ({error.strerror})") from None
    except (struct.error, EOFError):
        raise UserError(f"model.path={file}: the file ends within its header; download it again") from None
    except (KeyError, ValueError):
        raise UserError(f"model.path={file}: its header is broken; download it again") from None


def array_size(content: Any, position: int) -> int:
    """The bytes of an array at ``position``: of the kind and the number of its elements, and of these."""
    reader = _Reader(content, position)
    reader.value(_ARRAY)
    return reader.position - position


def read_float32(file: Path, header: Header, name: str) -> np.ndarray | None:
    """The values (number,) of a float32 tensor; None where the file has none of this name and type."""
    for tensor in header.tensors:
        if tensor.name == name and TYPES[tensor.kind][0] == "F32":
            return np.fromfile(file, "<f4", tensor.values, offset=header.data + tensor.offset)
    return None


def tokenizer_beside(file: Path) -> Path | None:
    """The tokenizer.json in the folder of a GGUF file, which is then taken instead of the one in the file."""
    beside = file.parent / "tokenizer.json"
    return beside if beside.is_file() else None


def check(file: Path, tokenizer_beside: bool) -> None:
    """Raise UserError for a file that cannot be converted, as far as its header tells.

    ``tokenizer_beside``: a tokenizer.json is in its folder, and the one in the file is not needed.
    """
    stat = file.stat()
    _check(file, stat.st_size, stat.st_mtime_ns, tokenizer_beside)


@cache  # every cell asks
def _check(file: Path, size: int, changed: int, tokenizer_beside: bool) -> None:
    refuse = lambda why: UserError(f"model.path={file}: {why}")
    if importlib.util.find_spec("gguf") is None:
        raise refuse("reading a GGUF file needs the package gguf; run: pip install gguf")
    header = read_header(file)
    try:
        fault = _fault(header, size) or gguf_vocabulary.fault(header.metadata, tokenizer_beside)
    except (TypeError, ValueError):  # text where a number belongs, and the like
        fault = "its metadata are not of the kinds that the format has; download it again"
    if fault:
        raise refuse(fault)


def _fault(header: Header, size: int) -> str | None:
    if fault := _other_content(header) or _unreadable(header) or _incomplete(header):
        return fault
    end = max(header.data + tensor.offset + tensor.bytes for tensor in header.tensors)
    return f"the file is cut off: it has {size} bytes of {end}; download it again" if end > size else None


def _other_content(header: Header) -> str | None:
    """What else than one language model the file holds."""
    kind = header.metadata.get("general.type", "model")
    if kind != "model" or header.architecture == "clip":
        what = "an image encoder" if kind == "model" else f"a part ({short(kind)})"
        return f"the file holds no language model but {what}"
    if (parts := header.metadata.get("split.count", 1)) > 1:
        return f"the file is one of {parts} parts; join them first: llama-gguf-split --merge FIRST_PART JOINED"
    if not header.tensors:
        return "the file has no weights"
    return None


def _unreadable(header: Header) -> str | None:
    """What transformers could not read."""
    if header.architecture not in ARCHITECTURES:
        return (
            f"{header.architecture} is an architecture that is not read from GGUF files; give the model's folder "
            f"or hub name (read are {', '.join(ARCHITECTURES)})"
        )
    if unknown := sorted({tensor.kind for tensor in header.tensors} - set(TYPES)):
        of = next(tensor.name for tensor in header.tensors if tensor.kind == unknown[0])
        return f"its {of} is of ggml type {unknown[0]}, which is not read; take another quantization of the model"
    uneven = [t.name for t in header.tensors if not t.shape or t.shape[-1] % TYPES[t.kind][1]]
    if uneven:
        return f"the shape of its {uneven[0]} does not fit its type; download it again"
    scaling = header.of_architecture("rope.scaling.type")
    if scaling not in (None, "none"):
        scaled = f"its rotary positions are scaled ({short(scaling)})"
        return f"{scaled}, which is not read from GGUF files; give its folder or hub name"
    return None


def _incomplete(header: Header) -> str | None:
    """What the file lacks. Whether the model needs more is only known when it is loaded."""
    names = {tensor.name: tensor for tensor in header.tensors}
    if len(names) != len(header.tensors):
        return "two of its tensors have one name; download it again"
    for name in ("token_embd.weight", "output_norm.weight"):
        if name not in names:
            return f"the file is incomplete: it has no {name}"
    layers = header.of_architecture("block_count")
    if not is_count(layers, 1):
        return (
            f"its {header.architecture}.block_count is {short(layers)}, not a number of blocks; download it again"
        )
    blocks: dict[int, set[str]] = defaultdict(set)
    for name in names:
        if match := _BLOCK.fullmatch(name):
            blocks[int(match[1])].add(match[2])
    if extra := sorted(set(blocks) - set(range(layers))):
        return f"its {header.architecture}.block_count is {layers}, but it has a block {extra[0]}"
    needed = set[str]().union(*blocks.values())  # all blocks of these architectures are alike
    for block in range(layers):
        if not blocks[block]:
            return f"the file is incomplete: it has no tensors of block {block}"
        if missing := sorted(needed - blocks[block]):
            return f"the file is incomplete: it has no blk.{block}.{missing[0]}"
    rows, tokens = names["token_embd.weight"].shape[0], header.metadata.get("tokenizer.ggml.tokens")
    if tokens is not None and rows < len(tokens):
        return f"its vocabulary has {len(tokens)} tokens, but its embedding has {rows} rows"
    return None


def _check_start(file: Path, start: bytes) -> None:
    refuse = lambda why: UserError(f"model.path={file}: {why}")
    if not start:
        raise refuse("the file is empty; download it again")
    if start.startswith(b"version https://git-lfs"):
        raise refuse("the file is a pointer of git LFS, not the model; run: git lfs pull")
    if start[:4] != b"GGUF":
        raise refuse("this is no GGUF file (it does not begin with GGUF); give one, or a folder with config.json")
    if len(start) < 24:
        raise refuse("the file ends within its header; download it again")
    [version] = struct.unpack_from("<I", start, 4)
    if version & 0xFFFF == 0:
        raise refuse("the file is big-endian; only little-endian GGUF files are read")
    if version not in (2, 3):
        raise refuse(f"the file is of GGUF version {version}; versions 2 and 3 are read")


class _Reader:
    """Reads a header from its begin to its end. Raises EOFError or struct.error where the content ends before."""

    def __init__(self, content: Any, position: int = 8):  # after magic and version
        self.content = content
        self.position = position

    def header(self) -> Header:
        tensors, values = self.scalar("Q"), self.scalar("Q")
        metadata = {}
        for _ in range(values):
            name = self.string()
            metadata[name] = self.value(self.scalar("I"))
        infos = tuple(self.tensor() for _ in range(tensors))
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment <= 0:
            raise ValueError("alignment")
        return Header(metadata, infos, -(-self.position // alignment) * alignment)

    def tensor(self) -> Tensor:
        name = self.string()
        shape = tuple(self.scalar("Q") for _ in range(self.scalar("I")))
        return Tensor(name, shape[::-1], self.scalar("I"), self.scalar("Q"))

    def scalar(self, code: str) -> Any:
        [value] = struct.unpack_from(f"<{code}", self.content, self.position)
        self.position += struct.calcsize(f"<{code}")
        return value

    def string(self) -> str:
        size = self.scalar("Q")
        return self._take(size).decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.scalar(_SCALARS[kind])
        kind, size = self.scalar("I"), self.scalar("Q")
        if kind in _SCALARS:
            width = struct.calcsize(f"<{_SCALARS[kind]}")
            return list(struct.unpack(f"<{size}{_SCALARS[kind]}", self._take(size * width)))
        return self.strings(size) if kind == _STRING else [self.value(kind) for _ in range(size)]

    def strings(self, count: int) -> list[str]:
        """Many strings; a vocabulary and its merges are most of what there is to read, so this is a plain loop."""
        content, position, found = self.content, self.position, []
        length, end = struct.Struct("<Q").unpack_from, len(self.content)
        for _ in range(count):
            start = position + 8
            position = start + length(content, position)[0]
            if position > end:
                raise EOFError
            found.append(bytes(content[start:position]).decode("utf-8", "replace"))
        self.position = position
        return found

    def _take(self, size: int) -> bytes:
        end = self.position + size
        if end > len(self.content):
            raise EOFError
        taken = bytes(self.content[self.position : end])
        self.position = end
        return taken
