"""Tokens from logits: order of temperature and nucleus, exactness of the nucleus, frequencies, independence of rows."""
from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isara_jax.common import address
from isara_jax.decode import sampling


def draw(logits, n, temperature=1.0, top_p=1.0, seed=0):
    """n tokens from one row of logits, at n addresses."""
    keys = sampling.request_keys(seed, np.array([address("draw", i) for i in range(n)], np.uint64))
    rows = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (n, len(logits)))
    full = lambda value: jnp.full((n,), value, jnp.float32)
    return np.asarray(sampling.sample(rows, jnp.asarray(keys), jnp.zeros((n,), jnp.int32), full(temperature), full(top_p)))


def kept(weights, top_p):
    """Which entries of one row the nucleus keeps."""
    weights = jnp.asarray(weights, jnp.float32)[None]
    return (np.asarray(weights) >= np.asarray(sampling.nucleus_threshold(weights, jnp.array([top_p])))[:, None])[0].tolist()


def test_temperature_zero_takes_the_first_of_the_largest():
    logits = jnp.array([[0.0, 3.0, 3.0, 1.0], [5.0, -1.0, 4.0, 2.0], [-9.0, -9.0, -9.0, -8.0]])
    zeros = jnp.zeros((3,))
    keys = jnp.asarray(sampling.request_keys(0, np.arange(3, dtype=np.uint64)))
    assert sampling.sample(logits, keys, jnp.zeros((3,), jnp.int32), zeros, zeros + 0.5).tolist() == [1, 0, 3]
    mixed = sampling.sample(logits, keys, jnp.zeros((3,), jnp.int32), jnp.array([0.0, 1.0, 0.0]), zeros + 1)
    assert mixed[0] == 1 and mixed[2] == 3


def test_the_nucleus_is_taken_after_the_temperature():
    """At temperature 1 the nucleus of 0.7 is two tokens, at 0.5 the first token alone holds 0.77 of the mass."""
    logits = np.log([0.6, 0.3, 0.1])
    assert set(draw(logits, 200, 1.0, 0.7)) == {0, 1}
    assert set(draw(logits, 200, 0.5, 0.7)) == {0}
    assert set(draw(logits, 400, 2.0, 1.0)) == {0, 1, 2}


@pytest.mark.parametrize("weights, top_p, expected", [
    ([1.0, 0.5, 0.25, 0.25], 0.5, [True, False, False, False]),
    ([1.0, 0.5, 0.25, 0.25], 0.51, [True, True, False, False]),
    ([1.0, 0.5, 0.25, 0.25], 0.8, [True, True, True, True]),       # equals at the border stay together
    ([0.25, 1.0, 1.0, 0.25], 0.01, [False, True, True, False]),
    ([1.0, 0.0, 0.0], 0.999, [True, False, False]),
])
def test_nucleus_of_literal_weights(weights, top_p, expected):
    assert kept(weights, top_p) == expected


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([10, 97, 12_000]), st.floats(0.5, 8), st.floats(0.05, 0.999))
def test_nucleus_equals_the_sorted_one(seed, size, scale, top_p):
    """Against a float64 sort: flat rows reach beyond the blocks searched first, steep ones do not. Rounding may move the border by one."""
    logits = np.random.default_rng(seed).normal(size=size) * scale
    weights = np.exp(logits - logits.max()).astype(np.float32)
    order = np.argsort(-weights.astype(np.float64), kind="stable")
    mass = np.cumsum(weights[order].astype(np.float64)) / weights.astype(np.float64).sum()
    n = sum(kept(weights, top_p))
    near = 1e-5
    assert np.searchsorted(mass, top_p - near) + 1 <= n <= np.searchsorted(mass, top_p + near) + 1


def test_a_row_is_not_moved_by_what_others_need():
    """A steep row beside a flat one, which sends the search over the whole vocabulary."""
    rng = np.random.default_rng(0)
    steep, flat = (jnp.asarray(rng.normal(size=20_000) * scale, jnp.float32) for scale in (6, 0.1))
    weights = lambda *rows: jnp.exp(jnp.stack(rows) - jnp.max(jnp.stack(rows), axis=-1, keepdims=True))
    p = jnp.full((2,), 0.9)
    assert sampling.nucleus_threshold(weights(steep, steep), p)[0] == sampling.nucleus_threshold(weights(steep, flat), p)[0]


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.7, 1.0), (1.5, 0.9)])
def test_frequencies(temperature, top_p):
    """Chi-square of 20,000 draws over 300 tokens in three blocks; 60 cells at most, so 110 is beyond any reasonable chance."""
    logits = np.random.default_rng(1).normal(size=300) * 2
    weights = np.exp((logits - logits.max()) / temperature)
    weights = np.where(kept(weights, top_p) if top_p < 1 else True, weights, 0)
    n = 20_000
    expected = weights / weights.sum() * n
    counts = np.bincount(draw(logits, n, temperature, top_p), minlength=300)
    assert counts[weights == 0].sum() == 0
    cells = np.argsort(-expected)[:59]
    seen, wanted = (np.append(x[cells], x.sum() - x[cells].sum()) for x in (counts, expected))
    chi = np.sum((seen - wanted) ** 2 / np.maximum(wanted, 1e-9), where=wanted > 5)
    assert chi < 110


def test_draws_cover_blocks_and_skip_what_has_no_weight():
    weights = np.zeros((4, 300), np.float32)
    weights[0, 299], weights[1, 0], weights[2, 130], weights[3, [5, 299]] = 1e-30, 0.5, 1.0, 1.0
    last = np.float32(1 - 2.0**-24)
    assert sampling.inverse_cdf(jnp.asarray(weights), jnp.array([0.0, last, 0.3, last])).tolist() == [299, 0, 130, 299]
    assert sampling.inverse_cdf(jnp.asarray(weights), jnp.array([last, 0.0, last, 0.0])).tolist() == [299, 0, 130, 5]


def test_random_numbers_are_addressed():
    """Seed, address and position each count, in both halves; the same address gives the same number in any company."""
    keys = lambda seed, *addresses: sampling.request_keys(seed, np.array(addresses, np.uint64))
    all_keys = [keys(s, a)[0].tolist() for s in (0, 1, 2**32, 2**63 - 1) for a in (0, 1, 2**32, 2**64 - 1)]
    assert len({tuple(k) for k in all_keys}) == 16
    assert (keys(3, 7, 8, 9)[2] == keys(3, 9)[0]).all()
    many = keys(0, *range(500))
    u = np.asarray(sampling.uniforms(jnp.asarray(many), jnp.zeros((500,), jnp.int32)))
    assert 0 <= u.min() and u.max() < 1 and abs(u.mean() - 0.5) < 0.05
    assert (np.asarray(sampling.uniforms(jnp.asarray(many), jnp.ones((500,), jnp.int32))) != u).all()


def test_keys_are_pinned():
    """Another key schedule would silently change every run."""
    assert sampling.request_keys(0, np.array([0], np.uint64)).tolist() == [[683029726, 1624662641]]
