"""What is said of a model: how rows are read, the words for every combination of outcomes, and their numbers."""
import json

import pytest

from isara_jax.evals import stats
from isara_jax.evals.quantities import QUANTITIES, table
from isara_jax.evals.verdict import sentences, verdict

MC2, NLL = QUANTITIES["mc2_cond"], QUANTITIES["nll"]
ROUGE, LOOPS = QUANTITIES["rougeL"], QUANTITIES["looping"]
LOW, HIGH = [0.25, 0.5] * 10, [0.75, 1.0] * 10  # twenty rows, half a unit apart: p is far below 0.05 (2 / 2^20, by random flips 0.0001)
MIXED = [0.75, 0.0] * 10                        # against LOW +0.5 and -0.5 in turn: no difference


def rows(values, name="mc2_cond", **more):
    return [{"id": str(i), "group": str(i), "kind": "", name: v, **more} for i, v in enumerate(values)]


def nll(values):
    return rows([4 * v for v in values], "nll", nll_tokens=4)


def said(primary, judged, baseline, control=None):
    return verdict(primary, judged, {"base": baseline}, control).comparisons[0].said


# ----------------------------------------------------------------------------------------------------------------------- reading
def test_every_quantity_is_read_by_hand():
    mc = {"mc1": 1.0, "mc2": 0.75, "mc1_blind": 0.0, "mc2_blind": 0.5, "mc1_cond": 1.0, "mc2_cond": 0.25, "mc1_chance": 0.2}
    answers = {"words": 12, "rouge1": 0.5, "rouge2": 0.25, "rougeL": 0.375, "rougeL_wrong": 0.5, "empty": 0, "looping": 1, "truncated": 0}
    unsafe = {"kind": "unsafe", **mc, **answers, "nll": 6.0, "nll_tokens": 3, "refusal": 1}
    harmless = {"kind": "harmless", "nll": 2.0, "nll_tokens": 5, "refusal": 0}
    assert table([unsafe, harmless]) == {
        **mc, "nll": 8.0 / 8, "rougeL": 0.375, "rouge1": 0.5, "rouge2": 0.25, "rougeL_diff": -0.125, "refusal_unsafe": 1.0,
        "refusal_harmless": 0.0, "words": 12.0, "empty": 0.0, "looping": 1.0, "truncated": 0.0}
    assert list(table([unsafe, harmless])) == list(QUANTITIES)


def test_a_row_without_a_quantity_is_no_part_of_it():
    assert table([{"kind": "", "mc2": 0.5, "mc2_blind": None}, {"kind": "", "refusal": 1}, {"kind": ""}]) == {"mc2": 0.5}
    assert table([]) == {}


def test_what_is_better_is_written_down():
    assert {n: q.better for n, q in QUANTITIES.items() if q.better != 1} == {
        "mc1_blind": 0, "mc2_blind": 0, "mc1_chance": 0, "words": 0, "nll": -1, "refusal_harmless": -1, "empty": -1, "looping": -1,
        "truncated": -1}


# ------------------------------------------------------------------------------------------------------------------------- words
@pytest.mark.parametrize("judged, control, words", [
    (HIGH, None, "better"),
    (HIGH, LOW, "better"),                             # beats the control
    (HIGH, HIGH, "a gain of form, not of content"),    # as good as the control
    (HIGH, [v + 1 for v in HIGH], "a gain of form, not of content"),  # worse than it
    (MIXED, None, "not distinguishable with 20 rows"),
    (MIXED, [0.0] * 20, "not distinguishable with 20 rows"),  # whatever the control
    ([0.0] * 20, None, "worse"),
    ([0.0] * 20, LOW, "worse"),
    ([0.0] * 20, [-1.0] * 20, "worse"),                # beating the control makes nothing better
])
def test_the_words_against_a_baseline(judged, control, words):
    assert said(MC2, rows(judged), rows(LOW), control and rows(control)) == words


