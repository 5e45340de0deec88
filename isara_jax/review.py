"""Review before training: new pairs as a sheet for a person, and the decisions and edits that come back, as a filter named human.

    WORKDIR/review.csv                  the sheet of the iteration that waits: id, keep?, question, answer, exemplars, scores, comment,
                                        iteration
    WORKDIR/iterations/03/review.jsonl  what was decided, a line for each pair: id, decision (keep, edit, reject or deleted), question,
                                        answer, was (both before an edit, else null), new_id (of an edited pair, else null), comment
    WORKDIR/iterations/03/review.csv    the sheet it was read from

A pair that was kept passes `filters["human"]`; an edited one is a new pair, "edited" there, with the id it had under `was` and a person
among its authors. Imports no jax.
"""
from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any, Callable, Mapping, Sequence

from isara_jax.common import UserError, read_jsonl
from isara_jax.data import sheets
from isara_jax.data.pool import Record, pair_id
from isara_jax.data.rouge import tokens
from isara_jax.data.tables import Row, Table, complaint
from isara_jax.workdir import stage

SHEET = "review.csv"
COLUMNS = ("id", "keep?", "question", "answer", "exemplars", "scores", "comment", "iteration")
KEEP = "yes"              # what keep? says before anyone looked
EDITOR = "human (edited)"
EXEMPLAR = 80             # characters shown of an exemplar's question

Leak = Callable[[str], tuple[float, str] | None]
Fits = Callable[[str, str], str | None]


class Pending(Exception):
    """A person has to act before the run can go on. The text says what to do; `path` is the sheet that waits."""

    def __init__(self, path: Path, message: str):
        super().__init__(message)
        self.path = path


def reviewed(root: Path, folder: Path, t: int, records: Sequence[Record], by_id: Mapping[str, Record], leak: Leak | None,
             say: Callable[[str], None], *, fits: Fits | None = None) -> list[Record]:
    """The new pairs of iteration t that a person kept or edited, in their order; decided once, and the same at every later call.

    Args:
        root, folder: the run's folder and the iteration's.
        records: what the filters kept.
        by_id: the pool before them, by id.
        leak: (score, id) of the evaluation row that a question is near, or None.
        say: gets lines with counts, no texts.
        fits: what is wrong with an edited question and answer (too long for the model), or None where they do.

    Raises `Pending` where the sheet was just written, or nobody has changed it yet, and `UserError` naming the rows of a sheet that
    cannot be understood.
    """
    if not records:
        return []
    sheet, log = root / SHEET, folder / "review.jsonl"
    if not log.with_suffix(".done").exists():
        if not sheet.exists():
            _write(sheet, folder, t, records, by_id)
            raise Pending(sheet, f"{len(records)} new pairs of iteration {t} wait for you in {sheet}: open it in a spreadsheet program, "
                                 "set keep? to yes or no, mend questions and answers, save it as CSV (UTF-8) and run the same command. "
                                 + _facts())
        table = _read(sheet, t, records)
        if _untouched(table, records):
            raise Pending(sheet, f"{sheet} is as it was written, so nothing is decided yet on the {len(records)} new pairs of iteration "
                                 f"{t}: edit it and run the same command. To keep all of them as they are, write a comment in any row, for "
                                 f"example 'read'. {_facts()}")
        decided = _decisions(table, records, by_id, leak, fits)
        stage(log, lambda: decided)
    rows = stage(log, list)
    if sheet.exists() and not (folder / SHEET).exists():  # also after a crash between the two
        os.replace(sheet, folder / SHEET)
    count = lambda decision: sum(row["decision"] == decision for row in rows)
    say(f"review of iteration {t}: {count('keep')} kept as they are, {count('edit')} edited, {count('reject')} rejected, "
        f"{count('deleted')} deleted ({log})")
    return _apply(log, rows, records)


def _facts() -> str:
    return f"{sheets.FACTS[0].upper()}{sheets.FACTS[1:]}."


