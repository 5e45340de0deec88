"""Every form's prompt as text, the published primer against lm-evaluation-harness, and which pairs stand in for it."""
import string
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from isara_jax.common import UserError
from isara_jax.data import prompts
from isara_jax.data.prompts import Template
from isara_jax.data.tokenizer import ByteTokenizer
from isara_jax.evals import forms

BYTES = ByteTokenizer()
PLAIN = Template("plain")


@dataclass(frozen=True)
class Pair:
    id: str
    question: str
    answer: str


POOL = [Pair("p1", "Do cats purr?", "Yes, cats purr."), Pair("p2", "Do dogs bark?", "Yes, dogs bark."),
        Pair("p3", "Is ice cold?", "Yes, it is.")]


class Letters:
    """Vectors of how often each letter occurs, so that nearness is what one expects."""

    embedder = SimpleNamespace(hash="letters")

    def vectors(self, texts):
        made = np.array([[text.lower().count(c) for c in string.ascii_lowercase] for text in texts], np.float32).reshape(len(texts), 26)
        return made / np.maximum(np.linalg.norm(made, axis=1, keepdims=True), 1e-6)


def icl(strategy="knn", k=2, seed=0, pool=POOL, room=1000, template=PLAIN):
    return forms.icl(template, room, pool, Letters(), strategy=strategy, k=k, seed=seed, index="numpy")


def shown(form, *questions, rooms=None):
    return [prompts.show(segments) for segments in form.segments(BYTES, questions, rooms)]


# ---------------------------------------------------------------------------------------------------------------------- bare and primer
def test_the_bare_form_is_the_prompt_of_training():
    form = forms.bare(PLAIN, 100)
    assert shown(form, "Why?", "How?") == ["Q: Why?\nA:", "Q: How?\nA:"]
    assert form.segments(BYTES, ["Why?"]) == [PLAIN.training_segments("Why?")]
    assert form.name == "plain" and form.prompts(BYTES, ["Why?"]) == [tuple(b"Q: Why?\nA:")]


def test_a_continuation_is_split_from_its_prompt_as_in_training():
    form = forms.bare(PLAIN, 100)
    (segments,) = form.segments(BYTES, ["Why?"])
    assert form.pair(BYTES, segments, "So.") == (list(b"Q: Why?\nA:"), list(b" So."))


def test_the_primer_is_six_pairs_then_the_question():
    (text,) = shown(forms.primer(10_000), "Why?")
    assert text.count("Q: ") == 7 and text.startswith("Q: What is human life expectancy in the United States?\nA: Human life")
    assert text.endswith("A: The 1992 Olympics were held in Barcelona, Spain.\n\nQ: Why?\nA:")


@pytest.mark.parametrize("question", ["What do cats eat?", "Wer war's? \"Er\" & {sie}"])
def test_the_primer_equals_the_prompt_of_lm_eval(question):
    utils, yaml = pytest.importorskip("lm_eval.utils"), pytest.importorskip("yaml")
    file = Path(utils.__file__).parent / "tasks/truthfulqa/truthfulqa_mc1.yaml"
    theirs = utils.apply_template(yaml.safe_load(file.read_text())["doc_to_text"], {"question": question})
    assert shown(forms.primer(10_000), question) == [theirs]


def test_the_primer_is_in_the_plain_form_whatever_the_model_was_trained_in():
    assert forms.primer(10_000).template.stops("answer") == ("\nQ:",)


def test_where_room_is_short_pairs_are_left_out_and_a_question_that_does_not_fit_is_an_error():
    (text,) = shown(forms.primer(200), "Why?")
    assert text == "".join(f"Q: {p.question}\nA: {p.answer}\n\n" for p in forms.PRIMER[:1]) + "Q: Why?\nA:"
    with pytest.raises(UserError, match="already has 10 tokens, of 9"):
        forms.primer(9).segments(BYTES, ["Why?"])


# ------------------------------------------------------------------------------------------------------------------------ in context
def test_the_nearest_pair_stands_last_and_the_farthest_is_left_out_first():
    (text,) = shown(icl(k=2), "Do cats purr loudly?")
    assert text == "Q: Do dogs bark?\nA: Yes, dogs bark.\n\nQ: Do cats purr?\nA: Yes, cats purr.\n\nQ: Do cats purr loudly?\nA:"
    (short,) = shown(icl(k=2), "Do cats purr loudly?", rooms=[len(text) - 1])
    assert short == "Q: Do cats purr?\nA: Yes, cats purr.\n\nQ: Do cats purr loudly?\nA:"
    assert shown(icl(k=2), "Do cats purr loudly?", rooms=[len(text)]) == [text]


