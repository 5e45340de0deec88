"""What someone's own pairs look like before a model is read: counted once, then said in notes and warnings that name rows.

Nothing here quotes the pairs, so all of it may be said of sensitive ones; nothing here changes them.
"""
from __future__ import annotations

import statistics
from collections import defaultdict
from dataclasses import dataclass
from typing import Callable, Hashable, Sequence

from isara_jax import config
from isara_jax.data import cells, filters, languages
from isara_jax.data.rouge import tokens
from isara_jax.data.seeds import NEAR, SPLITTABLE, Seed, components, normalise

Rows = tuple[int, ...]
SHOWN = 5                  # rows or groups named in one line
FEW = 20                   # pairs under which little can be learned, and less shown
LONG = 300                 # words from which on an answer leaves room for few of its kind in a prompt
REJECTED = 0.1             # share of the seeds above which a filter seems wrong for them
MOST = 0.9                 # share of the pairs above which they count as being in one language
ENGLISH_MODELS, ENGLISH_ENCODERS = ("smollm2-135m-instruct",), ("minilm-l6",)
MIXED = "several languages"


@dataclass(frozen=True)
class Lengths:
    """How long the questions or the answers are, in words (as the filters count them) and in characters.

    `row` is that of the text with the most words.
    """

    median: float
    longest: int
    row: int
    median_characters: float
    most_characters: int


@dataclass(frozen=True)
class Survey:
    """What was counted. Rows are those of the file, in its order.

    Attributes:
        pairs: how many.
        question: lengths of the questions.
        answer: lengths of the answers.
        same_questions: rows of each question that is there several times, whatever case and spaces.
        near_questions: rows of each group of different questions that are near (ROUGE-L F > 0.6, over chains).
        same_answers: rows of each answer that several different questions have.
        scripts: share of each script among the letters, the largest first.
        languages: rows by language, the largest first, without those whose language too few words tell.
        crossed: rows whose question is in another language than its answer.
        markup: rows with HTML tags or entities.
        tables: rows with a Markdown table.
        garbled: rows with letters that were decoded wrongly.
        addresses: rows by kind: web addresses, e-mail addresses, telephone numbers.
        placeholders: rows whose question or answer only stands for one, such as n/a or "see above".
        unmarked: rows whose question does not end with a question mark.
        long: rows whose answer has at least 300 words.
        rejections: by stage and filter, the rows that the filter would reject by itself.
    """

    pairs: int
    question: Lengths
    answer: Lengths
    same_questions: tuple[Rows, ...]
    near_questions: tuple[Rows, ...]
    same_answers: tuple[Rows, ...]
    scripts: dict[str, float]
    languages: dict[str, Rows]
    crossed: Rows
    markup: Rows
    tables: Rows
    garbled: Rows
    addresses: dict[str, Rows]
    placeholders: Rows
    unmarked: Rows
    long: Rows
    rejections: dict[str, dict[str, Rows]]

    @property
    def language(self) -> str:
        """The language of nearly all pairs whose language is known, "several languages" where there is none, "" where none is known."""
        known = sum(map(len, self.languages.values()))
        first = next(iter(self.languages), "")
        return first if not known or len(self.languages[first]) >= MOST * known else MIXED


# ---------------------------------------------------------------------------------------------------------------------- counting
def survey(pairs: Sequence[Seed], settings: config.Filters) -> Survey:
    """Count everything that `Survey` holds. Takes about two seconds for 5,000 pairs."""
    texts = {id(p): f"{p.question}\n{p.answer}" for p in pairs}
    rows = lambda holds: tuple(p.row for p in pairs if holds(p))
    either = lambda holds: rows(lambda p: holds(texts[id(p)]))
    words = {id(p): len(tokens(p.answer)) for p in pairs}
    return Survey(
        pairs=len(pairs),
        question=_lengths(pairs, [p.question for p in pairs], [len(tokens(p.question)) for p in pairs]),
        answer=_lengths(pairs, [p.answer for p in pairs], [words[id(p)] for p in pairs]),
        same_questions=_groups(pairs, [normalise(p.question) for p in pairs]),
        near_questions=_groups(pairs, components([p.question for p in pairs]).tolist(), differ=lambda p: normalise(p.question)),
        same_answers=_groups(pairs, [normalise(p.answer) for p in pairs], differ=lambda p: normalise(p.question)),
        scripts=languages.scripts(texts.values()),
        languages=_languages(pairs, [texts[id(p)] for p in pairs]),
        crossed=rows(_crossed),
        markup=either(cells.has_markup),
        tables=either(cells.has_table),
        garbled=either(cells.is_garbled),
        addresses={"web addresses": either(cells.has_web_address), "e-mail addresses": either(cells.has_mail_address),
                   "telephone numbers": either(cells.has_phone)},
        placeholders=rows(lambda p: cells.is_placeholder(p.question) or cells.is_placeholder(p.answer)),
        unmarked=rows(lambda p: not filters.asks(p.question)),
        long=rows(lambda p: words[id(p)] >= LONG),
        rejections={stage: {name: tuple(pairs[i].row for i in found)
                            for name, found in filters.seed_rejections(pairs, stage, settings).items()} for stage in filters.FILTERS},
    )


