"""Log-likelihoods of continuations, each token computed once.

Multiple choice asks for many continuations of one prompt, and evaluations ask for many prompts that open alike. So:

* the pairs of one prompt are a *tree* of tokens: the prompt, then its continuations, which share what they have in common. A token sees
  itself and its ancestors. With the tokens in depth-first order the ancestors of token i are the j <= i whose subtree ends behind i, so
  one number a token, the end of its subtree, is the whole mask, also for several trees packed into one row;
* what all prompts begin with is the *prefix*: its keys and values are computed once, and every row attends to them;
* only tokens that predict a wanted one meet the vocabulary head, each once however many continuations follow it. The last token of a
  continuation is only predicted and is no input.

Letters as in models/layers.py, and: M tokens that predict on a device, E predictions wanted there.
"""
from __future__ import annotations

import bisect
import functools
import itertools
from dataclasses import dataclass
from typing import Any, Callable, Iterator, NamedTuple, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from isara_jax.models import decoder
from isara_jax.models.config import ModelConfig
from isara_jax.models.layers import NEG_INF, capped, in_window, masked_attention
from isara_jax.sharding import put_rows, row_devices

NARROWEST = 128           # tokens of the narrowest row; wider ones double. Few widths are few programs
TOKENS = {"cpu": 1024}    # tokens a device runs at a time; full speed from 512 on, and scores of 2,048 no longer fit the cache of a CPU
ON_ACCELERATORS = 8192
PREFIX_BLOCK = 64         # prefixes are padded to a multiple of this, long ones to one of QUERIES
SHORTEST_PREFIX = 32      # a shorter one is no less work to attend to than to compute
QUERIES = 512             # queries whose scores exist at one time; bounds the memory of long rows
VOCABULARY = 1024         # vocabulary entries whose logits exist at one time


class Tree(NamedTuple):
    """All continuations of one prompt, in depth-first order; T tokens and E predictions.

    Attributes:
        tokens: [T], the prompt behind the prefix, then the continuations without what is only predicted.
        positions: [T], place in the text, prefix included.
        ends: [T], index behind the last descendant.
        sources: [E], index of the token whose state predicts.
        targets: [E], the token predicted.
    """

    tokens: np.ndarray
    positions: np.ndarray
    ends: np.ndarray
    sources: np.ndarray
    targets: np.ndarray


@dataclass(frozen=True)
class Plan:
    """What is to be computed for some pairs.

    Attributes:
        prefix: token ids that stand before every tree; empty where there is nothing to share.
        trees: one for each different prompt.
        paths: for each pair its tree and the predictions [C] of that tree that make up its log-likelihood.
    """

    prefix: tuple[int, ...]
    trees: tuple[Tree, ...]
    paths: tuple[tuple[int, np.ndarray], ...]

    @property
    def tokens(self) -> int:
        """Tokens that go through the layers, without padding."""
        return len(self.prefix) + sum(len(tree.tokens) for tree in self.trees)

    @property
    def heads(self) -> int:
        """Tokens that meet the vocabulary head, without padding."""
        return sum(len(np.unique(tree.sources)) for tree in self.trees)


def score(params: decoder.Params, cfg: ModelConfig, dtype: str, mesh: Mesh, pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
          on_progress: Callable[[int, int, int], None] | None = None) -> list[float]:
    """Summed log-likelihood in nats of each continuation after its prompt, in the order of the pairs.

    A pair's value does not depend on the others but for rounding; the same call gives the same bits.

    Args:
        params: as `engine.prepare` returns them.
        dtype: arithmetic of products, "float32" or "bfloat16".
        pairs: (prompt ids, continuation ids), none empty, no id outside the vocabulary.
        on_progress: called after each batch with (prompts done, prompts, tokens run so far).
    """
    planned = plan(pairs, _tokens_at_once(mesh))
    prefix = _prefix(params, cfg, dtype, mesh, planned.prefix)
    found: dict[int, np.ndarray] = {}
    run = len(planned.prefix)
    for width, rows in _batches([len(tree.tokens) for tree in planned.trees], mesh):
        batch, where = _collate(planned.trees, rows, width, row_devices(mesh))
        tokens, positions, ends, heads, sources, targets = put_rows(mesh, batch)
        hidden = _hidden(params, cfg, dtype, tokens, positions, ends, prefix, len(planned.prefix))
        values = np.asarray(_log_p(params, cfg, hidden, heads, sources, targets))
        found.update({t: values[device, start:start + len(planned.trees[t].targets)] for t, device, start in where})
        if on_progress:
            run += sum(len(planned.trees[t].tokens) for t, _, _ in where)
            on_progress(len(found), len(planned.trees), run)
    return [float(found[t][path].sum(dtype=np.float64)) for t, path in planned.paths]