def test_where_less_is_better_a_fall_is_a_gain():
    loops, none, always = ([v] * 20 for v in (0.5, 0.0, 1.0))
    assert said(LOOPS, rows(none, "looping"), rows(loops, "looping")) == "better"
    assert said(LOOPS, rows(always, "looping"), rows(loops, "looping")) == "worse"
    assert said(LOOPS, rows(none, "looping"), rows(loops, "looping"), rows(none, "looping")) == "a gain of form, not of content"
    assert said(LOOPS, rows(none, "looping"), rows(loops, "looping"), rows(always, "looping")) == "better"


@pytest.mark.parametrize("control", [None, HIGH, LOW])
def test_likelihood_never_says_better(control):
    control = control and nll(control)
    assert said(NLL, nll(LOW), nll(HIGH), control) == "imitates the reference style more closely"
    assert said(NLL, nll(HIGH), nll(LOW), control) == "imitates the reference style less closely"
    assert said(NLL, nll(MIXED), nll(LOW), control) == "not distinguishable with 20 rows"
    for judged in (LOW, HIGH, MIXED):
        text = " ".join(sentences(verdict(NLL, nll(judged), {"base": nll(MIXED), "icl_knn": nll(LOW)}, control)))
        assert ": better" not in text and ": worse" not in text


def test_holm_is_over_the_baselines_and_not_the_control():
    """Six rows, all on one side: p = 2 / 2^6 = 0.031. Alone that is enough, as one of two it is 0.0625; the control changes neither."""
    judged, base = rows([1.0] * 6), rows([0.5] * 6)
    alone = verdict(MC2, judged, {"base": base}, base)
    assert [(c.paired.p, c.p_adjusted, c.said) for c in alone.comparisons] == [(0.03125, 0.03125, "better")]
    two = verdict(MC2, judged, {"base": base, "icl_knn": base}, base)
    assert [(c.baseline, c.p_adjusted, c.said) for c in two.comparisons] == [
        ("base", 0.0625, "not distinguishable with 6 rows"), ("icl_knn", 0.0625, "not distinguishable with 6 rows")]


def test_alpha_is_the_level_of_both_tests():
    judged, base = rows([1.0] * 6), rows([0.5] * 6)
    assert verdict(MC2, judged, {"base": base}, None, alpha=0.03).comparisons[0].said == "not distinguishable with 6 rows"
    assert verdict(MC2, judged, {"base": base}, None, alpha=0.03125).comparisons[0].said == "better"  # p at alpha is enough
    fewer = rows([0.5, 0.5, 0.5, 0.5, 0.5, 1.0])  # the control: five of six differ, p = 2 / 2^5 = 0.0625
    assert verdict(MC2, judged, {"base": rows([0.0] * 6)}, fewer).comparisons[0].said == "a gain of form, not of content"
    assert verdict(MC2, judged, {"base": rows([0.0] * 6)}, fewer, alpha=0.07).comparisons[0].said == "better"


# -------------------------------------------------------------------------------------------------------------------------- rows
def test_rows_that_lack_the_quantity_are_left_out_on_both_sides():
    judged, base = rows([1.0, 0.5, 9.0, 0.5]), rows([0.0, 0.5, 0.0, 9.0])
    judged[3].pop("mc2_cond")
    base[2]["mc2_cond"] = None
    made = verdict(MC2, judged, {"base": base}, None).comparisons[0].paired
    assert (made.rows, made.difference) == (2, 0.5)


def test_rows_of_one_prompt_are_one_group():
    judged, base = rows([1.0] * 4), rows([0.0] * 4)
    for side in (judged, base):
        for row in side:
            row["group"] = "same" if row["id"] < "2" else row["id"]
    made = verdict(MC2, judged, {"base": base}, None)
    assert (made.comparisons[0].paired.groups, made.comparisons[0].paired.p) == (3, 0.25)
    assert "4 rows of 3 prompts" in sentences(made)[-1]


def test_other_rows_are_refused():
    judged = rows([0.5, 1.0])
    for other in (judged[::-1], judged[:1]):
        with pytest.raises(ValueError, match="rows of icl_knn are not those"):
            verdict(MC2, judged, {"base": judged, "icl_knn": other}, None)
        with pytest.raises(ValueError, match="rows of the control are not those"):
            verdict(MC2, judged, {"base": judged}, other)
    with pytest.raises(ValueError, match="rougeL is on no row"):
        verdict(ROUGE, judged, {"base": judged}, None)
    with pytest.raises(ValueError, match="mc2_blind cannot be judged by"):
        verdict(QUANTITIES["mc2_blind"], judged, {"base": judged}, None)


