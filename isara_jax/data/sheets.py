"""Sheets that people fill in: CSV files that spreadsheet programs open without running anything, and what comes back from them.

A file is UTF-8 with a byte-order mark, comma-separated, every cell quoted, rows ended by CRLF. Three kinds of text get an apostrophe in
front, as people type it to make a cell a text:

    formulas     = + - @ (full-width ones too) at the beginning, also behind blanks and quotes; a tab or line break there
    values       what a program would turn into a number, a date or a truth value: 007, 1/2, 5 May, 1234567890123e45, true
    apostrophes  a text that begins with one, so that reading takes off exactly what writing put there

A program set to another separator splits our cells at ; tab and line breaks. A formula behind one of these inside a text gets its
apostrophe too (one that begins with + or - only where the line holds a bracket, bar or exclamation mark, without which it can do nothing:
lists stay readable).

Reading gives every text back exactly, and also where the program took the apostrophe for its own; only a text that begins with two, or with
one before a formula or value, may then lose one. Control characters (but tab and line breaks) and lone surrogates are not
written: CSV programs lose or refuse them.
"""
from __future__ import annotations

import codecs
import contextlib
import csv
import dataclasses
import io
import re
import tempfile
import unicodedata
from pathlib import Path
from typing import Collection, Iterable, Sequence

from isara_jax.common import UserError, atomic_write, content_hash
from isara_jax.data.tables import Row, Table, complaint, read_table

MOST = 32_767     # characters that a cell of Excel holds
SHOWN = 20        # longest wrong value that a message repeats: more is a text, which may be nobody's business on a screen
COMPARED = 50     # known texts by which an old encoding is recognised
YES = frozenset("yes y ja j oui si sí sì sim 1 true t wahr vrai verdadero vero x keep kept ok".split())
NO = frozenset("no n nein non não 0 false f falsch faux falso reject rejected drop delete".split())
FACTS = "generated answers are not fact-checked"

_QUOTES = "\u200b\u200c\u200d\u2060\ufeff\"“”„‟‘’‚‛«»‹›`´"  # and what cannot be seen: what may stand before the sign of a formula
_LOST = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")  # control characters and lone surrogates
_FORMULA = re.compile(rf"[\s'{_QUOTES}]*[=+\-@＝＋－＠]|[\t\r\n]")
_INSIDE = rf"(?<=[;\t\r\n])((?:[^\S\t\r\n]|[{_QUOTES}])*){{}}('*)(?=[=@＝＠]|[+\-＋－][^;\t\r\n]*[(|!])"
_PUT, _TAKE = re.compile(_INSIDE.format("")), re.compile(_INSIDE.format("'"))
_NUMBER = re.compile(r"(?=\D*\d)[ \u00a0\u202f\d.,:/%€$£¥()+\-–−eE’_]{1,40}")
_DATE = re.compile(r"[\w .,/:\-]{1,24}")
_TRUTH = frozenset("true false wahr falsch vrai faux verdadero falso vero".split())
_CODEPAGES = ("cp1252", "cp1250", "cp1251", "cp1253", "cp1254", "cp1257", "cp932", "gb18030", "big5", "cp949", "mac_roman")


def write_sheet(path: str | Path, columns: Sequence[str], rows: Iterable[Sequence[str | int]]) -> None:
    """Write a sheet atomically. A cell is a text, made safe, or a whole number, left as it is.

    Raises `UserError` for a text that no cell of a spreadsheet holds.
    """
    out = io.StringIO(newline="")
    writer = csv.writer(out, quoting=csv.QUOTE_ALL, lineterminator="\r\n")
    writer.writerow(columns)
    for number, row in enumerate(rows, 2):
        if long := [name for name, cell in zip(columns, row, strict=True) if isinstance(cell, str) and len(cell) >= MOST]:
            raise UserError(f"{path}, row {number}: the {long[0]} has more characters than the {MOST:,} that a cell of a spreadsheet "
                            "holds, so the sheet was not written. Lower config.generate.answer.max_new_tokens or do without the sheet.")
        writer.writerow([guarded(cell) if isinstance(cell, str) else cell for cell in row])
    atomic_write(path, codecs.BOM_UTF8 + out.getvalue().encode())


def read_sheet(path: str | Path, columns: Sequence[str], *, optional: Sequence[str] = (), known: Collection[str] = ()) -> Table:
    """A sheet as a spreadsheet program saved it: any of its delimiters and encodings, columns and rows moved, columns added, blank rows.

    Args:
        columns: what the sheet must have; capitals and blanks in names do not matter. Other columns are dropped.
        optional: columns that may be missing; their cells are then "".
        known: texts that were written to it, by which an encoding older than Unicode is recognised (else Western Windows is assumed).

    Returns a table whose rows all have values, texts as they were before `write_sheet` made them safe. Raises one `UserError` naming file
    and rows, or the column that is missing.
    """
    path = Path(path)
    table = _table(path, known)
    if problems := {row.number: row.problem for row in table.rows if row.values is None}:
        raise UserError(complaint(table, problems))
    found = {_name(column): column for column in reversed(table.columns)}
    if missing := [c for c in columns if _name(c) not in found]:
        there = ", ".join(map(shown, filter(None, table.columns)))
        raise UserError(f"{path}: the column {missing[0]!r} is missing; there are {there}. Restore the header row. If your program "
                        "showed everything in one column, bring the file in through its import dialog (Excel: Data, From Text/CSV) with "
                        "UTF-8 and the comma as separator.")
    names = {c: found.get(_name(c), "") for c in (*columns, *optional)}
    cell = lambda row, name: restored(str(row.values[name])) if name else ""
    rows = tuple(Row(row.number, {c: cell(row, name) for c, name in names.items()}) for row in table.rows)
    return Table(path, table.unit, tuple(names), rows)