# ----------------------------------------------------------------------------------------------------------------------- writing
def _write(sheet: Path, folder: Path, t: int, records: Sequence[Record], by_id: Mapping[str, Record]) -> None:
    nearest, rows = _nearest(folder, by_id), []
    for r in records:
        used = dict.fromkeys((*r.question_exemplars, *r.answer_exemplars))
        exemplars = " / ".join(_short(by_id[i].question) for i in used if i in by_id)
        rows.append((r.id, KEEP, r.question, r.answer, exemplars, _scores(r, nearest.get(r.id, "")), "", t))
    sheets.write_sheet(sheet, COLUMNS, rows)


def _scores(record: Record, nearest: str) -> str:
    """How new the question is, beside which one, and how long both texts are."""
    novelty = record.filters.get("question/novelty", {}).get("score")
    said = [] if novelty is None else [f"ROUGE-L {novelty:.2f} to the nearest question" + (f": {nearest}" if nearest else "")]
    said.append(f"question {len(tokens(record.question))} words, answer {len(tokens(record.answer))} words")
    return "; ".join(said)


def _nearest(folder: Path, by_id: Mapping[str, Record]) -> dict[str, str]:
    """The question that each accepted pair's question is nearest to, short, as the novelty filter found it; {} where no such file is."""
    asked, answered = folder / "questions.jsonl", folder / "answers.jsonl"
    if not (asked.exists() and answered.exists()):
        return {}
    by_request, found = {row["request"]: row for row in read_jsonl(asked)}, {}
    for row in read_jsonl(answered):
        verdicts = by_request[row["request"]]["verdicts"]
        name = next((v["neighbour"] for v in verdicts if v["name"] == "novelty"), None) or ""
        request = name.removeprefix("request ")
        if name in by_id:
            text = by_id[name].question
        elif request.isdecimal() and int(request) in by_request:  # accepted before it in this iteration
            text = by_request[int(request)]["question"]
        else:
            text = "a held-out seed" if name == "held-out" else ""
        found[pair_id(row["question"], row["answer"])] = _short(text)
    return found


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= EXEMPLAR else line[:EXEMPLAR - 1] + "…"


# ----------------------------------------------------------------------------------------------------------------------- reading
def _read(sheet: Path, t: int, records: Sequence[Record]) -> Table:
    """The sheet, its rows known to be of these records and each there once at most."""
    known = [text for r in records for text in (r.question, r.answer)]
    table = sheets.read_sheet(sheet, ("id", "keep?", "question", "answer", "comment", "iteration"), known=known)
    for row in table.rows:
        if (of := row.values["iteration"].strip()) and of.isdecimal() and int(of) != t:
            raise UserError(f"{sheet}, row {row.number}: this is a sheet of iteration {of}, and iteration {t} is to be reviewed. Move it "
                            "away and run the same command to get the sheet of this iteration.")
    if not table.rows:
        raise UserError(f"{sheet} has no rows left. To reject every pair set keep? to no in all rows; to get the sheet anew, remove the "
                        "file and run the same command.")
    ids, problems, seen = {r.id for r in records}, {}, {}
    for row in table.rows:
        name = row.values["id"].strip()
        if name not in ids:
            problems[row.number] = (f"the id {sheets.shown(name)} is of no new pair" if name else "there is no id") + (
                ". Restore it from a copy, or remove the row; pairs of your own belong into the seeds")
        elif name in seen:
            problems[row.number] = f"the id {name} stands in row {seen[name]} already"
        seen.setdefault(name, row.number)
    _refuse(table, problems)
    return table


def _untouched(table: Table, records: Sequence[Record]) -> bool:
    by_id = {r.id: r for r in records}
    return len(table.rows) == len(records) and all(
        row.values["keep?"].strip().casefold() == KEEP and not row.values["comment"].strip()
        and sheets.same(row.values["question"], by_id[row.values["id"].strip()].question)
        and sheets.same(row.values["answer"], by_id[row.values["id"].strip()].answer) for row in table.rows)


