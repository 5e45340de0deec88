"""The decoder: parameter tree, one forward for unrolled and scanned layers, what each constant does."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isara_jax.models import decoder
from isara_jax.models.config import LayerKind, ModelConfig, Rope
from isara_jax.models.layers import Norm, causal_attention, group_heads, matmul, rotate, ungroup_heads
from isara_jax.models.rope import turn

CFG = ModelConfig(vocab_size=23, d_model=12, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=6, d_ff=20, pattern=(LayerKind(Rope(500.0)),),
                  norm_eps=1e-3)
TOKENS = np.array([[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8]])


def logits(params, cfg, tokens=TOKENS, dtype="float32", **kwargs):
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden, _ = decoder.forward(params, cfg, jnp.asarray(tokens), positions, causal_attention(jnp.dtype(dtype)), **kwargs)
    return np.asarray(decoder.lm_head(params, cfg, hidden))


def test_tree_has_one_entry_a_layer_and_counts_its_parameters():
    params = decoder.init_params(CFG, seed=0)
    assert set(params) == {"embed", "layers", "norm", "head"} and set(params["layers"]) == {"0", "1"}
    assert params["layers"]["0"]["attn"]["k"]["kernel"].shape == (12, 12)
    assert sum(x.size for x in jax.tree.leaves(params)) == decoder.n_params(CFG)
    assert jax.tree.structure(decoder.abstract_params(CFG)) == jax.tree.structure(params)
    tied = dataclasses.replace(CFG, tie_embeddings=True)
    assert "head" not in decoder.init_params(tied, 0)
    assert sum(x.size for x in jax.tree.leaves(decoder.init_params(tied, 0))) == decoder.n_params(tied)


def test_the_seed_decides_the_parameters():
    a, b, c = (decoder.init_params(CFG, seed)["embed"]["embedding"] for seed in (1, 1, 2))
    assert np.array_equal(a, b) and not np.array_equal(a, c)


def test_scanned_layers_equal_unrolled_ones_in_logits_and_gradients():
    params = decoder.init_params(CFG, 0)
    np.testing.assert_allclose(logits(decoder.stack_layers(params), CFG), logits(params, CFG), rtol=0, atol=1e-6)

    def loss(p, remat):
        hidden, _ = decoder.forward(p, CFG, jnp.asarray(TOKENS), jnp.arange(6)[None].repeat(2, 0), causal_attention(jnp.float32), remat=remat)
        return jnp.sum(jnp.sin(decoder.lm_head(p, CFG, hidden)))

    plain = jax.grad(loss)(params, False)
    scanned = decoder.unstack_layers(jax.grad(loss)(decoder.stack_layers(params), True), CFG.n_layers)
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(scanned), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_stack_and_unstack_are_inverse():
    params = decoder.init_params(CFG, 0)
    back = decoder.unstack_layers(decoder.stack_layers(params), CFG.n_layers)
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(back), strict=True))


def test_no_position_sees_a_later_token():
    params = decoder.init_params(CFG, 0)
    changed = TOKENS.copy()
    changed[:, 4] = 7
    a, b = logits(params, CFG), logits(params, CFG, changed)
    assert np.array_equal(a[:, :4], b[:, :4])
    assert not np.allclose(a[:, 4:], b[:, 4:])


# A model in which everything that a config can say is used.
ROPE = Rope(theta=500.0, fraction=2 / 3, scaling="yarn", factor=4.0, original=64, low=0.4, high=4.0, gain=1.2)
LLAMA3 = Rope(theta=500.0, fraction=2 / 3, scaling="llama3", factor=4.0, original=32, low=1.0, high=4.0)
RICH = ModelConfig(vocab_size=23, d_model=12, n_layers=3, n_heads=4, n_kv_heads=2, head_dim=6, d_ff=20, norm="layer", norm_at="sandwich",
                   pattern=(LayerKind(ROPE, window=3, scale=0.7), LayerKind(LLAMA3), LayerKind(None)), norm_eps=1e-3, norm_offset=0.5,
                   qkv_bias=True, o_bias=True, mlp_bias=True, qk_norm="head", attn_softcap=0.5, logit_softcap=0.8, activation="gelu",
                   embed_width=8, embed_scale=2.0, positions=12, position_offset=2)
CHANGES = {
    "vocab_size": 24, "d_model": 16, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1, "head_dim": 12, "d_ff": 24, "norm": "rms", "norm_eps": 1e-2,
    "norm_offset": 0.0, "norm_affine": False, "norm_at": "pre", "final_norm": False, "parallel": True, "qkv_bias": False, "o_bias": False,
    "mlp_bias": False, "qk_norm": "row", "attn_softcap": 0.0, "logit_softcap": 0.0, "activation": "gelu_tanh", "gated": False,
    "embed_width": 0, "embed_scale": 1.0, "positions": 13, "position_offset": 1, "tie_embeddings": True, "pattern": (LayerKind(ROPE),)}
OF_SHAPE = ("vocab_size", "positions")  # what they change is how many rows a table has


def filled(cfg):
    """Parameters of a config, all of them random and far from their initial ones; a tensor is the same in every config that has it so."""
    draw = lambda path, x: 0.5 * jax.random.normal(jax.random.key(sum(map(ord, str(path)))), x.shape) + (path[-1].key == "scale")
    return jax.tree_util.tree_map_with_path(draw, decoder.abstract_params(cfg))


def test_every_field_of_the_config_changes_the_logits():
    assert set(CHANGES) == {f.name for f in dataclasses.fields(ModelConfig)}
    before = logits(filled(RICH), RICH)
    for field, value in CHANGES.items():
        base = dataclasses.replace(RICH, norm_at="pre") if field == "parallel" else RICH
        was = logits(filled(base), base) if base is not RICH else before
        changed = dataclasses.replace(base, **{field: value})
        now = logits(filled(changed), changed)
        assert now.shape != was.shape or not np.allclose(now, was, rtol=1e-5) or field in OF_SHAPE, field
    assert jax.tree.leaves(filled(RICH))[0].shape == (23, 8)
    assert filled(dataclasses.replace(RICH, positions=13))["positions"]["embedding"].shape == (13, 12)


@pytest.mark.parametrize("base, field, value", [
    *((ROPE, f, v) for f, v in (("theta", 501.0), ("fraction", 1 / 3), ("scaling", "llama3"), ("factor", 5.0), ("original", 200), ("low", 0.2),
                                ("high", 1.0), ("round_ends", False), ("gain", 1.3))),
    *((LLAMA3, f, v) for f, v in (("theta", 501.0), ("factor", 5.0), ("original", 31), ("low", 1.1), ("high", 3.9))),
    (Rope(scaling="linear", factor=2.0), "factor", 3.0),
    (Rope(scaling="factors", factors=(1.0,) * 11 + (3.0,)), "factors", (1.0,) * 12)])
def test_every_field_of_a_rope_changes_the_logits(base, field, value):
    cfg = dataclasses.replace(CFG, head_dim=24)  # wide heads, so that some pair stands where each number decides
    params = filled(cfg)
    run = lambda rope: logits(params, dataclasses.replace(cfg, pattern=(LayerKind(rope),)))
    assert not np.allclose(run(base), run(dataclasses.replace(base, **{field: value})), rtol=1e-5)


@pytest.mark.parametrize("field, value", [("rope", None), ("window", 2), ("scale", 0.3)])
def test_every_field_of_a_kind_changes_the_logits(field, value):
    params, kind = filled(CFG), CFG.pattern[0]
    changed = dataclasses.replace(CFG, pattern=(kind, dataclasses.replace(kind, **{field: value})))
    assert not np.allclose(logits(params, CFG), logits(params, changed), rtol=1e-5)


@pytest.mark.parametrize("remat", [False, True])
def test_scanned_layers_of_different_kinds_are_the_layers_apart(remat):
    params = filled(RICH)
    np.testing.assert_allclose(logits(decoder.stack_layers(params), RICH, remat=remat), logits(params, RICH), rtol=1e-5, atol=1e-6)


def test_padding_behind_the_last_learned_position_stays_finite():
    cfg = dataclasses.replace(CFG, pattern=(LayerKind(None),), positions=8, position_offset=2)  # room for six tokens
    params, wide = filled(cfg), np.pad(TOKENS, ((0, 0), (0, 4)))
    np.testing.assert_allclose(logits(params, cfg, wide)[:, :6], logits(params, cfg), rtol=1e-5, atol=1e-5)


def test_a_window_of_three_sees_three_keys():
    cfg = dataclasses.replace(CFG, n_layers=1, pattern=(LayerKind(Rope(500.0), window=3),))
    params, changed = decoder.init_params(cfg, 0), TOKENS.copy()
    changed[:, 1] = 7
    a, b = logits(params, cfg), logits(params, cfg, changed)
    same = [np.array_equal(a[:, t], b[:, t]) for t in range(6)]
    assert same == [True, False, False, False, True, True]


def test_bfloat16_products_stay_close_to_float32():
    params = decoder.init_params(CFG, 0)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    assert logits(half, CFG, dtype="bfloat16").dtype == np.float32
    np.testing.assert_allclose(logits(half, CFG, dtype="bfloat16"), logits(params, CFG), atol=2e-2)


def test_the_gradient_of_a_product_is_that_of_the_plain_one():
    x, kernel = jax.random.normal(jax.random.key(0), (2, 3, 5)), jax.random.normal(jax.random.key(1), (5, 4))
    ours = jax.grad(lambda x, w: jnp.sum(jnp.sin(matmul(x, w))), argnums=(0, 1))(x, kernel)
    plain = jax.grad(lambda x, w: jnp.sum(jnp.sin(x @ w)), argnums=(0, 1))(x, kernel)
    for a, b in zip(ours, plain, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_rope_turns_pairs_half_a_head_apart():
    x = jnp.array([1.0, 0.0, 0.0, 2.0]).reshape(1, 1, 1, 4)  # pairs (1, 0) at rate 1 and (0, 2) at rate 100 ** -0.5
    turned = np.asarray(rotate(x, turn(Rope(100.0), 4, jnp.array([[3]])))).ravel()
    c, s, c2, s2 = np.cos(3), np.sin(3), np.cos(0.3), np.sin(0.3)
    np.testing.assert_allclose(turned, [c, -2 * s2, s, 2 * c2], rtol=1e-6)


def test_rms_norm_by_hand():
    from flax import nnx

    norm = Norm(2, dataclasses.replace(CFG, norm_eps=0.5), rngs=nnx.Rngs(0))
    norm.scale[...] = jnp.array([1.0, 10.0])
    np.testing.assert_allclose(norm(jnp.array([3.0, 4.0])), np.array([3.0, 40.0]) / np.sqrt(12.5 + 0.5), rtol=1e-6)


def test_grouping_heads_and_back():
    q = jnp.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    grouped = group_heads(q, 2)
    assert grouped.shape == (2, 2, 6, 5)
    assert np.array_equal(grouped[1, 1, 3:6], q[1, :, 3])  # second key head, second query head of its group, all times
    assert np.array_equal(ungroup_heads(grouped, 3), q)


def test_impossible_shapes_are_refused():
    with pytest.raises(ValueError, match="not a multiple"):
        dataclasses.replace(CFG, n_kv_heads=3)
    with pytest.raises(ValueError, match="need pairs"):
        dataclasses.replace(CFG, head_dim=5)
    with pytest.raises(ValueError, match="norm_at='inside' is not one of pre, post"):
        dataclasses.replace(CFG, norm_at="inside")
    with pytest.raises(ValueError, match="2 rope factors; 3 are needed"):
        dataclasses.replace(CFG, pattern=(LayerKind(Rope(scaling="factors", factors=(1.0, 2.0))),))
