"""Benchmarks by name: opened from local files or the hub, checked, and split.

    truthfulqa      TruthfulQA                       its own rows on all sides
    beavertails     BeaverTails-30k and XSTest       the test file is the test side
    self_instruct   Self-Instruct's seed tasks       AlpacaEval and IFEval are the test side
    alpaca          Alpaca                           AlpacaEval and IFEval are the test side
    misconceptions  ours, in configs/data            no test side
    FILE            .jsonl, .json or .csv            no test side
"""
from __future__ import annotations

import difflib
from pathlib import Path

from isara_jax.common import UserError
from isara_jax.data import readers, seeds, splits
from isara_jax.data.items import Benchmark, Choices, Item, choices
from isara_jax.data.sources import SOURCES, open_tables
from isara_jax.data.tables import read_table

__all__ = ["NAMES", "SEED_SOURCES", "Benchmark", "Choices", "Item", "choices", "open_benchmark"]

SEED_SOURCES = tuple(SOURCES)            # benchmarks whose pool gives seeds
NAMES = (*SEED_SOURCES, "misconceptions")
# Shares of the components to validate and to test on. TruthfulQA: 99 and 399 of the 817 questions of v1, and a pool of 319. Of
# BeaverTails the test share concerns XSTest alone.
_SHARES = {"truthfulqa": (0.12, 0.47), "beavertails": (0.2, 0.4), "self_instruct": (0.12, 0.0), "alpaca": (0.1, 0.0)}
_OTHERWISE = (0.2, 0.0)


def open_benchmark(name: str, path: str = "") -> Benchmark:
    """The benchmark `name`, or the file of that name, on three sides.

    Args:
        path: config.data.path: a folder or file with the local files of a named benchmark; "" takes them from the hub.

    Raises one `UserError` for an unknown name, files that are missing (with what to download), missing columns, broken rows (with file
    and row), and where too little is left to judge on.
    """
    rows = _rows(name, path)
    pool, validation, test = splits.split(rows.items, *_SHARES.get(name, _OTHERWISE), training=rows.training, fixed_test=rows.fixed_test)
    if not pool or not validation:
        raise UserError(f"{name}: the evaluation set is empty: {len(pool)} rows are left to compare models on and {len(validation)} to "
                        "make choices on, near-duplicates being kept together and rows near a test row left out. Give a larger file.")
    return Benchmark(name, pool, validation, test, rows.note)


def _rows(name: str, path: str) -> readers.Rows:
    if name in SOURCES:
        return getattr(readers, name)(open_tables(name, path))
    if name == "misconceptions":
        return readers.plain(read_table(seeds.own_data() / "misconceptions_test.jsonl"), "misconceptions (ours)")
    file = Path(name).expanduser()
    if not file.suffix:
        near = difflib.get_close_matches(name, NAMES, 1)
        raise UserError(f"{name!r} is no benchmark.{f' Did you mean {near[0]!r}?' if near else ''} There are {', '.join(NAMES)}; a file of "
                        "yours ends in .jsonl, .json or .csv.")
    beside = Path(path).expanduser() / file
    return readers.plain(read_table(beside if path and not file.exists() and beside.exists() else file))
