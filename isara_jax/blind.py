"""Two sheets for a person who does not know which is which, and what their decisions say.

    WORKDIR/blind/answers.csv       row, question, answer A, answer B, better?, comment   better? takes A, B or tie
    WORKDIR/blind/pairs.csv         row, question, answer, good?, comment                 good? takes yes or no
    WORKDIR/blind/answers.key.json  what stands where; not to be opened before the sheet is filled in; pairs.key.json likewise
    WORKDIR/blind/results.json      {"answers": …, "pairs": …} of the sheets that have decisions, each with its figures and "sentences"

answers.csv holds held-out questions, answered by the aligned model and by what it is compared with, in a random order that the run's seed
fixes. The reference stands on neither side and not beside them: with it in view a reader compares wordings, which ROUGE does
already. Questions whose two answers are equal count as ties and are not shown.

pairs.csv holds 50 pairs that the filters kept and 25 that they rejected. A question that was rejected has no answer, so it stands there
alone, and as many kept questions stand there without theirs: a missing answer says nothing. Left out are rejections that a reader cannot
judge from the row, being about other texts or none (`BESIDE`): novelty, leak, duplicate, exemplar_copy of questions, parse.

All sheets are as `data.sheets` writes them. A row's decision counts by its number, and its texts must still be those of that row. Nothing
that exists is overwritten. Imports no jax.
"""
from __future__ import annotations

import json
import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Iterable, Sequence

from isara_jax.common import UserError, address, atomic_write, read_jsonl
from isara_jax.data import sheets
from isara_jax.data.pool import Pool
from isara_jax.data.tables import Table, complaint
from isara_jax.evals import winrate

FOLDER, FORMAT = "blind", 1
TUNED = "isara"                     # the arm that is compared
KEPT, REJECTED = 50, 25             # pairs shown of each kind, at most
BESIDE = {"question": {"parse", "novelty", "leak", "duplicate", "exemplar_copy"}, "answer": {"parse", "duplicate"}}
ANSWER_COLUMNS = ("row", "question", "answer A", "answer B", "better?", "comment")
PAIR_COLUMNS = ("row", "question", "answer", "good?", "comment")
NOTE = "Do not open this file before the sheet is filled in: it says which is which."
A, B, TIE = "A", "B", "tie"
_BETTER = {"a": A, "answer a": A, "b": B, "answer b": B} | dict.fromkeys(
    "tie t = == equal same both neither none draw gleich beide égal igual 0".split(), TIE)

Row = dict[str, Any]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Asked:
    """What a command asks for: so many questions of a split, the aligned model against an arm; `seed` is the run's."""

    questions: int
    against: str
    split: str
    seed: int


@dataclass(frozen=True)
class Both:
    """A question and its two answers."""

    id: str
    question: str
    tuned: str
    other: str


@dataclass(frozen=True)
class Answers:
    """Answers of the model of `iteration` and of what it is compared with, and the forms in which the two were asked."""

    iteration: int
    tuned_form: str
    other_form: str
    rows: tuple[Both, ...]


def run(root: Path, asked: Asked, generate: Callable[[], Answers], say: Say) -> None:
    """Write the sheets that are not there, read those that are filled in, say what they show and write `results.json`.

    Args:
        root: the folder of a finished run.
        generate: makes answers for `pick`'s questions, where the run kept none; the base model and the last iteration.
        say: gets lines with counts and paths, no texts.

    Raises `UserError` for a run without answers to compare, a sheet of another comparison, and rows that cannot be understood.
    """
    folder, results = root / FOLDER, {}
    kept = kept_answers(root, asked)
    if kept is None:
        check_generated(root, asked)
    for name, found in (("answers", _answers(folder, asked, kept, generate, root, say)), ("pairs", _pairs(folder, asked.seed, root, say))):
        if found:
            results[name] = found
    if results:
        atomic_write(folder / "results.json", json.dumps(results, indent=1, ensure_ascii=False) + "\n")
        for sentence in (s for found in results.values() for s in found["sentences"]):
            say(sentence)
    say(f"{sheets.FACTS}: a preference is not a proof that an answer is right")


