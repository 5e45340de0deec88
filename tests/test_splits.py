"""Who stands on which side: near questions together, whatever the order of the rows, and nothing trained on that is tested."""
from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isara_jax.common import UserError
from isara_jax.config import Data
from isara_jax.data import rouge
from isara_jax.data.benchmarks import Benchmark, Item, open_benchmark
from isara_jax.data.seeds import NEAR, from_pairs
from isara_jax.data.splits import LeakIndex, choose, seed_set, seeds_and_dev, split, unique, without_leaks

WORDS = ("amber", "basalt", "cedar", "delta", "ember", "fjord", "garnet", "heron", "indigo", "juniper", "krill", "lichen")
KNOWN = Data(author="human", source="a book", licence="CC0-1.0")


def pair(question, answer="So.", **fields):
    return Item(question=question, answer=answer, **fields)


def names(items):
    return sorted(i.question for i in items)


def near(a, b):
    return rouge.f_measure(rouge.tokens(a), rouge.tokens(b)) > NEAR


def nearest(side, other):
    return [(a.question, b.question) for a in side for b in other if near(a.question, b.question)]


# a chain in which each is near the next (F = 2/3), and the ends are not near each other (F = 1/3)
CHAIN = ("amber basalt cedar", "basalt cedar delta", "cedar delta ember")


# ------------------------------------------------------------------------------------------------------------------------- split
@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.sampled_from(WORDS[:6]), min_size=1, max_size=4).map(" ".join), max_size=30, unique=True),
       st.randoms(use_true_random=False))
def test_sides_partition_the_rows_in_any_order_and_no_near_pair_is_parted(questions, random):
    items = [pair(q) for q in questions]
    sides = split(items, 0.3, 0.3)
    assert names(sum(sides, ())) == sorted(questions)
    assert not nearest(sides[0], sides[1]) and not nearest(sides[0], sides[2]) and not nearest(sides[1], sides[2])
    random.shuffle(items)
    assert split(items, 0.3, 0.3) == sides


def test_a_chain_stays_together():
    for test in (0.1, 0.3, 0.5, 0.7, 0.9):
        assert sorted(map(len, split([pair(q) for q in CHAIN], 0.0, test))) == [0, 0, 3]


def test_shares_are_shares_of_the_components():
    items = [pair(f"{w} {v}") for w in WORDS for v in map(str, range(100))]  # F of two of them is at most 1/2
    sizes = [len(side) for side in split(items, 0.2, 0.3)]
    assert sum(sizes) == 1200 and all(abs(size - wanted) < 60 for size, wanted in zip(sizes, (600, 240, 360))), sizes


def test_large_components_are_not_drawn_to_one_side():
    """The least of many hashes is small; hashed again it is not, so that half of the triples and half of the single rows are tested."""
    triples = [pair(f"a{n} b{n} c{n} {w}") for n in range(200) for w in WORDS[:3]]
    single = [pair(f"d{n}") for n in range(200)]
    tested = split([*triples, *single], 0.0, 0.5)[2]
    assert abs(sum(i.question.startswith("a") for i in tested) / 3 - 100) < 30 and abs(sum(i.question[0] == "d" for i in tested) - 100) < 30


def test_a_row_is_on_the_same_side_when_others_come_or_go():
    items = [pair(w) for w in WORDS]
    some, more = split(items[:8], 0.3, 0.3), split(items, 0.3, 0.3)
    assert all(set(a) <= set(b) for a, b in zip(some, more))


def test_what_is_near_a_test_file_leaves_the_training_side():
    training = [pair(CHAIN[0]), pair("fjord garnet"), pair("heron indigo")]
    fixed = [pair(CHAIN[2], "x")]
    pool, validation, test = split([], 0.3, 0.0, training=training, fixed_test=fixed)
    assert names((*pool, *validation)) == [CHAIN[0], "fjord garnet", "heron indigo"], "its chain to the test row is not there"
    pool, validation, test = split([], 0.3, 0.0, training=[*training, pair(CHAIN[1])], fixed_test=fixed)
    assert names((*pool, *validation)) == ["fjord garnet", "heron indigo"] and test == tuple(fixed)