def _decisions(table: Table, records: Sequence[Record], by_id: Mapping[str, Record], leak: Leak | None,
               fits: Fits | None) -> list[dict[str, Any]]:
    """What `review.jsonl` holds, in the order of the records."""
    rows, problems, made = {row.values["id"].strip(): row for row in table.rows}, {}, []
    for record in records:
        row = rows.get(record.id)
        decided, problem = _decision(record, row)
        if problem:
            problems[row.number] = problem
        made.append(decided)
    final: dict[str, int] = {}
    for kept in (d for d in made if d["decision"] == "keep"):
        final[kept["id"]] = rows[kept["id"]].number
    for edited in (d for d in made if d["decision"] == "edit"):
        number = rows[edited["id"]].number
        if problem := _edit_problem(edited, final, by_id, leak, fits):
            problems.setdefault(number, problem)
        final[edited["new_id"]] = number
    _refuse(table, problems)
    return made


def _decision(record: Record, row: Row | None) -> tuple[dict[str, Any], str]:
    """(a line of `review.jsonl`, what is wrong with the row)."""
    line = {"id": record.id, "decision": "deleted", "question": record.question, "answer": record.answer, "was": None, "new_id": None,
            "comment": "" if row is None else sheets.tidy(row.values["comment"])}
    if row is None:
        return line, ""
    keep, texts = sheets.decision(row.values["keep?"]), {name: row.values[name] for name in ("question", "answer")}
    if keep is None:
        value = row.values["keep?"].strip()
        return line, f"keep? is {sheets.shown(value) if value else 'empty'}; write yes or no"
    if not keep:
        return line | {"decision": "reject"}, ""
    changed = {name: sheets.tidy(cell) for name, cell in texts.items() if not sheets.same(cell, getattr(record, name))}
    for name, text in changed.items():
        if not text:
            return line, f"the {name} is empty; restore it, or set keep? to no"
        if sheets.lost_letters(text, getattr(record, name)):
            return line, (f"letters of the {name} became question marks: the file was saved in an encoding that lacks them. Save it as "
                          "CSV UTF-8, from a copy with all letters")
    if not changed:
        return line | {"decision": "keep"}, ""
    was = {name: line[name] for name in ("question", "answer")}
    line |= {"decision": "edit", **changed, "was": was}
    return line | {"new_id": pair_id(line["question"], line["answer"])}, ""


def _edit_problem(line: dict[str, Any], final: Mapping[str, int], by_id: Mapping[str, Record], leak: Leak | None, fits: Fits | None) -> str:
    if line["new_id"] in by_id:
        return f"after the edit it is the pair {line['new_id']}, which the pool has already"
    if line["new_id"] in final:
        return f"after the edit it is the same pair as row {final[line['new_id']]}"
    if near := leak(line["question"]) if leak else None:
        return (f"after the edit the question is near the evaluation row {near[1]} (ROUGE-L F {near[0]:.2f}, above 0.6); training on it "
                "would make the results worthless")
    return (fits(line["question"], line["answer"]) if fits else None) or ""


def _refuse(table: Table, problems: dict[int, str]) -> None:
    if problems:
        raise UserError(complaint(table, problems))


# ---------------------------------------------------------------------------------------------------------------------- applying
def _apply(log: Path, rows: Sequence[dict[str, Any]], records: Sequence[Record]) -> list[Record]:
    if [row["id"] for row in rows] != [r.id for r in records]:
        raise UserError(f"{log} is the review of other pairs than those of kept.jsonl beside it. Restore both, or take another --workdir.")
    made = []
    for row, record in zip(rows, records):
        if row["decision"] == "keep":
            made.append(dataclasses.replace(record, filters=record.filters | {"human": {"verdict": "pass", "score": None}}))
        elif row["decision"] == "edit":
            verdict = {"verdict": "edited", "score": None, "was": record.id}
            made.append(dataclasses.replace(
                record, id=row["new_id"], question=row["question"], answer=row["answer"], filters=record.filters | {"human": verdict},
                author="; ".join(sorted({*record.author.split("; "), EDITOR}))))
    return made
