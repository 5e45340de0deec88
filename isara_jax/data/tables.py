"""Rows of a text file that people made: CSV, JSON or JSON lines, told apart by content as well as by name."""
from __future__ import annotations

import csv
import difflib
import gzip
import io
import itertools
import json
import re
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterator

from isara_jax.common import UserError

DELIMITERS = ",;\t|"
_SEP = re.compile(r'"?sep=([,;\t|])"?\r?\n', re.IGNORECASE)  # a first line by which Excel is told the delimiter; it shows no such row
_JSON, _JSON_LINES = (".json",), (".jsonl", ".ndjson")
SHOWN = 10                  # problems named in one message
MOST_UNPACKED = 1 << 30     # bytes that a gzip file may unpack to
_GZIP = b"\x1f\x8b"
_TABLES = (*_JSON, *_JSON_LINES, ".csv", ".tsv")
_EXCEL = ("Open it in Excel and save it as 'CSV UTF-8' (File > Save As), or in LibreOffice as 'Text CSV' with the character set "
          "'Unicode (UTF-8)'; only the sheet in view is saved")
_LIBREOFFICE = "Open it in LibreOffice, choose File > Save As > 'Text CSV' and there 'Unicode (UTF-8)'; only the sheet in view is saved"
_NUMBERS = "Open it in Numbers, choose File > Export To > CSV and there 'Unicode (UTF-8)'; each table becomes a file"
_NO_TABLE = "Copy its questions and answers into two columns of a spreadsheet, and save that as 'CSV UTF-8'"
_ZIP, _OLE = b"PK\x03\x04", b"\xd0\xcf\x11\xe0"
_BINARY = {  # how a file begins -> what it is, and how it becomes one that can be read
    b"PAR1": "is a Parquet file. Convert it with pandas: read_parquet(…).to_json(…, orient='records', lines=True)",
    b"%PDF": f"is a PDF. {_NO_TABLE}",
    b"{\\rtf": f"is a text document (RTF). {_NO_TABLE}",
    b"SQLite format 3": "is an SQLite database. Export the table with the pairs as CSV",
    b"BZh": "is compressed with bzip2. Unpack it",
    b"\xfd7zXZ": "is compressed with xz. Unpack it",
    b"7z\xbc\xaf": "is a 7-Zip archive. Unpack it",
    b"\x89PNG": f"is a picture. {_NO_TABLE}",
    b"\xff\xd8\xff": f"is a picture. {_NO_TABLE}",
}
_ZIPPED = {  # what a file in a zip archive begins with -> the same; the first that is there
    "xl/": f"is an Excel workbook. {_EXCEL}",
    "word/": f"is a Word document. {_NO_TABLE}",
    "ppt/": f"is a PowerPoint presentation. {_NO_TABLE}",
    "Index/Document.iwa": f"is a Numbers document. {_NUMBERS}",
    "Index.zip": f"is a Numbers document. {_NUMBERS}",
}
_PAGE = re.compile(r"\s*<(?:!doctype|html|head|meta|table|body|\?xml)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Row:
    """One row: its number as an editor or a spreadsheet shows it, and either its values by column or what is wrong with it."""

    number: int
    values: dict[str, Any] | None
    problem: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of a file. `unit` is the word for a row's number: line (JSON lines), item (JSON) or row (CSV, the header being row 1)."""

    path: Path
    unit: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]


def read_table(path: str | Path) -> Table:
    """Read a CSV (`,`, `;`, tab or `|`), JSON or JSON-lines file, compressed with gzip or not.

    Whatever stops the whole file from being read raises `UserError`; what is wrong with single rows is in the rows.
    """
    path = Path(path).expanduser()
    text = _text(path, _bytes(path))
    suffix = _suffix(path)
    if text.lstrip()[0] in "{[" or suffix in _JSON + _JSON_LINES:
        unit, rows = _json(path, text, suffix)
        return Table(path, unit, tuple(dict.fromkeys(column for row in rows for column in row.values or ())), rows)
    columns, rows = _csv(path, text)
    return Table(path, "row", columns, rows)


def complaint(table: Table, problems: dict[int, str]) -> str:
    """What is wrong with rows, by number, as one message: on one line for a single problem, else a line for each of the first ten."""
    lines = [f"{table.unit} {number}: {problems[number]}" for number in sorted(problems)]
    if len(lines) == 1:
        return f"{table.path}, {lines[0]}. Mend or remove it and start again."
    more = [f"… and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
    return "\n  ".join([f"{table.path} has {len(lines)} problems; mend or remove these and start again:", *lines[:SHOWN], *more])


# ------------------------------------------------------------------------------------------------------------------ file to text
def _bytes(path: Path) -> bytes:
    if path.is_dir():
        raise UserError(f"{path} is a folder; name one file in it. {_there(path)}")
    try:
        data = path.read_bytes()
        return _unpack(path, data) if data.startswith(_GZIP) else data
    except (FileNotFoundError, NotADirectoryError):
        if not path.parent.is_dir():
            raise UserError(f"{path} does not exist: there is no folder {path.parent}. Check the path.") from None
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.iterdir()], 3)
        hint = f"Did you mean {' or '.join(str(path.parent / n) for n in near)}?" if near else _there(path.parent)
        raise UserError(f"{path} does not exist. {hint}") from None
    except OSError as e:
        raise UserError(f"{path} cannot be read: {e.strerror}. Check its permissions.") from None


