"""The folder of a run: what it holds, whether it may be continued, and stages that are done once.

    config.json command.txt versions.json log.txt metrics.jsonl held_out.jsonl
    pool/ vectors/ iterations/ checkpoints/ evaluation/ model_card.md dataset_card.md
"""
from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any, Callable

from isara_jax import config as config_lib
from isara_jax.common import UserError, atomic_write, file_hash, read_jsonl, versions, write_jsonl

FORMAT = 1  # of the whole folder; another number is refused


class Workdir:
    """Paths and identity of one run."""

    def __init__(self, root: str | Path):
        self.root = Path(os.path.abspath(root))

    @property
    def pool(self) -> Path:
        return self.root / "pool"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def evaluation(self) -> Path:
        return self.root / "evaluation"

    def iteration(self, t: int) -> Path:
        return self.root / "iterations" / f"{t:02d}"

    # ------------------------------------------------------------------------------------------------------------------------
    def stored(self) -> dict[str, Any] | None:
        """The content of config.json, or None on a fresh folder."""
        path = self.root / "config.json"
        if not path.exists():
            if self.pool.exists() or (self.root / "iterations").exists():
                raise UserError(f"{self.root} holds a pool but no config.json, so it cannot be continued. Take another --workdir.")
            return None
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            format_number = stored["format"]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path} is not a run's config.json (broken or of another program). Take another --workdir.") from None
        if format_number != FORMAT:
            raise UserError(f"{path} has format {format_number}; this version reads format {FORMAT}. Continue it with the version of "
                            f"isara_jax named in {self.root / 'versions.json'}, or take another --workdir.")
        return stored

    def open(self, config: config_lib.Config, resolved: dict[str, Any]) -> list[str]:
        """Start or continue the run: refuse a changed identity with a diff, record config, command and versions; return warnings.

        `resolved` holds what the config alone does not say: content hashes, the dtype that auto became, derived limits.
        """
        identity = json.loads(json.dumps({**config_lib.identity(config), "resolved": resolved}))
        stored, warnings = self.stored(), []
        if stored is not None and (changes := config_lib.diff(config_lib.completed(stored["identity"]), identity)):
            raise UserError(f"{self.root} was started with another config. Changed (stored -> now):\n  " + "\n  ".join(changes)
                            + "\nUndo the change, or take another --workdir. (More iterations, mesh, slots and paths may change freely.)")
        now, versions_path = versions(), self.root / "versions.json"
        if stored is not None and versions_path.exists():
            before = json.loads(versions_path.read_text(encoding="utf-8"))
            if changes := config_lib.diff(before, now):
                warnings.append("versions changed since the last start, so bytes may differ from here on: " + "; ".join(changes))
        self.root.mkdir(parents=True, exist_ok=True)
        content = {"format": FORMAT, "identity": identity, "config": config_lib.to_dict(config)}
        atomic_write(self.root / "config.json", json.dumps(content, indent=1) + "\n")
        atomic_write(versions_path, json.dumps(now, indent=1) + "\n")
        with open(self.root / "command.txt", "a", encoding="utf-8") as f:
            f.write(f"{_program()} {shlex.join(sys.argv[1:])}".rstrip() + "\n")
        return warnings


def _program() -> str:
    """How this process was started: `python -m MODULE` where it was a module."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return f"python -m {spec.name.removesuffix('.__main__')}" if spec else Path(sys.argv[0]).name


# --------------------------------------------------------------------------------------------------------------------- stages
def stage(path: Path, make: Callable[[], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The rows of a finished stage; an unfinished one is made, written whole and then marked (`questions.jsonl`, `questions.done`)."""
    marker = path.with_suffix(".done")
    if marker.exists():
        done = json.loads(marker.read_text(encoding="utf-8"))
        if not path.exists() or file_hash(path) != done["sha256"]:
            raise UserError(f"{path} is marked as finished but was changed or removed since. Restore it, or take another --workdir.")
        return read_jsonl(path)
    write_jsonl(path, make())
    rows = read_jsonl(path)  # what a restart would read is what this start goes on with
    atomic_write(marker, json.dumps({"rows": len(rows), "sha256": file_hash(path)}) + "\n")
    return rows
