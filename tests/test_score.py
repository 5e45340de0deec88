"""Scoring by trees equals scoring each pair alone; what is shared is computed once."""
import dataclasses
import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isara_jax.decode import score as score_lib
from isara_jax.decode.engine import prepare
from isara_jax.decode.score import plan, score
from isara_jax.lm import load
from isara_jax.models import decoder
from isara_jax.models.config import LayerKind, ModelConfig, Rope
from isara_jax.models.layers import causal_attention
from isara_jax.models.resolve import TINY_CONFIG
from isara_jax.sharding import make_mesh

UNTIED = ModelConfig(vocab_size=1500, d_model=32, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=16, d_ff=64, tie_embeddings=False)
# Layers that differ in window and rotary embedding, capped scores and logits
MIXED = dataclasses.replace(TINY_CONFIG, pattern=(LayerKind(Rope(100.0), window=9), LayerKind(None)), attn_softcap=1.0, logit_softcap=0.5,
                            positions=514, position_offset=2, embed_width=32)
PARAMS = {cfg: jax.tree.map(lambda x: 5 * x if x.ndim > 1 else x, decoder.init_params(cfg, seed=0)) for cfg in (TINY_CONFIG, UNTIED, MIXED)}
MESH = make_mesh(devices=jax.devices()[:1])


@functools.partial(jax.jit, static_argnums=1)
def log_p_of_row(params, cfg, tokens_1T):
    positions = jnp.arange(tokens_1T.shape[1])[None]
    hidden, _ = decoder.forward(params, cfg, tokens_1T, positions, causal_attention(jnp.dtype("float32")))
    return jax.nn.log_softmax(decoder.lm_head(params, cfg, hidden)[0])


def alone(prompt, continuation, width=512, cfg=TINY_CONFIG):
    """The pair in a row of its own: the plain causal forward, and the log-probabilities of the continuation picked from it."""
    row = np.array([*prompt, *continuation])
    tokens = np.zeros((1, width), np.int32)
    tokens[0, :len(row)] = row
    log_p = np.asarray(log_p_of_row(PARAMS[cfg], cfg, tokens), np.float64)
    return sum(log_p[i - 1, row[i]] for i in range(len(prompt), len(row)))


def scored(pairs, cfg=TINY_CONFIG, dtype="float32", mesh=MESH):
    return score(prepare(PARAMS[cfg], dtype, mesh), cfg, dtype, mesh, pairs)


# ---------------------------------------------------------------------------------------------------------------------------- plan
def test_a_tree_written_out():
    """Two continuations that share 7, one of them twice, and one that is a beginning of another."""
    made = plan([([1, 2], [7, 8, 9]), ([1, 2], [7, 5]), ([1, 2], [7, 8]), ([1, 2], [7, 8, 9])], worth=100)
    (tree,) = made.trees
    #                                       1  2  7  8     depth first; 5 and 9 are only predicted
    assert tree.tokens.tolist() ==         [1, 2, 7, 8]
    assert tree.positions.tolist() ==      [0, 1, 2, 3]
    assert tree.ends.tolist() ==           [4, 4, 4, 4]
    assert tree.sources.tolist() == [1, 2, 2, 3] and tree.targets.tolist() == [7, 5, 8, 9]
    assert [path.tolist() for _, path in made.paths] == [[0, 2, 3], [0, 1], [0, 2], [0, 2, 3]]
    assert made.tokens == 4 and made.heads == 3


def test_branches_end_where_the_next_begins():
    (tree,) = plan([([1], [7, 8, 9]), ([1], [5, 6]), ([1], [7, 4, 2])], worth=100).trees
    #                                   1  5  7  4  8
    assert tree.tokens.tolist() ==     [1, 5, 7, 4, 8]
    assert tree.positions.tolist() ==  [0, 1, 1, 2, 2]
    assert tree.ends.tolist() ==       [5, 2, 5, 4, 5]


