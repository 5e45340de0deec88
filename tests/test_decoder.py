"""The decoder: parameter tree, one forward for unrolled and scanned layers, what each constant does."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isara_jax.models import decoder
from isara_jax.models.config import ModelConfig
from isara_jax.models.layers import RMSNorm, causal_attention, group_heads, matmul, rope, ungroup_heads

CFG = ModelConfig(vocab_size=23, d_model=12, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=6, d_ff=20, rope_theta=500.0, norm_eps=1e-3)
TOKENS = np.array([[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8]])


def logits(params, cfg, tokens=TOKENS, dtype="float32", **kwargs):
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden, _ = decoder.forward(params, cfg, jnp.asarray(tokens), positions, causal_attention(jnp.dtype(dtype)), **kwargs)
    return np.asarray(decoder.lm_head(params, cfg, hidden))


def test_tree_has_one_entry_a_layer_and_counts_its_parameters():
    params = decoder.init_params(CFG, seed=0)
    assert set(params) == {"embed", "layers", "norm", "head"} and set(params["layers"]) == {"0", "1"}
    assert params["layers"]["0"]["attn"]["k"]["kernel"].shape == (12, 12)
    assert sum(x.size for x in jax.tree.leaves(params)) == CFG.n_params
    assert jax.tree.structure(decoder.abstract_params(CFG)) == jax.tree.structure(params)
    tied = dataclasses.replace(CFG, tie_embeddings=True)
    assert "head" not in decoder.init_params(tied, 0)
    assert sum(x.size for x in jax.tree.leaves(decoder.init_params(tied, 0))) == tied.n_params


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


@pytest.mark.parametrize("change", [{"rope_theta": 501.0}, {"norm_eps": 2e-3}])
def test_constants_that_shape_no_weight_change_the_logits(change):
    params = decoder.init_params(CFG, 0)
    assert not np.array_equal(logits(params, CFG), logits(params, dataclasses.replace(CFG, **change)))


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
    turned = np.asarray(rope(x, jnp.array([[3]]), theta=100.0)).ravel()
    c, s, c2, s2 = np.cos(3), np.sin(3), np.cos(0.3), np.sin(0.3)
    np.testing.assert_allclose(turned, [c, -2 * s2, s, 2 * c2], rtol=1e-6)


def test_rms_norm_by_hand():
    from flax import nnx

    norm = RMSNorm(2, 0.5, rngs=nnx.Rngs(0))
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
    with pytest.raises(ValueError, match="odd"):
        dataclasses.replace(CFG, head_dim=5)
