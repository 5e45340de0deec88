"""Evaluation rows of one model in one form: multiple choice, likelihood of the reference answers, generated answers; and what they sum to.

    isara_jax.evaluate(lm, "truthfulqa", path="data")                        unused pool rows of a benchmark
    isara_jax.evaluate(lm, [("Why is the sky blue?", "Air scatters short waves more than long ones.")])

Every figure is a sum over rows that are kept, so that anything else can be computed from them later.
"""
from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Mapping, Sequence

import numpy as np

from isara_jax.common import UserError
from isara_jax.data import benchmarks
from isara_jax.data.benchmarks import Choices, Item, choices
from isara_jax.data.prompts import Template, tidy
from isara_jax.data.tokenizer import ByteTokenizer, Tokenizer
from isara_jax.decode.requests import Completion, Request
from isara_jax.evals import diversity, forms, mc, stats
from isara_jax.evals.answers import DIGITS, judge_answer, rouge
from isara_jax.evals.forms import Form, Vectors
from isara_jax.evals.quantities import QUANTITIES

Rows = list[dict[str, Any]]
Progress = Callable[[int, int, int], None]  # (rows done, tokens prefilled, tokens generated), all so far
Scored = tuple[str, str, bool]              # (question, text scored after it, whether the end-of-text token is scored too)

PARTS = ("mc", "nll", "answers")
MEASURES = {"mc1": mc.mc1, "mc2": mc.mc2}
MARGIN = 8  # tokens that a text may have more after its prompt than alone, since the border between the two is tokenized with both


