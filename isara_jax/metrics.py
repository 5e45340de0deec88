"""metrics.jsonl: one row for every cost, iteration and stop, flushed as written; TensorBoard as well where tensorboardX is installed."""
from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any, Iterator

from isara_jax.common import dump_line


class MetricsWriter:
    """Appends rows to `workdir/metrics.jsonl`. A line torn by a kill is cut off when the file is opened again."""

    def __init__(self, workdir: str | Path):
        path = Path(workdir) / "metrics.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        _cut_torn_line(path)
        self._file = open(path, "a", encoding="utf-8")
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            self._board = None
        else:
            self._board = SummaryWriter(str(Path(workdir) / "tensorboard"))

    def write(self, kind: str, **fields: Any) -> None:
        """One row: its kind ("cost", "step", "iteration", "stop"), the iteration, and numbers, short texts or mappings of them.

        Numbers that are not finite have no form in JSON and are written as the texts "nan", "inf" and "-inf".
        """
        self._file.write(dump_line({"kind": kind, **_finite(fields)}))
        self._file.flush()
        if self._board is not None:
            at = fields.get("step", fields.get("iteration", 0))
            stage = (kind, fields["stage"]) if "stage" in fields else (kind,)
            for path, value in _numbers({k: v for k, v in fields.items() if k not in ("step", "iteration")}, stage):
                self._board.add_scalar(path, value, at)

    def close(self) -> None:
        """Flush to disk."""
        os.fsync(self._file.fileno())
        self._file.close()
        if self._board is not None:
            self._board.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _numbers(fields: dict[str, Any], path: tuple[str, ...]) -> Iterator[tuple[str, float]]:
    """Every number in a nested mapping with its path, as TensorBoard names scalars: ("cost/questions/seconds", 1.5)."""
    for name, value in fields.items():
        if isinstance(value, dict):
            yield from _numbers(value, (*path, name))
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield "/".join((*path, name)), value


def _cut_torn_line(path: Path) -> None:
    """Remove what stands after the last whole line, and that line too where it is no JSON."""
    if not path.exists():
        return
    data = path.read_bytes()
    whole = data[:data.rfind(b"\n") + 1]
    last = whole[:-1].rsplit(b"\n", 1)[-1]
    try:
        json.loads(last or b"{}")
    except ValueError:
        whole = whole[:len(whole) - len(last) - 1]
    if whole != data:
        os.truncate(path, len(whole))
