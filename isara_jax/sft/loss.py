"""Negative log-likelihood of the supervised tokens as a sum, without ever holding the logits of a whole batch.

Only supervised positions meet the vocabulary head, a chunk at a time, and their gradients are taken in the same visit (the head is
multiplied three times a chunk, not four): the fused linear cross-entropy of Liger Kernel (Hsu et al. 2024, arXiv 2410.10989), here
over a number of chunks that follows the batch. Letters as in models/layers.py, and: R groups of rows (one for each row device, so
that a device sorts only what it holds), M = B / R * T positions of a group, C positions of a chunk.
"""
from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from isara_jax.models.config import ModelConfig
from isara_jax.models.decoder import lm_head

CHUNK = 256  # positions of a group whose logits exist at a time: 50 MB in float32 at a vocabulary of 49,152


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def nll_sum(head: Any, cfg: ModelConfig, groups: int, hidden_BTD: jax.Array, targets_BT: jax.Array, mask_BT: jax.Array) -> jax.Array:
    """The sum over masked positions of -log p(target), float32.

    Args:
        head: the part of the parameters that `lm_head` reads, in the dtype to multiply in.
        cfg: the model.
        groups: row devices; divides B.
        hidden_BTD: what `forward` returned.
        targets_BT: the token each position is to predict.
        mask_BT: which positions count.
    """
    order, count, hidden, targets = _compact(groups, hidden_BTD, targets_BT, mask_BT)

    def add(i, total):
        losses = jax.vmap(functools.partial(_chunk_nll, cfg), (None, 0, 0, 0))(head, *_chunk(i, order, count, hidden, targets))
        return total + jnp.sum(losses)

    return jax.lax.fori_loop(0, _chunks(count), add, jnp.float32(0))


def _forward(head, cfg, groups, hidden_BTD, targets_BT, mask_BT):
    order, count, hidden, targets = _compact(groups, hidden_BTD, targets_BT, mask_BT)
    value_and_grad = jax.vmap(jax.value_and_grad(functools.partial(_chunk_nll, cfg), argnums=(0, 1)), (None, 0, 0, 0))

    def add(i, carry):
        total, d_head, d_hidden = carry
        losses, (d_head_i, d_hidden_i) = value_and_grad(head, *_chunk(i, order, count, hidden, targets))
        d_head = jax.tree.map(lambda x, d: x + d.astype(jnp.float32), d_head, d_head_i)
        return total + jnp.sum(losses), d_head, jax.lax.dynamic_update_slice_in_dim(d_hidden, d_hidden_i, i * CHUNK, axis=1)

    zeros = jax.tree.map(lambda x: jnp.zeros((groups, *x.shape), jnp.float32), head)
    empty = jnp.zeros((*order.shape, hidden.shape[-1]), jnp.float32)
    total, d_head, d_hidden = jax.lax.fori_loop(0, _chunks(count), add, (jnp.float32(0), zeros, empty))
    back = jnp.argsort(order[:, :hidden.shape[1]], axis=1)
    d_hidden = jnp.take_along_axis(d_hidden, back[..., None], axis=1).reshape(hidden_BTD.shape)
    return total, (jax.tree.map(lambda x, h: jnp.sum(x, 0).astype(h.dtype), d_head, head), d_hidden)


def _backward(cfg, groups, saved, ct):
    del cfg, groups
    d_head, d_hidden = jax.tree.map(lambda x: (ct * x).astype(x.dtype), saved)
    return d_head, d_hidden, None, None


nll_sum.defvjp(_forward, _backward)


def _compact(groups, hidden_BTD, targets_BT, mask_BT):
    """Supervised positions first, in each group: (order [R, M padded to whole chunks], count [R], hidden [R, M, D], targets [R, M])."""
    mask = mask_BT.reshape(groups, -1)
    order = jnp.argsort(~mask, axis=1, stable=True)
    order = jnp.pad(order, ((0, 0), (0, -order.shape[1] % CHUNK)))
    return order, jnp.sum(mask, axis=1), hidden_BTD.reshape(groups, -1, hidden_BTD.shape[-1]), targets_BT.reshape(groups, -1)


def _chunks(count: jax.Array) -> jax.Array:
    return (jnp.max(count) + CHUNK - 1) // CHUNK


def _chunk(i, order, count, hidden, targets):
    """The i-th chunk of each group: (hidden [R, C, D], targets [R, C], mask [R, C])."""
    at = jax.lax.dynamic_slice_in_dim(order, i * CHUNK, CHUNK, axis=1)
    counted = i * CHUNK + jnp.arange(CHUNK) < count[:, None]
    return jnp.take_along_axis(hidden, at[..., None], axis=1), jnp.take_along_axis(targets, at, axis=1), counted


def _chunk_nll(cfg, head, hidden_CD, targets_C, mask_C):
    logits_CV = lm_head(head, cfg, hidden_CD)
    target = jnp.arange(cfg.vocab_size) == targets_C[:, None]  # no gather: the gradient of this is no scatter, and V may be sharded
    nll = jax.nn.logsumexp(logits_CV, axis=-1) - jnp.sum(jnp.where(target, logits_CV, 0.0), axis=-1)
    return jnp.sum(jnp.where(mask_C, nll, 0.0))
