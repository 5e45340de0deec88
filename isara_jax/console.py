"""What people see: notes, progress and tables on a terminal, plain lines elsewhere, and all notes in log.txt.

Text that a model or a file brought is inert: control and bidirectional characters are shown as escapes, markup is not interpreted.
With `sensitive` only ids, lengths and verdicts are shown.
"""
from __future__ import annotations

import contextlib
import time
import unicodedata
from pathlib import Path
from typing import Any, Iterator, Sequence

import rich.box
from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress as RichProgress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

PLAIN_SECONDS = 10.0  # between two progress lines where there is no terminal


class Console:
    """One per run. `log` is a file to which every line is appended as well, or None."""

    def __init__(self, log: Path | None, *, sensitive: bool = False):
        self._screen = RichConsole(highlight=False, soft_wrap=True)
        self._sensitive, self._log = sensitive, None
        if log is not None:
            log.parent.mkdir(parents=True, exist_ok=True)
            self._log = open(log, "a", encoding="utf-8")

    def __enter__(self) -> Console:
        return self

    def __exit__(self, *_: Any) -> None:
        if self._log:
            self._log.close()

    def _write_log(self, text: str) -> None:
        if self._log:
            self._log.write(text + "\n")
            self._log.flush()

    # ---------------------------------------------------------------------------------------------------------------- lines
    def note(self, text: str) -> None:
        """A line of fact."""
        self._line(text, None)

    def warn(self, text: str) -> None:
        """A line that asks for attention; the run goes on."""
        self._line(f"warning: {text}", "yellow")

    def rule(self, title: str) -> None:
        """A heading."""
        self._line(f"=== {title}", "bold")

    def text(self, text: str, *, ids: Sequence[str] = ()) -> None:
        """A longer text as it is; in sensitive runs its length and the ids it is made of."""
        self._line(f"[{len(text)} characters; pairs {', '.join(ids)}]" if self._sensitive else text, None)

    def _line(self, text: str, style: str | None) -> None:
        safe = inert(text, keep_newlines=True)
        self._screen.print(Text(safe, style=style or ""))
        self._write_log(safe)

    # ------------------------------------------------------------------------------------------------------------- progress
    @contextlib.contextmanager
    def progress(self, name: str, total: int) -> Iterator[Progress]:
        """A bar with counts, tokens a second and time left; elsewhere than on a terminal a plain line every ten seconds."""
        start = time.perf_counter()
        if self._screen.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[said]}"), TimeRemainingColumn())
            with RichProgress(*columns, console=self._screen, transient=True) as bar:
                task = bar.add_task(name, total=total, said="")
                progress = Progress(total, lambda done, said: bar.update(task, completed=done, said=said), every=0.0)
                yield progress
        else:
            progress = Progress(total, lambda done, said: self.note(f"{name} {done}/{total} {said}".rstrip()), every=PLAIN_SECONDS)
            yield progress
        seconds = time.perf_counter() - start
        self.note(f"{name}: {progress.done} of {total} in {seconds:.1f} s {progress.said}".rstrip())


    # --------------------------------------------------------------------------------------------------------------- tables
    def funnel_table(self, iteration: int, funnel: dict[str, Any]) -> None:
        """How requests became pairs, and what rejected the others."""
        rows = [("requests", funnel["requests"]), ("questions accepted", funnel["questions"]), ("pairs kept", funnel["pairs"])]
        rows += sorted(((f"rejected: {name}", n) for name, n in funnel["rejected"].items()), key=lambda r: -r[1])
        self._table(f"iteration {iteration}: funnel", ("", "count"), rows)

    def pairs_table(self, rows: Sequence[dict[str, Any]]) -> None:
        """Some kept pairs."""
        if self._sensitive:
            self._table("some kept pairs", ("id", "question", "answer"),
                        [(r["id"], f"{len(r['question'])} characters", f"{len(r['answer'])} characters") for r in rows])
        else:
            self._table("some kept pairs", ("question", "answer"), [(r["question"], r["answer"]) for r in rows])

    def samples_table(self, before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]]) -> None:
        """Answers of the starting model and of this iteration's, side by side."""
        if not self._sensitive:
            self._table("answers without exemplars, before and after", ("question", "before", "after"),
                        [(a["question"], b["answer"], a["answer"]) for b, a in zip(before, after)])

    def cost_table(self, rows: Sequence[dict[str, Any]]) -> None:
        """What each stage cost."""
        columns = ("stage", "seconds", "compiling", "prefilled", "generated", "trained", "tokens/s", "peak GiB")
        body = []
        for r in rows:
            tokens = r["prefilled"] + r["generated"] + r["trained"]
            rate = f"{tokens / r['seconds']:.0f}" if tokens and r["seconds"] else ""
            body.append((r["stage"], f"{r['seconds']:.1f}", f"{r['compile_seconds']:.1f}", *(r[k] or "" for k in ("prefilled", "generated", "trained")),
                         rate, f"{r['peak_gib']:.1f}"))
        self._table("cost", columns, body)

    def _table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        cells = [[inert(str(c)) for c in row] for row in rows]
        if self._screen.is_terminal:
            table = Table(title=title, box=rich.box.SIMPLE, title_justify="left")
            for name in columns:
                table.add_column(name, overflow="fold")
            for row in cells:
                table.add_row(*(Text(c) for c in row))
            self._screen.print(table)
        else:
            self._screen.print(Text(_plain(title, columns, cells)))
        self._write_log(_plain(title, columns, cells))


class Progress:
    """Counts what is done and says so now and then."""

    def __init__(self, total: int, show, *, every: float):
        self.total, self.done, self.said = total, 0, ""
        self._show, self._every, self._start, self._last = show, every, time.perf_counter(), time.perf_counter()

    def update(self, done: int, **fields: Any) -> None:
        """So many are done; `fields` are shown beside, `tokens` as a rate."""
        self.done, now = done, time.perf_counter()
        tokens = fields.pop("tokens", None)
        words = [f"{name} {value}" for name, value in fields.items()]
        if tokens:
            words.append(f"{tokens / (now - self._start):.0f} tokens/s")
        self.said = ", ".join(words)
        if now - self._last >= self._every:
            self._last = now
            left = (now - self._start) / done * (self.total - done) if done else None
            self._show(done, self.said + (f", {left:.0f} s left" if left and self._every else ""))


def _plain(title: str, columns: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """A table as aligned lines; long cells (texts) go below one another instead."""
    if any(len(c) > 40 for row in cells for c in row):
        return "\n".join([f"{title}:", *("  " + "\n  ".join(f"{name}: {c}" for name, c in zip(columns, row)) + "\n" for row in cells)])
    widths = [max(len(row[i]) for row in (columns, *cells)) for i in range(len(columns))]
    return "\n".join([f"{title}:", *("  " + "  ".join(c.ljust(w) for c, w in zip(row, widths)).rstrip() for row in (columns, *cells))])


def inert(text: str, *, keep_newlines: bool = False) -> str:
    """`text` with control, bidirectional and other invisible characters as escapes; line breaks too unless kept."""
    keep = "\n" if keep_newlines else ""
    return "".join(c if c in keep or unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Zl", "Zp", "Co") else c.encode("unicode_escape", "surrogatepass").decode()
                   for c in text)
