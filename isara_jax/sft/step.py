"""One optimizer step and one measuring step, each a compiled function over a mesh.

What is trained is either all parameters or, with `sft.lora`, adapters beside parameters that stay as they are (models/lora.py). It and its
moments are float32 and lie as `param_shardings` says; rows are shared out over the row axes. `dtype` governs products.
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
from isara_jax.models import decoder, lora
from isara_jax.models.config import ModelConfig
from isara_jax.sft.attention import packed_attention
from isara_jax.sft.loss import nll_sum
from isara_jax.sft.optim import optimizer
from isara_jax.sharding import ShardingConfig, param_shardings, row_devices


class TrainState(NamedTuple):
    """What a step reads and replaces: what is trained (parameters, or adapters alone), with stacked layers, and the optimizer's moments."""

    params: decoder.Params
    opt: Any


class Frozen(NamedTuple):
    """What a step of adapters reads beside its state: parameters as `lora.frozen` makes them, and the key data [2] of its dropout."""

    params: decoder.Params
    dropout: jax.Array


class Metrics(NamedTuple):
    """Of one batch: summed loss, supervised tokens, global gradient norm before clipping (of the mean loss)."""

    loss_sum: jax.Array
    count: jax.Array
    grad_norm: jax.Array


@functools.lru_cache(maxsize=8)
def abstract_state(cfg: ModelConfig, sft: Sft, mesh: Mesh) -> TrainState:
    """A `TrainState` of `jax.ShapeDtypeStruct`s with their places."""
    params = lora.abstract(cfg, sft.lora) if sft.lora.rank else jax.eval_shape(decoder.stack_layers, decoder.abstract_params(cfg))
    places = param_shardings(params, mesh)
    opt = jax.eval_shape(optimizer(sft).init, params)
    whole = NamedSharding(mesh, P())
    opt_places = optax.tree.map_params(optimizer(sft), lambda _, place: place, opt, places, transform_non_params=lambda _: whole)
    struct = lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
    return TrainState(jax.tree.map(struct, params, places), jax.tree.map(struct, opt, opt_places))


def init_state(params: decoder.Params, cfg: ModelConfig, sft: Sft, mesh: Mesh, seed: int = 0) -> TrainState:
    """A fresh state from unstacked `params`, which stay as they are: every leaf is copied. Adapters are drawn from `seed` instead."""

    def make(params):
        stacked = jax.tree.map(lambda x: jnp.copy(x).astype(jnp.float32), decoder.stack_layers(params))
        return TrainState(stacked, optimizer(sft).init(stacked))

    places = _places(abstract_state(cfg, sft, mesh))
    if sft.lora.rank:
        adapters = lora.init(cfg, sft.lora, mesh, seed)
        return TrainState(adapters, jax.jit(optimizer(sft).init, out_shardings=places.opt)(adapters))
    return jax.jit(make, out_shardings=places)(params)


@functools.lru_cache(maxsize=8)
def train_step(cfg: ModelConfig, sft: Sft, mesh: Mesh, dtype: str):
    """The compiled step (state, `Batch` on the mesh, learning rate, `Frozen` or None) -> (state, `Metrics`); the state is consumed.

    The gradient is of the mean loss over the supervised tokens of the batch, of which there must be one. With adapters it is theirs alone.
    """
    tx = optimizer(sft)

    def step(state, batch, rate, frozen):
        count = jnp.sum(batch.loss_mask)
        drop = lora.dropout(sft.lora, frozen.dropout) if frozen else None

        def mean_loss(trained):
            total = _nll(lora.beside(frozen.params, trained, sft.lora) if frozen else trained, cfg, mesh, dtype, batch, drop)
            return total / count, total

        (_, total), grads = jax.value_and_grad(mean_loss, has_aux=True)(state.params)
        updates, opt = tx.update(grads, state.opt, state.params)
        params = jax.tree.map(lambda p, u: p - rate * u, state.params, updates)
        return TrainState(params, opt), Metrics(total, count, optax.tree.norm(grads))

    state, whole = _places(abstract_state(cfg, sft, mesh)), NamedSharding(mesh, P())
    rows = NamedSharding(mesh, ShardingConfig().tokens_bt)
    frozen = Frozen(lora.places(cfg, mesh), whole) if sft.lora.rank else None
    return jax.jit(step, donate_argnums=0, in_shardings=(state, rows, whole, frozen), out_shardings=(state, whole))


@functools.lru_cache(maxsize=8)
def eval_step(cfg: ModelConfig, mesh: Mesh, dtype: str):
    """The compiled (params, `Batch` on the mesh) -> (summed loss, supervised tokens); params with layers stacked or apart."""
    return jax.jit(lambda params, batch: (_nll(params, cfg, mesh, dtype, batch), jnp.sum(batch.loss_mask)))


def _nll(params: decoder.Params, cfg: ModelConfig, mesh: Mesh, dtype: str, batch: Batch, drop: Any = None) -> jax.Array:
    """Summed loss of a batch, with `drop` before adapters.

    Kernels are multiplied in `dtype`; an embedding that is trained is looked up, and its gradient summed, in float32.
    """
    cast = lambda path, x: x.astype(dtype) if path[-1].key in ("kernel", "embedding") else x
    layers = jax.tree_util.tree_map_with_path(cast, params["layers"])
    attend = packed_attention(jnp.dtype(dtype), batch.segments)
    hidden, _ = decoder.forward({**params, "layers": layers}, cfg, batch.tokens, batch.positions, attend, remat=True,
                                drop=drop)
    head = jax.tree_util.tree_map_with_path(cast, decoder.head_params(params, cfg))
    return nll_sum(head, cfg, row_devices(mesh), hidden, batch.targets, batch.loss_mask)


def _places(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.sharding, tree)
