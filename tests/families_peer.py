"""What tests of families share: our logits of a folder, and transformers' of its model."""
from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from isara_jax.models import decoder, hf
from isara_jax.models.layers import causal_attention
from isara_jax.models.place import placer
from isara_jax.sharding import make_mesh, param_shardings


def load(folder, dtype="float32", mesh=None):
    """(config, parameters) of a folder, on the first device."""
    cfg = hf.model_config(folder)
    mesh = mesh or make_mesh(devices=jax.devices()[:1])
    return cfg, hf.load_params(folder, cfg, placer(param_shardings(decoder.abstract_params(cfg), mesh)), dtype)


def logits(cfg, params, tokens, dtype="float32"):
    """Logits [B, T, V] of the full forward, float32."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden, _ = decoder.forward(params, cfg, jnp.asarray(tokens), positions, causal_attention(jnp.dtype(dtype)))
    return np.asarray(decoder.lm_head(params, cfg, hidden))


def tokens_of(vocabulary, rows=3, width=40, seed=0):
    return np.random.default_rng(seed).integers(0, vocabulary, (rows, width))


def expected_logits(model, tokens):
    """Logits [B, T, V] of a transformers model, float32."""
    import torch

    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.float().numpy()
