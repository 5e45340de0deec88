"""Prefill, insert, decode: three compiled programs over a pool of blocks and a fixed number of slots, in which no request sees another.

Everything about a request (length, limits, key, sampling parameters, where its blocks are) is an array, so that nothing about it
recompiles. What keeps its bits the same in any company (DESIGN rule 1):

* prefill runs a fixed number of chunks of a fixed number of tokens, at absolute positions; which chunks stand side by side does not
  matter, be they of several prompts or of one;
* attention goes over absolute blocks of keys (decode/attention.py), so a prompt that begins like another names its blocks;
* decode always runs all slots. The keys of the last few steps stand apart until they are flushed into the blocks; a slot starts at the
  beginning of such a run of steps, so when its keys move depends on its own count of tokens only.

Prefill covers a prompt but for its last token, with which decode begins: the vocabulary head runs in decode alone.

Each device works on its own rows and blocks (`shard_map` over the row axes), so any number of data-parallel devices runs the program of one.
Letters as in decode/attention.py, and: V vocabulary, I stop ids.
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

from isara_jax.decode import ahead, attention, recipes
from isara_jax.decode.attention import Groups, Places
from isara_jax.decode.sampling import Controls, sample
from isara_jax.models import decoder
from isara_jax.models.config import ModelConfig
from isara_jax.sharding import ROWS, ShardingConfig, param_shardings, row_devices

Pool = Any  # the blocks of keys and values as the recipe of attention keeps them (decode/recipes.py)


@dataclass(frozen=True)
class EngineConfig:
    """What sampling compiles for; the numerical class of its results (DESIGN rule 1).

    Attributes:
        dtype: arithmetic of products, "float32" or "bfloat16".
        slots: rows decoded at a time on each device.
        chunk: tokens of one prompt prefilled at a time.
        lanes: chunks prefilled together on a device; with 512 tokens, products of matrices are at 95 % of the best a CPU has.
        key_block: keys attended at a time and shared as a whole; a multiple of `chunk`.
        steps: decode steps between two looks of the host, and between two flushes of new keys.
        attention: one of `recipes.KINDS`; `recipes.choose` finds the one for a device.
    """

    dtype: str = "float32"
    slots: int = 64
    chunk: int = 64
    lanes: int = 8
    key_block: int = 128
    steps: int = 4
    attention: str = "blocks"

    def __post_init__(self):
        if self.attention not in recipes.KINDS:
            raise ValueError(f"attention={self.attention!r} is not one of {', '.join(recipes.KINDS)}")
        if self.key_block % self.chunk:
            raise ValueError(f"key_block={self.key_block} is not a multiple of chunk={self.chunk}")


class Rows(NamedTuple):
    """What a slot knows about its request; every field has the slots as its first axis."""

    cached: jax.Array       # int32: positions whose keys are in the blocks
    token: jax.Array        # int32: the last token, whose keys are in no block yet
    generated: jax.Array    # int32: tokens drawn so far
    limit: jax.Array        # int32: tokens to draw at most
    key: jax.Array          # uint32 [S, 2]
    stop_ids: jax.Array     # int32 [S, I]: the ids that end the text, padded with -1
    done: jax.Array         # bool: free, or ended
    controls: Controls


class Chunk(NamedTuple):
    """What a run of decode steps drew.

    Attributes:
        tokens: [S, steps] int32; a slot's new ones are the first so many as `generated` rose, a stop id among them.
        log_p: [S, steps] float32, where a row asked for them.
        generated: [S] int32.
        done: [S] bool.
        broken: [S] bool, rows whose logits were no numbers; what they drew last is to be dropped.
    """

    tokens: jax.Array
    log_p: jax.Array
    generated: jax.Array
    done: jax.Array
    broken: jax.Array


_ROWS = P(ROWS)


def prepare(params: decoder.Params, dtype: str, mesh: Mesh, *, stacked: bool = False) -> decoder.Params:
    """The parameters in sampling dtype, form and place: one copy, or none where they are there already.

    `stacked` layers are scanned (see `decoder.forward`), as `recipes.is_scanned` asks for.
    """
    if stacked != ("0" in params["layers"]) and all(x.dtype == jnp.dtype(dtype) for x in jax.tree.leaves(params)):
        return jax.device_put(params, param_shardings(params, mesh, ShardingConfig().for_sampling()))
    return _prepared(params, dtype, mesh, stacked)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _prepared(params: decoder.Params, dtype: str, mesh: Mesh, stacked: bool) -> decoder.Params:
    params = jax.tree.map(lambda x: x.astype(dtype), params)
    if stacked and "0" in params["layers"]:
        params = decoder.stack_layers(params)
    elif not stacked and "0" not in params["layers"]:
        params = decoder.unstack_layers(params, len(jax.tree.leaves(params["layers"])[0]))
    return jax.lax.with_sharding_constraint(params, param_shardings(params, mesh, ShardingConfig().for_sampling()))


@dataclass(frozen=True)
class Engine:
    """The programs for one model, engine shape, mesh and pool. Compiled programs are shared by all engines that are equal.

    Attributes:
        blocks: blocks in the pool of a device. One more, numbered `blocks`, takes what nobody will read.
        table: blocks that a row can have at most.
    """

    cfg: ModelConfig
    config: EngineConfig
    mesh: Mesh
    blocks: int
    table: int

    @property
    def slots(self) -> int:
        """Slots of all devices; those of device d are d * config.slots and following."""
        return self.config.slots * row_devices(self.mesh)

    @property
    def lanes(self) -> int:
        """Chunks of all devices in one prefill; those of device d are d * config.lanes and following."""
        return self.config.lanes * row_devices(self.mesh)

    def __str__(self) -> str:
        size = (self.blocks + 1) * attention.block_bytes(self.cfg, self.config.dtype, self.config.key_block) / 2**20
        return (f"{self.config.slots} slots, prefills of {self.config.lanes} x {self.config.chunk} tokens, a pool of {self.blocks} blocks of "
                f"{self.config.key_block} keys ({size:.0f} MiB {self.config.dtype}), at most {self.table} to a row, attention {self.config.attention}")

    @property
    def recipe(self) -> recipes.Recipe:
        """How its programs keep and attend keys."""
        return recipes.of(self.config.attention, self.config.dtype)

    def empty_state(self) -> Pool:
        """The pool, all blocks zero."""
        return _empty(self)

    def prefill(self, params: decoder.Params, state: Pool, tokens: np.ndarray, start: np.ndarray, table: np.ndarray) -> Pool:
        """Write keys and values of chunks [P, T] at positions from `start` [P] into the blocks of `table` [P, C], numbered within the device.

        A chunk may see chunks of the same call that come before it in its text. Lanes to spare name the block `blocks`, from position 0.
        """
        if tokens.shape != (self.lanes, self.config.chunk) or (start % self.config.chunk).any():
            raise ValueError(f"tokens {tokens.shape} from {start.tolist()}: want {self.lanes} chunks of {self.config.chunk} tokens that start "
                             f"at multiples of {self.config.chunk}")
        return ahead.call(_prefill, self, params, state, *self._put((tokens, start, table)))

    def insert(self, state: Pool, source: np.ndarray, target: np.ndarray, counts: np.ndarray) -> Pool:
        """Copy blocks, so that texts which begin alike go on apart: the first `counts` [devices] of `source` and `target` [slots] int32."""
        return ahead.call(_insert, self, state, *self._put((source, target, counts)))

    def decode_chunk(self, params: decoder.Params, state: Pool, rows: Rows, places: Places, groups: Groups | None = None,
                     seen: np.ndarray | None = None) -> tuple[Pool, Chunk]:
        """Up to `config.steps` steps of all slots that are not done. All arrays are numpy, a device's rows after another's.

        Args:
            groups: rows that share blocks, see `Groups`; None where none do, which is a program of its own. Only "blocks" looks at them:
                elsewhere keys are gathered once for many steps, and groups save nothing.
            seen: [slots, V] bool, the tokens of each row's prompt and text, where a row penalises repetition; else None, another program.
        """
        groups = groups if self.config.attention == "blocks" else None
        return ahead.call(_decode, self, params, state, self._put(rows), self._put(places), self._put(groups), self._put(seen))

    def compile(self, params: decoder.Params, rows: Rows, places: Places, groups: Groups | None, seen: np.ndarray | None) -> list[str]:
        """Start to compile, in the background, the programs for arrays of these shapes, and say which.

        Args:
            params: as `prepare` returns them, or their shapes with shardings.
            groups, seen: as `decode_chunk` may get them; of decode there is a program with each of them and one with neither.
        """
        here = lambda tree: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(self.mesh, _ROWS)), tree)
        state, number = here(jax.eval_shape(functools.partial(_empty, self))), lambda *shape: np.zeros(shape, np.int32)
        ahead.compile(_prefill, self, params, state, *here((number(self.lanes, self.config.chunk), number(self.lanes),
                                                            number(self.lanes, self.table))))
        said = ["prefill"]
        for g in [None] if groups is None or self.config.attention != "blocks" else [None, groups]:
            ahead.compile(_decode, self, params, state, *here((rows, places)), here(g), here(seen))
            said.append("decode" if g is None else "decode of rows that share blocks")
        if groups is not None:
            devices = self.slots // self.config.slots
            ahead.compile(_insert, self, state, *here((number(self.slots), number(self.slots), number(devices))))
            said.append("insert")
        return said

    def _put(self, tree: Any) -> Any:
        return jax.tree.map(lambda x: jax.device_put(x, NamedSharding(self.mesh, _ROWS)), tree)


# ---------------------------------------------------------------------------------------------------------------------- programs
def _per_device(engine: Engine, body, in_specs, out_specs):
    """`body` on every device's own rows; the tensor axis stays with the compiler."""
    return jax.shard_map(body, mesh=engine.mesh, in_specs=in_specs, out_specs=out_specs, axis_names=set(ROWS), check_vma=False)