# ------------------------------------------------------------------------------------------------------------------------- cells
def guarded(text: str) -> str:
    """A text as a cell that no program runs or converts."""
    text = _writable(text)
    inside = _PUT.sub(r"\1'\2", text)
    return f"'{inside}" if text.startswith("'") or _risky(text) else inside


def restored(cell: str) -> str:
    """The text of a cell that `guarded` made, whether a program kept its first apostrophe or dropped it."""
    if cell.startswith("'") and (cell.startswith("''") or _risky(cell[1:])):
        cell = cell[1:]
    return _TAKE.sub(r"\1\2", cell)


def same(cell: str, text: str) -> bool:
    """Whether a cell that was read still holds a text that was written: line ends, outer blanks and first apostrophes do not count."""
    return _core(cell) == _core(text)


def tidy(cell: str) -> str:
    """A text that a person wrote into a cell: \\n as line ends, no outer blanks, no control characters."""
    return re.sub(r"\r\n?", "\n", _writable(cell)).strip()


def lost_letters(cell: str, text: str) -> bool:
    """Whether a cell is a text whose letters became question marks: what saving in an encoding that lacks them leaves."""
    left = lambda t: "".join(c for c in _core(t) if c.isascii() and c != "?")
    return cell.count("?") > text.count("?") and left(cell) == left(text)


def fingerprint(*texts: str) -> str:
    """Tells rows apart by the plain letters and digits in their texts, which outlive any program and encoding."""
    return content_hash(*(re.sub("[^A-Za-z0-9]", "", text) for text in texts))


def decision(cell: str) -> bool | None:
    """What a yes-or-no cell says, in several languages and whatever its capitals; None where it says neither."""
    word = _name(cell)
    return True if word in YES else False if word in NO else None


def shown(value: str) -> str:
    """A wrong value for a message; one so long that it is some text is only counted."""
    return repr(value) if len(value) <= SHOWN and value.isprintable() else f"a text of {len(value)} characters"


def _writable(text: str) -> str:
    return _LOST.sub("", text)


def _core(text: str) -> str:
    return re.sub(r"^[\s']+", "", tidy(text))


def _risky(text: str) -> bool:
    """Whether a program would run a cell with this text, or make another value of it."""
    if _FORMULA.match(text) or _NUMBER.fullmatch(text) or text.strip().casefold() in _TRUTH:
        return True
    words, numbers = (re.findall(kind, text) if _DATE.fullmatch(text) else [] for kind in (r"[^\W\d_]+", r"\d+"))
    return len(words) == 1 and 1 <= len(numbers) <= 3 and max(map(len, numbers)) <= 4  # 5 May, MAY2021, 5 pm


def _name(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


# -------------------------------------------------------------------------------------------------------------------------- file
def _table(path: Path, known: Collection[str]) -> Table:
    """The table in a file; `read_table` knows UTF-8 alone, so it gets a copy of what is in another encoding."""
    encoding = _encoding(path, known)
    if encoding is None:
        return read_table(path)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / path.name
        copy.write_text(path.read_bytes().decode(encoding), encoding="utf-8", newline="")
        try:
            return dataclasses.replace(read_table(copy), path=path)
        except UserError as e:
            raise UserError(str(e).replace(str(copy), str(path))) from None


def _encoding(path: Path, known: Collection[str]) -> str | None:
    """The encoding of a file that is not UTF-8, or None for one that is, that cannot be read or that nothing is known about."""
    try:
        data = path.read_bytes()
        if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            data.decode("utf-16")
            return "utf-16"
        data.decode("utf-8-sig")
    except OSError:
        return None
    except UnicodeDecodeError:
        return _codepage(data, [t for t in known if not t.isascii()][:COMPARED])
    return None


def _codepage(data: bytes, known: Sequence[str]) -> str | None:
    """The one in which most of the texts are found; Western Windows where none is found in any."""
    squashed = lambda text: "".join(text.replace('"', "").replace("'", "").split())
    found: dict[str, int] = {}
    for name in _CODEPAGES:
        with contextlib.suppress(UnicodeDecodeError):
            text = squashed(data.decode(name))
            found[name] = sum(squashed(t) in text for t in known)
            if known and found[name] == len(known):
                return name
    best = max(found, key=lambda name: found[name], default=None)
    return best if best == "cp1252" or best and found[best] else None