def test_training_rows_are_never_tested_on_and_free_rows_near_a_test_file_are():
    training, free = [pair(f"{w} a b") for w in WORDS], [pair(f"{w} a b c", kind="harmless") for w in WORDS]
    apart = [pair(w) for w in WORDS]
    pool, validation, test = split(apart, 0.2, 0.5, training=[pair(f"{n} {n + 1}") for n in range(0, 40, 2)])
    assert len([i for i in (*pool, *validation) if i.question[0].isdigit()]) == 20 and test and all(i in apart for i in test)
    pool, validation, test = split(free, 0.2, 0.0, training=training, fixed_test=[pair("a b c")])
    assert pool == validation == () and set(test) == {*free, pair("a b c")}


def test_validation_is_not_left_empty_by_chance():
    for count in range(2, 6):
        pool, validation, test = split([pair(w) for w in WORDS[:count]], 0.001, 0.0)
        assert (len(pool), len(validation), len(test)) == (count - 1, 1, 0)
    assert split([pair("amber")], 0.001, 0.0) == ((pair("amber"),), (), ())


def test_equal_rows_are_taken_once_whatever_their_order():
    rows = [pair("Why?", row=1), pair("why? ", " so.", row=2), pair("Why?", "", kind="unsafe", row=3), pair("Why?", row=4)]
    assert unique(rows) == unique(rows[::-1])
    assert sorted(i.kind for i in unique(rows)) == ["", "unsafe"]


# ----------------------------------------------------------------------------------------------------------------- seeds and dev
def benchmark(pool):
    return Benchmark("mine", tuple(sorted(pool, key=lambda i: i.id)), (), ())


def test_seeds_take_whole_components_and_dev_the_others():
    rows = [*map(pair, CHAIN), *map(pair, WORDS), pair("garnet heron indigo", "", kind="unsafe")]
    for limit in range(1, 17):
        seeds, dev = seeds_and_dev(benchmark(rows), limit)
        assert len(seeds) <= limit and not nearest(seeds, dev) and len({*seeds, *dev}) == len(seeds) + len(dev)
        assert all(i.answer for i in seeds)
        assert (seeds, dev) == seeds_and_dev(benchmark(rows[::-1]), limit)
    assert len(seeds) == 12 and names(dev) == sorted([*CHAIN, "garnet heron indigo"]), "a component over an eighth of the seeds is dev"


def test_prompts_beside_a_seed_are_neither_seed_nor_dev():
    seeds, dev = seeds_and_dev(benchmark([pair("amber"), pair("Amber ", "", kind="unsafe"), pair("cedar", "")]), 5)
    assert names(seeds) == ["amber"] and names(dev) == ["cedar"]


def test_seeds_carry_their_provenance():
    rows = [pair("amber", author="human", source="a book", licence="CC0-1.0", row=7)]
    made = seed_set(benchmark(rows), rows)
    assert (made.path, made.warnings) == ("mine", ())
    assert (made.pairs[0].author, made.pairs[0].source, made.pairs[0].licence, made.pairs[0].row) == ("human", "a book", "CC0-1.0", 7)
    assert made.hash == from_pairs([("amber", "So.")], KNOWN).hash
    with pytest.raises(UserError, match="mine gives no seeds"):
        seed_set(benchmark(rows), ())


# -------------------------------------------------------------------------------------------------------------------------- rows
def test_kinds_take_turns_as_long_as_they_last():
    items = [pair(w, kind=kind) for kind, n in (("", 5), ("unsafe", 5), ("harmless", 2)) for w in WORDS[:n]]
    chosen = choose(items, 9)
    assert [i.kind for i in chosen] == ["", "harmless", "unsafe", "", "harmless", "unsafe", "", "unsafe", ""]
    assert choose(items[::-1], 9) == chosen and choose(items, 5) == chosen[:5] and set(choose(items, 99)) == set(items)


