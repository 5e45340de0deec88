"""ROUGE-L between texts, exactly as rouge-score computes it but over every script, and the nearest of many texts.

The longest common subsequence comes from rapidfuzz over token ids (Lin 2004; google-research/rouge_score). rouge-score's own tokenizer
drops every letter outside ASCII, so a filter built on it is blind there; ours keeps letters and digits of all scripts.
"""
from __future__ import annotations

import array
import unicodedata
from typing import Sequence

import numpy as np
from rapidfuzz import process
from rapidfuzz.distance import LCSseq

# Written without spaces, so that each character is a token: Thai, kana (with extensions and half-width forms, which NFKC widens), Han.
_SINGLE = ((0x0E00, 0x0E7F), (0x3005, 0x3007), (0x3041, 0x30FF), (0x31F0, 0x31FF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF),
           (0x1B000, 0x1B16F), (0x20000, 0x323AF))
_ZERO_WIDTH_SPACE = "\u200b"     # marks borders of words in scripts without spaces
_SURROGATES = (0xD800, 0xE000)  # code points that no text holds
_UNKNOWN = 0                    # code of the tokens that no accepted text has


def tokens(text: str) -> list[str]:
    """The tokens ROUGE compares: runs of letters and digits after NFKC and case folding; Han, kana and Thai one by one.

    Marks stay with the letter before them, so that scripts with vowel signs keep their words; invisible characters (soft hyphen, joiners,
    direction marks) neither count nor split.
    """
    out: list[str] = []
    in_word = joins = False  # whether a mark, and whether a letter, continues the last token
    for c in unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold()):
        kind = unicodedata.category(c)
        if kind[0] == "M":
            if in_word:
                out[-1] += c
        elif kind[0] in "LN":
            single = _is_single(c)
            if joins and not single:
                out[-1] += c
            else:
                out.append(c)
            in_word, joins = True, not single
        elif kind != "Cf" or c == _ZERO_WIDTH_SPACE:
            in_word = joins = False
    return out


def _is_single(c: str) -> bool:
    return ord(c) >= 0x0E00 and any(low <= ord(c) <= high for low, high in _SINGLE)


def f_measure(a: Sequence[str], b: Sequence[str]) -> float:
    """ROUGE-L F of two token lists, in the arithmetic of rouge-score: p = L/m, r = L/n, F = 2pr/(p + r) in float64."""
    return f_of_length(LCSseq.similarity(a, b), len(a), len(b)) if a and b else 0.0


def f_of_length(length: int, m: int, n: int) -> float:
    """F from the length of the longest common subsequence and both lengths. 2L/(m + n) is the same number but rounds ties otherwise."""
    if not length:
        return 0.0
    precision, recall = length / m, length / n
    return 2 * precision * recall / (precision + recall)


class NoveltyIndex:
    """The questions accepted so far, as strings with one character a token, so that one call compares a text with all of them."""

    def __init__(self):
        self._ids: list[str] = []
        self._texts: list[str] = []
        self._lengths = array.array("q")
        self._code: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._ids)

    def add(self, id: str, words: Sequence[str]) -> None:
        """Accept the tokens of a text: from here on others are compared with it."""
        self._ids.append(id)
        self._texts.append("".join(_character(self._code.setdefault(w, len(self._code) + 1)) for w in words))
        self._lengths.append(len(words))

    def nearest(self, words: Sequence[str]) -> tuple[float, str | None]:
        """The largest F to an accepted text, and the id of the first text that has it; (0.0, None) when nothing is shared."""
        if not self._ids or not words:
            return 0.0, None
        text = "".join(_character(self._code.get(w, _UNKNOWN)) for w in words)
        common = process.cdist([text], self._texts, scorer=LCSseq.similarity, dtype=np.int32)[0]
        scores = f_of_lengths(common, len(words), np.array(self._lengths))
        best = int(np.argmax(scores))
        return float(scores[best]), self._ids[best] if scores[best] > 0 else None


def _character(code: int) -> str:
    """A character for each code from 0 to 1,112,063."""
    return chr(code if code < _SURROGATES[0] else code + _SURROGATES[1] - _SURROGATES[0])


def f_of_lengths(lengths: np.ndarray, m: int | np.ndarray, n: np.ndarray) -> np.ndarray:
    """`f_of_length` for arrays, with the same rounding."""
    with np.errstate(divide="ignore", invalid="ignore"):
        precision, recall = lengths / m, lengths / n
        return np.where(lengths > 0, 2 * precision * recall / (precision + recall), 0.0)