# ----------------------------------------------------------------------------------------------------------------------- questions
def pick(rows: Iterable[Any], asked: Asked) -> list[Any]:
    """The rows (with id and question) that are shown, in their order on the sheet: a random one that the seed fixes. No question twice."""
    first: dict[str, Any] = {}
    for row in sorted(rows, key=lambda row: address("blind", asked.seed, asked.against, row.id)):
        first.setdefault(row.question, row)
    return list(first.values())[:asked.questions]


def kept_answers(root: Path, asked: Asked) -> Answers | None:
    """What the evaluation of the run kept of both arms; None where it kept no answers of one."""
    folder = root / "evaluation" / asked.split
    results, texts = _json(folder / "results.json"), _texts(folder)
    if not {TUNED, asked.against} <= set(texts):
        return None
    tuned, other = texts[TUNED], texts[asked.against]
    rows = tuple(Both(item["id"], item["question"], tuned[item["id"]], other[item["id"]]) for item in _rows(folder / "items.jsonl")
                 if item["id"] in tuned and item["id"] in other)
    form = {arm["arm"]: arm["form"] for arm in results["arms"] if arm["judged"]}
    return Answers(results["iteration"], form[TUNED], form[asked.against], rows) if rows else None


def _texts(folder: Path) -> dict[str, dict[str, str]]:
    """The kept answers of every arm that has any, by the row's id, in the form that verdicts look at."""
    found = {}
    for arm in _json(folder / "results.json").get("arms", []):
        rows = _rows(folder / arm["file"]) if arm["judged"] and "file" in arm else []
        if answers := {row["id"]: row["answer"] for row in rows if "answer" in row}:
            found[arm["arm"]] = answers
    return found


def check_generated(root: Path, asked: Asked) -> None:
    """Raise `UserError` where answers that were not kept cannot be generated either: only the base and the last iteration can."""
    results = _json(root / "evaluation" / asked.split / "results.json")
    if not results and not any(row["kind"] == "stop" for row in _rows(root / "metrics.jsonl")):
        raise UserError(f"{root} is not finished: it has no evaluation to compare answers of. Run its command again, to the end.")
    there = [name for name in _texts(root / "evaluation" / asked.split) if name not in (TUNED, "base")]
    if asked.against != "base":
        raise UserError(f"--against={asked.against}: the run kept no answers of this arm on {asked.split} rows, and only those of base can "
                        f"be made now. Take --against=base{' or one of ' + ', '.join(there) if there else ''}. Answers of an arm are kept "
                        "where config.eval.arms names it and config.eval.answer_rows is not 0.")
    if (root / "folds").is_dir() and not (root / "checkpoints").is_dir():
        raise UserError(f"{root} is a run in folds that kept no answers. Continue it to the end with config.eval.answer_rows above 0, or "
                        f"name one of its folds, for example --model={root / 'folds' / '1'}.")


def _iteration(root: Path) -> int:
    """The last iteration that left a model."""
    done = [_json(path) for path in root.glob("iterations/*/DONE")]
    return max((d["iteration"] for d in done if d.get("kept")), default=0)


