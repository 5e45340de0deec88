"""Which pairs of the pool stand in a prompt: the nearest ones, random ones, or near ones that differ from each other."""
from __future__ import annotations

from typing import Sequence

import numpy as np

from isara_jax.retrieval.index import DIGITS, Index

MMR_CANDIDATES = 4  # times k: so many of the nearest are what mmr chooses from


def select(strategy: str, index: Index, queries: np.ndarray, anchors: Sequence[str] | None, k: int, *, mmr_lambda: float,
           addresses: Sequence[int]) -> list[list[str]]:
    """Ids of the k exemplars of each query (of the whole pool where it is smaller), nearest first.

    Args:
        strategy: "knn", "random" (k distinct pairs, whatever the query; in the order drawn) or "mmr" (maximal marginal relevance).
        queries: [m, d] unit vectors.
        anchors: the id in the pool that each query is the vector of; it is then its own nearest exemplar and stands first (knn, mmr), also
            where other pairs have the same vector. None where the queries are not in the pool.
        mmr_lambda: weight of relevance against diversity; 1 gives the exemplars of knn.
        addresses: 64-bit address of each query's randomness (`common.address`), read by "random".
    """
    if strategy == "random":
        return [_random(index, k, address) for address in addresses]
    if strategy not in ("knn", "mmr"):
        raise ValueError(f"strategy {strategy!r} is not knn, random or mmr")
    count = MMR_CANDIDATES * k if strategy == "mmr" else k
    if anchors is None or k == 0:
        near = index.search(queries, count)
    else:
        near = [[(anchor, 1.0), *others] for anchor, others in zip(anchors, index.search(queries, count - 1, exclude=anchors), strict=True)]
    if strategy == "mmr":
        near = [_diverse(index, candidates, k, mmr_lambda) for candidates in near]
    return [[name for name, _ in candidates] for candidates in near]


def _random(index: Index, k: int, address: int) -> list[str]:
    """k distinct ids. Raw Philox words are ranked: unlike numpy's own draws without replacement they are the same in every numpy."""
    words = np.random.Philox(key=address).random_raw(len(index))
    return [index.ids[row] for row in np.argsort(words, kind="stable")[:k]]


def _diverse(index: Index, candidates: list[tuple[str, float]], k: int, weight: float) -> list[tuple[str, float]]:
    """k of the candidates (best first), chosen greedily by lambda * relevance - (1 - lambda) * highest similarity to one already chosen.

    Maximal marginal relevance (Carbonell and Goldstein 1998), in float64, rounded, ties by id. The first candidate is always chosen.
    Returned in the order of the candidates, nearest first.
    """
    if len(candidates) <= k:
        return candidates
    vectors = np.stack([index.vector(name) for name, _ in candidates]).astype(np.float64)
    similar = (vectors[:, None, :] * vectors[None, :, :]).sum(axis=-1)
    chosen = [0]
    while len(chosen) < k:
        left = [i for i in range(len(candidates)) if i not in chosen]
        value = {i: round(weight * candidates[i][1] - (1 - weight) * similar[i, chosen].max(), DIGITS) for i in left}
        chosen.append(min(left, key=lambda i: (-value[i], candidates[i][0])))
    return [candidates[i] for i in sorted(chosen)]
