"""What a few decisions of a person say: a share with its exact interval, a win rate with ties, and what so many decisions could have shown.

Intervals are Clopper and Pearson's (1934, Biometrika 26): exact for any number of decisions, a little wide, and in agreement with the sign
test, so that an interval without one half and a p of at most 0.05 are the same finding. Wilson's is shorter and holds its level only on
average. The interval of a win rate is that of wins among wins and losses: carried over to a rate in which ties count half it would hold the
truth in as few as 70 % of samples of 20 (80 % wins, 2 % losses), since it takes the ties for granted.
"""
from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, Callable

ALPHA = 0.05     # of tests; intervals have 1 - ALPHA
POWER = 0.80     # as in `stats`
DIGITS = 6
_STEPS = 60      # halvings of an interval: more than float64 resolves


@dataclass(frozen=True)
class Share:
    """`hits` of `count`, as a share with its 95 % interval; all three are None where there is nothing to count."""

    hits: int
    count: int
    value: float | None
    low: float | None
    high: float | None

    def to_dict(self) -> dict[str, Any]:
        """For JSON, rounded to 6 digits."""
        return {"hits": self.hits, "count": self.count, **_rounded(value=self.value, low=self.low, high=self.high)}


@dataclass(frozen=True)
class WinRate:
    """One model against another on the same questions.

    Attributes:
        rate: wins and half the ties over all decisions; None where there is none.
        without_ties: wins among wins and losses, with the interval; it holds one half exactly where p is above 0.05.
        p: of the exact two-sided sign test that wins and losses are equally likely; ties say nothing on that. 1 where there is neither.
        needed: wins, of so many wins and losses, from which on p is at most 0.05; None where no number does (five or fewer).
        detectable: the smallest true share of wins that so many wins and losses show four times in five; None where none does.
    """

    wins: int
    losses: int
    ties: int
    rate: float | None
    without_ties: Share
    p: float
    needed: int | None
    detectable: float | None

    def to_dict(self) -> dict[str, Any]:
        """For JSON, rounded to 6 digits."""
        return {"wins": self.wins, "losses": self.losses, "ties": self.ties, **_rounded(rate=self.rate),
                "without_ties": self.without_ties.to_dict(), **_rounded(p=self.p), "needed": self.needed,
                **_rounded(detectable=self.detectable)}


def share(hits: int, count: int) -> Share:
    """A share with its exact interval. Raises ValueError where `hits` is not in 0 to `count`."""
    if not 0 <= hits <= count:
        raise ValueError(f"{hits} of {count}")
    if not count:
        return Share(0, 0, None, None, None)
    low = 0.0 if hits == 0 else _root(lambda p: at_least(hits, count, p) - ALPHA / 2)
    high = 1.0 if hits == count else _root(lambda p: ALPHA / 2 - at_least(count - hits, count, 1 - p))
    return Share(hits, count, hits / count, low, high)


def win_rate(wins: int, losses: int, ties: int) -> WinRate:
    """What so many decisions say. Raises ValueError for negative counts."""
    if min(wins, losses, ties) < 0:
        raise ValueError(f"{wins} wins, {losses} losses, {ties} ties")
    decided, total = wins + losses, wins + losses + ties
    rate = (wins + ties / 2) / total if total else None
    needed = needed_wins(decided)
    return WinRate(wins, losses, ties, rate, share(wins, decided), sign_test(wins, losses), needed,
                   None if needed is None else _root(lambda p: at_least(needed, decided, p) - POWER))


def sign_test(wins: int, losses: int) -> float:
    """The exact two-sided p of the sign test: how often so uneven a result comes of tosses of a fair coin."""
    n = wins + losses
    return min(1.0, 2 * at_least(max(wins, losses), n, 0.5))


def needed_wins(decided: int) -> int | None:
    """The fewest wins of so many decisions with a p of at most 0.05, or None."""
    return next((k for k in range(decided // 2 + 1, decided + 1) if sign_test(k, decided - k) <= ALPHA), None)


def at_least(hits: int, count: int, p: float) -> float:
    """The chance of `hits` or more of `count` independent events of probability p."""
    if hits <= 0 or p >= 1:
        return 1.0
    if p <= 0:
        return 0.0
    chance = lambda k: math.exp(_log_ways(count, k) + k * math.log(p) + (count - k) * math.log1p(-p))
    return min(1.0, math.fsum(map(chance, range(hits, count + 1))))


@functools.lru_cache(maxsize=1 << 14)
def _log_ways(n: int, k: int) -> float:
    return math.log(math.comb(n, k))


def _root(rising: Callable[[float], float]) -> float:
    """Where a rising function of a probability crosses zero."""
    low, high = 0.0, 1.0
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if rising(middle) > 0 else (middle, high)
    return (low + high) / 2


def _rounded(**values: float | None) -> dict[str, float | None]:
    return {name: None if value is None else round(value, DIGITS) for name, value in values.items()}