def test_the_prefix_is_what_all_prompts_share_but_for_a_last_token():
    shared = list(range(40))
    pairs = [(shared, [1]), (shared + [50], [1, 2]), (shared + [60, 61], [3])]
    made = plan(pairs, worth=78)  # two prompts of 39 tokens are saved
    assert made.prefix == tuple(shared[:39])
    assert [tree.tokens.tolist() for tree in made.trees] == [[39], [39, 50, 1], [39, 60, 61]]
    assert [tree.positions.tolist() for tree in made.trees] == [[39], [39, 40, 41], [39, 40, 41]]
    assert plan(pairs, worth=79).prefix == ()
    assert plan([(shared[:32], [1]), (shared[:32] + [50], [1])], worth=1).prefix == ()  # 31 tokens: too short


@pytest.mark.parametrize("pair", [([], [1]), ([1], [])])
def test_an_empty_side_is_refused(pair):
    with pytest.raises(ValueError, match="pair 1 has"):
        plan([([1], [2]), pair], worth=1)


def test_short_trees_fill_the_rows_of_long_ones():
    assert score_lib._pack([100, 28, 129, 300, 100, 200]) == [(512, [3, 5]), (256, [2, 0]), (128, [4, 1])]


# --------------------------------------------------------------------------------------------------------------------------- values
token = st.integers(0, 5) | st.integers(0, TINY_CONFIG.vocab_size - 1)  # few tokens, so that texts share beginnings
text = st.lists(token, min_size=1, max_size=12)


