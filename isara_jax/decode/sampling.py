"""Logits to tokens, each row with its own temperature, nucleus and random number. Nothing here looks from one row at another.

The order is that of Hugging Face: temperature first, then the nucleus (Holtzman et al. 2020). The random number of a token is addressed by
(seed, request address, position), so it does not depend on which rows are sampled together.
"""
from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

BLOCK = 128  # vocabulary entries in a block of the two-level draw
TOP_BLOCKS = 64  # blocks in which a nucleus is sought first: one of up to 64 tokens is always found there, most larger ones too
ROWS_WHOLE = 8  # rows whose whole vocabulary is searched at a time
KEYS = 256  # keys are made for a multiple of this
ONE = 0x3F800000  # the bits of 1.0 in float32, the largest weight there is


def request_keys(seed: int, addresses: np.ndarray) -> np.ndarray:
    """The keys [B, 2] uint32 of requests at 64-bit `addresses` [B] under a run's `seed` (0 to 2**63 - 1).

    Threefry (Salmon et al. 2011), named so that no default can change it: both halves of the seed, then both halves of the address.
    """
    addresses = np.asarray(addresses, np.uint64)
    padded = np.pad(addresses, (0, -len(addresses) % KEYS))  # few sizes, few compilations
    halves = ((padded >> np.uint64(shift)).astype(np.uint32) for shift in (32, 0))
    return np.asarray(_keys(np.uint32(seed >> 32), np.uint32(seed & 0xFFFFFFFF), *halves))[:len(addresses)]


@jax.jit
def _keys(seed_high: jax.Array, seed_low: jax.Array, high_B: jax.Array, low_B: jax.Array) -> jax.Array:
    key = jax.random.fold_in(jax.random.key(seed_low, impl="threefry2x32"), seed_high)
    return jax.vmap(lambda high, low: jax.random.key_data(jax.random.fold_in(jax.random.fold_in(key, high), low)))(high_B, low_B)


def sample(logits_BV: jax.Array, keys_B2: jax.Array, positions_B: jax.Array, temperature_B: jax.Array, top_p_B: jax.Array) -> jax.Array:
    """One token a row, [B] int32. A row with temperature 0 takes its largest logit (the first of equals).

    `positions_B` counts the generated tokens of each request from 0. Equal probabilities at the border of a nucleus are all kept.
    """
    largest_B1 = jnp.max(logits_BV, axis=-1, keepdims=True)
    index_V = jnp.arange(logits_BV.shape[1], dtype=jnp.int32)
    greedy_B = jnp.min(jnp.where(logits_BV == largest_B1, index_V, index_V[-1]), axis=-1)  # XLA:CPU's argmax takes three times as long

    def draw():
        heat_B = jnp.where(temperature_B > 0, temperature_B, 1.0)
        weights_BV = jnp.exp((logits_BV - largest_B1) / heat_B[:, None])
        narrow_B = (top_p_B < 1) & (temperature_B > 0)
        threshold_B = jax.lax.cond(jnp.any(narrow_B), lambda: nucleus_threshold(weights_BV, top_p_B), lambda: jnp.zeros_like(top_p_B))
        kept_BV = jnp.where(weights_BV >= jnp.where(narrow_B, threshold_B, 0.0)[:, None], weights_BV, 0.0)
        drawn_B = inverse_cdf(kept_BV, uniforms(keys_B2, positions_B))
        return jnp.where(temperature_B > 0, drawn_B, greedy_B)

    return jax.lax.cond(jnp.any(temperature_B > 0), draw, lambda: greedy_B)


def uniforms(keys_B2: jax.Array, positions_B: jax.Array) -> jax.Array:
    """One number in [0, 1) a row, a multiple of 2**-24: the bits of fold_in(request key, position)."""
    keys_B = jax.random.wrap_key_data(keys_B2, impl="threefry2x32")
    bits_B = jax.vmap(lambda key, position: jax.random.bits(jax.random.fold_in(key, position), (), jnp.uint32))(keys_B, positions_B)
    return (bits_B >> 8).astype(jnp.float32) * 2.0**-24


