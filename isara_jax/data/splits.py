"""Who stands on which side: pool, validation, test, seeds and dev, so that no question has a near-duplicate on another side.

Near means ROUGE-L F > 0.6 between questions, over chains: `data.seeds.components`. Nothing here depends on the order of rows or files.
"""
from __future__ import annotations

import dataclasses
from collections import defaultdict
from typing import Sequence

from isara_jax.common import UserError, content_hash
from isara_jax.data import rouge
from isara_jax.data.items import Benchmark, Item
from isara_jax.data.seeds import NEAR, Seed, SeedSet, components, normalise, pairs_hash

Sides = tuple[tuple[Item, ...], tuple[Item, ...], tuple[Item, ...]]
SHARE = 8  # a component with more than 1/8 of the seeds asked for gives none: seeds should differ from one another


# ----------------------------------------------------------------------------------------------------------------- the three sides
def split(items: Sequence[Item], validation: float, test: float, *, training: Sequence[Item] = (),
          fixed_test: Sequence[Item] = ()) -> Sides:
    """(pool, validation, test), each in order of id, by whole components of near questions.

    A component's place u in [0, 1) is a hash of its content: it is tested on where u < test, else validated on where
    u < test + validation, else in the pool.

    Args:
        items: rows that may stand on any side.
        validation: share of the components (0 to 1) to make choices on. Where none fell there by chance, the pool's first one goes there.
        test: share of the components to test on.
        training: rows of a published training file. They are never tested on: near a test row they are left out.
        fixed_test: rows of a published test file. Whatever of `items` is near one is tested on as well.
    """
    origin = ["item"] * len(items) + ["training"] * len(training) + ["fixed"] * len(fixed_test)
    rows = [*items, *training, *fixed_test]
    pool: dict[float, list[Item]] = {}
    validated: dict[float, list[Item]] = {}
    tested: list[Item] = []
    for members in _groups([i.question for i in rows]):
        origins = {origin[m] for m in members}
        place = _place("split", [rows[m] for m in members])
        if "fixed" in origins or "item" in origins and place < test:
            tested += [rows[m] for m in members if origin[m] != "training"]
        else:
            (validated if test <= place < test + validation else pool)[place] = [rows[m] for m in members]
    if validation and not validated and len(pool) > 1:
        first = min(pool)
        validated[first] = pool.pop(first)
    return tuple(tuple(sorted(side, key=_by_id)) for side in (sum(pool.values(), []), sum(validated.values(), []), tested))


def _groups(questions: Sequence[str]) -> list[list[int]]:
    """The indices of the questions in each component."""
    groups: dict[int, list[int]] = defaultdict(list)
    for i, label in enumerate(components(questions)):
        groups[int(label)].append(i)
    return list(groups.values())


def _place(purpose: str, members: Sequence[Item]) -> float:
    """A component's number in [0, 1). The least hash stands for the content, and is hashed again: least of many, it is small by itself."""
    return int(content_hash(purpose, min(i.group for i in members)), 16) / 16**16


def _by_id(item: Item) -> tuple[str, str, int]:
    return item.id, item.file, item.row


def unique(items: Sequence[Item]) -> list[Item]:
    """Rows of equal question, answer and kind (whatever case and spaces) once: of several, the one with the least id."""
    found: dict[tuple[str, str, str], Item] = {}
    for item in sorted(items, key=_by_id):
        found.setdefault((normalise(item.question), normalise(item.answer), item.kind), item)
    return list(found.values())


