"""The verdict: one quantity, named before the run, of one model against each baseline on the same rows, in words that claim no more.

    better / worse                             Holm's p over all baselines is at most alpha
    not distinguishable with N rows            it is larger
    a gain of form, not of content             better than the baseline, but not than the shuffled-answers control
    imitates the reference style more closely  what a likelihood (NLL) may say at most; or less closely

The control is the same fine-tuning on the judged model's own pairs with the answers shuffled among the questions: what it gains, it gains
without content. It is no baseline: beating it is one more condition for "better", with its own paired test. That p is not adjusted, since a
condition that is added can only take findings away, never add false ones.
"""
from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Mapping, Sequence

from isara_jax.evals import stats
from isara_jax.evals.quantities import Quantity, Row
from isara_jax.evals.stats import Paired

ALPHA = 0.05
DIGITS = 6  # in records

BETTER, WORSE = "better", "worse"
FORM_ONLY = "a gain of form, not of content"
CLOSER, LESS_CLOSE = "imitates the reference style more closely", "imitates the reference style less closely"


@dataclass(frozen=True)
class Comparison:
    """The judged model less a baseline.

    Attributes:
        baseline: the baseline's name.
        paired: difference, interval and test.
        p_adjusted: Holm's p over all baselines.
        said: the words of the verdict.
    """

    baseline: str
    paired: Paired
    p_adjusted: float
    said: str


@dataclass(frozen=True)
class Verdict:
    """What is said of the judged model: a comparison for each baseline, and its difference to the control, None where none ran."""

    primary: Quantity
    comparisons: tuple[Comparison, ...]
    control: Paired | None
    alpha: float

    def to_dict(self) -> dict[str, Any]:
        """For JSON: values not scaled, all numbers rounded to 6 digits."""
        return {"primary": self.primary.name, "label": self.primary.label, "better": self.primary.better, "alpha": self.alpha,
                "comparisons": [{"baseline": c.baseline, "said": c.said, **_record(c.paired), "p_adjusted": round(c.p_adjusted, DIGITS)}
                                for c in self.comparisons],
                "control": None if self.control is None else _record(self.control)}


def verdict(primary: Quantity, judged: Sequence[Row], baselines: Mapping[str, Sequence[Row]], control: Sequence[Row] | None, *,
            alpha: float = ALPHA) -> Verdict:
    """Judge.

    Args:
        primary: the quantity named before the run.
        judged: evaluation rows of the model that is judged.
        baselines: by name, rows of what it is compared with, of the same ids in the same order. A row that lacks the quantity on either
            side is left out on both.
        control: rows of the shuffled-answers control, or None where it did not run: "better" then does not tell content from form, and
            `sentences` says so.
        alpha: level of the tests.

    Raises ValueError for a quantity of which neither more nor less is better, rows that are not the same, and a quantity that no row has
    on both sides.
    """
    if not primary.better:
        raise ValueError(f"{primary.name} cannot be judged by: neither more nor less of it is better")
    pairs = {name: _compare(primary, judged, rows, name) for name, rows in baselines.items()}
    beside = None if control is None else _compare(primary, judged, control, "the control")
    adjusted = stats.holm([p.p for p in pairs.values()])
    return Verdict(primary, tuple(Comparison(name, paired, p, _words(primary, paired, p, beside, alpha))
                                  for (name, paired), p in zip(pairs.items(), adjusted, strict=True)), beside, alpha)


def sentences(given: Verdict) -> list[str]:
    """The verdict in lines of text, with its numbers and its limits."""
    quantity, control = given.primary, given.control
    if not given.comparisons:
        return [f"no verdict on {quantity.label}: no baseline ran"]
    lines = [_sentence(c, quantity) for c in given.comparisons]
    if control is None:
        lines.append("the shuffled-answers control did not run, so content and form are not told apart")
    else:
        beaten = "beaten" if _beats(quantity, control, control.p, given.alpha) else "not beaten, so content is not told from form"
        lines.append(f"shuffled-answers control: {beaten}; {_numbers(control, quantity)}{_power(control, quantity)}")
    most = max((c.paired for c in given.comparisons), key=lambda paired: paired.groups)
    least = stats.smallest_p(most.groups) * len(given.comparisons)
    if least > given.alpha:
        lines.append(f"{_count(most)} cannot give a p under {min(least, 1.0):.2g} against {len(given.comparisons)} baseline(s): "
                     "too few for any verdict")
    lines.append(f"intervals and p are over these rows ({_count(most)}): they describe this checkpoint, not the method")
    return lines


# --------------------------------------------------------------------------------------------------------------------- judging
def _compare(primary: Quantity, judged: Sequence[Row], other: Sequence[Row], name: str) -> Paired:
    if [row["id"] for row in judged] != [row["id"] for row in other]:
        raise ValueError(f"the rows of {name} are not those of the judged model: compare equal ids in equal order")
    both = [(a, b, row["group"]) for row, against in zip(judged, other, strict=True)
            if (a := primary.parts(row)) is not None and (b := primary.parts(against)) is not None]
    if not both:
        raise ValueError(f"{primary.name} is on no row of both the judged model and {name}")
    return stats.paired([a[0] for a, _, _ in both], [a[1] for a, _, _ in both], [b[0] for _, b, _ in both], [b[1] for _, b, _ in both],
                        [group for _, _, group in both])


def _words(primary: Quantity, paired: Paired, p: float, control: Paired | None, alpha: float) -> str:
    if p > alpha:
        return f"not distinguishable with {_plural(paired.rows, 'row')}"
    gain = _beats(primary, paired, p, alpha)
    if primary.part == "nll":
        return CLOSER if gain else LESS_CLOSE
    if gain and control is not None and not _beats(primary, control, control.p, alpha):
        return FORM_ONLY
    return BETTER if gain else WORSE


def _beats(primary: Quantity, paired: Paired, p: float, alpha: float) -> bool:
    return p <= alpha and primary.better * paired.difference > 0


# ------------------------------------------------------------------------------------------------------------------------ text
def _sentence(c: Comparison, quantity: Quantity) -> str:
    return f"against {c.baseline}: {c.said}; {_numbers(c.paired, quantity)}, {_p(c.p_adjusted)} after Holm{_power(c.paired, quantity)}"


def _numbers(paired: Paired, quantity: Quantity) -> str:
    """Difference with interval and p; "less is better" where that is so, since a fall is then a gain."""
    shown = lambda x: _scaled(x, quantity, "+")
    interval = "no interval" if paired.low is None else f"95 % interval {shown(paired.low)} to {shown(paired.high)}"
    less = ", less is better" if quantity.better < 0 else ""
    return f"{quantity.label} {shown(paired.difference)} {quantity.unit} ({interval}{less}), p {_p(paired.p)}"


def _power(paired: Paired, quantity: Quantity) -> str:
    if not paired.detectable:  # one group, or no row differs
        return ""
    return f"; {_count(paired)} would show a true difference of {_scaled(paired.detectable, quantity)} {quantity.unit} four times in five"


def _scaled(value: float, quantity: Quantity, sign: str = "") -> str:
    return f"{value * quantity.scale:{sign}z.{1 if quantity.scale == 100 else 3}f}"  # z: no minus before 0


def _p(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _count(paired: Paired) -> str:
    """Rows, and prompts where several rows are of one."""
    return _plural(paired.rows, "row") + ("" if paired.groups == paired.rows else f" of {_plural(paired.groups, 'prompt')}")


def _plural(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"


def _record(paired: Paired) -> dict[str, Any]:
    return {name: round(value, DIGITS) if isinstance(value, float) else value for name, value in dataclasses.asdict(paired).items()}
