"""What a GGUF file says before its numbers: metadata and the table of tensors. Imports no jax.

The layout is that of llama.cpp's GGUF specification (ggml/docs/gguf.md), versions 2 and 3, little-endian. Read in one pass over the bytes:
the vocabulary and merges of a model take 0.1 s instead of the 2 s of the general reader in the `gguf` package, which still dequantises.
"""
from __future__ import annotations

import functools
import math
import mmap
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isara_jax.common import UserError

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}  # value type -> struct letter
STRING, ARRAY = 8, 9


@dataclass(frozen=True)
class Tensor:
    """One entry of the table: `shape` has the outermost axis first, `kind` is ggml's quantisation, `offset` and `size` are bytes."""

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int
    size: int


@dataclass(frozen=True)
class Header:
    """Metadata by key and the tensors in file order."""

    metadata: dict[str, Any]
    tensors: tuple[Tensor, ...]


def read_header(file: Path) -> Header:
    """The header of `file`. Raises `UserError` when it is no GGUF file, or shorter than its own table says."""
    stat = os.stat(file)
    return _read(Path(file), stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=4)
def _read(file: Path, size: int, changed: int) -> Header:
    del changed  # part of the cache key
    if size < 24:
        raise UserError(f"{file} is not a GGUF file: it has {size} bytes. Get it again.")
    with open(file, "rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
        magic, version = struct.unpack_from("<4sI", data)
        if magic != b"GGUF":
            raise UserError(f"{file} is not a GGUF file: it begins with {magic!r}, not b'GGUF'. "
                            "Give a .gguf file or a Hugging Face folder.")
        if version not in (2, 3):
            raise UserError(f"{file} is GGUF version {version}; versions 2 and 3 in little-endian order are read. "
                            "Convert it again with a newer llama.cpp.")
        try:
            header = _Cursor(data, 8).header()
        except (struct.error, UnicodeDecodeError, KeyError, IndexError, OverflowError, MemoryError) as e:
            raise UserError(f"{file} is cut short or damaged: its header does not end within its {size:,} bytes ({type(e).__name__}). "
                            "Get it again.") from None
    needed = max((t.offset + t.size for t in header.tensors), default=0)
    if needed > size:
        raise UserError(f"{file} is cut short: it has {size:,} bytes, its tensors need {needed:,}. Get it again.")
    return header


class _Cursor:
    """A position in the bytes that moves as values are read."""

    def __init__(self, data: mmap.mmap, position: int):
        self.data, self.position = data, position

    def take(self, layout: str) -> tuple[Any, ...]:
        values = struct.unpack_from("<" + layout, self.data, self.position)
        self.position += struct.calcsize("<" + layout)
        return values

    def string(self) -> str:
        (length,) = self.take("Q")
        end = self.position + length
        if end > len(self.data):
            raise IndexError(end)
        self.position, start = end, self.position
        return self.data[start:end].decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            inner, count = self.take("IQ")
            if count > len(self.data):
                raise IndexError(count)
            return list(self.take(f"{count}{SCALARS[inner]}")) if inner in SCALARS else [self.value(inner) for _ in range(count)]
        return self.take(SCALARS[kind])[0]

    def header(self) -> Header:
        n_tensors, n_values = self.take("QQ")
        metadata = {}
        for _ in range(n_values):
            key = self.string()
            metadata[key] = self.value(*self.take("I"))
        table = [self._entry() for _ in range(n_tensors)]
        alignment = int(metadata.get("general.alignment", 32))
        start = -(-self.position // alignment) * alignment
        tensors = (Tensor(name, shape, kind, start + offset, _bytes(shape, kind)) for name, shape, kind, offset in table)
        return Header(metadata, tuple(tensors))

    def _entry(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self.string()
        (axes,) = self.take("I")
        shape = self.take(f"{axes}Q")[::-1]
        return name, shape, *self.take("IQ")


def kind_name(kind: int) -> str:
    """What ggml calls a kind of storage, "Q4_K" for 12; its number where the installed gguf package does not know it."""
    from gguf.constants import GGMLQuantizationType

    try:
        return GGMLQuantizationType(kind).name
    except ValueError:
        return f"number {kind}"


def _bytes(shape: tuple[int, ...], kind: int) -> int:
    """Bytes of a tensor; 0 where its kind is not known, which is refused by name when the tensor is wanted."""
    from gguf.constants import GGML_QUANT_SIZES

    block, block_bytes = GGML_QUANT_SIZES.get(kind, (1, 0))
    return math.prod(shape) // block * block_bytes
