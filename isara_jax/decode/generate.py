"""Requests in, completions out, in the same order: the host's side of sampling.

Requests of like size share an engine; free slots are refilled while others go on, so that a long answer holds up nobody.
"""
from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Callable, Iterable, Iterator, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from isara_jax.common import UserError
from isara_jax.decode.engine import Engine, EngineConfig, Rows
from isara_jax.decode.sampling import request_keys
from isara_jax.models.config import ModelConfig
from isara_jax.models.decoder import Params
from isara_jax.sharding import row_devices

SPREAD = 4        # requests share an engine when the largest needs at most so many times the room of the smallest
STOP_IDS = 8      # stop ids are padded to a multiple of this, so that models with other numbers of them share programs


@dataclass(frozen=True)
class Request:
    """A prompt to be continued.

    Attributes:
        tokens: the prompt; at least one token.
        address: 64-bit address of its random numbers (`isara_jax.common.address`).
        max_new_tokens: most tokens to draw; fewer where the context ends.
        temperature: 0 is greedy.
        top_p: nucleus, applied after the temperature; 1 keeps everything.
        stop: strings that end the text and are not part of it.
        ignore_eos: draw on after an end-of-text token, as if it were any other.
    """

    tokens: tuple[int, ...]
    address: int
    max_new_tokens: int
    temperature: float
    top_p: float
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False


@dataclass(frozen=True)
class Completion:
    """What a request became.

    Attributes:
        ids: the tokens drawn, without the end-of-text token and without those that only spell a stop string.
        text: `ids` as text, up to the stop string; None when no decoder was given.
        finish: "stop" (a stop string), "eos" (a stop id) or "length" (max_new_tokens or the context).
    """

    ids: list[int]
    text: str | None
    finish: str


def generate(params: Params, cfg: ModelConfig, config: EngineConfig, mesh: Mesh, requests: Sequence[Request], *, seed: int,
             stop_ids: Iterable[int], context: int, decode: Callable[[Sequence[int]], str] | None = None,
             on_progress: Callable[[int, int, int, int], None] | None = None,
             on_text: Callable[[int, str], None] | None = None) -> list[Completion]:
    """Sample a completion for every request, in the order of the requests.

    A completion depends on (params, config, seed, request) and on nothing else: not on the other requests, nor their order.

    Args:
        params: as `engine.prepare` returns them.
        seed: the run's seed, 0 to 2**63 - 1.
        stop_ids: token ids that end a text.
        context: longest sequence in tokens, prompt and new ones together.
        decode: token ids to text; needed where a request has stop strings.
        on_progress: called now and then with (requests done, requests, tokens prefilled, tokens generated), all so far.
        on_text: called now and then with (request number, the beginning of its text that later tokens do not change), at last with its
            whole text. Needs `decode`. Whatever either function raises ends the work.

    Raises:
        UserError: a prompt is empty, holds an id outside the vocabulary or leaves no room in the context; said before any work.
    """
    _check(requests, cfg, context, decode)
    if on_text and decode is None:
        raise ValueError("on_text is to be called, but no decode function was given")
    limits = [min(r.max_new_tokens, context - len(r.tokens)) for r in requests]
    completions: list[Completion | None] = [None] * len(requests)
    for i, limit in enumerate(limits):
        if not limit:
            completions[i] = Completion([], "" if decode else None, "length")
    progress = _Progress(on_progress, len(requests), done=sum(c is not None for c in completions))
    keys = request_keys(seed, np.array([r.address for r in requests], np.uint64))
    stops = np.array(sorted(stop_ids) or [-1], np.int32)
    stops = np.pad(stops, (0, -len(stops) % STOP_IDS), constant_values=-1)
    for capacity, group in _groups([len(r.tokens) + limit if limit else 0 for r, limit in zip(requests, limits)], config.key_block):
        run = _Run(params, Engine(cfg, config, mesh, capacity), requests, limits, keys, stops, decode, progress, on_text)
        for i, completion in run.run(group):
            completions[i] = completion
    return completions


def capacities(key_block: int) -> Iterator[int]:
    """The ladder of capacities: 1, 2, 3, 4, 6, 8, 12, 16, … key blocks. Few rungs, so that few programs are compiled."""
    yield key_block
    for doublings in itertools.count():
        yield from (2 * key_block << doublings, 3 * key_block << doublings)


