"""Safetensors files without mapped pages: headers checked whole, tensors read with pread in slices of rows, files written as a stream.

The format (huggingface/safetensors): eight bytes little-endian that give the length of a JSON header, the header {name: {dtype, shape,
data_offsets}}, then the data, without gaps. A mapped file counts to a process's resident memory as it is read; what is read here goes
through one buffer that is used again. Imports no jax.
"""
from __future__ import annotations

import contextlib
import json
import math
import mmap
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, Mapping

import ml_dtypes
import numpy as np

from isara_jax.common import UserError
from isara_jax.models.resolve import read_json

BLOCK = 16 << 20        # bytes read at once
LARGE = 1 << 20         # bytes from which an array has pages of its own
LONGEST = 100_000_000   # bytes of a header, as the safetensors package allows
LISTED = 200            # problems that one message spells out
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "I64": np.int64, "I32": np.int32,
          "I16": np.int16, "I8": np.int8, "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8, "BOOL": np.bool_,
          "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2}
FLOATS = ("F64", "F32", "F16", "BF16")  # what becomes a weight without a scale of its own


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies: bytes [start, end) of `file`; `dtype` as the format names it."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one row, which is all but the first axis."""
        return (self.end - self.start) // max(1, self.shape[0] if self.shape else 1)


