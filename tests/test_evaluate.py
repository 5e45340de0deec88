"""Evaluation rows with a model made of a table, readable by eye, then one pass of the tiny random model."""
import math
from types import SimpleNamespace

import numpy as np
import pytest

import isara_jax
from isara_jax.common import UserError
from isara_jax.data.benchmarks import Item, choices
from isara_jax.data.prompts import Template
from isara_jax.data.tokenizer import ByteTokenizer
from isara_jax.decode.requests import Completion
from isara_jax.evals import forms, mc
from isara_jax.evals.evaluate import evaluate, measure, probe, probe_summary, summarise

BYTES = ByteTokenizer()
FORM = forms.bare(Template("plain"), 400)


class Table:
    """A model that gives the log-likelihoods and answers it is told, by (question, text), and keeps what it was asked."""

    tokenizer, context = BYTES, 500

    def __init__(self, lls=None, answers=None):
        self.lls, self.answers, self.scored, self.requests = lls or {}, answers or {}, [], []

    def score(self, prompts, continuations):
        self.scored.append([(bytes(p).decode(), BYTES.decode(c), list(c)) for p, c in zip(prompts, continuations, strict=True)])
        return [self.lls.get((self._question(p), text.strip()), -9.0) for p, text, _ in self.scored[-1]]

    def run(self, requests, *, seed, on_progress=None):
        self.requests += requests
        if on_progress:
            on_progress(len(requests), len(requests), 50, 7)
        return [Completion([1], self.answers.get(self._question(bytes(r.tokens).decode()), " Hm."), "eos") for r in requests]

    def _question(self, prompt):
        return prompt.rpartition("Q: ")[2].removesuffix("\nA:")


def item(question, right, wrong, **more):
    return Item(question=question, answer=right[0], right=tuple(right), wrong=tuple(wrong), mc1=choices(right[:1], wrong),
                mc2=choices(right, wrong), **more)


SKY = item("Sky?", ["Blue.", "Azure."], ["Green."], file="f.jsonl", row=3)
SEA = item("Sea?", ["Wet."], ["Dry.", "Hot."])
LLS = {("Sky?", "Blue."): -1.0, ("Sky?", "Azure."): -3.0, ("Sky?", "Green."): -2.0,
       ("Sea?", "Blue."): -5.0, ("Sea?", "Azure."): -5.0, ("Sea?", "Green."): -1.0,
       ("Sea?", "Wet."): -4.0, ("Sea?", "Dry."): -3.0, ("Sea?", "Hot."): -8.0}


def run(items=(SKY, SEA), lm=None, **settings):
    return measure(lm or Table(LLS), items, settings.pop("form", FORM), new_tokens=10, **settings)


# -------------------------------------------------------------------------------------------------------------------- multiple choice
def test_a_row_of_multiple_choice_holds_log_likelihoods_and_what_follows_from_them():
    row, other = run(parts=("mc",))
    e = math.exp
    assert row == {
        "id": SKY.id, "group": SKY.group, "kind": "", "partner": SEA.id,
        "mc1_ll": [-1.0, -2.0], "mc1": 1.0, "mc1_ll_blind": [-5.0, -1.0], "mc1_blind": 0.0, "mc1_cond": 1.0, "mc1_chance": 0.5,
        "mc2_ll": [-1.0, -3.0, -2.0], "mc2": pytest.approx((e(-1) + e(-3)) / (e(-1) + e(-3) + e(-2)), abs=1e-6),
        "mc2_ll_blind": [-5.0, -5.0, -1.0], "mc2_blind": pytest.approx(2 * e(-5) / (2 * e(-5) + e(-1)), abs=1e-6),
        "mc2_cond": pytest.approx((e(4) + e(2)) / (e(4) + e(2) + e(-1)), abs=1e-6)}
    assert (other["partner"], other["mc1"], other["mc1_chance"], other["mc1_ll_blind"]) == (SKY.id, 0.0, 0.333333, [-9.0] * 3)


