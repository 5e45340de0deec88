"""Blind sheets: what stands on them, that they give nothing away, and what filled ones say."""
from __future__ import annotations

import csv
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from isara_jax import blind
from isara_jax.common import UserError, dump_line, write_jsonl
from isara_jax.data.items import Item
from isara_jax.data.pool import Pool, Record, pair_id
from isara_jax.evals import winrate

ROOT = Path(__file__).parent.parent
ITEMS = [Item(question=f"Question {i}?", answer=f"Reference {i}.") for i in range(12)]
TUNED, BASE, SFT = "Tuned says {}.", "Base says {}.", "Seeds say {}."


def asked(questions=12, against="base", split="dev"):
    return blind.Asked(questions, against, split, seed=7)


def generated(i, t=1):
    question, answer = f"Kept question {i}?", f"Kept answer {i}."
    return Record(id=pair_id(question, answer), question=question, answer=answer, iteration=t, origin="generated", author="a", source="b",
                  licence="c")


def rejected(stage, reason, i, answer="Rejected answer {}."):
    return {"stage": stage, "request": i, "reason": reason, "score": None, "neighbour": None, "question": f"{reason} {i}?",
            "answer": answer.format(i) if stage == "answer" else None, "text": "", "finish": "stop"}


class Run:
    """A finished run with kept answers of three arms, 60 kept pairs and rejections of several kinds."""

    def __init__(self, root, answers=12, equal=()):
        self.root, self.said, self.generated = root, [], 0
        folder, pool = root / "evaluation" / "dev", Pool(root / "pool")
        write_jsonl(folder / "items.jsonl", [{"id": i.id, "question": i.question, "answer": i.answer, "kind": ""} for i in ITEMS])
        arms = []
        for arm, text in (("base", BASE), ("isara", TUNED), ("sft_steps", SFT)):
            said = lambda i: "The same." if i in equal else text.format(i)
            write_jsonl(folder / f"{arm}.x.jsonl", [{"id": item.id, "group": "g"} | ({"answer": said(i)} if i < answers else {})
                                                    for i, item in enumerate(ITEMS)])
            arms.append({"arm": arm, "form": "plain", "judged": True, "file": f"{arm}.x.jsonl", "quantities": []})
        arms.append({"arm": "base", "form": "primer", "judged": False, "file": "gone.jsonl", "quantities": []})
        (folder / "results.json").write_text(json.dumps({"arms": arms, "iteration": 1, "split": "dev"}))
        seed = Record(id="s", question="Seed?", answer="Seed.", iteration=0, origin="seed", author="a", source="b", licence="c")
        pool.append(0, [seed])
        pool.append(1, [generated(i) for i in range(60)])
        self.reject([rejected("answer", "truncated", i) for i in range(30)] + [rejected("answer", "echo", i) for i in range(4)]
                    + [rejected("question", "min_words", i) for i in range(8)] + [rejected("question", "novelty", i) for i in range(20)]
                    + [rejected("answer", "parse", 1, answer=" ")])
        (root / "metrics.jsonl").write_text(dump_line({"kind": "stop", "iteration": 1, "reason": "enough"}))

    def reject(self, rows):
        write_jsonl(self.root / "iterations" / "01" / "rejected.jsonl", rows)

    def compare(self, wanted=asked()):
        self.said.clear()
        blind.run(self.root, wanted, self.generate, self.said.append)
        return " | ".join(self.said)

    def generate(self):
        self.generated += 1
        both = lambda item: blind.Both(item.id, item.question, f"New tuned, {item.question}", f"New base, {item.question}")
        return blind.Answers(1, "plain", "chat", tuple(map(both, blind.pick(ITEMS, asked()))))

    def path(self, name):
        return self.root / "blind" / name

    def rows(self, name):
        text = self.path(f"{name}.csv").read_bytes().decode("utf-8-sig")
        return [dict(row) for row in csv.DictReader(io.StringIO(text, newline=""))]

    def save(self, name, rows):
        out = io.StringIO(newline="")
        writer = csv.DictWriter(out, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
        self.path(f"{name}.csv").write_bytes(out.getvalue().encode("utf-8-sig"))

    def key(self, name):
        return json.loads(self.path(f"{name}.key.json").read_text(encoding="utf-8"))

    def results(self):
        return json.loads(self.path("results.json").read_text(encoding="utf-8"))

    def decide(self, name, column, choose):
        rows = self.rows(name)
        for row in rows:
            row[column] = choose(row)
        self.save(name, rows)


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path)


