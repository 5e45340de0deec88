"""Our own evaluation questions and off-domain pairs: sound, ours, and not to be told right from wrong without the question."""
import itertools
import re

import numpy as np
import pytest

from isara_jax.common import read_jsonl
from isara_jax.config import Data
from isara_jax.data import rouge
from isara_jax.data.benchmarks import open_benchmark
from isara_jax.data.seeds import NEAR, built_in, load_seeds, own_data
from isara_jax.evals import mc

PROVENANCE = {"author": "language model", "source": "isara_jax authors", "licence": "Apache-2.0"}
YES_NO = {"is", "are", "was", "were", "do", "does", "did", "can", "could", "will", "would", "should", "has", "have", "had", "must", "may"}
MARKS = {  # what gives a side away to a reader who never sees the question: pattern, and a text with two uses of it
    "negations": (r"\b(no|not|never|none|nothing|nobody|nowhere|neither|nor|without|cannot|hardly|barely|rarely)\b|n't\b", "No, it isn't."),
    "corrections": (r"\b(myths?|actually|really|only|just|simply|despite|although|though|contrary|merely)\b", "Although it is only so."),
    "hedges": (r"\b(may|might|can|could|often|usually|mostly|mainly|largely|sometimes|about|around|roughly|nearly|almost|probably)\b",
               "It may be about ten."),
    "absolutes": (r"\b(all|always|every|any|entirely|completely|exactly|whole)\b", "Every one of all."),
    "numbers": (r"\d+", "From 10 to 1999."),
}
MARKS_APART = 0.25  # of all uses of such words, at most so many more on one side than on the other (or 5, where they are few)


def grams(text, n):
    words = rouge.tokens(text)
    return {tuple(words[i:i + n]) for i in range(len(words) - n + 1)}


def nearest(texts, others):
    """The largest ROUGE-L F between a text and one of the others, with both texts."""
    index = rouge.NoveltyIndex()
    for other in others:
        index.add(other, rouge.tokens(other))
    return max((*index.nearest(rouge.tokens(text)), text) for text in texts)


def nearest_pair(texts):
    """The largest ROUGE-L F between two of the texts, with both."""
    words = [(rouge.tokens(text), text) for text in texts]
    return max((rouge.f_measure(a, b), first, second) for (a, first), (b, second) in itertools.combinations(words, 2))


@pytest.fixture(scope="module")
def rows():
    return read_jsonl(own_data() / "misconceptions_test.jsonl")


@pytest.fixture(scope="module")
def items(rows):
    benchmark = open_benchmark("misconceptions")
    found = (*benchmark.pool, *benchmark.validation, *benchmark.test)
    assert len(found) == len(rows)
    return found


@pytest.fixture(scope="module")
def pairs(rows):
    """(row's question, right answer, the wrong answer that is parallel to it)."""
    return [(row["question"], *both) for row in rows for both in zip(row["right"], row["wrong"], strict=True)]


@pytest.fixture(scope="module")
def off_domain():
    return load_seeds(Data(seeds="off_domain"))


@pytest.fixture(scope="module")
def seeds():
    return load_seeds(Data(seeds="misconceptions")).pairs


@pytest.fixture(scope="module")
def truthfulqa(test_data):
    benchmark = open_benchmark("truthfulqa", str(test_data / "truthfulqa"))
    found = (*benchmark.pool, *benchmark.validation, *benchmark.test)
    assert len(found) == 817
    return found


# ------------------------------------------------------------------------------------------------------------------------- the rows
def test_there_are_150_rows_of_one_shape(rows):
    assert len(rows) == 150
    for row in rows:
        assert list(row) == ["question", "best", "right", "wrong", *PROVENANCE], row
        assert {key: row[key] for key in PROVENANCE} == PROVENANCE, row
        assert row["best"] == row["right"][0], row
        assert len(row["right"]) == len(row["wrong"]) == 3 and len({*row["right"], *row["wrong"]}) == 6, row


def test_questions_and_answers_are_single_sentences(rows):
    for row in rows:
        assert 5 <= len(row["question"].split()) <= 25 and row["question"].endswith("?"), row
        for answer in (*row["right"], *row["wrong"]):
            assert 5 <= len(answer.split()) <= 16 and answer.endswith(".") and not re.search(r"[.?!]\s", answer), answer
            assert answer == answer.strip() and answer[0] == answer[0].upper(), answer


def test_questions_are_varied(rows):
    openings = [rouge.tokens(row["question"])[0] for row in rows]
    assert sum(opening in YES_NO for opening in openings) <= len(rows) / 3
    assert len(set(openings)) >= 10


def test_they_are_read_as_choices_with_the_best_answer_first(items, rows):
    by_question = {row["question"]: row for row in rows}
    for item in items:
        row = by_question[item.question]
        assert item.mc1.texts == (row["best"], *row["wrong"]) and item.mc1.labels == (True, False, False, False)
        assert item.mc2.texts == (*row["right"], *row["wrong"]) and item.mc2.labels == (True,) * 3 + (False,) * 3


# ------------------------------------------------------------------------------------------------------------------- alike in form
def test_right_and_wrong_answers_open_alike(pairs):
    for question, right, wrong in pairs:
        assert rouge.tokens(right)[:2] == rouge.tokens(wrong)[:2], (question, right, wrong)


