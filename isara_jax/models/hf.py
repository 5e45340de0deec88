"""Hugging Face folders: config.json to `ModelConfig`, safetensors to our parameter tree, tensor by tensor. No torch, no pickle.

Memory: the largest tensors come first, each is read in slices of rows through one buffer, and what is written is the memory that jax keeps,
so a load peaks at little more than the weights themselves (benchmarks/loading.py).
"""
from __future__ import annotations

import math
from pathlib import Path
from types import MappingProxyType
from typing import Any, Iterator, Mapping

import numpy as np

from isara_jax.common import UserError
from isara_jax.models import decoder, families, tensors
from isara_jax.models.config import ModelConfig
from isara_jax.models.families import table
from isara_jax.models.families.table import Entry, ParamPath, Shape
from isara_jax.models.place import Place, Read
from isara_jax.models.resolve import read_json

LINE = 64  # bytes of a cache line: stored rows are turned into our columns so many bytes wide at a time


def model_config(folder: Path) -> ModelConfig:
    """The mathematics of a folder's config.json, in the form of transformers 4 or 5.

    Raises `UserError` for another family and for every field that we could not honour exactly.
    """
    raw, path = _config(folder)
    return families.find(raw, path).read(raw, path)


def context_length(folder: Path) -> int:
    """Longest sequence in tokens for which the mathematics is that of transformers."""
    raw, path = _config(folder)
    return families.find(raw, path).context_length(raw, path)


def family(folder: Path) -> families.Family:
    """The family of a folder's model. Raises `UserError` for one that is not supported."""
    return families.find(*_config(folder))


def stored_dtypes(folder: Path) -> dict[str, str]:
    """Canonical key -> dtype as safetensors names it ("BF16"), of every tensor of the causal language model in a folder."""
    checkpoint, _, found = _found(folder, family(folder), model_config(folder), {})
    return {key: checkpoint.entries[name].dtype for key, name in found.items()}


def load_params(folder: Path, cfg: ModelConfig, place: Place, dtype: str = "float32",
                also: Mapping[Entry, Shape] = MappingProxyType({})) -> decoder.Params:
    """Read the weights, the largest first; `place` puts each on its devices.

    Args:
        dtype: of all of them.
        also: further tensors of the checkpoint (heads), each of one parameter with its shape; they come back in the same tree. The
            vocabulary head is then not missed: give a config with tied embeddings.

    Raises one `UserError` listing every missing, unexpected, duplicate or wrongly shaped tensor.
    """
    kind = family(folder)
    checkpoint, shapes, found = _found(folder, kind, cfg, also)
    if cfg.tie_embeddings and not also:
        _check_tie(checkpoint, kind, found)
    entries = [(entry, number) for entry in (*kind.entries(cfg), *also) for number in range(len(entry.paths))]
    entries.sort(key=lambda e: -math.prod(shapes[e[0].paths[e[1]]]))
    wide = np.dtype(tensors.DTYPES[{"float32": "F32", "bfloat16": "BF16", "float16": "F16"}[dtype]])

    def stream() -> Iterator[tuple[ParamPath, Any]]:
        for entry, number in entries:
            shape = shapes[entry.paths[number]]
            read = _reader(checkpoint, found[entry.key], entry, number, shapes, cfg.head_dim, wide)
            yield entry.paths[number], place(entry.paths[number], shape, wide, read)

    return build(stream())


def build(items: Iterator[tuple[ParamPath, Any]]) -> decoder.Params:
    """A nested dict from (path, value) pairs."""
    tree: decoder.Params = {}
    for path, value in items:
        inner = tree
        for key in path[:-1]:
            inner = inner.setdefault(key, {})
        inner[path[-1]] = value
    return tree


