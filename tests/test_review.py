"""Review before training: the sheet, what a person may do to it, and the records that come of it."""
from __future__ import annotations

import csv
import io
import json
import shutil

import pytest

from isara_jax import review
from isara_jax.common import UserError, read_jsonl, write_jsonl
from isara_jax.data.pool import Pool, Record, pair_id

SEED = Record(id=pair_id("What is ice?", "It is frozen water."), question="What is ice?", answer="It is frozen water.", iteration=0,
              origin="seed", author="human", source="a book", licence="CC0-1.0")
PAIRS = [("Why is the sea salty?", "=Rivers carry salt into it."), ("Is glass a liquid?", "No, it is a solid.\nAlways."),
         ("Warum ist Schnee weiß?", "Er streut alles Licht.")]


def record(question, answer):
    return Record(id=pair_id(question, answer), question=question, answer=answer, iteration=2, origin="generated",
                  question_exemplars=(SEED.id,), answer_exemplars=(SEED.id,), author="human; a model", source="a book", licence="CC0-1.0",
                  filters={"question/novelty": {"verdict": "pass", "score": 0.25}})


RECORDS = [record(*pair) for pair in PAIRS]
IDS = [r.id for r in RECORDS]


class Run:
    """A run at the review of its second iteration."""

    def __init__(self, root, leak=None, fits=None):
        self.root, self.folder, self.said, self.leak, self.fits = root, root / "iterations" / "02", [], leak, fits
        self.sheet = root / "review.csv"

    def review(self, records=RECORDS, t=2):
        return review.reviewed(self.root, self.folder, t, records, {SEED.id: SEED}, self.leak, self.said.append, fits=self.fits)

    def rows(self):
        text = self.sheet.read_bytes().decode("utf-8-sig")
        return [dict(row) for row in csv.DictReader(io.StringIO(text, newline=""))]

    def save(self, rows, **how):
        out = io.StringIO(newline="")
        writer = csv.DictWriter(out, list(rows[0]), **how)
        writer.writeheader()
        writer.writerows(rows)
        self.sheet.write_bytes(out.getvalue().encode("utf-8-sig"))

    def change(self, *changes):
        """Set cells: (row from 0, column, text)."""
        rows = self.rows()
        for number, column, text in changes:
            rows[number][column] = text
        self.save(rows)


@pytest.fixture
def run(tmp_path):
    """A run whose sheet was just written."""
    run = Run(tmp_path)
    with pytest.raises(review.Pending):
        run.review()
    return run


# ----------------------------------------------------------------------------------------------------------------------- writing
def test_the_sheet_says_all_that_helps_to_decide(run):
    first = run.rows()[0]
    assert list(first) == ["id", "keep?", "question", "answer", "exemplars", "scores", "comment", "iteration"]
    assert first == {"id": IDS[0], "keep?": "yes", "question": "Why is the sea salty?", "answer": "'=Rivers carry salt into it.",
                     "exemplars": "What is ice?", "scores": "ROUGE-L 0.25 to the nearest question; question 5 words, answer 5 words",
                     "comment": "", "iteration": "2"}


def test_the_nearest_question_is_named_where_the_filters_left_it(tmp_path):
    run = Run(tmp_path)
    run.folder.mkdir(parents=True)
    near = lambda name: [{"name": "novelty", "passed": True, "score": 0.25, "neighbour": name}]
    write_jsonl(run.folder / "questions.jsonl", [{"request": i, "question": q, "verdicts": near(name)} for i, ((q, _), name) in enumerate(
        zip(PAIRS, (SEED.id, "request 0", "held-out")))])
    write_jsonl(run.folder / "answers.jsonl", [{"request": i, "question": q, "answer": a} for i, (q, a) in enumerate(PAIRS)])
    with pytest.raises(review.Pending):
        run.review()
    assert [row["scores"].partition(";")[0].partition("question: ")[2] for row in run.rows()] == [
        "What is ice?", "Why is the sea salty?", "a held-out seed"]


def test_what_to_do_is_said_and_that_nothing_is_fact_checked(tmp_path):
    said = "3 new pairs of iteration 2 .*review.csv.* run the same command. Generated answers are not fact-checked"
    with pytest.raises(review.Pending, match=said) as e:
        Run(tmp_path).review()
    assert e.value.path == tmp_path / "review.csv" and not isinstance(e.value, UserError)


def test_an_untouched_sheet_waits_and_is_not_written_again(run):
    before = run.sheet.read_bytes()
    with pytest.raises(review.Pending, match="nothing is decided yet on the 3 new pairs.*write a comment in any row, for example 'read'"):
        run.review()
    assert run.sheet.read_bytes() == before


@pytest.mark.parametrize("how", [{"delimiter": ";"}, {"delimiter": "\t", "lineterminator": "\n"}, {"quoting": csv.QUOTE_ALL}])
def test_saving_it_in_another_program_decides_nothing(run, how):
    run.save(list(reversed(run.rows())), **how)
    with pytest.raises(review.Pending):
        run.review()


