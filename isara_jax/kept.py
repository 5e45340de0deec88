"""Evaluations are made once: their rows lie in the workdir, and by identity in the cache, where any other run finds them again."""
from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any, Callable, Sequence

import jaxlib

from isara_jax.common import UserError, content_hash
from isara_jax.lm import LM
from isara_jax.models.assets import cache_folder
from isara_jax.workdir import stage

FORMAT = 1  # of evaluation rows; raised when what is measured, or how, changes: older rows are then not found any more

Rows = list[dict[str, Any]]


def key(weights: str, form: str, items: str, lm: LM, what: Sequence[Any]) -> str:
    """The identity of an evaluation: hashes of weights, form and rows, the arithmetic, and `what` is measured."""
    arithmetic = [lm.dtype, lm.context, lm.engine.chunk, lm.engine.key_block, lm.tokenizer.hash]
    return content_hash(weights, form, items, json.dumps([FORMAT, jaxlib.__version__, arithmetic, what]))


def path(folder: Path, name: str, key: str) -> Path:
    """The file of the evaluation rows `name` of identity `key` in a workdir's folder."""
    return folder / f"{name}-{key[:8]}.jsonl"


def rows(path: Path, key: str, make: Callable[[], Rows], *, reuse: bool) -> Rows:
    """The evaluation rows of identity `key`: from their file `path`, else from the cache (with `reuse`), else made and written to both.

    A damaged file of the cache is made anew; at `path` it is a `UserError`, as for every finished stage.
    """
    cached = cache_folder() / "evaluations" / f"{key}.jsonl"

    def find() -> Rows:
        try:
            cached.parent.mkdir(parents=True, exist_ok=True)
        except OSError:  # a cache that cannot be written only costs time
            return make()
        done = cached.with_suffix(".done")
        with contextlib.suppress(UserError):  # damaged
            if done.exists():
                return stage(cached, list)
        done.unlink(missing_ok=True)
        return stage(cached, make)

    return stage(path, find if reuse else make)
