"""How much the texts of a set differ from one another. Each measure depends on how many texts there are: compare sets of one size."""
from __future__ import annotations

import bisect
import collections
import math
from typing import Iterator, Sequence

from isara_jax.data.rouge import tokens

MOST = 200       # texts that self-BLEU looks at (Texygen takes 500)
EPSILON = 0.1    # what smoothing method 1 puts in the place of no match (Chen and Cherry 2014, as in nltk)
OPENING = 3      # words that make an opening

Gram = tuple[str, ...]


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Different n-grams of words divided by all n-grams of the set (Li et al. 2016, arXiv 1510.03055); 0 where there is none."""
    grams = [g for text in texts for g in _grams(tokens(text), n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def same_opening(texts: Sequence[str]) -> float:
    """The largest share of texts that begin with the same three words; a text without words begins with nothing and equals none."""
    openings = collections.Counter(tuple(words[:OPENING]) for text in texts if (words := tokens(text)))
    return max(openings.values(), default=0) / len(texts) if texts else 0.0


def self_bleu(texts: Sequence[str], n: int = 4) -> float:
    """Mean BLEU-n of each text against all others, smoothed (Zhu et al. 2018, Texygen, arXiv 1802.01886): 1 where all are alike.

    Only the first 200 texts count. Equal to nltk's sentence_bleu with equal weights and smoothing method 1. Raises ValueError for fewer
    than two texts, where there is nothing to compare.
    """
    if len(texts) < 2:
        raise ValueError(f"self-BLEU of {len(texts)} text(s): at least two are compared")
    words = [tokens(text) for text in texts[:MOST]]
    matched = [_matches(words, order) for order in range(1, n + 1)]
    lengths = sorted(map(len, words))
    return sum(_bleu(len(w), _closest(lengths, len(w)), [m[i] for m in matched]) for i, w in enumerate(words)) / len(words)


def _grams(words: Sequence[str], n: int) -> Iterator[Gram]:
    return zip(*(words[i:] for i in range(n)))


def _matches(texts: Sequence[Sequence[str]], n: int) -> list[tuple[int, int]]:
    """For each text (its n-grams that another text has too, each at most as often as the other text with most of it; all its n-grams)."""
    counts = [collections.Counter(_grams(words, n)) for words in texts]
    most: dict[Gram, tuple[int, int, int]] = {}  # n-gram: the largest count, the text that has it, the largest count among the others
    for i, count in enumerate(counts):
        for gram, c in count.items():
            first, owner, second = most.get(gram, (0, -1, 0))
            most[gram] = (c, i, first) if c > first else (first, owner, max(second, c))

    def elsewhere(gram: Gram, i: int) -> int:
        first, owner, second = most[gram]
        return second if owner == i else first

    return [(sum(min(c, elsewhere(gram, i)) for gram, c in count.items()), count.total()) for i, count in enumerate(counts)]


def _bleu(length: int, closest: int, matches: Sequence[tuple[int, int]]) -> float:
    """BLEU from a text's length, that of the other text closest in length, and (matched, all) n-grams of each order."""
    if not matches[0][0]:
        return 0.0  # no common word
    logs = [math.log((matched or EPSILON) / max(total, 1)) for matched, total in matches]
    brevity = 1.0 if length > closest else math.exp(1 - closest / length)
    return brevity * math.exp(sum(logs) / len(logs))


def _closest(lengths: Sequence[int], length: int) -> int:
    """Of all other texts' lengths the one closest to `length`, the shorter of two; `lengths` are sorted and hold this text's own."""
    at = bisect.bisect_left(lengths, length)
    others = [*lengths[max(at - 1, 0):at], *lengths[at + 1:at + 2]]
    return min(others, key=lambda other: (abs(other - length), other))
