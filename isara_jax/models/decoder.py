"""The decoder as pure functions of a parameter tree; Flax NNX modules define and initialise it.

Parameters are a plain nested dict with string keys, one entry a layer (kernels are [in, out]); what is in brackets depends on the config:

    embed/embedding [V, E]   [positions/embedding [P, D]]   [project_in/kernel [E, D]   project_out/kernel [D, E]]
    layers/0/{attn,mlp}[_out]_norm/{scale,[bias]} [D]       layers/0/attn/{q,k,v,o}/{kernel,[bias]}   [layers/0/attn/{q,k}_norm/scale]
    layers/0/mlp/{[gate],up,down}/{kernel,[bias]}           [norm/{scale,[bias]} [D]]                 [head/kernel [E, V]]

A product of a layer may also have an adapter beside its kernel: lora_a [in, r] and lora_b [r, out] (see models/lora.py).

There is one forward. What differs between training, scoring, prefill and decode is the `attend` function handed to it.
"""
from __future__ import annotations

import functools
import math
from typing import Any, Callable

import jax
import jax.numpy as jnp
from flax import nnx

from isara_jax.models.config import LayerKind, ModelConfig
from isara_jax.models.layers import Block, Layer, Linear, Norm, capped, matmul
from isara_jax.models.rope import turn_once

Params = dict[str, Any]
# attend(q [B, T, N, H] scaled, k [B, T, K, H], v [B, T, K, H], layer, state) -> (out [B, T, N, H], state); layer is a `Layer`
Attend = Callable[[jax.Array, jax.Array, jax.Array, Layer, Any], tuple[jax.Array, Any]]
NO_WINDOW = 2**30  # a window wider than any text, where layers with and without one are scanned


class Decoder(nnx.Module):
    """Defines the parameters and their initial values; `forward` runs them."""

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        embed = functools.partial(nnx.Embed, embedding_init=nnx.initializers.normal(0.02), rngs=rngs)
        self.embed = embed(cfg.vocab_size, cfg.embed_dim)
        if cfg.positions:
            self.positions = embed(cfg.positions, cfg.d_model)
        if cfg.embed_dim != cfg.d_model:
            self.project_in = Linear(cfg.embed_dim, cfg.d_model, rngs=rngs)
            self.project_out = Linear(cfg.d_model, cfg.embed_dim, rngs=rngs)
        self.layers = nnx.List([Block(cfg, rngs=rngs) for _ in range(cfg.n_layers)])
        if cfg.final_norm:
            self.norm = Norm(cfg.d_model, cfg, rngs=rngs)
        if not cfg.tie_embeddings:
            self.head = Linear(cfg.embed_dim, cfg.vocab_size, rngs=rngs)


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


def n_params(cfg: ModelConfig) -> int:
    """Number of parameters, tied embeddings counted once."""
    return sum(math.prod(x.shape) for x in jax.tree.leaves(abstract_params(cfg)))


def stack_layers(params: Params) -> Params:
    """One stacked entry [L, ...] for each parameter of `layers`, as `forward` scans them."""
    layers = params["layers"]
    return {**params, "layers": jax.tree.map(lambda *xs: jnp.stack(xs), *(layers[str(i)] for i in range(len(layers))))}


def unstack_layers(params: Params, n_layers: int) -> Params:
    """The inverse of `stack_layers`."""
    return {**params, "layers": {str(i): jax.tree.map(lambda x: x[i], params["layers"]) for i in range(n_layers)}}


def forward(params: Params, cfg: ModelConfig, tokens_BT: jax.Array, positions_BT: jax.Array, attend: Attend, state: Any = None, *,
            remat: bool = False, drop: Callable[[Any], Callable[[jax.Array, int], jax.Array]] | None = None) -> tuple[jax.Array, Any]:
    """Tokens to the hidden states `lm_head` takes: ([B, T, E] float32, the state that `attend` left).

    `params["layers"]` is either the tree of layers (unrolled) or one stacked tree (scanned). Under scan `layer.index` is an array, and
    `attend` leaves a state of the shapes and dtypes it was given: the scan carries it whole, so that what is written in it is written in
    place, where slices handed to each layer and collected again would be copied.
    `remat` recomputes each block in the backward pass instead of keeping its activations. `drop`, given the number of a layer, returns its
    `Layer.drop`: the dropout before adapters.
    """
    x_BTD = jnp.take(params["embed"]["embedding"], tokens_BT, axis=0).astype(jnp.float32)
    if cfg.embed_scale != 1:
        x_BTD = x_BTD * cfg.embed_scale
    if "project_in" in params:
        x_BTD = matmul(x_BTD, params["project_in"]["kernel"])
    if cfg.positions:
        places = positions_BT + cfg.position_offset  # of padding, perhaps behind the last row: not NaN, which zero weights do not hide
        x_BTD = x_BTD + jnp.take(params["positions"]["embedding"], places, axis=0, mode="clip").astype(jnp.float32)
    layers, kinds = params["layers"], _Kinds(cfg, positions_BT)

    def block(layer_params, x, state, layer):
        return nnx.merge(_block(cfg, _ranks(layer_params)), nnx.State(layer_params))(x, attend, layer, state)

    if "0" in layers:
        for i in range(cfg.n_layers):
            run = functools.partial(block, layer=kinds.layer(i, drop and drop(i)))
            x_BTD, state = (jax.checkpoint(run) if remat else run)(layers[str(i)], x_BTD, state)
    else:
        def body(carry, xs):
            (x, state), (layer_params, i) = carry, xs
            return block(layer_params, x, state, kinds.scanned(i, drop and drop(i))), None

        (x_BTD, state), _ = jax.lax.scan(jax.checkpoint(body) if remat else body, (x_BTD, state), (layers, jnp.arange(cfg.n_layers)))
    if cfg.final_norm:
        x_BTD = nnx.merge(_norm(cfg), nnx.State(params.get("norm", {})))(x_BTD)
    return matmul(x_BTD, params["project_out"]["kernel"]) if "project_out" in params else x_BTD, state


