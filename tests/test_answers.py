"""What is said of a generated answer: likeness to references, and signs of ill health."""
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isara_jax.data.items import Item
from isara_jax.data.rouge import f_measure, tokens
from isara_jax.evals.answers import judge_answer, rouge

ITEM = Item(question="Why is the sky blue?", answer="Air scatters blue light.",
            right=("Air scatters blue light.", "Blue light is scattered."), wrong=("The sky mirrors the sea.",))


def test_an_answer_is_compared_with_the_reference_it_is_most_like():
    made = judge_answer("Blue light is scattered.", "eos", ITEM)
    assert made == {"words": 4, "rouge1": 1.0, "rouge2": 1.0, "rougeL": 1.0, "rougeL_wrong": 0.0, "empty": 0, "looping": 0, "truncated": 0,
                    "refusal": 0}


def test_rouge_by_hand():
    # 3 of 4 words each way; 1 of 3 bigrams (blue light); longest common subsequence: air blue light
    assert rouge("Air bends blue light", ["Air scatters blue light."]) == {"rouge1": 0.75, "rouge2": 0.333333, "rougeL": 0.75}
    assert judge_answer("The sea", "eos", ITEM)["rougeL_wrong"] == pytest.approx(2 * 1 * 0.4 / 1.4)


def test_scripts_without_spaces_count():
    assert rouge("水は冷たい", ["水は熱い"])["rougeL"] == pytest.approx(2 * 3 / (5 + 4), abs=1e-6)  # 水 は い
    assert rouge("вода", ["вода"])["rouge1"] == 1.0


@settings(deadline=None)
@given(st.text("ab ъ水", max_size=12), st.text("ab ъ水", max_size=12))
def test_rouge_l_is_that_of_the_filters(a, b):
    assert rouge(a, [b])["rougeL"] == pytest.approx(f_measure(tokens(a), tokens(b)), abs=1e-6)


def test_a_row_without_references_has_no_rouge():
    assert sorted(judge_answer("Yes.", "eos", Item(question="q"))) == ["empty", "looping", "refusal", "truncated", "words"]


@pytest.mark.parametrize("text, finish, sign", [
    ("", "eos", "empty"),
    ("?!", "stop", "empty"),
    ("it is so " * 5, "eos", "looping"),
    ("It is so because", "length", "truncated"),
    ("I'm sorry, but I can't help with that.", "eos", "refusal"),
])
def test_signs_of_ill_health(text, finish, sign):
    made = judge_answer(text, finish, Item(question="q"))
    assert {name for name in ("empty", "looping", "truncated", "refusal") if made[name]} == {sign}
