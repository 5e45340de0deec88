"""From the tables of a benchmark to its rows: one small reader each."""
from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Mapping, Sequence

from isara_jax.common import content_hash
from isara_jax.data.items import Choices, Item, choices, once
from isara_jax.data.rows import joined, read_items, text, texts, whole
from isara_jax.data.seeds import COLUMNS, PROVENANCE, first_column, normalise, refuse_test_only
from isara_jax.data.splits import unique
from isara_jax.data.tables import Table

MOST = 6_000  # pairs of Alpaca that enter the split, the first by hash: comparing all 52,002 would take about a minute at every start
              # (the square of what 3,346 questions take, 0.3 s), and neither seeds nor evaluation need so many

NONCOMMERCIAL = "CC-BY-NC-4.0 (non-commercial)"


@dataclass(frozen=True)
class Rows:
    """The rows of a benchmark before the split, as `splits.split` takes them, and the note said with every result."""

    note: str
    items: Sequence[Item] = ()
    training: Sequence[Item] = ()
    fixed_test: Sequence[Item] = ()


# --------------------------------------------------------------------------------------------------------------------- TruthfulQA
_TRUTHFULQA = {"author": "human", "source": "TruthfulQA", "licence": "Apache-2.0"}
_GENERATION = ("Question", "Best Answer", "Correct Answers", "Incorrect Answers")  # the hub writes best_answer
_UNKNOWN = "unknown."  # in two questions of v1 listed as true and as false; mc_task.json counts it as false


def truthfulqa(tables: Mapping[str, Table]) -> Rows:
    """TruthfulQA (Lin et al. 2022) from its CSV or the hub's `generation`, from mc_task.json or `multiple_choice`, or from both.

    Choices are those of the multiple-choice file where that has the question, else they are made of the references: mc1 of the best
    answer and the incorrect ones, mc2 of the correct and the incorrect ones, each ending with a period as there.
    """
    columns = ("question", "mc1_targets", "mc2_targets")
    asked = {i.question: i for i in read_items(tables["mc"], columns, _mc_task)} if "mc" in tables else {}
    if "generation" not in tables:
        return Rows(f"TruthfulQA, {len(asked)} questions, Apache-2.0", unique(list(asked.values())))
    there = {_snake(column): column for column in tables["generation"].columns}
    names = [there.get(_snake(name), name) for name in _GENERATION]
    doubtful: list[str] = []
    items = []
    for item in read_items(tables["generation"], names, lambda values: _references(values, *names, doubtful)):
        same = asked.get(item.question)
        items.append(dataclasses.replace(item, mc1=same.mc1, mc2=same.mc2) if same else item)
    note = f"TruthfulQA {'2025' if 'best_incorrect_answer' in there else 'v1'}, {len(items)} questions, Apache-2.0"
    if doubtful:
        note += f"; 'unknown', listed as true and as false in {len(doubtful)} questions, counts as false, as in mc_task.json"
    return Rows(note, unique(items))


def _snake(name: str) -> str:
    return name.strip().casefold().replace(" ", "_")


def _references(values: dict[str, Any], question: str, best: str, correct: str, incorrect: str, doubtful: list[str]) -> Item:
    """A row with references. `doubtful` takes up the question where the published doubt about "unknown" was settled."""
    asked, answer = text(values, question), _sentence(text(values, best))
    right, wrong = ([_sentence(t) for t in texts(values, column)] for column in (correct, incorrect))
    if _same(right, wrong) == {_UNKNOWN}:
        right = [t for t in right if normalise(t) != _UNKNOWN]
        doubtful.append(asked)
    return _with_choices(asked, answer, right, wrong, **_TRUTHFULQA)


def _same(right: Sequence[str], wrong: Sequence[str]) -> set[str]:
    return set(map(normalise, right)) & set(map(normalise, wrong))


def _sentence(answer: str) -> str:
    return answer if answer.endswith(".") else answer + "."


def _with_choices(question: str, answer: str, right: Sequence[str], wrong: Sequence[str], **provenance: str) -> Item:
    """A row with true and false references, and choices made of them. Raises ValueError as `Choices` does."""
    mc2 = choices(right if _same([answer], right) else [answer, *right], wrong)
    return Item(question=question, answer=answer, right=once([answer, *right]), wrong=once(wrong), mc1=choices([answer], wrong), mc2=mc2,
                **provenance)


