"""Blocks and their names against a model that is plain to see, and which rows are grouped."""
from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from isara_jax.decode.blocks import Layout, Pool, group, layout, most_in_use
from isara_jax.decode.generate import pool_blocks, table_width


# ------------------------------------------------------------------------------------------------------------------------- layout
@pytest.mark.parametrize("length, limit, whole, rest, own", [
    (1, 1, 0, False, 1), (1, 4, 0, False, 1), (1, 5, 0, False, 2),     # nothing to prefill: drawn tokens alone need blocks
    (2, 3, 0, True, 1), (2, 4, 0, True, 2),
    (4, 1, 0, True, 1), (4, 2, 0, True, 2),                            # 3 prefilled
    (5, 1, 1, False, 1), (5, 4, 1, False, 1), (5, 5, 1, False, 2),     # 4 prefilled: one whole block
    (6, 3, 1, True, 1), (6, 4, 1, True, 2), (13, 9, 3, False, 3)])
def test_layout(length, limit, whole, rest, own):
    """In blocks of 4 keys. The last token of a prompt is not prefilled."""
    found = layout(list(range(length)), limit, 4)
    assert (len(found.whole), found.rest is not None, found.own) == (whole, rest, own)


def test_names_are_of_the_whole_text():
    a, b = layout([1, 2, 3, 4, 5, 6, 7, 8, 9, 0], 1, 4), layout([1, 2, 3, 4, 5, 6, 7, 9, 9, 0], 1, 4)
    assert a.whole[0] == b.whole[0] and a.whole[1] != b.whole[1] and a.rest != b.rest, "the second begins alike and goes on otherwise"
    assert len(set(layout([5] * 9, 1, 4).whole)) == 2, "equal tokens at other places"
    assert a.rest == layout([1, 2, 3, 4, 5, 6, 7, 8, 9, 77], 50, 4).rest, "the last token and the limit do not matter"
    assert layout((1, 2, 3), 1, 4).rest == layout(np.array([1, 2, 9]), 1, 4).rest == layout([1, 2, 3], 9, 8).rest


# ------------------------------------------------------------------------------------------------------------------- most_in_use
def test_most_in_use_by_hand():
    """Two slots: (a b + 1), (a + 2), (c + 5): the first two hold a, b and 3; the last two a, c and 7."""
    layouts = [Layout((b"a", b"b"), None, 1), Layout((b"a",), None, 2), Layout((b"c",), None, 5)]
    assert [most_in_use(layouts, slots) for slots in (1, 2, 3, 9)] == [6, 9, 11, 11]
    assert most_in_use([], 4) == 0


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.lists(st.sampled_from("abcd"), max_size=3, unique=True), st.integers(0, 5)), max_size=12),
       st.integers(1, 5))
def test_most_in_use_is_brute_force(parts, slots):
    layouts = [Layout(tuple(name.encode() for name in names), None, own) for names, own in parts]
    windows = [layouts[i:i + slots] for i in range(len(layouts))]
    assert most_in_use(iter(layouts), slots) == max(
        (len({name for x in window for name in x.whole}) + sum(x.own for x in window) for window in windows), default=0)


