"""The parts of a decoder block as Flax NNX modules, and attention over whole rows.

Dimension letters, here and in every einsum: B batch, T query length, S key length, N heads, K key-value heads, G = N / K,
H head width, D model width, E embedding width, F hidden width, V vocabulary, L layers.

Weights decide the arithmetic: a product is taken in the dtype of its kernel with float32 accumulation, everything between
products (residual stream, norms, biases, rotary embeddings, softmax) is float32.
"""
from __future__ import annotations

import functools
from typing import Any, Callable, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from isara_jax.models.config import ModelConfig

NEG_INF = -1e30  # finite, so that a row without a visible key gives numbers instead of NaN
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu, "gelu": functools.partial(jax.nn.gelu, approximate=False), "gelu_tanh": jax.nn.gelu,
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x), "relu": jax.nn.relu, "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "sigmoid": jax.nn.sigmoid, "tanh": jnp.tanh}


class Layer(NamedTuple):
    """What a block is told about its place; numbers are arrays where layers that differ are scanned.

    Attributes:
        index: of the layer.
        window: keys that a query sees, itself included; the number 0 (never an array) is all of them.
        scale: of the scores.
        softcap: of the scores; 0 is none.
        turn: (cos, sin), each [B, T, 1, R / 2] for the R rotated values of a head; None where nothing is rotated.
        drop: (input, number of the product) -> input of an adapter, with dropout; None where there is none.
    """

    index: Any
    window: Any
    scale: Any
    softcap: float
    turn: tuple[jax.Array, jax.Array] | None
    drop: Callable[[jax.Array, int], jax.Array] | None = None


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
    """A product with a kernel [in, out] and, where asked for, a bias [out]; x is float32.

    With `rank` a low-rank adapter (Hu et al. 2021) is added: (drop(x) @ lora_a) @ lora_b, in the dtype of the adapter. `number` tells
    the dropout of the products of a layer apart.
    """

    def __init__(self, d_in: int, d_out: int, *, bias: bool = False, rank: int = 0, number: int = 0, rngs: nnx.Rngs):
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), (d_in, d_out)) * 0.02)
        if bias:
            self.bias = nnx.Param(jnp.zeros((d_out,)))
        if rank:
            self.lora_a = nnx.Param(jax.random.normal(rngs.params(), (d_in, rank)) * d_in ** -0.5)
            self.lora_b = nnx.Param(jnp.zeros((rank, d_out)))
        self.has_bias, self.has_adapter, self.number = bias, bool(rank), number

    def __call__(self, x: jax.Array, drop: Callable[[jax.Array, int], jax.Array] | None = None) -> jax.Array:
        out = matmul(x, self.kernel[...])
        if self.has_adapter:
            out = out + matmul(matmul(drop(x, self.number) if drop else x, self.lora_a[...]), self.lora_b[...])
        return out + self.bias[...].astype(jnp.float32) if self.has_bias else out


class Norm(nnx.Module):
    """RMSNorm or LayerNorm over the last axis, in float32, as the config says."""

    def __init__(self, width: int, cfg: ModelConfig, *, kind: str = "", rngs: nnx.Rngs):
        del rngs  # the scale starts at what makes it one, the bias at zero
        self.centred = (kind or cfg.norm) == "layer"
        self.eps, self.offset, self.affine = cfg.norm_eps, cfg.norm_offset, cfg.norm_affine
        if self.affine:
            self.scale = nnx.Param(jnp.full((width,), 1 - self.offset))
            if self.centred:
                self.bias = nnx.Param(jnp.zeros((width,)))

    def __call__(self, x: jax.Array) -> jax.Array:
        if self.centred:
            x = x - jnp.mean(x, axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.eps)
        if self.affine:
            x = x * (self.scale[...].astype(jnp.float32) + self.offset if self.offset else self.scale[...].astype(jnp.float32))
            if self.centred:
                x = x + self.bias[...].astype(jnp.float32)
        return x


def rotate(x_BTNH: jax.Array, turn: tuple[jax.Array, jax.Array] | None) -> jax.Array:
    """Rotary position embedding in the half-split layout of Hugging Face: of the first R values of a head, pair i is (x[i], x[i + R/2])."""
    if turn is None:
        return x_BTNH
    cos, sin = turn
    half = cos.shape[-1]
    first, second, rest = x_BTNH[..., :half], x_BTNH[..., half:2 * half], x_BTNH[..., 2 * half:]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)


