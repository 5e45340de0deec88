"""Tokens from logits: against Hugging Face's own processors, frequencies, exactness of the search, independence of rows."""
from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers.generation import logits_process as hf

from isara_jax.common import address
from isara_jax.decode import sampling
from isara_jax.decode.sampling import Controls

sample, kept_weights = jax.jit(sampling.sample), jax.jit(sampling.kept_weights)
NAN, INF = float("nan"), float("inf")


def controls(n, temperature=1.0, top_p=1.0, top_k=0, repetition_penalty=1.0, min_new=0, log_p=False):
    """Each argument one value for all n rows or a list of n."""
    full = lambda value, dtype: np.broadcast_to(np.asarray(value, dtype), (n,))
    return Controls(full(temperature, np.float32), full(top_p, np.float32), full(top_k, np.int32), full(repetition_penalty, np.float32),
                    full(min_new, np.int32), full(log_p, bool))


def run(logits, seen=(), stop=(-1,), generated=0, seed=0, **asked):
    """`sample` over rows of logits at addresses 0, 1, ...; `seen` are ids of every row, or one bool array for all."""
    logits = np.asarray(logits, np.float32)
    n, V = logits.shape
    if not isinstance(seen, np.ndarray):
        seen = np.broadcast_to(np.isin(np.arange(V), list(seen)), (n, V))
    stop = np.broadcast_to(np.asarray(stop, np.int32), (n, np.shape(stop)[-1]))
    generated = np.broadcast_to(np.asarray(generated, np.int32), (n,))
    keys = sampling.request_keys(seed, np.array([address("draw", i) for i in range(n)], np.uint64))
    return sampling.Drawn(*map(np.asarray, sample(logits, keys, generated, controls(n, **asked), seen, stop)))


def draw(logits, n, **asked):
    """n tokens from one row of logits."""
    return run(np.broadcast_to(np.asarray(logits, np.float32), (n, len(logits))), **asked).token


def by_hugging_face(logits, temperature=1.0, top_p=1.0, top_k=0, repetition_penalty=1.0, seen=(), stop=(), generated=0, min_new=0):
    """float64 scores of one row after transformers' processors, in the order in which its `generate` has them; -inf is dropped."""
    ids, scores = torch.tensor([[*seen] + [0] * generated]), torch.tensor(np.asarray(logits, np.float32)[None])
    if repetition_penalty != 1:
        scores = hf.RepetitionPenaltyLogitsProcessor(repetition_penalty)(torch.tensor([[*seen]]), scores)
    if min_new:
        scores = hf.MinNewTokensLengthLogitsProcessor(len(seen), min_new, torch.tensor([*stop]), device="cpu")(ids, scores)
    scores = hf.TemperatureLogitsWarper(temperature)(None, scores)
    if top_k:
        scores = hf.TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = hf.TopPLogitsWarper(top_p)(None, scores.double())
    return scores[0].double().numpy()


def kept(scores, top_k=0, top_p=1.0):
    """Which entries of one row of scores top-k and the nucleus keep."""
    scores = jnp.asarray(scores, jnp.float32)[None]
    weights = jnp.exp(scores - jnp.max(scores))
    asked = np.array([top_k], np.int32), np.array([top_p], np.float32), np.array([True])
    out, _, _ = kept_weights(scores, weights, jnp.sum(weights, axis=-1), *asked)
    return (np.asarray(out)[0] > 0).tolist()


# ------------------------------------------------------------------------------------------------------------------- literal rows
def test_temperature_zero_takes_the_first_of_the_largest():
    logits = [[0.0, 3.0, 3.0, 1.0], [5.0, -1.0, 4.0, 2.0], [-9.0, -9.0, -9.0, -8.0]]
    assert run(logits, temperature=0.0, top_p=0.5, top_k=2).token.tolist() == [1, 0, 3]
    assert run(logits, temperature=1e-40).token.tolist() == [1, 0, 3]
    mixed = run(logits, temperature=[0.0, 1.0, 0.0]).token
    assert mixed[0] == 1 and mixed[2] == 3
    wide = np.zeros((2, 9000), np.float32)
    wide[0, [77, 8999]], wide[1, 8999] = 1.0, 1.0
    assert run(wide, temperature=0.0).token.tolist() == [77, 8999]


