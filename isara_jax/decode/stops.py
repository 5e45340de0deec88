"""Where a text ends that is drawn a few tokens at a time: stop strings, which may begin and end within tokens."""
from __future__ import annotations

from typing import Callable, Sequence


def settled(text: str, stop: Sequence[str]) -> str:
    """The beginning of an unfinished text that stays as it is: without an unfinished character, and what may become a stop string."""
    text = text.rstrip("\ufffd")
    held = max((n for s in stop for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
    return text[:len(text) - held]


def cut(ids: list[int], known: int, stop: tuple[str, ...], decode: Callable[[Sequence[int]], str]) -> tuple[list[int], str] | None:
    """(ids, text) before the first stop string, or None where there is none: as if it had been looked for after every token.

    The first `known` of `ids` were looked at before and hold none.
    """
    if not any(s in decode(ids) for s in stop):
        return None
    text = next(t for n in range(known, len(ids) + 1) if any(s in (t := decode(ids[:n])) for s in stop))
    text = text[:min(text.find(s) for s in stop if s in text)]
    return next(ids[:n] for n in range(len(ids) + 1) if decode(ids[:n]).startswith(text)), text