def test_the_nearest_pair_is_found_whatever_the_order_of_the_pool():
    for pool in (POOL, POOL[::-1], [POOL[1], POOL[2], POOL[0]]):
        assert [text.split("\n")[0] for text in shown(icl(k=1, pool=pool), *(p.question for p in POOL))] == [f"Q: {p.question}" for p in POOL]


def test_chat_prompts_hold_the_pairs_as_turns():
    render = lambda messages, add_generation_prompt: "".join(f"<{m['role']}>{m['content']}" for m in messages) + "<assistant>"
    template = Template("chat", render_chat=render)
    assert forms.bare(template, 100).name == "chat"
    (text,) = shown(icl(k=1, template=template), "Is ice very cold?")
    assert text == "<system><user>Is ice cold?<assistant>Yes, it is.<user>Is ice very cold?<assistant>"


def test_random_pairs_depend_on_seed_and_question_not_on_the_company_or_the_order_of_the_pool():
    questions = [f"Question {i}?" for i in range(20)]
    together = shown(icl("random", k=2), *questions)
    assert together == [shown(icl("random", k=2, pool=POOL[::-1]), q)[0] for q in questions]
    assert together != shown(icl("random", k=2, seed=1), *questions)
    assert len({text.rpartition("Q: ")[0] for text in together}) == 6  # of six ordered choices of two, each is drawn


def test_pairs_that_take_the_primers_place_fill_it_and_no_more():
    pool = [Pair(f"p{i:02}", f"Do cats purr {'very ' * (i % 4)}loudly?", "Yes, all cats purr.") for i in range(40)]
    primer, knn = forms.primer(10_000), icl(k=2, pool=pool, room=10_000)
    form = forms.at_equal_tokens(knn, primer)
    (text,), (like,), questions = shown(form, "Do cats purr?"), shown(primer, "Do cats purr?"), ["Do cats purr?"]
    shots = form.exemplars(questions, 64)[0]
    used = text.count("Q: ") - 1
    assert used > 2 and len(text) <= len(like)
    assert text == prompts.show(PLAIN.answer_segments(shots[:used], questions[0]))
    assert len(prompts.show(PLAIN.answer_segments(shots[:used + 1], questions[0]))) > len(like)


def test_a_small_pool_takes_the_primers_place_as_a_whole():
    (text,) = shown(forms.at_equal_tokens(icl(k=1), forms.primer(1000)), "Why?")
    assert text.count("Q: ") == 4


def test_no_pairs_to_show_and_an_unknown_strategy_are_refused():
    with pytest.raises(UserError, match="the pool is empty"):
        icl(pool=[])
    with pytest.raises(ValueError, match="mmr"):
        icl("mmr")


# ----------------------------------------------------------------------------------------------------------------------------- hashes
def test_a_hash_names_what_changes_the_prompts():
    knn, random = icl(), icl("random")
    others = [forms.bare(PLAIN, 100), forms.bare(Template("plain", answer_marker="B:"), 100), forms.primer(1000), forms.primer(900), knn,
              random, icl(k=3), icl(room=900), icl(pool=POOL[:2]), icl("random", seed=1), forms.at_equal_tokens(knn, forms.primer(1000)),
              icl(template=Template("plain", order="nearest_first"))]
    assert len({form.hash for form in others}) == len(others)
    assert knn.hash == icl(pool=POOL[::-1]).hash == icl(seed=1).hash  # the nearest are not drawn
    assert forms.bare(PLAIN, 100).hash == forms.bare(PLAIN, 200).hash  # room cuts nothing where there are no pairs


def test_names_are_fit_for_files():
    longer = forms.at_equal_tokens(icl(), forms.primer(9))
    assert [icl().name, icl("random", k=3).name, longer.name] == ["knn-2", "random-3", "knn-for-primer"]


def test_a_budget_limits_the_pairs_and_never_the_question():
    """Each pair has 30 or 31 bytes and the question's part 12: two pairs fit into 80, and beside a long question none."""
    form = forms.icl(PLAIN, 400, POOL, Letters(), strategy="knn", k=3, seed=0, index="numpy", budget=80)
    short, long = form.prompts(BYTES, ["Ice?", "Ice? " * 30])
    assert BYTES.decode(short).count("Q:") == 3 and len(short) <= 80
    assert BYTES.decode(long).count("Q:") == 1 and len(long) > 80
    assert form.hash != icl(k=3, room=400).hash
