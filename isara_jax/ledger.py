"""What each stage cost: wall and compile seconds, tokens prefilled, generated and trained, peak resident memory."""
from __future__ import annotations

import contextlib
import resource
import sys
import threading
import time
from dataclasses import asdict, dataclass
from typing import Any, Iterator

from isara_jax.metrics import MetricsWriter

SAMPLE_SECONDS = 0.05  # between two looks at the resident memory
COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"  # recorded by jax for each program; loading it from the cache counts too


@dataclass
class Cost:
    """The account of one stage.

    `seconds` are wall time and `compile_seconds` the part of them that XLA compiled programs or loaded compiled ones (tracing aside).
    `peak_gib` is the largest resident size of this process while the stage ran. `shared` are tokens of prompts that were not prefilled,
    since another prompt began alike.
    """

    iteration: int
    stage: str
    seconds: float = 0.0
    compile_seconds: float = 0.0
    prefilled: int = 0
    generated: int = 0
    trained: int = 0
    shared: int = 0
    peak_gib: float = 0.0

    def add(self, **tokens: int) -> None:
        """Add to the counts of tokens: `prefilled`, `generated`, `trained`, `shared`."""
        self.set(**{name: getattr(self, name) + n for name, n in tokens.items()})

    def set(self, **tokens: int) -> None:
        """Set counts of tokens that are summed up elsewhere."""
        for name, n in tokens.items():
            if name not in ("prefilled", "generated", "trained", "shared"):
                raise ValueError(f"no such count of tokens: {name}")
            setattr(self, name, int(n))


class Ledger:
    """Keeps the costs of this process and writes each to the metrics when its stage ends.

    A stage that an earlier start finished has its row in metrics.jsonl, not here; one that was interrupted has a row for each start.
    """

    def __init__(self, metrics: MetricsWriter):
        self._metrics = metrics
        self._costs: list[Cost] = []

    @contextlib.contextmanager
    def stage(self, name: str, iteration: int) -> Iterator[Cost]:
        """Measure a block; its cost is written even when the block fails. Stages may nest, the outer one then includes the inner."""
        cost = Cost(iteration, name)
        before, start, peak = _compile_seconds(), time.perf_counter(), _PeakMemory()
        try:
            yield cost
        finally:
            cost.seconds = round(time.perf_counter() - start, 3)
            cost.compile_seconds = round(_compile_seconds() - before, 3)
            cost.peak_gib = round(peak.stop() / 2**30, 3)
            self._costs.append(cost)
            self._metrics.write("cost", **asdict(cost))

    def rows(self, iteration: int | None = None) -> list[dict[str, Any]]:
        """The costs so far, of one iteration or of all, in the order in which stages ended."""
        return [asdict(c) for c in self._costs if iteration is None or c.iteration == iteration]


# --------------------------------------------------------------------------------------------------------------------- memory
class _PeakMemory:
    """The largest resident size in bytes between its making and `stop`, sampled by a thread.

    The kernel's own high-water mark could be reset for each stage, but then whoever measures the whole process would read too little.
    """

    def __init__(self):
        self._peak, self._ended = resident_bytes(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._ended.wait(SAMPLE_SECONDS):
            self._peak = max(self._peak, resident_bytes())

    def stop(self) -> int:
        self._ended.set()
        self._thread.join()
        return max(self._peak, resident_bytes())


def resident_bytes() -> int:
    """Resident memory of this process now; where /proc is missing, its largest so far."""
    try:
        with open("/proc/self/statm", encoding="ascii") as f:
            return int(f.read().split()[1]) * resource.getpagesize()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)  # bytes on macOS, else KiB


# ------------------------------------------------------------------------------------------------------------------ compiling
_compiled: list[float] = []  # seconds of every compilation of this process since the listener was registered
_listening = False


def _compile_seconds() -> float:
    """Seconds of compilation so far. jax is listened to from the first call on at which it is imported; this never imports it."""
    global _listening
    if not _listening and "jax" in sys.modules:
        _listening = True
        sys.modules["jax"].monitoring.register_event_duration_secs_listener(
            lambda event, seconds, **_: _compiled.append(seconds) if event == COMPILE_EVENT else None)
    return sum(_compiled)