# ----------------------------------------------------------------------------------------------------------------------- leakage
def test_the_index_finds_equal_and_near_rows_only():
    rows = [pair(CHAIN[0]), pair("What is it?"), pair("???")]
    index = LeakIndex(rows)
    assert index.near("WHAT  is it?") == (1.0, rows[1].id)
    assert index.near("??? ") == (1.0, rows[2].id) and index.near("!!!") is None
    score, id = index.near(CHAIN[1])
    assert id == rows[0].id and score == pytest.approx(2 / 3)
    assert index.near(CHAIN[2]) is None
    assert index.near("amber basalt cedar delta ember fjord garnet") is None, "F = 0.6 is not above it"
    assert LeakIndex([]).near("amber") is None


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.sampled_from(WORDS[:5]), max_size=4).map(" ".join), max_size=8),
       st.lists(st.sampled_from(WORDS[:5]), min_size=1, max_size=4).map(" ".join))
def test_the_index_agrees_with_a_plain_search(questions, asked):
    scores = [1.0 if q == asked else rouge.f_measure(rouge.tokens(q), rouge.tokens(asked)) for q in questions]
    found = LeakIndex([pair(q) for q in questions]).near(asked)
    assert found is None if max(scores, default=0) <= NEAR else found[0] == max(scores)


def test_near_seeds_are_left_out_and_counted():
    seeds = from_pairs([(CHAIN[0], "a"), ("fjord garnet", "b")], KNOWN)
    kept, left_out = without_leaks(seeds, [pair(CHAIN[1])])
    assert left_out == 1 and [p.question for p in kept.pairs] == ["fjord garnet"]
    assert kept.hash == from_pairs([("fjord garnet", "b")], KNOWN).hash
    assert without_leaks(seeds, [pair("krill")]) == (seeds, 0)
    with pytest.raises(UserError, match="every seed is near an evaluation row"):
        without_leaks(from_pairs([(CHAIN[0], "a")], KNOWN), [pair(CHAIN[1])])


def test_a_seed_that_is_an_evaluation_row_names_both_and_quotes_neither():
    seeds = from_pairs([("fjord garnet", "b"), ("Amber  basalt", "a")], KNOWN)
    with pytest.raises(UserError, match=r"the pairs given, row 2: this seed is also an evaluation row \(mine.csv, row 9\)") as e:
        without_leaks(seeds, [pair("amber Basalt", file="mine.csv", row=9)])
    assert "asalt" not in str(e.value)


# ---------------------------------------------------------------------------------------------------------------- the real files
@pytest.mark.parametrize("name, sizes", [("truthfulqa", (64, 255)), ("beavertails", (64, 1980)), ("self_instruct", (64, 91)),
                                         ("alpaca", (64, 1697))])
def test_no_seed_of_a_benchmark_is_near_what_may_be_evaluated(test_data, name, sizes):
    opened = open_benchmark(name, str(test_data))
    seeds, dev = seeds_and_dev(opened, 64)
    assert (len(seeds), len(dev)) == sizes
    assert all(i.answer and not i.kind for i in seeds)
    found = LeakIndex((*dev, *opened.validation, *opened.test))
    assert not any(found.near(i.question) for i in seeds)
    decided = LeakIndex((*opened.validation, *opened.test))
    assert not any(decided.near(i.question) for i in choose(dev, 100))


def test_a_third_of_each_kind_is_chosen_of_beavertails(test_data):
    rows = choose(seeds_and_dev(open_benchmark("beavertails", str(test_data)), 64)[1], 100)
    assert [sum(i.kind == kind for i in rows) for kind in ("", "harmless", "unsafe")] == [34, 33, 33]
