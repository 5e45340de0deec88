"""What a run starts from and what it is judged on: seeds and evaluation rows, kept apart before anything else happens.

    pool of the benchmark ─┬─ seeds                      (config.data.seeds names the benchmark)
                           └─ dev: rows for tables and verdicts
    validation             choices are made on these: the base model's form, learning rates; answers are probed on them
    test                   only where --config.eval.split=test asks for it

With pairs of one's own and no benchmark the rows are those of config.data.test, or a part of the pairs (test_share, or one of the folds); choices
are then made on the seeds that are held out for the loss, and the starting model's form, which has seen none of them, on all seeds.

Whatever is near a row that may ever be evaluated leaves the training side (ROUGE-L F > 0.6, data/splits.py).
"""
from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Sequence

from isara_jax import config as config_lib
from isara_jax.common import UserError, content_hash
from isara_jax.config import Config
from isara_jax.data import benchmarks, seeds, splits
from isara_jax.data.items import Item
from isara_jax.evals.quantities import QUANTITIES, Quantity

SEEDS = 64  # taken from a benchmark's pool where config.data.limit does not say; the paper's number (reviews of arXiv 2401.06785)


@dataclass(frozen=True)
class EvalSet:
    """Rows and the quantity that gets the verdict, chosen before the run.

    Attributes:
        rows: what tables and verdicts are made of, of the split asked for.
        validation: what choices are made on.
        unseen: rows that the starting model was not trained on, for the choice of its form: those of `validation`, or of all own seeds.
        guarded: every row that may be evaluated now or later: nothing that is trained on may be near one.
        left_out: seeds that were near a guarded row and left the training side.
    """

    name: str
    note: str
    split: str
    rows: tuple[Item, ...]
    validation: tuple[Item, ...]
    unseen: tuple[Item, ...]
    guarded: tuple[Item, ...]
    primary: Quantity
    left_out: int = 0

    @functools.cached_property
    def leaks(self) -> splits.LeakIndex:
        """Finds the guarded row that a question is near."""
        return splits.LeakIndex(self.guarded)

    @functools.cached_property
    def guard_hash(self) -> str:
        """Identifies what generated pairs are checked against, whatever the order of the files."""
        return content_hash(*sorted({seeds.normalise(i.question) for i in self.guarded}))

    @functools.cached_property
    def validation_hash(self) -> str:
        """Identifies the rows on which learning rates are chosen."""
        return rows_hash(self.validation)


def rows_hash(items: Sequence[Item]) -> str:
    """Identifies rows with all that is measured on them, in their order."""
    return content_hash(*(repr((i.question, i.answer, i.right, i.wrong, i.mc1, i.mc2, i.kind)) for i in items))


def load_data(config: Config, pairs: seeds.SeedSet | None = None, fold: int = 0) -> tuple[seeds.SeedSet, EvalSet | None]:
    """The seeds (or `pairs`, given in Python, as seeds) and what the run is judged on; None where nothing says what.

    Args:
        fold: with config.data.folds the part of the pairs that is judged on, from 1; the others are the seeds.

    Raises `UserError` for files that cannot be read, for a seed equal to an evaluation row (naming both) and for an empty evaluation set.
    """
    data, name = config.data, config.eval.benchmark
    benchmark = benchmarks.open_benchmark(name, data.path) if name else None
    if pairs is None and data.seeds in benchmarks.SEED_SOURCES:
        source = benchmark if data.seeds == name else benchmarks.open_benchmark(data.seeds, data.path)
        chosen, dev = splits.seeds_and_dev(source, data.limit or SEEDS)
        pairs = splits.seed_set(source, chosen)
        dev = dev if data.seeds == name else None
    else:
        pairs, dev = seeds.load_seeds(data) if pairs is None else pairs, None
    if benchmark is None:
        pairs, chosen = _own(config, pairs, fold)
        if config.sft.rates and not (chosen and chosen.validation):
            raise UserError("config.sft.rates are tried on validation rows, and there are none. Name a benchmark or a file in "
                            "config.eval.benchmark, hold out more seeds (config.data.holdout), or set config.sft.lr alone.")
        return pairs, chosen
    dev = benchmark.pool if dev is None else dev
    guarded = (*dev, *benchmark.validation, *benchmark.test)
    kept, left_out = splits.without_leaks(pairs, guarded)
    return kept, _eval_set(config.eval, benchmark, dev, guarded, left_out)


