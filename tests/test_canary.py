"""What DESIGN rule 1 rests on: which shapes of a product, a sum or a loop give a row the same bits on XLA:CPU.

Nobody promises these classes; they were measured. When one of these tests fails after an upgrade of jaxlib or on another kind of CPU, the
message says what no longer holds, and `isara_jax/decode/attention.py` must be changed before its results are bit-identical again.
"""
from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isara_jax.decode import attention
from isara_jax.models.layers import Layer

pytestmark = pytest.mark.skipif(jax.default_backend() != "cpu", reason="the classes are those of XLA:CPU")
DTYPES = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
BROKEN = "jaxlib {}: {} no longer gives the bits it gave; see the first lines of tests/test_canary.py"


@jax.jit
def scores(q_BKRH, k_BKHW):
    return jnp.einsum("BKRH,BKHW->BKRW", q_BKRH, k_BKHW, preferred_element_type=jnp.float32)


@jax.jit
def values(p_BKRW, v_BKWH):
    return jnp.einsum("BKRW,BKWH->BKRH", p_BKRW, v_BKWH, preferred_element_type=jnp.float32)


@jax.jit
def product(x_MD, w_DF):
    return jnp.dot(x_MD, w_DF, preferred_element_type=jnp.float32)


def normal(dtype, *shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32).astype(dtype)


def same(what, *arrays):
    first, *others = map(np.asarray, arrays)
    assert all((first == other).all() for other in others), BROKEN.format(jax.lib.__version__, what)


# ------------------------------------------------------------------------------------------------------------- products of attention
@DTYPES
@pytest.mark.parametrize("H", [64, 128])
def test_products_of_2_to_32_rows(dtype, H):
    """The queries of one row (G of them) or of the members of a group (up to 32) against a block of 128 keys."""
    q, k, p, v = (normal(dtype, 2, 3, *shape, seed=i) for i, shape in enumerate(((32, H), (H, 128), (32, 128), (128, H))))
    whole = scores(q, k), values(p, v)
    for rows in (2, 3, 4, 8, 9, 16, 27, 30):
        for at in (0, 32 - rows):
            part = slice(at, at + rows)
            what = f"a product of {rows} rows of width {H} in {dtype}, among 32 rows,"
            same(f"scores: {what}", scores(q[:, :, part], k), whole[0][:, :, part])
            same(f"values: {what}", values(p[:, :, part], v), whole[1][:, :, part])


@DTYPES
def test_products_in_any_batch(dtype):
    """A row alone, in a tile of 16 at any place, and among the 8 groups."""
    q, k, p, v = (normal(dtype, 16, 3, *shape, seed=i) for i, shape in enumerate(((3, 64), (64, 128), (3, 128), (128, 64))))
    whole = scores(q, k), values(p, v)
    for part in (slice(5, 6), slice(0, 8), slice(3, 16), slice(15, 16)):
        what = f"rows {part.start} to {part.stop} of a batch of 16 in {dtype}"
        same(f"scores: {what}", scores(q[part], k[part]), whole[0][part])
        same(f"values: {what}", values(p[part], v[part]), whole[1][part])
    order = np.random.default_rng(0).permutation(16)
    same(f"a batch in another order in {dtype}", scores(q[order], k[order]), whole[0][order])


# ------------------------------------------------------------------------------------------------------------------ other products
@DTYPES
@pytest.mark.parametrize("shape", [(576, 576), (576, 192), (576, 1536), (1536, 576), (576, 49152)], ids=str)
def test_products_of_weights(dtype, shape):
    """Rows of SmolLM2's products: 64 slots, one chunk of 128, 512 tokens prefilled; in any order and among any others."""
    w, rows = normal(dtype, *shape, seed=1), (64, 128, 512) if shape[1] < 49152 else (64, 128)
    x = normal(dtype, rows[-1], shape[0])
    whole = np.asarray(product(x, w))
    for M in rows:
        same(f"{M} rows times {shape} in {dtype}, among {rows[-1]} rows,", product(x[:M], w), whole[:M])
    order = np.random.default_rng(0).permutation(64)
    same(f"64 rows times {shape} in {dtype}, in another order,", product(x[order], w), whole[order])


# ------------------------------------------------------------------------------------------------------------------ sums and loops
def walk(q_BKRH, k_NKHW, v_NKWH, table_BC, seen_B, dtype, last):
    """The running softmax of rows that see so many keys, after `last` blocks."""
    W = k_NKHW.shape[-1]
    visible = lambda c: (c * W + jnp.arange(W) < seen_B[:, None])[:, None, None]
    start = attention._nothing(*q_BKRH.shape)
    return attention._walk(start, q_BKRH, k_NKHW, v_NKWH, table_BC, 0, last, visible, Layer(0, 0, 0.1, 0.0, None), dtype)


def pool(dtype, B, K, R, W=128, H=64):
    shapes = ((B, K, R, H), (6, K, H, W), (6, K, W, H))
    q, k, v = (normal(dtype, *shape, seed=i) for i, shape in enumerate(shapes))
    return q, *(jax.lax.bitcast_convert_type(x, jnp.uint16) if dtype == "bfloat16" else x for x in (k, v))


@DTYPES
def test_blocks_that_a_row_does_not_see(dtype):
    """They leave the largest score, the sum and the values exactly as they were, whoever the mates are and however far they go."""
    q, k, v = pool(dtype, 16, 3, 3)
    table = jnp.asarray(np.random.default_rng(0).permuted(np.tile(np.arange(6), (16, 1)), axis=1), jnp.int32)
    seen = jnp.asarray([130, 0, 600, *range(1, 14)], jnp.int32)
    run = jax.jit(lambda q, table, seen, last: walk(q, k, v, table, seen, dtype, last))
    short, long = run(q, table, seen, 2), run(q, table, seen, 6)
    for a, b in zip(short, long):
        same(f"a block without a visible key in {dtype}", np.delete(a, 2, axis=0), np.delete(b, 2, axis=0))
    order = np.random.default_rng(1).permutation(16)
    for a, b in zip(long, run(q[order], table[order], seen[order], 6)):
        same(f"a loop over blocks with the rows in another order in {dtype}", np.asarray(a)[order], b)


@DTYPES
@pytest.mark.parametrize("K, R", [(3, 3), (1, 8), (4, 2)], ids=str)
def test_loops_over_the_blocks_of_few_rows(dtype, K, R):
    """1, 2 or 3 rows by themselves, for example in the last tile of 17 to 19 slots: their sums have fewer than 4096 terms in all."""
    q, k, v = pool(dtype, 16, K, R)
    table, seen = jnp.tile(jnp.arange(3, dtype=jnp.int32), (16, 1)), jnp.arange(250, 266)
    run = jax.jit(lambda q, table, seen: walk(q, k, v, table, seen, dtype, 3))
    whole = run(q, table, seen)
    for rows in (1, 2, 3):
        for name, a, b in zip(("largest score", "sum of weights", "values"), run(q[:rows], table[:rows], seen[:rows]), whole):
            same(f"the {name} of {rows} rows of {K} x {R} queries in {dtype}, among 16 rows,", a, b[:rows])


def test_a_row_by_itself_has_bits_of_its_own():
    """Why one query to a key head is padded to two: in bfloat16 a product of one row is another program. If not, the padding can go."""
    q, k = normal("bfloat16", 2, 3, 32, 64), normal("bfloat16", 2, 3, 64, 128, seed=1)
    assert (np.asarray(scores(q[:, :, :1], k)) != np.asarray(scores(q, k))[:, :, :1]).any()