def test_ladders():
    """Few sizes, none too small, none more than a quarter too large."""
    assert [table_width(n) for n in (1, 8, 9, 16, 17, 64, 65)] == [8, 8, 16, 16, 32, 64, 128]
    assert [pool_blocks(n, 64) for n in (1, 32, 33, 256, 257, 300, 512, 513, 577)] == [32, 32, 64, 256, 320, 320, 512, 640, 640]
    assert [pool_blocks(n, 1) for n in (1, 2, 9, 17)] == [1, 2, 10, 20]
    for slots in (1, 2, 64):
        made, unit = {n: pool_blocks(n, slots) for n in range(1, 5000)}, max(1, slots // 2)
        assert all(n <= size < n * 1.25 + unit for n, size in made.items())
        assert len(set(made.values())) <= 60


# --------------------------------------------------------------------------------------------------------------------------- pool
def test_pool_by_hand():
    pool = Pool(3)
    a, b = pool.take(2)
    pool.name(a, b"a")
    pool.name(b, b"b")
    assert pool.take(2) is None and pool.known([b"a", b"b", b"c"]) == [a, b] and pool.known([b"c", b"a"]) == [] and pool.find(b"c") is None
    pool.use(a)
    pool.release(a)
    assert pool.take(2) is None, "a is still in use by the first"
    pool.release(b)
    pool.release(a)
    assert pool.known([b"a", b"b"]) == [a, b], "idle blocks are found"
    pool.use(b)
    pool.release(b)
    (c,) = pool.take(1)
    assert {a, b, c} == {0, 1, 2}, "the free one goes first"
    assert pool.take(1) == [a], "then the idle one that was used least recently"
    assert pool.find(b"a") is None and pool.find(b"b") == b
    assert pool.take(2) is None and pool.find(b"b") == b, "what is refused changes nothing"
    pool.release(a)
    assert pool.take(1) == [a] and pool.find(b"b") == b, "a block without a name is free again"


def test_a_name_stays_with_its_first_block():
    pool = Pool(2)
    a, b = pool.take(2)
    pool.name(a, b"x")
    pool.name(b, b"x")
    pool.release(b)
    assert pool.find(b"x") == a and pool.take(1) == [b] and pool.take(1) is None


class PoolIsTheModel(RuleBasedStateMachine):
    """`Pool` beside lists that are searched from end to end."""

    BLOCKS = 5

    def __init__(self):
        super().__init__()
        self.pool, self.users, self.names, self.idle = Pool(self.BLOCKS), [0] * self.BLOCKS, {}, []

    @property
    def in_use(self):
        return [block for block, n in enumerate(self.users) if n]

    @rule(n=st.integers(0, 6))
    def take(self, n):
        free = [block for block in range(self.BLOCKS) if not self.users[block] and block not in self.idle]
        found = self.pool.take(n)
        if n > len(free) + len(self.idle):
            assert found is None
            return
        evicted, self.idle = self.idle[:max(0, n - len(free))], self.idle[max(0, n - len(free)):]
        assert len(found) == len(set(found)) == n and set(found) <= {*free, *evicted} and {*evicted} <= {*found}
        for block in found:
            self.users[block] = 1
            self.names.pop(block, None)

    @precondition(lambda self: self.in_use)
    @rule(data=st.data(), name=st.sampled_from([b"a", b"b", b"c", b"d"]))
    def name(self, data, name):
        block = data.draw(st.sampled_from(self.in_use))
        if block in self.names:  # a block gets its name once, when it is taken
            return
        self.pool.name(block, name)
        if name not in self.names.values():
            self.names[block] = name

    @precondition(lambda self: self.names)
    @rule(data=st.data())
    def use(self, data):
        block = data.draw(st.sampled_from(sorted(self.names)))
        self.pool.use(block)
        self.users[block] += 1
        if block in self.idle:
            self.idle.remove(block)

    @precondition(lambda self: self.in_use)
    @rule(data=st.data())
    def release(self, data):
        block = data.draw(st.sampled_from(self.in_use))
        self.pool.release(block)
        self.users[block] -= 1
        if not self.users[block] and block in self.names:
            self.idle.append(block)

    @invariant()
    def names_are_true(self):
        for name in (b"a", b"b", b"c", b"d"):
            assert self.pool.find(name) == next((block for block, n in self.names.items() if n == name), None)
        assert self.pool.known([b"a", b"b"]) == [*itertools.takewhile(lambda b: b is not None, map(self.pool.find, [b"a", b"b"]))]

    def teardown(self):
        """Nothing is lost: when all have gone, all blocks can be taken."""
        for block in self.in_use:
            for _ in range(self.users[block]):
                self.pool.release(block)
        assert sorted(self.pool.take(self.BLOCKS)) == list(range(self.BLOCKS))
        assert all(self.pool.find(name) is None for name in (b"a", b"b", b"c", b"d"))


TestPool = PoolIsTheModel.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


# -------------------------------------------------------------------------------------------------------------------------- group
@pytest.mark.parametrize("tables, most, groups", [
    ([], 4, []),
    ([[1, 2]], 4, []),
    ([[1, 2], [3, 4]], 4, []),
    ([[1, 2, 3], [1, 2, 4]], 4, [(2, [0, 1])]),
    ([[1, 2], [], [1, 2]], 4, [(2, [0, 2])]),                                       # a row without blocks is left out
    ([[7], [1, 2], [7, 8], [1, 3]], 4, [(1, [1, 3]), (1, [0, 2])]),
    ([[1, 2, 3, 4, 5], [1, 2, 3, 4, 6], [1, 9]], 4, [(4, [0, 1])]),                 # 1 * 4 walks saved, with the third 2 * 1
    ([[1, 2, 3], [1, 2, 4], [1, 5]], 4, [(2, [0, 1])]),                             # 2 either way: the smaller group
    ([[1, 2, 3], [1, 2, 4], [1, 2, 5], [1, 2]], 4, [(2, [3, 0, 1, 2])]),
    ([[1, i] for i in range(5)], 2, [(1, [0, 1]), (1, [2, 3])]),                    # the fifth stays alone
    ([[1], [1]], 1, []), ([[1], [1]], 0, [])])
def test_group_by_hand(tables, most, groups):
    assert group(tables, most) == groups


@settings(max_examples=300, deadline=None)
@given(st.lists(st.lists(st.integers(0, 2), max_size=4), max_size=12), st.integers(1, 4))
def test_groups_share_their_blocks(paths, most):
    """Tables are paths of a tree, as they are in a pool: a block stands under one beginning only."""
    number = {path: i for i, path in enumerate(sorted({tuple(p[:n + 1]) for p in paths for n in range(len(p))}))}
    tables = [[number[tuple(p[:n + 1])] for n in range(len(p))] for p in paths]
    groups = group(tables, most)
    members = [i for _, rows in groups for i in rows]
    assert len(members) == len(set(members))
    for common, rows in groups:
        assert 2 <= len(rows) <= most and common >= 1
        assert all(tables[i][:common] == tables[rows[0]][:common] and len(tables[i]) >= common for i in rows)
    rest = [tables[i][:1] for i in range(len(tables)) if tables[i] and i not in members]
    if most >= 2 and not groups:
        assert len({t[0] for t in rest}) == len(rest), "rows that begin alike were left alone"
