"""MC1 and MC2 by hand, against lm-evaluation-harness's own task code, and what stands in for a question."""
import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isara_jax.data.items import Item
from isara_jax.evals import mc

LLS = st.floats(-300, 0, allow_nan=False)


def items(*questions):
    return [Item(question=q, answer=str(i)) for i, q in enumerate(questions)]


def test_mc1_is_one_where_the_likeliest_choice_is_right():
    assert mc.mc1([-1.0, -2.0, -3.0], [True, False, False]) == 1.0
    assert mc.mc1([-2.0, -1.0, -3.0], [True, False, False]) == 0.0
    assert mc.mc1([-2.0, -1.0, -3.0], [False, True, False]) == 1.0


def test_of_equally_likely_choices_the_first_counts():
    assert mc.mc1([-1.0, -1.0], [True, False]) == 1.0
    assert mc.mc1([-1.0, -1.0], [False, True]) == 0.0


def test_mc2_is_the_share_of_probability_on_right_choices():
    lls = [math.log(0.1), math.log(0.3), math.log(0.2)]
    assert mc.mc2(lls, [True, False, True]) == pytest.approx(0.5)
    assert mc.mc2(lls, [True, True, True]) == 1.0


def test_mc2_of_long_answers_does_not_underflow():
    assert mc.mc2([-2000.0, -2000.0 + math.log(3)], [True, False]) == pytest.approx(0.25)


def test_conditioned_is_what_the_question_adds():
    own, blind = [-10.0, -4.0], [-14.0, -5.0]  # the true choice is rare anyway, and much likelier after its question
    assert mc.conditioned(own, blind) == [4.0, 1.0]
    assert mc.mc1(own, [True, False]) == 0.0 and mc.mc1(mc.conditioned(own, blind), [True, False]) == 1.0


@settings(deadline=None)
@given(st.lists(LLS, min_size=2, max_size=8), st.floats(-50, 50))
def test_a_model_that_ignores_the_question_is_at_even_odds_when_conditioned(lls, shift):
    labels = [True] + [False] * (len(lls) - 1)
    assert mc.mc2(mc.conditioned(lls, lls), labels) == pytest.approx(mc.chance(labels))
    assert mc.mc2([x + shift for x in lls], labels) == pytest.approx(mc.mc2(lls, labels))  # only differences between choices count


# ------------------------------------------------------------------------------------------------------------------ lm-evaluation-harness
@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """lm_eval's truthfulqa_mc1 and truthfulqa_mc2 as it builds them from its own YAML, over two rows of ours in place of the hub's data."""
    lm_eval, yaml = pytest.importorskip("lm_eval"), pytest.importorskip("yaml")
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks.truthfulqa import utils

    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    targets = {"choices": ["Yes.", "No.", "Perhaps."], "labels": [1, 0, 0]}
    file.write_text("".join(json.dumps({"question": q, "mc1_targets": targets, "mc2_targets": targets}) + "\n" for q in "ab"))
    text = (Path(lm_eval.__file__).parent / "tasks/truthfulqa/truthfulqa_mc1.yaml").read_text()
    local = {"dataset_path": "json", "dataset_name": None,
             "dataset_kwargs": {"data_files": {"validation": str(file)}, "cache_dir": str(file.parent)}}
    config = yaml.safe_load(text) | local
    second = config | {"doc_to_choice": "{{mc2_targets.choices}}", "process_results": utils.process_results_mc2}  # as its YAML has it
    return {"mc1": ConfigurableTask(config=config), "mc2": ConfigurableTask(config=second)}


@settings(deadline=None)
@given(data=st.data(), n=st.integers(2, 10))
def test_mc1_and_mc2_equal_the_task_code_of_lm_eval_on_the_same_log_likelihoods(tasks, data, n):
    """Theirs: ConfigurableTask.process_results with argmax for mc1, and utils.process_results_mc2. No model of theirs runs."""
    lls = data.draw(st.lists(LLS, min_size=n, max_size=n))
    labels = data.draw(st.lists(st.booleans(), min_size=n, max_size=n).filter(any))
    first = [True] + [False] * (n - 1)
    doc = {"question": "a", "mc1_targets": {"choices": [f"{i}." for i in range(n)], "labels": [int(x) for x in first]},
           "mc2_targets": {"choices": [f"{i}." for i in range(n)], "labels": [int(x) for x in labels]}}
    results = [(ll, False) for ll in lls]
    assert tasks["mc1"].process_results(doc, results)["acc"] == mc.mc1(lls, first)
    with np.errstate(all="ignore"):
        assert tasks["mc2"].process_results(doc, results)["acc"] == pytest.approx(mc.mc2(lls, labels), rel=1e-9, abs=1e-12)


# --------------------------------------------------------------------------------------------------------------------------- partners
def test_each_row_takes_the_question_of_the_next_one_by_id():
    rows = items("a", "b", "c", "d")
    circle = sorted(range(4), key=lambda i: rows[i].id)
    found = mc.partners(rows)
    assert [found[i] for i in circle] == [circle[1], circle[2], circle[3], circle[0]]


def test_rows_of_one_prompt_do_not_stand_in_for_each_other():
    rows = items("a", "A ", "b", "a")
    assert [rows[p].group for i, p in enumerate(mc.partners(rows)) if rows[i].group == rows[0].group] == [rows[2].group] * 3


def test_rows_of_one_prompt_alone_have_no_partner():
    assert mc.partners(items("a")) == [None] and mc.partners(items("a", "A")) == [None, None] and mc.partners([]) == []


@settings(deadline=None)
@given(st.lists(st.sampled_from("abcdefgh"), min_size=2, max_size=12), st.randoms())
def test_partners_depend_on_the_set_of_rows_alone(questions, random):
    rows = items(*questions)
    shuffled = random.sample(rows, len(rows))
    pair = lambda rows: {r.id: None if p is None else rows[p].question for r, p in zip(rows, mc.partners(rows))}
    assert pair(rows) == pair(shuffled)
    for row, partner in zip(rows, mc.partners(rows)):
        assert partner is None or rows[partner].group != row.group


@settings(deadline=None)
@given(st.sets(st.text(st.characters(categories=["L"], max_codepoint=122), min_size=1), min_size=2))
def test_where_every_prompt_is_another_each_question_is_taken_once(questions):
    rows = [Item(question=q) for q in sorted({q.casefold() for q in questions})]
    if len(rows) > 1:
        assert sorted(mc.partners(rows)) == list(range(len(rows)))