def better_tuned(row):
    return "A" if row["answer A"].startswith("Tuned") else "B"


# ------------------------------------------------------------------------------------------------------------------------ answers
def test_the_sheet_has_each_question_once_with_both_answers_and_no_reference(run):
    said = run.compare()
    rows = run.rows("answers")
    assert list(rows[0]) == ["row", "question", "answer A", "answer B", "better?", "comment"]
    assert [row["row"] for row in rows] == [str(i) for i in range(1, 13)]
    for row in rows:
        i = re.fullmatch(r"Question (\d+)\?", row["question"])[1]
        assert {row["answer A"], row["answer B"]} == {TUNED.format(i), BASE.format(i)} and row["better?"] == row["comment"] == ""
    assert {row["question"] for row in rows} == {i.question for i in ITEMS}
    assert "Reference" not in run.path("answers.csv").read_text(encoding="utf-8-sig")
    assert "12 questions with two answers each" in said and "not fact-checked" in said and not run.generated


def test_the_order_is_random_and_the_same_command_makes_the_same_sheet(run, tmp_path_factory):
    run.compare()
    rows, other = run.rows("answers"), Run(tmp_path_factory.mktemp("other"))
    first = [row["answer A"].startswith("Tuned") for row in rows]
    assert 2 <= sum(first) <= 10 and [row["question"] for row in rows] != [i.question for i in ITEMS]
    other.compare()
    for name in ("answers.csv", "answers.key.json", "pairs.csv", "pairs.key.json"):
        assert run.path(name).read_bytes() == other.path(name).read_bytes()


def test_the_key_says_what_stands_where_and_first_of_all_not_to_read_it(run):
    run.compare()
    key = run.key("answers")
    assert next(iter(key)) == "note" and key["note"].startswith("Do not open this file before the sheet is filled in")
    for row, line in zip(run.rows("answers"), key["rows"]):
        assert (line["A"] == "isara") == row["answer A"].startswith("Tuned") and {line["A"], line["B"]} == {"isara", "base"}
    assert (key["iteration"], key["questions"], key["against"]) == (1, 12, "base")


def test_a_fraction_is_a_part_of_the_same_order(run, tmp_path_factory):
    small = Run(tmp_path_factory.mktemp("small"))
    run.compare()
    small.compare(asked(questions=5))
    assert small.rows("answers") == run.rows("answers")[:5]


def test_an_unfilled_sheet_waits(run):
    run.compare()
    before = run.path("answers.csv").read_bytes()
    assert "answers.csv waits for you: none of its 12 rows is decided. Write A, B or tie" in run.compare()
    assert run.path("answers.csv").read_bytes() == before and not run.path("results.json").exists()


def test_a_filled_sheet_is_a_win_rate_with_its_interval(run):
    run.compare()
    rows = run.rows("answers")
    for i, row in enumerate(rows):
        tuned = better_tuned(row)
        row["better?"] = tuned.lower() if i < 9 else "tie" if i == 9 else {"A": " b ", "B": "Answer A"}[tuned]
    run.save("answers", rows[::-1])
    said, found = run.compare(), run.results()["answers"]
    assert (found["wins"], found["losses"], found["ties"], found["undecided"], found["rate"]) == (9, 2, 1, 0, round(9.5 / 12, 6))
    assert found["without_ties"] == winrate.share(9, 11).to_dict() and found["p"] == round(winrate.sign_test(9, 2), 6)
    assert "isara (iteration 1) against base on dev questions: 9 better, 2 worse, 1 tied" in said
    assert "win rate 79 %, ties counting half; without ties 82 % of 11 (95 % interval 48 % to 98 %, exact), sign test p 0.065" in said
    assert "no preference can be told" in said and "11 decisions without ties show one from 10 wins or losses on" in said
    assert set(found["sentences"]) < set(run.said)


