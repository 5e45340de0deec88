"""What the host knows of the slots: which request is in each, where its keys are, and the arrays that decode takes."""
from __future__ import annotations

import heapq
import itertools
from dataclasses import dataclass, field
from typing import NamedTuple, Sequence

import numpy as np

from isara_jax.decode import attention, blocks
from isara_jax.decode.attention import GROUPS, Groups, Places
from isara_jax.decode.engine import Engine, EngineConfig, Rows
from isara_jax.decode.requests import Request
from isara_jax.decode.sampling import Controls, request_keys

STOP_IDS = 8  # stop ids are padded to a multiple of this, so that models with other numbers of them share programs


class Unit(NamedTuple):
    """A chunk of a prompt that waits to be prefilled; those that stand further in front in their text come first."""

    start: int
    number: int
    tokens: Sequence[int]
    table: list[int]


@dataclass
class Row:
    """A request in a slot."""

    request: int
    table: list[int]                                 # its blocks, with those for tokens to come
    copy: tuple[int, int] | None                     # (from, to): the begun block of an equal prompt, to be copied once it is there
    drawn: list[int] = field(default_factory=list)
    log_p: list[float] = field(default_factory=list)


class Device:
    """The blocks and slots of one device, and what waits to be prefilled there."""

    def __init__(self, blocks_in_all: int, slots: int):
        self.pool = blocks.Pool(blocks_in_all)
        self.rows: list[Row | None] = [None] * slots
        self.units: list[Unit] = []           # a heap
        self._pending: dict[int, int] = {}    # block to its number of chunks that wait
        self._number = itertools.count()

    def take(self, i: int, tokens: Sequence[int], layout: blocks.Layout, config: EngineConfig, share: bool) -> tuple[Row, int] | None:
        """Blocks for request i, and how many tokens of its prompt are queued to be computed. None where blocks are too few."""
        pool, W = self.pool, config.key_block
        known = pool.known(layout.whole) if share else []
        begun = pool.find(layout.rest) if share and layout.rest and len(known) == len(layout.whole) else None
        for source in dict.fromkeys((begun, None)):  # a begun block that is kept for its copy may be the one that is lacking
            held = known if source is None else [*known, source]
            for block in held:
                pool.use(block)
            if (fresh := pool.take(len(layout.whole) - len(known) + layout.own)) is not None:
                break
            for block in reversed(held):
                pool.release(block)
        else:
            return None
        table = known + fresh
        if share:
            for block, name in zip(fresh, layout.whole[len(known):]):
                pool.name(block, name)
            if layout.rest and source is None:
                pool.name(table[len(layout.whole)], layout.rest)
        end = len(tokens) - 1
        begin = len(known) * W if source is None else end
        for start in range(begin, end, config.chunk):
            heapq.heappush(self.units, Unit(start, next(self._number), tokens[start:min(start + config.chunk, end)], table))
            self._pending[table[start // W]] = self._pending.get(table[start // W], 0) + 1
        return Row(i, table, None if source is None else (source, table[len(layout.whole)])), end - begin

    def next_unit(self, width: int) -> Unit:
        """The chunk that is to be computed next; it no longer waits. width: keys in a block."""
        unit = heapq.heappop(self.units)
        block = unit.table[unit.start // width]
        self._pending[block] -= 1
        if not self._pending[block]:
            del self._pending[block]
        return unit

    def is_ready(self, row: Row | None) -> bool:
        """Whether all of a row's prompt has been computed."""
        return row is not None and not any(b in self._pending for b in row.table) and not (row.copy and row.copy[0] in self._pending)


class Slots:
    """The arrays that decode takes, as they are on the host."""

    def __init__(self, requests: Sequence[Request], limits: Sequence[int], stop_ids: tuple[int, ...], seed: int, engine: Engine):
        self.requests, self.limits, self.engine = requests, limits, engine
        self.penalised = any(r.repetition_penalty != 1 for r in requests)
        self.keys = request_keys(np.array([seed if r.seed is None else r.seed for r in requests], np.uint64),
                                 np.array([r.address for r in requests], np.uint64))
        self.ends = [sorted({*r.stop_ids, *(() if r.ignore_eos else stop_ids)}) for r in requests]
        S, ids = engine.slots, -(-max(1, max(map(len, self.ends))) // STOP_IDS) * STOP_IDS
        number, real = lambda: np.zeros(S, np.int32), lambda value: np.full(S, value, np.float32)
        controls = Controls(temperature=real(0), top_p=real(1), top_k=number(), repetition_penalty=real(1), min_new=number(),
                            log_p=np.zeros(S, bool))
        self.rows = Rows(number(), number(), number(), number(), np.zeros((S, 2), np.uint32), np.full((S, ids), -1, np.int32), np.ones(S, bool),
                         controls)

    def put(self, slot: int, i: int) -> None:
        """Request i begins in a slot."""
        r, rows = self.requests[i], self.rows
        rows.cached[slot], rows.token[slot], rows.generated[slot], rows.limit[slot] = len(r.tokens) - 1, r.tokens[-1], 0, self.limits[i]
        rows.key[slot], rows.stop_ids[slot], rows.done[slot] = self.keys[i], -1, False
        rows.stop_ids[slot, :len(self.ends[i])] = self.ends[i]
        values = Controls(r.temperature, r.top_p, r.top_k, r.repetition_penalty, r.min_new_tokens, r.log_p)
        for into, value in zip(rows.controls, values):
            into[slot] = value

    def advance(self, slot: int, new: int, drawn: list[int]) -> None:
        """So many tokens were drawn in a slot."""
        self.rows.cached[slot] += new
        self.rows.generated[slot] += new
        if drawn:
            self.rows.token[slot] = drawn[-1]

    def arguments(self, ready: np.ndarray, devices: list[Device], share: bool) -> tuple[Rows, Places, Groups]:
        """Rows, places and groups (which may all be empty) for the slots that are ready."""
        config, C = self.engine.config, self.engine.table
        used = np.where(ready, -(-self.rows.cached // config.key_block), 0)
        tables = [row.table if row else [] for d in devices for row in d.rows]
        S, parts = config.slots, attention.tiles(config.slots)
        M, U = attention.members(self.engine.cfg), -(-S // 4 // GROUPS) * GROUPS
        made = []
        for n in range(len(devices)):
            part = slice(n * S, n * S + S)
            mine = [t[:u] for t, u in zip(tables[part], used[part])]
            found = blocks.group(mine, M) if share else []
            table = np.zeros((S, C), np.int32)
            for s, t in enumerate(tables[part]):
                table[s, :len(t)] = t
            own, of, group_table, depth, members = (np.zeros(S, np.int32), np.full(S, U * M, np.int32), np.zeros((U, C), np.int32),
                                                    np.zeros(U, np.int32), np.zeros((U, M), np.int32))
            worth = sorted(found, key=lambda x: -x[0] * (len(x[1]) - 1))[:U]  # where there are too many groups, some rows walk alone
            for u, (blocks_in_common, rows) in enumerate(sorted(worth, key=lambda x: -x[0])):
                depth[u], group_table[u, :blocks_in_common] = blocks_in_common, mine[rows[0]][:blocks_in_common]
                for m, s in enumerate(rows):
                    members[u, m], own[s], of[s] = s, blocks_in_common, u * M + m
            order = np.argsort(used[part], kind="stable").astype(np.int32)
            last = np.array([used[part][order[p]].max() for p in parts], np.int32)
            first = np.array([min([own[s] for s in order[p] if used[part][s]], default=0) for p in parts], np.int32)
            made.append((Places(table, own, order, first, last),
                         Groups(group_table, depth, members, depth.reshape(-1, GROUPS).max(axis=1), of)))
        join = lambda parts: type(parts[0])(*map(np.concatenate, zip(*parts)))
        rows = self.rows._replace(done=self.rows.done | ~ready)
        return rows, join([p for p, _ in made]), join([g for _, g in made])

    def seen(self, devices: list[Device], vocab_size: int) -> np.ndarray | None:
        """[slots, V] bool: the tokens of each row's prompt and text. None where no request penalises repetition."""
        if not self.penalised:
            return None
        out = np.zeros((self.engine.slots, vocab_size), bool)
        for slot, row in enumerate(row for d in devices for row in d.rows):
            if row:
                out[slot, [*self.requests[row.request].tokens, *row.drawn]] = True
        return out
