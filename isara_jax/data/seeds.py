"""The question-answer pairs a run starts from: read and checked as people have them, and split into those retrieved and those held out."""
from __future__ import annotations

import difflib
import importlib.resources
import math
import unicodedata
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterable, Sequence, TypeVar

import numpy as np
from rapidfuzz import process
from rapidfuzz.distance import LCSseq

from isara_jax import config
from isara_jax.common import UserError, content_hash
from isara_jax.data import rouge
from isara_jax.data.tables import DELIMITERS, Row, Table, complaint, describe, read_table, short

USUAL = {"question": ("question", "prompt", "instruction"), "answer": ("answer", "response", "output", "completion")}
# … and as people head their columns in other languages, for which nothing else has to be said.
TRANSLATED = {
    "question": (
        "frage", "pregunta", "pergunta", "questão", "domanda", "întrebare", "intrebare",  # German, Spanish, Portuguese, Italian, Romanian;
        "vraag", "fråga", "spørgsmål", "spørsmål", "kysymys", "küsimus", "kérdés",        # French is as English; the North, Hungarian
        "pytanie", "otázka", "pitanje", "vprašanje", "klausimas", "jautājums",            # Polish, Czech, Croatian, Slovene; Baltic ones
        "вопрос", "питання", "запитання", "въпрос", "ερώτηση", "soru",                    # Russian, Ukrainian, Bulgarian, Greek, Turkish
        "سؤال", "שאלה", "प्रश्न", "pertanyaan", "câu hỏi", "คำถาม",                           # Arabic and Persian, Hebrew; South Asia
        "问题", "問題", "質問", "질문"),                                                  # Chinese, Japanese, Korean
    "answer": (
        "antwort", "réponse", "reponse", "respuesta", "resposta", "risposta", "răspuns", "raspuns",
        "antwoord", "svar", "vastaus", "vastus", "válasz",
        "odpowiedź", "odpověď", "odpoveď", "odgovor", "atsakymas", "atbilde",
        "ответ", "відповідь", "отговор", "απάντηση", "cevap", "yanıt",
        "جواب", "إجابة", "پاسخ", "תשובה", "उत्तर", "jawaban", "câu trả lời", "trả lời", "คำตอบ",
        "答案", "回答", "答え", "답변", "답"),
}
COLUMNS = {kind: (*names, *(unicodedata.normalize("NFC", name).casefold() for name in TRANSLATED[kind])) for kind, names in USUAL.items()}
PROVENANCE = {"author": ("author",), "source": ("source",), "licence": ("licence", "license")}
MAX_CHARACTERS = 20_000     # a pair of so many characters or more is refused: no context holds several of them
MANY = 1_000                # so many seeds and more work, but are not what the method is for
NEAR = 0.6                  # questions above this ROUGE-L F belong together; the project's threshold for every split
TEST_ONLY = {               # columns that only one published file of test rows has -> what that file holds
    ("motivation_app",): "Self-Instruct's user-oriented instructions, which are part of AlpacaEval",
    ("instruction", "dataset", "generator"): "AlpacaEval's instructions with a model's outputs",
    ("instruction_id_list",): "IFEval's prompts",
}
HELD_OUT, SPLITTABLE = 4, 8  # fewest pairs to measure a held-out loss on, and fewest seeds to take them from

Pair = TypeVar("Pair")      # anything with .question and .answer


@dataclass(frozen=True)
class Seed:
    """One pair, where it comes from, and its row in the file."""

    question: str
    answer: str
    author: str
    source: str
    licence: str
    row: int


@dataclass(frozen=True)
class SeedSet:
    """Checked pairs in file order. `path` is as it was given, `hash` identifies the content wherever it lies, `warnings` are for people."""

    pairs: tuple[Seed, ...]
    path: str
    hash: str
    warnings: tuple[str, ...]


# ----------------------------------------------------------------------------------------------------------------------- reading
def load_seeds(data: config.Data) -> SeedSet:
    """Read and check the pairs of the file or built-in set `data.seeds`.

    Raises one `UserError` that names the file and up to ten problems by row: see `_pair` and `_duplicates` for what is refused.
    """
    return _check(read_table(_locate(data.seeds)), data, data.seeds)