@pytest.mark.parametrize("tuned, said", [(True, "isara is preferred"), (False, "base is preferred")])
def test_who_is_preferred_is_said_where_it_can_be(run, tuned, said):
    run.compare()
    run.decide("answers", "better?", lambda row: better_tuned(row) if tuned else {"A": "B", "B": "A"}[better_tuned(row)])
    assert said in run.compare() and run.results()["answers"]["wins"] == (12 if tuned else 0)


def test_few_decisions_say_that_they_say_nothing(run):
    run.compare()
    run.decide("answers", "better?", lambda row: better_tuned(row) if int(row["row"]) <= 4 else "")
    said = run.compare()
    assert "4 decisions without ties can show no preference, whatever they are: at least 6 are needed" in said
    assert "8 rows are not decided yet" in said and run.results()["answers"]["undecided"] == 8


def test_equal_answers_are_not_shown_and_count_as_ties_when_all_is_decided(tmp_path):
    run = Run(tmp_path, equal=(3, 5, 8))
    assert "3 of 12 questions got equal answers: they count as ties and are not shown" in run.compare()
    assert len(run.rows("answers")) == 9 and len(run.key("answers")["equal"]) == 3
    run.decide("answers", "better?", lambda row: better_tuned(row) if int(row["row"]) < 9 else "")
    assert "the 3 questions with equal answers count as ties when all are" in run.compare()
    assert (run.results()["answers"]["wins"], run.results()["answers"]["ties"]) == (8, 0)
    run.decide("answers", "better?", better_tuned)
    run.compare()
    assert [run.results()["answers"][name] for name in ("wins", "ties", "rate", "equal")] == [9, 3, 0.875, 3]


def test_only_equal_answers_make_no_sheet(tmp_path):
    run = Run(tmp_path, equal=range(12))
    assert "all 12 questions got equal answers from isara and base" in run.compare() and not run.path("answers.csv").exists()


def test_fewer_answers_than_asked_for_are_all_taken(tmp_path):
    run = Run(tmp_path, answers=6)
    assert "6 questions have answers of both, fewer than the 50 asked for" in run.compare(asked(questions=50))
    assert len(run.rows("answers")) == 6


def test_a_question_that_several_rows_have_is_asked_once():
    twice = [Item(question="Q?", answer=a) for a in "abc"] + [Item(question="R?", answer="d")]
    assert sorted(i.question for i in blind.pick(twice, asked())) == ["Q?", "R?"]


def test_another_kept_arm_can_be_compared_with(run):
    run.compare(asked(against="sft_steps"))
    assert all({row["answer A"].split()[0], row["answer B"].split()[0]} == {"Tuned", "Seeds"} for row in run.rows("answers"))


def test_answers_that_were_not_kept_are_generated_once(tmp_path):
    run = Run(tmp_path, answers=0)
    (run.root / "iterations" / "01" / "DONE").write_text('{"iteration": 1, "kept": 60}')
    run.compare()
    assert all({row["answer A"].split(",")[0], row["answer B"].split(",")[0]} == {"New tuned", "New base"} for row in run.rows("answers"))
    run.decide("answers", "better?", lambda row: "A" if row["answer A"].startswith("New tuned") else "B")
    run.compare()
    assert run.generated == 1 and run.results()["answers"]["wins"] == 12 and run.results()["answers"]["forms"]["base"] == "chat"


