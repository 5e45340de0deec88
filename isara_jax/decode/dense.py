"""Attention of sampling for GPUs and TPUs: the keys of a row are gathered from its blocks and attended at once.

Blocks and tables are those of decode/attention.py, so whoever fills them need not know which of the two runs. What differs:

* one array holds a block's keys of all layers, [N, L, W, K, H], and one its values, in the plain dtype. Layers are scanned, and the scan
  carries these arrays and writes them in place: as slices of a scan they would be copied at every layer of every step;
* decode gathers each row's blocks once for a run of steps, into [L, S, M, K, H] with M = C * W, where a key stands at its position. A step
  writes its key behind the others. The new keys go back into the blocks at the end of the run;
* the softmax goes over all M places of a table, what lies behind a row masked. A row's bits therefore do not depend on the other rows, but
  they may depend on M, the width of the tables.

`kind` is "xla" (products and softmax by the compiler) or "cudnn" (the fused kernel of NVIDIA's library; see decode/recipes.py for what it
takes). Letters as in decode/attention.py.
"""
from __future__ import annotations

import jax
import jax.numpy as jnp

from isara_jax.decode.attention import finite
from isara_jax.models.config import ModelConfig
from isara_jax.models.layers import Layer, in_window, masked_attention

KV = tuple[jax.Array, jax.Array]  # keys and values of all layers


def empty(cfg: ModelConfig, dtype: str, blocks: int, width: int) -> KV:
    """A pool of `blocks` blocks of `width` keys, [N, L, W, K, H] each for keys and values."""
    shape = (blocks, cfg.n_layers, width, cfg.n_kv_heads, cfg.head_dim)
    return jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)


def prefill(kind: str, dtype: str, start_P: jax.Array, table_PC: jax.Array):
    """An `attend` for P chunks of T prompt tokens at positions from `start`: all write their keys, then each goes over its blocks.

    The state is the pool. A chunk lies within one block. Chunks of one text may be computed together: the later ones see the earlier ones.
    """

    def attend(q_BTNH, k_BTKH, v_BTKH, layer, state):
        (P, C), T, (W, K, H) = table_PC.shape, q_BTNH.shape[1], state[0].shape[2:]
        at_PT = start_P[:, None] + jnp.arange(T)
        block_PT = jnp.take_along_axis(table_PC, at_PT // W, axis=1)
        state = tuple(pool.at[block_PT, layer.index, at_PT % W].set(new) for pool, new in zip(state, _kept(kind, k_BTKH, v_BTKH, dtype)))
        k_PSKH, v_PSKH = (pool[table_PC, layer.index].reshape(P, C * W, K, H) for pool in state)
        distance_PTS = at_PT[..., None] - jnp.arange(C * W)
        visible_PTS = in_window(distance_PTS >= 0, distance_PTS, layer)
        return _attention(kind, dtype, q_BTNH, k_PSKH, v_PSKH, visible_PTS, start_P + T, True, layer), state

    return attend


def gather(kv: KV, table_SC: jax.Array) -> KV:
    """The blocks of each row one after another: [L, S, M, K, H] each for keys and values."""

    def one(pool_NLWKH):
        _, L, W, K, H = pool_NLWKH.shape
        S, C = table_SC.shape
        layers_first = jax.lax.GatherDimensionNumbers(offset_dims=(0, 3, 4, 5), collapsed_slice_dims=(0,), start_index_map=(0,))
        out_LSCWKH = jax.lax.gather(pool_NLWKH, table_SC[..., None], layers_first, (1, L, W, K, H), mode="clip")
        return out_LSCWKH.reshape(L, S, C * W, K, H)

    return one(kv[0]), one(kv[1])


def decode(kind: str, dtype: str, cached_S: jax.Array, j: jax.Array):
    """An `attend` for one token a row, the j-th of a run: its key is written at its position, then all up to it are attended.

    The state is what `gather` made. A row that is done may be told to write behind the last place; that is dropped.
    """
    at_S = cached_S + j

    def attend(q_BTNH, k_BTKH, v_BTKH, layer, state):
        rows, M = jnp.arange(len(at_S)), state[0].shape[2]
        state = tuple(held.at[layer.index, rows, at_S].set(new[:, 0], mode="drop", unique_indices=True)
                      for held, new in zip(state, _kept(kind, k_BTKH, v_BTKH, dtype)))
        k_SMKH, v_SMKH = (jax.lax.dynamic_index_in_dim(held, layer.index, keepdims=False) for held in state)
        distance_SM = at_S[:, None] - jnp.arange(M)
        visible_S1M = in_window(distance_SM >= 0, distance_SM, layer)[:, None]
        windowed = not isinstance(layer.window, int) or layer.window > 0
        return _attention(kind, dtype, q_BTNH, k_SMKH, v_SMKH, visible_S1M, jnp.minimum(at_S + 1, M), windowed, layer), state

    return attend


def flush(kv: KV, held: KV, at_SJ: jax.Array, block_SJ: jax.Array) -> KV:
    """The pool with the keys and values at the positions `at` [S, J] of each row written into the blocks that are named for them."""

    def one(pool_NLWKH, held_LSMKH):
        rows_S1 = jnp.arange(len(at_SJ))[:, None]
        new_LSJKH = held_LSMKH.at[:, rows_S1, at_SJ].get(mode="clip")
        return pool_NLWKH.at[block_SJ, :, at_SJ % pool_NLWKH.shape[2]].set(new_LSJKH.transpose(1, 2, 0, 3, 4))

    return one(kv[0], held[0]), one(kv[1], held[1])


# ---------------------------------------------------------------------------------------------------------------------------------
def _attention(kind: str, dtype: str, q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, visible_BTS: jax.Array, lengths_B: jax.Array,
               masked: bool, layer: Layer) -> jax.Array:
    """Attention [B, T, N, H] of scaled queries, float32. No key from `lengths` on is visible; unless `masked`, all before it are."""
    if kind == "xla":
        return masked_attention(q_BTNH, k_BSKH, v_BSKH, visible_BTS, layer, dtype)
    out = jax.nn.dot_product_attention(q_BTNH.astype(dtype), k_BSKH, v_BSKH, mask=visible_BTS[:, None] if masked else None, scale=1.0,
                                       key_value_seq_lengths=lengths_B.astype(jnp.int32), implementation="cudnn")
    return out.astype(jnp.float32)


def _kept(kind: str, k: jax.Array, v: jax.Array, dtype: str) -> tuple[jax.Array, jax.Array]:
    return finite(k, v, dtype, mark=kind == "xla")  # whether cuDNN replaces masked scores or adds to them is not documented
