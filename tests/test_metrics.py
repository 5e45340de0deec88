"""metrics.jsonl, the cost ledger and the console."""
import functools
import io
import json
import mmap
import sys
import time
import types

import jax
import jax.numpy as jnp
import pytest
from rich.console import Console as RichConsole

from isara_jax import console as console_lib
from isara_jax.console import Console, Progress, duration, inert
from isara_jax.ledger import Ledger, resident_bytes
from isara_jax.metrics import MetricsWriter

ANSI = "\x1b[31mred\x1b[0m \u202egnp.exe [bold]x[/bold]"


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# -------------------------------------------------------------------------------------------------------------------- metrics
def test_rows_are_there_as_soon_as_they_are_written(tmp_path):
    metrics = MetricsWriter(tmp_path)
    metrics.write("iteration", iteration=1, kept=3, funnel={"rejected": {"question novelty": 2}})
    assert rows(tmp_path) == [{"kind": "iteration", "iteration": 1, "kept": 3, "funnel": {"rejected": {"question novelty": 2}}}]
    metrics.close()


@pytest.mark.parametrize("tail", ['{"kind": "co', '{"kind": "co\n', "\0\0\0\0", '{"kind": "ü'.encode()[:-1]])
def test_a_torn_last_line_is_cut_off(tmp_path, tail):
    whole = b'{"kind": "stop", "reason": "a"}\n'
    (tmp_path / "metrics.jsonl").write_bytes(whole + (tail if isinstance(tail, bytes) else tail.encode()))
    with MetricsWriter(tmp_path) as metrics:
        metrics.write("stop", reason="b")
    assert [r["reason"] for r in rows(tmp_path)] == ["a", "b"]


def test_numbers_that_are_not_finite_stay_valid_json(tmp_path):
    with MetricsWriter(tmp_path) as metrics:
        metrics.write("iteration", held_out=float("nan"), more={"x": float("-inf"), "y": 0.5})
    assert rows(tmp_path) == [{"kind": "iteration", "held_out": "nan", "more": {"x": "-inf", "y": 0.5}}]


def test_tensorboard_gets_every_number_where_it_is_installed(tmp_path, monkeypatch):
    said = []

    class SummaryWriter:
        def __init__(self, folder):
            assert folder == str(tmp_path / "tensorboard")

        def add_scalar(self, name, value, at):
            said.append((name, value, at))

        def close(self):
            said.append("closed")

    monkeypatch.setitem(sys.modules, "tensorboardX", types.SimpleNamespace(SummaryWriter=SummaryWriter))
    with MetricsWriter(tmp_path) as metrics:
        metrics.write("cost", iteration=2, stage="answers", seconds=1.5)
        metrics.write("iteration", iteration=2, funnel={"rejected": {"echo": 1}}, held_out=None, reason="text")
    assert said == [("cost/answers/seconds", 1.5, 2), ("iteration/funnel/rejected/echo", 1, 2), "closed"]


# --------------------------------------------------------------------------------------------------------------------- ledger
def test_a_stage_records_tokens_seconds_and_memory(tmp_path):
    with MetricsWriter(tmp_path) as metrics:
        ledger = Ledger(metrics)
        with ledger.stage("questions", 1) as cost:
            cost.set(prefilled=5, generated=2)
            cost.set(prefilled=50)
            cost.add(trained=3)
            cost.add(trained=4)
            with mmap.mmap(-1, 200 * 2**20) as held:  # freed before the stage ends: only sampling sees it
                held[::4096] = b"\1" * len(held[::4096])  # pages of its own: the allocator might hand out memory that is resident already
                time.sleep(0.2)
            after = resident_bytes()
        with ledger.stage("answers", 2):
            pass
    (row,) = ledger.rows(1)
    assert (row["stage"], row["prefilled"], row["generated"], row["trained"]) == ("questions", 50, 2, 7)
    assert row["seconds"] >= 0.2 and row["peak_gib"] * 2**30 > after + 150 * 2**20
    assert rows(tmp_path) == [{"kind": "cost", **r} for r in ledger.rows()] and [r["iteration"] for r in ledger.rows()] == [1, 2]