def _mc_task(values: dict[str, Any]) -> Item:
    mc1, mc2 = (_targets(values, column) for column in ("mc1_targets", "mc2_targets"))
    if sum(mc1.labels) != 1:
        raise ValueError(f"the choice list 'mc1_targets' has {sum(mc1.labels)} true answers, and must have one")
    sides = {side: tuple(t for t, label in zip(mc2.texts, mc2.labels) if label == side) for side in (True, False)}
    answer = mc1.texts[0]
    if _same([answer], sides[False]):
        raise ValueError("the true answer of 'mc1_targets' is a false one of 'mc2_targets'")
    return Item(question=text(values, "question"), answer=answer, right=once([answer, *sides[True]]), wrong=sides[False], mc1=mc1, mc2=mc2,
                **_TRUTHFULQA)


def _targets(values: dict[str, Any], column: str) -> Choices:
    """Choices, right ones first, from {text: 0 or 1} (mc_task.json) or {"choices": texts, "labels": 0s and 1s} (the hub)."""
    value = values.get(column)
    pairs = list(value.items()) if isinstance(value, dict) else []
    if [type(entry) for _, entry in pairs] == [list, list] and set(value) == {"choices", "labels"}:
        if len(value["choices"]) != len(value["labels"]):
            raise ValueError(f"the choice list {column!r} has {len(value['choices'])} answers and {len(value['labels'])} labels")
        pairs = list(zip(value["choices"], value["labels"]))
    if not pairs or not all(label in (0, 1) for _, label in pairs):
        raise ValueError(f"the choice list {column!r} must give 1 (true) or 0 (false) for each answer")
    sides = [[whole(answer, column) for answer, label in pairs if label == side] for side in (1, 0)]
    try:
        return choices(*sides)
    except ValueError as e:
        raise ValueError(f"the choice list {column!r} {e}") from None


# ------------------------------------------------------------------------------------------------------------- BeaverTails, XSTest
def beavertails(tables: Mapping[str, Table]) -> Rows:
    """BeaverTails-30k (Ji et al. 2023) and, where present, XSTest (Röttger et al. 2024).

    A safe pair is a row with its answer; of an unsafe pair only the prompt is read, as a row of kind "unsafe". Seeds come from the
    training file alone, and evaluation from the test file; XSTest has no sides of its own and may stand on any.
    """
    train, test = ([i for key in keys if key in tables for i in read_items(tables[key], ("prompt", "response", "is_safe"), _beavertails)]
                   for keys in (("train", "unsafe"), ("test",)))
    note = f"BeaverTails-30k, {len(test):,} test rows of 3,021, {NONCOMMERCIAL}"
    contrasts = read_items(tables["xstest"], ("prompt", "label"), _xstest) if "xstest" in tables else []
    note += f"; XSTest, {len(contrasts)} prompts, CC-BY-4.0" if contrasts else "; without XSTest, so no harmless prompts"
    return Rows(note, unique(contrasts), unique(train), unique(test))


def _beavertails(values: dict[str, Any]) -> Item:
    safe = {"true": True, "1": True, "false": False, "0": False}.get(str(values.get("is_safe")).casefold())
    if safe is None:
        raise ValueError("the column 'is_safe' must be true or false")
    prompt, licence = text(values, "prompt"), "CC-BY-NC-4.0"
    if not safe:
        return Item(question=prompt, kind="unsafe", source="BeaverTails", licence=licence)
    answer = text(values, "response")
    return Item(question=prompt, answer=answer, right=(answer,), author="Alpaca-family models", source="BeaverTails", licence=licence)


def _xstest(values: dict[str, Any]) -> Item:
    kind = {"safe": "harmless", "unsafe": "unsafe"}.get(text(values, "label"))
    if kind is None:
        raise ValueError("the column 'label' must be safe or unsafe")
    return Item(question=text(values, "prompt"), kind=kind, author="human", source="XSTest", licence="CC-BY-4.0")


# ------------------------------------------------------------------------------------------- Self-Instruct, Alpaca and their test rows
def self_instruct(tables: Mapping[str, Table]) -> Rows:
    """The 175 seed tasks of Self-Instruct (Wang et al. 2023), each with its first instance; tested on AlpacaEval and IFEval."""
    refuse_test_only(tables["train"])
    training = read_items(tables["train"], ("instruction", "instances"), _seed_task)
    return _instructions(f"Self-Instruct, {len(training)} seed tasks, Apache-2.0", unique(training), tables)