# ----------------------------------------------------------------------------------------------------------------------- mistakes
def test_an_arm_without_answers_is_refused_with_those_that_have_some(run):
    said = "--against=icl_knn: the run kept no answers of this arm .* Take --against=base or one of sft_steps"
    with pytest.raises(UserError, match=said):
        run.compare(asked(against="icl_knn"))


def test_an_unfinished_run_is_refused(tmp_path):
    run = Run(tmp_path)
    (run.root / "evaluation" / "dev" / "results.json").unlink()
    (run.root / "metrics.jsonl").write_text(dump_line({"kind": "cost", "iteration": 1}))
    with pytest.raises(UserError, match="is not finished: it has no evaluation to compare answers of. Run its command again"):
        run.compare()
    assert not (run.root / "blind").exists()


@pytest.mark.parametrize("other, way_out", [(asked(questions=5), "--blind=12 --against=base"),
                                            (asked(against="sft_steps"), "move .* away first")])
def test_a_sheet_of_another_comparison_is_refused_and_kept(run, other, way_out):
    run.compare()
    before = run.path("answers.csv").read_bytes()
    with pytest.raises(UserError, match=f"compares isara of iteration 1 against base on 12 dev questions, .*{way_out}"):
        run.compare(other)
    assert run.path("answers.csv").read_bytes() == before


def test_a_sheet_of_an_earlier_iteration_is_refused(run):
    run.compare()
    path = run.root / "evaluation" / "dev" / "results.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"iteration": 2}))
    with pytest.raises(UserError, match="the run has gone on to iteration 2. Move .*blind away"):
        run.compare()