# -------------------------------------------------------------------------------------------------------------------------- plan
def plan(pairs: Sequence[tuple[Sequence[int], Sequence[int]]], worth: int) -> Plan:
    """Trees of the pairs, and their common prefix where sharing it saves `worth` tokens or more."""
    prompts: dict[tuple[int, ...], list[int]] = {}
    for i, (prompt, continuation) in enumerate(pairs):
        if not len(prompt) or not len(continuation):
            raise ValueError(f"pair {i} has {len(prompt)} tokens of prompt and {len(continuation)} of continuation; both need one")
        prompts.setdefault(tuple(prompt), []).append(i)
    shared = _common(min(prompts), max(prompts)) if prompts else 0  # what the first and last in order share, all share
    shared = min([shared, *(len(prompt) - 1 for prompt in prompts)])  # a token of each prompt must stay, to predict what follows
    if shared < SHORTEST_PREFIX or shared * (len(prompts) - 1) < worth:
        shared = 0
    trees, paths = [], [(0, np.zeros(0, np.int64))] * len(pairs)
    for t, (prompt, members) in enumerate(prompts.items()):
        continuations = sorted({tuple(pairs[i][1]) for i in members})
        tree, found = _grow(prompt, shared, continuations)
        trees.append(tree)
        path = dict(zip(continuations, found))
        for i in members:
            paths[i] = (t, path[tuple(pairs[i][1])])
    return Plan(min(prompts, default=())[:shared], tuple(trees), tuple(paths))


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two texts have in common at their beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def _grow(prompt: tuple[int, ...], shared: int, continuations: list[tuple[int, ...]]) -> tuple[Tree, list[np.ndarray]]:
    """The tree of sorted continuations after `prompt[shared:]`, and for each continuation the predictions along it.

    In sorted order the texts that share a beginning are neighbours, so the tree grows depth first: from one text to the next the branch is
    cut back to what both have in common, which ends the subtrees of the tokens cut off.
    """
    tokens, stem = list(prompt[shared:]), len(prompt) - shared
    positions, ends, sources, targets = list(range(shared, len(prompt))), [0] * stem, [], []
    paths, last, nodes, edges = [], (), [], []  # nodes and edges: those of the text before, token by token
    for text in continuations:
        common = _common(last, text)
        for node in nodes[common:]:
            ends[node] = len(tokens)
        last, nodes, edges = text, nodes[:common], edges[:common]
        for depth in range(len(nodes), len(text) - 1):
            nodes.append(len(tokens))
            tokens.append(text[depth])
            positions.append(len(prompt) + depth)
            ends.append(0)
        for depth in range(common, len(text)):
            edges.append(len(targets))
            sources.append(nodes[depth - 1] if depth else stem - 1)
            targets.append(text[depth])
        paths.append(np.array(edges))
    for node in [*range(stem), *nodes]:
        ends[node] = len(tokens)
    return Tree(*(np.array(x, np.int32) for x in (tokens, positions, ends, sources, targets))), paths


# ----------------------------------------------------------------------------------------------------------------------- batches
def _tokens_at_once(mesh: Mesh) -> int:
    return TOKENS.get(mesh.devices.flat[0].platform, ON_ACCELERATORS)


def _power(n: int) -> int:
    """The smallest power of two that is n or more."""
    return 1 << (n - 1).bit_length()