# ------------------------------------------------------------------------------------------------------------------------- measure
def measure(lm: Any, items: Sequence[Item], form: Form, *, parts: Sequence[str] = PARTS, answer_rows: int | None = None, new_tokens: int,
            seed: int = 0, on_progress: Progress | None = None) -> Rows:
    """One row for each item, in order.

    Each has id, group, kind and partner (the id of the row whose question replaced this one's for question-blind scores, or None), and by
    part, as far as the item has what it needs:

        mc        mc1_ll, the summed log-likelihood of each choice; mc1_ll_blind, the same after the partner's prompt; mc1, mc1_blind and
                  mc1_cond as in `evals.mc`; mc1_chance; the same for mc2, without chance
        nll       nll, in nats, of the reference answer and the end-of-text token; nll_tokens, the number of both's tokens
        answers   answer, the greedy text; finish; and what `judge_answer` says of it

    Args:
        lm: has score, run, tokenizer and context as `isara_jax.LM`.
        form: how questions are asked. The partner's prompt is the one that its question gets, pairs included.
        answer_rows: answers are generated for so many of the first items; None for all.
        new_tokens: most tokens of an answer.
        seed: for `lm.run`; greedy text does not depend on it.

    Raises `UserError` where there are no items, and for a question that does not fit the context with what follows it.
    """
    check_lengths(lm.tokenizer, lm.context, items, form, parts, new_tokens)
    rows: Rows = [{"id": i.id, "group": i.group, "kind": i.kind, "partner": None} for i in items]
    asked = list(items if answer_rows is None else items[:answer_rows]) if "answers" in parts else []
    scores, prefilled = _score(lm, form, _wanted(items, parts))
    if on_progress:
        on_progress(0 if asked else len(items), prefilled, 0)
    for i, other in _others(items, parts).items():
        rows[i] |= {"partner": other.id if other else None} | _multiple_choice(items[i], other, scores)
    for row, item in zip(rows, items, strict=True):
        if "nll" in parts and item.answer:
            value, tokens = scores[item.question, item.answer, True]
            row |= {"nll": round(-value, DIGITS), "nll_tokens": tokens}

    def on_answers(done: int, total: int, read: int, generated: int) -> None:
        on_progress(len(items) * done // total, prefilled + read, generated)

    for row, item, made in zip(rows, asked, _answers(lm, form, asked, new_tokens, seed, on_answers if on_progress else None)):
        text = tidy(made.text)
        row |= {"answer": text, "finish": made.finish} | judge_answer(text, made.finish, item)
    return rows


def check_lengths(tokenizer: Tokenizer | ByteTokenizer, context: int, items: Sequence[Item], form: Form, parts: Sequence[str],
                  new_tokens: int) -> None:
    """Raise `UserError` where there are no items, or a question does not fit the context with what is scored or generated after it.

    Cheap enough to be asked before anything is trained. The form's pairs do not matter: they are left out where room is short.
    """
    if not items:
        raise UserError("there is nothing to evaluate on: the set of rows is empty. Name another file or split.")
    after = _longest(tokenizer, form, _wanted(items, parts))
    for item in items:
        size = max(after.get(item.question, 0), new_tokens if "answers" in parts else 0)
        room = min(form.room, context - size)
        prompt = len(tokenizer.encode_segments(form.template.answer_segments((), item.question)))
        if prompt > room:
            raise UserError(f"{item.file}, row {item.row}: the question has {prompt} tokens, and of a context of {context} tokens {room} "
                            "are left for it beside what is scored or generated after it. Leave the row out, lower the number of new "
                            "tokens, or take a model with a longer context.")


def _others(items: Sequence[Item], parts: Sequence[str]) -> dict[int, Item | None]:
    """The number of each item with choices, and the item whose question is asked in place of its own."""
    having = [i for i, item in enumerate(items) if "mc" in parts and (item.mc1 or item.mc2)]
    partners = mc.partners([items[i] for i in having])
    return {i: None if partner is None else items[having[partner]] for i, partner in zip(having, partners, strict=True)}


def _wanted(items: Sequence[Item], parts: Sequence[str]) -> list[Scored]:
    """All that is to be scored, once: choices after their own question and after the other one, answers with their end."""
    found: dict[Scored, None] = {}
    for i, other in _others(items, parts).items():
        texts = [text for choice in _choices(items[i]).values() for text in choice.texts]
        found |= {(asked.question, text, False): None for asked in (items[i], other) if asked for text in texts}
    return list(found | {(item.question, item.answer, True): None for item in items if "nll" in parts and item.answer})


def _choices(item: Item) -> dict[str, Choices]:
    return {name: found for name in MEASURES if (found := getattr(item, name))}


def _multiple_choice(item: Item, other: Item | None, scores: Mapping[Scored, tuple[float, int]]) -> dict[str, Any]:
    """The figures of a row, from the log-likelihoods as the row keeps them: rounded."""
    made: dict[str, Any] = {}
    for name, found in _choices(item).items():
        after = lambda asked: [round(scores[asked.question, text, False][0], DIGITS) for text in found.texts]
        figure = lambda lls: round(MEASURES[name](lls, found.labels), DIGITS)
        own = after(item)
        made |= {f"{name}_ll": own, name: figure(own)}
        if other:
            blind = after(other)
            made |= {f"{name}_ll_blind": blind, f"{name}_blind": figure(blind), f"{name}_cond": figure(mc.conditioned(own, blind))}
    return made | ({"mc1_chance": round(mc.chance(item.mc1.labels), DIGITS)} if item.mc1 else {})


def _score(lm: Any, form: Form, wanted: Sequence[Scored]) -> tuple[dict[Scored, tuple[float, int]], int]:
    """(log-likelihood and number of tokens of each text after its question, tokens of all prompts and texts)."""
    if not wanted:
        return {}, 0
    tokenizer, after = lm.tokenizer, _longest(lm.tokenizer, form, wanted)
    prompts = dict(zip(after, form.segments(tokenizer, list(after), [lm.context - size for size in after.values()]), strict=True))
    end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    pairs = [form.pair(tokenizer, prompts[question], text) for question, text, _ in wanted]
    pairs = [(prompt, text + end if ends else text) for (prompt, text), (_, _, ends) in zip(pairs, wanted, strict=True)]
    values = lm.score([prompt for prompt, _ in pairs], [text for _, text in pairs])
    read = {question: len(prompt) for (question, _, _), (prompt, _) in zip(wanted, pairs, strict=True)}  # once for all that follows it
    scores = {key: (value, len(text)) for key, value, (_, text) in zip(wanted, values, pairs, strict=True)}
    return scores, sum(read.values()) + sum(len(text) for _, text in pairs)


def _longest(tokenizer: Tokenizer | ByteTokenizer, form: Form, wanted: Sequence[Scored]) -> dict[str, int]:
    """The room in tokens that the longest text after each question needs, its end included."""
    found: dict[str, int] = {}
    for question, text, _ in wanted:
        found[question] = max(found.get(question, 0), len(tokenizer.encode(form.template.continuation(text))) + MARGIN)
    return found


def _answers(lm: Any, form: Form, items: Sequence[Item], new_tokens: int, seed: int,
             on_progress: Callable[[int, int, int, int], None] | None = None) -> list[Completion]:
    """The greedy completion of each item's prompt; rows of one question share one."""
    if not items:
        return []
    questions = list(dict.fromkeys(item.question for item in items))
    stops = form.template.stops("answer")
    requests = [Request(prompt, 0, new_tokens, 0.0, 1.0, stops) for prompt in form.prompts(lm.tokenizer, questions)]
    made = dict(zip(questions, lm.run(requests, seed=seed, on_progress=on_progress), strict=True))
    return [made[item.question] for item in items]


# ------------------------------------------------------------------------------------------------------------------------- summary
def summarise(rows: Rows) -> list[dict[str, Any]]:
    """Every quantity that the rows have: name, label, value, low and high (95 % interval over rows), rows (how many have it).

    Of the answers as a set also distinct_1, distinct_2, self_bleu and same_opening, which have no interval. low and high are None where
    there is none, also for a single group of rows.
    """
    made = []
    for quantity in QUANTITIES.values():
        if found := [(parts, row["group"]) for row in rows if (parts := quantity.parts(row))]:
            num, den = ([parts[side] for parts, _ in found] for side in (0, 1))
            low, high = stats.bootstrap(num, den, [group for _, group in found])
            made.append(_line(quantity.name, quantity.label, sum(num) / sum(den), len(found), low, high))
    texts = [row["answer"] for row in rows if "answer" in row]
    if texts:
        made += [_line(f"distinct_{n}", f"distinct-{n}", diversity.distinct_n(texts, n), len(texts)) for n in (1, 2)]
        if len(texts) > 1:
            made.append(_line("self_bleu", "self-BLEU", diversity.self_bleu(texts), len(texts)))
        made.append(_line("same_opening", "same opening", diversity.same_opening(texts), len(texts)))
    return made


def _line(name: str, label: str, value: float, rows: int, low: float | None = None, high: float | None = None) -> dict[str, Any]:
    value, low, high = (None if x is None else round(float(x), DIGITS) for x in (value, low, high))
    return {"name": name, "label": label, "value": value, "low": low, "high": high, "rows": rows}


# --------------------------------------------------------------------------------------------------------------------------- probe
def probe(lm: Any, form: Form, items: Sequence[Item], vectors: Vectors, new_tokens: int) -> Rows:
    """The answer probe: what a generator makes of human questions in context, beside their references.

    Args:
        form: an `icl` form: as the generator answers its own questions.
        items: rows with right references; wrong ones where there are any.
        vectors: embeds answers and references.

    Returns:
        rows of id, answer, finish, and of ROUGE-L F and of the cosine the largest over the right references (rougeL, cosine), over the
        wrong ones (rougeL_wrong, cosine_wrong) and their differences (rougeL_diff, cosine_diff); the last four where there are wrong ones.
    """
    answers = _answers(lm, form, items, new_tokens, seed=0)
    texts = [tidy(made.text) for made in answers]
    known = list(dict.fromkeys([*texts, *(reference for item in items for reference in (*item.right, *item.wrong))]))
    vector = dict(zip(known, vectors.vectors(known).astype(np.float64), strict=True))  # in one call: a store keeps a file for each
    rows = []
    for item, made, text in zip(items, answers, texts, strict=True):
        row: dict[str, Any] = {"id": item.id, "answer": text, "finish": made.finish} | _likeness(text, item.right, vector)
        if item.wrong:
            wrong = _likeness(text, item.wrong, vector)
            row |= {f"{name}_wrong": value for name, value in wrong.items()}
            row |= {f"{name}_diff": round(row[name] - value, DIGITS) for name, value in wrong.items()}
        rows.append(row)
    return rows


def _likeness(text: str, references: Sequence[str], vector: Mapping[str, np.ndarray]) -> dict[str, float]:
    cosine = max(float(vector[text] @ vector[reference]) for reference in references)
    return {"rougeL": rouge(text, references)["rougeL"], "cosine": round(cosine, DIGITS)}


def probe_summary(rows: Rows) -> dict[str, float]:
    """Means over the rows of `probe` that have them, and right: the share of answers whose cosine to the right references is the larger."""
    means = {name: np.mean(values) for name in ("rougeL", "rougeL_diff", "cosine", "cosine_diff")
             if (values := [row[name] for row in rows if name in row])}
    if differences := [row["cosine_diff"] for row in rows if "cosine_diff" in row]:
        means["right"] = np.mean([d > 0 for d in differences])
    return {name: round(float(value), DIGITS) for name, value in means.items()}


# -------------------------------------------------------------------------------------------------------------------------- public
@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found: one row an item (`measure`) and the figures they sum to (`summarise`)."""

    rows: Rows
    summary: list[dict[str, Any]]


def evaluate(lm: Any, rows: str | Path | Sequence[Any], *, form: str = "plain", parts: Sequence[str] = PARTS, new_tokens: int = 64,
             answer_rows: int | None = None, split: str = "dev", path: str = "", seed: int = 0) -> Evaluation:
    """Evaluate a model on a benchmark or on rows of one's own.

    Args:
        lm: an `isara_jax.LM`.
        rows: the name of a benchmark or of a file (`data.benchmarks.open_benchmark`), or a list of `Item`s, of (question, answer) tuples or
            of dicts with question and answer, and for multiple choice right and wrong: lists of references.
        form: "plain", "chat" (the model's own template) or "primer" (TruthfulQA's six published pairs before each question).
        parts: which of "mc", "nll" and "answers" are measured.
        new_tokens: most tokens of an answer.
        answer_rows: answers are generated for so many of the first rows; None for all.
        split: of a benchmark or file: "dev" (its pool; about 4/5 of a file), "validation" or "test".
        path: folder with the benchmark's files; "" takes them from the hub.
        seed: for `lm.run`; greedy text does not depend on it.

    Raises `UserError` for a name, form or row that cannot be used, and for an empty set.
    """
    if unknown := [part for part in parts if part not in PARTS]:
        raise UserError(f"evaluate got parts={list(parts)}; {unknown[0]!r} is none of {', '.join(PARTS)}.")
    if not 0 < new_tokens < lm.context:
        raise UserError(f"evaluate got new_tokens={new_tokens}: an answer has at least one token and fewer than the context, {lm.context}.")
    items = _named(rows, split, path) if isinstance(rows, (str, Path)) else [_item(i, row) for i, row in enumerate(rows)]
    asked = _form(lm, form, lm.context - new_tokens)
    made = measure(lm, items, asked, parts=parts, answer_rows=answer_rows, new_tokens=new_tokens, seed=seed)
    return Evaluation(made, summarise(made))


def _named(name: str | Path, split: str, path: str) -> tuple[Item, ...]:
    side = {"dev": "pool", "validation": "validation", "test": "test"}.get(split)
    if side is None:
        raise UserError(f"evaluate got split={split!r}; there are dev, validation and test.")
    items = getattr(benchmarks.open_benchmark(str(name), path), side)
    if not items:
        raise UserError(f"{name} has no rows in its {split} split. Take another split, or a larger file.")
    return items


def _item(number: int, row: Any) -> Item:
    """A row given in Python. Its place is its number in the list, from 0."""
    if isinstance(row, Item):
        return row
    values = {"question": row[0], "answer": row[1]} if isinstance(row, (tuple, list)) and len(row) == 2 else row
    if not isinstance(values, Mapping) or not isinstance(values.get("question"), str) or not values["question"].strip():
        raise UserError(f"evaluate, row {number}: this {type(row).__name__} is no row. Give (question, answer) or a dict with a question "
                        "that is not empty.")
    sides = {name: values.get(name, ()) for name in ("right", "wrong")}
    answer = values.get("answer") or next(iter(sides["right"]), "")
    texts = (answer, *sides["right"], *sides["wrong"])
    if any(isinstance(side, str) for side in sides.values()) or not all(isinstance(text, str) for text in texts):
        raise UserError(f"evaluate, row {number}: answer is a text, right and wrong are lists of texts.")
    right, wrong = tuple(dict.fromkeys((answer, *sides["right"]) if answer else ())), tuple(sides["wrong"])
    item = Item(question=values["question"], answer=answer, right=right, wrong=wrong, file="rows", row=number)
    if not right or not wrong:
        return item
    try:
        return dataclasses.replace(item, mc1=choices(right[:1], wrong), mc2=choices(right, wrong))
    except ValueError as e:
        raise UserError(f"evaluate, row {number}: {e}. Mend right and wrong.") from None


def _form(lm: Any, name: str, room: int) -> Form:
    if name == "primer":
        return forms.primer(room)
    if name == "plain":
        return forms.bare(Template("plain"), room)
    if name != "chat":
        raise UserError(f"evaluate got form={name!r}; there are plain, chat and primer.")
    if lm.tokenizer.chat_template is None:
        raise UserError("evaluate got form='chat', but this model ships no chat template. Take form='plain'.")
    return forms.bare(Template("chat", render_chat=lm.tokenizer.render_chat), room)