def _unpack(path: Path, data: bytes) -> bytes:
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as f:
            unpacked = f.read(MOST_UNPACKED + 1)
    except (OSError, EOFError, zlib.error) as e:
        raise UserError(f"{path} is damaged: gzip cannot unpack it ({e}). Get it again.") from None
    if len(unpacked) > MOST_UNPACKED:
        raise UserError(f"{path} unpacks to more than {MOST_UNPACKED:,} bytes, which is too much to read at once. Keep the rows you need.")
    return unpacked


def _suffix(path: Path) -> str:
    """What the name says about the content: the ending, before .gz if that is the last one."""
    return Path(path.stem if path.suffix.casefold() == ".gz" else path.name).suffix.casefold()


def _there(folder: Path) -> str:
    names = sorted(p.name for p in folder.iterdir() if _suffix(p) in _TABLES)
    return f"{folder.absolute()} holds {', '.join(names[:8])}{', …' if len(names) > 8 else ''}." if names else (
        f"{folder.absolute()} holds no {', '.join(_TABLES)} file.")


def _text(path: Path, data: bytes) -> str:
    if what := _binary(data):
        raise UserError(f"{path} {what}. Then name the new file.")
    utf16 = data.startswith((b"\xff\xfe", b"\xfe\xff"))
    try:
        if utf16:
            raise UnicodeDecodeError("utf-8", data, 0, 1, "UTF-16")
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise UserError(_not_utf8(path, data, e.start, "UTF-16" if utf16 else "")) from None
    if _PAGE.match(text):
        raise UserError(f"{path} is a web page or XML, as some programs save tables under the name of a workbook. {_EXCEL}. Then name the "
                        "new file.")
    if not text.strip():
        raise UserError(f"{path} is empty. It must hold question-answer pairs: CSV with a header row, JSON, or JSON lines.")
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise UserError(f"{path}, line {line}: holds NUL bytes, so it is UTF-16 or no text file. Save it as UTF-8 text.")
    return text


def _binary(data: bytes) -> str:
    """What a file is that is no text, and how it becomes one; "" for what may be text. Its name plays no part."""
    if data.startswith(_ZIP):
        return _zipped(data)
    if data.startswith(_OLE):
        if "WordDocument".encode("utf-16-le") in data:
            return f"is an old Word document. {_NO_TABLE}"
        locked = "EncryptedPackage".encode("utf-16-le") in data
        return f"is an {'Excel workbook with a password' if locked else 'old Excel workbook'}. {_EXCEL}"
    return next((what for magic, what in _BINARY.items() if data.startswith(magic)), "")


def _zipped(data: bytes) -> str:
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            names = archive.namelist()
            kind = archive.read("mimetype")[:200] if "mimetype" in names and archive.getinfo("mimetype").file_size < 200 else b""
    except (zipfile.BadZipFile, zlib.error, OSError, ValueError, NotImplementedError, RuntimeError):
        names, kind = [], b""
    if b"opendocument" in kind:
        return f"is a LibreOffice spreadsheet. {_LIBREOFFICE}" if b"spreadsheet" in kind else f"is a LibreOffice document. {_NO_TABLE}"
    return next((what for part, what in _ZIPPED.items() if any(name.startswith(part) for name in names)),
                "is a zip archive, as Excel and LibreOffice workbooks are. Open it there and save it as 'CSV UTF-8', or unzip it")


def _not_utf8(path: Path, data: bytes, start: int, encoding: str) -> str:
    """Where the first byte is that is not UTF-8, what it would be in the encoding of Western Windows, and how to convert."""
    where = f"{path}, line {data.count(bytes([10]), 0, start) + 1}: byte 0x{data[start]:02x}"
    if not encoding:
        try:
            data.decode("cp1252")
        except UnicodeDecodeError:
            return f"{where} is not UTF-8. Save the file as UTF-8 text."
        encoding = "CP1252"
        where += f" (it would be {data[start:start + 1].decode('cp1252')!r} in Windows-1252)"
    kind = f"{encoding} (Excel's 'Unicode Text')" if encoding == "UTF-16" else encoding
    return (f"{where} is not UTF-8. The file seems to be {kind}; convert it with `iconv -f {encoding} -t UTF-8 {path.name} > "
            f"{path.stem}.utf8{path.suffix}`, or save it as UTF-8 (Excel: 'CSV UTF-8').")


