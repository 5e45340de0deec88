"""Requests to completions: company, sharing, parameters, ends of texts, and that nothing about a request or new weights recompiles."""
from __future__ import annotations

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isara_jax.common import UserError
from isara_jax.decode import generate as module
from isara_jax.decode.engine import EngineConfig, prepare
from isara_jax.decode.generate import Completion, Request, Sampler, generate
from isara_jax.models import decoder
from isara_jax.models.config import LayerKind, ModelConfig, Rope
from isara_jax.sharding import make_mesh, param_shardings

TINY = ModelConfig(vocab_size=97, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=48, pattern=(LayerKind(Rope(5e3)),))
WIDE = ModelConfig(vocab_size=512, d_model=576, n_layers=2, n_heads=9, n_kv_heads=3, head_dim=64, d_ff=1536, tie_embeddings=True)
CONTEXT = 128
LETTERS = "abcdefghij"


@pytest.fixture(autouse=True)
def pools_of_one_size(monkeypatch):
    """No smaller than 64 blocks, so that the tests share programs. Pools with no room to spare are in tests/test_slots.py."""
    size = module.pool_blocks
    monkeypatch.setattr(module, "pool_blocks", lambda needed, slots: max(64, size(needed, slots)))


@functools.cache
def mesh():
    return make_mesh(devices=jax.devices()[:1])


@functools.cache
def params(seed=0, dtype="float32", cfg=TINY):
    return prepare(jax.tree.map(lambda x: x * 3 if x.ndim > 1 else x, decoder.init_params(cfg, seed)), dtype, mesh())


def letters(ids):
    """Token id to one letter, so that stop strings span tokens."""
    return "".join(LETTERS[i % 10] for i in ids)


def config_of(dtype="float32"):
    return EngineConfig(dtype, slots=4, chunk=16, key_block=32)


def go(requests, *, seed=1, stop_ids=(), dtype="float32", decode=letters, weights=None, **more):
    weights = params(0, dtype) if weights is None else weights
    return generate(weights, TINY, config_of(dtype), mesh(), requests, seed=seed, stop_ids=stop_ids, context=CONTEXT, decode=decode, **more)


def requests_of(lengths, n=12, temperature=0.8, **more):
    rng = np.random.default_rng(0)
    return [Request(tuple(rng.integers(0, 97, length).tolist()), 100 + i, n, temperature, 0.95, **more) for i, length in enumerate(lengths)]


def alike():
    """Prompts that begin alike: samples of one that ends inside a block and of one that ends on its border (32 prefilled), a header, a
    header within it, prompts of one token, a stranger."""
    rng = np.random.default_rng(0)
    draw = lambda n: tuple(rng.integers(0, 97, n).tolist())
    header, one, border = draw(64), draw(45), draw(33)
    ends = [*(header + draw(n) for n in (1, 5, 30)), *(header[:32] + draw(n) for n in (2, 20))]
    prompts = [*[one] * 6, *[border] * 3, *ends, (5,), (5,), draw(50)]
    return [Request(p, i, 4 + i % 9, 0.8, 0.95, log_p=True) for i, p in enumerate(prompts)]


# ------------------------------------------------------------------------------------------------- company, order, slots, restart
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_company_and_order_do_not_matter(dtype):
    """More requests than slots, of several lengths and limits: alone, reversed and together they say the same, to the last bit."""
    limits = [20, 9, 3, 12, 1, 8, 16, 0, 13]
    lengths = [3, 50, 17, 1, 33, 40, 8, 20, 51]
    requests = [dataclasses.replace(r, max_new_tokens=n) for r, n in zip(requests_of(lengths, log_p=True), limits)]
    together = go(requests, dtype=dtype)
    assert [len(c.ids) for c in together] == [len(c.log_p) for c in together] == limits and {c.finish for c in together} == {"length"}
    assert go(requests[::-1], dtype=dtype)[::-1] == together
    for i in (0, 3, 8):
        assert go([requests[i]], dtype=dtype) == [together[i]]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sharing_changes_nothing(dtype):
    """To the last bit of the log-probabilities; in bfloat16 too, at this width and at SmolLM2's on the CPUs this was run on."""
    counts = []
    shared = go(alike(), dtype=dtype, on_end=counts.append)
    assert go(alike(), dtype=dtype, share=False, on_end=counts.append) == shared
    assert len({tuple(c.ids) for c in shared}) > 12
    # Prefilled: 44 and 32 once; 64 of the header, then 0, 4 and 29 of its ends, 1 and 19 behind its first block; 49. The rest is in pairs.
    computed = 44 + 32 + 64 + (0 + 4 + 29) + (1 + 19) + 49
    assert [c.prompt_tokens for c in counts] == [6 * 44 + 3 * 32 + 3 * 64 + 33 + 2 * 32 + 20 + 49] * 2
    assert [c.shared for c in counts] == [counts[0].prompt_tokens - computed, 0]


