"""One optimizer step and one measuring step, each a compiled function over a mesh.

Parameters and moments are float32 and lie as `param_shardings` says; rows are shared out over the row axes. `dtype` governs products.
"""
from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from isara_jax.config import Sft
from isara_jax.data.batching import Batch
from isara_jax.models import decoder
from isara_jax.models.config import ModelConfig
from isara_jax.sft.attention import packed_attention
from isara_jax.sft.loss import nll_sum
from isara_jax.sft.optim import optimizer
from isara_jax.sharding import ShardingConfig, param_shardings, row_devices


class TrainState(NamedTuple):
    """What a step reads and replaces: parameters with stacked layers, and the optimizer's moments."""

    params: decoder.Params
    opt: Any


class Metrics(NamedTuple):
    """Of one batch: summed loss, supervised tokens, global gradient norm before clipping (of the mean loss)."""

    loss_sum: jax.Array
    count: jax.Array
    grad_norm: jax.Array


@functools.lru_cache(maxsize=8)
def abstract_state(cfg: ModelConfig, sft: Sft, mesh: Mesh) -> TrainState:
    """A `TrainState` of `jax.ShapeDtypeStruct`s with their places."""
    params = jax.eval_shape(decoder.stack_layers, decoder.abstract_params(cfg))
    places = param_shardings(params, mesh)
    opt = jax.eval_shape(optimizer(sft).init, params)
    whole = NamedSharding(mesh, P())
    opt_places = optax.tree.map_params(optimizer(sft), lambda _, place: place, opt, places, transform_non_params=lambda _: whole)
    struct = lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
    return TrainState(jax.tree.map(struct, params, places), jax.tree.map(struct, opt, opt_places))


def init_state(params: decoder.Params, cfg: ModelConfig, sft: Sft, mesh: Mesh) -> TrainState:
    """A fresh state from unstacked `params`, which stay as they are: every leaf is copied."""

    def make(params):
        stacked = jax.tree.map(lambda x: jnp.copy(x).astype(jnp.float32), decoder.stack_layers(params))
        return TrainState(stacked, optimizer(sft).init(stacked))

    return jax.jit(make, out_shardings=_places(abstract_state(cfg, sft, mesh)))(params)


@functools.lru_cache(maxsize=8)
def train_step(cfg: ModelConfig, sft: Sft, mesh: Mesh, dtype: str):
    """The compiled step (state, `Batch` on the mesh, learning rate) -> (state, `Metrics`); the state handed in is consumed.

    The gradient is of the mean loss over the supervised tokens of the batch, of which there must be one.
    """
    tx = optimizer(sft)

    def step(state, batch, rate):
        count = jnp.sum(batch.loss_mask)

        def mean_loss(params):
            total = _nll(params, cfg, mesh, dtype, batch)
            return total / count, total

        (_, total), grads = jax.value_and_grad(mean_loss, has_aux=True)(state.params)
        updates, opt = tx.update(grads, state.opt, state.params)
        params = jax.tree.map(lambda p, u: p - rate * u, state.params, updates)
        return TrainState(params, opt), Metrics(total, count, optax.tree.norm(grads))

    state, whole = _places(abstract_state(cfg, sft, mesh)), NamedSharding(mesh, P())
    rows = NamedSharding(mesh, ShardingConfig().tokens_bt)
    return jax.jit(step, donate_argnums=0, in_shardings=(state, rows, whole), out_shardings=(state, whole))


@functools.lru_cache(maxsize=8)
def eval_step(cfg: ModelConfig, mesh: Mesh, dtype: str):
    """The compiled (params, `Batch` on the mesh) -> (summed loss, supervised tokens); params with layers stacked or apart."""
    return jax.jit(lambda params, batch: (_nll(params, cfg, mesh, dtype, batch), jnp.sum(batch.loss_mask)))


def _nll(params: decoder.Params, cfg: ModelConfig, mesh: Mesh, dtype: str, batch: Batch) -> jax.Array:
    """Summed loss of a batch. Kernels are multiplied in `dtype`; the embedding is looked up, and its gradient summed, in float32."""
    cast = lambda path, x: x.astype(dtype) if path[-1].key in ("kernel", "embedding") else x
    layers = jax.tree_util.tree_map_with_path(cast, params["layers"])
    attend = packed_attention(jnp.dtype(dtype), batch.segments)
    hidden, _ = decoder.forward({**params, "layers": layers}, cfg, batch.tokens, batch.positions, attend, remat=True)
    head = jax.tree_util.tree_map_with_path(cast, {"embed": params["embed"]} if cfg.tie_embeddings else {"head": params["head"]})
    return nll_sum(head, cfg, row_devices(mesh), hidden, batch.targets, batch.loss_mask)


def _places(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.sharding, tree)
