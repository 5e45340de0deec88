"""The two `attend` functions of sampling: a chunk of prompt against blocks of keys, and one new token against blocks and recent keys.

Keys lie as [C, B, K, H, W] and values as [C, B, K, W, H], block after block, in the layout their products read (on XLA:CPU another
layout of the keys costs 13 times as much). bfloat16 is stored as its uint16 bits, for XLA:CPU copies bfloat16 element by element.
Letters as in models/layers.py, and: C blocks of W keys, J recent keys, R = G * T query rows that share a key head.
"""
from __future__ import annotations

import jax
import jax.numpy as jnp

from isara_jax.models.config import ModelConfig
from isara_jax.models.layers import NEG_INF, capped, group_heads, in_window, ungroup_heads


def stored_dtype(dtype: str) -> jnp.dtype:
    """The type in which keys and values of `dtype` are kept."""
    return jnp.dtype("uint16" if dtype == "bfloat16" else dtype)


def _store(x: jax.Array, dtype: str) -> jax.Array:
    x = x.astype(dtype)
    return jax.lax.bitcast_convert_type(x, jnp.uint16) if dtype == "bfloat16" else x


def _load(x: jax.Array, dtype: str) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, jnp.bfloat16) if dtype == "bfloat16" else x


def prefill(dtype: str, start: jax.Array):
    """An `attend` for a chunk of prompts at positions from `start`: it writes their keys, then goes over all blocks up to them.

    The state is (k, v), tuples over layers. A chunk lies within one block.
    """

    def attend(q_BTNH, k_BTKH, v_BTKH, layer, state):
        T, K, i = q_BTNH.shape[1], k_BTKH.shape[2], layer.index
        W = state[0][i].shape[-1]
        block, offset = start // W, start % W
        new_k = _store(k_BTKH, dtype).transpose(0, 2, 3, 1)[None]
        new_v = _store(v_BTKH, dtype).transpose(0, 2, 1, 3)[None]
        k = jax.lax.dynamic_update_slice(state[0][i], new_k, (block, 0, 0, 0, offset))
        v = jax.lax.dynamic_update_slice(state[1][i], new_v, (block, 0, 0, offset, 0))
        q_BKRH = group_heads(q_BTNH, K).astype(dtype)
        position_R = start + jnp.tile(jnp.arange(T), q_BKRH.shape[2] // T)

        def visible(c):
            distance_RW = position_R[:, None] - (c * W + jnp.arange(W))
            return in_window(distance_RW >= 0, distance_RW, layer)[None, None]

        acc = _over_blocks(q_BKRH, k, v, block + 1, visible, layer, dtype)
        return ungroup_heads(_finish(acc), T), (_put(state[0], i, k), _put(state[1], i, v))

    return attend


def empty_recent(cfg: ModelConfig, slots: int, steps: int) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    """Room for the keys and values [B, K, J, H] of a run of decode steps: (k, v), tuples over layers, in float32."""
    make = lambda: tuple(jnp.zeros((slots, cfg.n_kv_heads, steps, cfg.head_dim)) for _ in range(cfg.n_layers))
    return make(), make()


def decode(dtype: str, k: tuple[jax.Array, ...], v: tuple[jax.Array, ...], cached_B: jax.Array, longest: jax.Array, j: jax.Array):
    """An `attend` for one token a row, the j-th of a run: over its `cached` keys in blocks, then over the recent ones up to itself.

    The state is the recent (k, v). No row that matters has more than `longest` cached keys.
    """

    def attend(q_BTNH, k_BTKH, v_BTKH, layer, state):
        K, W, i = k_BTKH.shape[2], k[layer.index].shape[-1], layer.index
        put = lambda into, new: jax.lax.dynamic_update_slice_in_dim(into, new.transpose(0, 2, 1, 3), j, axis=2)
        recent_k, recent_v = put(state[0][i], k_BTKH), put(state[1][i], v_BTKH)
        q_BKRH = group_heads(q_BTNH, K).astype(dtype)

        def visible(c):
            place_W = c * W + jnp.arange(W)
            return in_window(place_W < cached_B[:, None], cached_B[:, None] + j - place_W, layer)[:, None, None]

        acc = _over_blocks(q_BKRH, k[i], v[i], (longest + W - 1) // W, visible, layer, dtype)
        back_J = j - jnp.arange(recent_k.shape[2])
        among = in_window(back_J >= 0, back_J, layer)[None, None, None]
        acc = _attend_block(acc, q_BKRH, recent_k.transpose(0, 1, 3, 2).astype(dtype), recent_v.astype(dtype), among, layer, dtype)
        return ungroup_heads(_finish(acc), 1), (_put(state[0], i, recent_k), _put(state[1], i, recent_v))

    return attend


def flush(dtype: str, k: tuple[jax.Array, ...], v: tuple[jax.Array, ...], recent, cached_B: jax.Array):
    """Blocks with the recent keys written behind each row's `cached` ones. What was never computed is overwritten before it is seen."""
    B, _, J, _ = recent[0][0].shape
    W = k[0].shape[-1]
    at_BJ = cached_B[:, None] + jnp.arange(J)
    row_BJ = jnp.broadcast_to(jnp.arange(B)[:, None], (B, J))
    put_k = lambda into, new: into.at[at_BJ // W, row_BJ, :, :, at_BJ % W].set(_store(new, dtype).transpose(0, 2, 1, 3), mode="drop")
    put_v = lambda into, new: into.at[at_BJ // W, row_BJ, :, at_BJ % W].set(_store(new, dtype).transpose(0, 2, 1, 3), mode="drop")
    return tuple(map(put_k, k, recent[0])), tuple(map(put_v, v, recent[1]))


# ---------------------------------------------------------------------------------------------------------------- online softmax
def _over_blocks(q_BKRH, k_CBKHW, v_CBKWH, blocks, visible, layer, dtype):
    """The running softmax (largest score, sum of weights, weighted values) over the first `blocks` blocks of keys."""
    B, K, R, H = q_BKRH.shape

    def one(c, acc):
        k, v = (_load(jax.lax.dynamic_index_in_dim(x, c, keepdims=False), dtype) for x in (k_CBKHW, v_CBKWH))
        return _attend_block(acc, q_BKRH, k, v, visible(c), layer, dtype)

    empty = (jnp.full((B, K, R, 1), NEG_INF), jnp.zeros((B, K, R, 1)), jnp.zeros((B, K, R, H)))
    return jax.lax.fori_loop(0, blocks, one, empty)


def _attend_block(acc, q_BKRH, k_BKHW, v_BKWH, visible, layer, dtype):
    """One block more. Where a row sees nothing of it, the weights are zero, the scale is one, and nothing changes."""
    top, total, out = acc
    scores = capped(jnp.einsum("BKRH,BKHW->BKRW", q_BKRH, k_BKHW, preferred_element_type=jnp.float32), layer.softcap)
    scores = jnp.where(visible, scores, NEG_INF)
    new_top = jnp.maximum(top, jnp.max(scores, axis=-1, keepdims=True))
    weights = jnp.where(visible, jnp.exp(scores - new_top), 0.0)
    scale = jnp.exp(top - new_top)
    values = jnp.einsum("BKRW,BKWH->BKRH", weights.astype(dtype), v_BKWH, preferred_element_type=jnp.float32)
    return new_top, total * scale + jnp.sum(weights, axis=-1, keepdims=True), out * scale + values


def _finish(acc):
    _, total, out = acc
    return out / jnp.maximum(total, 1e-30)  # a row that sees no key is padding, and must only stay finite


def _put(values: tuple, i: int, value) -> tuple:
    return (*values[:i], value, *values[i + 1:])
