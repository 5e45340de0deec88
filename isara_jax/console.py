"""What people see: notes, progress and tables on a terminal, plain lines elsewhere, and all of it but the moving bars in log.txt.

Text that a model or a file brought is inert: control, bidirectional and invisible characters are shown as escapes, and markup is not
interpreted. With `sensitive` only ids, lengths and verdicts are shown, on the screen and in the log alike.
"""
from __future__ import annotations

import contextlib
import time
import unicodedata
from pathlib import Path
from typing import Any, Callable, Iterator, Sequence

import rich.box
from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress as RichProgress, TextColumn
from rich.table import Table
from rich.text import Text

PLAIN_SECONDS = 10.0   # least pause between two progress lines where there is no terminal
PLAIN_SHARE = 0.02     # and the pause as a share of the time passed, so that a long stage does not fill the log
LONG_CELL = 40         # characters from which on the cells of a plain table stand below one another
_POINTS = str.maketrans("", "", ".,")
JOINERS = "\u200c\u200d"  # invisible, yet part of ordinary spelling in Persian, Indic scripts and emoji: left as they are


class Console:
    """One per run. `log` is a file to which every line is appended with its time; None keeps the lines until `log_to` names one."""

    def __init__(self, log: Path | None, *, sensitive: bool = False):
        self._screen = RichConsole(highlight=False)
        self._live = self._screen.is_terminal and not self._screen.is_dumb_terminal
        self._sensitive, self._log, self._unlogged = sensitive, None, []
        if log is not None:
            self.log_to(log)

    def log_to(self, log: Path) -> None:
        """Append to `log` from here on, beginning with the lines said before any log was named."""
        if self._log:
            self._log.close()
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log = open(log, "a", encoding="utf-8")
        self._log.writelines(self._unlogged)
        self._log.flush()
        self._unlogged.clear()

    def __enter__(self) -> Console:
        return self

    def __exit__(self, *_: Any) -> None:
        if self._log:
            self._log.close()

    # ---------------------------------------------------------------------------------------------------------------- lines
    def note(self, text: str) -> None:
        """A line of fact."""
        self._line(text, "")

    def warn(self, text: str) -> None:
        """A line that asks for attention; the run goes on."""
        self._line(f"warning: {text}", "yellow")

    def rule(self, title: str) -> None:
        """A heading."""
        self._line(f"=== {title}", "bold")

    def text(self, text: str, *, ids: Sequence[str] = ()) -> None:
        """A longer text as it is; in sensitive runs its length and the ids it is made of."""
        self._line(f"[{len(text)} characters; pairs {', '.join(ids)}]" if self._sensitive else text, "")

    def _line(self, text: str, style: str) -> None:
        safe = inert(text, keep="\n")
        self._print(safe, style)
        self._write_log(safe)

    def _print(self, text: str, style: str = "") -> None:
        self._screen.print(Text(self._encodable(text), style=style), soft_wrap=True)

    def _encodable(self, text: str) -> str:
        """Characters that the screen's encoding lacks, as escapes: a run must not end because of a letter."""
        return text.encode(self._screen.encoding, "backslashreplace").decode(self._screen.encoding)

    def _write_log(self, text: str) -> None:
        line = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n"
        if self._log:
            self._log.write(line)
            self._log.flush()
        else:
            self._unlogged.append(line)

    # ------------------------------------------------------------------------------------------------------------- progress
    @contextlib.contextmanager
    def progress(self, name: str, total: int) -> Iterator[Progress]:
        """A bar with counts, tokens a second and time left; elsewhere than on a terminal a plain line now and then. One line stays."""
        if self._live:
            plain = lambda field: TextColumn(f"{{task.{field}}}", markup=False)
            columns = (plain("description"), BarColumn(), MofNCompleteColumn(), plain("fields[said]"))
            with RichProgress(*columns, console=self._screen, transient=True) as bar:
                task = bar.add_task(name, total=total, said="")
                progress = Progress(total, lambda done, said: bar.update(task, completed=done, said=said))
                yield progress
        else:
            show = lambda done, said: self.note(f"{name}: {done} of {total}, {said}".rstrip(", "))
            progress = Progress(total, show, PLAIN_SECONDS, PLAIN_SHARE)
            yield progress
        self.note(f"{name}: {progress.done} of {total} in {duration(progress.seconds)}, {progress.said}".rstrip(", "))

    # --------------------------------------------------------------------------------------------------------------- tables
    def funnel_table(self, iteration: int, funnel: dict[str, Any]) -> None:
        """How requests became pairs, and what rejected the others: counts, and shares of the requests."""
        rows = [("requests", funnel["requests"]), ("questions accepted", funnel["questions"]), ("pairs kept", funnel["pairs"])]
        rows += sorted(((f"rejected: {name}", n) for name, n in funnel["rejected"].items()), key=lambda r: -r[1])
        share = lambda n: f"{n / funnel['requests']:.0%}" if funnel["requests"] else ""
        self.table(f"iteration {iteration}: funnel", ("", "count", "share"), [(name, n, share(n)) for name, n in rows])

    def pairs_table(self, rows: Sequence[dict[str, Any]]) -> None:
        """Some kept pairs: records with id, question and answer."""
        columns = ("id", "question", "answer") if self._sensitive else ("question", "answer")
        self.table("some kept pairs", columns, [[r[c] if c == "id" else self._shown(r[c]) for c in columns] for r in rows])

    def samples_table(self, before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]]) -> None:
        """Answers of the starting model and of this iteration's, side by side: rows with question and answer."""
        shown = self._shown
        self.table("answers without exemplars, before and after", ("question", "before", "after"),
                    [(shown(a["question"]), shown(b["answer"]), shown(a["answer"])) for b, a in zip(before, after, strict=True)])

    def cost_table(self, rows: Sequence[dict[str, Any]]) -> None:
        """What each stage cost: rows of `Ledger.rows`."""
        columns = ("stage", "seconds", "compile", "prefilled", "generated", "trained", "tok/s", "peak GiB")
        body = []
        for r in rows:
            counts = [r[name] for name in ("prefilled", "generated", "trained")]
            rate = f"{sum(counts) / r['seconds']:.0f}" if sum(counts) and r["seconds"] else ""
            body.append((r["stage"], f"{r['seconds']:.1f}", f"{r['compile_seconds']:.1f}", *(f"{n:,}" if n else "" for n in counts), rate,
                         f"{r['peak_gib']:.1f}"))
        self.table("cost", columns, body)

    def _shown(self, text: str) -> str:
        return f"{len(text)} characters" if self._sensitive else text

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """A titled table; cells are shown as inert text."""
        cells = [[inert(str(c)) for c in row] for row in rows]
        if self._live:
            tight = {"padding": (0, 1, 0, 0), "pad_edge": False, "show_edge": False}  # so that the cost table fits 80 columns
            table = Table(title=Text(f"\n{title}", "bold"), box=rich.box.SIMPLE_HEAD, title_justify="left", **tight)
            for i, name in enumerate(columns):
                numbers = i > 0 and all(row[i].strip("%").translate(_POINTS).isdecimal() for row in cells if row[i])
                table.add_column(name, overflow="fold", justify="right" if numbers else "left")
            for row in cells:
                table.add_row(*(Text(self._encodable(c)) for c in row))
            self._screen.print(table)
        else:
            self._print(_plain(title, columns, cells))
        self._write_log(_plain(title, columns, cells))