def test_greedy_obeys_penalty_and_min_new():
    logits = [[4.0, 3.0, -2.0, -3.0]] * 2
    assert run(logits, temperature=0.0, repetition_penalty=[1.0, 2.0], seen=[0]).token.tolist() == [0, 1]   # 4 / 2 < 3
    low = [[-9.0, -9.0, -2.0, -3.0]] * 2
    assert run(low, temperature=0.0, repetition_penalty=[1.0, 2.0], seen=[2]).token.tolist() == [2, 3]      # -2 * 2 < -3
    assert run(logits, temperature=0.0, min_new=3, stop=[0, -1], generated=[2, 3]).token.tolist() == [1, 0]
    assert run(logits, temperature=0.0, min_new=3, stop=[[1, 0], [-1, -1]]).token.tolist() == [2, 0]


def test_the_nucleus_is_taken_after_the_temperature():
    """At temperature 1 the nucleus of 0.7 is two tokens, at 0.5 the first token alone holds 0.77 of the mass."""
    logits = np.log([0.6, 0.3, 0.1])
    assert set(draw(logits, 200, top_p=0.7)) == {0, 1}
    assert set(draw(logits, 200, top_p=0.7, temperature=0.5)) == {0}
    assert set(draw(logits, 200, temperature=2.0)) == {0, 1, 2}


def test_the_nucleus_is_that_of_what_top_k_left():
    """0.4 is 0.57 of the two largest, but not half of all."""
    logits = np.log([0.1, 0.4, 0.2, 0.3])
    assert set(draw(logits, 200, top_p=0.5)) == {1, 3}
    assert set(draw(logits, 200, top_p=0.5, top_k=2)) == {1}
    assert set(draw(logits, 200, top_k=2)) == {1, 3}
    assert set(draw(logits, 200, top_k=9)) == {0, 1, 2, 3}


@pytest.mark.parametrize("weights, top_p, expected", [
    ([1.0, 0.5, 0.25, 0.25], 0.5, [True, False, False, False]),
    ([1.0, 0.5, 0.25, 0.25], 0.51, [True, True, False, False]),
    ([1.0, 0.5, 0.25, 0.25], 0.8, [True, True, True, True]),       # equals at the border stay together
    ([0.25, 1.0, 1.0, 0.25], 0.01, [False, True, True, False]),
    ([1.0, 0.0, 0.0], 0.999, [True, False, False]),
])
def test_nucleus_of_literal_weights(weights, top_p, expected):
    with np.errstate(divide="ignore"):
        assert kept(np.log(weights), top_p=top_p) == expected


@pytest.mark.parametrize("scores, top_k, expected", [
    ([3.0, 1.0, 2.0, 2.0], 1, [True, False, False, False]),
    ([3.0, 1.0, 2.0, 2.0], 2, [True, False, True, True]),          # all that equal the second
    ([-3.0, -1.0, -2.0, -INF], 2, [False, True, True, False]),
    ([0.0, -0.0, -1.0, -2.0], 1, [True, True, False, False]),
    ([3.0, 1.0, 2.0, 0.0], 9, [True, True, True, True]),
])
def test_top_k_of_literal_scores(scores, top_k, expected):
    assert kept(scores, top_k=top_k) == expected


# ----------------------------------------------------------------------------------------------------------- against Hugging Face
def rows_of_logits(seed, size, scale, tied):
    logits = np.random.default_rng(seed).normal(size=size) * scale
    return (np.round(logits * 2) / 2 if tied else logits).astype(np.float32)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([10, 97, 700]), st.floats(0.5, 6), st.booleans(), st.integers(0, 60), st.floats(0.05, 1))
