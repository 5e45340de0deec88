"""Prefill, insert, decode: three compiled programs over a fixed number of slots, in which a request never sees its batch-mates.

Every slot carries its own length, limits, key and sampling parameters as arrays, so that nothing about a request recompiles; only the
capacity (positions a slot can hold) does. What keeps the bits of a request the same in any company (DESIGN rule 1):

* prefill runs chunks of a fixed number of tokens for a fixed number of prompts, at absolute positions;
* attention goes over absolute blocks of keys with an online softmax (Milakov and Gimelshein 2018), and a block in which a row sees
  nothing leaves the row's numbers exactly as they were, so other rows may need more blocks;
* decode always runs all slots. The keys of the last few steps stand apart until they are flushed into the blocks; a slot starts at the
  beginning of such a run of steps, so when its keys move depends on its own count of tokens only.

Prefill covers a prompt but for its last token, with which decode begins: the vocabulary head runs in decode alone.

Each device works on its own rows (`shard_map` over the row axes), so any number of data-parallel devices runs the program of one.
Letters as in models/layers.py, and: S slots of a device, C blocks of W keys, P prompts prefilled together, J steps of a run.
"""
from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from isara_jax.decode import attention
from isara_jax.decode.sampling import sample
from isara_jax.models import decoder
from isara_jax.models.config import ModelConfig
from isara_jax.sharding import ROWS, ShardingConfig, param_shardings, row_devices

STEPS = 8  # decode steps between two looks of the host, and between two flushes of new keys


