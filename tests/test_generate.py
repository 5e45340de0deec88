"""Requests to completions: order, company, ends of texts, refusals, and that nothing about a request or new weights recompiles."""
from __future__ import annotations

import dataclasses
import functools
import itertools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isara_jax.common import UserError
from isara_jax.decode import generate as module
from isara_jax.decode.engine import EngineConfig, prepare
from isara_jax.decode.generate import Completion, Request, generate
from isara_jax.models import decoder
from isara_jax.models.config import LayerKind, ModelConfig, Rope
from isara_jax.sharding import make_mesh

TINY = ModelConfig(vocab_size=97, d_model=32, n_layers=3, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=48, pattern=(LayerKind(Rope(5e3)),))
CONTEXT = 128
LETTERS = "abcdefghij"


@functools.cache
def mesh():
    return make_mesh(devices=jax.devices()[:1])


@functools.cache
def params(seed=0, dtype="float32"):
    return prepare(jax.tree.map(lambda x: x * 3 if x.ndim > 1 else x, decoder.init_params(TINY, seed)), dtype, mesh())


def letters(ids):
    """Token id to one letter, so that stop strings span tokens."""
    return "".join(LETTERS[i % 10] for i in ids)


def go(requests, *, seed=1, stop_ids=(), dtype="float32", decode=letters, weights=0, slots=4, **more):
    config = EngineConfig(dtype, slots=slots, chunk=16, key_block=32)
    return generate(params(weights, dtype), TINY, config, mesh(), requests, seed=seed, stop_ids=stop_ids, context=CONTEXT, decode=decode,
                    **more)


def requests_of(lengths, n=12, temperature=0.8, **more):
    rng = np.random.default_rng(0)
    return [Request(tuple(rng.integers(0, 97, length).tolist()), 100 + i, n, temperature, 0.95, **more) for i, length in enumerate(lengths)]


# ---------------------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_company_and_order_do_not_matter(dtype):
    """More requests than slots, of several lengths and limits: alone, reversed and together they say the same."""
    limits = [20, 9, 3, 12, 1, 8, 16, 0, 13]
    requests = [dataclasses.replace(r, max_new_tokens=n) for r, n in zip(requests_of([3, 50, 17, 1, 33, 40, 8, 20, 51]), limits)]
    together = go(requests, dtype=dtype)
    assert [len(c.ids) for c in together] == limits and {c.finish for c in together} == {"length"}
    assert go(requests[::-1], dtype=dtype)[::-1] == together
    for i in (0, 3, 8):
        assert go([requests[i]], dtype=dtype) == [together[i]]
    if dtype == "float32":  # a longer companion moves everyone to a larger capacity
        assert go([*requests, *requests_of([100], n=28)])[:-1] == together


def test_addresses_and_seeds():
    """Equal requests at other addresses or seeds draw otherwise; the same address draws the same."""
    prompt = requests_of([9])[0]
    made = go([dataclasses.replace(prompt, address=a) for a in (1, 2, 3, 1, 2**64 - 1)])
    texts = [c.text for c in made]
    assert len(set(texts)) == 4 and texts[0] == texts[3]
    assert go([dataclasses.replace(prompt, address=1)], seed=2**63 - 1)[0].text != texts[0]


def test_each_request_has_its_own_parameters():
    """Greedy, hot and narrow requests share a program and a batch."""
    greedy, hot = (dataclasses.replace(requests_of([9])[0], temperature=t, top_p=1.0) for t in (0.0, 1.5))
    narrow = dataclasses.replace(hot, top_p=1e-6)
    made = go([greedy, hot, narrow])
    assert made[0].ids == made[2].ids != made[1].ids


def test_end_of_text():
    """A stop id ends the text and is not in it, unless the request goes on beyond it."""
    request = requests_of([9], n=20, temperature=0.0)[0]
    free = go([request])[0].ids
    stop = next(t for i, t in enumerate(free) if i > 2 and t not in free[:i])
    at = free.index(stop)
    assert go([request], stop_ids=[stop, 96]) == [Completion(free[:at], letters(free[:at]), "eos")]
    assert go([dataclasses.replace(request, ignore_eos=True)], stop_ids=[stop]) == [Completion(free, letters(free), "length")]
    inside = dataclasses.replace(request, tokens=(stop, *request.tokens, stop))
    assert go([inside], stop_ids=[stop])[0].ids != [], "a stop id within the prompt is a token like any other"


def test_stop_strings():
    """A stop string across tokens and across two looks of the host is found; the text ends before it, whichever comes first."""
    request = requests_of([9], n=24, temperature=0.8)[0]
    ids = go([request])[0].ids
    text = letters(ids)
    for start in range(3, 12):
        stop = text[start:start + 4]
        at = text.find(stop)
        made = go([dataclasses.replace(request, stop=(stop, "never"))])[0]
        assert made == Completion(ids[:at], text[:at], "stop"), start
    assert go([dataclasses.replace(request, stop=("never",))]) == [Completion(ids, text, "length")]
    with pytest.raises(ValueError, match="no decode"):
        go([dataclasses.replace(request, stop=("x",))], decode=None)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 2), max_size=20), st.lists(st.text("ab ", min_size=1, max_size=3), min_size=1, max_size=3),
       st.integers(1, 8))