def test_kept_sets_equal_those_of_hugging_face(seed, size, scale, tied, top_k, top_p):
    """But for equals at the border of the nucleus, of which it keeps some and we all, and for sums within rounding of `top_p`."""
    logits, top_p = rows_of_logits(seed, size, scale, tied), 1.0 if top_p > 0.95 else top_p
    before = by_hugging_face(logits, top_k=top_k)
    p = np.exp(before - before.max())
    mass = np.cumsum(-np.sort(-p)) / p.sum()
    assume(np.min(np.abs(mass - top_p)[:-1], initial=1) > 1e-5)
    theirs = by_hugging_face(logits, top_k=top_k, top_p=top_p)
    least = np.min(theirs[theirs > -np.inf])
    assert kept(logits, top_k, top_p) == (before >= least).tolist()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([50, 700, 9000]), st.floats(0.1, 6), st.booleans(), st.data())
def test_tokens_equal_those_of_hugging_faces_scores(seed, size, scale, tied, data):
    """Eight rows, every control mixed, each against the inverse CDF over transformers' scores at the same random number; a row at
    temperature 0 against their largest. Flat rows reach beyond the blocks searched first. Numbers near a border are let go."""
    one_of = lambda *values: data.draw(st.lists(st.sampled_from(values), min_size=8, max_size=8))
    logits = np.stack([rows_of_logits(seed + i, size, scale, tied) for i in range(8)])
    asked = dict(temperature=one_of(0.0, 0.5, 0.7, 1.0, 1.5), top_p=one_of(1.0, 1.0, 0.95, 0.5), top_k=one_of(0, 0, 1, 20, 300),
                 repetition_penalty=one_of(1.0, 1.0, 1.3, 0.7), min_new=one_of(0, 4))
    generated, seen, stop = np.array(one_of(0, 3, 4)), [0, 3, 7, 11, 48], [int(np.argmax(logits[0])), 5]
    tokens = run(logits, seen, stop, generated, seed, **asked).token
    keys = sampling.request_keys(seed, np.array([address("draw", i) for i in range(8)], np.uint64))
    u = np.asarray(sampling.uniforms(keys, jnp.asarray(generated)), np.float64)
    checked = 0
    for i in range(8):
        own = {name: values[i] for name, values in asked.items()}
        temperature, top_p = own["temperature"], own.pop("top_p")
        before = by_hugging_face(logits[i], **own | {"temperature": temperature or 1.0}, seen=seen, stop=stop, generated=int(generated[i]))
        if temperature == 0:
            assert tokens[i] == np.argmax(before)
            continue
        p = np.exp(before - before.max())
        mass = np.cumsum(-np.sort(-p)) / p.sum()
        if top_p < 1:
            p[p < -np.sort(-p)[np.searchsorted(mass, top_p)]] = 0
        running = np.cumsum(p) / p.sum()
        if (top_p == 1 or np.min(np.abs(mass - top_p)) > 1e-5) and np.min(np.abs(running - u[i])) > 1e-5:
            assert tokens[i] == np.searchsorted(running, u[i], side="right")
            checked += 1
    assume(checked)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([10, 97, 12_000]), st.floats(0.5, 8), st.floats(0.05, 0.999))
def test_nucleus_equals_the_sorted_one(seed, size, scale, top_p):
    """Against a float64 sort. Rounding may move the border by one."""
    logits = np.random.default_rng(seed).normal(size=size) * scale
    weights = np.exp(logits - logits.max()).astype(np.float32)
    order = np.argsort(-weights.astype(np.float64), kind="stable")
    mass = np.cumsum(weights[order].astype(np.float64)) / weights.astype(np.float64).sum()
    n = sum(kept(logits, top_p=top_p))
    near = 1e-5
    assert np.searchsorted(mass, top_p - near) + 1 <= n <= np.searchsorted(mass, top_p + near) + 1