class Attention(nnx.Module):
    """Grouped-query attention; `attend` decides over which keys and keeps whatever cache there is. Queries reach it scaled."""

    def __init__(self, cfg: ModelConfig, ranks: dict[str, int], *, rngs: nnx.Rngs):
        self.head_dim, self.qk_norm = cfg.head_dim, cfg.qk_norm
        Q, KV = cfg.n_heads * cfg.head_dim, cfg.n_kv_heads * cfg.head_dim
        linear = functools.partial(Linear, rngs=rngs)
        self.q = linear(cfg.d_model, Q, bias=cfg.qkv_bias, rank=ranks.get("q", 0), number=0)
        self.k = linear(cfg.d_model, KV, bias=cfg.qkv_bias, rank=ranks.get("k", 0), number=1)
        self.v = linear(cfg.d_model, KV, bias=cfg.qkv_bias, rank=ranks.get("v", 0), number=2)
        self.o = linear(Q, cfg.d_model, bias=cfg.o_bias, rank=ranks.get("o", 0), number=3)
        if cfg.qk_norm != "none":
            self.q_norm = Norm(Q if cfg.qk_norm == "row" else cfg.head_dim, cfg, kind="rms", rngs=rngs)
            self.k_norm = Norm(KV if cfg.qk_norm == "row" else cfg.head_dim, cfg, kind="rms", rngs=rngs)

    def __call__(self, x_BTD, attend, layer: Layer, state):
        B, T, _ = x_BTD.shape
        heads = lambda x: x.reshape(B, T, -1, self.head_dim)
        q, k, v_BTKH = self.q(x_BTD, layer.drop), self.k(x_BTD, layer.drop), heads(self.v(x_BTD, layer.drop))
        if self.qk_norm == "row":
            q, k = self.q_norm(q), self.k_norm(k)
        q_BTNH, k_BTKH = heads(q), heads(k)
        if self.qk_norm == "head":
            q_BTNH, k_BTKH = self.q_norm(q_BTNH), self.k_norm(k_BTKH)
        q_BTNH, k_BTKH = rotate(q_BTNH, layer.turn), rotate(k_BTKH, layer.turn)
        out_BTNH, state = attend(q_BTNH * layer.scale, k_BTKH, v_BTKH, layer, state)
        return self.o(out_BTNH.reshape(B, T, -1), layer.drop), state


class MLP(nnx.Module):
    """down(activation(gate(x)) * up(x)) (Shazeer 2020), or without a gate down(activation(up(x)))."""

    def __init__(self, cfg: ModelConfig, ranks: dict[str, int], *, rngs: nnx.Rngs):
        linear = functools.partial(Linear, bias=cfg.mlp_bias, rngs=rngs)
        if cfg.gated:
            self.gate = linear(cfg.d_model, cfg.d_ff, rank=ranks.get("gate", 0), number=4)
        self.up = linear(cfg.d_model, cfg.d_ff, rank=ranks.get("up", 0), number=5)
        self.down = linear(cfg.d_ff, cfg.d_model, rank=ranks.get("down", 0), number=6)
        self.activation, self.gated = cfg.activation, cfg.gated

    def __call__(self, x: jax.Array, layer: Layer) -> jax.Array:
        act = ACTIVATIONS[self.activation]
        hidden = act(self.gate(x, layer.drop)) * self.up(x, layer.drop) if self.gated else act(self.up(x, layer.drop))
        return self.down(hidden, layer.drop)