# ------------------------------------------------------------------------------------------------------------------------- answers
def _answers(folder: Path, asked: Asked, kept: Answers | None, generate: Callable[[], Answers], root: Path, say: Say) -> Row | None:
    """The answer sheet: written, found waiting (None), or read."""
    path, key = folder / "answers.csv", _key(folder, "answers")
    now = kept.iteration if kept else _iteration(root)
    if key and path.exists():
        _same_comparison(path, key, asked, now)
        return _read_answers(path, key, say)
    answers = kept or generate()
    chosen = pick(answers.rows, asked)
    shown = [b for b in chosen if not sheets.same(b.tuned, b.other)]
    if not shown:
        say(f"all {len(chosen)} questions got equal answers from {TUNED} and {asked.against}: there is nothing to compare, and no sheet")
        return None
    swapped = [address("blind side", asked.seed, asked.against, b.id) % 2 == 1 for b in shown]
    sides = [(b.other, b.tuned) if swap else (b.tuned, b.other) for b, swap in zip(shown, swapped)]
    rows = [{"row": i, "id": b.id, A: asked.against if swap else TUNED, B: TUNED if swap else asked.against,
             "fingerprint": sheets.fingerprint(b.question, *side)} for i, (b, swap, side) in enumerate(zip(shown, swapped, sides), 1)]
    made = {"questions": asked.questions, "against": asked.against, "split": asked.split, "seed": asked.seed,
            "iteration": answers.iteration, "forms": {TUNED: answers.tuned_form, asked.against: answers.other_form},
            "equal": [b.id for b in chosen if b not in shown], "rows": rows}
    _write_key(folder, "answers", made)
    if path.exists():  # only the key was lost
        return _read_answers(path, made, say)
    sheets.write_sheet(path, ANSWER_COLUMNS, [(i, b.question, *side, "", "") for i, (b, side) in enumerate(zip(shown, sides), 1)])
    if len(chosen) < asked.questions:
        say(f"{len(chosen)} questions have answers of both, fewer than the {asked.questions} asked for: all of them are taken")
    if equal := len(chosen) - len(shown):
        say(f"{equal} of {len(chosen)} questions got equal answers: they count as ties and are not shown")
    say(f"{len(shown)} questions with two answers each, {TUNED} and {asked.against} in random order: {path}. Write A, B or tie into "
        "better?, save it as CSV (UTF-8) and run the same command. The key beside it says which is which: do not open it before")
    return None


def _same_comparison(path: Path, key: Row, asked: Asked, iteration: int) -> None:
    """Refuse a sheet of other models or another number of questions; nothing a person may have filled in is written over."""
    told = f"{TUNED} of iteration {key['iteration']} against {key['against']} on {key['questions']} {key['split']} questions"
    if (key["questions"], key["against"], key["split"], key["seed"]) != (asked.questions, asked.against, asked.split, asked.seed):
        raise UserError(f"{path} compares {told}, and this command asks for {asked.against} on {asked.questions} {asked.split} questions. "
                        f"Ask with --blind={key['questions']} --against={key['against']} to go on with it, or move {path.parent} away "
                        "first.")
    if key["iteration"] != iteration:
        raise UserError(f"{path} compares {told}, and the run has gone on to iteration {iteration}. Move {path.parent} away to compare "
                        "that one.")


def _read_answers(path: Path, key: Row, say: Say) -> Row | None:
    decided = _decided(path, key, ("question", "answer A", "answer B"), "better?", _better, "write A, B or tie")
    by_row, total = {row["row"]: row for row in key["rows"]}, len(key["rows"])
    if not decided:
        say(f"{path} waits for you: none of its {total} rows is decided. Write A, B or tie into better?, save it as CSV (UTF-8) and run "
            "the same command")
        return None
    won = [TIE if side == TIE else by_row[number][side] for number, side in decided.items()]
    wins, losses, undecided = won.count(TUNED), won.count(key["against"]), total - len(decided)
    equal = 0 if undecided else len(key["equal"])  # beside a part of the rows they would weigh too much
    found = winrate.win_rate(wins, losses, won.count(TIE) + equal)
    return {"against": key["against"], "iteration": key["iteration"], "split": key["split"], "forms": key["forms"], **found.to_dict(),
            "equal": equal, "undecided": undecided, "sentences": _win_sentences(found, key, equal, undecided)}


def _better(cell: str) -> str | None:
    return _BETTER.get(" ".join(unicodedata.normalize("NFKC", cell).casefold().split()))


def _win_sentences(found: winrate.WinRate, key: Row, equal: int, undecided: int) -> list[str]:
    other, bare, n = key["against"], found.without_ties, found.wins + found.losses
    lines = [f"judged blind, {TUNED} (iteration {key['iteration']}) against {other} on {key['split']} questions: {found.wins} better, "
             f"{found.losses} worse, {found.ties} tied" + (f" ({equal} of them equal answers, not shown)" if equal else "")]
    side = (TUNED if found.wins > found.losses else other) if found.p <= winrate.ALPHA else None
    rate = f"win rate {_percent(found.rate)}, ties counting half"
    if n:
        rate += (f"; without ties {_percent(bare.value)} of {n} (95 % interval {_percent(bare.low)} to {_percent(bare.high)}, exact), sign "
                 f"test p {_p(found.p)}")
    lines.append(f"{rate}: {f'{side} is preferred' if side else 'no preference can be told'}")
    if found.needed is None:
        lines.append(f"{n} decisions without ties can show no preference, whatever they are: at least 6 are needed")
    else:
        lines.append(f"{n} decisions without ties show one from {found.needed} wins or losses on, and a true share of "
                     f"{_percent(found.detectable)} four times in five")
    if undecided:
        later = f"; the {len(key['equal'])} questions with equal answers count as ties when all are" if key["equal"] else ""
        lines.append(f"{_rows_are(undecided)} not decided yet in answers.csv{later}")
    return lines