def from_pairs(pairs: Iterable[Any], data: config.Data) -> SeedSet:
    """Check pairs given in Python: (question, answer) tuples, or dicts with the columns a file may have. Raises as `load_seeds` does."""
    rows = []
    for number, pair in enumerate(pairs, 1):
        if isinstance(pair, dict):
            rows.append(Row(number, {str(key): value for key, value in pair.items()}))
        elif isinstance(pair, (tuple, list)) and len(pair) == 2:
            rows.append(Row(number, {data.question or "question": pair[0], data.answer or "answer": pair[1]}))
        else:
            rows.append(Row(number, None, f"must be (question, answer) or a dict with these keys, but is {short(pair)}"))
    columns = dict.fromkeys(column for row in rows for column in row.values or ())
    name = "the pairs given"
    return _check(Table(Path(name), "item", tuple(columns), tuple(rows)), data, name)


def _locate(name: str) -> Path:
    """The file of a built-in set (a bare name) or of a path."""
    path = Path(name).expanduser()
    if not name.strip():
        raise UserError(f"config.data.seeds is empty. Name a .jsonl, .json or .csv file, or a built-in set: {', '.join(built_in())}.")
    if path.suffix or path.name != name:
        return path
    if name in built_in():
        return built_in()[name]
    if path.exists():
        return path
    near = difflib.get_close_matches(name, built_in(), 1)
    raise UserError(f"config.data.seeds={name!r} is neither a built-in set nor a file here. {f'Did you mean {near[0]!r}? ' if near else ''}"
                    f"Built-in sets: {', '.join(built_in())}. A file of yours ends in .jsonl, .json or .csv.")


def built_in() -> dict[str, Path]:
    """The seed sets that come with the package, by name."""
    return {path.stem: path for path in sorted(own_data().glob("*.jsonl")) if not path.stem.endswith("_test")}


def own_data() -> Path:
    """The folder with the data that comes with the package: seed sets, and evaluation rows in files that end in _test."""
    try:
        return Path(str(importlib.resources.files("isara_jax.configs").joinpath("data")))
    except ModuleNotFoundError:  # a checkout that is not installed: configs/ lies beside the package
        return Path(__file__).resolve().parents[2] / "configs" / "data"


# ---------------------------------------------------------------------------------------------------------------------- checking
def _check(table: Table, data: config.Data, name: str) -> SeedSet:
    rows = table.rows[:data.limit or None]
    refuse_test_only(table)
    _refuse_one_column(table)
    if not rows:
        raise UserError(f"{table.path} holds no pairs{' below its header' if table.columns else ''}. Add at least one question and answer.")
    warnings: list[str] = []
    pairs, problems = [], {}
    if any(row.values is not None for row in rows):
        names = _columns(table, data, warnings)
        extra = {kind: first_column(table.columns, known) for kind, known in PROVENANCE.items()}
        for row in rows:
            made = row.problem or _pair(row, names, extra, data)
            if isinstance(made, Seed):
                pairs.append(made)
            else:
                problems[row.number] = made
    else:
        problems = {row.number: row.problem for row in rows}
    problems |= _duplicates(pairs, table.unit)
    if problems:
        raise UserError(complaint(table, problems))
    warnings += _warnings(table, pairs)
    return SeedSet(tuple(pairs), name, pairs_hash(pairs), tuple(warnings))


def refuse_test_only(table: Table) -> None:
    """Raise `UserError` for a file that is known by its columns as one that models are tested on: nothing may be trained on it."""
    for columns, what in TEST_ONLY.items():
        if set(columns) <= set(table.columns):
            raise UserError(f"{table.path} holds {what} (columns {', '.join(columns)}): these are test rows, and no seeds are taken from "
                            "them. Take pairs of your own, or --config.data.seeds=self_instruct or alpaca.")