class Block(nnx.Module):
    """Attention and MLP, each added to the float32 residual stream; `norm_at` says where they are normed.

    `ranks` gives the rank of the adapter of each product that has one, by its name: (("q", 16), ("down", 16)).
    """

    def __init__(self, cfg: ModelConfig, ranks: tuple[tuple[str, int], ...] = (), *, rngs: nnx.Rngs):
        norm = functools.partial(Norm, cfg.d_model, cfg, rngs=rngs)
        self.norm_at, self.parallel = cfg.norm_at, cfg.parallel
        self.attn, self.mlp = Attention(cfg, dict(ranks), rngs=rngs), MLP(cfg, dict(ranks), rngs=rngs)
        if cfg.norm_at != "output":
            self.attn_norm, self.mlp_norm = norm(), norm()
        if cfg.norm_at in ("sandwich", "output"):
            self.attn_out_norm, self.mlp_out_norm = norm(), norm()

    def __call__(self, x_BTD, attend, layer: Layer, state):
        before = self.norm_at in ("pre", "sandwich")
        update, state = self.attn(self.attn_norm(x_BTD) if before else x_BTD, attend, layer, state)
        if self.parallel:
            return x_BTD + update + self.mlp(self.mlp_norm(x_BTD), layer), state
        x_BTD = self._add(x_BTD, update, "attn")
        return self._add(x_BTD, self.mlp(self.mlp_norm(x_BTD) if before else x_BTD, layer), "mlp"), state

    def _add(self, x_BTD: jax.Array, update: jax.Array, name: str) -> jax.Array:
        if self.norm_at == "post":
            return getattr(self, f"{name}_norm")(x_BTD + update)
        return x_BTD + (update if self.norm_at == "pre" else getattr(self, f"{name}_out_norm")(update))


# ---------------------------------------------------------------------------------------------------------------------------------
def group_heads(q_BTNH: jax.Array, n_kv: int) -> jax.Array:
    """[B, T, N, H] -> [B, K, G * T, H]: the query heads that share a key head become rows of one product."""
    B, T, N, H = q_BTNH.shape
    return q_BTNH.reshape(B, T, n_kv, N // n_kv, H).transpose(0, 2, 3, 1, 4).reshape(B, n_kv, N // n_kv * T, H)


def ungroup_heads(x_BKRH: jax.Array, T: int) -> jax.Array:
    """The inverse of `group_heads`: [B, K, G * T, H] -> [B, T, N, H]."""
    B, K, R, H = x_BKRH.shape
    return x_BKRH.reshape(B, K, R // T, T, H).transpose(0, 3, 1, 2, 4).reshape(B, T, K * (R // T), H)


def in_window(visible: jax.Array, distance: jax.Array, layer: Layer) -> jax.Array:
    """`visible` less what lies outside the layer's window. distance: query position less key position, of a shape that broadcasts."""
    if isinstance(layer.window, int) and not layer.window:
        return visible
    return visible & (distance < layer.window)


def capped(scores: jax.Array, cap: float) -> jax.Array:
    """cap * tanh(scores / cap) (Gemma 2, section 2); 0 leaves them as they are."""
    return cap * jnp.tanh(scores / cap) if cap else scores


def causal_attention(dtype: jnp.dtype):
    """An `attend` over whole rows: position t sees positions up to t. Padding stands behind the text, so causality hides it.

    Products are taken in `dtype` with float32 accumulation; scores and softmax are float32.
    """

    def attend(q_BTNH, k_BTKH, v_BTKH, layer, state):
        T, N = q_BTNH.shape[1:3]
        distance_TS = jnp.arange(T)[:, None] - jnp.arange(T)
        visible_TS = in_window(distance_TS >= 0, distance_TS, layer)
        return masked_attention(q_BTNH, k_BTKH, v_BTKH, visible_TS[None], layer, dtype), state

    return attend


def masked_attention(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, visible_BTS: jax.Array, layer: Layer,
                     dtype: jnp.dtype) -> jax.Array:
    """Attention [B, T, N, H] of scaled queries over the keys that `visible` ([B, T, S] or [1, T, S]) shows them, softmax at once."""
    (B, T, S), (N, K) = visible_BTS.shape, (q_BTNH.shape[2], k_BSKH.shape[2])
    q_BKRH = group_heads(q_BTNH, K).astype(dtype)
    k_BKSH, v_BKSH = (x.transpose(0, 2, 1, 3).astype(dtype) for x in (k_BSKH, v_BSKH))
    scores = capped(jnp.einsum("BKRH,BKSH->BKRS", q_BKRH, k_BKSH, preferred_element_type=jnp.float32), layer.softcap)
    visible = jnp.broadcast_to(visible_BTS[:, None, None], (B, 1, N // K, T, S)).reshape(B, 1, N // K * T, S)
    weights = jax.nn.softmax(jnp.where(visible, scores, NEG_INF), axis=-1).astype(dtype)
    return ungroup_heads(jnp.einsum("BKRS,BKSH->BKRH", weights, v_BKSH, preferred_element_type=jnp.float32), T)