def test_compile_seconds_belong_to_the_stage_that_compiled(tmp_path):
    with MetricsWriter(tmp_path) as metrics:
        ledger, program = Ledger(metrics), jax.jit(lambda x: jnp.sort(jnp.sin(x) @ x))
        x = jnp.ones((7, 7))
        for name in ("first", "again"):
            with ledger.stage(name, 1):
                program(x).block_until_ready()
    first, again = ledger.rows()
    assert 0 < first["compile_seconds"] <= first["seconds"] and again["compile_seconds"] == 0


def test_a_failed_stage_leaves_its_cost(tmp_path):
    with MetricsWriter(tmp_path) as metrics, pytest.raises(RuntimeError, match="lost"):
        with Ledger(metrics).stage("questions", 1) as cost:
            cost.add(prefilled=9)
            raise RuntimeError("lost")
    assert rows(tmp_path)[0]["prefilled"] == 9


def test_only_tokens_are_counted(tmp_path):
    with MetricsWriter(tmp_path) as metrics, Ledger(metrics).stage("questions", 1) as cost, pytest.raises(ValueError, match="seconds"):
        cost.set(seconds=3)


# -------------------------------------------------------------------------------------------------------------------- console
@pytest.fixture
def screen(monkeypatch):
    """Makes a Console that believes it stands on a terminal of 100 columns, or not; `.out()` is what it showed."""

    def make(log, terminal, **settings):
        file = io.StringIO()
        fixed = functools.partial(RichConsole, file=file, force_terminal=terminal, width=100, color_system=None)
        monkeypatch.setattr(console_lib, "RichConsole", fixed)
        made = Console(log, **settings)
        made.out = file.getvalue
        return made

    return make


COST = {"iteration": 1, "stage": "questions", "seconds": 2.0, "compile_seconds": 0.5, "prefilled": 3000, "generated": 1000, "trained": 0,
        "peak_gib": 1.25}


@pytest.mark.parametrize("terminal", [True, False])
def test_text_from_outside_is_inert(tmp_path, screen, terminal):
    with screen(tmp_path / "log.txt", terminal) as console:
        console.note(ANSI)
        console.text(ANSI + "\nsecond line")
        console.pairs_table([{"id": "1", "question": ANSI, "answer": "two\nlines"}])
        console.samples_table([{"question": "q", "answer": ANSI}], [{"question": "q", "answer": "\u200b\x00"}])
    for shown in (console.out(), (tmp_path / "log.txt").read_text()):
        assert not set(shown) & set("\x1b\u202e\u200b\x00")
        assert shown.count("\\x1b[31mred\\x1b[0m") == 4 and shown.count("\\u202e") == 4
        assert shown.count("[bold]x[/bold]") == 4, "markup was interpreted"
        assert "two\\nlines" in shown and "\nsecond line" in shown and "\\u200b\\x00" in shown


def test_inert_text_keeps_letters_of_all_scripts():
    for text in ("naïve café", "北京とバンコク", "ไทย", "می\u200cخواهم", "👩\u200d🔬", "עברית"):
        assert inert(text) == text
    assert inert("a\tb\r\n\ud800\u2028\u2066") == "a\\tb\\r\\n\\ud800\\u2028\\u2066"


@pytest.mark.parametrize("terminal", [True, False])
def test_sensitive_runs_show_ids_and_lengths_only(tmp_path, screen, terminal):
    with screen(tmp_path / "log.txt", terminal, sensitive=True) as console:
        console.text("SECRET words", ids=["ab12", "cd34"])
        console.pairs_table([{"id": "ef56", "question": "SECRET?", "answer": "SECRET!!"}])
        console.samples_table([{"question": "SECRET", "answer": "SECRET 1"}], [{"question": "SECRET", "answer": "SECRET 22"}])
    for shown in (console.out(), (tmp_path / "log.txt").read_text()):
        assert "SECRET" not in shown
        assert all(part in shown for part in ("12 characters", "ab12, cd34", "ef56", "7 characters", "8 characters", "9 characters"))


@pytest.mark.parametrize("terminal", [True, False])
def test_tables_show_the_funnel_and_the_cost(screen, terminal):
    console = screen(None, terminal)
    console.funnel_table(2, {"requests": 10, "questions": 8, "pairs": 5, "rejected": {"answer echo": 1, "question novelty": 4}})
    console.cost_table([COST])
    lines = [" ".join(line.split()) for line in console.out().splitlines()]
    assert [line for line in lines if "%" in line] == ["requests 10 100%", "questions accepted 8 80%", "pairs kept 5 50%",
                                                       "rejected: question novelty 4 40%", "rejected: answer echo 1 10%"]
    assert "questions 2.0 0.5 3,000 1,000 2000 1.2" in lines