MISTAKES = {
    "another word": (lambda rows: rows[2].update({"better?": "the first"}), r"row 4: better\? is 'the first'; write A, B or tie, or"),
    "no such row": (lambda rows: rows[0].update({"row": "13"}), "row 2: the column row says '13', which is no row of this sheet"),
    "no number": (lambda rows: rows[0].update({"row": ""}), "row 2: the column row says nothing"),
    "a changed answer": (lambda rows: rows[1].update({"answer A": "Better."}), "row 3: these are not the texts that row 2 had"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_names_its_row(run, mistake):
    change, message = MISTAKES[mistake]
    run.compare()
    rows = run.rows("answers")
    change(rows)
    run.save("answers", rows)
    with pytest.raises(UserError, match=f"answers.csv, {message}"):
        run.compare()


def test_columns_sorted_without_the_others_are_seen(run):
    run.compare()
    rows = run.rows("answers")
    for row, question in zip(rows, sorted(row["question"] for row in rows)):
        row["question"] = question
    run.save("answers", rows)
    with pytest.raises(UserError, match="a column was sorted without the others"):
        run.compare()


def test_a_lost_sheet_or_key_is_made_again(run):
    run.compare()
    sheet, key = run.path("answers.csv").read_bytes(), run.path("answers.key.json").read_bytes()
    run.path("answers.csv").unlink()
    run.compare()
    assert run.path("answers.csv").read_bytes() == sheet
    run.decide("answers", "better?", better_tuned)
    run.path("answers.key.json").unlink()
    run.compare()
    assert run.path("answers.key.json").read_bytes() == key and run.results()["answers"]["wins"] == 12


def test_a_damaged_key_is_refused(run):
    run.compare()
    run.path("answers.key.json").write_text("{")
    with pytest.raises(UserError, match="answers.key.json is damaged or of another version"):
        run.compare()


# -------------------------------------------------------------------------------------------------------------------------- pairs
def kinds(run):
    """What the rows of the pair sheet are, by the key."""
    counts = {}
    for line in run.key("pairs")["rows"]:
        name = ("kept" if line["kept"] else line["filter"]) + (", alone" if line["alone"] else "")
        counts[name] = counts.get(name, 0) + 1
    return counts


def test_kept_and_rejected_pairs_stand_among_each_other(run):
    run.compare()
    rows, key = run.rows("pairs"), run.key("pairs")["rows"]
    assert list(rows[0]) == ["row", "question", "answer", "good?", "comment"]
    assert kinds(run) == {"kept": 50, "kept, alone": 8, "answer/truncated": 13, "answer/echo": 4, "question/min_words, alone": 8}
    kept = [line["kept"] for line in key]
    assert kept != sorted(kept) and kept != sorted(kept, reverse=True)
    for row, line in zip(rows, key):
        assert row["question"].startswith("Kept") == line["kept"] and (row["answer"] == "") == line["alone"]
    assert len({row["question"] for row in rows}) == len(rows)


def test_nothing_on_the_sheet_tells_kept_from_rejected(run):
    run.compare()
    assert {(row["good?"], row["comment"]) for row in run.rows("pairs")} == {("", "")}
    alone = [line for line in run.key("pairs")["rows"] if line["alone"]]
    assert sum(line["kept"] for line in alone) * 2 == len(alone) == 16  # a question without an answer is as often a kept one


def test_what_a_reader_cannot_see_is_left_out_and_small_runs_give_what_they_have(tmp_path):
    run = Run(tmp_path)
    run.reject([rejected("question", reason, 0) for reason in ("novelty", "leak", "exemplar_copy", "parse", "duplicate")]
               + [rejected("answer", "duplicate", 1), rejected("answer", "exemplar_copy", 2)])
    run.compare()
    assert kinds(run) == {"kept": 50, "answer/exemplar_copy": 1}


def test_the_share_of_good_pairs_and_each_filters_precision(run):
    run.compare()
    by_row = {str(line["row"]): line for line in run.key("pairs")["rows"]}
    said = {"answer/truncated": "no", "answer/echo": "yes", "question/min_words": "nein"}
    seen = iter(range(100))
    run.decide("pairs", "good?", lambda row: said[by_row[row["row"]]["filter"]] if not by_row[row["row"]]["kept"] else
               "yes" if by_row[row["row"]]["alone"] or next(seen) < 30 else "no")
    text, found = run.compare(), run.results()["pairs"]
    assert found["kept"] == winrate.share(30, 50).to_dict() and found["kept_questions"] == winrate.share(8, 8).to_dict()
    assert found["precision"] == {"answer/echo": winrate.share(0, 4).to_dict(), "answer/truncated": winrate.share(13, 13).to_dict(),
                                  "question/min_words": winrate.share(8, 8).to_dict()}
    assert "of the pairs that were kept 60 % (30 of 50, 95 % interval 45 % to 74 %) are good" in text
    assert "of what the filter answer/truncated rejected 100 % (13 of 13, 95 % interval 75 % to 100 %) is bad: its precision" in text
    assert found["undecided"] == 0 and "answers" not in run.results()


def test_part_of_the_pairs_may_be_decided_and_a_wrong_word_names_its_row(run):
    run.compare()
    run.decide("pairs", "good?", lambda row: "y" if row["row"] in ("1", "2") else "")
    assert "81 rows are not decided yet in pairs.csv" in run.compare()
    assert (run.results()["pairs"]["undecided"], len(run.rows("pairs"))) == (81, 83)
    run.decide("pairs", "good?", lambda row: "perhaps" if row["row"] == "1" else "")
    with pytest.raises(UserError, match=r"pairs.csv, row 2: good\? is 'perhaps'; write yes or no, or leave it empty"):
        run.compare()


def test_pairs_of_folds_are_taken_together(tmp_path):
    whole = Run(tmp_path / "whole")
    whole.compare()
    run = Run(tmp_path / "w")
    for name in ("pool", "iterations"):
        (run.root / "folds" / "1").mkdir(parents=True, exist_ok=True)
        (run.root / name).rename(run.root / "folds" / "1" / name)
    run.compare()
    assert len(run.rows("pairs")) == len(whole.rows("pairs")) and len(run.rows("answers")) == 12


def test_it_needs_no_jax():
    code = "import sys\nimport isara_jax.blind, isara_jax.review, isara_jax.data.sheets\nassert 'jax' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
