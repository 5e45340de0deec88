"""Logits to tokens, each row with its own controls and random number. Nothing here looks from one row at another.

The order is that of Hugging Face: repetition penalty, stop ids before `min_new`, temperature, the `top_k` largest, then the nucleus of what
is left (Holtzman et al. 2020). The random number of a token is addressed by (seed, request address, tokens drawn so far), so it does not
depend on which rows are sampled together.

No sort over the vocabulary: one pass over the logits takes the maxima of blocks of `BLOCK` entries, a second one the sums of their weights,
and the rest looks at few blocks: those with the largest maxima, or the one drawn. Candidates stay in the order of the vocabulary, so that
rounding, which may swap two nearly equal ones, does not move the draw. What no row asks for is not computed.

Letters: B rows, V vocabulary entries, N blocks; R some rows, X any number of entries; I stop ids.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

BLOCK = 64        # vocabulary entries in a block
TOP_BLOCKS = 64   # blocks in which kept tokens are sought first, at most
ENOUGH = 48       # and at least: any 48 tokens of largest scores are within so many blocks
ROWS_WHOLE = 2    # rows whose whole vocabulary is searched at a time. Always so many: a row runs one program whatever the others need
WIDE = 2048       # entries of a row that may be summed in whatever order XLA has for large arrays
KEYS = 256        # keys are made for a multiple of this
ONE = 0x3F800000  # the bits of 1.0 in float32, the largest weight there is
MASK = 0x7FFFFFFF
TINY = float(np.finfo(np.float32).tiny)  # XLA:CPU takes smaller numbers for 0
NEAR = 1 - 2.0**-20  # one exponential in two compiled loops may differ in its last bits

T = TypeVar("T")


class Controls(NamedTuple):
    """What each row asks for; every field is [B]."""

    temperature: jax.Array         # float32; 0 (anything below 2**-126) takes the largest score, the first of equals
    top_p: jax.Array               # float32; 1 keeps all
    top_k: jax.Array               # int32; 0 keeps all
    repetition_penalty: jax.Array  # float32; 1 is none: logits of seen tokens are divided by it, negative ones multiplied
    min_new: jax.Array             # int32: stop ids are not drawn before so many tokens
    log_p: jax.Array               # bool: whether the log-probability of the token is wanted


class Drawn(NamedTuple):
    """What was drawn; every field is [B]."""

    token: jax.Array   # int32
    log_p: jax.Array   # float32: under the model's own distribution (logits as they came, temperature 1); 0 where not asked or broken
    broken: jax.Array  # bool: the logits hold NaN or +inf, or leave no finite score to draw; the token is 0


def request_keys(seeds: np.ndarray | int, addresses: np.ndarray) -> np.ndarray:
    """The keys [B, 2] uint32 of requests at 64-bit `addresses` [B] under one seed or a seed each (0 to 2**63 - 1).

    Threefry (Salmon et al. 2011), named so that no default can change it: both halves of the seed, then both halves of the address.
    """
    addresses = np.asarray(addresses, np.uint64)
    seeds = np.broadcast_to(np.asarray(seeds).astype(np.uint64), addresses.shape)
    padded = (np.pad(x, (0, -len(addresses) % KEYS)) for x in (seeds, addresses))  # few sizes, few compilations
    halves = ((x >> np.uint64(shift)).astype(np.uint32) for x in padded for shift in (32, 0))
    return np.asarray(_keys(*halves))[:len(addresses)]


@jax.jit
@jax.vmap
def _keys(seed_high: jax.Array, seed_low: jax.Array, high: jax.Array, low: jax.Array) -> jax.Array:
    key = jax.random.fold_in(jax.random.key(seed_low, impl="threefry2x32"), seed_high)
    return jax.random.key_data(jax.random.fold_in(jax.random.fold_in(key, high), low))


def uniforms(keys_B2: jax.Array, generated_B: jax.Array) -> jax.Array:
    """One number in [0, 1) a row, a multiple of 2**-24: the bits of fold_in(request key, tokens drawn so far)."""
    keys_B = jax.random.wrap_key_data(keys_B2, impl="threefry2x32")
    bits_B = jax.vmap(lambda key, count: jax.random.bits(jax.random.fold_in(key, count), (), jnp.uint32))(keys_B, generated_B)
    return (bits_B >> 8).astype(jnp.float32) * 2.0**-24


def sample(logits_BV: jax.Array, keys_B2: jax.Array, generated_B: jax.Array, controls: Controls, seen_BV: jax.Array | None,
           stop_ids_BI: jax.Array) -> Drawn:
    """One token a row; B is 2 or more.

    Scores are the logits after penalty and `min_new`. Equal scores at the border of `top_k` are all kept, as Hugging Face does, and so are
    equal probabilities at the border of the nucleus, which Hugging Face cuts by the order of its sort.

    Args:
        logits_BV: float32.
        keys_B2: uint32, of `request_keys`.
        generated_B: int32, tokens drawn so far.
        seen_BV: bool, the tokens of prompt and text so far; read for rows with a penalty only. None where no row has one.
        stop_ids_BI: int32, padded with -1.
    """
    banned_BI = jnp.where((generated_B < controls.min_new)[:, None], stop_ids_BI, -1)
    seen_BV = None if seen_BV is None else _padded(seen_BV, False)
    rows = _Rows(_padded(logits_BV, -jnp.inf), seen_BV, banned_BI, controls.repetition_penalty)
    changed = jnp.any(banned_BI >= 0) if seen_BV is None else jnp.any(controls.repetition_penalty != 1) | jnp.any(banned_BI >= 0)
    logit_maxima_BN = jnp.max(_blocks(rows.logits), axis=-1)
    maxima_BN = _when(changed, lambda _: jnp.max(_blocks(rows.scores()), axis=-1), logit_maxima_BN)
    largest_logit_B, largest_B = jnp.max(logit_maxima_BN, axis=-1), jnp.max(maxima_BN, axis=-1)
    no_number_B = jnp.isnan(jnp.sum(logits_BV, axis=-1))  # XLA:CPU's maximum of many elements passes over NaN, its sum does not
    broken_B = no_number_B | ~(jnp.isfinite(largest_logit_B) & jnp.isfinite(largest_B))
    warm_B = (controls.temperature >= TINY) & ~broken_B

    def warm(greedy_B):
        scale = _Scale(jnp.where(warm_B, largest_B, 0.0), jnp.where(warm_B, controls.temperature, 1.0))
        drawn_B = _draw(rows, maxima_BN, scale, warm_B, changed, uniforms(keys_B2, generated_B), controls)
        return jnp.where(warm_B, drawn_B, greedy_B)

    token_B = jnp.where(broken_B, 0, _when(jnp.any(warm_B), warm, _first_largest(rows, maxima_BN, largest_B)))
    asked_B = controls.log_p & ~broken_B

    def log_p(_):
        sums_BN = _sum(_blocks(jnp.exp(rows.logits - largest_logit_B[:, None])))
        return _at(logits_BV, token_B) - largest_logit_B - jnp.log(_sum(sums_BN))

    log_p_B = _when(jnp.any(asked_B), log_p, jnp.zeros_like(largest_B))
    return Drawn(token_B, jnp.where(asked_B, log_p_B, 0.0), broken_B)


# ----------------------------------------------------------------------------------------------------------------- scores and weights
class _Rows(NamedTuple):
    """Logits of R rows, padded to whole blocks, and what makes scores of them. Scores are made where they are read and never kept."""

    logits: jax.Array       # [R, V]
    seen: jax.Array | None  # [R, V] bool; None where nothing is penalised
    banned: jax.Array       # [R, I], stop ids not to be drawn now, else -1
    penalty: jax.Array      # [R]

    def scores(self) -> jax.Array:
        """[R, V]."""
        return self._scores(self.logits, self.seen, jnp.arange(self.logits.shape[1], dtype=jnp.int32)[None])

    def scores_of(self, block_RN: jax.Array) -> jax.Array:
        """The scores of some blocks, [R, N * BLOCK]."""
        R = len(block_RN)
        gather = lambda x_RV: jax.vmap(lambda x_NW, block_N: x_NW[block_N])(_blocks(x_RV), block_RN).reshape(R, -1)
        index_RX = (block_RN[:, :, None] * BLOCK + jnp.arange(BLOCK, dtype=jnp.int32)).reshape(R, -1)
        return self._scores(gather(self.logits), None if self.seen is None else gather(self.seen), index_RX)

    def _scores(self, logits_RX: jax.Array, seen_RX: jax.Array | None, index_RX: jax.Array) -> jax.Array:
        scores_RX, penalty_R1 = logits_RX, self.penalty[:, None]
        if seen_RX is not None:
            scores_RX = jnp.where(seen_RX, jnp.where(logits_RX < 0, logits_RX * penalty_R1, logits_RX / penalty_R1), logits_RX)
        for i in range(self.banned.shape[1]):
            scores_RX = jnp.where(index_RX == self.banned[:, i, None], -jnp.inf, scores_RX)
        return scores_RX


class _Scale(NamedTuple):
    """How scores of R rows become weights, in [0, 1] with 1 for the largest."""

    largest: jax.Array      # [R]
    temperature: jax.Array  # [R]

    def weights(self, scores_RX: jax.Array) -> jax.Array:
        return jnp.exp((scores_RX - self.largest[:, None]) / self.temperature[:, None])


def _when(wanted: jax.Array, body: Callable[[T], T], value: T) -> T:
    """body(value) if wanted, else value. A loop of one turn or none: XLA:CPU runs the branches of `lax.cond` on one core, loops on all."""
    turn = lambda state: (jnp.zeros((), bool), body(state[1]))
    return jax.lax.while_loop(lambda state: state[0], turn, (wanted, value))[1]


def _first_largest(rows: _Rows, maxima_BN: jax.Array, largest_B: jax.Array) -> jax.Array:
    """The first index [B] of the largest score. XLA:CPU's argmax takes three times as long."""
    first = lambda equal_BX: jnp.min(jnp.where(equal_BX, jnp.arange(equal_BX.shape[1], dtype=jnp.int32), equal_BX.shape[1] - 1), axis=-1)
    block_B = first(maxima_BN == largest_B[:, None])
    return block_B * BLOCK + first(rows.scores_of(block_B[:, None]) == largest_B[:, None])


