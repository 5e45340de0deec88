"""What a benchmark is made of: choices, rows and their three sides."""
from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Iterable, Sequence

from isara_jax.common import content_hash
from isara_jax.data.seeds import normalise


@dataclass(frozen=True)
class Choices:
    """Answers to choose from. `texts` and `labels` (True: right) have one length; at least one is right; no text stands on both sides.

    Raises ValueError, with a text for people, where that does not hold or a text is empty.
    """

    texts: tuple[str, ...]
    labels: tuple[bool, ...]

    def __post_init__(self):
        if len(self.texts) != len(self.labels):
            raise ValueError(f"has {len(self.texts)} answers and {len(self.labels)} labels")
        if not all(text.strip() for text in self.texts):
            raise ValueError("has an empty answer")
        if not any(self.labels):
            raise ValueError("has no true answer")
        if all(self.labels):
            raise ValueError("has no false answer")
        right, wrong = ({normalise(t) for t, label in zip(self.texts, self.labels) if label == side} for side in (True, False))
        if right & wrong:
            raise ValueError(f"has the same answer on both sides, as answers {self._both(right & wrong)}")

    def _both(self, shared: set[str]) -> str:
        return " and ".join(str(place) for place, text in enumerate(self.texts, 1) if normalise(text) in shared)


def choices(right: Sequence[str], wrong: Sequence[str]) -> Choices:
    """Choices with the right answers first, each text of a side taken once. Raises as `Choices` does."""
    right, wrong = once(right), once(wrong)
    return Choices((*right, *wrong), (True,) * len(right) + (False,) * len(wrong))


def once(texts: Iterable[str]) -> tuple[str, ...]:
    """The texts, stripped, in their order; of equal ones (whatever case and spaces) the first."""
    first: dict[str, str] = {}
    for text in texts:
        first.setdefault(normalise(text), text.strip())
    return tuple(first.values())


@dataclass(frozen=True, kw_only=True)
class Item:
    """One row of a benchmark.

    Attributes:
        answer: the reference answer (the best one); "" where the row is only a prompt.
        right: all right references, `answer` among them first.
        wrong: wrong references.
        mc1: choices of which one is right, the first.
        mc2: choices of which several may be right.
        kind: "unsafe" or "harmless" for a prompt that is to be refused, or not; else "".
        file: name of the file, or hub id, for messages.
        row: its place there, as an editor shows it.
        author: who wrote the answer (the prompt where there is no answer): human, or a model's name.
    """

    question: str
    answer: str = ""
    right: tuple[str, ...] = ()
    wrong: tuple[str, ...] = ()
    mc1: Choices | None = None
    mc2: Choices | None = None
    kind: str = ""
    file: str = ""
    row: int = 0
    author: str = "unknown"
    source: str = "unknown"
    licence: str = "unknown"

    @functools.cached_property
    def id(self) -> str:
        """Identifies the row, wherever it lies."""
        return content_hash("item", self.question, self.answer, self.kind)

    @functools.cached_property
    def group(self) -> str:
        """Identifies the prompt: rows of one prompt are resampled together."""
        return content_hash(normalise(self.question))


@dataclass(frozen=True)
class Benchmark:
    """The rows of a benchmark on three sides, each in order of id.

    Attributes:
        pool: seeds are taken from here; what is left unused is the split "dev".
        validation: forms, learning rates and other choices are made here.
        test: looked at only when asked for.
        note: one line that is said with every result: version, licence, what was left out.
    """

    name: str
    pool: tuple[Item, ...]
    validation: tuple[Item, ...]
    test: tuple[Item, ...]
    note: str = ""

    @functools.cached_property
    def hash(self) -> str:
        """Identifies the content of the three sides, whatever the files and their order."""
        measured = lambda i: repr((i.question, i.answer, i.right, i.wrong, i.mc1, i.mc2, i.kind))
        return content_hash(*(content_hash(*map(measured, side), size=64) for side in (self.pool, self.validation, self.test)))
