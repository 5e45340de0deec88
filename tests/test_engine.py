"""The compiled programs: blocks equal the full forward, and a slot's numbers do not depend on the others, bit for bit."""
from __future__ import annotations

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isara_jax.decode import attention
from isara_jax.decode.attention import GROUPS, Groups, Places
from isara_jax.decode.engine import Engine, EngineConfig, Rows, prepare
from isara_jax.decode.sampling import Controls, request_keys
from isara_jax.models import decoder
from isara_jax.models.config import LayerKind, ModelConfig, Rope
from isara_jax.models.layers import Layer, causal_attention
from isara_jax.sharding import make_mesh

TINY = ModelConfig(vocab_size=97, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=48, pattern=(LayerKind(Rope(5e3)),))
WIDE = ModelConfig(vocab_size=512, d_model=576, n_layers=2, n_heads=9, n_kv_heads=3, head_dim=64, d_ff=1536, tie_embeddings=True)
# Layers that differ: windows within and across blocks, a rotary embedding of their own or none, learned positions, capped scores.
MIXED = ModelConfig(vocab_size=97, d_model=32, n_layers=4, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=48, norm="layer", norm_at="sandwich",
                    pattern=(LayerKind(Rope(5e3, fraction=0.5), window=7, scale=0.3), LayerKind(Rope(1e2, fraction=0.5), window=40),
                             LayerKind(None), LayerKind(Rope(5e3, fraction=0.5))), qkv_bias=True, qk_norm="head", attn_softcap=2.0,
                    logit_softcap=3.0, activation="gelu", gated=False, embed_width=16, positions=130, position_offset=2)
SMALL = EngineConfig("float32", slots=12, chunk=16, key_block=32)


@functools.cache
def mesh():
    return make_mesh(devices=jax.devices()[:1])


@functools.cache
def params(cfg, dtype):
    """Random weights larger than the usual ones, so that attention is sharp and logits differ."""
    return prepare(jax.tree.map(lambda x: x * 3 if x.ndim > 1 else x, decoder.init_params(cfg, 0)), dtype, mesh())