def _groups(needs: Sequence[int], key_block: int) -> list[tuple[int, list[int]]]:
    """(capacity, request numbers) with the largest first; within a group too, so that neighbours prefill together. Need 0 is left out."""
    order = sorted((i for i, need in enumerate(needs) if need), key=lambda i: (-needs[i], i))
    groups: list[tuple[int, list[int]]] = []
    for i in order:
        if not groups or needs[i] * SPREAD < groups[-1][0]:
            groups.append((next(c for c in capacities(key_block) if c >= needs[i]), []))
        groups[-1][1].append(i)
    return groups


def _check(requests: Sequence[Request], cfg: ModelConfig, context: int, decode: Callable | None) -> None:
    for i, r in enumerate(requests):
        if not r.tokens:
            raise UserError(f"request {i}: the prompt is empty; a model needs at least one token to continue.")
        if len(r.tokens) + bool(r.max_new_tokens) > context:
            raise UserError(f"request {i}: a prompt of {len(r.tokens)} tokens leaves no room in a context of {context}; shorten it.")
        if min(r.tokens) < 0 or max(r.tokens) >= cfg.vocab_size:
            bad = min(r.tokens) if min(r.tokens) < 0 else max(r.tokens)
            raise UserError(f"request {i}: token id {bad} is not in the vocabulary, whose ids go from 0 to {cfg.vocab_size - 1}.")
        if r.max_new_tokens < 0 or not r.temperature >= 0 or not 0 < r.top_p <= 1 or not all(r.stop):
            raise UserError(f"request {i}: max_new_tokens={r.max_new_tokens}, temperature={r.temperature}, top_p={r.top_p}, stop={r.stop}: "
                            "the first two are at least 0, top_p is in (0, 1], and stop strings are not empty.")
        if r.stop and decode is None:
            raise ValueError(f"request {i} has stop strings {r.stop} but no decode function was given")


# ---------------------------------------------------------------------------------------------------------------------------------
@dataclass
class _Progress:
    """Counts what has been done and tells whoever wants to know."""

    tell: Callable[[int, int, int, int], None] | None
    total: int
    done: int = 0
    prefilled: int = 0
    generated: int = 0

    def add(self, *, done: int = 0, prefilled: int = 0, generated: int = 0) -> None:
        self.done, self.prefilled, self.generated = self.done + done, self.prefilled + prefilled, self.generated + generated
        if self.tell:
            self.tell(self.done, self.total, self.prefilled, self.generated)


