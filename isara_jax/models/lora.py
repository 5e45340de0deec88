"""Low-rank adapters (LoRA; Hu et al. 2021, arXiv 2106.09685): made, trained beside frozen weights, merged into them.

An adapter adds alpha / r * (drop(x) @ a) @ b to a product x @ kernel (models/layers.py). While they are trained, adapters are a tree like
the parameters', with stacked layers: {"layers": {"attn": {"q": {"lora_a": [L, in, r], "lora_b": [L, r, out]}}}}. What comes of it is an
`Adapter` (models/adapter.py), product by product.
"""
from __future__ import annotations

import functools
import math
import re
from pathlib import Path
from typing import Any, Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from isara_jax.common import UserError, address
from isara_jax.config import Lora
from isara_jax.models import adapter as adapter_lib
from isara_jax.models import decoder
from isara_jax.models.adapter import Adapter, LowRank
from isara_jax.models.config import ModelConfig
from isara_jax.models.families import Family
from isara_jax.sharding import param_shardings

PRODUCTS = {"q": "attn", "k": "attn", "v": "attn", "o": "attn", "gate": "mlp", "up": "mlp", "down": "mlp"}


def products(cfg: ModelConfig, spec: Lora) -> list[tuple[str, str]]:
    """(part of a layer, product) of those that `spec.targets` names. Raises `UserError` where the model has none of them."""
    there = [name for name, part in PRODUCTS.items() if name in decoder.abstract_params(cfg)["layers"]["0"][part]]
    chosen = [(PRODUCTS[name], name) for name in there if re.fullmatch(spec.targets, name)]
    if not chosen:
        raise UserError(f"config.sft.lora.targets={spec.targets!r} matches none of this model's products: {', '.join(there)}. It is a "
                        "regular expression for the whole name, for example 'q|v' or '.*'.")
    return chosen


def n_params(cfg: ModelConfig, spec: Lora) -> int:
    """Number of parameters of the adapters; 0 without."""
    return sum(math.prod(x.shape) for x in jax.tree.leaves(abstract(cfg, spec))) if spec.rank else 0


def abstract(cfg: ModelConfig, spec: Lora) -> Any:
    """The tree of adapters in training as `jax.ShapeDtypeStruct`s."""
    layer, made = decoder.abstract_params(cfg)["layers"]["0"], {}
    for part, name in products(cfg, spec):
        d_in, d_out = layer[part][name]["kernel"].shape
        made.setdefault(part, {})[name] = {"lora_a": jax.ShapeDtypeStruct((cfg.n_layers, d_in, spec.rank), jnp.float32),
                                           "lora_b": jax.ShapeDtypeStruct((cfg.n_layers, spec.rank, d_out), jnp.float32)}
    return {"layers": made}


def init(cfg: ModelConfig, spec: Lora, mesh: Mesh, seed: int) -> Any:
    """Fresh adapters, which add nothing: b is zero, and a uniform in ±1 / sqrt(in) (PEFT's Kaiming with a = sqrt(5)), drawn by its path."""

    def one(path, leaf, place):
        *_, part, name, half = (k.key for k in path)
        if half == "lora_b":
            return jnp.zeros(leaf.shape, leaf.dtype, device=place)
        keys = np.stack([_key_data("lora", seed, "layers", i, part, name) for i in range(cfg.n_layers)])
        return jax.device_put(_uniform(keys, leaf.shape[1:]), place)

    tree = abstract(cfg, spec)
    return jax.tree_util.tree_map_with_path(one, tree, param_shardings(tree, mesh))


@functools.partial(jax.jit, static_argnums=1)
def _uniform(keys_L2: jax.Array, shape: tuple[int, int]) -> jax.Array:
    bound, keys_L = shape[0] ** -0.5, jax.random.wrap_key_data(keys_L2, impl="threefry2x32")
    return jax.vmap(lambda key: jax.random.uniform(key, shape, minval=-bound, maxval=bound))(keys_L)


def _key_data(*parts: str | int) -> np.ndarray:
    """The key of a draw by its address: the two halves of 64 bits."""
    number = address(*parts)
    return np.array([number >> 32, number & 0xFFFFFFFF], np.uint32)