def test_tables_may_be_empty(screen):
    console = screen(None, False)
    console.pairs_table([])
    console.funnel_table(1, {"requests": 0, "questions": 0, "pairs": 0, "rejected": {}})
    assert "some kept pairs:" in console.out()


def test_the_log_is_appended_to_with_times(tmp_path, screen):
    for text in ("first", "second"):
        with screen(tmp_path / "deep" / "log.txt", False) as console:
            console.warn(text)
    lines = (tmp_path / "deep" / "log.txt").read_text().splitlines()
    assert [line[20:] for line in lines] == ["warning: first", "warning: second"]
    assert all(time.strptime(line[:19], "%Y-%m-%d %H:%M:%S") for line in lines)


def test_a_screen_without_unicode_does_not_end_the_run(tmp_path, monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    with Console(tmp_path / "log.txt") as console:
        console.note("crème 北")
        console.pairs_table([{"id": "1", "question": "é", "answer": "x" * 50}])
    sys.stdout.flush()
    assert "cr\\xe8me \\u5317" in raw.getvalue().decode("ascii") and "crème 北" in (tmp_path / "log.txt").read_text(encoding="utf-8")


# ------------------------------------------------------------------------------------------------------------------- progress
@pytest.fixture
def clock(monkeypatch):
    """A clock that the test sets."""
    now = types.SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(console_lib.time, "perf_counter", lambda: now.seconds)
    return now


def test_plain_lines_come_now_and_then_with_rate_and_time_left(screen, clock):
    console = screen(None, False)
    with console.progress("questions", 100) as progress:
        for done in range(0, 101, 5):
            clock.seconds = 105 + 0.8 * done  # five seconds of compiling first
            progress.update(done, tokens=50 * done, kept=done // 2)
    lines = console.out().splitlines()
    assert lines[0] == "questions: 10 of 100, kept 5, 38 tokens/s, 1 min 12 s left"
    assert [line.split()[1] for line in lines[:-1]] == ["10", "25", "40", "55", "70", "85", "100"]
    assert lines[-1] == "questions: 100 of 100 in 1 min 25 s, kept 50, 59 tokens/s"


def test_the_time_left_knows_what_an_earlier_start_did(clock):
    shown = []
    progress = Progress(100, lambda done, said: shown.append(said))
    for seconds, done in ((101, 90), (102, 91), (103, 92)):
        clock.seconds = seconds
        progress.update(done)
    assert shown == ["", "9.0 s left", "8.0 s left"]


def test_long_stages_say_less_often(clock):
    shown = []
    progress = Progress(36_000, lambda done, said: shown.append(done), 10.0, 0.02)
    for done in range(1, 36_000):
        clock.seconds = 100.0 + done
        progress.update(done)
    assert shown[:3] == [10, 20, 30] and 200 < len(shown) < 300


def test_a_bar_on_a_terminal_leaves_one_line_in_the_log(tmp_path, screen):
    with screen(tmp_path / "log.txt", True) as console:
        with console.progress("fine-tuning", 2) as progress:
            progress.update(1, loss="1.500")
            console.note("between")
            progress.update(2, loss="1.250")
    log = (tmp_path / "log.txt").read_text().splitlines()
    assert len(log) == 2 and log[0].endswith("between") and "fine-tuning: 2 of 2 in" in log[1] and log[1].endswith("loss 1.250")
    assert "1/2" in console.out() or "2/2" in console.out()


def test_a_failed_stage_says_nothing_of_being_done(screen):
    console = screen(None, False)
    with pytest.raises(RuntimeError), console.progress("questions", 3) as progress:
        progress.update(1)
        raise RuntimeError
    assert console.out() == ""


@pytest.mark.parametrize("seconds, said", [(0, "0.0 s"), (59.94, "59.9 s"), (59.96, "1 min 0 s"), (60, "1 min 0 s"), (3599, "59 min 59 s"),
                                           (3600, "1 h 0 min"), (12_000, "3 h 20 min")])
def test_durations(seconds, said):
    assert duration(seconds) == said
