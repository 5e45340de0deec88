"""Batching: who shares a step, how pairs are packed, which positions are supervised."""
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isara_jax.common import UserError
from isara_jax.data.batching import Example, check, collate, epochs, in_order, layouts, pack

THREE = [Example((5, 6, 7, 8, 9), 2), Example((3, 1, 0), 1), Example((0, 0, 0, 2), 3)]


def of_lengths(lengths):
    return [Example(tuple(range(n + 1)), 1) for n in lengths]


def test_a_batch_by_hand():
    batch = collate(THREE, rows=2, width=6)
    assert batch.tokens.tolist() == [[5, 6, 7, 8, 3, 1], [0, 0, 0, 0, 0, 0]]
    assert batch.targets.tolist() == [[6, 7, 8, 9, 1, 0], [0, 0, 2, 0, 0, 0]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 0, 1], [0, 1, 2, 0, 0, 0]]
    assert batch.segments.tolist() == [[1, 1, 1, 1, 2, 2], [1, 1, 1, 0, 0, 0]]
    assert batch.loss_mask.astype(int).tolist() == [[0, 1, 1, 1, 1, 1], [0, 0, 1, 0, 0, 0]]


def test_masks_come_from_lengths_and_not_from_ids():
    zeros = collate([Example((0, 0, 0, 0), 2)], rows=1, width=5)
    assert zeros.loss_mask.astype(int).tolist() == [[0, 1, 1, 0, 0]]


@given(st.lists(st.integers(1, 300), min_size=1, max_size=40), st.integers(1, 9), st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_every_pair_is_in_its_batch_whole_and_alone(lengths, batch, devices):
    examples = of_lengths(lengths)
    steps = epochs(examples, batch, 1, seed=3)
    for members, (rows, width) in zip(steps, layouts(examples, steps, devices), strict=True):
        made = collate([examples[i] for i in members], rows, width)
        found = [made.tokens[r][made.segments[r] == s].tolist() for r in range(rows) for s in range(1, made.segments[r].max() + 1)]
        assert sorted(found) == sorted(list(examples[i].tokens[:-1]) for i in members)
        assert rows % devices == 0 and width & (width - 1) == 0
        assert made.loss_mask.sum() == sum(len(examples[i].tokens) - 1 for i in members)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=60), st.integers(1, 16), st.integers(0, 2**40))
@settings(max_examples=60, deadline=None)
def test_an_epoch_has_every_pair_once_in_even_steps(lengths, batch, seed):
    examples = of_lengths(lengths)
    steps = epochs(examples, batch, 2, seed)
    half = len(steps) // 2
    assert half == -(-len(lengths) // batch)
    for epoch in (steps[:half], steps[half:]):
        assert sorted(i for step in epoch for i in step) == list(range(len(lengths)))
        sizes = [len(step) for step in epoch]
        assert max(sizes) <= batch and max(sizes) - min(sizes) <= 1


def test_seed_and_epoch_decide_the_order():
    examples = of_lengths([7] * 20)
    a, b, c = epochs(examples, 4, 2, 0), epochs(examples, 4, 2, 0), epochs(examples, 4, 2, 1)
    assert a == b and a != c and a[:5] != a[5:]


def test_steps_have_nearly_the_same_number_of_tokens():
    rng = np.random.default_rng(0)
    examples = of_lengths(rng.integers(20, 120, 96).tolist())
    totals = [sum(examples[i].inputs for i in step) for step in epochs(examples, 16, 1, 0)]
    assert max(totals) < 1.1 * min(totals)
    steps = epochs(examples, 16, 1, 0)
    cells = sum(rows * width for rows, width in layouts(examples, steps, 1))
    assert sum(totals) / cells > 0.8 and len(set(layouts(examples, steps, 1))) == 1


def test_packing_takes_the_fullest_row_that_fits():
    assert pack([4, 3, 5, 2, 2], 8) == [[2, 1], [0, 3, 4]]
    assert pack([8, 8], 8) == [[0], [1]]


def test_in_order_keeps_the_order():
    assert in_order(5, 2) == [[0, 1], [2, 3], [4]]


def test_widths_grow_by_powers_of_two():
    examples = of_lengths([5, 128, 129, 1000])
    assert layouts(examples, [[0], [1], [2], [3]], 2) == [(2, 128), (2, 128), (2, 256), (2, 1024)]


def test_what_cannot_be_trained_on_is_an_error():
    with pytest.raises(ValueError, match="prompt_length=3 of 3 tokens"):
        Example((1, 2, 3), 3)
    with pytest.raises(ValueError, match="prompt_length=0"):
        Example((1, 2, 3), 0)
    with pytest.raises(ValueError, match="do not make a batch"):
        collate([], 1, 8)
    with pytest.raises(ValueError, match="do not make a batch of 1 rows of 8"):
        collate(of_lengths([8, 8]), 1, 8)
    with pytest.raises(UserError, match=r"2 of 4 pairs do not fit the context of 6 tokens: pair 1 \(8 tokens\), pair 3 \(10 tokens\)"):
        check(of_lengths([2, 7, 5, 9]), 6)
    with pytest.raises(UserError, match="no question-answer pairs"):
        check([], 6)
