"""The stop rule: each reason, its message, and when it stays silent."""
from isara_jax.stop import Outcome, StopRule


def outcome(t=1, kept=50, held_out=None, rejected=""):
    return Outcome(iteration=t, requests=100, kept=kept, held_out=held_out, rejected=rejected)


def test_goes_on_before_the_first_iteration_and_until_the_last():
    rule = StopRule(iterations=2, min_yield=0.05, patience=0)
    assert rule.reason(None, []) is None
    assert rule.reason(None, [outcome(1)]) is None
    assert rule.reason(None, [outcome(1), outcome(2)]) == "stop.iterations=2 reached"


def test_a_round_that_keeps_nothing_says_what_rejected_most():
    reason = StopRule(9, 0.0, 0).reason(None, [outcome(1, kept=0, rejected="question novelty")])
    assert reason == "iteration 1 kept none of 100 requests; most were rejected by question novelty"


def test_yield_under_the_threshold_stops_and_at_the_threshold_does_not():
    rule = StopRule(9, min_yield=0.05, patience=0)
    assert rule.reason(None, [outcome(kept=5)]) is None
    assert rule.reason(None, [outcome(kept=4)]) == "the yield of iteration 1, 4.0%, is under stop.min_yield=5.0%"


def test_patience_counts_iterations_without_a_new_lowest_loss():
    rule = StopRule(9, 0.0, patience=2)
    falling = [outcome(1, held_out=2.0), outcome(2, held_out=1.9)]
    assert rule.reason(2.5, falling) is None
    worse = [*falling, outcome(3, held_out=1.95)]
    assert rule.reason(2.5, worse) is None
    assert "did not fall for 2 iteration(s): 2.5000 -> 2.0000 -> 1.9000 -> 1.9500 -> 1.9000" in rule.reason(2.5, [*worse, outcome(4, held_out=1.9)])


def test_without_held_out_seeds_patience_is_silent():
    assert StopRule(9, 0.0, patience=1).reason(None, [outcome(1), outcome(2)]) is None
