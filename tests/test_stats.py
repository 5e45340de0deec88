"""Intervals, the paired test and Holm's correction on numbers worked out by hand, and their promises on simulated rows."""
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from isara_jax.evals import stats
from isara_jax.evals.stats import bootstrap, holm, paired, smallest_p


def means(a, b, groups=None, **options):
    """Compare two lists of values, one group a row unless told otherwise."""
    return paired(a, [1] * len(a), b, [1] * len(b), range(len(a)) if groups is None else groups, **options)


# ------------------------------------------------------------------------------------------------------------------------- holm
def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])  # 3 x 0.01; 2 x 0.03; 1 x 0.04, raised to the one before it
    assert holm([0.5, 0.02]) == pytest.approx([0.5, 0.04])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([0.2]) == [0.2] and holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_keeps_order_and_never_helps(ps):
    adjusted = holm(ps)
    assert all(p <= q <= 1 for p, q in zip(ps, adjusted))
    order = sorted(range(len(ps)), key=ps.__getitem__)
    assert all(adjusted[i] <= adjusted[j] for i, j in itertools.pairwise(order))
    assert adjusted[order[0]] == min(1.0, len(ps) * ps[order[0]])


def test_holm_refuses_what_is_no_p():
    with pytest.raises(ValueError, match="between 0 and 1"):
        holm([0.1, float("nan")])


# ----------------------------------------------------------------------------------------------------------------------- paired
@pytest.mark.parametrize("differences, p", [
    ([1, 2, 3], 2 / 8),    # only +++ and --- are as far out as 6
    ([3, 1, -1], 6 / 8),   # of |3 + 1 + 1|, |3 + 1 - 1|, |3 - 1 + 1|, |3 - 1 - 1|, each twice, all but the last reach 3
    ([1, 2, -3], 1.0),     # nothing is less far out than 0
    ([0, 0, 0], 1.0),
])
def test_the_sign_flip_test_by_hand(differences, p):
    made = means(differences, [0, 0, 0])
    assert made.p == p and made.difference == pytest.approx(sum(differences) / 3)
    assert (made.groups, made.rows) == (3, 3)


def test_equal_models_differ_by_nothing():
    made = means([0.1, 0.7, 0.3], [0.1, 0.7, 0.3])
    assert (made.difference, made.low, made.high, made.p, made.detectable) == (0, 0, 0, 1, 0)


def test_rows_of_a_group_flip_together():
    """Rows +1 +2 | +3 are two groups: of the four patterns ++ and -- are as far out."""
    assert means([1, 2, 3], [0, 0, 0], ["a", "a", "b"]).p == 2 / 4


def test_one_group_says_nothing_of_how_groups_differ():
    made = means([1, 2], [0, 0], ["a", "a"])
    assert (made.difference, made.low, made.high, made.p, made.detectable) == (1.5, None, None, 1.0, None)
    assert bootstrap([1, 2], [1, 1], ["a", "a"]) == (None, None)


def test_the_detectable_difference_by_hand():
    """Differences 1, 2, 3, 6: variance 14 / 3, standard error sqrt(14 / 12); z 1.959964 + 0.841621."""
    assert means([1, 2, 3, 6], [0, 0, 0, 0]).detectable == pytest.approx(2.801585 * 1.0801234, rel=1e-6)


def test_ratios_weigh_rows_by_their_denominators():
    """6 nats over 4 tokens against 8 over 4, not the mean of the rows' own ratios; equal denominators cancel as in a mean."""
    made = paired([5, 1], [2, 2], [6, 2], [2, 2], ["a", "b"])
    assert made.difference == 6 / 4 - 8 / 4
    assert made.p == 2 / 4 and (made.low, made.high) == (-0.5, -0.5)  # both rows differ by half a nat a token
    uneven = paired([1, 9], [1, 3], [2, 2], [2, 1], ["a", "b"])
    assert uneven.difference == pytest.approx(10 / 4 - 4 / 3)


def test_exact_and_random_flips_agree(monkeypatch):
    a = [0.9, 0.2, 0.8, 0.4, 0.6, 0.7, 0.1, 0.5, 0.9, 0.3]
    b = [0.5, 0.3, 0.6, 0.1, 0.7, 0.2, 0.2, 0.4, 0.5, 0.1]
    exact = means(a, b).p
    total = abs(sum(x - y for x, y in zip(a, b)))
    patterns = [abs(sum(s * (x - y) for s, x, y in zip(signs, a, b))) for signs in itertools.product((1, -1), repeat=10)]
    assert exact == sum(p >= total - 1e-9 for p in patterns) / 1024
    monkeypatch.setattr(stats, "EXACT", 0)
    assert means(a, b).p == pytest.approx(exact, abs=0.006)  # three standard errors of 10,000 flips at so small a p


def test_the_least_p_is_reached_when_every_group_agrees():
    assert smallest_p(3) == 0.25 == means([1, 1, 1], [0, 0, 0]).p
    assert smallest_p(40) == 1 / 10_001 == means([1] * 40, [0] * 40).p