@functools.partial(jax.jit, static_argnums=0)
def _empty(engine: Engine) -> Pool:
    body = lambda: engine.recipe.empty(engine.cfg, engine.blocks + 1, engine.config.key_block)
    return _per_device(engine, body, (), _ROWS)()


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _prefill(engine: Engine, params: decoder.Params, state: Pool, tokens_PT: jax.Array, start_P: jax.Array, table_PC: jax.Array) -> Pool:
    def body(params, state, tokens_PT, start_P, table_PC):
        positions_PT = start_P[:, None] + jnp.arange(tokens_PT.shape[1])
        attend = engine.recipe.prefill(start_P, table_PC)
        return decoder.forward(params, engine.cfg, tokens_PT, positions_PT, attend, state)[1]

    return _per_device(engine, body, (P(), _ROWS, _ROWS, _ROWS, _ROWS), _ROWS)(params, state, tokens_PT, start_P, table_PC)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _insert(engine: Engine, state: Pool, source_S: jax.Array, target_S: jax.Array, count_1: jax.Array) -> Pool:
    def body(state, source_S, target_S, count_1):
        def one(i, state):
            move = lambda x: jax.lax.dynamic_update_slice_in_dim(
                x, jax.lax.dynamic_slice_in_dim(x, source_S[i], 1, axis=0), target_S[i], axis=0)
            return jax.tree.map(move, state)

        return jax.lax.fori_loop(0, count_1[0], one, state)

    return _per_device(engine, body, _ROWS, _ROWS)(state, source_S, target_S, count_1)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _decode(engine: Engine, params: decoder.Params, state: Pool, rows: Rows, places: Places, groups: Groups | None,
            seen: jax.Array | None) -> tuple[Pool, Chunk]:
    S, J, W = engine.config.slots, engine.config.steps, engine.config.key_block

    def body(params, state, start, places, groups, seen):
        def step(carry):
            j, rows, recent, seen, out = carry
            attend = engine.recipe.decode(state, places, groups, start.cached, j)
            hidden, recent = decoder.forward(params, engine.cfg, rows.token[:, None], (start.cached + j)[:, None], attend, recent)
            logits_SV = decoder.lm_head(params, engine.cfg, hidden[:, 0])
            drawn = sample(logits_SV, rows.key, rows.generated, rows.controls, seen, rows.stop_ids)
            if seen is not None:
                seen = seen.at[jnp.arange(S), drawn.token].set(True)
            out = out._replace(tokens=out.tokens.at[:, j].set(drawn.token), log_p=out.log_p.at[:, j].set(drawn.log_p),
                               broken=out.broken | (drawn.broken & ~rows.done))
            return j + 1, _advance(rows, drawn), recent, seen, out

        nothing = jnp.zeros((S,), bool)
        out = Chunk(jnp.zeros((S, J), jnp.int32), jnp.zeros((S, J)), start.generated, nothing, nothing)
        carry = (jnp.int32(0), start, engine.recipe.begin(engine.cfg, state, places, J), seen, out)
        _, rows, recent, _, out = jax.lax.while_loop(lambda c: (c[0] < J) & ~jnp.all(c[1].done), step, carry)
        at_SJ = start.cached[:, None] + jnp.arange(J)
        kept_SJ = jnp.arange(J) < (rows.generated - start.generated)[:, None]
        block_SJ = jnp.take_along_axis(places.table, jnp.minimum(at_SJ // W, engine.table - 1), axis=1)
        state = engine.recipe.flush(state, recent, at_SJ, jnp.where(kept_SJ, block_SJ, engine.blocks))
        return state, out._replace(generated=rows.generated, done=rows.done)

    return _per_device(engine, body, (P(), _ROWS, _ROWS, _ROWS, _ROWS, _ROWS), _ROWS)(params, state, rows, places, groups, seen)


def _advance(rows: Rows, drawn) -> Rows:
    """The rows after a drawn token; those that are done stay as they are."""
    generated_S = jnp.where(rows.done, rows.generated, rows.generated + 1)
    ended_S = jnp.any(drawn.token[:, None] == rows.stop_ids, axis=-1) | drawn.broken | (generated_S >= rows.limit)
    return rows._replace(token=jnp.where(rows.done, rows.token, drawn.token), generated=generated_S, done=rows.done | ended_S)