def _own(config: Config, pairs: seeds.SeedSet, fold: int) -> tuple[seeds.SeedSet, EvalSet | None]:
    """Pairs of one's own: the seeds, and the rows that a file, a share of the pairs or a fold of them gives; None without any."""
    data, left_out = config.data, 0
    if data.test:
        named = seeds.load_seeds(dataclasses.replace(data, seeds=data.test, limit=0))
        judged, name = named.pairs, Path(data.test).name
        pairs, left_out = splits.without_leaks(pairs, items_of(named.path, judged))
    elif fold:
        judged, name = splits.folds(pairs.pairs, data.folds)[fold - 1], f"fold {fold} of {data.folds} of {Path(pairs.path).name}"
        pairs = splits.without(pairs, judged)
    else:
        rest, judged = seeds.split_holdout(pairs.pairs, data.test_share, purpose="judged")
        pairs, name = splits.without(pairs, judged), f"a held-out part of {Path(pairs.path).name}"
    if not judged:
        return pairs, None
    items, (_, held_out) = items_of(data.test or pairs.path, judged), seeds.split_holdout(pairs.pairs, data.holdout)
    if len(items) < 2:
        raise UserError(f"{name} has one pair, and at least 2 are needed to judge on. Add pairs, or set --config.data.test= and "
                        "--config.data.test_share=0 to train without a verdict.")
    rows = splits.choose(items, config.eval.rows)
    if config.eval.split != "dev":
        raise UserError("config.eval.split=test asks for a benchmark's test rows; pairs of your own have none. Leave it at dev.")
    licences = ", ".join(sorted({i.licence for i in items}))
    return pairs, EvalSet(name, f"{len(items)} pairs, licence: {licences}", "dev", rows, items_of(pairs.path, held_out),
                          items_of(pairs.path, pairs.pairs), items, _primary(config.eval, rows), left_out)


def items_of(file: str, pairs: Sequence[seeds.Seed]) -> tuple[Item, ...]:
    """Pairs as evaluation rows with one right answer, in order of id."""
    made = [Item(question=s.question, answer=s.answer, right=(s.answer,), file=file, row=s.row, author=s.author, source=s.source,
                 licence=s.licence) for s in pairs]
    return tuple(sorted(made, key=lambda i: (i.id, i.row)))


def _eval_set(settings: config_lib.Eval, benchmark: benchmarks.Benchmark, dev: Sequence[Item], guarded: Sequence[Item],
              left_out: int) -> EvalSet:
    side = dev if settings.split == "dev" else benchmark.test
    rows = splits.choose(side, settings.rows)
    if len(rows) < 2:
        raise UserError(f"{benchmark.name} has {len(rows)} row(s) in its {settings.split} split, and at least 2 are needed to judge on. "
                        + ("Leave more of the pool unused (config.data.limit), or take a larger file." if settings.split == "dev" else
                           "Take --config.eval.split=dev, or get the benchmark's test file."))
    validation = splits.choose(benchmark.validation, settings.validation_rows)
    return EvalSet(benchmark.name, benchmark.note, settings.split, rows, validation, validation, tuple(guarded), _primary(settings, rows),
                   left_out)


def _primary(settings: config_lib.Eval, rows: Sequence[Item]) -> Quantity:
    """The quantity named by the config, or the one that such rows call for. Raises `UserError` where the rows cannot give it."""
    choices, answers, kinds = any(i.mc2 for i in rows), any(i.right for i in rows), {i.kind for i in rows}
    name = settings.primary or ("mc2_cond" if choices else "rougeL")
    if name not in QUANTITIES or not QUANTITIES[name].better:
        judged = ", ".join(n for n, q in QUANTITIES.items() if q.better)
        raise UserError(f"config.eval.primary={name!r} is not a quantity that can be judged by. There are {judged}.")
    there = {"mc": choices, "nll": answers, "answers": settings.answer_rows > 0 and (answers or bool(kinds - {""}))}
    if not there[QUANTITIES[name].part]:
        raise UserError(f"config.eval.primary={name!r} cannot be measured: the rows have "
                        f"{'no choices' if QUANTITIES[name].part == 'mc' else 'no reference answers'}, or nothing is generated "
                        "(config.eval.answer_rows). Name another quantity.")
    return QUANTITIES[name]


def parts(rows: Sequence[Item], answer_rows: int) -> tuple[str, ...]:
    """The evaluators that these rows have something for."""
    there = {"mc": any(i.mc1 or i.mc2 for i in rows), "nll": any(i.answer for i in rows), "answers": answer_rows > 0}
    return tuple(name for name, here in there.items() if here)


def seeds_of(config: Config, name: str) -> seeds.SeedSet:
    """Pairs of a built-in set or a file that are no seeds of the run, for an arm."""
    return seeds.load_seeds(dataclasses.replace(config.data, seeds=name, question="", answer="", limit=0))
