"""ONNX files: their tensors, and which operation reads each, out of the protocol buffers. No torch.

A file is a ModelProto: its field 7 is the graph, whose fields 1 are operations and 5 are tensors. What is read here
is little enough that the package onnx is not needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lowrank_lab.basics.errors import UserError

MODEL_TYPE = "dinov2"  # of all that onnx_conversion.py reads
HEAD = Path(__file__).parent / "mnist_head_of_dinov2_small.safetensors"
FLOAT = 1  # TensorProto.DataType

Value = int | memoryview


@dataclass
class Graph:
    """What is in a file.

    tensors   by name
    products  by name of a tensor, the outputs of the products of matrices that read it
    """

    tensors: dict[str, np.ndarray] = field(default_factory=dict)
    products: dict[str, list[str]] = field(default_factory=dict)


def read(file: Path) -> Graph:
    """The float tensors of a file, mapped from it. Raises UserError for one that cannot be read."""
    graph, operations = Graph(), []
    try:
        content: Any = np.memmap(file, dtype=np.uint8, mode="r")
        for number, value in _fields(memoryview(content)):
            for inner, part in _fields(_bytes(value)) if number == 7 else ():
                if inner == 5:
                    graph.tensors.update(_tensor(_bytes(part)))
                elif inner == 1:
                    operations.append(list(_fields(_bytes(part))))
        for operation in operations:
            text = lambda number, fields=operation: [bytes(_bytes(v)).decode() for n, v in fields if n == number]
            if text(4) == ["MatMul"]:
                for name in text(1):
                    graph.products.setdefault(name, []).append(text(2)[0])
    except (IndexError, ValueError, TypeError, UnicodeDecodeError):
        raise UserError(f"model.path={file}: no ONNX file, or an incomplete one; get it again") from None
    if not graph.tensors:
        raise UserError(f"model.path={file}: no ONNX file with weights in it")
    return graph


def _tensor(content: memoryview) -> Iterator[tuple[str, np.ndarray]]:
    """The name and the values of a TensorProto of floats with raw data; nothing for another one."""
    shape: list[int] = []
    name, kind, raw = "", 0, memoryview(b"")
    for number, value in _fields(content):
        if number == 1:
            shape += [value] if isinstance(value, int) else list(_varints(value))
        elif number == 2:
            kind = int(value) if isinstance(value, int) else 0
        elif number == 8:
            name = bytes(_bytes(value)).decode()
        elif number == 9:
            raw = _bytes(value)
    if kind == FLOAT and len(raw):
        yield name, np.frombuffer(raw, dtype="<f4").reshape(shape)


def _fields(content: memoryview) -> Iterator[tuple[int, Value]]:
    """The number and the value of each field of a message."""
    place = 0
    while place < len(content):
        tag, place = _varint(content, place)
        kind = tag & 7
        if kind == 0:
            value, place = _varint(content, place)
            yield tag >> 3, value
            continue
        length = {1: 8, 5: 4}.get(kind)
        if length is None:
            if kind != 2:
                raise ValueError(f"wire type {kind}")
            length, place = _varint(content, place)
        if place + length > len(content):
            raise ValueError("the file ends within a field")
        yield tag >> 3, content[place : place + length]
        place += length


def _varints(content: memoryview) -> Iterator[int]:
    place = 0
    while place < len(content):
        value, place = _varint(content, place)
        yield value


def _varint(content: memoryview, place: int) -> tuple[int, int]:
    """A number of seven bits a byte, the lowest first, and the place after it."""
    value = shift = 0
    while True:
        byte = content[place]
        place += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, place


def _bytes(value: Value) -> memoryview:
    if isinstance(value, int):
        raise TypeError("a number instead of a message")
    return value
