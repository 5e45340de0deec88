"""Requests in, completions out, in the same order: the host's side of sampling.

Free slots are refilled while others go on, so that a long answer holds up nobody, and what prompts have in common at their beginning is
computed and kept once.
"""
from __future__ import annotations

import contextlib
from collections import deque
from dataclasses import dataclass
from typing import Callable, Collection, Iterable, Iterator, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from isara_jax.decode import attention, blocks, recipes
from isara_jax.decode.engine import Engine, EngineConfig
from isara_jax.decode.requests import Completion, Request, check
from isara_jax.decode.slots import Device, Row, Slots
from isara_jax.decode.stops import cut, settled
from isara_jax.models.config import ModelConfig
from isara_jax.models.decoder import Params
from isara_jax.sharding import row_devices

SMALLEST_TABLE = 8  # blocks in the smallest table

Decode = Callable[[Sequence[int]], str]


@dataclass
class Counts:
    """What a call of `generate` did.

    Attributes:
        prompt_tokens: tokens of all prompts.
        prefilled: tokens that went through prefill, without padding.
        prefill_room: tokens that the prefills had room for; the rest of them was padding.
        generated: tokens drawn.
        steps: decode steps.
        busy, room: slot-steps that drew a token, and all there were, while requests were waiting for a slot.
        tail_busy, tail_room: the same when none was waiting any more.
    """

    prompt_tokens: int = 0
    prefilled: int = 0
    prefill_room: int = 0
    generated: int = 0
    steps: int = 0
    busy: int = 0
    room: int = 0
    tail_busy: int = 0
    tail_room: int = 0

    @property
    def shared(self) -> int:
        """Prompt tokens that were not computed, since another prompt began alike."""
        return self.prompt_tokens - self.prefilled

    def __str__(self) -> str:
        share = lambda part, whole: f"{part / whole:.0%}"
        said = [f"{self.prompt_tokens:,} prompt tokens"]
        if self.shared:
            said.append(f"{share(self.shared, self.prompt_tokens)} of them shared with prompts that begin alike")
        said.append(f"{self.generated:,} tokens drawn in {self.steps:,} steps")
        if self.room:
            said.append(f"{share(self.busy, self.room)} of the slots busy while requests waited")
        if self.tail_room:
            said.append(f"{share(self.tail_busy, self.tail_room)} {'in the tail' if self.room else 'of the slots busy'}")
        return ", ".join(said)


def generate(params: Params, cfg: ModelConfig, config: EngineConfig, mesh: Mesh, requests: Sequence[Request], *, seed: int,
             stop_ids: Iterable[int], context: int, decode: Decode | None = None, share: bool = True,
             on_progress: Callable[[int, int, int, int], None] | None = None, on_text: Callable[[int, str], None] | None = None,
             on_end: Callable[[Counts], None] | None = None) -> list[Completion]:
    """Sample a completion for every request, in the order of the requests.

    A completion depends on (params, config, seed, request) and on nothing else: not on the other requests, nor their order.

    Args:
        params: as `engine.prepare` returns them.
        seed: the run's seed, 0 to 2**63 - 1.
        stop_ids: token ids that end a text.
        context: longest sequence in tokens, prompt and new ones together.
        decode: token ids to text; needed where a request has stop strings.
        share: compute what prompts have in common once; without it each is computed on its own (to measure what sharing saves).
        on_progress: called now and then with (requests done, requests, tokens prefilled, tokens generated), all so far.
        on_text: called now and then with (request number, the beginning of its text that later tokens do not change), at last with its
            whole text. Needs `decode`. Whatever either function raises ends the work.
        on_end: called with what the call did.

    Raises:
        UserError: a prompt is empty, holds an id outside the vocabulary or leaves no room in the context, or a parameter is out of range;
            said before any work.
    """
    sampler = Sampler(params, cfg, config, mesh, stop_ids=stop_ids, context=context, decode=decode, share=share)
    made = list(sampler.stream(requests, seed=seed, on_progress=on_progress, on_text=on_text))
    if on_end:
        on_end(sampler.counts)
    return made


