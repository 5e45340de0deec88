"""metrics.jsonl: one row for every cost, iteration and stop, flushed as written; TensorBoard as well where tensorboardX is installed."""
from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

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
        """One row: its kind ("cost", "step", "iteration", "stop"), the iteration, and numbers or short texts."""
        self._file.write(dump_line({"kind": kind, **fields}))
        self._file.flush()
        if self._board is not None:
            at = fields.get("step", fields.get("iteration", 0))
            for name, value in fields.items():
                if isinstance(value, (int, float)) and not isinstance(value, bool) and name not in ("step", "iteration"):
                    self._board.add_scalar("/".join(str(p) for p in (kind, fields.get("stage"), name) if p), value, at)

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


def _cut_torn_line(path: Path) -> None:
    """Remove what stands after the last whole line."""
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
