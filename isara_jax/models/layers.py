"""The parts of a decoder block as Flax NNX modules, and attention over whole rows.

Dimension letters, here and in every einsum: B batch, T query length, S key length, N heads, K key-value heads, G = N / K,
H head width, D model width, F hidden width, V vocabulary, L layers.

Weights decide the arithmetic: a product is taken in the dtype of its kernel with float32 accumulation, everything between
products (residual stream, norms, rotary embeddings, softmax) is float32.
"""
from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from isara_jax.models.config import ModelConfig

NEG_INF = -1e30  # finite, so that a row without a visible key gives numbers instead of NaN


def _dot(a: jax.Array, b: jax.Array, axes_a: tuple[int, ...], axes_b: tuple[int, ...]) -> jax.Array:
    return jax.lax.dot_general(a, b, ((axes_a, axes_b), ((), ())), preferred_element_type=jnp.float32)


@jax.custom_vjp
def matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x [..., in] @ kernel [in, out] -> [..., out] in float32, multiplied in the kernel's dtype; so are both products of its gradient.

    The gradient is written out because XLA:CPU computes what precedes it transposed otherwise: a training step took 14 % more CPU time
    in float32 and 33 % more in bfloat16 (forward and backward of 8 layers of SmolLM2's width).
    """
    return _dot(x.astype(kernel.dtype), kernel, (x.ndim - 1,), (0,))


def _matmul_forward(x, kernel):
    x = x.astype(kernel.dtype)
    return _dot(x, kernel, (x.ndim - 1,), (0,)), (x, kernel)


def _matmul_backward(saved, ct):
    x, kernel = saved
    ct, rows = ct.astype(kernel.dtype), tuple(range(x.ndim - 1))
    return _dot(ct, kernel, (x.ndim - 1,), (1,)), _dot(x, ct, rows, rows).astype(kernel.dtype)


matmul.defvjp(_matmul_forward, _matmul_backward)


class Linear(nnx.Module):
    """A product with a kernel [in, out], without bias; x is float32."""

    def __init__(self, d_in: int, d_out: int, *, rngs: nnx.Rngs):
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), (d_in, d_out)) * 0.02)

    def __call__(self, x: jax.Array) -> jax.Array:
        return matmul(x, self.kernel[...])


class RMSNorm(nnx.Module):
    """x / rms(x) * scale over the last axis, in float32 (Zhang and Sennrich 2019)."""

    def __init__(self, width: int, eps: float, *, rngs: nnx.Rngs):
        del rngs  # initialised to ones
        self.scale = nnx.Param(jnp.ones((width,)))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        variance = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
        return x * jax.lax.rsqrt(variance + self.eps) * self.scale[...].astype(jnp.float32)


def rope(x_BTNH: jax.Array, positions_BT: jax.Array, theta: float) -> jax.Array:
    """Rotary position embedding in the half-split layout of Hugging Face: pair i is (x[i], x[i + H/2]) (Su et al. 2021)."""
    half = x_BTNH.shape[-1] // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions_BT[:, :, None, None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = x_BTNH[..., :half], x_BTNH[..., half:]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


class Attention(nnx.Module):
    """Grouped-query attention; `attend` decides over which keys and keeps whatever cache there is."""

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.q = Linear(cfg.d_model, cfg.n_heads * cfg.head_dim, rngs=rngs)
        self.k = Linear(cfg.d_model, cfg.n_kv_heads * cfg.head_dim, rngs=rngs)
        self.v = Linear(cfg.d_model, cfg.n_kv_heads * cfg.head_dim, rngs=rngs)
        self.o = Linear(cfg.n_heads * cfg.head_dim, cfg.d_model, rngs=rngs)

    def __call__(self, x_BTD, positions_BT, attend, layer, state):
        B, T, _ = x_BTD.shape
        H = self.cfg.head_dim
        q_BTNH = rope(self.q(x_BTD).reshape(B, T, -1, H), positions_BT, self.cfg.rope_theta)
        k_BTKH = rope(self.k(x_BTD).reshape(B, T, -1, H), positions_BT, self.cfg.rope_theta)
        v_BTKH = self.v(x_BTD).reshape(B, T, -1, H)
        out_BTNH, state = attend(q_BTNH, k_BTKH, v_BTKH, layer, state)
        return self.o(out_BTNH.reshape(B, T, -1)), state


class MLP(nnx.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (Shazeer 2020)."""

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        self.gate = Linear(cfg.d_model, cfg.d_ff, rngs=rngs)
        self.up = Linear(cfg.d_model, cfg.d_ff, rngs=rngs)
        self.down = Linear(cfg.d_ff, cfg.d_model, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class Block(nnx.Module):
    """Pre-norm decoder block: attention and MLP, each added to the float32 residual stream."""

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        self.attn_norm = RMSNorm(cfg.d_model, cfg.norm_eps, rngs=rngs)
        self.attn = Attention(cfg, rngs=rngs)
        self.mlp_norm = RMSNorm(cfg.d_model, cfg.norm_eps, rngs=rngs)
        self.mlp = MLP(cfg, rngs=rngs)

    def __call__(self, x_BTD, positions_BT, attend, layer, state):
        update, state = self.attn(self.attn_norm(x_BTD), positions_BT, attend, layer, state)
        x_BTD = x_BTD + update
        return x_BTD + self.mlp(self.mlp_norm(x_BTD)), state


# ---------------------------------------------------------------------------------------------------------------------------------
def group_heads(q_BTNH: jax.Array, n_kv: int) -> jax.Array:
    """[B, T, N, H] -> [B, K, G * T, H]: the query heads that share a key head become rows of one product."""
    B, T, N, H = q_BTNH.shape
    return q_BTNH.reshape(B, T, n_kv, N // n_kv, H).transpose(0, 2, 3, 1, 4).reshape(B, n_kv, N // n_kv * T, H)


def ungroup_heads(x_BKRH: jax.Array, T: int) -> jax.Array:
    """The inverse of `group_heads`: [B, K, G * T, H] -> [B, T, N, H]."""
    B, K, R, H = x_BKRH.shape
    return x_BKRH.reshape(B, K, R // T, T, H).transpose(0, 3, 1, 2, 4).reshape(B, T, K * (R // T), H)


def causal_attention(dtype: jnp.dtype):
    """An `attend` over whole rows: position t sees positions up to t. Padding stands behind the text, so causality hides it.

    Products are taken in `dtype` with float32 accumulation; scores and softmax are float32.
    """

    def attend(q_BTNH, k_BTKH, v_BTKH, layer, state):
        del layer
        B, T, N, H = q_BTNH.shape
        K = k_BTKH.shape[2]
        q = group_heads(q_BTNH * H ** -0.5, K).astype(dtype)
        k_BKSH, v_BKSH = (x.transpose(0, 2, 1, 3).astype(dtype) for x in (k_BTKH, v_BTKH))
        scores = jnp.einsum("BKRH,BKSH->BKRS", q, k_BKSH, preferred_element_type=jnp.float32)
        visible_TS = jnp.tril(jnp.ones((T, T), bool))
        scores = jnp.where(jnp.tile(visible_TS, (N // K, 1)), scores, NEG_INF)
        weights = jax.nn.softmax(scores, axis=-1).astype(dtype)
        out = jnp.einsum("BKRS,BKSH->BKRH", weights, v_BKSH, preferred_element_type=jnp.float32)
        return ungroup_heads(out, T), state

    return attend