@dataclass
class _Run:
    """The requests of one capacity on their way through the slots."""

    params: Params
    engine: Engine
    requests: Sequence[Request]
    limits: Sequence[int]
    keys: np.ndarray
    stop_ids: np.ndarray
    decode: Callable[[Sequence[int]], str] | None
    progress: _Progress
    on_text: Callable[[int, str], None] | None
    holder: list[int | None] = field(init=False)   # of each slot, the request in it
    drawn: dict[int, list[int]] = field(default_factory=dict)

    def __post_init__(self):
        self.holder = [None] * self.engine.slots

    def run(self, waiting: list[int]) -> Iterator[tuple[int, Completion]]:
        """(request number, completion) in the order in which they end."""
        state, prefix, waiting = self.engine.empty_state(), None, list(waiting)
        while waiting or any(h is not None for h in self.holder):
            while (placed := self._place(waiting)):
                prefix = self.engine.prefill(self.params, self._tokens(placed), prefix)
                state = self.engine.insert(state, prefix, *self._rows(placed))
                self.progress.add(prefilled=sum(len(self.requests[i].tokens) for device in placed for i, _ in device))
            before = {i: len(self.drawn[i]) for i in self.holder if i is not None}
            free = np.array([h is None for h in self.holder])
            state, tokens = self.engine.decode(self.params, state, free, self.stop_ids)
            ended = self._harvest(*jax.device_get((tokens, state.rows.generated, state.rows.done)))
            self.progress.add(done=len(ended), generated=sum(len(self.drawn[i]) - n for i, n in before.items()))
            yield from ended

    def _place(self, waiting: list[int]) -> list[list[tuple[int, int]]]:
        """Take requests off `waiting` for the next prefill: for each device, (request, slot within the device). Empty when none is due.

        A prefill costs the same however few prompts it holds, so it waits for enough free slots to fill it, or for all to be free.
        """
        S, P, devices = self.engine.config.slots, self.engine.config.prompts, row_devices(self.engine.mesh)
        free = [[s for s in range(S) if self.holder[d * S + s] is None] for d in range(devices)]
        room = sum(min(len(f), P) for f in free)
        if not waiting or room < min(len(waiting), P * devices, S * devices):
            return []
        placed: list[list[tuple[int, int]]] = [[] for _ in range(devices)]
        while waiting and any(len(placed[d]) < min(len(free[d]), P) for d in range(devices)):
            d = min((d for d in range(devices) if len(placed[d]) < min(len(free[d]), P)), key=lambda d: len(placed[d]))
            request, slot = waiting.pop(0), free[d][len(placed[d])]
            placed[d].append((request, slot))
            self.holder[d * S + slot], self.drawn[request] = request, []
        return placed

    def _tokens(self, placed: list[list[tuple[int, int]]]) -> np.ndarray:
        """The prompts but for their last tokens, padded to whole chunks of the longest."""
        chunk, P = self.engine.config.chunk, self.engine.config.prompts
        longest = max(len(self.requests[i].tokens) - 1 for device in placed for i, _ in device)
        tokens = np.zeros((self.engine.prompts, max(1, -(-longest // chunk)) * chunk), np.int32)
        for d, device in enumerate(placed):
            for p, (i, _) in enumerate(device):
                tokens[d * P + p, :len(self.requests[i].tokens) - 1] = self.requests[i].tokens[:-1]
        return tokens

    def _rows(self, placed: list[list[tuple[int, int]]]) -> tuple[Rows, np.ndarray, np.ndarray]:
        """The rows, slots and counts that `Engine.insert` takes."""
        n, P = self.engine.prompts, self.engine.config.prompts
        number = lambda: np.zeros(n, np.int32)
        rows = Rows(number(), number(), number(), number(), np.zeros((n, 2), np.uint32), np.zeros(n, np.float32), np.ones(n, np.float32),
                    np.zeros(n, bool), np.zeros(n, bool))
        slots = number()
        for d, device in enumerate(placed):
            for p, (i, slot) in enumerate(device, d * P):
                r = self.requests[i]
                values = Rows(len(r.tokens) - 1, r.tokens[-1], 0, self.limits[i], self.keys[i], r.temperature, r.top_p, r.ignore_eos, False)
                for into, value in zip(rows, values):
                    into[p] = value
                slots[p] = slot
        return rows, slots, np.array([len(device) for device in placed], np.int32)

    def _harvest(self, tokens: np.ndarray, generated: np.ndarray, done: np.ndarray) -> list[tuple[int, Completion]]:
        """Take the new tokens of every slot; free those that ended."""
        ended = []
        for slot, i in enumerate(self.holder):
            if i is None:
                continue
            known = len(self.drawn[i])
            self.drawn[i] += tokens[slot, :generated[slot] - known].tolist()
            completion = self._completion(i, known, bool(done[slot]))
            if self.on_text:
                self.on_text(i, completion.text if completion else settled(self.decode(self.drawn[i]), self.requests[i].stop))
            if completion:
                ended.append((i, completion))
                self.holder[slot] = None
        return ended

    def _completion(self, i: int, known: int, done: bool) -> Completion | None:
        """The completion of request i if it has ended; its first `known` tokens were looked at before and hold no stop string."""
        request, ids = self.requests[i], self.drawn[i]
        eos = done and not request.ignore_eos and ids[-1] in self.stop_ids
        ids = ids[:-1] if eos else ids
        if request.stop and (found := _cut(ids, known, request.stop, self.decode)):
            return Completion(*found, "stop")
        if not done:
            return None
        return Completion(ids, self.decode(ids) if self.decode else None, "eos" if eos else "length")


def settled(text: str, stop: Sequence[str]) -> str:
    """The beginning of an unfinished text that stays as it is: without an unfinished character, and what may become a stop string."""
    text = text.rstrip("\ufffd")
    held = max((n for s in stop for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
    return text[:len(text) - held]


def _cut(ids: list[int], known: int, stop: tuple[str, ...], decode: Callable[[Sequence[int]], str]) -> tuple[list[int], str] | None:
    """(ids, text) before the first stop string, or None where there is none: as if it had been looked for after every token."""
    if not any(s in decode(ids) for s in stop):
        return None
    text = next(t for n in range(known, len(ids) + 1) if any(s in (t := decode(ids[:n])) for s in stop))
    text = text[:min(text.find(s) for s in stop if s in text)]
    return next(ids[:n] for n in range(len(ids) + 1) if decode(ids[:n]).startswith(text)), text