@dataclass(frozen=True)
class EngineConfig:
    """What sampling compiles for; the numerical class of its results (DESIGN rule 1).

    Attributes:
        dtype: arithmetic of products, "float32" or "bfloat16".
        slots: rows decoded at a time on each device.
        chunk: tokens of one prompt prefilled at a time.
        key_block: keys attended at a time; a multiple of `chunk`.
    """

    dtype: str = "float32"
    slots: int = 64
    chunk: int = 64
    key_block: int = 128

    def __post_init__(self):
        if self.key_block % self.chunk:
            raise ValueError(f"key_block={self.key_block} is not a multiple of chunk={self.chunk}")

    @property
    def prompts(self) -> int:
        """Prompts prefilled together on a device: 256 rows or more, for below that a product of matrices is slow and its bits vary."""
        return max(1, 256 // self.chunk)


class Prefix(NamedTuple):
    """Keys and values of P prompts of each device, a tuple over layers: [C, P, K, H, W] and [C, P, K, W, H]."""

    k: tuple[jax.Array, ...]
    v: tuple[jax.Array, ...]


class Rows(NamedTuple):
    """What a slot knows about its request; every field has the slots as its first axis."""

    cached: jax.Array       # int32: positions whose keys are in the blocks
    token: jax.Array        # int32: the last token, whose keys are in no cache yet
    generated: jax.Array    # int32: tokens drawn so far
    limit: jax.Array        # int32: tokens to draw at most
    key: jax.Array          # uint32 [., 2]
    temperature: jax.Array  # float32
    top_p: jax.Array        # float32
    ignore_eos: jax.Array   # bool
    done: jax.Array         # bool: free, or ended and not yet harvested


class State(NamedTuple):
    """All slots: keys and values as in `Prefix` with slots in place of prompts, and the rows."""

    k: tuple[jax.Array, ...]
    v: tuple[jax.Array, ...]
    rows: Rows


_KV = P(None, ROWS)
_STATE = State(_KV, _KV, Rows(*(P(ROWS),) * len(Rows._fields)))


def prepare(params: decoder.Params, dtype: str, mesh: Mesh) -> decoder.Params:
    """The parameters in sampling dtype and place: one copy, or none where they are there already."""
    shardings = param_shardings(params, mesh, ShardingConfig().for_sampling())
    if all(x.dtype == jnp.dtype(dtype) for x in jax.tree.leaves(params)):
        return jax.device_put(params, shardings)
    return jax.jit(lambda tree: jax.tree.map(lambda x: x.astype(dtype), tree), out_shardings=shardings)(params)


@dataclass(frozen=True)
class Engine:
    """The programs for one model, engine shape, mesh and capacity. Compiled programs are shared by all engines that are equal.

    Attributes:
        capacity: positions a slot can hold, prompt and new tokens together; a multiple of `config.key_block`.
    """

    cfg: ModelConfig
    config: EngineConfig
    mesh: Mesh
    capacity: int

    @property
    def slots(self) -> int:
        """Slots of all devices; those of device d are d * config.slots and following."""
        return self.config.slots * row_devices(self.mesh)

    @property
    def prompts(self) -> int:
        """Prompts of all devices in one prefill; those of device d are d * config.prompts and following."""
        return self.config.prompts * row_devices(self.mesh)

    def empty_state(self) -> State:
        """All slots free."""
        return _empty_state(self)

    def prefill(self, params: decoder.Params, tokens: np.ndarray, prefix: Prefix | None = None) -> Prefix:
        """Keys and values of prompts, from tokens [P, T] padded to a multiple of the chunk. `prefix` is a used one to overwrite."""
        chunk = self.config.chunk
        if tokens.shape[0] != self.prompts or tokens.shape[1] % chunk or not 0 < tokens.shape[1] <= self.capacity:
            raise ValueError(f"tokens {tokens.shape}: want {self.prompts} rows of 1 to {self.capacity // chunk} chunks of {chunk}")
        prefix = _empty_prefix(self) if prefix is None else prefix
        for start in range(0, tokens.shape[1], chunk):
            prefix = _prefill_chunk(self, params, prefix, self._put(tokens[:, start:start + chunk]), np.int32(start))
        return prefix

    def insert(self, state: State, prefix: Prefix, rows: Rows, slots: np.ndarray, counts: np.ndarray) -> State:
        """Put prefilled prompts into slots.

        Args:
            rows: numpy arrays [P, ...], a row for each prompt of the prefix.
            slots: [P] int32, where each prompt goes, numbered within its device.
            counts: [devices] int32, how many prompts of each device are to be inserted; its others are padding.
        """
        return _insert(self, state, prefix, self._put(rows), self._put(slots), self._put(counts))

    def decode(self, params: decoder.Params, state: State, free: np.ndarray, stop_ids: np.ndarray) -> tuple[State, jax.Array]:
        """Up to `STEPS` steps of all slots that are not done: (state, tokens [slots, STEPS]).

        A slot's new tokens are the first so many of its row as its `generated` rose; a stop id is among them.

        Args:
            free: [slots] bool, slots that hold no request (any more).
            stop_ids: int32, the ids that end a text, padded with -1.
        """
        return _decode(self, params, state, self._put(free), stop_ids)

    def _put(self, tree: Any) -> Any:
        return jax.tree.map(lambda x: jax.device_put(x, NamedSharding(self.mesh, P(ROWS))), tree)


# ---------------------------------------------------------------------------------------------------------------------- programs
def _per_device(engine: Engine, body, in_specs, out_specs):
    """`body` on every device's own rows; the tensor axis stays with the compiler."""
    return jax.shard_map(body, mesh=engine.mesh, in_specs=in_specs, out_specs=out_specs, axis_names=set(ROWS), check_vma=False)


def _empty_kv(engine: Engine, rows: int) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    cfg, W = engine.cfg, engine.config.key_block
    stored = attention.stored_dtype(engine.config.dtype)
    lead = (engine.capacity // W, rows, cfg.n_kv_heads)
    return (tuple(jnp.zeros((*lead, cfg.head_dim, W), stored) for _ in range(cfg.n_layers)),
            tuple(jnp.zeros((*lead, W, cfg.head_dim), stored) for _ in range(cfg.n_layers)))


@functools.partial(jax.jit, static_argnums=0)
def _empty_prefix(engine: Engine) -> Prefix:
    return _per_device(engine, lambda: Prefix(*_empty_kv(engine, engine.config.prompts)), (), Prefix(_KV, _KV))()


@functools.partial(jax.jit, static_argnums=0)
def _empty_state(engine: Engine) -> State:
    def body():
        S = engine.config.slots
        number = lambda: jnp.zeros((S,), jnp.int32)
        rows = Rows(number(), number(), number(), number(), jnp.zeros((S, 2), jnp.uint32), jnp.zeros((S,)), jnp.ones((S,)),
                    jnp.zeros((S,), bool), jnp.ones((S,), bool))
        return State(*_empty_kv(engine, S), rows)

    return _per_device(engine, body, (), _STATE)()


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _prefill_chunk(engine: Engine, params: decoder.Params, prefix: Prefix, tokens_PT: jax.Array, start: jax.Array) -> Prefix:
    def body(params, prefix, tokens_PT, start):
        positions_PT = jnp.broadcast_to(start + jnp.arange(tokens_PT.shape[1]), tokens_PT.shape)
        attend = attention.prefill(engine.config.dtype, start)
        _, (k, v) = decoder.forward(params, engine.cfg, tokens_PT, positions_PT, attend, (prefix.k, prefix.v))
        return Prefix(k, v)

    specs = Prefix(_KV, _KV)
    return _per_device(engine, body, (P(), specs, P(ROWS), P()), specs)(params, prefix, tokens_PT, start)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _insert(engine: Engine, state: State, prefix: Prefix, rows: Rows, slots_P: jax.Array, count_1: jax.Array) -> State:
    def body(state, prefix, rows, slots_P, count_1):
        def one(p, state):
            place = lambda axis: lambda into, out: jax.lax.dynamic_update_slice_in_dim(
                into, jax.lax.dynamic_slice_in_dim(out, p, 1, axis), slots_P[p], axis)
            return State(*jax.tree.map(place(1), (state.k, state.v), tuple(prefix)), jax.tree.map(place(0), state.rows, rows))

        return jax.lax.fori_loop(0, count_1[0], one, state)

    specs = (_STATE, Prefix(_KV, _KV), _STATE.rows, P(ROWS), P(ROWS))
    return _per_device(engine, body, specs, _STATE)(state, prefix, rows, slots_P, count_1)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _decode(engine: Engine, params: decoder.Params, state: State, free_S: jax.Array, stop_ids: jax.Array) -> tuple[State, jax.Array]:
    def body(params, state, free_S, stop_ids):
        start = state.rows._replace(done=state.rows.done | free_S)
        longest = jnp.max(jnp.where(start.done, 0, start.cached))  # blocks beyond it hold nothing for anyone

        def step(carry):
            j, rows, recent, out_SJ = carry
            attend = attention.decode(engine.config.dtype, state.k, state.v, start.cached, longest, j)
            hidden, recent = decoder.forward(params, engine.cfg, rows.token[:, None], (start.cached + j)[:, None], attend, recent)
            logits_SV = decoder.lm_head(params, engine.cfg, hidden[:, 0])
            token = sample(logits_SV, rows.key, rows.generated, rows.temperature, rows.top_p)
            rows, out_SJ = _advance(rows, token, stop_ids), out_SJ.at[:, j].set(token)
            return j + 1, rows, recent, out_SJ

        recent = attention.empty_recent(engine.cfg, engine.config.slots, STEPS)
        carry = (jnp.int32(0), start, recent, jnp.zeros((engine.config.slots, STEPS), jnp.int32))
        _, rows, recent, out_SJ = jax.lax.while_loop(lambda c: (c[0] < STEPS) & ~jnp.all(c[1].done), step, carry)
        k, v = attention.flush(engine.config.dtype, state.k, state.v, recent, start.cached)
        return State(k, v, rows._replace(cached=start.cached + rows.generated - start.generated)), out_SJ

    specs = (P(), _STATE, P(ROWS), P())
    return _per_device(engine, body, specs, (_STATE, P(ROWS)))(params, state, free_S, stop_ids)


def _advance(rows: Rows, token_S: jax.Array, stop_ids: jax.Array) -> Rows:
    """The rows after a drawn token; those that are done stay as they are."""
    generated_S = jnp.where(rows.done, rows.generated, rows.generated + 1)
    ended_S = jnp.any(token_S[:, None] == stop_ids, axis=-1) & ~rows.ignore_eos | (generated_S >= rows.limit)
    return rows._replace(token=jnp.where(rows.done, rows.token, token_S), generated=generated_S, done=rows.done | ended_S)
