"""Token rows to batches: which rows share a batch, how wide it is, which positions are supervised. Numpy only.

Masks come from lengths and never from token ids: the padding id is whatever it is and may occur in a text.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Iterator, NamedTuple, Sequence

import numpy as np

from isara_jax.common import UserError, address

WINDOW = 4  # batches among which an epoch sorts its rows by length, so that neighbours pad each other little and the order stays random


@dataclass(frozen=True)
class Example:
    """One row to train on: `tokens[:prompt_length]` is given, the rest (the answer and its end token) is supervised."""

    tokens: tuple[int, ...]
    prompt_length: int

    def __post_init__(self):
        if not 1 <= self.prompt_length < len(self.tokens):
            raise ValueError(f"prompt_length={self.prompt_length} of {len(self.tokens)} tokens: a prompt and a supervised token are needed")


class Batch(NamedTuple):
    """Right-padded rows; B rows, T positions. Position t holds token t and is to predict token t + 1.

    Attributes:
        tokens: [B, T] int32 inputs.
        targets: [B, T] int32, the token after each input.
        loss_mask: [B, T] bool, where the target is supervised.
        lengths: [B] int32 inputs of each row; 0 marks a row that only fills the batch.
    """

    tokens: np.ndarray
    targets: np.ndarray
    loss_mask: np.ndarray
    lengths: np.ndarray


def check(examples: Sequence[Example], context: int) -> None:
    """Raise `UserError` when there is nothing to train on or a row is longer than `context` tokens."""
    if not examples:
        raise UserError("there are no question-answer pairs to train on; give at least one seed.")
    long = [(i, len(e.tokens)) for i, e in enumerate(examples) if len(e.tokens) > context]
    if long:
        rows = ", ".join(f"pair {i} ({n} tokens)" for i, n in long[:10])
        raise UserError(f"{len(long)} of {len(examples)} training pairs do not fit the context of {context} tokens: {rows}. Shorten or drop "
                        "them, or raise --config.model.context if the model allows more.")


def steps_in_epoch(n: int, batch: int) -> int:
    """Batches of an epoch over n rows; the last one may be partial."""
    return -(-n // batch)


def epoch(lengths: Sequence[int], batch: int, seed: int, number: int) -> list[list[int]]:
    """The rows of each batch of one epoch: every row once, in an order that depends on (seed, number, the lengths) alone.

    A random permutation is cut into windows of `WINDOW` batches, the rows of a window are sorted by length, and its batches are
    shuffled. Only the last batch of an epoch is partial.

    Args:
        lengths: tokens of each row.
        batch: rows in a batch.
        seed: of the run.
        number: of the epoch, from 0.
    """
    rng = np.random.Generator(np.random.Philox(key=address("sft", seed, "epoch", number)))
    order = rng.permutation(len(lengths))
    batches: list[list[int]] = []
    for start in range(0, len(order), WINDOW * batch):
        window = sorted(order[start:start + WINDOW * batch].tolist(), key=lambda i: lengths[i])
        made = [window[i:i + batch] for i in range(0, len(window), batch)]
        whole = [b for b in made if len(b) == batch]
        batches += [whole[i] for i in rng.permutation(len(whole))] + made[len(whole):]
    return batches


def epochs(examples: Sequence[Example], batch: int, n_epochs: int, seed: int) -> Iterator[list[int]]:
    """The rows of each optimizer step of a whole fine-tuning, epoch after epoch."""
    lengths = [len(e.tokens) for e in examples]
    for number in range(n_epochs):
        yield from epoch(lengths, batch, seed, number)


def in_order(examples: Sequence[Example], batch: int) -> list[list[int]]:
    """Rows sorted by length and cut into batches, for measuring."""
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].tokens))
    return [order[i:i + batch] for i in range(0, len(order), batch)]


def width(longest: int) -> int:
    """The padded width of a batch: the smallest step of 32, 64, … 256, 320, … 1024, 1280, … that holds `longest`.

    Few widths are few programs to compile; a step is at most a quarter of the width from 128 on.
    """
    step = 32 if longest <= 256 else 64 if longest <= 1024 else 256
    return -(-longest // step) * step


def collate(examples: Sequence[Example], rows: int) -> Batch:
    """Examples, and empty rows up to `rows`, as one `Batch`. A batch without an example is a `ValueError`."""
    if not 1 <= len(examples) <= rows:
        raise ValueError(f"a batch of {rows} rows needs 1 to {rows} examples, not {len(examples)}")
    lengths = np.array([len(e.tokens) - 1 for e in examples] + [0] * (rows - len(examples)), np.int32)
    prompts = np.array([e.prompt_length for e in examples] + [1] * (rows - len(examples)), np.int32)
    wide = width(int(lengths.max()))
    tokens = np.zeros((rows, wide + 1), np.int32)
    for row, example in zip(tokens, examples):
        row[:len(example.tokens)] = example.tokens
    at = np.arange(wide)
    mask = (at >= prompts[:, None] - 1) & (at < lengths[:, None])
    return Batch(tokens[:, :-1], tokens[:, 1:], mask, lengths)