def nucleus_threshold(weights_BV: jax.Array, top_p_B: jax.Array) -> jax.Array:
    """The largest t [B] such that the weights of at least t hold `top_p` of the row's mass; weights are in [0, 1] and the largest is 1.

    The search looks at the blocks with the largest entries alone; rows whose nucleus reaches beyond them (one in 40 for a 135M model at
    temperature 0.7, every second one at 1) are searched whole, a few at a time. No row's answer depends on what the others need.
    """
    target_B = top_p_B * jnp.sum(weights_BV, axis=-1)
    weights_BNW = _blocks(weights_BV)
    largest_BN = jnp.max(weights_BNW, axis=-1)
    if largest_BN.shape[1] <= TOP_BLOCKS:
        return _bisect(weights_BV, target_B)
    ordered_BN, index_BN = jax.lax.top_k(largest_BN, TOP_BLOCKS + 1)
    top_BNW = jnp.take_along_axis(weights_BNW, index_BN[:, :TOP_BLOCKS, None], axis=1)
    threshold_B = _bisect(top_BNW.reshape(top_BNW.shape[0], -1), target_B)

    def search_whole(state):
        open_B, threshold_B = state
        some, row_R = jax.lax.top_k(open_B.astype(jnp.int32), min(ROWS_WHOLE, open_B.shape[0]))
        found_R = jnp.where(some > 0, _bisect(weights_BV[row_R], target_B[row_R]), threshold_B[row_R])
        return open_B.at[row_R].set(False), threshold_B.at[row_R].set(found_R)

    open_B = ordered_BN[:, TOP_BLOCKS] >= threshold_B
    return jax.lax.while_loop(lambda state: jnp.any(state[0]), search_whole, (open_B, threshold_B))[1]


def _bisect(weights_BV: jax.Array, target_B: jax.Array) -> jax.Array:
    """The largest t [B] such that the weights of at least t sum to the target; 0 where all of them do not.

    Non-negative floats are ordered as their bits are, so that bisection over the bits ends exactly and no sort is needed.
    """

    def halve(state):
        low_B, high_B = state  # the mass from `low` up reaches the target (or low is 0), the mass from `high` up does not
        middle_B = (low_B + high_B) // 2
        at_least = jax.lax.bitcast_convert_type(middle_B, jnp.float32)[:, None]
        reaches_B = jnp.sum(jnp.where(weights_BV >= at_least, weights_BV, 0.0), axis=-1) >= target_B
        return jnp.where(reaches_B, middle_B, low_B), jnp.where(reaches_B, high_B, middle_B)

    start = (jnp.zeros_like(target_B, jnp.int32), jnp.full_like(target_B, ONE + 1, jnp.int32))
    low_B, _ = jax.lax.while_loop(lambda s: jnp.any(s[1] - s[0] > 1), halve, start)
    return jax.lax.bitcast_convert_type(low_B, jnp.float32)


def inverse_cdf(weights_BV: jax.Array, uniforms_B: jax.Array) -> jax.Array:
    """The index at which the running sum of the weights first exceeds `uniforms` of the total: blocks first, then inside one block."""
    weights_BNW = _blocks(weights_BV)
    sums_BN = jnp.sum(weights_BNW, axis=-1)
    running_BN = jnp.cumsum(sums_BN, axis=-1)
    x_B = uniforms_B * running_BN[:, -1]
    block_B = _first_above(running_BN, sums_BN, x_B)
    before_B = jnp.where(block_B > 0, _at(running_BN, block_B - 1), 0.0)
    inside_BW = jnp.take_along_axis(weights_BNW, block_B[:, None, None], axis=1)[:, 0]
    return block_B * BLOCK + _first_above(jnp.cumsum(inside_BW, axis=-1), inside_BW, x_B - before_B)


def _blocks(weights_BV: jax.Array) -> jax.Array:
    """[B, N, BLOCK], with zeros behind the vocabulary."""
    B, V = weights_BV.shape
    return jnp.pad(weights_BV, ((0, 0), (0, -V % BLOCK))).reshape(B, -1, BLOCK)


def _first_above(running: jax.Array, weights: jax.Array, x_B: jax.Array) -> jax.Array:
    """The first index whose running sum is above x; where rounding leaves none, the last index that has weight."""
    first_B = jnp.sum(running <= x_B[:, None], axis=-1)
    last_B = jnp.max(jnp.where(weights > 0, jnp.arange(weights.shape[-1]), 0), axis=-1)
    return jnp.minimum(first_B, last_B).astype(jnp.int32)


def _at(values: jax.Array, index_B: jax.Array) -> jax.Array:
    return jnp.take_along_axis(values, index_B[:, None], axis=1)[:, 0]