# ------------------------------------------------------------------------------------------------------------------ law of the draw
@pytest.mark.parametrize("asked", [{}, {"temperature": 0.7}, {"temperature": 1.5, "top_p": 0.9}, {"top_k": 30}, {"top_k": 40, "top_p": 0.8},
                                   {"repetition_penalty": 1.5, "temperature": 1.2}, {"min_new": 1}])
def test_frequencies(asked):
    """Chi-square of 20,000 draws over 300 tokens in five blocks; 60 cells at most, so 110 is beyond any reasonable chance."""
    logits, seen, stop = np.random.default_rng(1).normal(size=300) * 2, [3, 77, 150, 299], [int(i) for i in (7, 200)]
    scores = by_hugging_face(logits, **asked, seen=seen, stop=stop)
    weights = np.exp(scores - scores.max())
    n = 20_000
    expected = weights / weights.sum() * n
    counts = np.bincount(draw(logits, n, seen=seen, stop=stop, **asked), minlength=300)
    assert counts[weights == 0].sum() == 0
    cells = np.argsort(-expected)[:59]
    told, wanted = (np.append(x[cells], x.sum() - x[cells].sum()) for x in (counts, expected))
    assert np.sum((told - wanted) ** 2 / np.maximum(wanted, 1e-9), where=wanted > 5) < 110