# ------------------------------------------------------------------------------------------------------------------------- the draw
def _draw(rows: _Rows, maxima_BN: jax.Array, scale: _Scale, warm_B: jax.Array, changed: jax.Array, uniforms_B: jax.Array,
          controls: Controls) -> jax.Array:
    """Tokens [B] of the warm rows; others get anything. `changed`: whether the scores of any row are not its logits."""
    sum_blocks = lambda scores_BV: _sum(_blocks(scale.weights(scores_BV)))
    sums_BN = _when(changed, lambda _: sum_blocks(rows.scores()), jnp.zeros_like(maxima_BN))
    sums_BN = _when(~changed, lambda _: sum_blocks(rows.logits), sums_BN)
    total_B = _sum(sums_BN)
    narrow_B = warm_B & ((controls.top_p < 1) | (controls.top_k > 0))

    def from_all(_):
        block_B, rest_B = _pick(sums_BN, uniforms_B * total_B)
        return block_B * BLOCK + _pick(scale.weights(rows.scores_of(block_B[:, None])), rest_B)[0]

    def from_some(token_B):
        parts = (rows, scale, total_B, uniforms_B, controls.top_k, controls.top_p)
        found_B, open_B = _draw_in_top_blocks(*parts, maxima_BN, narrow_B)
        return _draw_in_whole(*parts, open_B, jnp.where(narrow_B, found_B, token_B))

    token_B = _when(jnp.any(warm_B & ~narrow_B), from_all, jnp.zeros(len(warm_B), jnp.int32))
    return _when(jnp.any(narrow_B), from_some, token_B)


