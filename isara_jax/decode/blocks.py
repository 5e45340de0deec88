"""Which blocks of the pool hold which text: shared by the texts that begin alike, kept for later ones while there is room.

A block is named by the whole text up to its end, so equal names mean equal keys and values. Only prompts are named: what was drawn has been
computed by another program, whose rounding differs.
"""
from __future__ import annotations

import hashlib
from collections import Counter, OrderedDict
from dataclasses import dataclass
from typing import Iterable, Sequence

import numpy as np

Name = bytes


@dataclass(frozen=True)
class Layout:
    """The blocks of a request.

    Attributes:
        whole: names of the blocks that its prompt (but for the last token) fills.
        rest: name of the block that the prompt begins to fill; None where it ends with a whole one.
        own: blocks that it needs besides `whole`.
    """

    whole: tuple[Name, ...]
    rest: Name | None
    own: int


def layout(tokens: Sequence[int], limit: int, width: int) -> Layout:
    """The layout of a prompt that is continued by up to `limit` tokens, in blocks of `width`."""
    prefilled = len(tokens) - 1
    values = np.asarray(tokens[:prefilled], np.int32)
    names, text = [], hashlib.blake2b(digest_size=16)
    for start in range(0, prefilled, width):
        text.update(values[start:start + width].tobytes())
        names.append(text.digest())
    whole = prefilled // width
    return Layout(tuple(names[:whole]), names[whole] if prefilled % width else None, -(-(prefilled + limit) // width) - whole)


def most_in_use(layouts: Iterable[Layout], slots: int) -> int:
    """Most blocks that so many neighbours of a queue need together."""
    held: Counter[Name] = Counter()
    window: list[Layout] = []
    own = most = 0
    for i, new in enumerate(layouts):
        if i >= slots:
            old = window[i % slots]
            own -= old.own
            held.subtract(old.whole)
            for name in old.whole:
                if not held[name]:
                    del held[name]
            window[i % slots] = new
        else:
            window.append(new)
        own += new.own
        held.update(new.whole)
        most = max(most, own + len(held))
    return most


class Pool:
    """The blocks of one device: free, in use by so many texts, or idle, which is named, not in use, and taken when no free one is left."""

    def __init__(self, blocks: int):
        self._free = list(range(blocks - 1, -1, -1))
        self._users = [0] * blocks
        self._idle: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._block: dict[Name, int] = {}
        self._name: dict[int, Name] = {}

    def find(self, name: Name) -> int | None:
        """The block of that name."""
        return self._block.get(name)

    def known(self, names: Sequence[Name]) -> list[int]:
        """The blocks of the leading names that there are."""
        found = []
        for name in names:
            if name not in self._block:
                break
            found.append(self._block[name])
        return found

    def use(self, block: int) -> None:
        """One user more."""
        self._users[block] += 1
        self._idle.pop(block, None)

    def take(self, n: int) -> list[int] | None:
        """n blocks without a name, in use by the caller; None where there are not so many."""
        if n > len(self._free) + len(self._idle):
            return None
        while len(self._free) < n:
            block, _ = self._idle.popitem(last=False)
            del self._block[self._name.pop(block)]
            self._free.append(block)
        taken = [self._free.pop() for _ in range(n)]
        for block in taken:
            self._users[block] = 1
        return taken

    def name(self, block: int, name: Name) -> None:
        """Let others find a block in use; no effect where there is one of that name."""
        if name not in self._block:
            self._block[name], self._name[block] = block, name

    def release(self, block: int) -> None:
        """One user less."""
        self._users[block] -= 1
        if not self._users[block]:
            if block in self._name:
                self._idle[block] = None
            else:
                self._free.append(block)


# ------------------------------------------------------------------------------------------------------------------------- groups
def group(tables: Sequence[Sequence[int]], most: int) -> list[tuple[int, list[int]]]:
    """(number of common leading blocks, members) of rows that share blocks, up to `most` to a group; rows that share none are left out.

    Rows in the order of their tables are joined while that saves more walks over blocks: m rows with c common blocks save (m - 1) * c.
    """
    order = sorted((i for i in range(len(tables)) if tables[i]), key=lambda i: tuple(tables[i]))
    groups: list[tuple[int, list[int]]] = []
    at = 0
    while at < len(order):
        members, common, best = [order[at]], len(tables[order[at]]), (0, 0, 1)  # (saved, common, members)
        for i in order[at + 1:at + most]:
            common = min(common, _common(tables[members[-1]], tables[i]))
            if not common:
                break
            members.append(i)
            best = max(best, ((len(members) - 1) * common, common, len(members)))
        saved, common, size = best
        if saved:
            groups.append((common, members[:size]))
        at += size
    return groups


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