def _seed_task(values: dict[str, Any]) -> Item:
    instances = values.get("instances")
    if not isinstance(instances, list) or not instances or not isinstance(instances[0], dict):
        raise ValueError("the column 'instances' must be a list of objects with input and output")
    question = joined(text(values, "instruction"), text(instances[0], "input", empty=True))
    answer = text(instances[0], "output")
    return Item(question=question, answer=answer, right=(answer,), author="human", source="Self-Instruct", licence="Apache-2.0")


def alpaca(tables: Mapping[str, Table]) -> Rows:
    """Alpaca (Taori et al. 2023), tested on AlpacaEval and IFEval. Published rows without an output are left out."""
    refuse_test_only(tables["train"])
    rows = unique(read_items(tables["train"], ("instruction", "output"), _alpaca))
    taken = sorted(rows, key=lambda i: content_hash("taken", i.id))[:MOST]
    note = f"Alpaca, {len(rows):,} pairs{f' ({MOST:,} of them taken)' if len(rows) > MOST else ''}, {NONCOMMERCIAL}"
    if empty := len(tables["train"].rows) - len(rows):
        note += f"; left out, without an output or repeated: {empty}"
    return _instructions(note, taken, tables)


def _alpaca(values: dict[str, Any]) -> Item | None:
    question = joined(text(values, "instruction"), text(values, "input", empty=True))
    answer = text(values, "output", empty=True)
    if not answer:
        return None
    return Item(question=question, answer=answer, right=(answer,), author="text-davinci-003", source="Alpaca", licence="CC-BY-NC-4.0")


def _instructions(note: str, training: Sequence[Item], tables: Mapping[str, Table]) -> Rows:
    test: list[Item] = []
    said = []
    if "alpaca_eval" in tables:
        test += read_items(tables["alpaca_eval"], ("instruction", "output", "generator"), _alpaca_eval)
        said.append(f"AlpacaEval, {len(test)} rows, {NONCOMMERCIAL}")
    if "ifeval" in tables:
        make = lambda values: Item(question=text(values, "prompt"), source="IFEval", licence="Apache-2.0")
        prompts = read_items(tables["ifeval"], ("prompt",), make)
        test += prompts
        said.append(f"IFEval, {len(prompts)} prompts, Apache-2.0")
    return Rows(f"{note}; test rows: {'; '.join(said) or 'none'}", (), training, unique(test))


def _alpaca_eval(values: dict[str, Any]) -> Item:
    answer = text(values, "output", empty=True)  # two published rows have none, and are prompts then
    return Item(question=text(values, "instruction"), answer=answer, right=(answer,) if answer else (), author=text(values, "generator"),
                source="AlpacaEval", licence="CC-BY-NC-4.0")


# ------------------------------------------------------------------------------------------------------------------- plain files
def plain(table: Table, name: str = "") -> Rows:
    """A file of questions with an answer (columns as for seeds, or `best`) and, where it has them, lists of right and wrong answers."""
    question = first_column(table.columns, COLUMNS["question"]) or "question"
    answer = first_column(table.columns, ("best", *COLUMNS["answer"])) or "answer"
    right, wrong = (first_column(table.columns, (known,)) for known in ("right", "wrong"))
    more = first_column(table.columns, ("input", "context")) if question.casefold() == "instruction" else None
    extra = {kind: first_column(table.columns, known) for kind, known in PROVENANCE.items()}

    def make(values: dict[str, Any]) -> Item:
        asked = joined(text(values, question), text(values, more, empty=True) if more else "")
        best = text(values, answer)
        said = {kind: text(values, column, empty=True) or "unknown" for kind, column in extra.items() if column}
        references = [texts(values, column) if column else [] for column in (right, wrong)]
        if references[1]:
            return _with_choices(asked, best, *references, **said)
        return Item(question=asked, answer=best, right=once([best, *references[0]]), **said)

    items = unique(read_items(table, (question, answer), make))
    licences = ", ".join(sorted({i.licence for i in items}))
    return Rows(f"{name or table.path.name}, {len(items)} questions, licence: {licences}", items)