# --------------------------------------------------------------------------------------------------------------------------- pairs
def _pairs(folder: Path, seed: int, root: Path, say: Say) -> Row | None:
    """The pair sheet: written, found waiting (None), or read."""
    path, key = folder / "pairs.csv", _key(folder, "pairs")
    if not (key and path.exists()):
        chosen = _choose_pairs(root, seed)
        if not any(p["kept"] for p in chosen):
            say("no pair was kept, so there is no sheet of pairs")
            return None
        rows = [{"row": i, **{name: p[name] for name in ("id", "kept", "filter", "alone", "iteration")},
                 "fingerprint": sheets.fingerprint(p["question"], p["answer"])} for i, p in enumerate(chosen, 1)]
        key = {"seed": seed, "rows": rows}
        _write_key(folder, "pairs", key)
        if not path.exists():
            sheets.write_sheet(path, PAIR_COLUMNS, [(i, p["question"], p["answer"], "", "") for i, p in enumerate(chosen, 1)])
            alone = sum(p["alone"] for p in chosen)
            say(f"{len(chosen)} pairs, kept and rejected ones in random order: {path}. Write yes or no into good?"
                + (f"; {alone} stand there without an answer: say whether the question is good" if alone else ""))
            return None
    return _read_pairs(path, key, say)


def _choose_pairs(root: Path, seed: int) -> list[Row]:
    """The rows of the sheet in their order. Rejected ones are taken from every filter in turn."""
    draw = lambda row: address("blind pair", seed, row["id"])
    kept, by_filter = {}, {}
    for run in [root] if (root / "pool").is_dir() else sorted(root.glob("folds/*")):
        pool = Pool(run / "pool")
        for r in pool.snapshot(pool.last()):
            if r.origin == "generated":
                kept.setdefault(r.id, {"id": r.id, "question": r.question, "answer": r.answer, "kept": True, "filter": None, "alone": False,
                                       "iteration": r.iteration})
        for path in sorted(run.glob("iterations/*/rejected.jsonl")):
            for row in _rows(path):
                question, answer, alone = row["question"] or "", row["answer"] or "", row["stage"] == "question"
                if row["reason"] not in BESIDE[row["stage"]] and question.strip() and (alone or answer.strip()):
                    name, place = f"{row['stage']}/{row['reason']}", path.relative_to(root).parent.as_posix()
                    by_filter.setdefault(name, {})[question, answer] = {
                        "id": f"{place}: {row['stage']} {row['request']}", "question": question, "answer": answer, "kept": False,
                        "filter": name, "alone": alone, "iteration": int(path.parent.name)}
    good = sorted(kept.values(), key=draw)
    queues = [sorted(found.values(), key=draw) for _, found in sorted(by_filter.items())]
    turns = [queue[i] for i in range(max(map(len, queues), default=0)) for queue in queues if i < len(queue)]
    bad, most_alone = [], len(good) // 3
    for row in turns:  # a rejected question needs a kept one beside it that is shown without its answer too
        if len(bad) < REJECTED and not (row["alone"] and sum(b["alone"] for b in bad) >= most_alone):
            bad.append(row)
    alone = sum(b["alone"] for b in bad)
    bare = [g | {"answer": "", "alone": True} for g in good[:alone]]
    return sorted([*good[alone:alone + KEPT], *bare, *bad], key=lambda row: address("blind order", seed, row["id"]))