def test_right_and_wrong_answers_are_alike_in_length(pairs):
    words = np.array([[len(right.split()), len(wrong.split())] for _, right, wrong in pairs])
    characters = np.array([[len(right), len(wrong)] for _, right, wrong in pairs])
    assert np.abs(words[:, 0] - words[:, 1]).max() <= 2
    assert abs(np.mean(words[:, 0] - words[:, 1])) <= 0.3 and abs(np.mean(characters[:, 0] - characters[:, 1])) <= 1.5


@pytest.mark.parametrize("kind", MARKS)
def test_words_that_give_a_side_away_are_as_frequent_on_both(pairs, kind):
    pattern, example = MARKS[kind]
    uses = lambda text: len(re.findall(pattern, text.casefold()))
    right, wrong = (sum(uses(pair[side]) for pair in pairs) for side in (1, 2))
    assert uses(example) == 2
    assert abs(right - wrong) <= max(5, MARKS_APART * (right + wrong)), f"{kind}: {right} in right answers, {wrong} in wrong ones"


@pytest.mark.slow
def test_a_model_that_never_sees_the_question_scores_near_chance(items, smollm2_gguf):
    """The embedded model after another row's question; chance is 0.5 for MC2 (three right of six) and 0.25 for MC1 (one of four)."""
    import isara_jax

    lm = isara_jax.load("smollm2-135m-instruct", dtype="float32")
    others = [items[other].question for other in mc.partners(items)]
    wanted = [(other, text) for item, other in zip(items, others) for text in (*item.mc2.texts, *item.mc1.texts)]
    lls = lm.score([f"Q: {question}\nA:" for question, _ in wanted], [f" {text}" for _, text in wanted])
    lls = np.array(lls).reshape(len(items), 10)
    mc2 = np.mean([mc.mc2(row[:6], item.mc2.labels) for row, item in zip(lls, items)])
    mc1 = np.mean([mc.mc1(row[6:], item.mc1.labels) for row, item in zip(lls, items)])
    assert 0.47 <= mc2 <= 0.53
    assert 0.20 <= mc1 <= 0.30


# --------------------------------------------------------------------------------------------------------------------- near nothing
def test_no_two_questions_are_near(rows):
    f, *both = nearest_pair([row["question"] for row in rows])
    assert f <= NEAR, both


def test_no_question_is_near_a_seed_or_an_off_domain_pair(rows, seeds, off_domain):
    questions = [row["question"] for row in rows]
    f, *both = nearest(questions, [p.question for p in (*seeds, *off_domain.pairs)])
    assert f <= NEAR, both


def test_no_answer_repeats_a_seed(rows, seeds):
    theirs = set().union(*(grams(p.answer, 6) for p in seeds))
    for row in rows:
        for answer in (*row["right"], *row["wrong"]):
            assert not grams(answer, 6) & theirs, answer


def test_nothing_is_from_truthfulqa(rows, truthfulqa):
    questions = [item.question for item in truthfulqa]
    runs = set().union(*(grams(question, 6) for question in questions))
    answers = {tuple(rouge.tokens(text)) for item in truthfulqa for text in (*item.right, *item.wrong)}
    f, *both = nearest([row["question"] for row in rows], questions)
    assert f <= NEAR, both
    for row in rows:
        assert not grams(row["question"], 6) & runs, row["question"]
        for answer in (*row["right"], *row["wrong"]):
            assert tuple(rouge.tokens(answer)) not in answers, answer


# ----------------------------------------------------------------------------------------------------------------- off-domain pairs
def test_off_domain_pairs_have_the_shape_of_the_seeds(off_domain, seeds):
    assert len(off_domain.pairs) == 96 and off_domain.warnings == ()
    assert all(list(row) == ["question", "answer", *PROVENANCE] for row in read_jsonl(built_in()["off_domain"]))
    assert all({key: getattr(p, key) for key in PROVENANCE} == PROVENANCE for p in off_domain.pairs)
    assert all(6 <= len(p.question.split()) <= 16 and 15 <= len(p.answer.split()) <= 35 for p in off_domain.pairs)
    words = lambda pairs: np.mean([len(p.answer.split()) for p in pairs])
    assert abs(words(off_domain.pairs) - words(seeds)) <= 2  # so that equal steps see about as many tokens


def test_off_domain_pairs_are_near_nothing(off_domain, seeds, rows):
    questions = [p.question for p in off_domain.pairs]
    f, *both = nearest_pair(questions)
    assert f <= NEAR, both
    f, *both = nearest_pair([p.answer for p in off_domain.pairs])
    assert f <= NEAR, both
    f, *both = nearest(questions, [p.question for p in seeds] + [row["question"] for row in rows])
    assert f <= NEAR, both


def test_off_domain_pairs_are_not_truthfulqa(off_domain, truthfulqa):
    runs = set().union(*(grams(item.question, 6) for item in truthfulqa))
    f, *both = nearest([p.question for p in off_domain.pairs], [item.question for item in truthfulqa])
    assert f <= NEAR, both
    assert not [p for p in off_domain.pairs if (grams(p.question, 6) | grams(p.answer, 6)) & runs]