@st.composite
def forests(draw):
    """Pairs of a few prompts, with or without a long common beginning; duplicates and beginnings of one another are likely."""
    common = draw(st.lists(token, max_size=3) | st.lists(token, min_size=40, max_size=80))
    prompts = [common + p for p in draw(st.lists(text, min_size=1, max_size=4))]
    pairs = draw(st.lists(st.tuples(st.sampled_from(prompts), text), min_size=1, max_size=12))
    extra = [(p, c[:n]) for p, c in pairs[:4] for n in (1, len(c) // 2) if n] + pairs[:2]
    return draw(st.permutations(pairs + extra))


@pytest.mark.parametrize("cfg", [TINY_CONFIG, MIXED], ids=["plain", "mixed"])
@settings(max_examples=25, deadline=None)
@given(forests(), st.sampled_from([1, 10**9]))
def test_every_pair_scores_what_it_scores_alone(cfg, pairs, worth):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(score_lib, "_tokens_at_once", lambda mesh: worth if worth == 1 else 1024)  # 1: share the prefix, one row a batch
        np.testing.assert_allclose(scored(pairs, cfg), [alone(*pair, cfg=cfg) for pair in pairs], rtol=0, atol=1e-4)


def test_many_prompts_behind_a_prefix_in_several_batches():
    rng = np.random.default_rng(0)
    draw = lambda n: rng.integers(0, TINY_CONFIG.vocab_size, n).tolist()
    common = draw(170)
    pairs = [(prompt, draw(rng.integers(1, 20))) for prompt in (common + draw(rng.integers(1, 60)) for _ in range(40)) for _ in range(3)]
    assert len(plan(pairs, 1024).prefix) >= 170
    seen = []
    values = score(PARAMS[TINY_CONFIG], TINY_CONFIG, "float32", MESH, pairs, lambda *now: seen.append(now))
    np.testing.assert_allclose(values, [alone(*pair) for pair in pairs], rtol=0, atol=1e-4)
    assert len(seen) > 2 and seen[-1] == (40, 40, plan(pairs, 1024).tokens)
    assert values == scored(pairs), "the same call gives the same bits"


def test_a_text_longer_than_a_batch_is_computed_in_pieces():
    rng = np.random.default_rng(1)
    prompt = rng.integers(0, TINY_CONFIG.vocab_size, 1300).tolist()
    pairs = [(prompt, [3, 4, 5]), (prompt, [3, 9]), (prompt[:5], [1])]
    np.testing.assert_allclose(scored(pairs), [alone(*pair, width=2048) for pair in pairs], rtol=0, atol=1e-4)


def test_more_continuations_than_tokens():
    """Every token of the vocabulary after one prompt: one state predicts them all, and their probabilities sum to one."""
    pairs = [([1, 2, 3], [t]) for t in range(TINY_CONFIG.vocab_size)]
    made = plan(pairs, 1024)
    assert (made.tokens, made.heads) == (3, 1)
    assert np.exp(scored(pairs)).sum() == pytest.approx(1, abs=1e-5)


def test_a_vocabulary_that_no_block_divides():
    """1,500 entries in blocks of 1,024, and a head apart from the embedding."""
    assert np.exp(scored([([7, 8], [t]) for t in range(1500)], UNTIED)).sum() == pytest.approx(1, abs=1e-5)


def test_bfloat16_is_near_float32():
    pairs = [(list(range(50, 90)), [3, 4, 5]), ([7], [8, 9])]
    np.testing.assert_allclose(scored(pairs, dtype="bfloat16"), scored(pairs), rtol=0.02)


def test_nothing_to_score():
    assert scored([]) == []


# -------------------------------------------------------------------------------------------------------------------- devices, LM
DEVICES = """
import jax, numpy as np
from isara_jax.decode.engine import prepare
from isara_jax.decode.score import score
from isara_jax.models import decoder
from isara_jax.models.resolve import TINY_CONFIG as cfg
from isara_jax.sharding import make_mesh
params = jax.tree.map(lambda x: 5 * x if x.ndim > 1 else x, decoder.init_params(cfg, seed=0))
rng = np.random.default_rng(2)
draw = lambda n: rng.integers(0, cfg.vocab_size, n).tolist()
common = draw(40)
pairs = [(common + draw(n), draw(5)) for n in rng.integers(1, 100, 120)] + [(common + draw(600), [1, 2])]
made = []
for shape in (dict(data=1), dict(data=4, fsdp=2), dict(data=4, tensor=2)):
    mesh = make_mesh(**shape, devices=jax.devices()[:np.prod(list(shape.values()))])
    made.append(score(prepare(params, "float32", mesh), cfg, "float32", mesh, pairs))
for other in made[1:]:
    np.testing.assert_allclose(other, made[0], rtol=0, atol=1e-4)
"""


def test_eight_devices_score_as_one():
    """Rows over 8 devices, and over 4 with a tensor axis of 2; the last batches have fewer rows than devices."""
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", DEVICES], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_prepared_weights_are_cast_once_and_score_the_same():
    lm = load("tiny-random", dtype="bfloat16")
    ready = lm.prepared()
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(ready.params))
    assert jax.tree.all(jax.tree.map(lambda a, b: a is b or a.unsafe_buffer_pointer() == b.unsafe_buffer_pointer(),
                                     ready.prepared().params, ready.params))
    assert ready.score(["Q: a"], [" b"]) == lm.score(["Q: a"], [" b"])


def test_the_real_model_scores_what_its_logits_say(smollm2_gguf):
    """Eight questions behind a shared opening of over 100 tokens, against the full forward of each pair alone (which equals torch's)."""
    lm = load(str(smollm2_gguf), dtype="float32")
    opening = "".join(f"Q: What is {n} plus {n}?\nA: {n} plus {n} is {2 * n}.\n\n" for n in range(10))
    pairs = [lm.tokenizer.encode_pair(f"{opening}Q: {question}?\nA:", answer) for question in (
        "Why do cats purr", "Why do cats sleep", "Who wrote Hamlet", "Where is Rome", "Is water wet", "What is tea", "How do birds fly",
        "What is seven times six") for answer in (" Nobody knows.", " Nobody knows for sure.", " No")]
    assert len(plan(pairs, 1024).prefix) > 100
    values = lm.score(*zip(*pairs))
    for i in range(0, len(pairs), 5):
        prompt, continuation = pairs[i]
        log_p = np.asarray(jax.nn.log_softmax(lm.logits([prompt + continuation])[0]))
        expected = sum(log_p[len(prompt) - 1 + j, t] for j, t in enumerate(continuation))
        assert values[i] == pytest.approx(expected, abs=1e-3)