@dataclass
class Checkpoint:
    """The tensors of a model folder by name. `problems` are what its files contradict each other in (`fit` raises them)."""

    folder: Path
    entries: dict[str, Stored]
    problems: list[str] = field(default_factory=list)
    _buffer: np.ndarray = field(default_factory=lambda: empty((0,), np.uint8), init=False, repr=False)

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        """A tensor, or some rows of it, in memory of its own."""
        stored = self._known(name)
        start, stop, _ = (rows or slice(None)).indices(stored.shape[0] if stored.shape else 1)
        out = empty((max(0, stop - start), *stored.shape[1:]) if stored.shape else (), DTYPES[stored.dtype])
        with _opened(stored.file) as descriptor:
            _pread(descriptor, out.reshape(-1).view(np.uint8), stored.start + start * stored.row_bytes, stored.file)
        return out

    def blocks(self, name: str, start: int = 0, stop: int | None = None,
               columns: tuple[int, int] | None = None) -> Iterator[tuple[int, np.ndarray]]:
        """Rows [start, stop) in pieces of about 16 MiB: (first row, array [rows, values of a row]).

        The arrays are views of one buffer: each is good until the next one is asked for. With `columns` = (first, end) they hold these
        values of each row alone, and no more is read than they and what lies between them in at most one half.
        """
        stored = self._known(name)
        stop = (stored.shape[0] if stored.shape else 1) if stop is None else stop
        dtype, row = np.dtype(DTYPES[stored.dtype]), stored.row_bytes
        left, right = (0, row) if columns is None else (columns[0] * dtype.itemsize, columns[1] * dtype.itemsize)
        apart = right - left <= row // 2  # then the parts of the rows are read one by one
        size = right - left if apart else row
        step = max(1, BLOCK // max(1, size))
        with _opened(stored.file) as descriptor:
            for first in range(start, stop, step):
                count = min(step, stop - first)
                if self._buffer.nbytes < count * size:
                    self._buffer = empty((count * size,), np.uint8)
                view, at = self._buffer[:count * size], stored.start + first * row
                if apart:
                    for i in range(count):
                        _pread(descriptor, view[i * size:(i + 1) * size], at + i * row + left, stored.file)
                else:
                    _pread(descriptor, view, at, stored.file)
                block = view.view(dtype).reshape(count, -1)
                yield first, block if apart else block[:, left // dtype.itemsize:right // dtype.itemsize]

    def _known(self, name: str) -> Stored:
        stored = self.entries[name]
        if stored.dtype not in DTYPES:
            raise UserError(f"{stored.file}: {name} is stored as {stored.dtype}; read are {', '.join(DTYPES)}.")
        return stored


def empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An array of any content whose memory begins at a multiple of 64 bytes, so that jax on a CPU takes it as it is, without a copy.

    Large ones are small pages of their own: numpy would ask for huge ones, and while the kernel clears room for them, after files of
    gigabytes were read, a load took two to three times as long.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if size >= LARGE:
        pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        return np.frombuffer(pages, np.uint8).view(dtype).reshape(shape)
    memory = np.empty(size + 64, np.uint8)
    first = -memory.ctypes.data % 64
    return memory[first:first + size].view(dtype).reshape(shape)


# ------------------------------------------------------------------------------------------------------------------- folders
def open_folder(folder: Path) -> Checkpoint:
    """The tensors of model.safetensors, or of the files that its index names, or of all *.safetensors.

    Reads headers only. Raises `UserError` for a file that is not whole, and for an index that names a missing file or one outside the
    folder; names that two files have, or that the index places wrongly, are `Checkpoint.problems`.
    """
    entries: dict[str, Stored] = {}
    problems = []
    for file in weight_files(folder):
        for name, stored in read_header(file).items():
            if name in entries:
                problems.append(f"{name} is in {entries[name].file.name} and in {file.name}")
            entries[name] = stored
    if not (folder / SINGLE).exists() and (folder / INDEX).exists():
        doubled = {line.split(" ")[0] for line in problems}
        for name, file in _weight_map(folder).items():
            if name not in entries:
                problems.append(f"{name} is in none of the files, and {INDEX} names {file} for it")
            elif entries[name].file.name != file and name not in doubled:
                problems.append(f"{name} is in {entries[name].file.name}, and {INDEX} names {file} for it")
    return Checkpoint(folder, entries, problems)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder: model.safetensors, or those its index names, or all. Names in an index cannot leave the folder."""
    if (folder / SINGLE).exists():
        return [folder / SINGLE]
    index = folder / INDEX
    if not index.exists():
        return sorted(folder.glob("*.safetensors"))
    files = []
    for name in sorted(set(_weight_map(folder).values())):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise UserError(f"{index} names {name!r}, which is not a .safetensors file of this folder; it is not read. "
                            "Get the folder again.")
        if not (folder / name).is_file():
            raise UserError(f"{index} names {name}, which is not in {folder}. The download is unfinished; get it again.")
        files.append(folder / name)
    if not files:
        raise UserError(f"{index} names no files. The folder is damaged; get it again.")
    return files


def _weight_map(folder: Path) -> dict[str, str]:
    index = folder / INDEX
    named = read_json(index).get("weight_map", {})
    if not isinstance(named, dict):
        raise UserError(f"{index}: weight_map is a {type(named).__name__}, not an object. The folder is damaged; get it again.")
    for file in named.values():
        if not isinstance(file, str):
            raise UserError(f"{index} names {file!r}, which is not a .safetensors file of this folder; it is not read. "
                            "Get the folder again.")
    return named


def fit(checkpoint: Checkpoint, wanted: Mapping[str, tuple[int, ...]], ignored: Callable[[str], bool], *, says: str = "config.json",
        canonical: Callable[[str], str] = lambda name: name) -> dict[str, str]:
    """Wanted key -> name in the checkpoint, once the tensors are exactly the wanted ones.

    Args:
        wanted: the shape of each tensor there should be.
        ignored: whether a tensor may be there for nothing.
        says: the file that the shapes come from, for the message.
        canonical: name in the checkpoint -> the wanted key it spells.

    Raises one `UserError` that lists every missing, unexpected, duplicate or wrongly shaped tensor, and `checkpoint.problems`.
    """
    found: dict[str, str] = {}
    problems, unexpected = list(checkpoint.problems), []
    for name in checkpoint.entries:
        key = canonical(name)
        if key not in wanted:
            unexpected += [] if ignored(name) else [f"{name} is unexpected"]
        elif key in found:
            problems.append(f"{found[key]} and {name} are the same tensor")
        else:
            found[key] = name
    problems += [f"{key} is missing" for key in wanted if key not in found] + unexpected
    for key, name in ((k, found[k]) for k in wanted if k in found):
        stored = checkpoint.entries[name]
        if stored.shape != tuple(wanted[key]):
            problems.append(f"{name} has shape {list(stored.shape)}, {says} says {list(wanted[key])}")
        if stored.dtype not in FLOATS:
            problems.append(f"{name} is stored as {stored.dtype}; read are {', '.join(FLOATS)}")
    if problems:
        raise UserError(f"{checkpoint.folder}: the weights do not fit {says}: one is of another model, or damaged. Get the folder "
                        "again.\n  " + "\n  ".join(problems[:LISTED])
                        + (f"\n  and {len(problems) - LISTED} more" if len(problems) > LISTED else ""))
    return found


# ------------------------------------------------------------------------------------------------------------------- headers
def read_header(file: Path) -> dict[str, Stored]:
    """The tensors of one file by name, in the file's order. Raises `UserError` for a file that is not whole or contradicts itself."""
    try:
        with open(file, "rb") as f:
            size = os.fstat(f.fileno()).st_size
            length = int.from_bytes(f.read(8), "little")
            if size < 8 or not 2 <= length <= min(LONGEST, size - 8):
                raise _broken(file, f"it has {size:,} bytes, its header would need {length:,}")
            header = json.loads(f.read(length).decode(), object_pairs_hook=_no_twins)
    except OSError as e:
        raise UserError(f"{file} cannot be read: {e.strerror}.") from None
    except (ValueError, RecursionError) as e:
        raise _broken(file, f"its header is no JSON that can be used: {e}") from None
    if not isinstance(header, dict):
        raise _broken(file, f"its header is a {type(header).__name__}")
    header.pop("__metadata__", None)
    tensors = {name: _stored(file, name, entry, 8 + length) for name, entry in header.items()}
    end = 8 + length
    for name, stored in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if stored.start != end:
            how = "within" if stored.start < end else "behind a gap after"
            raise _broken(file, f"{name} begins at byte {stored.start:,}, {how} what lies before it, which ends at {end:,}")
        end = stored.end
    if end != size:
        raise _broken(file, f"it has {size:,} bytes, its tensors need {end:,}")
    return tensors


def _stored(file: Path, name: str, entry: Any, data: int) -> Stored:
    whole = lambda x: isinstance(x, int) and not isinstance(x, bool) and x >= 0
    try:
        dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        sound = isinstance(dtype, str) and all(map(whole, (*shape, start, end))) and start <= end
    except (TypeError, KeyError, ValueError):
        sound = False
    if not sound:
        raise _broken(file, f"the header's entry of {name} is not dtype, shape and data_offsets")
    if dtype in DTYPES and math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize != end - start:
        raise _broken(file, f"{name} has {end - start:,} bytes, which is not {dtype} {list(shape)}")
    return Stored(file, dtype, tuple(shape), data + start, data + end)


def _no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for name, value in pairs:
        if name in made:
            raise ValueError(f"{name} is there twice")
        made[name] = value
    return made


def _broken(file: Path, why: str) -> UserError:
    return UserError(f"{file} is not a whole safetensors file: {why}. The download may be cut short; get it again.")


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[int]:
    try:
        descriptor = os.open(file, os.O_RDONLY)
    except OSError as e:
        raise UserError(f"{file} cannot be read: {e.strerror}.") from None
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _pread(descriptor: int, into: np.ndarray, offset: int, file: Path) -> None:
    done, view = 0, memoryview(into)
    while done < len(view):
        try:
            count = os.preadv(descriptor, [view[done:]], offset + done)
        except OSError as e:
            raise UserError(f"{file} cannot be read at byte {offset + done:,}: {e.strerror}.") from None
        if not count:
            raise UserError(f"{file} ended at byte {offset + done:,} while it was read: it became shorter. Get it again.")
        done += count


# ------------------------------------------------------------------------------------------------------------------- writing
def write_file(path: Path, tensors: Iterable[tuple[str, str, tuple[int, ...], Iterable[np.ndarray]]],
               metadata: Mapping[str, str] | None = None) -> None:
    """Write one safetensors file, tensor by tensor; the caller makes sure that a file half written does not look whole.

    Args:
        tensors: (name, dtype as the format names it, shape, arrays that one after the other are its values); the arrays are asked for
            when they are written, in the file's order: wider dtypes first, then by name, as the safetensors package lays them out.
        metadata: of the file; {"format": "pt"} where not given, without which transformers 4 refuses it.
    """
    order = sorted(tensors, key=lambda t: (-np.dtype(DTYPES[t[1]]).itemsize, t[0]))
    header: dict[str, Any] = {"__metadata__": dict(metadata or {"format": "pt"})}
    end = 0
    for name, dtype, shape, _ in order:
        if name in header:
            raise ValueError(f"{name} is there twice")
        start, end = end, end + math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for name, dtype, shape, chunks in order:
            written = 0
            for chunk in chunks:
                if chunk.dtype != DTYPES[dtype]:
                    raise ValueError(f"{name}: a piece is {chunk.dtype}, not {dtype}")
                f.write(np.ascontiguousarray(chunk).reshape(-1).view(np.uint8))
                written += chunk.nbytes
            if written != header[name]["data_offsets"][1] - header[name]["data_offsets"][0]:
                raise ValueError(f"{name}: {written} bytes were given, its shape {shape} needs another number")
        f.flush()
        os.fsync(f.fileno())
