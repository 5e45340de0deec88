"""Nearest neighbours: both backends agree, ties go by id, the query itself can be left out, odd sizes work."""
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isara_jax.common import UserError
from isara_jax.retrieval import index

BACKENDS = ["numpy", pytest.param("scann", marks=pytest.mark.skipif(sys.platform != "linux", reason="scann has Linux wheels only"))]
COMPASS = np.array([[1, 0], [0, 1], [-1, 0], [0, -1], [0.6, 0.8]], np.float32)  # east north west south northeast
NAMES = ["e", "n", "w", "s", "ne"]


def unit(x):
    x = np.asarray(x, np.float64)
    return (x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)).astype(np.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_neighbours_come_best_first_with_their_scores(backend):
    found = index.build(COMPASS, NAMES, backend=backend).search(np.array([[1, 0], [0, 1]]), 3)
    assert found == [[("e", 1.0), ("ne", 0.6), ("n", 0.0)], [("n", 1.0), ("ne", 0.8), ("e", 0.0)]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_ties_go_by_id_whatever_the_order_of_rows(backend):
    same = np.repeat(COMPASS[:1], 4, axis=0)
    for names in (["b", "d", "a", "c"], ["d", "c", "b", "a"]):
        assert index.build(same, names, backend=backend).search(same[:1], 3) == [[("a", 1.0), ("b", 1.0), ("c", 1.0)]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_more_ties_than_the_proposal_holds_still_go_by_id(backend):
    names = [f"{i:03d}" for i in reversed(range(300))]
    found = index.build(np.repeat(COMPASS[:1], 300, axis=0), names, backend=backend).search(COMPASS[:1], 2, exclude=["001"])
    assert found == [[("000", 1.0), ("002", 1.0)]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_differences_below_the_sixth_digit_are_ties(backend):
    vectors = np.array([[1, 0], [np.cos(5e-4), np.sin(5e-4)]], np.float32)  # the second scores 1 - 1.25e-7
    assert index.build(vectors, ["b", "a"], backend=backend).search(np.array([[1, 0]]), 2) == [[("a", 1.0), ("b", 1.0)]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_query_itself_can_be_left_out(backend):
    searched = index.build(COMPASS, NAMES, backend=backend)
    found = searched.search(COMPASS, 2, exclude=["e", "n", "w", "s", None])
    assert [[name for name, _ in row] for row in found] == [["ne", "n"], ["ne", "e"], ["n", "s"], ["e", "w"], ["ne", "n"]]
    assert searched.search(COMPASS[:1], 9, exclude=["nobody"]) == searched.search(COMPASS[:1], 9)


@pytest.mark.parametrize("backend", BACKENDS)
def test_k_from_nothing_to_more_than_there_is(backend):
    searched = index.build(COMPASS, NAMES, backend=backend)
    assert searched.search(COMPASS[:2], 0) == [[], []]
    assert sorted(name for name, _ in searched.search(COMPASS[:1], 99)[0]) == sorted(NAMES)
    assert len(searched.search(COMPASS[:1], 99, exclude=["e"])[0]) == 4
    assert searched.search(np.zeros((0, 2)), 3) == []
    assert index.build(np.zeros((0, 2)), [], backend=backend).search(COMPASS[:1], 3) == [[]]


@pytest.mark.skipif(sys.platform != "linux", reason="scann has Linux wheels only")
@settings(max_examples=60, deadline=None)
@given(st.data())
def test_scann_and_numpy_give_the_same_neighbours(data):
    n, d, m = data.draw(st.integers(1, 80)), data.draw(st.integers(1, 5)), data.draw(st.integers(1, 4))
    k, kinds = data.draw(st.integers(0, 90)), data.draw(st.integers(1, 80))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    vectors = unit(rng.integers(-2, 3, (kinds, d)))[rng.integers(0, kinds, n)]  # many equal ones, zeros among them
    names = [str(i) for i in rng.permutation(n)]
    queries, exclude = vectors[rng.integers(0, n, m)], [names[i] for i in rng.integers(0, n, m)]
    a, b = (index.build(vectors, names, backend=backend).search(queries, k, exclude=exclude) for backend in ("scann", "numpy"))
    assert a == b
    for row, barred in zip(a, exclude):
        assert len(row) == min(k, n - 1) and barred not in [name for name, _ in row]
        assert row == sorted(row, key=lambda pair: (-pair[1], pair[0]))


@pytest.mark.skipif(sys.platform != "linux", reason="scann has Linux wheels only")
def test_the_tree_finds_95_percent_of_the_neighbours():
    rng = np.random.default_rng(0)
    vectors = unit(rng.normal(size=(600, 32))[rng.integers(0, 600, 60_000)] + 0.35 * rng.normal(size=(60_000, 32)))
    names, queries = [str(i) for i in range(60_000)], unit(vectors[:100] + 0.05 * rng.normal(size=(100, 32)))
    tree, exact = (index.build(vectors, names, backend=backend) for backend in ("scann", "numpy"))
    found, best = tree.search(queries, 10), exact.search(queries, 10)
    assert np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found, best)]) >= 0.95  # with equal scores, as pairs
    assert all(len(row) == 10 for row in found)


def test_auto_falls_back_to_numpy_and_says_why(monkeypatch):
    monkeypatch.setitem(sys.modules, "scann", None)
    searched = index.build(COMPASS, NAMES)
    assert searched.backend == "numpy" and "scann cannot be imported" in searched.reason
    with pytest.raises(UserError, match="pip install scann"):
        index.build(COMPASS, NAMES, backend="scann")


@pytest.mark.skipif(sys.platform != "linux", reason="scann has Linux wheels only")
def test_auto_takes_scann_and_spares_it_tensorflow():
    before = sys.modules.get("tensorflow", "absent")
    assert index.build(COMPASS, NAMES).backend == "scann"
    assert sys.modules.get("tensorflow", "absent") is before
    with index._hidden("json"), pytest.raises(ImportError):
        import json  # noqa: F401
    import json  # noqa: F401


def test_what_is_no_number_or_does_not_fit_is_refused():
    broken = COMPASS.copy()
    broken[3, 1] = np.nan
    with pytest.raises(ValueError, match="vector 3 of 5 holds NaN"):
        index.build(broken, NAMES)
    searched = index.build(COMPASS, NAMES, backend="numpy")
    with pytest.raises(ValueError, match="vector 0 of 1"):
        searched.search(np.array([[np.inf, 0]]), 1)
    with pytest.raises(ValueError, match="expected"):
        searched.search(np.ones((1, 3)), 1)
    with pytest.raises(ValueError, match="4 ids"):
        index.build(COMPASS, NAMES[:4])
    with pytest.raises(ValueError, match="4 of them distinct"):
        index.build(COMPASS, [*NAMES[:4], "e"])
    with pytest.raises(ValueError, match="2 ids to exclude for 1 queries"):
        searched.search(COMPASS[:1], 1, exclude=["e", "n"])
