"""What the tests of adapters share: a small model, random adapters for it, its logits."""
from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from isara_jax.config import Lora
from isara_jax.data.batching import Example
from isara_jax.models import decoder, families, lora
from isara_jax.models.config import ModelConfig
from isara_jax.models.layers import causal_attention
from isara_jax.sft import loop
from isara_jax.sharding import make_mesh, param_shardings

CFG = ModelConfig(vocab_size=23, d_model=12, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=6, d_ff=20, tie_embeddings=True)
LLAMA = families.FAMILIES["llama"]
MESH = make_mesh(devices=jax.devices()[:1])


def examples(n, vocabulary=23, seed=0):
    rng = np.random.default_rng(seed)
    return [Example(tuple(rng.integers(0, vocabulary, int(rng.integers(4, 30))).tolist()), int(rng.integers(1, 4))) for _ in range(n)]


def fit(params, cfg, rows, sft, **kwargs):
    return loop.fit(params, cfg, rows, sft, **{"mesh": MESH, "dtype": "float32", "seed": 0, "context": 128, **kwargs})


def in_training(cfg, spec: Lora, seed=0):
    """Adapters in training that do add something."""
    rng, tree = np.random.default_rng(seed), lora.abstract(cfg, spec)
    made = jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape) * 0.2, jnp.float32), tree)
    return jax.device_put(made, param_shardings(tree, MESH))


@functools.partial(jax.jit, static_argnums=1)
def _logits(params, cfg, tokens):
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    return decoder.lm_head(params, cfg, decoder.forward(params, cfg, tokens, positions, causal_attention(jnp.float32))[0])


def logits(params, cfg, tokens):
    return np.asarray(_logits(decoder.stack_layers(params) if "0" in params["layers"] else params, cfg, tokens))


def assert_close(got, want):
    """Within 1e-4 of the largest logit: these models are random, and rounding grows from layer to layer."""
    assert np.abs(np.asarray(got) - np.asarray(want)).max() < 1e-4 * np.abs(np.asarray(want)).max()