def test_sharing_at_real_width():
    """Twelve samples of one prompt, more than one group holds, beside two prompts that share a block with them; log-probabilities too."""
    rng = np.random.default_rng(3)
    prompt = tuple(rng.integers(0, 512, 300).tolist())
    requests = [Request(prompt, i, 12, 0.8, 0.95, log_p=True) for i in range(12)]
    requests += [Request(prompt[:150] + (7, 8), 20, 12, 0.8, 0.95, log_p=True), Request(prompt[:128], 21, 12, 0.8, 0.95, log_p=True)]
    run = lambda requests, **more: generate(params(0, "float32", WIDE), WIDE, EngineConfig("float32", slots=14), mesh(), requests, seed=0,
                                            stop_ids=(), context=512, **more)
    together = run(requests)
    assert run(requests, share=False) == together and run(requests[9:10]) == together[9:10]
    assert len({tuple(c.ids) for c in together}) == 14


def test_a_sampler_used_again():
    """With idle blocks of the call before, after a call that was left in the middle, and with another pool, it says what a new one says."""
    requests, new = alike(), go(alike())
    sampler = Sampler(params(), TINY, config_of(), mesh(), stop_ids=(), context=CONTEXT, decode=letters)
    assert list(sampler.stream(requests[:5], seed=1)) == new[:5]
    assert list(sampler.stream(requests, seed=1)) == new
    assert sampler.counts.shared > 6 * 44, "the prompts of the call before are known"
    left = sampler.stream(requests, seed=1)
    assert next(left) == new[0]
    left.close()
    assert list(sampler.stream(requests[3:], seed=1)) == new[3:]


def test_addresses_and_seeds():
    """Equal requests at other addresses or seeds draw otherwise; the same address draws the same."""
    prompt = requests_of([9])[0]
    made = go([dataclasses.replace(prompt, address=a) for a in (1, 2, 3, 1, 2**64 - 1)])
    texts = [c.text for c in made]
    assert len(set(texts)) == 4 and texts[0] == texts[3]
    assert go([dataclasses.replace(prompt, address=1)], seed=2**63 - 1)[0].text != texts[0]
    assert go([dataclasses.replace(prompt, address=1, seed=1)], seed=2**63 - 1)[0].text == texts[0]


# ------------------------------------------------------------------------------------------------------------------ broken numbers
def test_logits_that_are_no_numbers():
    """A token whose embedding is NaN, last or within a prompt, ends that request. Others do not see it, nor who has its blocks later."""
    weights = dict(params())
    weights["embed"] = {"embedding": weights["embed"]["embedding"].at[96].set(jnp.nan)}
    lengths = [60, 20, 40, 33, 50, 9, 70]
    good = [dataclasses.replace(r, tokens=tuple(t % 96 for t in r.tokens), log_p=True) for r in requests_of(lengths)]
    bad = [dataclasses.replace(good[0], tokens=good[0].tokens[:50] + (96,) + more) for more in ((), (3, 4, 5), (4,) * 40)]
    alone = go(good, weights=weights)
    mixed = go([bad[0], good[0], bad[1], *good[1:4], bad[2], *good[4:]], weights=weights)
    assert [mixed[i] for i in (1, 3, 4, 5, 7, 8, 9)] == alone and "length" in {c.finish for c in alone}
    assert [mixed[i] for i in (0, 2, 6)] == [Completion([], "", "nan", [])] * 3