# ------------------------------------------------------------------------------------------------------------------- training
def frozen(params: decoder.Params, cfg: ModelConfig, mesh: Mesh, dtype: str) -> decoder.Params:
    """The parameters as adapters are trained beside them: layers stacked, kernels and embeddings in `dtype`. The rest is not copied."""

    def typed(tree):
        return jax.tree_util.tree_map_with_path(lambda path, x: x.astype(dtype) if path[-1].key in ("kernel", "embedding") else x, tree)

    stack = jax.jit(lambda layers: typed(decoder.stack_layers({"layers": layers}))["layers"], out_shardings=places(cfg, mesh)["layers"])
    return {**typed({name: tree for name, tree in params.items() if name != "layers"}), "layers": stack(params["layers"])}


@functools.lru_cache(maxsize=8)
def places(cfg: ModelConfig, mesh: Mesh) -> Any:
    """Where the arrays that `frozen` returns lie."""
    return param_shardings(jax.eval_shape(decoder.stack_layers, decoder.abstract_params(cfg)), mesh)


def beside(params: decoder.Params, adapters: Any, spec: Lora) -> decoder.Params:
    """Parameters with adapters beside their kernels, scaled, as the forward takes them; both with stacked layers."""
    layers = dict(params["layers"])
    for part, owners in adapters["layers"].items():
        scaled = {name: {**layers[part][name], "lora_a": low["lora_a"], "lora_b": low["lora_b"] * (spec.alpha / spec.rank)}
                  for name, low in owners.items()}
        layers[part] = {**layers[part], **scaled}
    return {**params, "layers": layers}


def dropout_key(seed: int, step: int) -> np.ndarray:
    """Key data [2] of the dropout of one optimizer step: continued fine-tunings draw what they would have drawn."""
    return _key_data("lora dropout", seed, step)


def dropout(spec: Lora, key_data_2: jax.Array) -> Callable[[Any], Callable[[jax.Array, int], jax.Array]] | None:
    """What `decoder.forward` takes as `drop`: inputs are dropped with one draw for each (step, layer, product), the rest scaled up."""
    if not spec.dropout:
        return None
    key = jax.random.wrap_key_data(key_data_2, impl="threefry2x32")

    def of_layer(layer):
        def drop(x, number):
            kept = jax.random.bernoulli(jax.random.fold_in(jax.random.fold_in(key, layer), number), 1 - spec.dropout, x.shape)
            return jnp.where(kept, x / (1 - spec.dropout), 0.0)

        return drop

    return of_layer


# -------------------------------------------------------------------------------------------------------------------- results
def finished(adapters: Any, cfg: ModelConfig, spec: Lora) -> Adapter:
    """Trained adapters, product by product, as numpy arrays."""
    whole = jax.tree.map(lambda x: NamedSharding(x.sharding.mesh, P()), adapters)  # each process can read what is whole on its devices
    tree = jax.tree.map(np.asarray, jax.jit(lambda x: x, out_shardings=whole)(adapters))
    return {("layers", str(i), part, name): LowRank(low["lora_a"][i], low["lora_b"][i], spec.alpha)
            for part, owners in tree["layers"].items() for name, low in owners.items() for i in range(cfg.n_layers)}


def merge(params: decoder.Params, adapter: Adapter) -> decoder.Params:
    """Parameters that do what `params` and the adapter do: kernel + alpha / r * a @ b, computed in float32.

    They have the dtype and place of `params`, one entry a layer; what has no adapter is shared with them.
    """
    for path, low in adapter.items():
        kernel = functools.reduce(lambda tree, key: tree[key], path, params)["kernel"]
        params = _replaced(params, (*path, "kernel"), _merged(kernel.sharding)(kernel, low.a, low.b, np.float32(low.scale)))
    return params


def _replaced(tree: Any, path: tuple[str, ...], value: Any) -> Any:
    return {**tree, path[0]: _replaced(tree[path[0]], path[1:], value)} if path else value


@functools.lru_cache(maxsize=64)
def _merged(place: NamedSharding):
    def add(kernel, a, b, scale):
        return (kernel.astype(jnp.float32) + scale * jnp.dot(a, b, precision="highest")).astype(kernel.dtype)

    return jax.jit(add, out_shardings=place)


def apply_folder(params: decoder.Params, folder: str | Path, cfg: ModelConfig, family: Family) -> decoder.Params:
    """`params` with an adapter of PEFT's format merged into them. Raises `UserError` where it does not fit (`adapter.load`)."""
    return merge(params, adapter_lib.load(folder, cfg, family))