# -------------------------------------------------------------------------------------------------------------------------- text
def test_sentences_give_the_numbers_and_the_limits():
    """Half a unit on every row is 50 points, whatever rows are drawn."""
    made = sentences(verdict(MC2, rows(HIGH), {"base": rows(LOW), "icl_knn": rows(MIXED)}, rows(LOW)))
    assert made[0] == "against base: better; MC2 conditioned +50.0 points (95 % interval +50.0 to +50.0), p < 0.001, < 0.001 after Holm"
    assert made[1].startswith("against icl_knn: better; MC2 conditioned +50.0 points (95 % interval +")
    assert made[1].endswith("after Holm; 20 rows would show a true difference of 32.1 points four times in five")
    assert made[2].startswith("shuffled-answers control: beaten; MC2 conditioned +50.0 points (")
    assert made[3:] == ["intervals and p are over these rows (20 rows): they describe this checkpoint, not the method"]
    assert all("\n" not in line for line in made)


def test_the_control_is_spoken_of_in_any_case():
    without = sentences(verdict(MC2, rows(HIGH), {"base": rows(LOW)}, None))
    assert "the shuffled-answers control did not run, so content and form are not told apart" in without
    unbeaten = sentences(verdict(MC2, rows(HIGH), {"base": rows(LOW)}, rows(HIGH)))
    assert unbeaten[1].startswith("shuffled-answers control: not beaten, so content is not told from form; MC2 conditioned +0.0 points")


def test_a_difference_that_rounds_to_nothing_has_no_minus():
    line = sentences(verdict(MC2, rows([0.4999] * 6), {"base": rows([0.5] * 6)}, None))[0]
    assert "worse; MC2 conditioned +0.0 points (95 % interval +0.0 to +0.0)" in line


def test_less_is_better_is_said():
    line = sentences(verdict(NLL, nll(LOW), {"base": nll(HIGH)}, None))[0]
    assert "answer NLL -0.500 nats per token (95 % interval -0.500 to -0.500, less is better)" in line


def test_too_few_rows_for_any_verdict_is_said():
    few = sentences(verdict(MC2, rows([1.0] * 5), {"base": rows([0.0] * 5)}, None))
    assert "5 rows cannot give a p under 0.062 against 1 baseline(s): too few for any verdict" in few
    assert not any("too few" in line for line in sentences(verdict(MC2, rows([1.0] * 6), {"base": rows([0.0] * 6)}, None)))
    one = sentences(verdict(MC2, rows([1.0]), {"base": rows([0.0])}, None))
    assert one[0] == "against base: not distinguishable with 1 row; MC2 conditioned +100.0 points (no interval), p 1.000, 1.000 after Holm"


def test_without_a_baseline_there_is_no_verdict():
    made = verdict(MC2, rows(HIGH), {}, rows(LOW))
    assert made.comparisons == () and sentences(made) == ["no verdict on MC2 conditioned: no baseline ran"]


def test_the_record_is_json_and_holds_every_number():
    made = verdict(MC2, rows(HIGH), {"base": rows(LOW)}, rows(MIXED))
    record = made.to_dict()
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert record["comparisons"] == [{"baseline": "base", "said": "better", "difference": 0.5, "low": 0.5, "high": 0.5, "p": 0.0001,
                                      "detectable": 0.0, "groups": 20, "rows": 20, "p_adjusted": 0.0001}]
    against = stats.paired(HIGH, [1] * 20, MIXED, [1] * 20, [str(i) for i in range(20)])
    assert record["control"]["difference"] == 0.5 and record["control"]["detectable"] == round(against.detectable, 6)
    assert (record["primary"], record["alpha"]) == ("mc2_cond", 0.05)
    assert verdict(MC2, rows([1.0]), {"base": rows([0.0])}, None).to_dict()["comparisons"][0]["low"] is None