def prompts_of(cfg, lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [(1000 + i, rng.integers(0, cfg.vocab_size, n).tolist()) for i, n in enumerate(lengths)]


class Run:
    """Prompts in slots, prompt i in slot first_slot + i, each with blocks of its own, driven without `decode.generate`."""

    def __init__(self, engine, prompts, *, limit, temperature=0.8, first_slot=0, lanes=None):
        S, W, T = engine.slots, engine.config.key_block, engine.config.chunk
        number, real, none = lambda: np.zeros(S, np.int32), lambda value: np.full(S, value, np.float32), np.full((S, 8), -1, np.int32)
        controls = Controls(real(temperature), real(0.95), number(), real(1), number(), np.ones(S, bool))
        self.rows = Rows(number(), number(), number(), number(), np.zeros((S, 2), np.uint32), none, np.ones(S, bool), controls)
        self.engine, self.state, self.tables = engine, engine.empty_state(), np.zeros((S, engine.table), np.int32)
        self.drawn, self.log_p, units, taken = [[] for _ in range(S)], [[] for _ in range(S)], [], 0
        for slot, (address, p) in enumerate(prompts, first_slot):
            need = -(-(len(p) - 1 + limit) // W)
            self.tables[slot, :need] = range(taken, taken + need)
            taken += need
            assert taken <= engine.blocks
            for field, value in zip(self.rows[:5], (len(p) - 1, p[-1], 0, limit, request_keys(0, np.array([address], np.uint64))[0])):
                field[slot] = value
            self.rows.done[slot] = False
            units += [(at, p[at:min(at + T, len(p) - 1)], self.tables[slot]) for at in range(0, len(p) - 1, T)]
        units.sort(key=lambda unit: unit[0])
        lanes = lanes or engine.lanes
        for at in range(0, len(units), lanes):
            tokens, start = np.zeros((engine.lanes, T), np.int32), np.zeros(engine.lanes, np.int32)
            table = np.full((engine.lanes, engine.table), engine.blocks, np.int32)
            for lane, (begin, ids, blocks) in enumerate(units[at:at + lanes]):
                tokens[lane, :len(ids)], start[lane], table[lane] = ids, begin, blocks
            self.state = engine.prefill(params(engine.cfg, engine.config.dtype), self.state, tokens, start, table)

    def decode(self):
        """One run of steps; returns the `Chunk`."""
        used = np.where(self.rows.done, 0, -(-self.rows.cached // self.engine.config.key_block))
        order = np.argsort(used, kind="stable").astype(np.int32)
        last = np.array([used[order[part]].max() for part in attention.tiles(len(order))], np.int32)
        places = Places(self.tables, np.zeros(len(order), np.int32), order, np.zeros_like(last), last)
        self.state, chunk = self.engine.decode_chunk(params(self.engine.cfg, self.engine.config.dtype), self.state, self.rows, places)
        chunk = jax.device_get(chunk)
        new_S = chunk.generated - self.rows.generated
        for slot, new in enumerate(new_S.tolist()):
            self.drawn[slot] += chunk.tokens[slot, :new].tolist()
            self.log_p[slot] += chunk.log_p[slot, :new].tolist()
        token = np.array([d[-1] if d else t for d, t in zip(self.drawn, self.rows.token)], np.int32)
        self.rows = self.rows._replace(cached=self.rows.cached + new_S, generated=chunk.generated, token=token, done=chunk.done)
        return chunk

    def to_the_end(self):
        while not self.rows.done.all():
            self.decode()
        return self

    def keys(self, slot):
        """The last layer's keys [K, H, X] and values [K, X, H] of a slot, as they are stored: they depend on everything below."""
        length = self.rows.cached[slot]
        k, v = (np.asarray(x[-1])[self.tables[slot, :-(-length // self.engine.config.key_block)]] for x in self.state)
        return np.concatenate(list(k), axis=-1)[..., :length], np.concatenate(list(v), axis=-2)[:, :length]


# ---------------------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("cfg", [TINY, MIXED], ids=["plain", "mixed"])
def test_blocks_equal_the_full_forward(cfg):
    """Greedy tokens and their log-probabilities, of ragged prompts on both sides of chunk and block borders, are the full forward's."""
    prompts, weights = prompts_of(cfg, [1, 2, 15, 16, 17, 18, 32, 33, 34, 65, 97, 5]), params(cfg, "float32")
    run = Run(Engine(cfg, SMALL, mesh(), 48, 8), prompts, limit=20, temperature=0.0).to_the_end()

    @jax.jit
    def full(ids):
        positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
        hidden, _ = decoder.forward(weights, cfg, ids, positions, causal_attention(jnp.float32))
        return jax.nn.log_softmax(decoder.lm_head(weights, cfg, hidden), axis=-1)

    rows = np.zeros((len(prompts), 128), np.int32)
    for i, (_, p) in enumerate(prompts):
        rows[i, :len(p) + 20] = [*p, *run.drawn[i]]
    log_p = np.asarray(full(jnp.asarray(rows)))
    for i, (_, p) in enumerate(prompts):
        here = log_p[i, len(p) - 1:len(p) + 19]
        assert here.argmax(axis=-1).tolist() == run.drawn[i], len(p)
        np.testing.assert_allclose(run.log_p[i], here.max(axis=-1), atol=2e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_slot_does_not_see_the_others(dtype):
    """At SmolLM2's width: alone, among others, in another order and slot, and in a larger pool with longer prompts, bit for bit."""
    config = EngineConfig(dtype, slots=32)
    subject, others = prompts_of(WIDE, [70], seed=9), prompts_of(WIDE, [30, 128, 200, 7, 64, 65, 129], seed=1)
    engine = Engine(WIDE, config, mesh(), 24, 8)
    alone = Run(engine, subject, limit=12).to_the_end()
    company = Run(engine, others[:5] + subject + others[5:], limit=12, first_slot=20).to_the_end()
    larger = [] if dtype == "bfloat16" else [  # one shape more is enough; in bfloat16 it is tested by tests/test_generate.py
        (Run(Engine(WIDE, config, mesh(), 40, 16), prompts_of(WIDE, [1100], seed=2) + subject, limit=12).to_the_end(), 1)]
    for other, slot in ((company, 25), *larger):
        assert other.drawn[slot] == alone.drawn[0] and other.log_p[slot] == alone.log_p[0]
        assert all((a == b).all() for a, b in zip(alone.keys(0), other.keys(slot)))
    assert len(set(alone.drawn[0])) > 6 and alone.keys(0)[0].any()


def test_chunks_together_or_one_by_one():
    """All chunks of a text in one prefill give the bits of one chunk at a time: the later ones see the earlier ones of the same call."""
    engine = Engine(TINY, SMALL, mesh(), 48, 8)
    prompts = prompts_of(TINY, [100, 47])
    together, apart = (Run(engine, prompts, limit=1, lanes=lanes) for lanes in (None, 1))
    for slot in (0, 1):
        assert all((a == b).all() and a.any() for a, b in zip(together.keys(slot), apart.keys(slot)))


def test_insert_copies_blocks():
    """The first `counts` pairs, in order, and nothing else."""
    engine = Engine(TINY, SMALL, mesh(), 48, 8)
    run = Run(engine, prompts_of(TINY, [90, 40]), limit=1)
    pairs = np.zeros((2, 12), np.int32)
    pairs[:, :3] = [0, 4, 1], [10, 11, 12]
    before = jax.tree.map(np.asarray, run.state)
    after = jax.tree.map(np.asarray, engine.insert(run.state, *pairs, np.array([2], np.int32)))
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after)):
        assert (new[10] == old[0]).all() and (new[11] == old[4]).all() and old[0].any() and old[4].any()
        assert (np.delete(new, [10, 11], axis=0) == np.delete(old, [10, 11], axis=0)).all()


def test_bfloat16_is_near_float32():
    """Keys of a prefilled prompt, read back from the bits they are kept as."""
    found = {}
    for dtype in ("float32", "bfloat16"):
        run = Run(Engine(TINY, EngineConfig(dtype, slots=12, chunk=16, key_block=32), mesh(), 48, 8), prompts_of(TINY, [49]), limit=1)
        assert all(x.dtype == attention.stored_dtype(dtype) for x in jax.tree.leaves(run.state))
        kept = run.keys(0)[0]
        found[dtype] = np.asarray(jax.lax.bitcast_convert_type(kept, jnp.bfloat16) if dtype == "bfloat16" else kept, np.float32)
    difference = np.abs(found["float32"] - found["bfloat16"]).max()
    assert 0 < difference < 0.05 * np.abs(found["float32"]).max()


def test_blocks_beyond_a_row_change_nothing():
    """A row that sees 3 keys gives the same bits after 1 block and after 4, even where the other blocks hold huge numbers."""
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.normal(size=(2, 2, 3, 8)), jnp.float32)
    k, v = (jnp.asarray(rng.normal(size=(4, 2, 8, 8)) * np.array([1, 1e9, 1e9, 1e9]).reshape(4, 1, 1, 1), jnp.float32) for _ in range(2))
    table = jnp.asarray([[0, 1, 2, 3], [0, 2, 3, 1]], jnp.int32)
    visible = lambda c: (c * 8 + jnp.arange(8) < jnp.array([3, 0])[:, None])[:, None, None]
    layer = Layer(0, 0, 1.0, 0.0, None)
    walk = jax.jit(lambda n: attention._walk(attention._nothing(2, 2, 3, 8), q, k, v, table, 0, n, visible, layer, "float32"))
    few, many = walk(1), walk(4)
    assert all((a == b).all() for a, b in zip(few, many))
    assert (few[1][1] == 0).all() and (few[2][1] == 0).all() and (few[2][0] != 0).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("heads", [(4, 4), (9, 3), (8, 1)], ids=["every head its keys", "grouped", "one head of keys"])
def test_a_group_gives_the_bits_of_its_members_alone(heads, dtype):
    """At head width 64 and blocks of 128: up to 16 rows name the same 1 or 3 blocks, then their own; windows within and beyond."""
    (N, K), S, H, W = heads, 20, 64, 128
    cfg = ModelConfig(vocab_size=8, d_model=8, n_layers=1, n_heads=N, n_kv_heads=K, head_dim=H, d_ff=8)
    rng, M, U = np.random.default_rng(0), attention.members(cfg), GROUPS
    stored = lambda *shape: attention._store(jnp.asarray(rng.normal(size=shape), jnp.float32), dtype)
    kv = (stored(64, K, H, W),), (stored(64, K, W, H),)
    q, k, v = (jnp.asarray(rng.normal(size=(S, 1, n, H)) * 2, jnp.float32) for n in (N, K, K))
    groups = [(3, [4, 2, 9][:M]), (1, [0, 1, 5, 6, 7, 8, *range(10, 20)][:M])]
    table, common = 10 + np.arange(S)[:, None] % 9 * 6 + np.arange(6), np.zeros((U, 6), int)
    depth, members, own, of = np.zeros(U, int), np.zeros((U, M), int), np.zeros(S, int), np.full(S, U * M)
    for u, (blocks, rows) in enumerate(groups):
        depth[u], common[u, :blocks], members[u, :len(rows)] = blocks, range(u * 4, u * 4 + blocks), rows
        table[rows, :blocks], own[rows], of[rows] = common[u, :blocks], blocks, u * M + np.arange(len(rows))
    cached = 400 + 17 * np.arange(S)
    order, number = np.argsort(-(-cached // W), kind="stable"), lambda x: jnp.asarray(x, jnp.int32)
    last = [(-(-cached // W))[order[part]].max() for part in attention.tiles(S)]
    shared = Groups(*map(number, (common, depth, members, depth.reshape(-1, GROUPS).max(axis=1), of)))

    @jax.jit
    def attended(groups, own, window):
        first = jnp.zeros(len(last), jnp.int32)
        places = Places(number(table), own, number(order), first, number(last))
        attend = attention.decode(dtype, kv, places, groups, number(cached), jnp.int32(3))
        recent = tuple((jnp.ones((S, K, 8, H)),) for _ in range(2))
        return attend(q, k, v, Layer(0, 0, H ** -0.5, 0.0, window), recent)[0]

    for window in (300, 10_000):
        alone, together = attended(None, number(np.zeros(S)), window), attended(shared, number(own), window)
        assert (np.asarray(alone) == np.asarray(together)).all() and np.isfinite(alone).all()
    assert len(groups[1][1]) == M


def test_limits_and_free_slots():
    """A slot stops at its limit and the run stops with its last slot; the empty ones draw nothing and no block but theirs is written."""
    engine = Engine(TINY, SMALL, mesh(), 48, 8)
    run = Run(engine, prompts_of(TINY, [3, 20]), limit=3)
    chunk = run.decode()
    assert chunk.generated.tolist() == [3, 3] + [0] * 10 and chunk.done.all() and not chunk.broken.any()
    assert run.rows.cached[:2].tolist() == [5, 22] and [len(d) for d in run.drawn] == [3, 3] + [0] * 10
    assert all(not np.asarray(x)[2:48].any() for x in jax.tree.leaves(run.state))
    again = run.decode()
    assert again.generated.tolist() == [3, 3] + [0] * 10 and not again.tokens.any()


def test_wrong_shapes_are_refused():
    engine = Engine(TINY, SMALL, mesh(), 48, 8)
    lanes, table = engine.lanes, np.zeros((engine.lanes, 8), np.int32)
    for shape, start in (((lanes, 17), 0), ((1, 16), 0), ((lanes, 16), 8)):
        tokens, starts = np.zeros(shape, np.int32), np.full(shape[0], start, np.int32)
        with pytest.raises(ValueError, match="chunks of 16"):
            engine.prefill(params(TINY, "float32"), engine.empty_state(), tokens, starts, table)
    with pytest.raises(ValueError, match="multiple"):
        EngineConfig(chunk=64, key_block=96)


def test_prepare_copies_nothing_that_is_in_place():
    once = params(TINY, "float32")
    twice = prepare(once, "float32", mesh())
    assert all(a.unsafe_buffer_pointer() == b.unsafe_buffer_pointer() for a, b in zip(jax.tree.leaves(once), jax.tree.leaves(twice)))
    assert {x.dtype for x in jax.tree.leaves(prepare(once, "bfloat16", mesh()))} == {jnp.dtype("bfloat16")}


# ---------------------------------------------------------------------------------------------------------------------------------
DEVICES = """
import jax, numpy as np
from isara_jax.decode.engine import EngineConfig, prepare
from isara_jax.decode.generate import Request, generate
from isara_jax.models import decoder
from isara_jax.models.config import LayerKind, ModelConfig, Rope
from isara_jax.sharding import make_mesh

cfg = ModelConfig(vocab_size=97, d_model=32, n_layers=1, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=48, pattern=(LayerKind(Rope(5e3)),))
weights = jax.tree.map(lambda x: x * 3 if x.ndim > 1 else x, decoder.init_params(cfg, 0))
rng = np.random.default_rng(0)
header = tuple(rng.integers(0, 97, 40).tolist())
requests = [Request(header[:20 * (i % 3)] + tuple(rng.integers(0, 97, n).tolist()), i, 12, 0.8, 0.9, log_p=True,
                    repetition_penalty=1 + i % 2 / 5) for i, n in enumerate(rng.integers(1, 48, 40))]
made = []
for shape, devices in (((1, 1, 1), 1), ((8, 1, 1), 8), ((2, 2, 2), 8)):
    mesh = make_mesh(*shape, devices=jax.devices()[:devices])
    config = EngineConfig("float32", slots=4, chunk=16, key_block=32)
    made.append(generate(prepare(weights, "float32", mesh), cfg, config, mesh, requests, seed=5, stop_ids=[3], context=128))
assert made[0] == made[1], "eight devices differ from one"
assert all(len(c.ids) == 12 or c.finish == "eos" for c in made[2])
print("same", len(made[0]), len({tuple(c.ids) for c in made[0]}))
"""


@pytest.mark.slow
def test_eight_devices_equal_one():
    """At equal slots per device, with rows over 8 devices; a tensor axis runs too (its bits are not promised)."""
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", DEVICES], env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split()[0] == "same" and int(done.stdout.split()[2]) > 30
