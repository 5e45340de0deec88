"""Shares and win rates: against scipy's exact tests, and by adding up every outcome there can be."""
from __future__ import annotations

import pytest
from scipy.stats import binom, binomtest

from isara_jax.evals import winrate


@pytest.mark.parametrize("hits, count", [(0, 1), (1, 1), (0, 10), (3, 10), (10, 10), (38, 50), (1, 300), (150, 300)])
def test_a_share_has_the_exact_interval(hits, count):
    found, exact = winrate.share(hits, count), binomtest(hits, count).proportion_ci(0.95, "exact")
    assert (found.value, found.low, found.high) == pytest.approx((hits / count, exact.low, exact.high), abs=1e-9)


@pytest.mark.parametrize("wins, losses", [(0, 0), (1, 0), (3, 3), (0, 6), (15, 5), (14, 6), (61, 39), (200, 300)])
def test_the_sign_test_is_scipys(wins, losses):
    expected = binomtest(wins, wins + losses).pvalue if wins + losses else 1.0
    assert winrate.sign_test(wins, losses) == pytest.approx(expected, abs=1e-12)


def test_nothing_counted_is_no_share_and_no_rate():
    nothing = {"hits": 0, "count": 0, "value": None, "low": None, "high": None}
    assert winrate.share(0, 0).to_dict() == nothing
    assert winrate.win_rate(0, 0, 0).to_dict() == {"wins": 0, "losses": 0, "ties": 0, "rate": None, "without_ties": nothing, "p": 1.0,
                                                   "needed": None, "detectable": None}


def test_ties_count_half_in_the_rate_and_not_at_all_in_the_interval():
    without, with_ties = winrate.win_rate(15, 5, 0), winrate.win_rate(15, 5, 20)
    assert (without.rate, with_ties.rate) == (0.75, 0.625)
    assert with_ties.without_ties == without.without_ties == winrate.share(15, 20)
    assert with_ties.p == without.p == pytest.approx(0.041389, abs=1e-6)


def test_ties_alone_are_one_half_and_no_finding():
    found = winrate.win_rate(0, 0, 7)
    assert (found.rate, found.without_ties.low, found.p, found.needed) == (0.5, None, 1.0, None)


def test_interval_and_test_agree_for_every_result_of_up_to_40_decisions():
    for n in range(1, 41):
        for wins in range(n + 1):
            found = winrate.win_rate(wins, n - wins, 3)
            assert (found.without_ties.low <= 0.5 <= found.without_ties.high) == (found.p > 0.05), (wins, n)


@pytest.mark.parametrize("share", [0.02, 0.1, 0.37, 0.5, 0.8, 0.95])
@pytest.mark.parametrize("count", [5, 20, 75])
def test_the_interval_holds_the_true_share_in_at_least_95_percent_of_samples(share, count):
    held = sum(binom.pmf(hits, count, share) for hits in range(count + 1)
               if winrate.share(hits, count).low <= share <= winrate.share(hits, count).high)
    assert held >= 0.95


@pytest.mark.parametrize("decided, needed", [(0, None), (5, None), (6, 6), (9, 8), (10, 9), (20, 15), (50, 33), (100, 61)])
def test_what_so_many_decisions_need(decided, needed):
    assert winrate.needed_wins(decided) == needed
    if needed is not None:
        assert binomtest(needed, decided).pvalue <= 0.05 < binomtest(needed - 1, decided).pvalue
        shown = winrate.win_rate(decided, 0, 0).detectable
        assert binom.sf(needed - 1, decided, shown) == pytest.approx(0.8, abs=1e-9)


@pytest.mark.parametrize("call", [lambda: winrate.share(3, 2), lambda: winrate.share(-1, 2), lambda: winrate.win_rate(1, -1, 0)])
def test_counts_that_cannot_be_are_refused(call):
    with pytest.raises(ValueError):
        call()
