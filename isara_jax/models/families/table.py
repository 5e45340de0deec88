"""How the keys of a checkpoint become our parameters: one table a family, the same both ways.

A row of a table is (name in the checkpoint without .weight and .bias, our modules it holds, layout). Which rows a model has follows from
its parameters: a row whose parameters the config does not have (a bias, a norm, an untied head) falls away.

Layouts: "linear" is stored [out, in] (torch.nn.Linear; ours are [in, out]), "conv1d" [in, out] (GPT-2), "heads" as linear, but head by head
a query's rows, a key's, a value's (GPT-NeoX); "norm" and "embedding" are stored as they are. Where a row names several of our modules,
their outputs lie one behind the other. An `Entry` knows "plain" (as stored), "linear", "conv1d" and "heads".
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Iterator, Mapping

import numpy as np

from isara_jax.models.config import ModelConfig

ParamPath = tuple[str, ...]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Entry:
    """One stored tensor: its canonical key, our parameters it holds (several where weights are fused), and how they lie in it."""

    key: str
    paths: tuple[ParamPath, ...]
    layout: str


@dataclass(frozen=True)
class Keys:
    """The key-map table of a family.

    Attributes:
        prefix: of the base model, as causal-LM checkpoints spell it ("model."); checkpoints of the base model alone leave it out.
        layer: of layer {}, below the prefix.
        outer, inner: rows outside the layers and in each of them.
        head: key of the vocabulary head, which stands outside the prefix.
        prefixes: other spellings of the prefix.
        heads: other spellings of the head's key.
    """

    prefix: str
    layer: str
    outer: tuple[tuple[str, str, str], ...]
    inner: tuple[tuple[str, str, str], ...]
    head: str = "lm_head.weight"
    prefixes: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()

    def entries(self, cfg: ModelConfig) -> list[Entry]:
        """The tensors of a model."""
        shapes, made = param_shapes(cfg), []
        for name, modules, layout in self.outer:
            made += _expand(self.prefix + name, (), modules, layout, shapes)
        for i in range(cfg.n_layers):
            for name, modules, layout in self.inner:
                made += _expand(self.prefix + self.layer.format(i) + name, ("layers", str(i)), modules, layout, shapes)
        if ("head", "kernel") in shapes:
            made.append(Entry(self.head, (("head", "kernel"),), "linear"))
        if lost := set(shapes) - {path for entry in made for path in entry.paths}:
            raise ValueError(f"the table {self.prefix}* has no key for {', '.join('/'.join(path) for path in sorted(lost)[:5])}")
        return made

    def canonical(self, name: str, wanted: Mapping[str, object]) -> str:
        """The key in `wanted` that `name` is a spelling of, or `name` itself."""
        prefixes = sorted((self.prefix, *self.prefixes), key=len, reverse=True)
        bare = next((name.removeprefix(p) for p in prefixes if name.startswith(p)), name)
        candidates = (name, self.prefix + bare, self.head if name in self.heads else name)
        return next((key for key in candidates if key in wanted), name)


def _expand(key: str, above: ParamPath, modules: str, layout: str, shapes: Mapping[ParamPath, Shape]) -> Iterator[Entry]:
    weight = {"norm": "scale", "embedding": "embedding"}.get(layout, "kernel")
    for stored, leaf in (("weight", weight), ("bias", "bias")):
        paths = tuple((*above, *module.split("/"), leaf) for module in modules.split())
        if paths[0] in shapes:
            yield Entry(f"{key}.{stored}", paths, layout if leaf == "kernel" or layout == "heads" else "plain")


def param_shapes(cfg: ModelConfig) -> dict[ParamPath, Shape]:
    """The shape of every parameter by its path."""
    from isara_jax.models import decoder  # here and not above: configs are read, and runs planned, without jax

    def walk(tree, path: ParamPath = ()) -> Iterator[tuple[ParamPath, Shape]]:
        for key, value in tree.items():
            yield from walk(value, (*path, key)) if isinstance(value, dict) else (((*path, key), tuple(value.shape)),)

    return dict(walk(decoder.abstract_params(cfg)))


# ------------------------------------------------------------------------------------------------------------------- layouts
def stored_shape(entry: Entry, shapes: Mapping[ParamPath, Shape]) -> Shape:
    """The shape of the stored tensor; `shapes` are those of our parameters."""
    first, total = shapes[entry.paths[0]], sum(shapes[path][-1] for path in entry.paths)
    if len(first) == 1:
        return (total,)
    if entry.layout == "plain":
        return first
    return (first[0], total) if entry.layout == "conv1d" else (total, first[0])


def transposed(entry: Entry) -> bool:
    """Whether the stored rows are our columns."""
    return entry.layout in ("linear", "heads") and entry.paths[0][-1] != "bias"


def pieces(entry: Entry, number: int, shapes: Mapping[ParamPath, Shape], head_dim: int) -> list[tuple[int, int, int]]:
    """Where parameter `number` of an entry lies: (our first, stored first, how many), in the order of ours.

    They count our last axis, and of the stored tensor the axis it became: rows where `transposed` and in vectors, else columns. An
    embedding is one piece.
    """
    sizes = [shapes[path][-1] for path in entry.paths]
    if entry.layout != "heads":
        return [(0, sum(sizes[:number]), sizes[number])]
    return [(h * head_dim, (h * len(sizes) + number) * head_dim, head_dim) for h in range(sizes[number] // head_dim)]


def split(entry: Entry, stored: np.ndarray, cfg: ModelConfig) -> list[np.ndarray]:
    """Our parameters out of a stored tensor, in the order of `entry.paths`; the inverse of `join`."""
    shapes, made = param_shapes(cfg), []
    for number in range(len(entry.paths)):
        parts = [stored[_along(stored, entry, first, count)] for _, first, count in pieces(entry, number, shapes, cfg.head_dim)]
        whole = parts[0] if len(parts) == 1 else np.concatenate(parts)
        made.append(np.ascontiguousarray(whole.T if transposed(entry) else whole))
    return made


def join(entry: Entry, arrays: list[np.ndarray], cfg: ModelConfig) -> np.ndarray:
    """The stored tensor that holds our parameters `arrays`, which are in the order of `entry.paths`; the inverse of `split`."""
    shapes = param_shapes(cfg)
    stored = np.empty(stored_shape(entry, shapes), np.asarray(arrays[0]).dtype)
    for number, array in enumerate(np.asarray(a) for a in arrays):
        for ours, first, count in pieces(entry, number, shapes, cfg.head_dim):
            part = array[..., ours:ours + count]
            stored[_along(stored, entry, first, count)] = part.T if transposed(entry) else part
    return stored


def _along(stored: np.ndarray, entry: Entry, first: int, count: int) -> tuple[slice, ...]:
    rows = transposed(entry) or stored.ndim == 1
    return (slice(first, first + count),) if rows else (slice(None), slice(first, first + count))
