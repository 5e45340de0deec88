"""Attention over packed rows: pairs that share a row do not see each other."""
from __future__ import annotations

import jax
import jax.numpy as jnp

from isara_jax.models.layers import NEG_INF, group_heads, ungroup_heads


def packed_attention(dtype: jnp.dtype, segments_BT: jax.Array):
    """An `attend` over whole rows: a position sees the positions up to it in its own segment.

    Products are taken in `dtype` with float32 accumulation; scores and softmax are float32. Letters as in models/layers.py.
    """
    B, T = segments_BT.shape
    same = segments_BT[:, :, None] == segments_BT[:, None, :]
    visible_BTS = same & jnp.tril(jnp.ones((T, T), bool))

    def attend(q_BTNH, k_BTKH, v_BTKH, layer, state):
        del layer
        N, H = q_BTNH.shape[2:]
        K = k_BTKH.shape[2]
        q = group_heads(q_BTNH * H ** -0.5, K).astype(dtype)
        k_BKSH, v_BKSH = (x.transpose(0, 2, 1, 3).astype(dtype) for x in (k_BTKH, v_BTKH))
        scores = jnp.einsum("BKRH,BKSH->BKRS", q, k_BKSH, preferred_element_type=jnp.float32)
        visible = jnp.broadcast_to(visible_BTS[:, None, None], (B, 1, N // K, T, T)).reshape(B, 1, N // K * T, T)
        weights = jax.nn.softmax(jnp.where(visible, scores, NEG_INF), axis=-1).astype(dtype)
        out = jnp.einsum("BKRS,BKSH->BKRH", weights, v_BKSH, preferred_element_type=jnp.float32)
        return ungroup_heads(out, T), state

    return attend
