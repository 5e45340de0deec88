"""Attention of sampling over blocks of keys: `attend` functions for chunks of prompts and for one new token a row, and the blocks themselves.

Keys and values lie in a pool of blocks, [N, K, H, W] and [N, K, W, H] for each layer, in the layout their products read (on XLA:CPU another
layout of the keys costs 13 times as much). A row's text is a list of blocks, so rows that begin alike can name the same ones. bfloat16 is
stored as its uint16 bits, for XLA:CPU copies bfloat16 element by element.

What keeps a row's bits the same in any company: blocks stand at absolute positions and are taken one after the other with an online
softmax (Milakov and Gimelshein 2018), and a block in which a row sees nothing leaves the row's numbers exactly as they were. Whether
the queries that meet a block are those of one row or of several rows that share it does not change them either, as long as a product has
2 to 32 rows (tests/test_canary.py).

Letters as in models/layers.py, and: N blocks of W keys, C places in a table of blocks, P lanes of a prefill, S rows, J steps of a run,
R = G * T query rows that share a key head, M members of a group of rows, U groups.
"""
from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from isara_jax.models.config import ModelConfig
from isara_jax.models.layers import NEG_INF, capped, group_heads, in_window

TILE = 16    # rows that walk their blocks in step: as many steps as the longest of them needs
GROUPS = 8   # groups that walk their common blocks in step
PRODUCT = 32  # rows of a product up to which its bits are those of 2 rows (research: row-count classes of XLA:CPU in float32)
SUMMED = 4096  # elements of an array from which on XLA:CPU adds up its rows in one order

KV = tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]  # keys and values, each a tuple over layers


class Places(NamedTuple):
    """Where each row's keys lie.

    Attributes:
        table: [S, C] int32, its blocks in the order of the text; what is behind the last is any block.
        own: [S] int32, its first block that is not walked with its group; 0 where it has none.
        order: [S] int32, the rows by their number of blocks, so that a tile holds rows of like length.
        first: [tiles] int32, of each tile of `order` the first block to walk, and
        last: [tiles] int32, the one behind the last.
    """

    table: jax.Array
    own: jax.Array
    order: jax.Array
    first: jax.Array
    last: jax.Array


class Groups(NamedTuple):
    """Rows that begin with the same blocks, whose queries meet these blocks together.

    Attributes:
        table: [U, C] int32, the common blocks.
        depth: [U] int32, how many they are; 0 for a group without members.
        members: [U, M] int32, the rows, any where there are fewer.
        most: [U / GROUPS] int32, largest depth of each tile of groups.
        of: [S] int32, u * M + m for the m-th member of group u; U * M for a row without a group.
    """

    table: jax.Array
    depth: jax.Array
    members: jax.Array
    most: jax.Array
    of: jax.Array


def stored_dtype(dtype: str) -> jnp.dtype:
    """The type in which keys and values of `dtype` are kept."""
    return jnp.dtype("uint16" if dtype == "bfloat16" else dtype)


def block_bytes(cfg: ModelConfig, dtype: str, width: int) -> int:
    """Bytes of a block of `width` keys and values, of all layers."""
    return width * cfg.n_layers * 2 * cfg.n_kv_heads * cfg.head_dim * stored_dtype(dtype).itemsize