def pairs_hash(pairs: Sequence[Seed]) -> str:
    """Identifies pairs with their provenance, in their order."""
    return content_hash(*(part for p in pairs for part in (p.question, p.answer, p.author, p.source, p.licence)))


def first_column(columns: Iterable[str], known: Sequence[str]) -> str | None:
    """The first column, in the order of `known`, whose name is one of these, whatever its case and the composition of its accents."""
    folded = {unicodedata.normalize("NFC", column).strip().casefold(): column for column in reversed(list(columns))}
    return next((folded[name] for name in known if name in folded), None)


def _columns(table: Table, data: config.Data, warnings: list[str]) -> dict[str, str]:
    """The columns of the questions and of the answers: those asked for, else the first with a usual name."""
    asked = {kind: getattr(data, kind) for kind in COLUMNS}
    usual = {kind: [asked[kind].strip().casefold()] if asked[kind] else known for kind, known in COLUMNS.items()}
    named = set(filter(None, table.columns))
    found = {kind: asked[kind] if asked[kind] in named else first_column(table.columns, usual[kind]) for kind in COLUMNS}
    if missing := [kind for kind in COLUMNS if found[kind] is None]:
        there = ", ".join(map(repr, table.columns[:20])) or "none"
        first_row = ", which the first row must name" if table.unit == "row" else ""
        looked_for = " or for ".join(f"{kind}s ({asked[kind] or ', '.join(USUAL[kind]) + ', or their like in other languages'})"
                                     for kind in missing)
        near = {kind: _near(table.columns, usual[kind]) or "COLUMN" for kind in missing}
        flags = " ".join(f"--config.data.{kind}={repr(near[kind]) if ' ' in near[kind] else near[kind]}" for kind in missing)
        if table.unit == "row" and set(near.values()) == {"COLUMN"} and (why := _no_header(table)):
            raise UserError(f"{table.path}: {why}")
        raise UserError(f"{table.path}: no column for {looked_for}. Columns found{first_row}: {there}. Say which to take with {flags}.")
    if found["question"] == found["answer"]:
        raise UserError(f"{table.path}: the column {found['question']!r} cannot hold both the questions and the answers. "
                        "Set --config.data.question and --config.data.answer.")
    for kind, known in COLUMNS.items():
        others = [c for c in table.columns if c != found[kind] and c.strip().casefold() in known]
        if others and not asked[kind]:
            warnings.append(f"{table.path}: the {kind}s are taken from the column {found[kind]!r}, not from "
                            f"{', '.join(map(repr, others))}; --config.data.{kind}=COLUMN takes another")
    return found


def _refuse_one_column(table: Table) -> None:
    """Raise `UserError` for a CSV file whose first row has a single cell, and say what that is likely to come from."""
    if table.unit != "row" or len(table.columns) != 1:
        return
    name = table.columns[0]
    cells = [str(row.values[name]) for row in table.rows[:10] if row.values is not None]
    said = f"{table.path} has only one column, {short(name)}, but a question and its answer stand in two"
    for cell in cells:
        if any(all(first_column(cell.split(mark), known) for known in COLUMNS.values()) for mark in DELIMITERS):
            raise UserError(f"{table.path}: the names of the columns ({short(cell)}) stand below the first row. Remove what is above.")
    for mark in (*DELIMITERS, ":", "^", "~", "  "):
        if cells and all(mark in text.strip() for text in (name, *cells)):
            if mark in DELIMITERS:
                raise UserError(f"{said}: each row is quoted as a whole, so {mark!r} divides nothing. In the spreadsheet, split the column "
                                "(Data > Text to Columns) and save it again.")
            raise UserError(f"{said}: they seem to be divided by {mark!r}. Divide them by a comma, a semicolon, a tab or a bar, or save "
                            "them from a spreadsheet as 'CSV UTF-8'.")
    raise UserError(f"{said}. Put the answers into a second column, and name both in the first row: question and answer. Columns are "
                    "divided by a comma, a semicolon, a tab or a bar.")