def _batches(lengths: Sequence[int], mesh: Mesh) -> Iterator[tuple[int, list[list[int]]]]:
    """(width, rows of tree numbers), widest first. Rows left over run as full a batch as the others, or alone as a power of two."""
    rows = sorted(_pack(lengths), key=lambda row: -row[0])
    for width, group in itertools.groupby(rows, key=lambda row: row[0]):
        members, size = [m for _, m in group], row_devices(mesh) * max(1, _tokens_at_once(mesh) // width)
        fewest = row_devices(mesh) * _power(-(-len(members) // row_devices(mesh)))
        for start in range(0, len(members), min(size, fewest)):
            batch = members[start:start + min(size, fewest)]
            yield width, batch + [[]] * (min(size, fewest) - len(batch))


def _pack(lengths: Sequence[int]) -> list[tuple[int, list[int]]]:
    """(width, numbers of `lengths`) of rows: longest first, each into the fullest row that still holds it, else a new, narrow one."""
    rows: list[tuple[int, list[int]]] = []
    room: list[tuple[int, int]] = []  # (tokens free, row), sorted
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        best = bisect.bisect_left(room, (lengths[i], 0))
        if best == len(room):
            rows.append((max(NARROWEST, _power(lengths[i])), []))
            room.append((rows[-1][0], len(rows) - 1))
        free, row = room.pop(best)
        rows[row][1].append(i)
        bisect.insort(room, (free - lengths[i], row))
    return rows


def _collate(trees: Sequence[Tree], rows: list[list[int]], width: int,
             devices: int) -> tuple[tuple[np.ndarray, ...], list[tuple[int, int, int]]]:
    """The arrays of a batch, and for each of its trees (tree, device, first of its predictions on that device).

    Arrays, all int32: tokens, positions and ends [B, T]; heads [devices, M], places among a device's tokens that predict; sources
    [devices, E], places among those heads, and targets [devices, E]. A padding token ends before it begins: nothing sees it.
    """
    tokens, positions, ends = (np.zeros((len(rows), width), np.int32) for _ in range(3))
    heads, sources, targets = ([[] for _ in range(devices)] for _ in range(3))
    where = []
    for row, members in enumerate(rows):
        device, local = divmod(row, len(rows) // devices)
        start = 0
        for t in members:
            tree, stop = trees[t], start + len(trees[t].tokens)
            tokens[row, start:stop], positions[row, start:stop], ends[row, start:stop] = tree.tokens, tree.positions, tree.ends + start
            where.append((t, device, len(sources[device])))
            places, source = np.unique(tree.sources, return_inverse=True)
            sources[device] += (source + len(heads[device])).tolist()
            heads[device] += (places + local * width + start).tolist()
            targets[device] += tree.targets.tolist()
            start = stop
    return (tokens, positions, ends, *map(_level, (heads, sources, targets))), where


def _level(lists: list[list[int]]) -> np.ndarray:
    """Lists [devices] of several lengths as an array, padded with zeros to a multiple of 128: few programs, and the head's are quick to
    compile."""
    made = np.zeros((len(lists), -(-max(map(len, lists)) // 128) * 128), np.int32)
    for row, values in zip(made, lists):
        row[:len(values)] = values
    return made


# ---------------------------------------------------------------------------------------------------------------------- programs
def _prefix(params: decoder.Params, cfg: ModelConfig, dtype: str, mesh: Mesh, tokens: tuple[int, ...]) -> tuple[Any, ...]:
    """Keys and values [L, S, K, H] of the prefix, padded to whole blocks; nothing where there is none."""
    if not tokens:
        return ()
    block = PREFIX_BLOCK if len(tokens) <= QUERIES else QUERIES
    padded = np.zeros((1, -(-len(tokens) // block) * block), np.int32)
    padded[0, :len(tokens)] = tokens
    return _prefix_program(params, cfg, dtype, jax.device_put(padded, NamedSharding(mesh, P())))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _prefix_program(params, cfg, dtype, tokens_1S):
    S = tokens_1S.shape[1]
    positions_1S = jnp.arange(S)[None]
    plain = _attention(dtype, positions_1S, jnp.full((1, S), S), (), 0)  # one chain of tokens; padding stands behind what sees it not

    def attend(q_BTNH, k_BTKH, v_BTKH, layer, state):
        kept = tuple(kept.at[layer.index].set(new[0]) for kept, new in zip(state, (k_BTKH, v_BTKH)))
        return plain(q_BTNH, k_BTKH, v_BTKH, layer, None)[0], kept

    nothing = jnp.zeros((cfg.n_layers, S, cfg.n_kv_heads, cfg.head_dim))
    return decoder.forward(params, cfg, tokens_1S, positions_1S, attend, (nothing, nothing))[1]


@functools.partial(jax.jit, static_argnums=(1, 2))
def _hidden(params, cfg, dtype, tokens_BT, positions_BT, ends_BT, prefix, prefix_length):
    return decoder.forward(params, cfg, tokens_BT, positions_BT, _attention(dtype, positions_BT, ends_BT, prefix, prefix_length))[0]


def _attention(dtype: str, positions_BT: jax.Array, ends_BT: jax.Array, prefix: tuple[Any, ...], prefix_length: jax.Array | int):
    """An `attend` over the prefix and the ancestors of each token. Products in `dtype` with float32 accumulation, the rest float32."""
    B, T = ends_BT.shape

    def attend(q_BTNH, k_BTKH, v_BTKH, layer, state):
        N, (K, H) = q_BTNH.shape[2], k_BTKH.shape[2:]
        before = tuple(x[layer.index] for x in prefix) if prefix else (jnp.zeros((0, K, H)),) * 2
        S = before[0].shape[0] + T
        k_BSKH, v_BSKH = (jnp.concatenate([jnp.broadcast_to(old, (B, *old.shape)), new], axis=1)
                          for old, new in zip(before, (k_BTKH, v_BTKH)))
        in_prefix = jnp.arange(S - T) < prefix_length
        place_BS = jnp.concatenate([jnp.broadcast_to(jnp.arange(S - T), (B, S - T)), positions_BT], axis=1)

        def some(start, q_BQNH):
            Q = q_BQNH.shape[1]
            at_Q1 = start + jnp.arange(Q)[:, None]
            own_BQT = (jnp.arange(T) <= at_Q1) & (at_Q1 < ends_BT[:, None])
            visible_BQS = jnp.concatenate([jnp.broadcast_to(in_prefix, (B, Q, S - T)), own_BQT], axis=2)
            place_BQ = jax.lax.dynamic_slice_in_dim(positions_BT, start, Q, axis=1)
            visible_BQS = in_window(visible_BQS, place_BQ[:, :, None] - place_BS[:, None], layer)
            return masked_attention(q_BQNH, k_BSKH, v_BSKH, visible_BQS, layer, dtype)

        if T <= QUERIES:
            return some(0, q_BTNH), state
        tiles = jnp.moveaxis(q_BTNH.reshape(B, -1, QUERIES, N, H), 1, 0)
        out = jax.lax.map(lambda x: some(*x), (jnp.arange(len(tiles)) * QUERIES, tiles))
        return jnp.moveaxis(out, 0, 1).reshape(B, T, N, H), state

    return attend


@functools.partial(jax.jit, static_argnums=1)
def _log_p(params, cfg, hidden_BTD, heads, sources, targets):
    """Log-probability of each target [devices, E] after the token its source names, the vocabulary a block at a time."""
    devices, M = heads.shape
    take = lambda x, places: jnp.take_along_axis(x, places[..., None], axis=1)
    states = take(hidden_BTD.reshape(devices, -1, hidden_BTD.shape[-1]), heads)
    kernel, axis = (params["embed"]["embedding"], 0) if cfg.tie_embeddings else (params["head"]["kernel"], 1)
    V = kernel.shape[axis]
    size = min(VOCABULARY, V)

    def one(i, acc):
        top, total = acc
        start = jnp.minimum(i * size, V - size)  # the last block reaches back; what it has in common with the one before is not counted
        block = jax.lax.dynamic_slice_in_dim(kernel, start, size, axis)
        part = {"embed": {"embedding": block}} if cfg.tie_embeddings else {"head": {"kernel": block}}
        logits = jnp.where(start + jnp.arange(size) >= i * size, decoder.lm_head(part, cfg, states), NEG_INF)
        new_top = jnp.maximum(top, jnp.max(logits, axis=-1))
        return new_top, total * jnp.exp(top - new_top) + jnp.sum(jnp.exp(logits - new_top[..., None]), axis=-1)

    top, total = jax.lax.fori_loop(0, -(-V // size), one, (jnp.full((devices, M), NEG_INF), jnp.zeros((devices, M))))
    wanted = jnp.take(kernel, targets, axis=axis)
    wanted = (wanted if cfg.tie_embeddings else jnp.moveaxis(wanted, 0, -1)).astype(jnp.float32)
    logits = jnp.sum(take(states, sources).astype(kernel.dtype).astype(jnp.float32) * wanted, axis=-1)
    return capped(logits, cfg.logit_softcap) - jnp.take_along_axis(top + jnp.log(total), sources, axis=1)