# ---------------------------------------------------------------------------------------------------------- parameters of a request
def test_each_request_has_its_own_parameters():
    """Every field in one call gives what it gives alone, and each of them changes the text."""
    base = Request(tuple(range(40)), 5, 16, 0.9, 1.0, log_p=True)
    plain = go([base])[0]
    stop = plain.ids[4]
    changes = [{}, {"temperature": 0.0}, {"temperature": 3.0}, {"top_p": 0.3}, {"top_k": 2}, {"repetition_penalty": 1.8}, {"seed": 9},
               {"stop_ids": (stop,)}, {"stop_ids": (stop,), "min_new_tokens": 12}, {"stop": (plain.text[6:9],)}, {"max_new_tokens": 3},
               {"top_k": 1}, {"log_p": False}, {"tokens": base.tokens[:20]}]
    requests = [dataclasses.replace(base, **change) for change in changes]
    together = go(requests)
    assert together == [go([r])[0] for r in requests]
    assert len({c.text for c in together}) == len(changes) - 2, "top_k=1 is greedy, and log_p changes no text"
    assert together[11].ids == together[1].ids and together[12] == dataclasses.replace(plain, log_p=None)
    assert together[7] == Completion(plain.ids[:4], letters(plain.ids[:4]), "eos", plain.log_p[:4])
    assert stop not in together[8].ids[:12] and len(together[8].ids) >= 12


