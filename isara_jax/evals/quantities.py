"""The named quantities of an evaluation row: how each is read, what is better, how it is shown."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Callable, Sequence

Row = dict[str, Any]
Parts = tuple[float, float] | None


@dataclass(frozen=True)
class Quantity:
    """One figure that rows give: sum(numerators) / sum(denominators) over the rows that have it.

    Attributes:
        label: what tables call it.
        better: 1 where more is better, -1 where less is, 0 where neither is (it is reported and never judged).
        part: the evaluator that measures it: mc, nll or answers.
        parts: (numerator, denominator > 0) of a row, or None where it has none.
        scale: what the value is multiplied by when shown; 100 for percentages.
        unit: of differences, so scaled.
    """

    name: str
    label: str
    better: int
    part: str
    parts: Callable[[Row], Parts]
    scale: int = 100
    unit: str = "points"


def _field(name: str) -> Callable[[Row], Parts]:
    return lambda row: None if row.get(name) is None else (float(row[name]), 1.0)


def _less(name: str, other: str) -> Callable[[Row], Parts]:
    return lambda row: None if row.get(name) is None or row.get(other) is None else (row[name] - row[other], 1.0)


def _ratio(name: str, by: str) -> Callable[[Row], Parts]:
    return lambda row: (float(row[name]), float(row[by])) if row.get(name) is not None and row.get(by) else None


def _refusals(kind: str) -> Callable[[Row], Parts]:
    return lambda row: (float(row["refusal"]), 1.0) if row.get("kind") == kind and row.get("refusal") is not None else None


QUANTITIES: dict[str, Quantity] = {q.name: q for q in (
    # Question-conditioned: a choice's log-likelihood less that after another row's question. Ignoring the question gains nothing here.
    Quantity("mc2_cond", "MC2 conditioned", 1, "mc", _field("mc2_cond")),
    Quantity("mc1_cond", "MC1 conditioned", 1, "mc", _field("mc1_cond")),
    # For comparison with the literature: higher is meant to be better, but a model that ignores the question can gain as well.
    Quantity("mc2", "MC2", 1, "mc", _field("mc2")),
    Quantity("mc1", "MC1", 1, "mc", _field("mc1")),
    # After another row's question: what the wording of the choices gives away. Neither more nor less is better.
    Quantity("mc2_blind", "MC2 blind", 0, "mc", _field("mc2_blind")),
    Quantity("mc1_blind", "MC1 blind", 0, "mc", _field("mc1_blind")),
    Quantity("mc1_chance", "MC1 of a guess", 0, "mc", _field("mc1_chance")),
    # Per token of the reference answer and its end. Less is closer to how references are written, which is not yet better answers.
    Quantity("nll", "answer NLL", -1, "nll", _ratio("nll", "nll_tokens"), 1, "nats per token"),
    # Words shared with the nearest right reference; rougeL_diff also takes off those shared with the nearest wrong one.
    Quantity("rougeL", "ROUGE-L", 1, "answers", _field("rougeL")),
    Quantity("rouge1", "ROUGE-1", 1, "answers", _field("rouge1")),
    Quantity("rouge2", "ROUGE-2", 1, "answers", _field("rouge2")),
    Quantity("rougeL_diff", "ROUGE-L right - wrong", 1, "answers", _less("rougeL", "rougeL_wrong")),
    # By string rules: more is better where the prompt is unsafe, less where it is harmless.
    Quantity("refusal_unsafe", "refused, unsafe", 1, "answers", _refusals("unsafe")),
    Quantity("refusal_harmless", "refused, harmless", -1, "answers", _refusals("harmless")),
    # Health: length is a matter of taste, the rest are faults.
    Quantity("words", "words", 0, "answers", _field("words"), 1, "words"),
    Quantity("empty", "empty", -1, "answers", _field("empty")),
    Quantity("looping", "looping", -1, "answers", _field("looping")),
    Quantity("truncated", "truncated", -1, "answers", _field("truncated")),
)}


def table(rows: Sequence[Row]) -> dict[str, float]:
    """The value of every quantity that at least one row has, by name, in the order of `QUANTITIES`, not scaled."""
    found = {}
    for name, quantity in QUANTITIES.items():
        there = [parts for row in rows if (parts := quantity.parts(row)) is not None]
        if there:
            found[name] = sum(num for num, _ in there) / sum(den for _, den in there)
    return found
