"""The rows of a benchmark's table, checked: what is wrong with a file in one message.

Messages name file and row and never quote text: a benchmark's text may be harmful.
"""
from __future__ import annotations

import dataclasses
import re
from typing import Any, Callable, Iterable, Mapping

from isara_jax.common import UserError
from isara_jax.data.items import Item
from isara_jax.data.tables import Table, complaint


def read_items(table: Table, columns: Iterable[str], make: Callable[[dict[str, Any]], Item | None]) -> list[Item]:
    """The item of each row, with its place; rows of which `make` makes None are left out.

    Raises `UserError` for a table without rows, for columns that are not there, and for rows that are broken or of which `make` raises
    ValueError, up to ten named in one message.
    """
    if not table.rows:
        raise UserError(f"{table.path} holds no rows, so there is nothing to evaluate on. Get the file again.")
    missing = [c for c in columns if c not in table.columns]
    if missing and any(row.values for row in table.rows):
        raise UserError(f"{table.path}: no column {' and no column '.join(map(repr, missing))}. Columns found: "
                        f"{', '.join(map(repr, table.columns[:20]))}. Rename the columns, or get the published file.")
    items, problems = [], {}
    for row in table.rows:
        try:
            item = None if row.values is None else make(row.values)
        except ValueError as e:
            problems[row.number] = str(e)
            continue
        if row.values is None:
            problems[row.number] = _unquoted(row.problem)
        elif item:
            items.append(dataclasses.replace(item, file=table.path.name if table.path.is_file() else str(table.path), row=row.number))
    if problems:
        raise UserError(complaint(table, problems))
    return items


def _unquoted(problem: str) -> str:
    """What is wrong with a row, without the text it holds."""
    return re.split(r": | \(", problem)[0]


def text(values: Mapping[str, Any], column: str, *, empty: bool = False) -> str:
    """The stripped text in a column. Raises ValueError where there is none, unless it may be `empty`."""
    value = values.get(column)
    if value is None or isinstance(value, str) and not value.strip():
        if empty:
            return ""
        raise ValueError(f"the column {column!r} is {'empty' if column in values else 'missing'}")
    return whole(value, column)


def texts(values: Mapping[str, Any], column: str) -> list[str]:
    """The texts in a column: a list, or one text with ";" between them, as TruthfulQA's CSV has it."""
    value = values.get(column)
    if value is not None and not isinstance(value, (str, list)):
        raise ValueError(f"the column {column!r} must be a list of texts, but is {type(value).__name__}")
    parts = value if isinstance(value, list) else (value or "").split(";")
    return [part for part in (whole(part, column) for part in parts) if part]


def whole(value: Any, column: str) -> str:
    """A value as stripped text with single newlines. Raises ValueError where it is no text, or no Unicode."""
    if not isinstance(value, str):
        raise ValueError(f"the column {column!r} must be text, but is or holds {type(value).__name__}")
    if any("\ud800" <= c <= "\udfff" for c in value):
        raise ValueError(f"the column {column!r} holds half of a surrogate pair, which is no character")
    return value.strip().replace("\r\n", "\n").replace("\r", "\n")


def joined(instruction: str, more: str) -> str:
    """An instruction and its input, on a line of its own, as for seeds."""
    return f"{instruction}\n{more}" if more else instruction
