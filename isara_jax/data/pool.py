"""The pool of question-answer pairs: immutable segments, one an iteration, each written once and then marked as whole.

A segment without its marker is an unfinished write and is written anew; one whose content no longer has the marker's hash is damaged.
Records hold no time stamps, so two runs of one config write the same bytes.
"""
from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Sequence

from isara_jax.common import UserError, atomic_write, content_hash, dump_line

FORMAT = 1                  # of a segment's lines and marker; raised when they change
DIGITS = 6                  # of the filters' scores
WAY_OUT = "Restore it or start with another --workdir."


@dataclass(frozen=True, kw_only=True)
class Record:
    """A pair with everything that led to it.

    `question_exemplars` and `answer_exemplars` are the ids of the pairs in its two prompts, `template` the hash of their form, `address`
    the coordinates of its random draws, `filters` maps a filter's name to {"verdict": …, "score": … or None}. Seeds leave these empty.
    """

    id: str
    question: str
    answer: str
    iteration: int
    origin: str                # seed or generated
    question_exemplars: tuple[str, ...] = ()
    answer_exemplars: tuple[str, ...] = ()
    template: str = ""
    sampling: dict[str, Any] = field(default_factory=dict)
    address: dict[str, Any] = field(default_factory=dict)
    filters: dict[str, dict[str, Any]] = field(default_factory=dict)
    author: str
    source: str
    licence: str

    def __post_init__(self):
        if self.origin not in ("seed", "generated"):
            raise ValueError(f"origin={self.origin!r} is neither seed nor generated")

    def to_row(self) -> dict[str, Any]:
        """The record as a JSON object; scores are rounded to 6 digits."""
        row = dataclasses.asdict(self)
        for verdict in row["filters"].values():
            if verdict.get("score") is not None:
                verdict["score"] = round(float(verdict["score"]), DIGITS)
        return row

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> Record:
        """The record that `to_row` wrote."""
        return cls(**row | {name: tuple(row[name]) for name in ("question_exemplars", "answer_exemplars")})


def pair_id(question: str, answer: str) -> str:
    """The id of a pair: a hash of its content, 16 hex digits."""
    return content_hash("pair", question, answer)


class Pool:
    """The segments in a folder: `000-seeds.jsonl`, `001.jsonl`, …, each with a marker `.done` beside it: rows, hash, format."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)

    def append(self, iteration: int, records: Sequence[Record]) -> None:
        """Write the segment of an iteration, which follows the last one. Writing a finished segment again needs the same content.

        Scores are rounded to 6 digits. Raises `UserError` when a finished segment holds something else, and ValueError for records of
        another iteration, ids that the pool has already, or a segment left out.
        """
        last = self.last()
        if iteration > last + 1:
            raise ValueError(f"segment {iteration} cannot follow segment {last}")
        known = {r.id for r in self.snapshot(iteration - 1)} if iteration else set()
        for record in records:
            if record.iteration != iteration or record.id in known:
                raise ValueError(f"record {record.id} of iteration {record.iteration} in segment {iteration}: another iteration, "
                                 "or an id that the pool has already")
            known.add(record.id)
        data = "".join(dump_line(r.to_row()) for r in records).encode()
        segment, marker = self._paths(iteration)
        if iteration <= last:
            if self._read(iteration) != data:
                raise UserError(f"{segment} is finished and holds other pairs than those to be written. Start with another --workdir.")
            return
        atomic_write(segment, data)
        atomic_write(marker, dump_line({"rows": len(records), "sha256": hashlib.sha256(data).hexdigest(), "format": FORMAT}))

    def snapshot(self, iteration: int) -> list[Record]:
        """All records up to and with an iteration, in order.

        Raises `UserError` for a damaged segment and ValueError for one that is not written yet.
        """
        if iteration > self.last():
            raise ValueError(f"segment {iteration} is not written yet: the last one is {self.last()}")
        return [Record.from_row(json.loads(line)) for t in range(iteration + 1) for line in self._read(t).split(b"\n")[:-1]]

    def last(self) -> int:
        """The last finished iteration, 0 for the seeds; -1 when there is none."""
        names = (path.stem.removesuffix("-seeds") for path in self.folder.glob("*.done"))
        done = {int(name) for name in names if name.isdecimal()}
        for missing in sorted(set(range(max(done, default=-1))) - done):
            raise UserError(f"{self._paths(missing)[1]} is missing, but later segments are there. {WAY_OUT}")
        return max(done, default=-1)

    def _paths(self, iteration: int) -> tuple[Path, Path]:
        name = f"{iteration:03d}{'' if iteration else '-seeds'}"
        return self.folder / f"{name}.jsonl", self.folder / f"{name}.done"

    def _read(self, iteration: int) -> bytes:
        """The bytes of a finished segment, checked against its marker."""
        segment, marker = self._paths(iteration)
        try:
            mark = json.loads(marker.read_bytes())
            version, rows, digest = mark["format"], mark["rows"], mark["sha256"]
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(f"{marker} is damaged. {WAY_OUT}") from None
        if version != FORMAT:
            raise UserError(f"{marker} has format {version}; this version of isara_jax reads format {FORMAT}. Continue with the version "
                            "that wrote it (versions.json names it), or start with another --workdir.")
        try:
            data = segment.read_bytes()
        except OSError as e:
            raise UserError(f"{segment} cannot be read: {e.strerror}. {WAY_OUT}") from None
        if hashlib.sha256(data).hexdigest() != digest:
            found = data.count(b"\n")
            raise UserError(f"{segment} was changed or damaged after it was written ({found} rows, {rows} expected, other SHA-256). "
                            f"{WAY_OUT}")
        return data