def test_frequencies_beyond_the_blocks_searched_first():
    """Equal logits over 8,000 entries: no 64 blocks hold the nucleus or the 5,000 largest, and equals are all kept."""
    for asked in ({"top_p": 0.9}, {"top_k": 5000}, {"top_k": 5000, "top_p": 0.5}):
        parts = np.bincount(draw(np.zeros(8000), 2000, **asked) // 1000, minlength=8)
        assert len(parts) == 8 and np.sum((parts - 250) ** 2 / 250) < 30
    steps = np.arange(8000) // 1000 * 1e-3
    assert set(draw(steps, 500, top_k=1500) // 1000) == {6, 7}


def test_draws_reach_every_kept_token_and_no_other():
    """One token in each of 40 blocks, 3 in the first."""
    scores = np.full(5000, -np.inf)
    wanted = [0, 1, 63, *range(64, 64 * 40, 64), 4999]
    scores[wanted] = 0.0
    for asked in ({}, {"top_p": 0.999}, {"top_k": 64}):
        assert set(draw(scores, 1000, **asked)) == set(wanted)


def test_log_p_is_the_models_own():
    """Whatever temperature, filters and penalty drew it; 0 where it was not asked for."""
    logits = np.random.default_rng(3).normal(size=(6, 5000)).astype(np.float32) * 4 + 50
    logits[5] = -np.inf
    logits[5, 7] = 3.0
    asked = [True, False, True, True, True, True]
    out = run(logits, seen=range(2000), stop=[9], log_p=asked, temperature=[0.7, 1.0, 0.0, 1.0, 3.0, 1.0], top_p=[0.9, 1, 1, 0.5, 1, 1],
              top_k=[0, 0, 0, 9, 0, 0], repetition_penalty=[1, 1, 1.3, 1.3, 1, 1], min_new=4)
    exact = torch.log_softmax(torch.tensor(logits, dtype=torch.float64), -1).numpy()[np.arange(6), out.token]
    np.testing.assert_allclose(out.log_p, np.where(asked, exact, 0), rtol=0, atol=2e-5)
    assert out.log_p[1] == 0 and out.log_p[5] == 0 and out.token[5] == 7


# -------------------------------------------------------------------------------------------------------------- independence of rows
def test_a_broken_row_says_so_and_harms_no_other():
    logits = np.random.default_rng(0).normal(size=(8, 9000)).astype(np.float32)
    bad = logits.copy()
    bad[1, 5], bad[2, 70], bad[3], bad[5, 8999] = NAN, INF, -INF, -NAN
    bad.view(np.int32)[6, 0] = 0x7FFFFFFF  # NaN, and the largest int32 there is
    for asked in ({"temperature": 0.0}, {"temperature": 0.7, "top_p": 0.9}, {"repetition_penalty": 1.2, "top_k": 40, "min_new": 1}, {}):
        good, out = (run(x, seen=[5], stop=[5, 70], log_p=True, **asked) for x in (logits, bad))
        assert out.broken.tolist() == [False, True, True, True, False, True, True, False] and not good.broken.any()
        assert out.token[out.broken].tolist() == [0] * 5 and (out.log_p[out.broken] == 0).all()
        assert (out.token == good.token)[~out.broken].all() and (out.log_p == good.log_p)[~out.broken].all()


def test_nothing_left_to_draw_is_broken():
    out = run([[1.0, 2.0, -INF], [1.0, 2.0, 0.5]], stop=[0, 1], min_new=1)
    assert out.broken.tolist() == [True, False] and out.token.tolist() == [0, 2]


@pytest.mark.parametrize("size", [9000, 300])
def test_a_row_is_the_same_in_any_company(size):
    """Bit for bit, with every control mixed: 64 rows together, then in companies of 2, 5 and 33; beside calm rows and broken ones."""
    rng = np.random.default_rng(size)
    n = 64
    logits = (rng.normal(size=(n, size)) * rng.choice([0.1, 2, 6], size=(n, 1))).astype(np.float32)
    keys = sampling.request_keys(5, np.arange(n, dtype=np.uint64))
    mixed = controls(n, rng.choice([0, 0.3, 0.7, 1, 2], n), rng.choice([1, 0.95, 0.5], n), rng.choice([0, 0, 1, 50, 3000], n),
                     rng.choice([1, 1, 1.2, 0.8], n), rng.choice([0, 5], n), rng.random(n) < 0.7)
    given = (logits, keys, rng.integers(0, 9, n).astype(np.int32), mixed, rng.random((n, size)) < 0.05,
             rng.integers(0, size, (n, 3)).astype(np.int32))
    rows = lambda index: sample(*jax.tree.map(lambda x: x[index], given))
    alike = lambda one, other: all((np.asarray(x) == np.asarray(y)).all() for x, y in zip(one, other))
    together = jax.tree.map(np.asarray, rows(np.arange(n)))
    pick = lambda index: [x[index] for x in together]
    for company in (2, 5, 33):
        for _ in range(6):
            index = rng.choice(n, company, replace=False)
            assert alike(rows(index), pick(index)), (size, company)
    for mate in (np.zeros(size, np.float32), np.full(size, NAN, np.float32)):
        calm = controls(1)
        for i in range(n):
            pair = [np.stack([x[i], y]) for x, y in zip(given[:3], (mate, keys[0], np.int32(0)))]
            both = Controls(*(np.append(x[i], y) for x, y in zip(mixed, calm)))
            out = sample(*pair, both, given[4][[i, 0]], np.stack([given[5][i], np.full(3, -1, np.int32)]))
            assert alike([x[:1] for x in out], pick([i])), (size, i)


# --------------------------------------------------------------------------------------------------------------------- random numbers
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


def test_each_request_may_have_its_own_seed():
    seeds, addresses = np.array([0, 2**63 - 1, 5, 0], np.uint64), np.array([0, 1, 2, 3], np.uint64)
    each = sampling.request_keys(seeds, addresses)
    for i in range(4):
        assert (each[i] == sampling.request_keys(int(seeds[i]), addresses[i:i + 1])[0]).all()
    assert (sampling.request_keys(seeds.astype(np.int64), addresses) == each).all()


def test_keys_are_pinned():
    """Another key schedule would silently change every run."""
    assert sampling.request_keys(0, np.array([0], np.uint64)).tolist() == [[683029726, 1624662641]]
    assert sampling.request_keys(2**63 - 1, np.array([2**64 - 1], np.uint64)).tolist() == [[1270697373, 739565951]]
    keys = sampling.request_keys(0, np.array([0, 1], np.uint64))
    assert np.asarray(sampling.uniforms(jnp.asarray(keys), jnp.array([0, 3]))).tolist() == [0.058622539043426514, 0.6956960558891296]
