"""The tables of a run: what the evaluation found, what every stage cost, and held-out answers side by side."""
from __future__ import annotations

from pathlib import PurePosixPath
from typing import Any, Sequence

from isara_jax.evals.quantities import QUANTITIES
from isara_jax.page.read import Reader, Row, count, number, table, texts

SPLITS = ("dev", "test")
MOST_ANSWERS = 120      # held-out rows whose answers are on the page
LONGEST = 2000          # characters of such an answer
COSTS = ("seconds", "compile_seconds", "prefilled", "generated", "trained")


# ------------------------------------------------------------------------------------------------------------------ evaluation
def evaluations(reader: Reader) -> list[Row]:
    """What stands in results.json of each split: the table of all arms, the comparisons and the sentences, in shown units."""
    return [_evaluation(split, made) for split in SPLITS if (made := reader.inside(f"evaluation/{split}").table("results.json"))]


def _evaluation(split: str, made: Row) -> Row:
    primary, verdict = str(made.get("primary") or ""), table(made.get("verdict"))
    arms = [a for a in made.get("arms") or [] if isinstance(a, dict)]
    labels = {q["name"]: str(q.get("label") or q["name"]) for arm in arms for q in arm.get("quantities") or []}
    names = [primary] * (primary in labels) + [n for n in labels if n != primary]
    scaled = lambda name, x: None if number(x) is None else x * _scale(name)
    comparisons = [*(c for c in verdict.get("comparisons") or [] if isinstance(c, dict))]
    control = table(verdict.get("control"))
    rows = comparisons + ([{**control, "baseline": "shuffled answers (control)", "said": ""}] if control else [])
    return {
        "split": split, "benchmark": str(made.get("benchmark") or ""), "note": str(made.get("note") or ""), "rows": count(made.get("rows")),
        "model": str(made.get("model") or ""), "dtype": str(made.get("dtype") or ""), "seed": made.get("seed"),
        "iteration": made.get("iteration"), "label": str(made.get("label") or ""), "primary": primary,
        "primary_label": labels.get(primary, str(verdict.get("label") or primary)), "better": count(verdict.get("better")),
        "unit": _unit(primary), "columns": [{"name": n, "label": labels[n], "digits": _digits(n)} for n in names],
        "arms": [{"arm": str(arm.get("arm")), "form": str(arm.get("form")), "judged": bool(arm.get("judged")),
                  "cells": [_cell(arm, name, scaled) for name in names]} for arm in arms],
        "comparisons": [{"baseline": str(c.get("baseline")), "said": str(c.get("said") or ""), "p": number(c.get("p_adjusted", c.get("p"))),
                         "adjusted": "p_adjusted" in c,
                         **{k: scaled(primary, c.get(k)) for k in ("difference", "low", "high", "detectable")}} for c in rows],
        "digits": _digits(primary), "sentences": texts(made.get("sentences")),
    }


def _cell(arm: Row, name: str, scaled: Any) -> Row | None:
    found = next((q for q in arm.get("quantities") or [] if q.get("name") == name), None)
    return found and {k: scaled(name, found.get(k)) for k in ("value", "low", "high")}


def _scale(name: str) -> int:
    return QUANTITIES[name].scale if name in QUANTITIES else 1


def _unit(name: str) -> str:
    return QUANTITIES[name].unit if name in QUANTITIES else ""


def _digits(name: str) -> int:
    return 1 if _scale(name) == 100 or name == "words" else 3


# ------------------------------------------------------------------------------------------------------------------------ cost
def costs(reader: Reader) -> list[Row]:
    """What each stage of each iteration cost, in the order in which they ended; starts of an interrupted stage are summed up."""
    made: dict[tuple[int, str], Row] = {}
    for row in reader.rows("metrics.jsonl", kind=str):
        if row["kind"] == "cost" and isinstance(row.get("stage"), str):
            key = count(row.get("iteration")), row["stage"]
            total = made.setdefault(key, {"iteration": key[0], "stage": key[1], "starts": 0, "peak_gib": 0.0, **dict.fromkeys(COSTS, 0)})
            total["starts"] += 1
            total["peak_gib"] = max(total["peak_gib"], number(row.get("peak_gib")) or 0.0)
            for name in COSTS:
                total[name] += number(row.get(name)) or 0
    return list(made.values())


# --------------------------------------------------------------------------------------------------------------------- answers
def judged(reader: Reader) -> list[Row]:
    """For each split the evaluated questions with a reference and the answers of the arms, {"split", "arms", "rows", "left_out"}.

    Only runs that kept `items.jsonl` and name each arm's file have them. An arm is named with its form where it is in the table twice.
    """
    made = []
    for split in SPLITS:
        folder = reader.inside(f"evaluation/{split}")
        items = folder.rows("items.jsonl", id=str, question=str)
        arms = [a for a in folder.table("results.json").get("arms") or [] if isinstance(a, dict) and isinstance(a.get("file"), str)]
        names = [str(a.get("arm")) for a in arms]
        answers = {}
        for arm, name in zip(arms, names, strict=True):
            rows = folder.rows(PurePosixPath(arm["file"]).name, id=str)  # the name alone: a path would lead elsewhere
            found = {r["id"]: r["answer"] for r in rows if isinstance(r.get("answer"), str)}
            if found:
                answers[name if names.count(name) == 1 else f"{name} ({arm.get('form')})"] = found
        shown = [i for i in items if any(i["id"] in found for found in answers.values())]
        if shown:
            made.append({"split": split, "arms": list(answers), "left_out": max(len(shown) - MOST_ANSWERS, 0),
                         "rows": [_answers(i, list(answers.values())) for i in shown[:MOST_ANSWERS]]})
    return made


def _answers(item: Row, arms: Sequence[dict[str, str]]) -> Row:
    reference = item.get("answer")
    return {"question": _cut(item["question"]), "reference": _cut(reference) if isinstance(reference, str) else "",
            "answers": [_cut(found[item["id"]]) if item["id"] in found else None for found in arms]}


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}… ({len(text) - LONGEST} more characters)"
