"""Token rows to batches: which pairs share an optimizer step, how they are packed, which positions are supervised. Numpy only.

Pairs are packed: several stand one behind the other in a row, each a segment of its own with positions from 0, so that little of a
batch is padding. Masks come from lengths and never from token ids: any id may occur in a text.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Sequence

import numpy as np

from isara_jax.common import UserError, address

NARROWEST = 128  # positions of the narrowest row; wider rows double. Few widths are few programs to compile


@dataclass(frozen=True)
class Example:
    """One pair to train on: `tokens[:prompt_length]` is given, the rest (the answer and its end token) is supervised."""

    tokens: tuple[int, ...]
    prompt_length: int

    def __post_init__(self):
        if not 1 <= self.prompt_length < len(self.tokens):
            raise ValueError(f"prompt_length={self.prompt_length} of {len(self.tokens)} tokens: a prompt and a supervised token are needed")

    @property
    def inputs(self) -> int:
        """Positions it takes in a row: every token but the last, which is only predicted."""
        return len(self.tokens) - 1


class Batch(NamedTuple):
    """Packed rows, all [B, T]. The position that holds token t of a pair is to predict its token t + 1.

    Attributes:
        tokens: int32 inputs.
        targets: int32, the token after each input.
        loss_mask: bool, where the target is supervised.
        positions: int32, place within the pair, from 0.
        segments: int32, the number of the pair within its row from 1; 0 is padding.
    """

    tokens: np.ndarray
    targets: np.ndarray
    loss_mask: np.ndarray
    positions: np.ndarray
    segments: np.ndarray


def check(examples: Sequence[Example], context: int) -> None:
    """Raise `UserError` when there is nothing to train on or a pair is longer than `context` tokens."""
    if not examples:
        raise UserError("there are no question-answer pairs to train on or to measure; give at least one seed.")
    if long := [(i, len(e.tokens)) for i, e in enumerate(examples) if len(e.tokens) > context]:
        rows = ", ".join(f"pair {i} ({n} tokens)" for i, n in long[:10])
        raise UserError(f"{len(long)} of {len(examples)} pairs do not fit the context of {context} tokens: {rows}. Shorten or drop them, "
                        "or raise --config.model.context where the model allows more.")


# ---------------------------------------------------------------------------------------------------------------- who with whom
def epochs(examples: Sequence[Example], batch: int, n_epochs: int, seed: int) -> list[list[int]]:
    """The pairs of each optimizer step of a fine-tuning: every pair once an epoch, ceil(n / batch) steps an epoch.

    Pairs are sorted by length and dealt out, each stratum of neighbours in a random order that depends on (seed, epoch) alone. All
    steps of an epoch so have nearly the same number of pairs (at most `batch`; none is left with a handful) and of tokens, and one
    compiled shape fits them without much padding.
    """
    n = len(examples)
    n_steps = -(-n // batch)
    steps = []
    for epoch in range(n_epochs):
        rng = np.random.Generator(np.random.Philox(key=address("sft", seed, "epoch", epoch)))
        order = sorted(rng.permutation(n).tolist(), key=lambda i: -examples[i].inputs)
        dealt: list[list[int]] = [[] for _ in range(n_steps)]
        for start in range(0, n, n_steps):
            for i, step in zip(order[start:start + n_steps], rng.permutation(n_steps)):
                dealt[step].append(i)
        steps += dealt
    return steps


def in_order(n: int, batch: int) -> list[list[int]]:
    """n pairs in batches as they come, for measuring."""
    return [list(range(i, min(i + batch, n))) for i in range(0, n, batch)]


# --------------------------------------------------------------------------------------------------------------------- shapes
def layouts(examples: Sequence[Example], batches: Sequence[Sequence[int]], devices: int) -> list[tuple[int, int]]:
    """The shape (rows, width) of each batch.

    The width is the smallest power of two, `NARROWEST` or more, that holds the longest pair of the batch; batches of one width have the
    rows of the fullest of them, a multiple of `devices`.
    """
    widths = [_width(max(examples[i].inputs for i in batch)) for batch in batches]
    rows: dict[int, int] = {}
    for batch, width in zip(batches, widths, strict=True):
        needed = -(-len(pack([examples[i].inputs for i in batch], width)) // devices) * devices
        rows[width] = max(rows.get(width, 0), needed)
    return [(rows[width], width) for width in widths]


def _width(longest: int) -> int:
    return max(NARROWEST, 1 << (longest - 1).bit_length())


def pack(lengths: Sequence[int], width: int) -> list[list[int]]:
    """Indices of `lengths` in rows of at most `width`: longest first, each into the fullest row that still holds it (best fit)."""
    rows: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fits = [r for r, free in enumerate(room) if free >= lengths[i]]
        if not fits:
            rows.append([])
            room.append(width)
            fits = [len(rows) - 1]
        best = min(fits, key=lambda r: room[r])
        rows[best].append(i)
        room[best] -= lengths[i]
    return rows


def collate(examples: Sequence[Example], rows: int, width: int) -> Batch:
    """Examples packed into a `Batch` of [rows, width]. No example, or more than fit, is a `ValueError`."""
    packed = pack([e.inputs for e in examples], width)
    if not packed or len(packed) > rows or max(e.inputs for e in examples) > width:
        raise ValueError(f"examples of {[e.inputs for e in examples]} positions do not make a batch of {rows} rows of {width}")
    made = Batch(*(np.zeros((rows, width), dtype) for dtype in (np.int32, np.int32, bool, np.int32, np.int32)))
    for row, members in enumerate(packed):
        start = 0
        for segment, i in enumerate(members, 1):
            example = examples[i]
            here = (row, slice(start, start + example.inputs))
            made.tokens[here] = example.tokens[:-1]
            made.targets[here] = example.tokens[1:]
            made.positions[here] = np.arange(example.inputs)
            made.loss_mask[here] = made.positions[here] >= example.prompt_length - 1
            made.segments[here] = segment
            start += example.inputs
    return made
