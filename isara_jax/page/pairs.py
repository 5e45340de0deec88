"""The pairs of the page's browser, kept and rejected, in columns: each text stored once, exemplars and neighbours by position.

Columns keep the page small: 5,000 pairs with ten exemplars each come to about 3 MB. What would still be too much is cut, texts before rows,
and `notes` says so.
"""
from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Iterator, Sequence

from isara_jax.data.pool import pair_id
from isara_jax.page.embed import script_json
from isara_jax.page.read import Reader, Row, number, table, texts

BUDGET = 3_800_000                             # bytes of JSON for all pairs
MOST = 20_000                                  # pairs
LONGEST = (6000, 3000, 1500, 800, 400, 200)    # characters of a text; the first with which the pairs fit
KEPT, REJECTED, SEED = "kept", "rejected", "seed"
REQUEST = "request "                           # how a filter names a neighbour of its own iteration


@dataclass
class Browser:
    """Everything the browser shows. A pair is a position in all columns.

    Columns point into tables: question and answer into `texts` (-1: none), `checks` into `sets` (names of the filters that looked, "!"
    before the one that rejected), `made` into `origins` (author, source, licence, sampling), verdict and reason into lists that `_pack`
    adds.
    `scores` has a number or null for each name of its set. A neighbour is a position, or a text where the pair is not here.
    """

    columns: dict[str, list[Any]] = field(default_factory=lambda: {name: [] for name in COLUMNS})
    texts: list[str] = field(default_factory=list)
    sets: list[list[str]] = field(default_factory=list)
    origins: list[list[str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.columns["id"])

    def to_dict(self) -> Row:
        """For JSON."""
        return {"columns": self.columns, "texts": self.texts, "sets": self.sets, "origins": self.origins, "notes": self.notes}


COLUMNS = ("fold", "iteration", "verdict", "reason", "id", "request", "question", "answer", "asked", "answered", "checks", "scores",
           "neighbours", "made", "review")


def browser(folders: Sequence[tuple[int, Reader, Sequence[int]]], items: Row) -> Browser:
    """The pairs of some runs.

    Args:
        folders: (fold, or 0 where there are none; reader of the run's folder; its iterations).
        items: evaluation rows by id, to name what a leaking question was near.
    """
    rows = [row for fold, reader, iterations in folders for row in _run(fold, reader, iterations)]
    everything, keep = len(rows), min(len(rows), MOST)
    while True:
        rows = [rows[i * len(rows) // keep] for i in range(keep)]
        for longest in LONGEST:
            made = _pack(rows, items, longest)
            if (size := len(script_json(made.to_dict()).encode())) <= BUDGET or keep <= 1:
                if keep < everything:
                    made.notes.append(f"Of {everything} pairs {keep} are here, evenly from all iterations. All are in pool/ and "
                                      "iterations/.")
                return made
        keep = max(int(keep * BUDGET / size * 0.9), 1)


# --------------------------------------------------------------------------------------------------------------------- reading
def _run(fold: int, reader: Reader, iterations: Sequence[int]) -> Iterator[Row]:
    """Kept and rejected pairs of each iteration in the order of the requests, then the seeds."""
    for t in iterations:
        yield from sorted(_iteration(fold, reader, t), key=lambda row: row["request"])
    for row in reader.rows("pool/000-seeds.jsonl", id=str, question=str, answer=str):
        yield {"fold": fold, "iteration": 0, "verdict": SEED, "id": row["id"], "question": row["question"], "answer": row["answer"],
               "made": _origin(row)}


def _iteration(fold: int, reader: Reader, t: int) -> Iterator[Row]:
    folder = reader.inside(f"iterations/{t:02d}")
    asked = {row["request"]: row for row in folder.rows("questions.jsonl", request=int, question=str)}
    answered = {row["request"]: row for row in folder.rows("answers.jsonl", request=int, question=str, answer=str)}
    requests = {pair_id(row["question"], row["answer"]): n for n, row in answered.items() if row.get("accepted")}
    reviewed = _reviewed(folder)
    kept = folder.rows("kept.jsonl", id=str, question=str, answer=str) or reader.rows(
        f"pool/{t:03d}.jsonl", id=str, question=str, answer=str)
    for row in kept:
        request = requests.get(row["id"], -1)
        decision = reviewed.get(row["id"])
        verdicts = [*_verdicts("question", asked.get(request)), *_verdicts("answer", answered.get(request))]
        if not verdicts:  # the requests' files are gone: the record has the scores, though not the neighbours
            verdicts = [(name, True, number(table(v).get("score")), None) for name, v in table(row.get("filters")).items()]
        if decision:
            verdicts.append(("review/human", decision["decision"] in ("keep", "edit"), None, None))
        yield {"fold": fold, "iteration": t, "verdict": KEPT if all(v[1] for v in verdicts) else REJECTED, "id": row["id"],
               "request": request, **_texts(row, decision), "asked": texts(row.get("question_exemplars")),
               "answered": texts(row.get("answer_exemplars")), "verdicts": verdicts, "made": _origin(row), "review": decision,
               "became": decision and decision["became"]}
    for row in folder.rows("rejected.jsonl", stage=str, request=int, reason=str):
        request, name = row["request"], f"{row['stage']}/{row['reason']}"
        verdicts = _verdicts("question", asked.get(request))
        if row["stage"] == "answer":
            verdicts += _verdicts("answer", answered.get(request))
        if not verdicts:
            verdicts = [(name, False, number(row.get("score")), row.get("neighbour"))]
        text, question, answer = (row.get(k) if isinstance(row.get(k), str) else "" for k in ("text", "question", "answer"))
        if row["stage"] == "answer":
            answer = answer or text
        else:
            question = question or text
        yield {"fold": fold, "iteration": t, "verdict": REJECTED, "reason": name, "id": "", "request": request, "question": question,
               "answer": answer or None, "asked": texts(table(asked.get(request)).get("exemplars")),
               "answered": texts(table(answered.get(request)).get("exemplars")) if row["stage"] == "answer" else [], "verdicts": verdicts,
               "made": ["", "", "", f"ended by {row.get('finish')}"]}


def _texts(row: Row, decision: Row | None) -> Row:
    """Question and answer as they went on: with the reviewer's edits."""
    if decision and decision["decision"] == "edit":
        return {"question": decision["question"], "answer": decision["answer"]}
    return {"question": row["question"], "answer": row["answer"]}


def _reviewed(folder: Reader) -> dict[str, Row]:
    """The decisions of a human review by the id that a pair had before: decision, comment, and texts before an edit."""
    found = {}
    for row in folder.rows("review.jsonl", id=str, decision=str):
        was, text = table(row.get("was")), lambda value: value if isinstance(value, str) else ""
        found[row["id"]] = {"decision": row["decision"], "became": text(row.get("new_id")),
                            **{name: text(row.get(name)) for name in ("comment", "question", "answer")},
                            "was": [text(was.get("question")), text(was.get("answer"))] if was else None}
    return found


def _verdicts(stage: str, row: Row | None) -> list[tuple[str, bool, float | None, Any]]:
    found = table(row).get("verdicts")
    return [(f"{stage}/{v.get('name')}", bool(v.get("passed")), number(v.get("score")), v.get("neighbour"))
            for v in (found if isinstance(found, list) else []) if isinstance(v, dict)]


def _origin(row: Row) -> list[str]:
    """Author, source, licence and sampling in words."""
    said = []
    for stage, settings in table(row.get("sampling")).items():
        said.append(f"{stage}: " + ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in table(settings).items()))
    return [*(str(row.get(name) or "") for name in ("author", "source", "licence")), "; ".join(said)]


# --------------------------------------------------------------------------------------------------------------------- packing
class _Table:
    """Different values in the order of their first sight."""

    def __init__(self):
        self.values: list[Any] = []
        self._at: dict[Any, int] = {}

    def at(self, value: Any, key: Any = None) -> int:
        key = value if key is None else key
        if key not in self._at:
            self._at[key] = len(self.values)
            self.values.append(value)
        return self._at[key]


def _pack(rows: Sequence[Row], items: Row, longest: int) -> Browser:
    """Rows as columns. An exemplar is a seed or kept pair of its own run; one that is not here (rows were cut) is left out."""
    made, stored, sets, origins, cut = Browser(), _Table(), _Table(), _Table(), 0
    pairs = {(row["fold"], row["id"]): i for i, row in enumerate(rows) if row["id"]}
    pairs |= {(row["fold"], row["became"]): i for i, row in enumerate(rows) if row.get("became")}  # an edited pair has another id since
    requests = {(row["fold"], row["iteration"], row["request"]): i for i, row in enumerate(rows) if row.get("request", -1) >= 0}

    def text(value: str | None) -> int:
        nonlocal cut
        if value is None:
            return -1
        if len(value) > longest:
            cut, value = cut + 1, f"{value[:longest]}… ({len(value) - longest} more characters)"
        return stored.at(value)

    def neighbour(row: Row, value: Any) -> int | str | None:
        if not isinstance(value, str):
            return None
        if value.startswith(REQUEST) and value.removeprefix(REQUEST).isdecimal():
            return requests.get((row["fold"], row["iteration"], int(value.removeprefix(REQUEST))), value)
        if (row["fold"], value) in pairs:
            return pairs[row["fold"], value]
        if value in items:
            return items[value]["question"][:longest]
        return "a held-out seed" if value == "held-out" else value

    for row in rows:
        checks = row.get("verdicts", [])
        names = tuple(("" if passed else "!") + name for name, passed, _, _ in checks)
        near = [[i, found] for i, (_, _, _, value) in enumerate(checks) if (found := neighbour(row, value)) is not None]
        review = row.get("review")
        failed = next((name for name, passed, _, _ in checks if not passed), "")
        values = {
            **{name: row[name] for name in ("fold", "iteration", "verdict", "id")}, "request": row.get("request", -1),
            "reason": (row.get("reason") or failed) if row["verdict"] == REJECTED else "",
            "question": text(row["question"]), "answer": text(row["answer"]),
            **{kind: [pairs[key] for i in row.get(kind, []) if (key := (row["fold"], i)) in pairs] for kind in ("asked", "answered")},
            "checks": sets.at(list(names), names), "scores": _short([score for _, _, score, _ in checks]), "neighbours": near,
            "made": origins.at(row["made"], tuple(row["made"])),
            "review": review and [review["decision"], text(review["comment"]), *(map(text, review["was"]) if review["was"] else (-1, -1))]}
        for name in COLUMNS:
            made.columns[name].append(values[name])
    for name in ("verdict", "reason"):  # few different words, many rows
        words = _Table()
        made.columns[name] = [words.at(value) for value in made.columns[name]]
        made.columns[f"{name}s"] = words.values
    made.texts, made.sets, made.origins = stored.values, sets.values, origins.values
    if cut:
        made.notes.append(f"{cut} text(s) are cut after {longest} characters. They are whole in pool/ and iterations/.")
    return made


def _short(scores: list[float | None]) -> list[float | None]:
    """Three decimals; empty scores at the end are left out."""
    while scores and scores[-1] is None:
        scores.pop()
    return [None if s is None else round(s, 3) for s in scores]