def test_sides_swap_signs():
    a, b, groups = [1, 0, 1, 1, 0.5], [0, 0, 1, 0, 0.7], [1, 1, 2, 3, 4]
    one, other = means(a, b, groups), means(b, a, groups)
    assert (one.difference, one.low, one.high) == pytest.approx((-other.difference, -other.high, -other.low))
    assert one.p == other.p and one.detectable == pytest.approx(other.detectable)


@pytest.mark.parametrize("num, den, groups, says", [
    ([], [], [], "no row"),
    ([1, 2], [1, 0], [1, 2], "denominator is not above 0"),
    ([1, float("nan")], [1, 1], [1, 2], "not a finite number"),
    ([1, 2], [1, 1], [1, 2, 3], "3 groups, and columns of length"),
])
def test_what_cannot_be_computed_is_refused(num, den, groups, says):
    with pytest.raises(ValueError, match=says):
        bootstrap(num, den, groups)
    with pytest.raises(ValueError, match=says):
        paired(num, den, num, den, groups)


# -------------------------------------------------------------------------------------------------------------------- bootstrap
def test_draws_depend_on_neither_blocks_nor_the_order_of_rows(monkeypatch):
    num, groups = [0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0], list("abcdefg")
    whole = bootstrap(num, [1] * 7, groups, draws=1000)
    assert bootstrap(num[::-1], [1] * 7, groups[::-1], draws=1000) == whole
    assert bootstrap(num, [1] * 7, groups, draws=1000, seed=1) != whole
    monkeypatch.setattr(stats, "BLOCK", 50)
    assert bootstrap(num, [1] * 7, groups, draws=1000) == whole


def test_two_groups_by_hand():
    """Values 0 and 1: a resample has mean 0, 1/2 or 1 with chances 1/4, 1/2, 1/4, so the middle 95 % reach from 0 to 1."""
    assert bootstrap([0, 1], [1, 1], ["a", "b"]) == (0, 1)
    sums = stats._resampled(np.array([[0.0], [1.0]]), 10_000, 0)[:, 0]
    assert [np.mean(sums == k) for k in (0, 1, 2)] == pytest.approx([0.25, 0.5, 0.25], abs=0.015)


def test_every_group_is_drawn_equally_often():
    counts = stats._resampled(np.eye(7), 10_000, 3)
    assert (counts.sum(axis=1) == 7).all()
    assert counts.mean(axis=0) == pytest.approx(np.ones(7), abs=0.04)     # four standard errors
    assert counts.var(axis=0) == pytest.approx(np.full(7, 6 / 7), abs=0.05)


def test_a_row_said_twice_is_not_twice_the_evidence():
    values, groups = [0.1, 1.3, 0.8, 0.2, 1.7, 0.4, 0.3, 1.1, 0.9, 1.6, 0.6, 1.2], range(12)
    once = bootstrap(values, [1] * 12, groups)
    assert bootstrap(values * 2, [1] * 24, [*groups, *groups]) == pytest.approx(once)
    low, high = bootstrap(values * 2, [1] * 24, range(24))
    assert high - low < 0.8 * (once[1] - once[0])


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    random, covered = np.random.default_rng(0), 0
    for _ in range(200):
        low, high = bootstrap(random.random(60) < 0.4, np.ones(60), range(60), draws=1000)
        covered += low <= 0.4 <= high
    assert 0.90 <= covered / 200 <= 0.99


def test_so_does_the_interval_of_a_skewed_ratio():
    """1.5 nats per token in the mean, over 1 to 30 tokens a row."""
    random, covered = np.random.default_rng(1), 0
    for _ in range(1000):
        tokens = random.integers(1, 31, 60)
        low, high = bootstrap(random.gamma(2, 0.75, 60) * tokens, tokens, range(60), draws=1000)
        covered += low <= 1.5 <= high
    assert 0.90 <= covered / 1000 <= 0.96


def test_false_findings_are_as_rare_as_alpha_says_and_only_with_groups():
    """Forty prompts of three rows each, which differ together: by prompt about 5 % are found different, by row far more."""
    random, found, naive = np.random.default_rng(2), 0, 0
    prompts = np.repeat(np.arange(40), 3)
    for _ in range(400):
        a, b = (random.normal(size=40)[prompts] + 0.3 * random.normal(size=120) for _ in "ab")
        found += means(a, b, prompts, draws=500).p <= 0.05
        naive += means(a, b, draws=500).p <= 0.05
    assert 0.02 <= found / 400 <= 0.09 < 0.15 < naive / 400


def test_the_detectable_difference_is_seen_four_times_in_five():
    random, found, shift = np.random.default_rng(3), 0, 2.801585 / np.sqrt(50)  # of differences with standard deviation 1
    for _ in range(300):
        made = means(random.normal(shift, 1, 50), np.zeros(50), draws=500)
        found += made.p <= 0.05
    assert 0.73 <= found / 300 <= 0.87