def test_greedy_with_penalty_and_minimum_is_that_of_transformers(tmp_path):
    """Token for token, on a random Llama whose end-of-text token is likely."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    from hf_models import make

    from isara_jax.models import hf
    from isara_jax.models.place import placer

    torch.set_num_threads(1)
    theirs = make("llama", tmp_path, vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                  head_dim=8, intermediate_size=48, rms_norm_eps=1e-5, hidden_act="silu", attention_bias=False, mlp_bias=False,
                  tie_word_embeddings=False, rope_parameters={"rope_type": "default", "rope_theta": 5e3})
    assert hf.model_config(tmp_path) == TINY, "so that no program more is compiled"
    place = placer(param_shardings(decoder.abstract_params(TINY), mesh()))
    weights = prepare(hf.load_params(tmp_path, TINY, place), "float32", mesh())
    prompts = [list(range(3, 40)), [7] * 5 + [8, 9], [11]]
    settings = [(1.0, 0), (1.3, 0), (1.3, 9), (0.8, 9), (1.0, 16)]
    with torch.no_grad():
        free = theirs.generate(torch.tensor([prompts[0]]), do_sample=False, max_new_tokens=16, eos_token_id=None)[0, 37:].tolist()
        ends = sorted({free[2], free[6]})

        def wanted(prompt, penalty, least):
            mask = torch.ones(1, len(prompt), dtype=torch.long)
            out = theirs.generate(torch.tensor([prompt]), attention_mask=mask, do_sample=False, max_new_tokens=16, min_new_tokens=least,
                                  repetition_penalty=penalty, eos_token_id=ends)[0, len(prompt):].tolist()
            return (out[:-1], "eos") if out[-1] in ends else (out, "length")

        expected = [wanted(p, *s) for p in prompts for s in settings]
    requests = [Request(tuple(p), 0, 16, 0.0, 1.0, repetition_penalty=penalty, min_new_tokens=least)
                for p in prompts for penalty, least in settings]
    made = go(requests, weights=weights, stop_ids=ends)
    assert [(c.ids, c.finish) for c in made] == expected
    assert {finish for _, finish in expected} == {"eos", "length"} and len({tuple(ids) for ids, _ in expected}) > 6


# ------------------------------------------------------------------------------------------------------------------- ends of texts
def test_end_of_text():
    """A stop id ends the text and is not in it, unless the request goes on beyond it."""
    request = requests_of([9], n=20, temperature=0.0)[0]
    free = go([request])[0].ids
    stop = next(t for i, t in enumerate(free) if i > 2 and t not in free[:i])
    at = free.index(stop)
    assert go([request], stop_ids=[stop, 96]) == [Completion(free[:at], letters(free[:at]), "eos")]
    assert go([dataclasses.replace(request, ignore_eos=True)], stop_ids=[stop]) == [Completion(free, letters(free), "length")]
    assert go([dataclasses.replace(request, ignore_eos=True, stop_ids=(stop,))]) == [Completion(free[:at], letters(free[:at]), "eos")]
    inside = dataclasses.replace(request, tokens=(stop, *request.tokens, stop))
    assert go([inside], stop_ids=[stop])[0].ids != [], "a stop id within the prompt is a token like any other"


def test_stop_strings():
    """A stop string across tokens and across two looks of the host is found; the text ends before it, whichever comes first."""
    request = requests_of([9], n=24, temperature=0.8, log_p=True)[0]
    whole = go([request])[0]
    ids, text = whole.ids, whole.text
    for start in range(3, 12):
        stop = text[start:start + 4]
        at = text.find(stop)
        made = go([dataclasses.replace(request, stop=(stop, "never"))])[0]
        assert made == Completion(ids[:at], text[:at], "stop", whole.log_p[:at]), start
    assert go([dataclasses.replace(request, stop=("never",))]) == [whole]
    with pytest.raises(ValueError, match="no decode"):
        go([dataclasses.replace(request, stop=("x",))], decode=None)


def test_limits_of_the_context():
    """New tokens end with the context; a prompt that leaves no room is refused before any work, by number."""
    assert [len(c.ids) for c in go(requests_of([120, 127, 5], n=20))] == [8, 1, 20]
    assert go(requests_of([128, 5], n=0)) == [Completion([], "", "length")] * 2
    seen, bad = [], requests_of([128])[0]
    for change, message in (({}, "128 tokens"), ({"tokens": ()}, "empty"), ({"tokens": (97,)}, "token id 97"),
                            ({"tokens": (1,), "min_new_tokens": 13}, "min_new_tokens=13 .* max_new_tokens=12"),
                            ({"tokens": (1,), "stop": ("a", "")}, "stop=.*not empty")):
        with pytest.raises(UserError, match=f"request 1: .*{message}"):
            go([requests_of([3])[0], dataclasses.replace(bad, **change)], on_progress=lambda *counts: seen.append(counts))
    assert not seen
    assert go([]) == []


# ---------------------------------------------------------------------------------------------------------------------- compilation
def test_other_weights_and_requests_compile_nothing():
    """Weights of the same shape, other lengths, limits, parameters and stop ids run the programs that are there.

    There are four of decode: with rows that share blocks and without, with rows that penalise repetition and without.
    """
    events = []
    listener = lambda name, *_, **__: events.append(name) if "backend_compile" in name else None
    prompt = requests_of([40])[0]
    for penalty, n in itertools.product((1.0, 1.2), (1, 2)):
        go([dataclasses.replace(prompt, repetition_penalty=penalty)] * n)
    other = params(7)
    changed = [dataclasses.replace(r, temperature=0.3 * i, top_p=0.5, top_k=i, min_new_tokens=i, stop_ids=(i, 9), seed=i, log_p=i > 1,
                                   ignore_eos=True, max_new_tokens=7) for i, r in enumerate(requests_of([33, 2, 50, 17, 90]))]
    penalised = [dataclasses.replace(r, repetition_penalty=1.1 + 0.1 * i) for i, r in enumerate(changed)]
    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        for requests in (changed, penalised, [*changed, *changed], [*penalised, *penalised]):
            assert len(go(requests, weights=other, stop_ids=[1, 2])) == len(requests)
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)
    assert not events


# ------------------------------------------------------------------------------------------------------------------------ streaming
def test_progress_counts():
    """Prefilled tokens are those computed: all prompts but for their last tokens, where none begin alike."""
    seen = []
    made = go(requests_of([9, 30, 2, 5, 14, 6]), on_progress=lambda *counts: seen.append(counts))
    assert seen[-1] == (6, 6, 8 + 29 + 1 + 4 + 13 + 5, sum(len(c.ids) for c in made))
    assert all(a <= b for old, new in zip(seen, seen[1:]) for a, b in zip(old, new))


def test_texts_grow_to_what_they_become():
    """Every text that is told begins the next one and the completion, stop strings are never seen, and telling changes nothing."""
    requests = [dataclasses.replace(r, max_new_tokens=n, stop=("ab", "fgh"), address=r.address + 50 * n)
                for n, r in itertools.product((1, 24, 40), requests_of([9, 3, 17, 30, 5, 6]))]
    seen = [[] for _ in requests]
    made = go(requests, on_text=lambda i, text: seen[i].append(text))
    assert made == go(requests)
    assert all(new.startswith(old) for pieces in seen for old, new in zip(pieces, pieces[1:]))
    assert [pieces[-1] for pieces in seen] == [c.text for c in made] and not any("ab" in t or "fgh" in t for ts in seen for t in ts)
    assert {c.finish for c in made} == {"stop", "length"} and max(map(len, seen)) > 3
    with pytest.raises(ValueError, match="no decode"):
        go(requests_of([3]), decode=None, on_text=print)


def test_what_a_listener_raises_ends_the_work():
    def stop(i, text):
        raise InterruptedError

    sampler = Sampler(params(), TINY, config_of(), mesh(), stop_ids=(), context=CONTEXT, decode=letters)
    with pytest.raises(InterruptedError):
        list(sampler.stream(requests_of([9, 4], n=100), seed=1, on_text=stop))
    assert list(sampler.stream(requests_of([9]), seed=1)) == go(requests_of([9]))
