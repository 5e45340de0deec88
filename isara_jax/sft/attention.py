"""Attention over packed rows: pairs that share a row do not see each other."""
from __future__ import annotations

import jax
import jax.numpy as jnp

from isara_jax.models.layers import in_window, masked_attention


def packed_attention(dtype: jnp.dtype, segments_BT: jax.Array):
    """An `attend` over whole rows: a position sees the positions up to it in its own segment.

    Products are taken in `dtype` with float32 accumulation; scores and softmax are float32. Letters as in models/layers.py.
    """
    T = segments_BT.shape[1]
    distance_TS = jnp.arange(T)[:, None] - jnp.arange(T)
    visible_BTS = (segments_BT[:, :, None] == segments_BT[:, None, :]) & (distance_TS >= 0)

    def attend(q_BTNH, k_BTKH, v_BTKH, layer, state):
        return masked_attention(q_BTNH, k_BTKH, v_BTKH, in_window(visible_BTS, distance_TS, layer), layer, dtype), state

    return attend
