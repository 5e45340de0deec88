"""Reading a workdir that may be unfinished or damaged: what cannot be read is noted in words, and the rest goes on the page."""
from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Callable

Row = dict[str, Any]


class Reader:
    """Reads files of one folder. `problems` collects a sentence for each file that is damaged; files that are absent are no problem."""

    def __init__(self, root: Path, problems: list[str], name: str = ""):
        self.root, self.problems, self._name = root, problems, name

    def inside(self, folder: str) -> Reader:
        """A reader of a folder below, with the same list of problems."""
        return Reader(self.root / folder, self.problems, f"{self._name}{folder}/")

    def there(self, name: str) -> bool:
        """Whether a plain file of that name is there."""
        return (self.root / name).is_file()

    def text(self, name: str) -> str:
        """The content, "" where there is no such file. Bytes that are no UTF-8 become replacement characters and are a problem."""
        path = self.root / name
        try:
            if not path.is_file():
                return ""
            data = path.read_bytes()
        except OSError as e:
            self.trouble(name, f"cannot be read ({e.strerror})")
            return ""
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            self.trouble(name, "is not UTF-8 throughout")
            return data.decode("utf-8", "replace")

    def table(self, name: str) -> Row:
        """A JSON object, {} where the file is absent or is none."""
        text = self.text(name)
        if not text:
            return {}
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            self.trouble(name, "is damaged or half-written")
            return {}
        return found

    def rows(self, name: str, **fields: type | tuple[type, ...]) -> list[Row]:
        """The rows of a file of JSON lines that have these fields with these types. Others are left out and counted as a problem.

        A last line without its line end is being written right now, or was when its run was killed: it is left out without a word.
        """
        lines = self.text(name).split("\n")
        found, bad = [], []
        for number, line in enumerate(lines[:-1], 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if isinstance(row, dict) and all(isinstance(row.get(field), kind) for field, kind in fields.items()):
                found.append(row)
            else:
                bad.append(number)
        if bad:
            shown = ", ".join(map(str, bad[:5])) + (", …" if len(bad) > 5 else "")
            self.trouble(name, f"has {len(bad)} line(s) that cannot be read ({shown}); they are left out")
        return found

    def trouble(self, name: str, what: str) -> None:
        """Note that a file has a problem."""
        self.problems.append(f"{self._name}{name} {what}.")

    def guarded(self, what: str, make: Callable[[], Any], otherwise: Any) -> Any:
        """`make()`, or `otherwise` and a note where files hold well-formed JSON of another shape than any run writes."""
        try:
            return make()
        except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError) as e:
            self.problems.append(f"{self._name or 'this folder'}: {what} cannot be shown, since a file has an unexpected content "
                                 f"({type(e).__name__}).")
            return otherwise


# ---------------------------------------------------------------------------------------------------------------------- values
def number(value: Any) -> float | None:
    """A finite number, or None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return value if math.isfinite(value) else None


def count(value: Any) -> int:
    """A whole number, 0 for anything else."""
    found = number(value)
    return int(found) if found is not None else 0


def texts(value: Any) -> list[str]:
    """The texts of a list, none where it is no list."""
    return [v for v in value if isinstance(v, str)] if isinstance(value, (list, tuple)) else []


def table(value: Any) -> Row:
    """A mapping, empty where it is none."""
    return value if isinstance(value, dict) else {}
