"""Which candidates become pairs: an ordered list of named, pure filters. The first that rejects is the reason.

`min_words` and the ROUGE-L threshold of `novelty` are the paper's (as its reviewers quote them); the others answer their criticism that
these two are crude.
"""
from __future__ import annotations

import collections
import difflib
import functools
from dataclasses import dataclass
from typing import Any, Callable, Sequence

from isara_jax import config
from isara_jax.common import UserError
from isara_jax.data import rouge
from isara_jax.data.rouge import NoveltyIndex


tokens = functools.lru_cache(maxsize=64)(rouge.tokens)  # several filters look at one text in turn; none changes the list


@dataclass(frozen=True)
class Candidate:
    """A parsed text with what the filters look at. In the question stage there is no answer yet."""

    question: str
    answer: str | None
    finish: str                    # stop, eos, length or nan
    verdict: str | None            # of the parser
    exemplars: tuple[Any, ...]     # the pairs in its prompt (id, question, answer)

    @property
    def text(self) -> str:
        """What was just generated."""
        return self.question if self.answer is None else self.answer


@dataclass(frozen=True)
class Verdict:
    """What one filter says, with the score it judged by and the pair that the candidate is too close to."""

    name: str
    passed: bool
    score: float | None = None
    neighbour: str | None = None


Filter = Callable[[Candidate, config.Filters, NoveltyIndex | None], Verdict]


def parse(c: Candidate, settings: config.Filters, accepted: NoveltyIndex | None) -> Verdict:
    """The parser found a text."""
    return Verdict("parse", c.verdict is None)


def truncated(c: Candidate, settings: config.Filters, accepted: NoveltyIndex | None) -> Verdict:
    """The text ended by itself, not at the token limit."""
    return Verdict("truncated", c.finish not in ("length", "nan"))


def min_words(c: Candidate, settings: config.Filters, accepted: NoveltyIndex | None) -> Verdict:
    """At least so many words (5 in the paper); a Han, kana or Thai character counts as one."""
    count = len(tokens(c.text))
    return Verdict("min_words", count >= settings.min_words, count)


def ngram_loop(c: Candidate, settings: config.Filters, accepted: NoveltyIndex | None) -> Verdict:
    """No n-gram of words occurs too often (the sign of a looping sampler)."""
    words, n = tokens(c.text), settings.loop_ngram
    grams = collections.Counter(tuple(words[i:i + n]) for i in range(len(words) - n + 1))
    most = max(grams.values(), default=0)
    return Verdict("ngram_loop", most < settings.loop_repeats, most)


def exemplar_copy(c: Candidate, settings: config.Filters, accepted: NoveltyIndex | None) -> Verdict:
    """Not the same words as the question (or answer) of a pair in its own prompt."""
    words = tokens(c.text)
    for pair in c.exemplars:
        if words == tokens(pair.question if c.answer is None else pair.answer):
            return Verdict("exemplar_copy", False, 1.0, pair.id)
    return Verdict("exemplar_copy", True)


def echo(c: Candidate, settings: config.Filters, accepted: NoveltyIndex | None) -> Verdict:
    """The answer neither equals nor contains its question."""
    question, answer = tokens(c.question), tokens(c.answer or "")
    n = len(question)
    return Verdict("echo", not n or not any(answer[i:i + n] == question for i in range(len(answer) - n + 1)))


def is_question(c: Candidate, settings: config.Filters, accepted: NoveltyIndex | None) -> Verdict:
    """Ends with a question mark of some script (optional: instructions are questions of another form)."""
    return Verdict("is_question", asks(c.question))


def asks(question: str) -> bool:
    """Whether a text ends with a question mark of some script, closing quotes and brackets aside."""
    return question.rstrip("\"'”’»)」』 ").endswith(("?", "？", "؟", "\u037e", "፧"))


def novelty(c: Candidate, settings: config.Filters, accepted: NoveltyIndex | None) -> Verdict:
    """ROUGE-L F to every accepted question is at most the threshold (0.7 in the paper)."""
    score, neighbour = accepted.nearest(tokens(c.question))
    return Verdict("novelty", score <= settings.rouge, score, neighbour)


QUESTION: dict[str, Filter] = {f.__name__: f for f in (parse, truncated, min_words, ngram_loop, exemplar_copy, is_question, novelty)}
ANSWER: dict[str, Filter] = {f.__name__: f for f in (parse, truncated, min_words, echo, ngram_loop, exemplar_copy)}
FILTERS = {"question": QUESTION, "answer": ANSWER}


def check_names(settings: config.Filters) -> None:
    """Raise `UserError` for a filter that does not exist in its stage, or is named twice."""
    for stage, known in FILTERS.items():
        names = getattr(settings, stage)
        for name in names:
            if name not in known:
                near = difflib.get_close_matches(name, known, 1)
                raise UserError(f"config.filters.{stage} names {name!r}, which is no {stage} filter. "
                                + (f"Did you mean {near[0]!r}?" if near else f"There are {', '.join(known)}."))
        if twice := [n for n, count in collections.Counter(names).items() if count > 1]:
            raise UserError(f"config.filters.{stage} names {twice[0]!r} twice; once is enough.")


def run(stage: str, candidate: Candidate, settings: config.Filters, accepted: NoveltyIndex | None = None) -> list[Verdict]:
    """The verdicts of a stage's filters in order, up to the first rejection."""
    verdicts = []
    for name in getattr(settings, stage):
        verdicts.append(FILTERS[stage][name](candidate, settings, accepted))
        if not verdicts[-1].passed:
            break
    return verdicts


def seed_rejections(pairs: Sequence[Any], stage: str, settings: config.Filters) -> dict[str, list[int]]:
    """The indices of the seeds that each filter of a stage would reject by itself, novelty aside.

    For `exemplar_copy` the other seeds are the exemplars: it is those whose question (or answer) stands word by word in another seed.
    """
    rejected: dict[str, list[int]] = {name: [] for name in getattr(settings, stage) if name != "novelty"}
    words = []
    for i, pair in enumerate(pairs):
        candidate = Candidate(pair.question, pair.answer if stage == "answer" else None, "stop", None, ())
        words.append(tuple(tokens(candidate.text)))
        for name, found in rejected.items():
            if name != "exemplar_copy" and not FILTERS[stage][name](candidate, settings, None).passed:
                found.append(i)
    if "exemplar_copy" in rejected:
        counts = collections.Counter(words)
        rejected["exemplar_copy"] = [i for i, text in enumerate(words) if counts[text] > 1]
    return rejected