def test_all_scores_come_from_one_call_and_nothing_is_asked_twice():
    lm = Table(LLS)
    run(lm=lm, parts=("mc", "nll"))
    (asked,) = lm.scored
    # the 3 different choices of each row after both questions, and both references with the end of the text
    assert len(asked) == 14 == len({(prompt, tuple(ids)) for prompt, _, ids in asked})
    assert {prompt for prompt, _, _ in asked} == {"Q: Sky?\nA:", "Q: Sea?\nA:"} and lm.requests == []


def test_blind_scores_use_the_whole_prompt_of_the_other_question():
    """With retrieved pairs, the partner's: nothing of the row's own question may shine through."""
    lm, form = Table(), forms.Form("shown", FORM.template, 400, 1, lambda questions, k: [[SimpleNamespace(
        id=q, question=f"Like {q}", answer="So.")] for q in questions], "pairs")
    run(lm=lm, form=form, parts=("mc",))
    assert {prompt for prompt, text, _ in lm.scored[0] if text == " Wet."} == {
        "Q: Like Sea?\nA: So.\n\nQ: Sea?\nA:", "Q: Like Sky?\nA: So.\n\nQ: Sky?\nA:"}


def test_rows_of_one_prompt_alone_have_no_blind_scores():
    (row,) = run([SKY], parts=("mc",))
    assert row["partner"] is None and row["mc1"] == 1.0 and not [name for name in row if "blind" in name or "cond" in name]


def test_choices_of_one_kind_suffice():
    only = Item(question="Sky?", answer="Blue.", mc2=choices(["Blue."], ["Green."]))
    row, _ = run([only, SEA], parts=("mc",))
    assert row["mc2_ll"] == [-1.0, -2.0] and "mc1" not in row and "mc1_chance" not in row


# ----------------------------------------------------------------------------------------------------------------------------- the rest
def test_nll_is_of_the_reference_and_the_end_of_the_text():
    lm = Table({("Sky?", "Blue."): -1.5})
    row, prompt_only = run([SKY, Item(question="Only a prompt.")], lm=lm, parts=("nll",))
    assert lm.scored == [[("Q: Sky?\nA:", " Blue.", [*b" Blue.", BYTES.eos_id])]]
    assert row == {"id": SKY.id, "group": SKY.group, "kind": "", "partner": None, "nll": 1.5, "nll_tokens": 7}
    assert "nll" not in prompt_only


def test_answers_are_greedy_tidied_and_judged():
    lm = Table(answers={"Sky?": " Blue.\n\n Yes. "})
    row, unasked = run(lm=lm, parts=("answers",), answer_rows=1)
    (request,) = lm.requests
    assert (request.tokens, request.temperature, request.max_new_tokens, request.stop) == (tuple(b"Q: Sky?\nA:"), 0.0, 10, ("\nQ:",))
    assert (row["answer"], row["finish"], row["words"], row["rouge1"]) == ("Blue.\n Yes.", "eos", 2, 0.666667)
    assert lm.scored == [] and "answer" not in unasked


def test_rows_of_one_question_share_one_answer():
    lm, rows = Table(), [Item(question="Sky?", kind="unsafe"), Item(question="Sky?", answer="Blue.", right=("Blue.",))]
    first, second = run(rows, lm=lm, parts=("answers",))
    assert len(lm.requests) == 1 and first["answer"] == second["answer"] == "Hm." and (first["kind"], second["kind"]) == ("unsafe", "")


def test_progress_ends_at_the_number_of_rows_with_all_tokens():
    said = []
    run(on_progress=lambda *args: said.append(args))
    prompts, texts = 2 * len("Q: Sky?\nA:"), 2 * len(" Blue. Azure. Green. Wet. Dry. Hot.") + len(" Blue. Wet.") + 2
    assert said == [(0, prompts + texts, 0), (2, prompts + texts + 50, 7)]
    said.clear()
    run(parts=("nll",), on_progress=lambda *args: said.append(args))
    assert [done for done, _, _ in said] == [2]