def _draw_in_top_blocks(rows: _Rows, scale: _Scale, total_B: jax.Array, uniforms_B: jax.Array, top_k_B: jax.Array, top_p_B: jax.Array,
                        maxima_BN: jax.Array, narrow_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Tokens [B], and whether a token outside the blocks looked at may be kept, so that the answer is not one.

    For a 135M model, top-p 0.95, that is one row in 30 at temperature 0.7 and every second one at 1.
    """
    block_BK, missing_BK, outside_B = _top_blocks(maxima_BN, narrow_B)
    scores_BX = jnp.where(jnp.repeat(missing_BK, BLOCK, axis=1), -jnp.inf, rows.scores_of(block_BK))
    kept_BX, kth_B, least_B = kept_weights(scores_BX, scale.weights(scores_BX), total_B, top_k_B, top_p_B, narrow_B)
    place_B = _inverse_cdf(kept_BX, uniforms_B)
    token_B = _at(block_BK, place_B // BLOCK) * BLOCK + place_B % BLOCK
    outside_weight_B = scale.weights(outside_B[:, None])[:, 0]
    open_B = jnp.where(top_k_B > 0, outside_B >= kth_B, outside_weight_B >= least_B * NEAR)
    return token_B, narrow_B & open_B & (outside_B > -jnp.inf)


def _draw_in_whole(rows: _Rows, scale: _Scale, total_B: jax.Array, uniforms_B: jax.Array, top_k_B: jax.Array, top_p_B: jax.Array,
                   open_B: jax.Array, token_B: jax.Array) -> jax.Array:
    """`token_B` with those of the open rows drawn from their whole vocabulary, a few rows at a time."""
    every = (rows, scale, total_B, uniforms_B, top_k_B, top_p_B)

    def some(state):
        open_B, token_B = state
        row_1R, missing_1R = _places(open_B[None], ROWS_WHOLE)
        row_R, active_R = row_1R[0], ~missing_1R[0]
        rows_R, scale_R, total_R, uniforms_R, top_k_R, top_p_R = jax.tree.map(lambda x: x[row_R], every)
        scores_RV = rows_R.scores()
        kept_RV, _, _ = kept_weights(scores_RV, scale_R.weights(scores_RV), total_R, top_k_R, top_p_R, active_R)
        into_R = jnp.where(active_R, row_R, len(open_B))  # behind the last row: dropped
        return open_B.at[into_R].set(False, mode="drop"), token_B.at[into_R].set(_inverse_cdf(kept_RV, uniforms_R), mode="drop")

    return jax.lax.while_loop(lambda state: jnp.any(state[0]), some, (open_B, token_B))[1]


def kept_weights(scores_RX: jax.Array, weights_RX: jax.Array, total_R: jax.Array, top_k_R: jax.Array, top_p_R: jax.Array,
                 active_R: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The weights with 0 for what top-k or the nucleus drops, and the least score and the least weight kept ([R]).

    Args:
        total_R: the sum of all the row's weights, also of those that are not in X.
        active_R: rows whose answer is wanted; the search does not go on for others.
    """
    counted_R = active_R & (top_k_R > 0)
    rank_RX, ends = _rank(scores_RX), _rank(jnp.array([-jnp.inf, jnp.inf], jnp.float32))
    enough = lambda rank_R: jnp.sum((rank_RX >= rank_R[:, None]).astype(jnp.int32), axis=-1) >= top_k_R
    kth_R = _bisect(enough, jnp.broadcast_to(ends[0], top_k_R.shape), jnp.where(counted_R, ends[1], ends[0]))
    kth_R = jax.lax.bitcast_convert_type(kth_R ^ ((kth_R >> 31) & MASK), jnp.float32)
    weights_RX = jnp.where(scores_RX >= kth_R[:, None], weights_RX, 0.0)
    target_R = top_p_R * jnp.where(counted_R, _sum(weights_RX), total_R)
    least_R = nucleus_threshold(weights_RX, target_R, active_R & (top_p_R < 1))
    return jnp.where(weights_RX >= least_R[:, None], weights_RX, 0.0), kth_R, least_R


def nucleus_threshold(weights_RX: jax.Array, target_R: jax.Array, active_R: jax.Array) -> jax.Array:
    """The largest t [R] such that the weights of at least t sum to the target; 0 where all do not, and in rows that are not active."""

    def reaches(bits_R):
        at_least = jax.lax.bitcast_convert_type(bits_R, jnp.float32)[:, None]
        return _sum(jnp.where(weights_RX >= at_least, weights_RX, 0.0)) >= target_R

    low_R = _bisect(reaches, jnp.zeros(target_R.shape, jnp.int32), jnp.where(active_R, ONE + 1, 0))
    return jax.lax.bitcast_convert_type(low_R, jnp.float32)


def _bisect(holds: Callable[[jax.Array], jax.Array], low_R: jax.Array, high_R: jax.Array) -> jax.Array:
    """The largest int32 [R] below `high` at which `holds`, or `low`. Floats are ordered as their ranks are, so the search ends exactly."""

    def halve(state):
        low_R, high_R = state
        middle_R = _middle(low_R, high_R)  # `low` once the two are neighbours, so that `low` stays
        holds_R = holds(middle_R)
        return jnp.where(holds_R, middle_R, low_R), jnp.where(holds_R, high_R, middle_R)

    return jax.lax.while_loop(lambda state: jnp.any(state[0] < state[1] - 1), halve, (low_R, high_R))[0]


def _top_blocks(maxima_BN: jax.Array, active_B: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The `ENOUGH` to `TOP_BLOCKS` blocks of largest maxima (fewer where many are equal, none in rows that are not active), in their order.

    Returns (block [B, K], whether there is none [B, K], the largest score of all other blocks [B]). XLA:CPU makes a full sort of
    `lax.top_k` inside a loop, and the search for a bound on the maxima is over after some ten looks at them.
    """
    B, N = maxima_BN.shape
    if N <= TOP_BLOCKS:
        block_BK = jnp.broadcast_to(jnp.arange(N, dtype=jnp.int32), (B, N))
        return block_BK, jnp.zeros((B, N), bool), jnp.full((B,), -jnp.inf, jnp.float32)
    rank_BN = _rank(maxima_BN)

    def halve(state):
        low_B, high_B, open_B = state  # more than TOP_BLOCKS reach `low`, at most so many `high`
        middle_B = _middle(low_B, high_B)
        count_B = jnp.sum((rank_BN >= middle_B[:, None]).astype(jnp.int32), axis=-1)
        fits_B = count_B <= TOP_BLOCKS
        low_B, high_B = jnp.where(open_B & ~fits_B, middle_B, low_B), jnp.where(open_B & fits_B, middle_B, high_B)
        return low_B, high_B, open_B & ~(fits_B & (count_B >= ENOUGH)) & (low_B < high_B - 1)

    start = (jnp.min(rank_BN, axis=-1), jnp.max(rank_BN, axis=-1) + 1, active_B)
    _, high_B, _ = jax.lax.while_loop(lambda state: jnp.any(state[2]), halve, start)
    chosen_BN = rank_BN >= high_B[:, None]
    return *_places(chosen_BN, TOP_BLOCKS), jnp.max(jnp.where(chosen_BN, -jnp.inf, maxima_BN), axis=-1)


def _inverse_cdf(weights_RX: jax.Array, uniforms_R: jax.Array) -> jax.Array:
    """The index [R] at which the running sum of the weights first exceeds `uniforms` of the total: blocks first, then inside one block."""
    weights_RNW = _blocks(weights_RX)
    sums_RN = _sum(weights_RNW)
    block_R, rest_R = _pick(sums_RN, uniforms_R * _sum(sums_RN))
    return block_R * BLOCK + _pick(jax.vmap(lambda weights_NW, block: weights_NW[block])(weights_RNW, block_R), rest_R)[0]


def _pick(weights_RX: jax.Array, x_R: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The first index whose running sum is above x, and x less what is before; where rounding leaves none, the last index with weight."""
    running_RX = jnp.cumsum(weights_RX, axis=-1)
    first_R = jnp.sum((running_RX <= x_R[:, None]).astype(jnp.int32), axis=-1)
    last_R = jnp.max(jnp.where(weights_RX > 0, jnp.arange(weights_RX.shape[1], dtype=jnp.int32), 0), axis=-1)
    index_R = jnp.minimum(first_R, last_R)
    return index_R, x_R - jnp.where(index_R > 0, _at(running_RX, index_R - 1), 0.0)


# --------------------------------------------------------------------------------------------------------------------------- pieces
def _padded(x_BV: jax.Array, value: float | bool) -> jax.Array:
    """V rounded up to whole blocks. Concatenation copies rows; `jnp.pad`, which XLA makes of it unless hindered, copies numbers."""
    B, V = x_BV.shape
    if V % BLOCK == 0:
        return x_BV
    return jnp.concatenate([x_BV, jax.lax.optimization_barrier(jnp.full((B, -V % BLOCK), value, x_BV.dtype))], axis=1)


def _blocks(x_RV: jax.Array) -> jax.Array:
    """[R, N, BLOCK]."""
    return x_RV.reshape(x_RV.shape[0], -1, BLOCK)


def _sum(x: jax.Array) -> jax.Array:
    """Over the last axis; a row's bits are the same for any number of rows from 2.

    XLA:CPU adds up arrays of fewer than 4096 elements in another order than larger ones, but a running sum always in one order.
    """
    wide = x.size // len(x) >= WIDE
    return jnp.sum(x, axis=-1) if wide else jnp.cumsum(x, axis=-1)[..., -1]


def _places(wanted_RX: jax.Array, K: int) -> tuple[jax.Array, jax.Array]:
    """The first K indices [R, K] that are wanted, ascending, and whether there are not so many (the index is then any)."""
    running_RX = jnp.cumsum(wanted_RX.astype(jnp.int32), axis=-1)
    number_K = jnp.arange(1, K + 1, dtype=jnp.int32)
    place_RK = jax.vmap(lambda running_X: jnp.searchsorted(running_X, number_K))(running_RX).astype(jnp.int32)
    return jnp.minimum(place_RK, wanted_RX.shape[1] - 1), number_K > running_RX[:, -1:]


def _rank(x: jax.Array) -> jax.Array:
    """int32 ordered as the floats are (with -0 below 0)."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    return bits ^ ((bits >> 31) & MASK)


def _middle(low: jax.Array, high: jax.Array) -> jax.Array:
    """Their mean, rounded down, without overflow."""
    return (low & high) + ((low ^ high) >> 1)


def _at(values_RX: jax.Array, index_R: jax.Array) -> jax.Array:
    return jnp.take_along_axis(values_RX, index_R[:, None], axis=1)[:, 0]
