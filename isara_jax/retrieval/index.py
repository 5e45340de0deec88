"""Nearest neighbours by dot product. A backend proposes, one float64 rescoring decides: every exact backend gives the same neighbours.

ScaNN (Guo et al. 2020) is the index on Linux at every size; numpy serves where it has no wheel. An index is immutable and rebuilt for
each snapshot of the pool: building takes milliseconds, and a serialised ScaNN index holds absolute paths.
"""
from __future__ import annotations

import contextlib
import math
import sys
from typing import Any, Callable, Iterator, Sequence

import numpy as np

from isara_jax.common import UserError

# queries [m, d], count -> for each query the numbers of `count` near rows (a tree may find fewer)
Propose = Callable[[np.ndarray, int], list[np.ndarray]]

MARGIN = 16        # neighbours proposed beyond those asked for
DIGITS = 6         # scores are rounded to so many, so that the order does not hang on the last bits
NOISE = 1e-5       # more than a float32 dot product of unit vectors and the rounding can be off by
EXACT_UP_TO = 50_000  # vectors that ScaNN searches by brute force (exact, under 1 ms a query); beyond, a tree with asymmetric hashing
NUMPY_BLOCK = 1024    # queries multiplied at a time by the numpy backend


class Index:
    """Vectors with names, searched by dot product. Made by `build`.

    Attributes:
        ids: name of each row.
        vectors: [n, d] float32.
        backend: "scann" or "numpy".
        reason: why that backend, for the log.
    """

    def __init__(self, vectors: np.ndarray, ids: Sequence[str], backend: str, reason: str, propose: Propose):
        self.ids, self.vectors, self.backend, self.reason, self._propose = tuple(ids), vectors, backend, reason, propose
        self._row = {name: row for row, name in enumerate(self.ids)}

    def __len__(self) -> int:
        return len(self.ids)

    def vector(self, name: str) -> np.ndarray:
        """The vector [d] of a name."""
        return self.vectors[self._row[name]]

    def search(self, queries: np.ndarray, k: int, *, exclude: Sequence[str | None] | None = None) -> list[list[tuple[str, float]]]:
        """The k best rows (all, where there are fewer) of each query: (id, score), best first, ties by id.

        Args:
            queries: [m, d], finite.
            exclude: one id (or None) for each query that is never among its neighbours: the query itself.
        """
        queries = _checked(queries, self.vectors.shape[1])
        if exclude is not None and len(exclude) != len(queries):
            raise ValueError(f"{len(exclude)} ids to exclude for {len(queries)} queries")
        wanted = k + (exclude is not None)
        found: list[list[tuple[str, float]]] = [[] for _ in queries]
        count, pending = min(wanted + MARGIN, len(self)), list(range(len(queries))) if k > 0 else []
        while pending and count:
            unsettled = []
            for query, rows in zip(pending, self._propose(queries[pending], count), strict=True):
                found[query] = self._ranked(queries[query], rows)
                # a near-tie that reaches beyond the proposal might hide a row that the order by id would put first
                if len(rows) == count < len(self) and found[query][-1][1] > found[query][wanted - 1][1] - NOISE:
                    unsettled.append(query)
            pending, count = unsettled, min(4 * count, len(self))
        barred = [None] * len(queries) if exclude is None else exclude
        return [[pair for pair in pairs if pair[0] != bar][:k] for pairs, bar in zip(found, barred, strict=True)]

    def _ranked(self, query: np.ndarray, rows: np.ndarray) -> list[tuple[str, float]]:
        """Rows as (id, score) with float64 scores, best first. A row's sum is taken alone, so its bits do not depend on the others."""
        scores = np.round((self.vectors[rows].astype(np.float64) * query.astype(np.float64)).sum(axis=1), DIGITS) + 0.0  # no -0.0
        return sorted(((self.ids[row], score) for row, score in zip(rows.tolist(), scores.tolist())), key=lambda pair: (-pair[1], pair[0]))


