"""The decoder as pure functions of a parameter tree; Flax NNX modules define and initialise it.

Parameters are a plain nested dict with string keys, one entry a layer (kernels are [in, out]):

    embed/embedding [V, D]          layers/0/attn_norm/scale [D]     layers/0/attn/{q,k,v,o}/kernel
    norm/scale [D]                  layers/0/mlp_norm/scale [D]      layers/0/mlp/{gate,up,down}/kernel
    head/kernel [D, V] (not tied)

There is one forward. What differs between training, scoring, prefill and decode is the `attend` function handed to it.
"""
from __future__ import annotations

import functools
from typing import Any, Callable

import jax
import jax.numpy as jnp
from flax import nnx

from isara_jax.models.config import ModelConfig
from isara_jax.models.layers import Block, Linear, RMSNorm

Params = dict[str, Any]
# attend(q [B, T, N, H], k [B, T, K, H], v [B, T, K, H], layer, state) -> (out [B, T, N, H], state); layer is an int, or traced under scan
Attend = Callable[[jax.Array, jax.Array, jax.Array, Any, Any], tuple[jax.Array, Any]]


class Decoder(nnx.Module):
    """Defines the parameters and their initial values; `forward` runs them."""

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        self.embed = nnx.Embed(cfg.vocab_size, cfg.d_model, embedding_init=nnx.initializers.normal(0.02), rngs=rngs)
        self.layers = nnx.List([Block(cfg, rngs=rngs) for _ in range(cfg.n_layers)])
        self.norm = RMSNorm(cfg.d_model, cfg.norm_eps, rngs=rngs)
        if not cfg.tie_embeddings:
            self.head = Linear(cfg.d_model, cfg.vocab_size, rngs=rngs)


def init_params(cfg: ModelConfig, seed: int) -> Params:
    """Random float32 parameters (normal, deviation 0.02; norms one) drawn from `seed`."""
    return _initialiser(cfg)(jax.random.key(seed, impl="threefry2x32"))


@functools.lru_cache(maxsize=16)
def _initialiser(cfg: ModelConfig) -> Callable[[jax.Array], Params]:
    """One program for all seeds, which the compilation cache can keep."""
    return jax.jit(lambda key: _string_keys(nnx.to_pure_dict(nnx.state(Decoder(cfg, rngs=nnx.Rngs(key))))))


@functools.lru_cache(maxsize=16)
def abstract_params(cfg: ModelConfig) -> Params:
    """The parameter tree as `jax.ShapeDtypeStruct`s (float32), without allocating anything."""
    return _string_keys(nnx.to_pure_dict(nnx.state(nnx.eval_shape(lambda: Decoder(cfg, rngs=nnx.Rngs(0))))))


def stack_layers(params: Params) -> Params:
    """One stacked entry [L, ...] for each parameter of `layers`, as `forward` scans them."""
    layers = params["layers"]
    return {**params, "layers": jax.tree.map(lambda *xs: jnp.stack(xs), *(layers[str(i)] for i in range(len(layers))))}


def unstack_layers(params: Params, n_layers: int) -> Params:
    """The inverse of `stack_layers`."""
    return {**params, "layers": {str(i): jax.tree.map(lambda x: x[i], params["layers"]) for i in range(n_layers)}}


def forward(params: Params, cfg: ModelConfig, tokens_BT: jax.Array, positions_BT: jax.Array, attend: Attend, state: Any = None, *,
            remat: bool = False) -> tuple[jax.Array, Any]:
    """Tokens to the normed hidden states `lm_head` takes: ([B, T, D] float32, the state that `attend` left).

    `params["layers"]` is either the tree of layers (unrolled; any `attend`) or one stacked tree (scanned; `attend` keeps no state).
    `remat` recomputes each block in the backward pass instead of keeping its activations.
    """
    x_BTD = jnp.take(params["embed"]["embedding"], tokens_BT, axis=0).astype(jnp.float32)

    def block(layer_params, x, layer, inner):
        return nnx.merge(_graph(Block, cfg), nnx.State(layer_params))(x, positions_BT, attend, layer, inner)

    layers = params["layers"]
    if "0" in layers:
        run = jax.checkpoint(block, static_argnums=(2,)) if remat else block
        for i in range(cfg.n_layers):
            x_BTD, state = run(layers[str(i)], x_BTD, i, state)
    else:
        body = lambda x, layer_params: (block(layer_params, x, None, None)[0], None)
        x_BTD, _ = jax.lax.scan(jax.checkpoint(body) if remat else body, x_BTD, layers)
    return nnx.merge(_graph(RMSNorm, cfg.d_model, cfg.norm_eps), nnx.State(params["norm"]))(x_BTD), state


def lm_head(params: Params, cfg: ModelConfig, hidden: jax.Array) -> jax.Array:
    """Hidden states [..., D] to float32 logits [..., V]; tied models use the embedding."""
    if cfg.tie_embeddings:
        kernel, axis = params["embed"]["embedding"], 1
    else:
        kernel, axis = params["head"]["kernel"], 0
    dims = (((hidden.ndim - 1,), (axis,)), ((), ()))
    return jax.lax.dot_general(hidden.astype(kernel.dtype), kernel, dims, preferred_element_type=jnp.float32)


@functools.lru_cache(maxsize=16)
def _graph(module: type[nnx.Module], *args: Any) -> nnx.GraphDef:
    """The structure of a module without its weights, to be merged with a subtree of the parameters."""
    return nnx.graphdef(nnx.eval_shape(lambda: module(*args, rngs=nnx.Rngs(0))))


def _string_keys(tree: Any) -> Any:
    return {str(k): _string_keys(v) for k, v in tree.items()} if isinstance(tree, dict) else tree
