"""Every filter on texts readable by eye, and the order they run in."""
import dataclasses
from types import SimpleNamespace

import pytest

from isara_jax import config
from isara_jax.common import UserError
from isara_jax.data import filters
from isara_jax.data.filters import Candidate, check_names, run, seed_rejections
from isara_jax.data.rouge import NoveltyIndex, tokens

SETTINGS = config.Filters()
FISH = SimpleNamespace(id="fish", question="Do fish sleep at night?", answer="Most fish rest, though they have no eyelids.")


def question(text, **changes):
    return dataclasses.replace(Candidate(text, None, "stop", None, (FISH,)), **changes)


def answer(text, **changes):
    return dataclasses.replace(Candidate("Why is the sky blue?", text, "eos", None, (FISH,)), **changes)


def index(*texts):
    made = NoveltyIndex()
    for text in texts:
        made.add(text, tokens(text))
    return made


def last(stage, candidate, settings=SETTINGS, accepted=None):
    """The verdict that decides."""
    return run(stage, candidate, settings, accepted if accepted is not None else NoveltyIndex())[-1]


def test_a_good_pair_passes_every_filter_in_order():
    verdicts = run("question", question("Why do cats purr so often?"), SETTINGS, NoveltyIndex())
    assert [(v.name, v.passed) for v in verdicts] == [(name, True) for name in SETTINGS.question]
    verdicts = run("answer", answer("Air scatters short waves more than long ones."), SETTINGS)
    assert [(v.name, v.passed) for v in verdicts] == [(name, True) for name in SETTINGS.answer]


@pytest.mark.parametrize("stage, candidate, name, score, neighbour", [
    ("question", question("", verdict="empty"), "parse", None, None),
    ("question", question("Why do cats purr so", finish="length"), "truncated", None, None),
    ("question", question("Why do cats purr?"), "min_words", 4, None),
    ("question", question("why " * 6), "ngram_loop", 3, None),
    ("question", question("do FISH sleep, at night"), "exemplar_copy", 1.0, "fish"),
    ("answer", answer("It is."), "min_words", 2, None),
    ("answer", answer("You ask: why is the sky blue? I say so."), "echo", None, None),
    ("answer", answer("why is the sky blue"), "echo", None, None),
    ("answer", answer("It is so. It is so. It is so. It is so."), "ngram_loop", 3, None),
    ("answer", answer("Most fish rest though they have no eyelids!"), "exemplar_copy", 1.0, "fish"),
])
def test_rejections(stage, candidate, name, score, neighbour):
    verdict = last(stage, candidate)
    assert (verdict.name, verdict.passed, verdict.score, verdict.neighbour) == (name, False, score, neighbour)


def test_the_first_rejection_ends_the_run():
    assert [v.name for v in run("question", question("Why?", finish="length"), SETTINGS, NoveltyIndex())] == ["parse", "truncated"]


def test_scripts_without_spaces_count_characters():
    assert last("question", question("猫はなぜ鳴くのか")).passed
    assert not last("question", question("なぜ鳴く")).passed


@pytest.mark.parametrize("text", ["an answer without its question", "the sky is blue, why", "Why is the sky so blue?"])
def test_echo_wants_the_whole_question_in_order(text):
    assert last("answer", answer(text)).passed


def test_novelty_names_the_nearest():
    accepted = index("What is the capital city of France?", "Why do cats purr so often?")
    verdict = last("question", question("Why do cats purr so loud?"), accepted=accepted)
    assert verdict == filters.Verdict("novelty", False, pytest.approx(5 / 6), "Why do cats purr so often?")
    verdict = last("question", question("How old do most tall trees get?"), accepted=accepted)
    assert verdict.passed and verdict.neighbour == "Why do cats purr so often?" and verdict.score == pytest.approx(2 / 13)


def test_novelty_is_strict_at_the_threshold():
    only_novelty = dataclasses.replace(SETTINGS, question=("novelty",), rouge=0.5)
    accepted = index("one two three four")
    assert last("question", question("one two five six"), only_novelty, accepted).passed       # F = 0.5
    assert not last("question", question("one two three six"), only_novelty, accepted).passed  # F = 0.75


@pytest.mark.parametrize("text, passed", [
    ("Why?", True), ("Why", False), ("なぜ？", True), ("لماذا؟", True), ('He asked "why?"', True), ("Name one.", False)])
def test_is_question(text, passed):
    assert last("question", question(text), dataclasses.replace(SETTINGS, question=("is_question",))).passed is passed


def test_thresholds_are_config():
    loose = dataclasses.replace(SETTINGS, min_words=2, rouge=1.0, loop_repeats=10)
    accepted = index("why why why why why why")
    assert last("question", question("why why why why why why"), loose, accepted).passed
    assert not last("question", question("why"), loose, accepted).passed


@pytest.mark.parametrize("changes, message", [
    ({"question": ("min_word",)}, "config.filters.question names 'min_word', which is no question filter. Did you mean 'min_words'?"),
    ({"answer": ("novelty",)}, "config.filters.answer names 'novelty', which is no answer filter. There are parse, truncated"),
    ({"question": ("echo",)}, "config.filters.question names 'echo'"),
    ({"answer": ("parse", "parse")}, "names 'parse' twice"),
])
def test_names_are_checked(changes, message):
    check_names(SETTINGS)
    with pytest.raises(UserError) as e:
        check_names(dataclasses.replace(SETTINGS, **changes))
    assert message in str(e.value)


def test_the_seeds_that_would_be_rejected():
    pair = lambda q, a: SimpleNamespace(question=q, answer=a)
    seeds = [pair("Is it true that water boils?", "Yes."), pair("Is it true that water boils", "No, not always at one hundred degrees."),
             pair("Why?", "Yes."), pair("Which of these numbers is prime?", "Which of these numbers is prime, you ask: seven.")]
    assert seed_rejections(seeds, "question", SETTINGS) == {
        "parse": [], "truncated": [], "min_words": [2], "ngram_loop": [], "exemplar_copy": [0, 1]}
    assert seed_rejections(seeds, "answer", SETTINGS) == {
        "parse": [], "truncated": [], "min_words": [0, 2], "echo": [3], "ngram_loop": [], "exemplar_copy": [0, 2]}
    assert seed_rejections(seeds, "answer", dataclasses.replace(SETTINGS, answer=("min_words",), min_words=1)) == {"min_words": []}