def build(vectors: np.ndarray, ids: Sequence[str], *, backend: str = "auto") -> Index:
    """An index over vectors [n, d] (unit float32 rows; n may be 0) named by `ids`.

    Args:
        backend: "scann", "numpy", or "auto": scann where it can be imported, else numpy.

    Raises `UserError` when scann is asked for and not there, `ValueError` for shapes, names or numbers that cannot be.
    """
    vectors = np.ascontiguousarray(vectors, np.float32)
    if vectors.ndim != 2 or len(vectors) != len(ids) or len(set(ids)) != len(ids):
        raise ValueError(f"vectors {vectors.shape} and {len(ids)} ids, {len(set(ids))} of them distinct")
    _checked(vectors, vectors.shape[1])
    reason = "as configured"
    if backend == "auto":
        try:
            _scann()
            backend, reason = "scann", "it can be imported"
        except ImportError as e:
            backend, reason = "numpy", f"scann cannot be imported ({e})"
    if backend == "numpy":
        return Index(vectors, ids, backend, reason, _numpy(vectors))
    try:
        return Index(vectors, ids, backend, reason, _scann_searcher(_scann(), vectors) if len(ids) else _numpy(vectors))
    except ImportError as e:
        raise UserError(f"config.retrieval.index='scann', but scann cannot be imported ({e}). On Linux: pip install scann. Elsewhere it "
                        "has no wheel: set --config.retrieval.index=auto (numpy then; the neighbours are the same).") from None


def _checked(vectors: np.ndarray, width: int) -> np.ndarray:
    """Vectors as float32 [m, width]; anything that is no number is refused, because in a tree build ScaNN would end the process."""
    vectors = np.asarray(vectors, np.float32)
    if vectors.ndim != 2 or vectors.shape[1] != width:
        raise ValueError(f"vectors of shape {vectors.shape}, expected [m, {width}]")
    if not (finite := np.isfinite(vectors).all(axis=1)).all():
        raise ValueError(f"vector {int(np.argmin(finite))} of {len(vectors)} holds NaN or infinity")
    return vectors


# ------------------------------------------------------------------------------------------------------------------------ backends
def _numpy(vectors: np.ndarray) -> Propose:
    """Exact search by matrix product."""

    def propose(queries: np.ndarray, count: int) -> list[np.ndarray]:
        rows: list[np.ndarray] = []
        for at in range(0, len(queries), NUMPY_BLOCK):
            scores = queries[at:at + NUMPY_BLOCK] @ vectors.T
            rows.extend(np.argpartition(-scores, count - 1, axis=1)[:, :count])
        return rows

    return propose


def _scann_searcher(scann: Any, vectors: np.ndarray) -> Propose:
    """ScaNN: brute force; for large pools a tree with anisotropic hashing and exact reordering (trees need more points than leaves)."""
    builder = scann.scann_ops_pybind.builder(vectors, 1, "dot_product")
    if len(vectors) <= EXACT_UP_TO:
        searcher = builder.score_brute_force().build()
        return lambda queries, count: list(searcher.search_batched(queries, final_num_neighbors=count)[0].astype(np.int64))
    leaves = round(math.sqrt(len(vectors)))
    searcher = (builder.tree(num_leaves=leaves, num_leaves_to_search=max(leaves // 5, 1), training_sample_size=min(len(vectors), 250_000))
                .score_ah(2, anisotropic_quantization_threshold=0.2).reorder(MARGIN).build())

    def propose(queries: np.ndarray, count: int) -> list[np.ndarray]:
        rows, scores = searcher.search_batched(queries, final_num_neighbors=count, pre_reorder_num_neighbors=8 * count)
        return [r[np.isfinite(s)].astype(np.int64) for r, s in zip(rows, scores)]  # leaves with too few rows are filled up with NaN

    return propose


def _scann() -> Any:
    """The scann module. Its import is spared TensorFlow: it needs none, and where TensorFlow 2.21 is installed importing both crashes."""
    with _hidden("tensorflow"):
        import scann
    return scann


@contextlib.contextmanager
def _hidden(name: str) -> Iterator[None]:
    """A block in which importing `name` fails as if it were not installed."""
    missing = object()
    before = sys.modules.get(name, missing)
    sys.modules[name] = None
    try:
        yield
    finally:
        if before is missing:
            del sys.modules[name]
        else:
            sys.modules[name] = before