# ------------------------------------------------------------------------------------------------------------------ seeds and dev
def seeds_and_dev(benchmark: Benchmark, limit: int) -> tuple[tuple[Item, ...], tuple[Item, ...]]:
    """(seed rows, dev rows) of the pool, each in order of id.

    Components with answers are taken whole, in order of a hash of their content, while they fit in `limit` pairs; one that does not
    fit, or has more than 1/8 of `limit` (at least 1), is passed over. Dev is every row of the components not taken.
    """
    rows = benchmark.pool
    chosen: list[Item] = []
    dev: list[Item] = []
    groups = [[rows[m] for m in members] for members in _groups([i.question for i in rows])]
    for members in sorted(groups, key=lambda g: _place("seeds", g)):
        pairs = [i for i in members if i.answer]
        if pairs and len(pairs) <= max(1, limit // SHARE) and len(chosen) + len(pairs) <= limit:
            chosen += pairs
        else:
            dev += members
    return tuple(sorted(chosen, key=_by_id)), tuple(sorted(dev, key=_by_id))


def choose(items: Sequence[Item], n: int) -> tuple[Item, ...]:
    """At most `n` of the rows, the first by id, kinds in turn as long as they last: of three kinds a third each."""
    kinds: dict[str, list[Item]] = defaultdict(list)
    for item in sorted(items, key=_by_id):
        kinds[item.kind].append(item)
    turns = sorted((turn, kind) for kind, rows in kinds.items() for turn in range(len(rows)))
    return tuple(kinds[kind][turn] for turn, kind in turns[:n])


def seed_set(benchmark: Benchmark, chosen: Sequence[Item]) -> SeedSet:
    """Rows of a benchmark as the seeds of a run, with their provenance."""
    if not chosen:
        raise UserError(f"{benchmark.name} gives no seeds: no row of its pool has an answer to train on. Set --config.data.seeds.")
    pairs = tuple(Seed(i.question, i.answer, i.author, i.source, i.licence, i.row) for i in chosen)
    return SeedSet(pairs, benchmark.name, pairs_hash(pairs), ())


# ---------------------------------------------------------------------------------------------------------------------- own pairs
def folds(pairs: Sequence[Seed], n: int) -> list[tuple[Seed, ...]]:
    """The pairs in n parts of like size, each in file order, so that no question has a near-duplicate in another part.

    Components are dealt out in order of a hash of their content, the larger first, each to the part with the fewest pairs.
    Raises `UserError` where a part would have fewer than 2 pairs.
    """
    groups = [[pairs[m] for m in members] for members in _groups([p.question for p in pairs])]
    content = lambda group: content_hash("fold", *sorted(content_hash(p.question, p.answer) for p in group))
    parts: list[list[Seed]] = [[] for _ in range(n)]
    for group in sorted(groups, key=lambda g: (-len(g), content(g))):
        min(parts, key=len).extend(group)
    if len(least := min(parts, key=len)) < 2:
        raise UserError(f"config.data.folds={n} would leave {len(least)} of {len(pairs)} pairs to judge on in one fold (questions that are "
                        "near one another stay together), and at least 2 are needed. Take fewer folds or add pairs.")
    return [tuple(sorted(part, key=lambda p: p.row)) for part in parts]


def without(seeds: SeedSet, judged: Sequence[Seed]) -> SeedSet:
    """The seeds without those that are judged on."""
    if not judged:
        return seeds
    barred = {p.row for p in judged}
    kept = tuple(p for p in seeds.pairs if p.row not in barred)
    return dataclasses.replace(seeds, pairs=kept, hash=pairs_hash(kept))


# ---------------------------------------------------------------------------------------------------------------------- leakage
class LeakIndex:
    """Rows that nothing may be trained on, and finds the nearest of them to a question."""

    def __init__(self, items: Sequence[Item]):
        self._items = {i.id: i for i in sorted(items, key=_by_id)}
        self._equal: dict[str, str] = {}
        self._near = rouge.NoveltyIndex()
        seen: set[tuple[str, ...]] = set()
        for item in self._items.values():
            self._equal.setdefault(normalise(item.question), item.id)
            words = tuple(rouge.tokens(item.question))
            if words and words not in seen:
                self._near.add(item.id, words)
            seen.add(words)

    def equal(self, question: str) -> Item | None:
        """The row that has this question, whatever its case and spaces."""
        return self._items.get(self._equal.get(normalise(question), ""))

    def near(self, question: str) -> tuple[float, str] | None:
        """(ROUGE-L F, id) of the nearest row, where F > 0.6 or the questions are equal (then 1.0); else None."""
        if same := self.equal(question):
            return 1.0, same.id
        score, id = self._near.nearest(rouge.tokens(question))
        return (score, id) if id and score > NEAR else None


def without_leaks(seeds: SeedSet, items: Sequence[Item]) -> tuple[SeedSet, int]:
    """(the seeds that are not near an evaluation row, how many were).

    Raises `UserError` where a seed has the question of a row, naming both, and where no seed is left.
    """
    index = LeakIndex(items)
    for seed in seeds.pairs:
        if row := index.equal(seed.question):
            raise UserError(f"{seeds.path}, row {seed.row}: this seed is also an evaluation row ({row.file}, row {row.row}). Remove it "
                            "from the seeds, or evaluate on something else with --config.eval.benchmark.")
    kept = tuple(s for s in seeds.pairs if not index.near(s.question))
    if not kept:
        raise UserError(f"{seeds.path}: every seed is near an evaluation row (ROUGE-L F > {NEAR}), so none is left. Take other seeds, or "
                        "evaluate on something else with --config.eval.benchmark.")
    if len(kept) == len(seeds.pairs):
        return seeds, 0
    return dataclasses.replace(seeds, pairs=kept, hash=pairs_hash(kept)), len(seeds.pairs) - len(kept)