def test_pairs_make_room_for_what_follows_the_question():
    shown = [SimpleNamespace(id="a", question="a" * 100, answer="b" * 100), SimpleNamespace(id="c", question="c" * 100, answer="d" * 100)]
    form = forms.Form("shown", FORM.template, 490, 2, lambda questions, k: [shown] * len(questions), "pairs")
    lm = Table()
    run([Item(question="Short?", answer="x"), Item(question="Long?", answer="y" * 200)], lm=lm, form=form, parts=("nll",))
    (short, _, _), (long, _, ids) = lm.scored[0]
    assert (short.count("Q: "), long.count("Q: ")) == (3, 2) and len(long) + len(ids) <= lm.context


@pytest.mark.parametrize("items, message", [
    ([], "empty"),
    ([SKY, Item(question="Q" * 480, answer="x", file="g.csv", row=7)],
     r"g\.csv, row 7: the question has 486 tokens, .* context of 500 tokens 400 are left"),
    ([Item(question="Why?", answer="x" * 600, file="g.csv", row=8)], r"g\.csv, row 8: "),
])
def test_what_cannot_be_measured_is_said_before_anything_is(items, message):
    lm = Table()
    with pytest.raises(UserError, match=message):
        run(items, lm=lm)
    assert lm.scored == [] and lm.requests == []


# ------------------------------------------------------------------------------------------------------------------------------ summary
def test_a_summary_has_every_quantity_of_the_rows_and_the_answers_as_a_set():
    rows = [{"id": str(i), "group": str(i), "kind": "", "mc1": float(i < 3), "nll": 2.0, "nll_tokens": 1 + i} for i in range(4)]
    rows[0]["answer"], rows[1]["answer"] = "It is so here.", "It is so there."
    made = {line["name"]: line for line in summarise(rows)}
    assert set(made) == {"mc1", "nll", "distinct_1", "distinct_2", "self_bleu", "same_opening"}
    assert (made["mc1"]["value"], made["mc1"]["rows"], made["mc1"]["label"]) == (0.75, 4, "MC1")
    assert made["mc1"]["low"] < 0.75 < made["mc1"]["high"]
    assert made["nll"]["value"] == 0.8  # 8 nats over 10 tokens: averages are not averaged
    assert (made["distinct_1"]["value"], made["same_opening"]["value"], made["same_opening"]["low"]) == (5 / 8, 1.0, None)


# -------------------------------------------------------------------------------------------------------------------------------- probe
class Corners:
    """Vectors in the plane: right references at one end, wrong ones at the other."""

    embedder = SimpleNamespace(hash="corners")

    def vectors(self, texts):
        places = {"Blue.": [1, 0], "Azure.": [0.8, 0.6], "Green.": [0, 1], "Bluish.": [0.6, 0.8]}
        return np.array([places[t] for t in texts], np.float32)


def test_the_probe_compares_answers_with_right_and_wrong_references():
    form = forms.icl(FORM.template, 400, [SimpleNamespace(id="p", question="Green.", answer="So.")], Corners(), strategy="knn", k=1, seed=0)
    colour = Item(question="Blue.", answer="Blue.", right=("Blue.", "Azure."), wrong=("Green.",))
    lm = Table(answers={"Blue.": " Bluish."})
    (row,) = probe(lm, form, [colour], Corners(), 10)
    assert lm.requests[0].tokens == tuple(b"Q: Green.\nA: So.\n\nQ: Blue.\nA:")
    assert row == {"id": colour.id, "answer": "Bluish.", "finish": "eos", "rougeL": 0.0, "rougeL_wrong": 0.0, "rougeL_diff": 0.0,
                   "cosine": pytest.approx(0.96), "cosine_wrong": pytest.approx(0.8), "cosine_diff": pytest.approx(0.16, abs=1e-6)}
    assert probe_summary([row]) == {"rougeL": 0.0, "rougeL_diff": 0.0, "cosine": row["cosine"], "cosine_diff": row["cosine_diff"],
                                    "right": 1.0}
    (alone,) = probe(lm, form, [Item(question="Blue.", answer="Blue.", right=("Blue.",))], Corners(), 10)
    assert probe_summary([alone]) == {"rougeL": 0.0, "cosine": pytest.approx(0.6)}