def test_a_lost_sheet_is_written_anew(run):
    before = run.sheet.read_bytes()
    run.sheet.unlink()
    with pytest.raises(review.Pending, match="wait for you"):
        run.review()
    assert run.sheet.read_bytes() == before


def test_without_new_pairs_there_is_nothing_to_review(tmp_path):
    assert Run(tmp_path).review([]) == [] and not list(tmp_path.iterdir())


# --------------------------------------------------------------------------------------------------------------------- decisions
def test_a_comment_accepts_all_as_they_are(run):
    run.change((1, "comment", "read"))
    kept = run.review()
    assert [(r.id, r.question, r.answer, r.author) for r in kept] == [(r.id, r.question, r.answer, r.author) for r in RECORDS]
    assert [r.filters["human"] for r in kept] == [{"verdict": "pass", "score": None}] * 3
    assert all(r.filters["question/novelty"] == {"verdict": "pass", "score": 0.25} for r in kept)
    assert [row["comment"] for row in read_jsonl(run.folder / "review.jsonl")] == ["", "read", ""]


def test_rejected_deleted_and_edited_rows_in_another_order(run):
    rows = run.rows()
    rows[0]["keep?"], rows[2]["answer"], rows[2]["comment"] = "Nein", " Er streut\r\nalles Licht gleich. ", "genauer"
    run.save([rows[2], rows[0]])
    made = run.review()
    old, new = RECORDS[2], pair_id("Warum ist Schnee weiß?", "Er streut\nalles Licht gleich.")
    assert [(r.id, r.question, r.answer) for r in made] == [(new, old.question, "Er streut\nalles Licht gleich.")]
    assert made[0].filters["human"] == {"verdict": "edited", "score": None, "was": old.id}
    assert made[0].author == "a model; human; human (edited)"
    assert (made[0].iteration, made[0].origin, made[0].question_exemplars, made[0].licence) == (2, "generated", (SEED.id,), "CC0-1.0")
    assert read_jsonl(run.folder / "review.jsonl") == [
        {"id": IDS[0], "decision": "reject", "question": PAIRS[0][0], "answer": PAIRS[0][1], "was": None, "new_id": None, "comment": ""},
        {"id": IDS[1], "decision": "deleted", "question": PAIRS[1][0], "answer": PAIRS[1][1], "was": None, "new_id": None, "comment": ""},
        {"id": IDS[2], "decision": "edit", "question": PAIRS[2][0], "answer": "Er streut\nalles Licht gleich.",
         "was": {"question": PAIRS[2][0], "answer": PAIRS[2][1]}, "new_id": new, "comment": "genauer"}]
    assert run.said == [f"review of iteration 2: 0 kept as they are, 1 edited, 1 rejected, 1 deleted ({run.folder / 'review.jsonl'})"]
    assert not run.sheet.exists() and (run.folder / "review.csv").exists()


def test_the_records_go_into_the_pool_and_come_out_the_same(run):
    run.change((0, "answer", "Rivers carry salt into it."))
    made, pool = run.review(), Pool(run.root / "pool")
    for t in range(3):
        pool.append(t, [SEED] if t == 0 else made if t == 2 else [])
    assert pool.snapshot(2)[1:] == made and made[0].filters["human"]["was"] == IDS[0]


def test_all_rejected_leaves_none(run):
    run.change(*((i, "keep?", "no") for i in range(3)))
    assert run.review() == []
    assert run.review() == []


def test_edits_of_a_rejected_row_do_not_count(run):
    run.change((0, "keep?", "0"), (0, "answer", ""))
    assert [r.id for r in run.review()] == IDS[1:]


def test_an_apostrophe_that_a_program_drops_or_keeps_is_no_edit(run):
    run.change((0, "answer", "=Rivers carry salt into it."), (1, "comment", "read"))
    assert [r.id for r in run.review()] == IDS


def test_western_windows_is_no_edit_and_lost_letters_are_refused(run):
    run.change((1, "comment", "read"))
    whole = run.sheet.read_bytes().decode("utf-8-sig")
    run.sheet.write_bytes(whole.encode("ascii", "replace"))
    with pytest.raises(UserError, match="review.csv, row 4: letters of the question became question marks.*Save it as CSV UTF-8"):
        run.review()
    run.sheet.write_bytes(whole.encode("cp1252"))
    assert [r.id for r in run.review()] == IDS


# --------------------------------------------------------------------------------------------------------------------- once only
def test_decisions_are_made_once(run):
    run.change((0, "keep?", "no"))
    first = run.review()
    (run.folder / "review.csv").unlink()
    assert run.review() == first and len(first) == 2


def test_a_crash_between_deciding_and_moving_the_sheet_is_mended(run):
    run.change((0, "keep?", "no"))
    sheet = run.sheet.read_bytes()
    first = run.review()
    shutil.move(run.folder / "review.csv", run.sheet)
    assert run.review() == first
    assert not run.sheet.exists() and (run.folder / "review.csv").read_bytes() == sheet


