"""What each stage cost: wall and compile seconds, tokens prefilled, generated and trained, peak resident memory."""
from __future__ import annotations

import contextlib
import sys
import threading
import time
from dataclasses import asdict, dataclass
from typing import Any, Iterator

from isara_jax.metrics import MetricsWriter

SAMPLE_SECONDS = 0.05  # between two looks at the resident memory
COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


@dataclass
class Cost:
    """The account of one stage. Seconds are wall time; memory is the largest resident size of this process while it ran, in GiB."""

    iteration: int
    stage: str
    seconds: float = 0.0
    compile_seconds: float = 0.0
    prefilled: int = 0
    generated: int = 0
    trained: int = 0
    peak_gib: float = 0.0

    def add(self, **tokens: int) -> None:
        """Add to the counts of tokens."""
        for name, n in tokens.items():
            setattr(self, name, getattr(self, name) + n)

    def set(self, **tokens: int) -> None:
        """Set counts of tokens that the caller keeps himself."""
        for name, n in tokens.items():
            setattr(self, name, n)


class Ledger:
    """Keeps the costs of this process and writes each to the metrics when its stage ends."""

    def __init__(self, metrics: MetricsWriter):
        self._metrics = metrics
        self._costs: list[Cost] = []

    @contextlib.contextmanager
    def stage(self, name: str, iteration: int) -> Iterator[Cost]:
        """Measure a block; its cost is written even when the block fails."""
        cost, compiled = Cost(iteration, name), _compile_clock()
        start, before = time.perf_counter(), compiled.seconds
        peak = _PeakMemory()
        try:
            yield cost
        finally:
            cost.seconds = round(time.perf_counter() - start, 3)
            cost.compile_seconds = round(compiled.seconds - before, 3)
            cost.peak_gib = round(peak.stop() / 2**30, 3)
            self._costs.append(cost)
            self._metrics.write("cost", **asdict(cost))

    def rows(self, iteration: int | None = None) -> list[dict[str, Any]]:
        """The costs so far, of one iteration or of all."""
        return [asdict(c) for c in self._costs if iteration is None or c.iteration == iteration]


class _PeakMemory:
    """The largest resident size in bytes between its making and `stop`, sampled by a thread."""

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
        with open("/proc/self/statm") as f:
            import resource

            return int(f.read().split()[1]) * resource.getpagesize()
    except OSError:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class _CompileClock:
    """Seconds that XLA has spent compiling in this process since the clock was first asked for."""

    seconds = 0.0


_CLOCK: _CompileClock | None = None


def _compile_clock() -> _CompileClock:
    global _CLOCK
    if _CLOCK is None:
        _CLOCK = _CompileClock()
        if "jax" in sys.modules:
            import jax

            def listen(event: str, seconds: float, **_: Any) -> None:
                if event == COMPILE_EVENT:
                    _CLOCK.seconds += seconds

            jax.monitoring.register_event_duration_secs_listener(listen)
    return _CLOCK
