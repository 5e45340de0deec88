"""Questions to be answered, from a file as people have it: a table with a column for them, or a text with one a line."""
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isara_jax.common import UserError
from isara_jax.data.seeds import COLUMNS, USUAL, first_column
from isara_jax.data.tables import Row, Table, complaint, describe, read_table


@dataclass(frozen=True)
class Questions:
    """The questions of a file in its order, and the place of each in `table`: the number of its row there."""

    table: Table
    rows: tuple[int, ...]
    texts: tuple[str, ...]


def read_questions(file: str | Path, column: str | None = None) -> Questions:
    """Read a .txt file (a question a line), or a .jsonl, .json or .csv file with a column of questions as in a file of seeds.

    `column` names it where its name is not a usual one. An answer beside it is not read. Raises one `UserError` that names the file and up
    to ten rows without a question.
    """
    path = Path(file).expanduser()
    table = _lines(path) if path.suffix.casefold() == ".txt" else read_table(path)
    if not table.rows:
        raise UserError(f"{path} holds no questions. Write one in each {table.unit}.")
    usual = [column.strip().casefold()] if column else COLUMNS["question"]
    found = column if column in table.columns else first_column(table.columns, usual)
    if found is None and any(row.values is not None for row in table.rows):
        raise UserError(f"{path}: no column for questions ({column or ', '.join(USUAL['question'])}). Columns found: "
                        f"{', '.join(map(repr, table.columns[:20])) or 'none'}. Say which to take with --question=COLUMN.")
    more = first_column(table.columns, ("input", "context")) if found and found.strip().casefold() == "instruction" else None
    made = {row.number: row.problem if row.values is None else _question(row.values, found, more) for row in table.rows}
    if problems := {number: text for number, text in made.items() if isinstance(text, str)}:
        raise UserError(complaint(table, problems))
    return Questions(table, tuple(made), tuple(text for (text,) in made.values()))


def _question(values: dict[str, Any], column: str, more: str | None) -> tuple[str] | str:
    """(the question,) of a row, with its input on a line of its own as for seeds, or what is wrong with it."""
    value = values.get(column)
    if value is None or isinstance(value, str) and not value.strip():
        return f"the question (column {column!r}) is {'empty' if column in values else 'missing'}"
    if not isinstance(value, str):
        return f"the question (column {column!r}) must be text, but is {describe(value)}"
    text = "\n".join(filter(None, (value.strip(), str(values.get(more) or "").strip() if more else "")))
    if any("\ud800" <= c <= "\udfff" for c in text):
        return f"the question (column {column!r}) holds half of a surrogate pair, which is no character"
    return (text.replace("\r\n", "\n").replace("\r", "\n"),)


def _lines(path: Path) -> Table:
    """A text file as a table with one column; blank lines are left out."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as e:
        raise UserError(f"{path} cannot be read: {e.strerror}. Check the path.") from None
    except UnicodeDecodeError as e:
        line = e.object.count(b"\n", 0, e.start) + 1
        raise UserError(f"{path}, line {line}: byte 0x{e.object[e.start]:02x} is not UTF-8. Save the file as UTF-8 text.") from None
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return Table(path, "line", ("question",), tuple(Row(n, {"question": line}) for n, line in enumerate(lines, 1) if line.strip()))