# ------------------------------------------------------------------------------------------------------------------------------- public
@pytest.fixture(scope="module")
def tiny():
    return isara_jax.load("tiny-random", dtype="float32")


def test_the_tiny_model_from_rows_to_figures(tiny):
    pairs = [("Is ice cold?", "Yes."), {"question": "Is fire cold?", "right": ["No.", "It is hot."], "wrong": ["Yes."]}, SKY]
    made = evaluate(tiny, pairs, new_tokens=8)
    first, second, sky = made.rows
    assert first["nll_tokens"] == 6 and "mc1" not in first and second["partner"] == SKY.id
    prompt, wrong = "Q: Is fire cold?\nA:", list(b" Yes.")
    assert second["mc1_ll"][1] == pytest.approx(tiny.score([list(prompt.encode())], [wrong])[0], abs=1e-4)
    assert second["mc1_ll_blind"][1] == pytest.approx(tiny.score([list(b"Q: Sky?\nA:")], [wrong])[0], abs=1e-4)
    assert second["mc2"] == pytest.approx(mc.mc2(second["mc2_ll"], [True, True, False]), abs=1e-6)
    (sample,) = tiny.generate(["Q: Sky?\nA:"], max_new_tokens=8, stop=["\nQ:"])[0]
    assert sky["answer"] == sample.text.strip()
    figures = {line["name"]: line for line in made.summary}
    assert figures["nll"]["value"] == pytest.approx(sum(r["nll"] for r in made.rows) / sum(r["nll_tokens"] for r in made.rows), abs=1e-6)
    assert figures["mc2_cond"]["rows"] == 2 and figures["words"]["rows"] == 3
    assert evaluate(tiny, pairs, new_tokens=8) == made


def test_a_file_is_evaluated_on_its_pool(tiny, tmp_path):
    file = tmp_path / "mine.jsonl"
    names = "ant bee cat dog elk fox gnu hen".split()
    file.write_text("".join(f'{{"question": "{name}?", "answer": "An animal."}}\n' for name in names))
    made = evaluate(tiny, file, parts=("nll",))
    assert 0 < len(made.rows) < 8 and {line["name"] for line in made.summary} == {"nll"}
    assert {r["id"] for r in made.rows}.isdisjoint(r["id"] for r in evaluate(tiny, str(file), parts=("nll",), split="validation").rows)
    with pytest.raises(UserError, match="no rows in its test split"):
        evaluate(tiny, file, split="test")


@pytest.mark.parametrize("rows, settings, message", [
    ([], {}, "empty"),
    ([("a", "b"), "c"], {}, "row 1: this str is no row"),
    ([{"question": " "}], {}, "row 0"),
    ([("a", 3)], {}, "row 0: answer is a text"),
    ([{"question": "a", "right": "b"}], {}, "right and wrong are lists"),
    ([{"question": "a", "right": ["b"], "wrong": ["B"]}], {}, "row 0: has the same answer on both sides"),
    ([("a", "b")], {"parts": ("mc", "harm")}, "'harm' is none of"),
    ([("a", "b")], {"form": "poem"}, "plain, chat and primer"),
    ([("a", "b")], {"form": "chat"}, "no chat template"),
    ([("a", "b")], {"new_tokens": 512}, "new_tokens=512"),
    ("misconceptoins", {}, "Did you mean 'misconceptions'"),
    ("misconceptions", {"split": "train"}, "dev, validation and test"),
])
def test_bad_calls_say_what_is_wrong(tiny, rows, settings, message):
    with pytest.raises(UserError, match=message):
        evaluate(tiny, rows, **settings)