def _no_header(table: Table) -> str:
    """What the first row of a CSV file seems to be that names no usual column: a title, or a pair; "" where it may well be a header."""
    for row in table.rows[:10]:
        cells = [value for value in (row.values or {}).values() if isinstance(value, str)]
        if all(first_column(cells, known) for known in COLUMNS.values()):
            return f"the names of the columns seem to stand in row {row.number}. Remove the rows above it."
    cells = [column for column in table.columns if column]
    if len(cells) > 1 and any(cell.endswith(("?", "？", "؟")) or len(cell.split()) > 5 or len(cell) > 60 for cell in cells):
        return (f"the first row seems to be a pair ({short(cells[0])}), not the names of the columns. Put a row above it that names them: "
                "question in one cell, answer in the next. If these are names, say which columns to take with "
                "--config.data.question=COLUMN --config.data.answer=COLUMN.")
    return ""


def _near(columns: Sequence[str], wanted: Iterable[str]) -> str | None:
    folded = {column.casefold(): column for column in columns}
    for name in wanted:
        if close := difflib.get_close_matches(name.casefold(), folded, 1):
            return folded[close[0]]
    return next((column for name in wanted for lower, column in folded.items() if name.casefold() in lower), None)


def _pair(row: Row, names: dict[str, str], extra: dict[str, str | None], data: config.Data) -> Seed | str:
    """The pair in a row, or what is wrong with it: a value that is missing, empty, no text or no Unicode, or a pair too long.

    A non-empty `input` (Alpaca) or `context` (Dolly) beside an `instruction` goes on its own line after the instruction.
    """
    columns = list(names.items())
    joined = first_column(row.values, ("input", "context")) if names["question"].strip().casefold() == "instruction" else None
    if joined not in (None, names["answer"]) and str(row.values[joined] or "").strip():
        columns.append(("input", joined))
    texts = {}
    for kind, column in columns:
        value = row.values.get(column)
        if value is None or isinstance(value, str) and not value.strip():
            merged = value is not None and kind == "question" and str(row.values.get(names["answer"]) or "").strip()
            return (f"the {kind} (column {column!r}) is {'empty' if column in row.values else 'missing'}"
                    + ", though there is an answer (of merged cells only the first keeps its text: write it in each row)" * bool(merged))
        if not isinstance(value, str):
            return f"the {kind} (column {column!r}) must be text, but is {describe(value)}"
        if any("\ud800" <= c <= "\udfff" for c in value):
            return f"the {kind} (column {column!r}) holds half of a surrogate pair, which is no character: {short(value)}"
        texts[kind] = value.strip().replace("\r\n", "\n").replace("\r", "\n")
    question, answer = "\n".join(filter(None, (texts["question"], texts.get("input")))), texts["answer"]
    if len(question) + len(answer) >= MAX_CHARACTERS:
        return f"the pair has {len(question) + len(answer):,} characters, and {MAX_CHARACTERS:,} are too many: {short(question)}"
    said = [" ".join(str(row.values.get(extra[kind]) or "").encode("utf-8", "replace").decode().split()) for kind in PROVENANCE]
    return Seed(question, answer, *(s or getattr(data, kind) or "unknown" for s, kind in zip(said, PROVENANCE)), row.number)


def normalise(text: str) -> str:
    """A text without case and with single spaces, for telling whether two are the same."""
    return " ".join(text.split()).casefold()


def _duplicates(pairs: Sequence[Seed], unit: str) -> dict[int, str]:
    """Pairs whose question and answer repeat an earlier row's."""
    first: dict[tuple[str, str], int] = {}
    found = {}
    for p in pairs:
        row = first.setdefault((normalise(p.question), normalise(p.answer)), p.row)
        if row != p.row:
            found[p.row] = f"the same question and answer as {unit} {row}: {short(p.question)}"
    return found


