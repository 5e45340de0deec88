"""The blind sheets of a run, to be filled in on the page: `blind/answers.csv` and `blind/pairs.csv` as they are, and what came of them.

The keys, which say whose answer is whose, lie in other files. They are never read here. The formats are told in `isara_jax.blind`.
"""
from __future__ import annotations

import csv
import io
from typing import Any

from isara_jax.data.sheets import restored
from isara_jax.page.read import Reader, Row, count, number, table, texts

SHEETS = {"answers": ("answers.csv", ("A", "B", "tie")), "pairs": ("pairs.csv", ("yes", "no"))}
ASKED = "?"             # the one column whose name has it is to be filled in
COMMENT = "comment"


def blind(reader: Reader) -> Row:
    """{"sheets": […], "results": […]}; a sheet has its name, file, columns and rows (cells as they are in the
    file, to be written again), the positions of what is asked and of the comment, and (column, texts) of what is shown."""
    folder = reader.inside("blind")
    sheets = [found for name, (file, choices) in SHEETS.items() if (found := _sheet(folder, name, file, choices))]
    found = folder.table("results.json")
    return {"sheets": sheets, "results": [made for name in SHEETS if (made := _result(name, table(found.get(name))))]}


def _result(name: str, found: Row) -> Row | None:
    """What came of a sheet: its sentences, whether all rows are decided, and the share of wins with its interval where there is one."""
    shares = {"answers": [("wins, of wins and losses", table(found.get("without_ties")))],
              "pairs": [("kept pairs: good", table(found.get("kept"))), ("kept questions: good", table(found.get("kept_questions"))),
                        *((f"rejected by {name.replace('/', ': ')}: bad", table(s)) for name, s in table(found.get("precision")).items())]}
    drawn = [(label, [number(s.get(k)) for k in ("value", "low", "high")], count(s.get("count"))) for label, s in shares[name]]
    return found and {"name": name, "sentences": texts(found.get("sentences")), "whole": found.get("undecided") == 0,
                      "shares": [{"label": label, "interval": ends, "count": n} for label, ends, n in drawn if ends[0] is not None]}


def _sheet(folder: Reader, name: str, file: str, choices: tuple[str, ...]) -> Row | None:
    before = len(folder.problems)
    text = folder.text(file).removeprefix("\ufeff")
    if not text.strip() or len(folder.problems) > before:  # half-readable texts must not be judged, nor written into a new file
        return None
    first = text.split("\n", 1)[0]
    delimiter = max(",;\t", key=first.count)  # what spreadsheet programs save with
    try:
        columns, *rows = [row for row in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter) if any(row)]
    except (csv.Error, ValueError):
        folder.trouble(file, "is no table")
        return None
    asked = [i for i, column in enumerate(columns) if ASKED in column]
    if len(asked) != 1:
        folder.trouble(file, f"has {len(asked)} columns with a question mark in their name, and one is to be filled in")
        return None
    comment = next((i for i, column in enumerate(columns) if column.strip().lower() == COMMENT), -1)
    shown = [i for i, column in enumerate(columns) if column.lower().startswith(("question", "answer")) and i != asked[0]]
    rows = [_whole(row, len(columns)) for row in rows]
    return {"name": name, "file": file, "columns": columns, "rows": rows, "asked": asked[0], "comment": comment, "choices": list(choices),
            "shown": [[columns[i], [restored(row[i]) for row in rows]] for i in shown]}


def _whole(row: list[Any], width: int) -> list[Any]:
    return (row + [""] * width)[:width]