class Progress:
    """Counts what is done and says so: at every update, or at most every `seconds` and `share` of the time passed."""

    def __init__(self, total: int, show: Callable[[int, str], None], seconds: float = 0.0, share: float = 0.0):
        self.total, self.done, self.said = total, 0, ""
        self._show, self._pause, self._share = show, seconds, share
        self._start = self._last = time.perf_counter()
        self._first: tuple[float, int] | None = None

    @property
    def seconds(self) -> float:
        """Wall time since the beginning."""
        return time.perf_counter() - self._start

    def update(self, done: int, **fields: Any) -> None:
        """So many of the total are done; `fields` are shown beside them, `tokens` (so far) as a rate."""
        self.done, now = done, time.perf_counter()
        self._first = self._first or (now, done)
        tokens = fields.pop("tokens", 0)
        words = [f"{name} {value}" for name, value in fields.items()]
        if tokens:
            words.append(f"{tokens / max(now - self._start, 1e-9):.0f} tokens/s")
        self.said = ", ".join(words)
        if now - self._last >= max(self._pause, self._share * (now - self._start)):
            self._last = now
            self._show(done, ", ".join(words + self._left(now)))

    def _left(self, now: float) -> list[str]:
        """The time left at the rate since the first update: what came before it is mostly compiling, or was done by an earlier start."""
        then, before = self._first
        if not before < self.done < self.total:
            return []
        return [f"{duration((now - then) / (self.done - before) * (self.total - self.done))} left"]


# ------------------------------------------------------------------------------------------------------------------------ text
def duration(seconds: float) -> str:
    """1.5 s, 2 min 5 s, 3 h 20 min."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes} min {seconds} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def inert(text: str, *, keep: str = "") -> str:
    """`text` with control, bidirectional and other invisible characters as escapes; those in `keep` and the joiners of spelling stay."""
    hidden = lambda c: unicodedata.category(c) in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp") and c not in keep + JOINERS
    return "".join(c.encode("unicode_escape").decode() if hidden(c) else c for c in text)


def _plain(title: str, columns: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """A table as aligned lines; long cells (texts) stand below one another instead."""
    if any(len(c) > LONG_CELL for row in cells for c in row):
        blocks = ["".join(f"  {name}: {c}\n" for name, c in zip(columns, row, strict=True)) for row in cells]
        return f"{title}:\n" + "\n".join(blocks).rstrip("\n")
    widths = [max(len(row[i]) for row in (columns, *cells)) for i in range(len(columns))]
    line = lambda row: "  " + "  ".join(c.ljust(width) for c, width in zip(row, widths, strict=True))
    return "\n".join([f"{title}:", *(line(row).rstrip() for row in (columns, *cells))])
