"""Reading the tensors of a GGUF file: any part of one, dequantised, in a dtype, without mapping the file or holding more than a few rows.

A row of a tensor is a whole number of quantisation blocks, so rows can be read on their own. The blocks are undone by the `gguf` package.
"""
from __future__ import annotations

import math
import os
from dataclasses import dataclass
from types import TracebackType
from typing import Sequence

import numpy as np

from isara_jax.common import UserError
from isara_jax.models.gguf_header import Tensor, kind_name
from isara_jax.models.tensors import empty

# Kinds of files that people quantise to: F32 to Q8_0 as a whole, the others also in the mixtures that llama.cpp calls Q4_K_M and the like.
KINDS = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K")
SLICE = 8 << 20  # bytes of float32 values that are undone at a time; undoing takes several times as much for a moment


def problems(tensors: Sequence[Tensor]) -> list[str]:
    """What is wrong with how tensors are stored: kinds that are not read, rows that are no whole blocks."""
    import gguf

    other: dict[str, list[str]] = {}
    found = []
    for tensor in tensors:
        if (kind := kind_name(tensor.kind)) not in KINDS:
            other.setdefault(kind, []).append(tensor.name)
        elif tensor.shape and tensor.shape[-1] % (block := gguf.GGML_QUANT_SIZES[tensor.kind][0]):
            found.append(f"{tensor.name} is {kind} with rows of {tensor.shape[-1]} values, which are no whole blocks of {block}")
    for kind, names in other.items():
        found.append(f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''} of kind {kind} (supported: {', '.join(KINDS)})")
    return found


@dataclass(frozen=True)
class Heads:
    """Query and key rows lie in the file with the two rotary halves of each head interleaved (convert_hf_to_gguf.py, LlamaModel.permute).

    Attributes:
        width: rows of a head.
    """

    width: int

    def ours(self, stored: np.ndarray) -> np.ndarray:
        """The rows of our tensor that rows of the file are: pair p of a head is at 2p and 2p + 1 there, at p and width / 2 + p here."""
        head, row = np.divmod(stored, self.width)
        return head * self.width + row % 2 * (self.width // 2) + row // 2


class Reader:
    """An open GGUF file. One buffer is used for all reads."""

    def __init__(self, file: os.PathLike[str]):
        self.file, self._fd, self._buffer = file, os.open(file, os.O_RDONLY), bytearray()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        os.close(self._fd)

    def part(self, tensor: Tensor, rows: slice, columns: slice, dtype: np.dtype, *, heads: Heads | None = None,
             transposed: bool = False) -> np.ndarray:
        """Some rows and columns of a tensor [rows, columns], in our order of rows, in memory that jax can keep.

        Args:
            rows, columns: slices without steps, in our order. A vector is one row.
            transposed: give it as [columns, rows].
        """
        height, width = tensor.shape if len(tensor.shape) == 2 else (1, *tensor.shape)
        (top, bottom, _), (left, right, _) = rows.indices(height), columns.indices(width)
        size = heads.width if heads else 1
        first, last = top // size * size, min(height, -(-bottom // size) * size)  # whole heads
        shape = (bottom - top, right - left)
        out = empty(shape[::-1] if transposed else shape, dtype)
        target = out.T if transposed else out
        step = max(1, SLICE // (4 * width))
        for start in range(first, last, step):
            stop = min(start + step, last)
            values = self._values(tensor, start, stop, width)[:, left:right]
            if heads:
                places = heads.ours(np.arange(start, stop)) - top
                kept = (places >= 0) & (places < bottom - top)
                target[places[kept]] = values[kept]
            else:
                target[start - top:stop - top] = values
        return out

    def _values(self, tensor: Tensor, start: int, stop: int, width: int) -> np.ndarray:
        """float32 [stop - start, width]: rows as the file has them."""
        from gguf import quants
        from gguf.constants import GGMLQuantizationType

        size = tensor.size // (math.prod(tensor.shape) // width)  # bytes of a row
        raw = np.frombuffer(self._read(tensor.offset + start * size, (stop - start) * size), np.uint8)
        return quants.dequantize(raw.reshape(stop - start, -1), GGMLQuantizationType(tensor.kind)).reshape(stop - start, width)

    def _read(self, offset: int, size: int) -> memoryview:
        if len(self._buffer) < size:
            self._buffer = bytearray(size)
        view, got = memoryview(self._buffer)[:size], 0
        while got < size:
            if (n := os.preadv(self._fd, [view[got:]], offset + got)) == 0:
                raise UserError(f"{self.file} ended while it was read, after {offset + got:,} bytes. Get it again.")
            got += n
        return view
