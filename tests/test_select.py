"""Exemplars: the nearest with the anchor first, random ones by address, diverse ones."""
import numpy as np
import pytest

from isara_jax.common import address
from isara_jax.retrieval import index
from isara_jax.retrieval.select import select

# a and b point the same way, c nearly so, d and e elsewhere; measured from a: b 1, c 0.96, d 0.6, e 0
VECTORS = np.array([[1, 0, 0], [1, 0, 0], [0.96, 0.28, 0], [0.6, 0, 0.8], [0, 1, 0]], np.float32)
POOL = index.build(VECTORS, ["a", "b", "c", "d", "e"], backend="numpy")


def chosen(strategy, k, rows=(0,), anchors=None, mmr_lambda=0.5, addresses=(7,)):
    return select(strategy, POOL, VECTORS[list(rows)], anchors, k, mmr_lambda=mmr_lambda, addresses=list(addresses))


def test_knn_takes_the_nearest_first():
    assert chosen("knn", 3) == [["a", "b", "c"]]
    assert chosen("knn", 2, rows=(4, 3)) == [["e", "c"], ["d", "a"]]


def test_the_anchor_stands_first_even_among_equals():
    assert chosen("knn", 3, rows=(1, 0), anchors=["b", "a"]) == [["b", "a", "c"], ["a", "b", "c"]]
    assert chosen("knn", 1, rows=(1,), anchors=["b"]) == [["b"]]
    assert chosen("mmr", 2, rows=(1,), anchors=["b"])[0][0] == "b"


@pytest.mark.parametrize("strategy", ["knn", "random", "mmr"])
def test_k_from_zero_to_more_than_the_pool(strategy):
    assert chosen(strategy, 0, anchors=["a"]) == [[]]
    assert chosen(strategy, 0) == [[]]
    for anchors in (None, ["a"]):
        assert sorted(chosen(strategy, 64, anchors=anchors)[0]) == ["a", "b", "c", "d", "e"]


def test_mmr_prefers_what_adds_something():
    # after a: b 0.5 - 0.5 = 0, c 0.48 - 0.48 = 0, d 0.3 - 0.3 = 0, e 0: all tie, by id b; with less weight on relevance e is first
    assert chosen("mmr", 2, mmr_lambda=0.5) == [["a", "b"]]
    assert chosen("mmr", 2, mmr_lambda=0.3) == [["a", "e"]]
    # then d: 0.18 - 0.7 * 0.6 = -0.24, c: 0.288 - 0.7 * 0.96 = -0.384, b: 0.3 - 0.7 = -0.4; the result is nearest first
    assert chosen("mmr", 3, mmr_lambda=0.3) == [["a", "d", "e"]]


def test_mmr_with_all_weight_on_relevance_is_knn():
    for k in (1, 2, 3, 4):
        assert chosen("mmr", k, rows=range(5), mmr_lambda=1.0) == chosen("knn", k, rows=range(5))


def test_mmr_chooses_among_the_nearest_only():
    names = [*"abcdefgh", "far"]  # 4 * k = 8 candidates: the ninth is never looked at, however different
    pool = index.build(np.array([[1, 0]] * 8 + [[0, 1]], np.float32), names, backend="numpy")
    assert select("mmr", pool, VECTORS[:1, :2], None, 2, mmr_lambda=0.0, addresses=[0]) == [["a", "b"]]
    assert select("mmr", pool, VECTORS[:1, :2], None, 3, mmr_lambda=0.0, addresses=[0]) == [["a", "b", "far"]]


def test_random_is_decided_by_the_address_and_nothing_else():
    draws = chosen("random", 3, rows=[0] * 200, addresses=[address("exemplars", i) for i in range(200)])
    assert all(len(set(names)) == 3 for names in draws)
    assert len(set(map(tuple, draws))) > 40  # of 60 ordered triples
    shares = {name: sum(name in names for names in draws) / 200 for name in "abcde"}
    assert all(0.45 < share < 0.75 for share in shares.values())  # 3 of 5 each
    again = chosen("random", 3, rows=[4], anchors=["e"], addresses=[address("exemplars", 17)])
    assert again == [draws[17]]


def test_the_draw_of_an_address_never_changes():
    assert chosen("random", 5, addresses=[0, 2**64 - 1], rows=(0, 0)) == [["a", "c", "b", "e", "d"], ["a", "e", "c", "d", "b"]]


def test_an_unknown_strategy_is_refused():
    with pytest.raises(ValueError, match="nearest"):
        chosen("nearest", 1)