def pool_blocks(needed: int, slots: int) -> int:
    """Blocks in a pool that holds so many: steps of half the slots, later of an eighth of the whole, so that few programs are compiled."""
    unit = max(1, slots // 2)
    units = -(-needed // unit)
    step = 1 << max(0, (units - 1).bit_length() - 3)
    return -(-units // step) * step * unit


def table_width(needed: int) -> int:
    """Places in a table for so many blocks: a power of two."""
    return max(SMALLEST_TABLE, 1 << (needed - 1).bit_length())


# ---------------------------------------------------------------------------------------------------------------------------------
class Sampler:
    """Keeps the pool, and with it the beginnings of prompts, from one call of `stream` to the next: for the turns of a chat.

    A call that needs a larger pool gets a new one, which knows nothing and has its own programs. `room` is what the first one holds at least, in
    tokens.
    """

    def __init__(self, params: Params, cfg: ModelConfig, config: EngineConfig, mesh: Mesh, *, stop_ids: Iterable[int], context: int,
                 decode: Decode | None = None, share: bool = True, room: int = 0):
        self.params, self.cfg, self.config, self.mesh, self.context, self.decode, self.share = params, cfg, config, mesh, context, decode, share
        self.room = -(-room // config.key_block)
        self.stop_ids = tuple(sorted(stop_ids))
        self.counts = Counts()
        self.engine: Engine | None = None
        self._devices: list[Device] = []
        self._state = None

    def stream(self, requests: Sequence[Request], *, seed: int, on_progress: Callable[[int, int, int, int], None] | None = None,
               on_text: Callable[[int, str], None] | None = None) -> Iterator[Completion]:
        """The completions in the order of the requests, each as soon as it and those before it have ended; see `generate`."""
        self.check(requests)
        if on_text and self.decode is None:
            raise ValueError("on_text is to be called, but no decode function was given")
        self.counts = Counts()
        made: dict[int, Completion] = {}
        told, due = 0, 0
        with contextlib.closing(self._run(requests, seed, on_text)) as run:
            for ended in run:
                made.update(ended)
                told += len(ended)
                if on_progress:
                    on_progress(told, len(requests), self.counts.prefilled, self.counts.generated)
                while due in made:
                    yield made.pop(due)
                    due += 1

    def check(self, requests: Sequence[Request]) -> None:
        """Raise `UserError` for a request that cannot be run."""
        check(requests, vocab_size=self.cfg.vocab_size, context=self.context, decode=self.decode)

    def compile(self, requests: Sequence[Request]) -> str:
        """Start to compile, in the background, what these requests will run, and say what that is. `params` may be shapes with shardings."""
        limits = self._limits(requests)
        layouts = self._queue(requests, limits)
        if not layouts:
            return ""
        engine = Engine(self.cfg, self.config, self.mesh, *self._room(layouts.values(), self.config.slots))
        devices = [Device(engine.blocks, self.config.slots) for _ in range(row_devices(self.mesh))]
        slots, names = Slots(requests, limits, self.stop_ids, 0, engine), [name for x in layouts.values() for name in (*x.whole, x.rest) if name]
        rows, places, groups = slots.arguments(np.zeros(engine.slots, bool), devices, share=False)
        programs = engine.compile(self.params, rows, places, groups if self.share and len(set(names)) < len(names) else None,
                                  slots.seen(devices, self.cfg.vocab_size))
        return f"{', '.join(programs)}: {engine}"

    # ------------------------------------------------------------------------------------------------------------------ the loop
    def _run(self, requests: Sequence[Request], seed: int, on_text) -> Iterator[list[tuple[int, Completion]]]:
        """What has ended, again and again."""
        limits = self._limits(requests)
        yield [(i, Completion([], "" if self.decode else None, "length", [] if r.log_p else None))
               for i, r in enumerate(requests) if not limits[i]]
        layouts = self._queue(requests, limits)
        if not layouts:
            return
        waiting = deque(layouts)
        self._make_room(layouts.values())
        self._slots = Slots(requests, limits, self.stop_ids, seed, self.engine)
        try:
            while waiting or any(row for d in self._devices for row in d.rows):
                self._place(waiting, requests, layouts)
                self._prefill(all_of_it=not waiting)
                ready = self._start()
                if not ready.any():
                    continue
                rows, places, groups = self._slots.arguments(ready, self._devices, self.share)
                self._state, chunk = self.engine.decode_chunk(
                    self.params, self._state, rows, places, groups if groups.depth.any() else None,
                    self._slots.seen(self._devices, self.cfg.vocab_size))
                yield self._harvest(jax.device_get(chunk), requests, ready, bool(waiting), on_text)
        finally:  # whoever stops in between leaves a sampler that can be used again
            if any(row or d.units for d in self._devices for row in d.rows):
                self.engine = None

    def bytes_needed(self, requests: Sequence[Request], slots: int) -> int:
        """Bytes of keys and values on each device for these requests, with so many slots, less what the sampler holds already."""
        queue = self._queue(requests, self._limits(requests))
        if not queue:
            return 0
        held, (needed, table) = self.engine.blocks if self.engine else 0, self._room(queue.values(), slots)
        gathered = slots * table if recipes.is_scanned(self.config.attention) else 0
        return (needed - held + gathered) * attention.block_bytes(self.cfg, self.config.dtype, self.config.key_block)

    def _limits(self, requests: Sequence[Request]) -> list[int]:
        return [min(r.max_new_tokens, self.context - len(r.tokens)) for r in requests]

    def _queue(self, requests: Sequence[Request], limits: Sequence[int]) -> dict[int, blocks.Layout]:
        """The requests that draw something and their layouts: the longest first, those whose prompts begin alike together."""
        layouts = {i: blocks.layout(r.tokens, limits[i], self.config.key_block) for i, r in enumerate(requests) if limits[i]}
        first = {i: x.whole[0] if x.whole else None for i, x in layouts.items()}
        longest: dict[bytes | None, int] = {}
        for i, name in first.items():
            longest[name] = max(longest.get(name, 0), len(requests[i].tokens))
        size = lambda i: longest[first[i]] if first[i] else len(requests[i].tokens)
        order = sorted(layouts, key=lambda i: (-size(i), first[i] or b"", -len(requests[i].tokens), requests[i].tokens, i))
        return {i: layouts[i] for i in order}

    def _room(self, layouts: Collection[blocks.Layout], slots: int) -> tuple[int, int]:
        """(blocks of a pool, places of a table) for requests in the order in which they get their slots."""
        if not self.share:
            layouts = [blocks.Layout((), None, len(x.whole) + x.own) for x in layouts]
        longest = max(self.room, *(len(x.whole) + x.own for x in layouts))
        return pool_blocks(max(longest, blocks.most_in_use(layouts, slots)), slots), table_width(longest)

    def _make_room(self, layouts: Collection[blocks.Layout]) -> None:
        """An engine and a pool that hold these requests: those of the last call where they are large enough."""
        needed, table = self._room(layouts, self.config.slots)
        if self.engine and self.engine.blocks >= needed and self.engine.table >= table:
            return
        self.engine = Engine(self.cfg, self.config, self.mesh, needed, table)
        self._state = None  # let the old pool go before the new one is made
        self._state = self.engine.empty_state()
        self._devices = [Device(needed, self.config.slots) for _ in range(row_devices(self.mesh))]

    def _place(self, waiting: deque[int], requests: Sequence[Request], layouts: dict[int, blocks.Layout]) -> None:
        """Give waiting requests a slot and blocks, as long as there are any: on the device that knows most of the prompt, or has most room."""
        while waiting:
            i = waiting[0]
            known = lambda d: len(d.pool.known(layouts[i].whole)) if self.share else 0
            open_ones = [n for n, d in enumerate(self._devices) if None in d.rows]
            for n in sorted(open_ones, key=lambda n: (-known(self._devices[n]), -self._devices[n].rows.count(None))):
                slot = self._devices[n].rows.index(None)
                if taken := self._devices[n].take(i, requests[i].tokens, layouts[i], self.config, self.share):
                    self._devices[n].rows[slot], computed = taken
                    self.counts.prefilled += computed
                    self._slots.put(n * self.config.slots + slot, waiting.popleft())
                    self.counts.prompt_tokens += len(requests[i].tokens) - 1
                    break
            else:
                return

    def _prefill(self, all_of_it: bool) -> None:
        """Run the chunks that wait: full prefills only while more may come and others are being decoded, for a prefill costs the same
        however little is in it."""
        lanes, chunk = self.config.lanes, self.config.chunk
        while most := max(len(d.units) for d in self._devices):
            if most < lanes and not all_of_it and any(d.is_ready(row) for d in self._devices for row in d.rows):
                return
            tokens = np.zeros((self.engine.lanes, chunk), np.int32)
            start = np.zeros(self.engine.lanes, np.int32)
            table = np.full((self.engine.lanes, self.engine.table), self.engine.blocks, np.int32)
            for n, device in enumerate(self._devices):
                for lane in range(n * lanes, n * lanes + min(lanes, len(device.units))):
                    unit = device.next_unit(self.config.key_block)
                    tokens[lane, :len(unit.tokens)], start[lane], table[lane, :len(unit.table)] = unit.tokens, unit.start, unit.table
            self._state = self.engine.prefill(self.params, self._state, tokens, start, table)
            self.counts.prefill_room += tokens.size

    def _start(self) -> np.ndarray:
        """[slots] bool, which slots can decode; copies the begun blocks of those that are about to."""
        S = self.config.slots
        ready = np.array([d.is_ready(row) for d in self._devices for row in d.rows])
        source, target, counts = np.zeros(len(ready), np.int32), np.zeros(len(ready), np.int32), np.zeros(len(self._devices), np.int32)
        for n, device in enumerate(self._devices):
            for s, row in enumerate(device.rows):
                if ready[n * S + s] and row.copy:
                    source[n * S + counts[n]], target[n * S + counts[n]] = row.copy
                    counts[n] += 1
                    device.pool.release(row.copy[0])
                    row.copy = None
        if counts.any():
            self._state = self.engine.insert(self._state, source, target, counts)
        return ready

    def _harvest(self, chunk, requests: Sequence[Request], ready: np.ndarray, waiting: bool, on_text) -> list[tuple[int, Completion]]:
        """Take the new tokens of every slot; free those that ended."""
        drew, ended = chunk.generated - self._slots.rows.generated, []
        steps = int(drew[ready].max())
        busy, room = int(drew[ready].sum()), steps * len(ready)
        self.counts.steps, self.counts.generated = self.counts.steps + steps, self.counts.generated + busy
        if waiting:
            self.counts.busy, self.counts.room = self.counts.busy + busy, self.counts.room + room
        else:
            self.counts.tail_busy, self.counts.tail_room = self.counts.tail_busy + busy, self.counts.tail_room + room
        for slot in np.flatnonzero(ready).tolist():
            device, s = self._devices[slot // self.config.slots], slot % self.config.slots
            row, new = device.rows[s], int(drew[slot])
            known = len(row.drawn)
            row.drawn += chunk.tokens[slot, :new].tolist()
            row.log_p += chunk.log_p[slot, :new].tolist()
            self._slots.advance(slot, new, row.drawn)
            done = self._completion(requests[row.request], row, known, bool(chunk.done[slot]), bool(chunk.broken[slot]), slot)
            if on_text:
                on_text(row.request, done.text if done else settled(self.decode(row.drawn), requests[row.request].stop))
            if done:
                ended.append((row.request, done))
                device.rows[s] = None
                self._slots.rows.done[slot] = True
                for block in reversed(row.table):  # the beginning of a text is found without what follows it, so it is to stay longest
                    device.pool.release(block)
        return ended

    def _completion(self, request: Request, row: Row, known: int, done: bool, broken: bool, slot: int) -> Completion | None:
        """The completion of a row if it has ended; its first `known` tokens were looked at before and hold no stop string."""
        last_counts = not done or not broken and row.drawn[-1] not in self._slots.rows.stop_ids[slot]
        ids = row.drawn if last_counts else row.drawn[:-1]
        text, finish = None, "nan" if broken else "length" if last_counts else "eos"
        if request.stop and (found := cut(ids, min(known, len(ids)), request.stop, self.decode)):
            (ids, text), finish = found, "stop"
        elif not done:
            return None
        elif self.decode:
            text = self.decode(ids)
        return Completion(ids, text, finish, row.log_p[:len(ids)] if request.log_p else None)