def _read_pairs(path: Path, key: Row, say: Say) -> Row | None:
    decided = _decided(path, key, ("question", "answer"), "good?", sheets.decision, "write yes or no")
    total = len(key["rows"])
    if not decided:
        say(f"{path} waits for you: none of its {total} rows is decided. Write yes or no into good?, save it as CSV (UTF-8) and run the "
            "same command")
        return None
    rows = [row | {"good": decided[row["row"]]} for row in key["rows"] if row["row"] in decided]
    good = lambda alone: [row["good"] for row in rows if row["kept"] and row["alone"] is alone]
    share = lambda said: winrate.share(sum(said), len(said))
    names = sorted({row["filter"] for row in key["rows"] if row["filter"]})
    filters = {name: share([not row["good"] for row in rows if row["filter"] == name]) for name in names}
    pairs, questions = share(good(False)), share(good(True))
    lines = [f"judged blind, of the pairs that were kept {_of(pairs)} are good" if pairs.count else "no kept pair is judged yet"]
    if questions.count:
        lines.append(f"of kept questions shown without their answers {_of(questions)} are good")
    lines += [f"of what the filter {name} rejected {_of(found)} is bad: its precision" for name, found in filters.items() if found.count]
    if undecided := total - len(decided):
        lines.append(f"{_rows_are(undecided)} not decided yet in pairs.csv")
    return {"kept": pairs.to_dict(), "kept_questions": questions.to_dict(), "precision": {name: s.to_dict() for name, s in filters.items()},
            "undecided": undecided, "sentences": lines}


# ------------------------------------------------------------------------------------------------------------------ sheets and keys
def _decided(path: Path, key: Row, texts: Sequence[str], column: str, parse: Callable[[str], Any], how: str) -> dict[int, Any]:
    """The decisions by row number, in the order of the key; rows that are blank or gone are undecided. Raises `UserError` naming rows."""
    table = sheets.read_sheet(path, ("row", *texts, column), optional=("comment",))
    known, found, problems = {row["row"]: row for row in key["rows"]}, {}, {}
    for row in table.rows:
        cell, value = row.values["row"].strip(), row.values[column].strip()
        number = int(cell) if re.fullmatch(r"\d{1,9}", cell) else None
        if number not in known:
            problems[row.number] = f"the column row says {sheets.shown(cell) if cell else 'nothing'}, which is no row of this sheet"
        elif number in found:
            problems[row.number] = f"the row {number} is there twice"
        elif sheets.fingerprint(*(row.values[name] for name in texts)) != known[number]["fingerprint"]:
            problems[row.number] = (f"these are not the texts that row {number} had: a text was changed, or a column was sorted without "
                                    "the others. Restore them from a copy")
        elif value and parse(value) is None:
            problems[row.number] = f"{column} is {sheets.shown(value)}; {how}, or leave it empty"
        found[number] = parse(value) if value else None
    _refuse(table, problems)
    return {number: found[number] for number in known if found.get(number) is not None}


def _refuse(table: Table, problems: dict[int, str]) -> None:
    if problems:
        raise UserError(complaint(table, problems))


def _key(folder: Path, name: str) -> Row:
    """The key of a sheet, {} where there is none."""
    path = folder / f"{name}.key.json"
    key = _json(path)
    if path.exists() and key.get("format") != FORMAT:
        raise UserError(f"{path} is damaged or of another version, so {name}.csv cannot be read. Restore it, or move {folder} away.")
    return key


def _write_key(folder: Path, name: str, content: Row) -> None:
    atomic_write(folder / f"{name}.key.json", json.dumps({"note": NOTE, "format": FORMAT, **content}, indent=1, ensure_ascii=False) + "\n")


def _json(path: Path) -> Row:
    """A JSON object; {} where the file is absent or is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _rows(path: Path) -> list[Row]:
    return read_jsonl(path) if path.exists() else []


# ---------------------------------------------------------------------------------------------------------------------------- text
def _percent(value: float) -> str:
    return f"{value:.0%}".replace("%", " %")


def _of(share: winrate.Share) -> str:
    return f"{_percent(share.value)} ({share.hits} of {share.count}, 95 % interval {_percent(share.low)} to {_percent(share.high)})"


def _p(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _rows_are(n: int) -> str:
    return f"{n} row{' is' if n == 1 else 's are'}"