def _lengths(pairs: Sequence[Seed], texts: Sequence[str], words: Sequence[int]) -> Lengths:
    longest = max(range(len(words)), key=words.__getitem__, default=None)
    characters = list(map(len, texts))
    return Lengths(statistics.median(words or [0]), max(words, default=0), pairs[longest].row if pairs else 0,
                   statistics.median(characters or [0]), max(characters, default=0))


def _groups(pairs: Sequence[Seed], keys: Sequence[Hashable], differ: Callable[[Seed], str] | None = None) -> tuple[Rows, ...]:
    """The rows of each key that several pairs have: several that `differ`, where that is given."""
    found: dict[Hashable, list[Seed]] = defaultdict(list)
    for pair, key in zip(pairs, keys, strict=True):
        found[key].append(pair)
    return tuple(tuple(p.row for p in group) for group in found.values() if len(set(map(differ, group)) if differ else group) > 1)


def _languages(pairs: Sequence[Seed], texts: Sequence[str]) -> dict[str, Rows]:
    """Rows by language. Where most are in none that is known, what they have in common may still be that it is not English."""
    found: dict[str, list[int]] = defaultdict(list)
    for pair, text in zip(pairs, texts, strict=True):
        found[languages.language(text)].append(pair.row)
    undecided = found.pop("", [])
    if 2 * len(undecided) > len(pairs):
        rows = set(undecided)
        if languages.hardly_english(text for pair, text in zip(pairs, texts) if pair.row in rows):
            found[languages.NOT_ENGLISH] = undecided
    return {name: tuple(rows) for name, rows in sorted(found.items(), key=lambda item: (-len(item[1]), item[0]))}


def _crossed(pair: Seed) -> bool:
    asked, answered = languages.language(pair.question), languages.language(pair.answer)
    return bool(asked and answered and asked != answered)


# ------------------------------------------------------------------------------------------------------------------------- notes
def lines(found: Survey) -> list[str]:
    """What to know about the pairs, as notes."""
    out = [f"questions have {_length(found.question)}; answers have {_length(found.answer)}",
           f"language: {_spoken(found)}"]
    if len(noticed := [f"{name} {share:.0%}" for name, share in found.scripts.items() if share >= 0.01]) > 1:
        out.append(f"scripts: {', '.join(noticed)} of the letters")
    if found.same_questions:
        out.append(f"several answers to {_count(len(found.same_questions), 'question')} ({_grouped(found.same_questions)})")
    alike = len(found.near_questions)
    out.append(f"{_count(alike, 'group')} of near questions (ROUGE-L F > {NEAR}; {_grouped(found.near_questions)}): each stays on one side "
               "of every split" if alike else f"no two questions are near (ROUGE-L F > {NEAR})")
    if found.unmarked:
        out.append(f"{len(found.unmarked)} of the {found.pairs} questions do not end with a question mark ({said(found.unmarked)})")
    for stage, rejected in found.rejections.items():
        shares = ", ".join(f"{name} {_share(rows, found)}{f' ({said(rows)})' if rows else ''}" for name, rows in rejected.items())
        out.append(f"share of the seeds each {stage} filter would reject: {shares or 'none of them looks at the text alone'}")
    return out


def _length(lengths: Lengths) -> str:
    return (f"{lengths.median:g} words in the median, {lengths.longest} at most (row {lengths.row}), and {lengths.median_characters:,g} "
            f"characters in the median, {lengths.most_characters:,} at most")


def _spoken(found: Survey) -> str:
    unknown = found.pairs - sum(map(len, found.languages.values()))
    if not found.languages:
        return "too few words to tell"
    if len(found.languages) == 1 and not unknown:
        return next(iter(found.languages))
    shown = [f"{name} {len(rows)}" for name, rows in found.languages.items()] + [f"too few words to tell {unknown}"] * bool(unknown)
    return ", ".join(shown)


def _share(rows: Rows, found: Survey) -> str:
    share = len(rows) / max(found.pairs, 1)
    return "under 1%" if 0 < share < 0.005 else f"{share:.0%}"