# ------------------------------------------------------------------------------------------------------------------- reading
def _reader(checkpoint: tensors.Checkpoint, name: str, entry: Entry, number: int, shapes: Mapping[ParamPath, Shape], head_dim: int,
            dtype: np.dtype) -> Read:
    """The `Read` of parameter `number` of an entry: any part of it in our layout, in memory that jax can keep."""
    shape = shapes[entry.paths[number]]
    pieces = table.pieces(entry, number, shapes, head_dim)

    def read(index: tuple[slice, ...]) -> np.ndarray:
        bounds = [s.indices(size)[:2] for s, size in zip(index, shape)]
        out = tensors.empty(tuple(end - start for start, end in bounds), dtype)
        low, high = bounds[-1]
        if len(shape) == 2 and not table.transposed(entry):
            ((_, first, _),) = pieces
            for row, block in checkpoint.blocks(name, *bounds[0], columns=(first + low, first + high)):
                out[row - bounds[0][0]:row - bounds[0][0] + len(block)] = block
            return out
        for ours, first, count in pieces:  # stored rows are our last axis
            start, end = max(ours, low), min(ours + count, high)
            for row, block in checkpoint.blocks(name, first + start - ours, first + end - ours, bounds[0] if len(shape) == 2 else None):
                at = row - first + ours - low
                if len(shape) == 1:
                    out[at:at + len(block)] = block[:, 0]
                else:
                    _put_columns(out[:, at:at + len(block)], block)
        return out

    return read


def _put_columns(out: np.ndarray, block: np.ndarray) -> None:
    """out [in, n] = block [n, in] transposed and cast, a cache line at a time: three times as fast as the whole at once."""
    same = block.astype(out.dtype, copy=False)
    word = {2: np.uint16, 4: np.uint32}[out.dtype.itemsize]
    source, target, step = same.view(word), out.view(word), LINE // out.dtype.itemsize
    for i in range(0, len(source), step):
        target[:, i:i + step] = source[i:i + step].T


# ------------------------------------------------------------------------------------------------------------------ checking
def _config(folder: Path) -> tuple[dict[str, Any], Path]:
    return read_json(folder / "config.json"), folder / "config.json"


def _found(folder: Path, kind: families.Family, cfg: ModelConfig,
           also: Mapping[Entry, Shape]) -> tuple[tensors.Checkpoint, dict[ParamPath, Shape], dict[str, str]]:
    """(the folder's tensors, the shapes of our parameters, canonical key -> stored name), once they fit each other."""
    checkpoint, entries = tensors.open_folder(folder), kind.entries(cfg)
    shapes = table.param_shapes(cfg) | {entry.paths[0]: shape for entry, shape in also.items()}
    wanted = {entry.key: table.stored_shape(entry, shapes) for entry in (*entries, *also)}
    embedding = next(entry.key for entry in entries if entry.paths == (("embed", "embedding"),))
    names = {name: kind.keys.canonical(name, wanted) for name in checkpoint.entries}
    swapped = cfg.tie_embeddings and embedding not in names.values()  # then the head is the matrix of both, as in transformers
    heads = {kind.keys.head, *kind.keys.heads} if cfg.tie_embeddings else set()  # which a tied model may store too

    def canonical(name: str) -> str:
        return embedding if swapped and name in heads else names[name]

    return checkpoint, shapes, tensors.fit(checkpoint, wanted, lambda name: kind.ignores(name) or name in heads, canonical=canonical)


def _check_tie(checkpoint: tensors.Checkpoint, kind: families.Family, found: Mapping[str, str]) -> None:
    """Refuse a head beside tied embeddings that differs from them: transformers 4 drops it, 5 uses it."""
    embedding = next(name for key, name in found.items() if key == kind.keys.prefix + kind.keys.outer[0][0] + ".weight")
    for head in (name for name in (kind.keys.head, *kind.keys.heads) if name in checkpoint.entries and name != embedding):
        ours, theirs = checkpoint.entries[embedding], checkpoint.entries[head]
        same = (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        if not same or any(not np.array_equal(block.view(np.uint8), checkpoint.read(embedding, slice(row, row + len(block))).view(np.uint8))
                           for row, block in checkpoint.blocks(head)):
            raise UserError(f"{checkpoint.folder}: {head} differs from {embedding}, but config.json says tie_word_embeddings. "
                            "Set it to false there to use both, or leave the head out of the file.")