def members(cfg: ModelConfig) -> int:
    """Most rows of a group: so many that their queries make a product of up to `PRODUCT` rows; 1 where two would make a larger one."""
    return max(1, PRODUCT // _heads(cfg))


def tiles(rows: int) -> list[slice]:
    """The parts of `Places.order` that walk in step."""
    return [slice(start, min(start + TILE, rows)) for start in range(0, rows, TILE)]


def empty(cfg: ModelConfig, dtype: str, blocks: int, width: int) -> KV:
    """A pool of `blocks` blocks of `width` keys."""
    stored, K, H = stored_dtype(dtype), cfg.n_kv_heads, cfg.head_dim
    return (tuple(jnp.zeros((blocks, K, H, width), stored) for _ in range(cfg.n_layers)),
            tuple(jnp.zeros((blocks, K, width, H), stored) for _ in range(cfg.n_layers)))


def _heads(cfg: ModelConfig) -> int:
    """Query rows of one text row that share a key head; 2 where it is one, for products of one row have bits of their own."""
    return max(2, cfg.n_heads // cfg.n_kv_heads)


def finite(k: jax.Array, v: jax.Array, dtype: str, mark: bool = True) -> tuple[jax.Array, jax.Array]:
    """Keys and values [..., H] in `dtype`, such that they harm no later text in their block.

    A value that is not finite becomes 0, for a weight of 0 does not hide NaN. Its key becomes NaN, so that whoever sees it is broken too;
    scores of keys that a row does not see are replaced, whatever they are. Without `mark` (where masked scores are not
    replaced) its key becomes 0 as well, and what it was goes unnoticed.
    """
    k, v = k.astype(dtype), v.astype(dtype)
    good = jnp.isfinite(v)
    fallback = jnp.asarray(jnp.nan if mark else 0, k.dtype)
    k = jnp.where(jnp.all(good, axis=-1, keepdims=True) if mark else jnp.isfinite(k), k, fallback)
    return k, jnp.where(good, v, jnp.zeros((), v.dtype))


def _store(x: jax.Array, dtype: str) -> jax.Array:
    x = x.astype(dtype)
    return jax.lax.bitcast_convert_type(x, jnp.uint16) if dtype == "bfloat16" else x


def _load(x: jax.Array, dtype: str) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, jnp.bfloat16) if dtype == "bfloat16" else x


# ----------------------------------------------------------------------------------------------------------------------- prefill
def prefill(dtype: str, start_P: jax.Array, table_PC: jax.Array):
    """An `attend` for P chunks of T prompt tokens at positions from `start`: all write their keys, then each goes over its blocks.

    The state is a `KV`. A chunk lies within one block. Chunks of one text may be computed together: the later ones see the earlier ones.
    """

    def attend(q_BTNH, k_BTKH, v_BTKH, layer, state):
        T, K, i = q_BTNH.shape[1], k_BTKH.shape[2], layer.index
        k, v = state[0][i], state[1][i]
        W = k.shape[-1]
        new_k, new_v = (_store(x, dtype) for x in finite(k_BTKH, v_BTKH, dtype))
        new_k, new_v = new_k.transpose(0, 2, 3, 1), new_v.transpose(0, 2, 1, 3)
        block_P, offset_P = _at(table_PC, start_P // W), start_P % W
        for p in range(len(start_P)):
            k = jax.lax.dynamic_update_slice(k, new_k[p:p + 1], (block_P[p], 0, 0, offset_P[p]))
            v = jax.lax.dynamic_update_slice(v, new_v[p:p + 1], (block_P[p], 0, offset_P[p], 0))
        q_BKRH = group_heads(jax.lax.optimization_barrier(q_BTNH.astype(dtype)), K)
        position_PR = start_P[:, None] + jnp.tile(jnp.arange(T), q_BKRH.shape[2] // T)

        def visible(c):
            distance_PRW = position_PR[..., None] - (c * W + jnp.arange(W))
            return in_window(distance_PRW >= 0, distance_PRW, layer)[:, None]

        acc = _walk(_nothing(*q_BKRH.shape), q_BKRH, k, v, table_PC, 0, jnp.max(start_P) // W + 1, visible, layer, dtype)
        return _finish(acc, T, dtype), (_put(state[0], i, k), _put(state[1], i, v))

    return attend


# ------------------------------------------------------------------------------------------------------------------------ decode
def empty_recent(cfg: ModelConfig, rows: int, steps: int) -> KV:
    """Room for the keys and values [S, K, J, H] of a run of decode steps, in float32."""
    make = lambda: tuple(jnp.zeros((rows, cfg.n_kv_heads, steps, cfg.head_dim)) for _ in range(cfg.n_layers))
    return make(), make()


def decode(dtype: str, kv: KV, places: Places, groups: Groups | None, cached_S: jax.Array, j: jax.Array):
    """An `attend` for one token a row, the j-th of a run: over its `cached` keys in blocks, then over the recent ones up to itself.

    The state is the recent keys and values. Without `groups` every row walks alone.
    """

    def attend(q_BTNH, k_BTKH, v_BTKH, layer, state):
        K, W, i = k_BTKH.shape[2], kv[0][layer.index].shape[-1], layer.index
        k, v, G = kv[0][i], kv[1][i], q_BTNH.shape[2] // k_BTKH.shape[2]
        put = lambda into, new: jax.lax.dynamic_update_slice_in_dim(into, new.transpose(0, 2, 1, 3), j, axis=2)
        recent_k, recent_v = put(state[0][i], k_BTKH), put(state[1][i], v_BTKH)
        q_SKRH = group_heads(q_BTNH.astype(dtype), K)
        if G == 1:
            q_SKRH = jnp.concatenate([q_SKRH, jnp.zeros_like(q_SKRH)], axis=2)
        start = _nothing(*q_SKRH.shape) if groups is None else _common(q_SKRH, k, v, groups, cached_S + j, layer, dtype)
        walked = []
        for t, part in enumerate(tiles(len(cached_S))):
            rows = places.order[part]
            table, cached, own = places.table[rows], cached_S[rows], places.own[rows]

            def visible(c):
                place_W = c * W + jnp.arange(W)
                seen = (place_W < cached[:, None]) & (c >= own[:, None])
                return in_window(seen, (cached + j)[:, None] - place_W, layer)[:, None, None]

            acc = tuple(x[rows] for x in start)
            walked.append(_walk(acc, q_SKRH[rows], k, v, table, places.first[t], places.last[t], visible, layer, dtype))
        back = jnp.argsort(places.order)
        acc = tuple(jnp.concatenate(parts)[back] for parts in zip(*walked))
        back_J = j - jnp.arange(recent_k.shape[2])
        among = in_window(back_J >= 0, back_J, layer)[None, None, None]
        scores = jnp.einsum("BKRH,BKJH->BKRJ", q_SKRH, recent_k.astype(dtype), preferred_element_type=jnp.float32)
        acc = _add(acc, scores, recent_v.astype(dtype), among, layer, dtype)
        return _finish([x[:, :, :G] for x in acc], 1, dtype), (_put(state[0], i, recent_k), _put(state[1], i, recent_v))

    return attend


def _common(q_SKRH: jax.Array, k: jax.Array, v: jax.Array, groups: Groups, position_S: jax.Array, layer, dtype: str):
    """The running softmax of every row after the blocks of its group: a group's queries stand side by side in one product."""
    (U, M), (_, K, R, H), W = groups.members.shape, q_SKRH.shape, k.shape[-1]
    found = []
    for t in range(U // GROUPS):
        part = slice(t * GROUPS, (t + 1) * GROUPS)
        member_UM = groups.members[part]
        q_UKRH = q_SKRH[member_UM].transpose(0, 2, 1, 3, 4).reshape(GROUPS, K, M * R, H)

        def visible(c):
            place_W = c * W + jnp.arange(W)
            seen = jnp.broadcast_to((c < groups.depth[part])[:, None, None], (GROUPS, M, W))
            return jnp.repeat(in_window(seen, position_S[member_UM][..., None] - place_W, layer), R, axis=1)[:, None]

        acc = _walk(_nothing(*q_UKRH.shape), q_UKRH, k, v, groups.table[part], 0, groups.most[t], visible, layer, dtype)
        found.append([x.reshape(GROUPS, K, M, R, -1).transpose(0, 2, 1, 3, 4).reshape(GROUPS * M, K, R, -1) for x in acc])
    alone = _nothing(1, K, R, H)
    return tuple(jnp.concatenate([*parts, none])[groups.of] for *parts, none in zip(*found, alone))


def flush(dtype: str, kv: KV, recent: KV, block_SJ: jax.Array, offset_SJ: jax.Array) -> KV:
    """The pool with the recent keys and values written where they are told to go."""
    new = [[_store(x, dtype) for x in finite(k, v, dtype)] for k, v in zip(*recent)]
    put_k = lambda into, new: into.at[block_SJ, :, :, offset_SJ].set(new.transpose(0, 2, 1, 3))
    put_v = lambda into, new: into.at[block_SJ, :, offset_SJ].set(new.transpose(0, 2, 1, 3))
    return tuple(map(put_k, kv[0], (k for k, _ in new))), tuple(map(put_v, kv[1], (v for _, v in new)))


# ---------------------------------------------------------------------------------------------------------------- online softmax
def _nothing(B: int, K: int, R: int, H: int):
    """The running softmax before the first key: largest score, sum of weights, weighted values."""
    return jnp.full((B, K, R, 1), NEG_INF), jnp.zeros((B, K, R, 1)), jnp.zeros((B, K, R, H))


def _walk(acc, q_BKRH, k_NKHW, v_NKWH, table_BC, first, last, visible, layer, dtype):
    """The running softmax after the blocks `first` to `last` of each row's table."""

    def one(c, acc):
        block_B = jax.lax.dynamic_index_in_dim(table_BC, c, axis=1, keepdims=False)
        scores = jnp.einsum("BKRH,BKHW->BKRW", q_BKRH, _load(k_NKHW[block_B], dtype), preferred_element_type=jnp.float32)
        return _add(acc, scores, _load(v_NKWH[block_B], dtype), visible(c), layer, dtype)

    return jax.lax.fori_loop(first, last, one, acc)


def _add(acc, scores_BKRW, v_BKWH, visible, layer, dtype):
    """The keys of one block more. Where a row sees nothing of it, the weights are zero, the scale is one, and nothing changes.

    What is hidden scores -inf and the largest score is at least `NEG_INF`, so its weight is exp(-inf), zero.
    """
    top, total, out = acc
    scores = jnp.where(visible, capped(scores_BKRW, layer.softcap), -jnp.inf)
    new_top = jnp.maximum(top, jnp.max(scores, axis=-1, keepdims=True))
    weights = jnp.exp(scores - new_top)
    scale = jnp.exp(top - new_top)
    values = jnp.einsum("BKRW,BKWH->BKRH", weights.astype(dtype), v_BKWH, preferred_element_type=jnp.float32)
    return new_top, total * scale + _sum(weights), out * scale + values


def _sum(x_BKRW: jax.Array) -> jax.Array:
    """Over the last axis, [B, K, R, 1]. XLA:CPU adds up arrays of fewer than `SUMMED` elements in another order, so rows of zeros join."""
    B, *rest = x_BKRW.shape
    short = -(-SUMMED // math.prod(rest)) - B
    if short > 0:
        x_BKRW = jax.lax.optimization_barrier(jnp.concatenate([x_BKRW, jnp.zeros((short, *rest))]))
    return jnp.sum(x_BKRW, axis=-1, keepdims=True)[:B]


def _finish(acc, T: int, dtype: str) -> jax.Array:
    """[B, T, N, H] of a running softmax, in the dtype that the next product takes.

    The barrier lets XLA:CPU move whole heads: merged with what follows, it would find the place of every single number.
    """
    _, total, out = acc
    out = (out / jnp.maximum(total, 1e-30)).astype(dtype)  # a row that sees no key is padding, and must only stay finite
    B, K, R, H = out.shape
    return jax.lax.optimization_barrier(out.reshape(B, K, R // T, T, H).transpose(0, 3, 1, 2, 4)).reshape(B, T, K * (R // T), H)


def _at(table: jax.Array, index: jax.Array) -> jax.Array:
    return jnp.take_along_axis(table, index[:, None], axis=1)[:, 0]


def _put(values: tuple, i: int, value) -> tuple:
    return (*values[:i], value, *values[i + 1:])