def test_a_crash_before_the_decisions_were_marked_reads_the_sheet_again(run):
    run.change((0, "keep?", "no"))
    (run.folder).mkdir(parents=True, exist_ok=True)
    (run.folder / "review.jsonl").write_text('{"id": "torn')
    assert [r.id for r in run.review()] == IDS[1:]


def test_decisions_that_were_tampered_with_are_refused(run):
    run.change((0, "keep?", "no"))
    run.review()
    log = run.folder / "review.jsonl"
    log.write_text(log.read_text().replace("reject", "keep"))
    with pytest.raises(UserError, match="marked as finished but was changed"):
        run.review()


def test_decisions_on_other_pairs_are_refused(run):
    run.change((0, "keep?", "no"))
    run.review()
    with pytest.raises(UserError, match="review.jsonl is the review of other pairs than those of kept.jsonl"):
        run.review(RECORDS[:2])


# ---------------------------------------------------------------------------------------------------------------------- mistakes
MISTAKES = {
    "another word": ([(1, "keep?", "perhaps")], r"review.csv, row 3: keep\? is 'perhaps'; write yes or no"),
    "nothing": ([(1, "keep?", " ")], r"row 3: keep\? is empty; write yes or no"),
    "a text": ([(1, "keep?", "This pair is about something")], r"row 3: keep\? is a text of 28 characters; write yes or no"),
    "no question": ([(0, "question", " ")], "row 2: the question is empty; restore it, or set keep"),
    "no answer": ([(2, "answer", "")], "row 4: the answer is empty"),
    "unknown id": ([(0, "id", "1.23E+15")], "row 2: the id '1.23E.15' is of no new pair"),
    "no id": ([(0, "id", "")], "row 2: there is no id"),
    "twice": ([(2, "id", IDS[0])], f"row 4: the id {IDS[0]} stands in row 2 already"),
    "another iteration": ([(0, "iteration", "1")], "row 2: this is a sheet of iteration 1, and iteration 2 is to be reviewed. Move it"),
    "in the pool": ([(0, "question", SEED.question), (0, "answer", SEED.answer)], f"row 2: after the edit it is the pair {SEED.id}"),
    "same as another": ([(0, "question", PAIRS[1][0]), (0, "answer", PAIRS[1][1])], "row 2: after the edit it is the same pair as row 3"),
    "two edits alike": ([(i, c, t) for i in (0, 2) for c, t in (("question", "Q?"), ("answer", "A."))], "row 4: after the edit .* row 2"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_names_its_row_and_decides_nothing(run, mistake):
    changes, message = MISTAKES[mistake]
    run.change(*changes, (1, "comment", "read"))
    before = run.sheet.read_bytes()
    with pytest.raises(UserError, match=message):
        run.review()
    assert run.sheet.read_bytes() == before and not (run.folder / "review.jsonl").exists()


def test_all_mistakes_are_named_at_once(run):
    run.change((0, "keep?", "hm"), (1, "answer", ""), (2, "keep?", ""))
    with pytest.raises(UserError, match=r"has 3 problems(.|\n)*row 2: (.|\n)*row 3: (.|\n)*row 4: "):
        run.review()


def test_an_edit_near_an_evaluation_row_is_refused(tmp_path):
    run = Run(tmp_path, leak=lambda question: (0.75, "ab12") if "moon" in question else None)
    with pytest.raises(review.Pending):
        run.review()
    run.change((0, "question", "Why is the moon salty?"))
    with pytest.raises(UserError, match="row 2: after the edit the question is near the evaluation row ab12 .ROUGE-L F 0.75"):
        run.review()


def test_an_edit_that_does_not_fit_is_refused(tmp_path):
    run = Run(tmp_path, fits=lambda question, answer: "it has 900 tokens" if len(answer) > 100 else None)
    with pytest.raises(review.Pending):
        run.review()
    run.change((0, "answer", "Salt. " * 30))
    with pytest.raises(UserError, match="row 2: it has 900 tokens"):
        run.review()
    run.change((0, "answer", "Salt."))
    assert run.review()[0].answer == "Salt."


def test_a_sheet_without_rows_or_column_or_quote_is_refused(run):
    head, rows = run.sheet.read_text(encoding="utf-8-sig").split("\n", 1)
    for text, message in ((head + "\n", "has no rows left. To reject every pair set keep"),
                          (head + '\n"torn', "row 2: a quote is not closed"),
                          ((head + "\n" + rows).replace('"keep?"', '"Sure?"'), r"the column 'keep\?' is missing")):
        run.sheet.write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match=message):
            run.review()


def test_lines_for_the_screen_hold_no_text(run):
    run.change((0, "answer", "Secret words here."))
    run.review()
    assert not any(word in json.dumps(run.said) for word in ("Secret", "sea", "glass"))
