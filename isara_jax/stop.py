"""When the loop ends: a rule over the history of iterations, printed and recorded with its reason."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Sequence

from isara_jax import config


@dataclass(frozen=True)
class Outcome:
    """What the rule looks at after an iteration."""

    iteration: int
    requests: int                # N: question prompts issued
    kept: int                    # pairs that passed every filter
    held_out: float | None       # mean loss per answer token on the held-out seeds; None when nothing is held out
    rejected: str = ""           # the filter that rejected most, for the message

    @property
    def acceptance(self) -> float:
        """The yield: kept pairs as a share of the requests."""
        return self.kept / self.requests


@dataclass(frozen=True)
class StopRule:
    """Stop after T iterations, when the acceptance yield falls under a threshold, or when held-out loss stops falling.

    The paper has a stopping threshold that it neither defines nor ablates (reviews of arXiv 2401.06785); a yield threshold is our reading.
    """

    iterations: int
    min_yield: float
    patience: int

    @classmethod
    def of(cls, stop: config.Stop) -> StopRule:
        return cls(stop.iterations, stop.min_yield, stop.patience)

    def reason(self, before: float | None, history: Sequence[Outcome]) -> str | None:
        """Why to stop after the last outcome, or None to go on. `before` is the held-out loss of the starting model."""
        if not history:
            return None
        last = history[-1]
        if last.kept == 0:
            most = f"; most were rejected by {last.rejected}" if last.rejected else ""
            return f"iteration {last.iteration} kept none of {last.requests} requests{most}"
        if last.acceptance < self.min_yield:
            return f"the yield of iteration {last.iteration}, {last.acceptance:.1%}, is under stop.min_yield={self.min_yield:.1%}"
        losses = [loss for loss in (before, *(o.held_out for o in history)) if loss is not None]
        if self.patience and len(losses) > self.patience and min(losses[-self.patience:]) >= min(losses[:-self.patience]):
            return f"held-out loss did not fall for {self.patience} iteration(s): {' -> '.join(f'{x:.4f}' for x in losses)}"
        if last.iteration >= self.iterations:
            return f"stop.iterations={self.iterations} reached"
        return None
