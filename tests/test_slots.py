"""The host's side of sampling with a model that is plain to see: which blocks hold which text, who waits for whom, and what was counted.

The keys of this model are the tokens themselves, so whoever reads a block that does not hold his text is seen at once; the next token is a
function of the whole text. Nothing is compiled, so many small cases can be tried.
"""
from __future__ import annotations

import zlib

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isara_jax.decode import attention
from isara_jax.decode import generate as module
from isara_jax.decode.blocks import Pool, most_in_use
from isara_jax.decode.engine import Chunk, EngineConfig
from isara_jax.decode.generate import Counts, Sampler, generate
from isara_jax.decode.requests import Completion, Request, check
from isara_jax.models.config import ModelConfig
from isara_jax.sharding import make_mesh

CFG = ModelConfig(vocab_size=50, d_model=8, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=4, d_ff=8)
CONTEXT, WIDTH, NOTHING = 64, 8, -7
MESH = make_mesh(devices=jax.devices()[:1])


def following(text):
    """The token after a text."""
    return zlib.crc32(np.asarray(text, np.int32).tobytes()) % 50


class Seen:
    """`Engine` with tokens in the place of keys: the pool is [blocks + 1, W]."""

    refused = 0  # requests that found too few blocks since the last decode steps

    def __init__(self, cfg, config, mesh, blocks, table):
        self.cfg, self.config, self.mesh, self.blocks, self.table = cfg, config, mesh, blocks, table
        self.slots, self.lanes = config.slots, config.lanes

    def empty_state(self):
        return np.full((self.blocks + 1, self.config.key_block), NOTHING)

    def prefill(self, params, state, tokens, start, table):
        W, T = self.config.key_block, self.config.chunk
        for ids, at, blocks in zip(tokens, start, table):
            state[blocks[at // W], at % W:at % W + T] = ids
        for at, blocks in zip(start, table):  # what comes before a chunk is there, or comes with the same call
            assert blocks[0] == self.blocks or (state[blocks[:at // W]] != NOTHING).all()
        return state

    def insert(self, state, source, target, counts):
        for a, b in zip(source[:counts[0]], target[:counts[0]]):
            state[b] = state[a]
        return state

    def decode_chunk(self, params, state, rows, places, groups=None, seen=None):
        Seen.refused, W, J = 0, self.config.key_block, self.config.steps
        tokens, generated, done = np.zeros((self.slots, J), np.int32), rows.generated.copy(), rows.done.copy()
        active = np.flatnonzero(~rows.done)
        used = -(-rows.cached // W)
        self.check_places(places, groups, active, used)
        for s in active:
            text = [*state[places.table[s, :used[s]]].reshape(-1)[:rows.cached[s]].tolist(), int(rows.token[s])]
            assert NOTHING not in text
            for j in range(J):
                if not done[s]:
                    at, token = rows.cached[s] + j, following(text)
                    state[places.table[s, at // W], at % W] = text[-1]
                    text.append(token)
                    tokens[s, j], generated[s] = token, generated[s] + 1
                    done[s] = generated[s] >= rows.limit[s] or token in rows.stop_ids[s]
        return state, Chunk(tokens, np.zeros((self.slots, J), np.float32), generated, done, np.zeros(self.slots, bool))

    def check_places(self, places, groups, active, used):
        """Every block of every row is walked once: with its group or in its tile."""
        assert sorted(places.order.tolist()) == list(range(self.slots))
        for s in active:
            (t,) = [t for t, rows in enumerate(attention.tiles(self.slots)) if s in places.order[rows]]
            assert places.first[t] <= max(places.own[s], 0) and used[s] <= places.last[t]
            assert (places.own[s] == 0) if groups is None else True
        if groups is None:
            return
        U, M = groups.members.shape
        assert groups.most.tolist() == groups.depth.reshape(-1, attention.GROUPS).max(axis=1).tolist() and groups.depth.any()
        for s in active:
            u, m = divmod(int(groups.of[s]), M)
            assert (u, places.own[s]) == (U, 0) or (groups.members[u, m], groups.depth[u]) == (s, places.own[s])
            assert places.own[s] * self.config.key_block <= used[s] * self.config.key_block
            if u < U:
                assert groups.table[u, :places.own[s]].tolist() == places.table[s, :places.own[s]].tolist()


@pytest.fixture(autouse=True)
def plain_model(monkeypatch):
    """The model above. Who asks three times for blocks that are not there, while nothing is decoded, would wait without end."""
    take = Pool.take

    def counted(self, n):
        found = take(self, n)
        Seen.refused += found is None
        assert Seen.refused < 3, "requests wait for blocks, and nothing is being done"
        return found

    monkeypatch.setattr(module, "Engine", Seen)
    monkeypatch.setattr(Pool, "take", counted)


def sampler(slots, *, share=True, steps=4):
    Seen.refused = 0
    config = EngineConfig("float32", slots=slots, chunk=4, key_block=WIDTH, steps=steps)
    return Sampler(None, CFG, config, MESH, stop_ids=(), context=CONTEXT, share=share)


def request(tokens, n=5):
    return Request(tuple(tokens), 0, n, 0.0, 1.0)


def expected(r):
    text = list(r.tokens)
    for _ in range(min(r.max_new_tokens, CONTEXT - len(r.tokens))):
        text.append(following(text))
    return Completion(text[len(r.tokens):], None, "length")


# ---------------------------------------------------------------------------------------------------------------------------------
PATHS = st.lists(st.tuples(st.integers(0, 2), st.integers(1, 6)), min_size=1, max_size=8).map(
    lambda parts: tuple(token for token, n in parts for _ in range(n))[:40])
REQUESTS = st.lists(st.builds(request, PATHS, st.integers(0, 20)), min_size=1, max_size=12)


@settings(max_examples=150, deadline=None)
@given(REQUESTS, REQUESTS, st.integers(1, 5), st.booleans(), st.integers(0, 3))
def test_every_row_reads_its_own_text(first, second, slots, share, repeated):
    """Prompts with many common beginnings, equal ones among them, in a pool no larger than needed, over two calls."""
    used, second = sampler(slots, share=share), second + second[:1] * repeated
    for requests in (first, second):
        assert list(used.stream(requests, seed=0)) == [expected(r) for r in requests]
        counts = used.counts
        assert counts.prompt_tokens == sum(len(r.tokens) - 1 for r in requests if r.max_new_tokens)
        assert counts.generated == sum(r.max_new_tokens for r in requests) == counts.busy + counts.tail_busy
        assert 0 <= counts.prefilled <= counts.prefill_room and counts.room + counts.tail_room == counts.steps * slots
        assert share or counts.shared == 0


@pytest.mark.parametrize("slots, whole, limit", [(1, 2, 9), (1, 7, 8), (2, 3, 12), (1, 0, 20)])
def test_samples_of_one_prompt_where_the_pool_holds_no_more(slots, whole, limit):
    """Equal prompts that end inside a block: the begun block, the copy of it and the rest must fit, or one must be computed again."""
    requests = [request([1] * (whole * WIDTH + 4), limit)] * 5
    assert list(sampler(slots).stream(requests, seed=0)) == [expected(requests[0])] * 5


def test_what_sharing_saved():
    """Blocks of 8. Twelve samples of 21 tokens (20 prefilled); a header of 16 with 3 ends; a header of 8 within it; strangers."""
    header = list(range(16))
    samples, ends = [request([9] * 21)] * 12, [request([*header, 20 + i, 30, 40]) for i in range(3)]
    nested, strangers = [request([*header[:8], 5, 5, 5]), request([*header[:8]])], [request([7]), request([8] * 3)]
    for requests, computed, of in ((samples, 20, 240), (ends, 16 + 3 * 2, 54), (ends + nested, 16 + 3 * 2 + 2 + 7, 54 + 10 + 7),
                                   (strangers, 2, 2), ([request([3] * 17)] * 3, 16, 48), ([request([3] * 9)] * 2, 8, 16)):
        for share in (True, False):
            used = sampler(12, share=share)
            assert list(used.stream(requests, seed=0)) == [expected(r) for r in requests]
            assert (used.counts.prompt_tokens, used.counts.prefilled) == (of, computed if share else of)
            assert used.counts.shared == (of - computed if share else 0)


def test_a_sampler_remembers_prompts():
    """The next turn of a chat computes what is new, from the last whole block of the old prompt on."""
    used, turn = sampler(1), list(range(30))
    list(used.stream([request(turn, 20)], seed=0))
    made = list(used.stream([request([*turn, 1, 2, 3, 4], 20)], seed=0))
    assert made == [expected(request([*turn, 1, 2, 3, 4], 20))]
    assert (used.counts.prompt_tokens, used.counts.prefilled, used.counts.shared) == (33, 9, 24)


def test_the_beginning_of_a_text_stays_longest():
    """When blocks are needed, what follows a header goes before the header, so that what is left can still be found."""
    used = sampler(1)
    header = [1] * 24
    list(used.stream([request([*header, 2], 30)], seed=0))        # 3 blocks named, 4 of its own
    list(used.stream([request([3] * 34, 6)], seed=0))             # takes idle ones
    list(used.stream([request([*header, 2], 30)], seed=0))
    assert used.counts.shared >= 16


def test_counts_of_a_small_schedule():
    """Two slots, runs of 4 steps, prompts of 5, 3, 2 and 1 tokens; 6, 2, 3 and 1 new ones.

    Run 1: requests 0 and 1 draw 4 and 2, and two wait. Run 2: request 0 draws 2, and one waits; the one chunk of request 2 is left for a
    fuller prefill. Run 3: none waits, so what is there is computed; requests 2 and 3 draw 3 and 1.
    """
    requests = [request([1, 2, 3, 4, 5], 6), request([6, 7, 8], 2), request([9, 10], 3), request([11], 1)]
    config, found = EngineConfig("float32", slots=2, chunk=4, key_block=WIDTH, steps=4), []
    made = generate(None, CFG, config, MESH, requests, seed=0, stop_ids=(), context=CONTEXT, on_end=found.append)
    assert made == [expected(r) for r in requests]
    assert found == [Counts(prompt_tokens=7, prefilled=7, prefill_room=2 * config.lanes * 4, generated=12, steps=9, busy=8, room=12,
                            tail_busy=4, tail_room=6)]


def test_completions_come_as_soon_as_they_can():
    """In the order of the requests; the first while the third has not been begun, for two slots are there."""
    used, prefilled = sampler(2), []
    stream = used.stream([request([1] * 9, 2), request([2] * 5, 2), request([3] * 2, 30), request([4] * 3, 1)], seed=0)
    for r in ([1] * 9, 2), ([2] * 5, 2), ([3] * 2, 30), ([4] * 3, 1):
        assert next(stream) == expected(request(*r))
        prefilled.append(used.counts.generated)
    assert prefilled[0] < prefilled[2] == 35 and next(stream, None) is None


def test_a_stream_that_is_left_does_no_harm():
    used, requests = sampler(2), [request([1] * 20, 2), request([2] * 20, 30), request([1] * 18, 30), request([1] * 20, 30)]
    stream = used.stream(requests, seed=0)
    next(stream)
    stream.close()
    assert list(used.stream(requests, seed=0)) == [expected(r) for r in requests]


def test_no_new_tokens():
    used = sampler(2)
    assert list(used.stream([], seed=0)) == []
    requests = [request([1] * 64, 0), request([2] * 3, 4), request([3], 0)]
    assert list(used.stream(requests, seed=0)) == [Completion([], None, "length"), expected(requests[1]), Completion([], None, "length")]
    assert list(used.stream([request([1], 0)], seed=0)) == [Completion([], None, "length")] and used.counts == Counts()


def test_the_order_of_work():
    """Longest first; those that begin alike stand together, at the place of the longest of them."""
    requests = [request([token] * n) for token, n in ((1, 9), (2, 30), (3, 10), (1, 20), (3, 40), (2, 30), (5, 3))]
    assert list(sampler(2)._queue(requests, [5] * 7)) == [4, 2, 1, 5, 3, 0, 6]


@pytest.mark.parametrize("number", [1_000, 4_000])
def test_work_grows_with_the_number_of_requests(number, monkeypatch):
    """The operations of the pool and the looks at waiting requests are a few for each request, however many there are."""
    calls = {"known": 0, "take": 0, "release": 0, "use": 0, "find": 0}

    for name in calls:
        def counted(self, *args, name=name, method=getattr(Pool, name)):
            calls[name] += 1
            return method(self, *args)
        monkeypatch.setattr(Pool, name, counted)
    requests = [request([i % 50, i // 50 % 50, 3] * 4, 1) for i in range(number)]
    used = sampler(16)
    assert sum(len(c.ids) for c in used.stream(requests, seed=0)) == number
    assert calls["take"] <= 1.2 * number and calls["known"] <= 3 * number and calls["release"] <= 6 * number and calls["use"] <= 4 * number


def test_a_hundred_thousand_requests():
    """Layouts, order and room for them: what is done before the first token."""
    requests = [request([i % 50, i // 50 % 50, i // 2500]) for i in range(100_000)]
    check(requests, vocab_size=50, context=CONTEXT, decode=None)
    queue = sampler(64)._queue(requests, [5] * len(requests))
    assert sorted(queue) == list(range(100_000)) and most_in_use(queue.values(), 64) == 64