class _Kinds:
    """The kinds of the layers of one forward; each distinct rotary embedding is computed once for all layers that have it."""

    def __init__(self, cfg: ModelConfig, positions_BT: jax.Array):
        self.cfg, self.kinds = cfg, tuple(cfg.kind(i) for i in range(cfg.n_layers))
        ropes = tuple(dict.fromkeys(kind.rope for kind in self.kinds))
        width = cfg.rotary_dim
        self.turns = {rope: turn_once(rope, width, positions_BT) if width else None for rope in ropes}

    def layer(self, i: int, drop: Any) -> Layer:
        kind = self.kinds[i]
        return Layer(i, kind.window, self._scale(kind), self.cfg.attn_softcap, self.turns[kind.rope] if kind.rope else None, drop)

    def scanned(self, i: jax.Array, drop: Any) -> Layer:
        """Layer i, an array; what is the same in all layers stays a constant of the program."""
        different = lambda values: len(set(values)) > 1
        windows, scales = [k.window for k in self.kinds], [self._scale(k) for k in self.kinds]
        window = jnp.array([w or NO_WINDOW for w in windows])[i] if different(windows) else windows[0]
        scale = jnp.array(scales, jnp.float32)[i] if different(scales) else scales[0]
        turns, which = list(self.turns.values()), list(self.turns)
        if len(which) == 1 or not self.cfg.rotary_dim:
            pair = turns[0] if which[0] else None
        else:
            number = jnp.array([which.index(k.rope) for k in self.kinds])[i]
            pair = tuple(jnp.stack(parts)[number] for parts in zip(*turns))
        return Layer(i, window, scale, self.cfg.attn_softcap, pair, drop)

    def _scale(self, kind: LayerKind) -> float:
        return kind.scale or self.cfg.head_dim ** -0.5


def lm_head(params: Params, cfg: ModelConfig, hidden: jax.Array) -> jax.Array:
    """Hidden states [..., E] to float32 logits [..., V]; tied models use the embedding. Reads `head_params` only."""
    if cfg.tie_embeddings:
        kernel, axis = params["embed"]["embedding"], 1
    else:
        kernel, axis = params["head"]["kernel"], 0
    dims = (((hidden.ndim - 1,), (axis,)), ((), ()))
    return capped(jax.lax.dot_general(hidden.astype(kernel.dtype), kernel, dims, preferred_element_type=jnp.float32), cfg.logit_softcap)


def head_params(params: Params, cfg: ModelConfig) -> Params:
    """The part of the parameters that `lm_head` reads."""
    return {"embed": params["embed"]} if cfg.tie_embeddings else {"head": params["head"]}


def _ranks(layer_params: Params) -> tuple[tuple[str, int], ...]:
    """The ranks of the adapters that stand among the parameters of a layer, as `Block` takes them."""
    owners = {**layer_params["attn"], **layer_params["mlp"]}
    return tuple((name, leaves["lora_a"].shape[-1]) for name, leaves in sorted(owners.items()) if "lora_a" in leaves)


# The structures of modules without their weights, to be merged with a subtree of the parameters.
@functools.lru_cache(maxsize=16)
def _block(cfg: ModelConfig, ranks: tuple[tuple[str, int], ...]) -> nnx.GraphDef:
    return nnx.graphdef(nnx.eval_shape(lambda: Block(cfg, ranks, rngs=nnx.Rngs(0))))


@functools.lru_cache(maxsize=16)
def _norm(cfg: ModelConfig) -> nnx.GraphDef:
    return nnx.graphdef(nnx.eval_shape(lambda: Norm(cfg.d_model, cfg, rngs=nnx.Rngs(0))))


def _string_keys(tree: Any) -> Any:
    return {str(k): _string_keys(v) for k, v in tree.items()} if isinstance(tree, dict) else tree