# ---------------------------------------------------------------------------------------------------------------------- warnings
def warnings(found: Survey) -> list[str]:
    """What to mend or to mind, each with its rows and the next step."""
    out = [*_number(found)]
    if found.placeholders:
        out.append(f"{said(found.placeholders)}: the question or the answer is a placeholder (n/a, TODO, see above, …); the model would "
                   "learn to answer so. Write it out or remove the row")
    if found.garbled:
        out.append(f"{said(found.garbled)}: letters were decoded wrongly (Ã¤ for ä, â€™ for an apostrophe, � for a lost one), before this "
                   "file was written. Export it again as UTF-8 from where it comes")
    if found.markup:
        out.append(f"{said(found.markup)}: HTML tags or entities. They are learned and generated as they stand; nothing is stripped here. "
                   "Unless they are the subject, remove them: in the spreadsheet, replace <*> (Excel) or, as a regular expression, "
                   "<[^>]*> (LibreOffice) by nothing, and &amp; and its like by their characters")
    if found.tables:
        out.append(f"{said(found.tables)}: Markdown tables. They are learned as they stand, and small models rarely keep their columns: "
                   "sentences or a list work better")
    if any(found.addresses.values()):
        kinds = "; ".join(f"{kind} in {said(rows)}" for kind, rows in found.addresses.items() if rows)
        out.append(f"{kinds}: a model trained on such details invents others like them. Replace them by words (our contact page), or check "
                   "every generated one")
    if found.same_answers:
        out.append(f"{_count(len(found.same_answers), 'answer')} belong{'s' * (len(found.same_answers) == 1)} to several questions "
                   f"({_grouped(found.same_answers)}): one answer for everything is easily learned. Say in each what is its own")
    if found.long:
        out.append(f"{_count(len(found.long), 'answer')} of {LONG} words or more ({said(found.long)}; the longest has "
                   f"{found.answer.longest}): generating such answers is slow, and fewer pairs fit into a prompt, so k falls. Consider "
                   "splitting each into several questions")
    out += _language(found)
    for stage, rejected in found.rejections.items():
        for name, rows in rejected.items():
            if len(rows) > REJECTED * found.pairs:
                out.append(f"the {stage} filter {name} would reject {_share(rows, found)} of your own seeds ({said(rows)}): loosen it "
                           f"(config.filters) or drop it from filters.{stage}")
    return out


def _number(found: Survey) -> list[str]:
    if found.pairs < SPLITTABLE:
        return [f"{_count(found.pairs, 'pair')}: this works, but nothing is held out (that takes {SPLITTABLE}), so there is no held-out "
                f"loss, without --config.data.test=FILE nothing is judged, and new pairs will resemble these few. {FEW} or more are better"]
    if found.pairs < FEW:
        return [f"{found.pairs} pairs: this works, but what is held out is too little to show much. {FEW} or more are better"]
    return []


def _language(found: Survey) -> list[str]:
    out = []
    if len(found.languages) > 1:
        others = list(found.languages.items())[found.language != MIXED:]
        first = "" if found.language == MIXED else f" beside {found.language}"
        out.append(f"mixed languages: {'; '.join(f'{name} ({said(rows)})' for name, rows in others)}{first}. Prompts mix them, and what is "
                   "generated will too. Make one file and one run for each language")
    if found.crossed:
        out.append(f"{said(found.crossed)}: the question is in another language than its answer. Unless that is the task, translate one")
    return out


def language_warnings(found: Survey, model: str, encoder: str) -> list[str]:
    """What to mind where the pairs are not English, but the embedded model or encoder, which are, is to be used.

    A few pairs in another language than English are left to `warnings`.
    """
    foreign = {name: rows for name, rows in found.languages.items() if name != languages.ENGLISH}
    used = [(f"the model {model}", "answers will be poor and often English", "--config.model.name=…")] * (model in ENGLISH_MODELS)
    used += [(f"the encoder {encoder}", "neighbours will be chosen badly", "--config.retrieval.encoder=…")] * (encoder in ENGLISH_ENCODERS)
    if not foreign or not used or found.language == languages.ENGLISH:
        return []
    things, effects, flags = zip(*used)
    count = sum(map(len, foreign.values()))
    whose = "the seeds are" if found.language != MIXED else f"{count} of the {found.pairs} seeds {'is' if count == 1 else 'are'}"
    names = ", ".join(name for name in foreign if name != languages.NOT_ENGLISH)
    return [f"{whose} not English{f' ({names})' if names else ''}, but {' and '.join(things)} {'is' if len(used) == 1 else 'are'}: "
            f"{', and '.join(effects)}. Name {'one' if len(used) == 1 else 'ones'} made for that language by hub id or folder: "
            f"{' and '.join(flags)}"]


# -------------------------------------------------------------------------------------------------------------------------- words
def said(rows: Rows) -> str:
    """Rows for a message: row 3; rows 3, 5 and 9; rows 3, 5, 9, 12, 40 and 7 more."""
    if len(rows) == 1:
        return f"row {rows[0]}"
    shown, rest = list(map(str, rows[:SHOWN])), len(rows) - SHOWN
    return f"rows {', '.join(shown)} and {rest} more" if rest > 0 else f"rows {', '.join(shown[:-1])} and {shown[-1]}"


def _grouped(groups: Sequence[Rows]) -> str:
    more = [f"and {len(groups) - SHOWN} more"] if len(groups) > SHOWN else []
    return "; ".join([said(group) for group in groups[:SHOWN]] + more)


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}{'' if n == 1 else 's'}"