# -------------------------------------------------------------------------------------------------------------------------- JSON
def _json(path: Path, text: str, suffix: str) -> tuple[str, tuple[Row, ...]]:
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError) as e:
        first = text.strip().split("\n", 1)[0].rstrip().rstrip(",")
        if suffix in _JSON_LINES or first.startswith("{") and first.endswith("}"):
            return "line", tuple(_json_lines(text))
        known = isinstance(e, json.JSONDecodeError)  # else a number of thousands of digits, or brackets thousands deep
        what = f", line {e.lineno}: not valid JSON ({e.msg}, column {e.colno})" if known else ": not usable JSON"
        raise UserError(f"{path}{what}. Mend it there; nothing was read.") from None
    if isinstance(whole, dict):
        lists = {key: value for key, value in whole.items() if isinstance(value, list) and any(isinstance(v, dict) for v in value)}
        if len(lists) > 1:
            raise UserError(f"{path} holds several lists: {', '.join(lists)}. Keep only the one with the pairs, or save it alone.")
        whole = next(iter(lists.values()), [whole])
    if not isinstance(whole, list):
        raise UserError(f"{path} holds {describe(whole)}. It must hold a list of objects such as {{\"question\": …, \"answer\": …}}.")
    return "item", tuple(_json_row(number, value) for number, value in enumerate(whole, 1))


def _json_lines(text: str) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            yield _json_row(number, json.loads(line))
        except json.JSONDecodeError as e:
            yield Row(number, None, f"not valid JSON ({e.msg}, column {e.colno}): {short(line)}")
        except (ValueError, RecursionError):
            yield Row(number, None, f"not usable JSON: {short(line)}")


def _json_row(number: int, value: Any) -> Row:
    if isinstance(value, dict):
        return Row(number, value)
    return Row(number, None, f"must be an object with named fields, but is {describe(value)}")


def describe(value: Any) -> str:
    """What a value is, and the value, for a message: a number (42)."""
    names = {str: "text", bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object", type(None): "null"}
    return f"{names.get(type(value), type(value).__name__)} ({short(value)})"


def short(value: Any, size: int = 40) -> str:
    """A value on one line for a message, cut to `size` characters."""
    text = ascii(value) if isinstance(value, str) and not value.isprintable() else repr(value)
    return text if len(text) <= size else text[:size - 1] + "…"


# --------------------------------------------------------------------------------------------------------------------------- CSV
def _csv(path: Path, text: str) -> tuple[tuple[str, ...], tuple[Row, ...]]:
    told = _SEP.match(text)
    rest = text[told.end():] if told else text
    records = _records(rest, told[1] if told else _delimiter(text), 2 if told else 1)
    number, header, problem = next((r for r in records if r[1] is None or any(map(str.strip, r[1]))), (0, None, ""))
    if problem:
        raise UserError(f"{path}, row {number}: a quote in the header row is not closed or not doubled. Mend it there.")
    if header is None:
        raise UserError(f"{path} holds only empty cells. It must hold question-answer pairs below a header row.")
    columns = tuple(name.strip() for name in header)
    twice = sorted({name for name in columns if name and columns.count(name) > 1})
    if twice:
        raise UserError(f"{path}, row 1: the column {twice[0]!r} is there twice. Rename or remove one.")
    return columns, tuple(_csv_row(number, fields, problem, columns) for number, fields, problem in records
                          if fields is None or any(map(str.strip, fields)))


def _records(text: str, delimiter: str, first: int = 1) -> Iterator[tuple[int, list[str] | None, str]]:
    """(row number, fields, problem) of each record. A quoting error ends the file: what follows could be read wrongly.

    `first` is the line of the file that `text` begins in.
    """
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    for number in itertools.count(1):
        line = reader.line_num + first
        try:
            yield number, next(reader), ""
        except StopIteration:
            return
        except csv.Error:
            yield number, None, (f"a quote is not closed or not doubled in the text that begins in line {line} of the file: "
                                 'write "" for a quote inside quoted text. What follows was not read')
            return


def _delimiter(text: str) -> str:
    """The delimiter that splits the header, and the first rows most like it."""

    def score(delimiter: str) -> tuple[bool, float, int]:
        rows = [r for _, r, _ in itertools.islice(_records(text, delimiter), 50) if r]
        width = len(rows[0]) if rows else 0
        return width > 1, sum(len(r) == width for r in rows) / max(len(rows), 1), width

    return max(DELIMITERS, key=score)


def _csv_row(number: int, fields: list[str] | None, problem: str, columns: tuple[str, ...]) -> Row:
    if fields is None:
        return Row(number, None, problem)
    if any(map(str.strip, fields[len(columns):])):
        return Row(number, None, f"has {len(fields)} fields, but the header has {len(columns)}: quote text that holds the delimiter")
    return Row(number, dict(zip(columns, fields + [""] * (len(columns) - len(fields)))))