def _warnings(table: Table, pairs: Sequence[Seed]) -> list[str]:
    out = []
    unknown: dict[int, list[str]] = defaultdict(list)
    for field in PROVENANCE:
        unknown[sum(getattr(p, field) == "unknown" for p in pairs)].append(field)
    for count in sorted(filter(None, unknown), reverse=True):
        fields = unknown[count]
        which, several = "the" if count == len(pairs) else f"{count} of the", len(fields) > 1
        out.append(f"{table.path}: the {_and(fields)} of {which} seeds {'are' if several else 'is'} unknown, and every generated pair "
                   f"inherits that; say {'them' if several else 'it'} with {' '.join(f'--config.data.{field}=…' for field in fields)} or "
                   f"{'columns' if several else 'a column'} {_and(list(map(repr, fields)))}")
    rows: dict[str, list[int]] = defaultdict(list)
    for p in pairs:
        rows[normalise(p.question)].append(p.row)
    repeated = [" and ".join(map(str, numbers)) for numbers in rows.values() if len(numbers) > 1]
    if repeated:
        out.append(f"{table.path}: {len(repeated)} question(s) have different answers ({table.unit}s {'; '.join(repeated[:3])}"
                   f"{'; …' if len(repeated) > 3 else ''}); all are kept")
    if len(pairs) == 1:
        out.append(f"{table.path}: there is only one seed, so every new pair will resemble it and nothing can be held out")
    if len(pairs) >= MANY:
        out.append(f"{table.path}: {len(pairs):,} seeds; this works, but the method is meant for fewer than 100 "
                   "(--config.data.limit=N uses the first N)")
    return out


def _and(words: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))


# --------------------------------------------------------------------------------------------------------------------- splitting
def split_holdout(pairs: Sequence[Pair], share: float, purpose: str = "split") -> tuple[list[Pair], list[Pair]]:
    """Split pairs into (train, held out) so that no question has a near-duplicate on the other side.

    Whole components (see `components`) are held out, in the order of a hash of their content, until `share` of the pairs and at
    least 4 are: the outcome depends neither on the order of the rows nor on their file. A component that would take more than twice
    that, or leave fewer pairs to train on than are held out, is passed over. Nothing is held out at share 0, under 8 pairs, or where
    4 cannot be. Splits of another `purpose` are independent of one another.
    """
    target = max(HELD_OUT, math.ceil(share * len(pairs)))
    if not share or len(pairs) < SPLITTABLE:
        return list(pairs), []
    groups: dict[int, list[int]] = defaultdict(list)
    for i, label in enumerate(components([p.question for p in pairs])):
        groups[int(label)].append(i)
    content = lambda group: content_hash(purpose, *sorted(content_hash(pairs[i].question, pairs[i].answer) for i in group))
    held: set[int] = set()
    for group in sorted(groups.values(), key=content):
        if len(held) < target and len(held) + len(group) <= min(2 * target, len(pairs) // 2):
            held.update(group)
    if len(held) < HELD_OUT:
        held.clear()
    return [p for i, p in enumerate(pairs) if i not in held], [p for i, p in enumerate(pairs) if i in held]


def components(questions: Sequence[str], threshold: float = NEAR) -> np.ndarray:
    """A label for each question [n]: equal where a chain of pairs with ROUGE-L F above `threshold`, or of equal texts, connects them."""
    ids: dict[str, int] = {}
    words = [[ids.setdefault(w, len(ids)) for w in rouge.tokens(q)] for q in questions]
    firsts: dict[Any, int] = {}  # equal token lists are compared once; questions without a token are equal when their text is
    place = [firsts.setdefault(tuple(w) or normalise(q), len(firsts)) for w, q in zip(words, questions)]
    distinct = [list(key) if isinstance(key, tuple) else [] for key in firsts]
    lengths = np.array([len(w) for w in distinct])
    labels = np.arange(len(distinct))
    for start in range(0, len(distinct), 256):  # blocks of rows keep the matrix small; each meets itself and what follows
        common = process.cdist(distinct[start:start + 256], distinct[start:], scorer=LCSseq.similarity, dtype=np.int32)
        near = rouge.f_of_lengths(common, lengths[start:start + 256, None], lengths[start:]) > threshold
        for i, row in enumerate(near, start):
            touched = np.unique(np.append(labels[start:][row], labels[i]))
            if len(touched) > 1:
                labels[np.isin(labels, touched)] = touched[0]
    return labels[place]