def test_cut_is_as_if_looked_for_after_every_token(ids, stop, stride):
    """Looking every `stride` tokens finds what looking after each token finds."""
    decode = lambda ids: "".join(["a", "b ", "ab"][i] for i in ids)

    def looking(step):
        for known in range(0, len(ids), step):
            if found := module._cut(ids[:known + step], known, tuple(stop), decode):
                return found
        return None

    found = looking(1)
    assert looking(stride) == found
    if found:
        assert not any(s in found[1] for s in stop) and decode(found[0]).startswith(found[1])
    else:
        assert not any(s in decode(ids) for s in stop)


def test_limits_of_the_context():
    """New tokens end with the context; a prompt that leaves no room is refused before any work, by number."""
    assert [len(c.ids) for c in go(requests_of([120, 127, 5], n=20))] == [8, 1, 20]
    assert go(requests_of([128, 5], n=0)) == [Completion([], "", "length")] * 2
    seen = []
    for bad, message in ((requests_of([128])[0], "128 tokens"), (Request((), 0, 4, 0.0, 1.0), "empty"),
                         (Request((97,), 0, 4, 0.0, 1.0), "token id 97"), (Request((1,), 0, 4, 0.0, 0.0), "top_p=0.0"),
                         (Request((1,), 0, 4, float("nan"), 1.0), "temperature=nan")):
        with pytest.raises(UserError, match=f"request 1: .*{message}"):
            go([requests_of([3])[0], bad], on_progress=lambda *counts: seen.append(counts))
    assert not seen
    assert go([]) == []


def test_progress_counts():
    seen = []
    made = go(requests_of([9, 30, 2, 5, 14, 6]), on_progress=lambda *counts: seen.append(counts))
    assert seen[-1] == (6, 6, 9 + 30 + 2 + 5 + 14 + 6, sum(len(c.ids) for c in made))
    assert all(a <= b for old, new in zip(seen, seen[1:]) for a, b in zip(old, new))


def test_other_weights_and_requests_compile_nothing():
    """Weights of the same shape, other lengths, limits, temperatures and stop ids run the programs that are there."""
    events = []
    listener = lambda name, *_, **__: events.append(name) if "backend_compile" in name else None
    go(requests_of([9, 40, 3]))
    params(7, "float32")
    changed = [dataclasses.replace(r, temperature=0.3, top_p=0.5, ignore_eos=True) for r in requests_of([33, 2, 50, 17], n=7)]
    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        other = go(changed, weights=7, stop_ids=[1, 2])
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)
    assert [len(c.ids) for c in other] == [7] * 4
    assert not events


def test_capacities_and_groups():
    """Capacities come about a third apart; a very long request does not make the short ones take its room."""
    ladder = module.capacities(128)
    assert [next(ladder) for _ in range(10)] == [128, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096]
    assert module._groups([100, 0, 4000, 96, 300], 128) == [(4096, [2]), (384, [4, 0, 3])]


# ---------------------------------------------------------------------------------------------------------------------- streaming
def grown(pieces):
    """The last of growing texts, each of which begins with the one before."""
    assert all(new.startswith(old) for old, new in zip(pieces, pieces[1:]))
    return pieces[-1]


def test_texts_grow_to_what_they_become():
    """Every text that is told begins the next one and the completion, stop strings are never seen, and telling changes nothing."""
    requests = [dataclasses.replace(r, max_new_tokens=n, stop=("ab", "fgh"), address=r.address + 50 * n)
                for n, r in itertools.product((1, 24, 40), requests_of([9, 3, 17, 30, 5, 6]))]
    seen = [[] for _ in requests]
    made = go(requests, on_text=lambda i, text: seen[i].append(text))
    assert made == go(requests)
    assert [grown(pieces) for pieces in seen] == [c.text for c in made] and not any("ab" in t or "fgh" in t for ts in seen for t in ts)
    assert {c.finish for c in made} == {"stop", "length"} and max(map(len, seen)) > 3
    with pytest.raises(ValueError, match="no decode"):
        go(requests_of([3]), decode=None, on_text=print)


def test_what_a_listener_raises_ends_the_work():
    def stop(i, text):
        raise InterruptedError

    with pytest.raises(InterruptedError):
        go(requests_of([9, 4], n=100), on_text=stop)
    assert len(go(requests_of([9]))[0].ids) == 12


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from([*"abQ:\n é€🙂".split(" "), b"\xe2", b"\x82", b"\xf0\x9f", b"\xff", "\ufffd"]), max_size=12),
       st.lists(st.sampled_from(["\nQ:", "\n€", "a", "ab", "bé", "🙂"]), max_size=2), st.integers(1, 5))
def test_what_is_settled_stays(parts, stop, stride):
    """Whatever bytes follow, half characters among them, up to a stop string or the end."""
    data = b"".join(p if isinstance(p, bytes) else p.encode() for p in parts)
    decode = lambda ids: bytes(ids).decode("utf-8", "replace")
    shown = [""]
    for end in range(stride, len(data) + stride, stride):
        if found := module._cut(list(data[:end]), end - stride, tuple(stop), decode):
            shown.append(found[1])
            break
        shown.append(module.settled(decode(data[:end]), stop))
    else:
        shown.append(decode(data))
    assert not any(s in grown(shown) for s in stop)


def test_half_a_stop_string_is_held_back():
    settled = module.settled
    assert settled("So.\nQ", ("\nQ:",)) == settled("So.\n", ("\nQ:",)) == settled("So.\n\ufffd", ("\nQ:",)) == "So."
    assert settled("So.\nWell", ("\nQ:",)) == "So.\nWell" and settled("aaa", ("aab",)) == "a" and settled("So.\nQ", ()) == "So.\nQ"
