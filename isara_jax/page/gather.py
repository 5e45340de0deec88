"""A workdir as one plain dict: all that the page shows, in an order that depends on the files alone. Imports no jax."""
from __future__ import annotations

import collections
from pathlib import Path
from typing import Any, Sequence

from isara_jax.common import UserError
from isara_jax.evals import diversity
from isara_jax.page import pairs, sheets, tables, words
from isara_jax.page.read import Reader, Row, count, number, table

FORMAT = 1              # of workdirs; the number in isara_jax.workdir, which would import the whole config
DIVERSE = 200           # questions that diversity is computed on, in each iteration


def gather(root: Path) -> Row:
    """What a run's folder holds.

    Raises `UserError` where it is no run's folder. What is missing or damaged in one is told in the lists "missing" and "problems".
    """
    problems: list[str] = []
    reader = Reader(root, problems)
    stored, runs = _stored(reader), _folds(reader)
    if not stored and runs:
        stored = runs[0][1].table("config.json")
    config, resolved = table(stored.get("config")), table(table(stored.get("identity")).get("resolved"))
    sensitive = not config or any(table(r.table("config.json").get("config")).get("sensitive", True) for _, r in runs or [(0, reader)]
                                  if r.there("config.json"))
    inside = runs or [(0, reader)]
    iterations = {fold: _iterations(r) for fold, r in inside}
    page: Row = {
        "name": root.name, "sensitive": sensitive, "model": str(table(config.get("model")).get("name") or "unknown model"),
        "method": words.method(config, resolved), "config": words.flat(config), "resolved": words.flat(resolved),
        "versions": words.flat(reader.table("versions.json") or inside[0][1].table("versions.json")),
        "commands": list(dict.fromkeys(line for line in reader.text("command.txt").split("\n") if line.strip())),
        "seeds": [_seeds(r, config) for _, r in inside][0] if not runs else _joint_seeds(inside, config),
        "folds": [{"fold": fold, "page": f"folds/{fold}/report.html", "there": r.there("report.html"),
                   "iterations": len(_finished(iterations[fold])), "kept": sum(i["kept"] for i in iterations[fold])} for fold, r in runs],
        "all": "all/report.html" if reader.there("all/config.json") else "",
        "evaluations": reader.guarded("the verdict", lambda: tables.evaluations(reader), []),
        "runs": [{"fold": fold, "iterations": iterations[fold], "costs": reader.guarded("the cost", lambda r=r: tables.costs(r), []),
                  "losses": {i["iteration"]: _losses(r, i["iteration"]) for i in iterations[fold]}} for fold, r in inside],
        "samples": [s for fold, r in inside for s in reader.guarded("answers before and after", lambda r=r, f=fold: _samples(
            r, f, iterations[f]), [])],
        "judged": reader.guarded("held-out answers", lambda: tables.judged(reader), []),
        "blind": reader.guarded("the blind sheets", lambda: sheets.blind(reader), {}),
    }
    items = {row["id"]: row for split in ("dev", "test") for row in reader.inside(f"evaluation/{split}").rows(
        "items.jsonl", id=str, question=str)}
    numbers = [(fold, r, [i["iteration"] for i in iterations[fold] if i["iteration"]]) for fold, r in inside]
    page["pairs"] = reader.guarded("the pairs", lambda: pairs.browser(numbers, items), pairs.Browser())
    for run, (_, r) in zip(page["runs"], inside, strict=True):
        run["diversity"] = reader.guarded("diversity", lambda run=run, r=r: _diversity(r, run["iterations"]), [])
    kept = sum(i["kept"] for run in page["runs"] for i in run["iterations"])
    page["finished"] = all(_stop(r) for _, r in inside) and bool(page["evaluations"] or not _is_judged(config) or not kept)
    page["stopped"] = [s for _, r in inside if (s := _stop(r))]
    page["missing"], page["problems"] = _missing(page, inside, config), list(dict.fromkeys(problems))
    return page


# ---------------------------------------------------------------------------------------------------------------- is it a run
def _stored(reader: Reader) -> Row:
    """The content of config.json, {} where it is damaged and the folder is still plainly a run's."""
    root = reader.root
    if not root.exists():
        raise UserError(f"{root} is not there. --workdir names the folder of a run: the one that was given to isara_jax.train.")
    if not root.is_dir():
        raise UserError(f"{root} is a file. --workdir names the folder of a run: the one that was given to isara_jax.train.")
    try:
        inside = sorted(p.name for p in root.iterdir())
    except OSError as e:
        raise UserError(f"{root} cannot be read: {e.strerror}.") from None
    looks = (root / "pool").is_dir() or (root / "iterations").is_dir() or bool(_folds(reader))
    before = len(reader.problems)
    stored = reader.table("config.json")
    if stored and not isinstance(stored.get("identity"), dict):
        raise UserError(f"{root / 'config.json'} is of another program: {root} is no run's folder. --workdir names the one that was given "
                        "to isara_jax.train.")
    if stored and stored.get("format") != FORMAT:
        raise UserError(f"{root / 'config.json'} has format {stored.get('format')}; this version reads format {FORMAT}. Make the page with "
                        f"the version of isara_jax named in {root / 'versions.json'}.")
    if not stored and not looks:
        if len(reader.problems) > before:
            raise UserError(f"{root / 'config.json'} is damaged and nothing else of a run is in {root}: there is nothing to show.")
        if not inside:
            raise UserError(f"{root} is empty: no run was started in it. Start one with python -m isara_jax.train --config=FILE "
                            f"--workdir={root}")
        runs = [name for name in inside if (root / name / "config.json").is_file() and (root / name / "pool").is_dir()]
        hint = f" It holds the run(s) {', '.join(runs[:5])}: name one of them." if runs else ""
        raise UserError(f"{root} is no run's folder: it holds no config.json, pool/ or iterations/.{hint}")
    if not stored and len(reader.problems) == before and not _folds(reader):
        reader.trouble("config.json", "is missing, so how the run was made is unknown, and its texts are hidden until asked for")
    elif len(reader.problems) > before:
        reader.problems.append("Without a readable config.json it is unknown how the run was made; its texts are hidden until asked for.")
    return stored


def _folds(reader: Reader) -> list[tuple[int, Reader]]:
    """(number, reader) of each fold's own run, in order."""
    folder = reader.root / "folds"
    names = [p.name for p in folder.iterdir() if p.name.isdecimal() and p.is_dir()] if folder.is_dir() else []
    return [(int(name), reader.inside(f"folds/{name}")) for name in sorted(names, key=int)]


def _iterations(reader: Reader) -> list[Row]:
    """Each iteration's summary, from its DONE file where it is finished, else as far as its files go."""
    folder, made = reader.root / "iterations", []
    names = [p.name for p in folder.iterdir() if p.name.isdecimal() and p.is_dir()] if folder.is_dir() else []
    for name in sorted(names, key=int):
        inside = reader.inside(f"iterations/{name}")
        done = inside.table("DONE")
        funnel = table(done.get("funnel"))
        rejected = {str(k): count(v) for k, v in table(funnel.get("rejected")).items()}
        reached = [stage for stage in ("questions", "answers", "kept", "rejected") if inside.there(f"{stage}.done")]
        made.append({
            "iteration": int(name), "done": bool(done), "reached": reached, "requests": count(done.get("requests")),
            "questions": count(funnel.get("questions")), "pairs": count(funnel.get("pairs")), "kept": count(done.get("kept")),
            "pool": count(done.get("pool")), "rejected": sorted(rejected.items(), key=lambda r: (-r[1], r[0])),
            "held_out": number(done.get("held_out")),
            "probe": {str(k): v for k, v in table(done.get("probe")).items() if number(v) is not None}})
    return made


def _finished(iterations: Sequence[Row]) -> list[Row]:
    return [i for i in iterations if i["done"] and i["iteration"]]


def _stop(reader: Reader) -> str:
    """Why the run stopped, "" while it has not."""
    rows = [r for r in reader.rows("metrics.jsonl", kind=str) if r["kind"] in ("stop", "iteration")]
    return str(rows[-1].get("reason") or "") if rows and rows[-1]["kind"] == "stop" else ""


def _missing(page: Row, inside: Sequence[tuple[int, Reader]], config: Row) -> list[str]:
    """What a whole run would have and this one has not yet, one sentence each."""
    said = []
    wanted = count(table(config.get("stop")).get("iterations"))
    for run, (fold, reader) in zip(page["runs"], inside, strict=True):
        where, done = f"Fold {fold}: " if fold else "", _finished(run["iterations"])
        if not reader.there("pool/000-seeds.jsonl"):
            said.append(f"{where}no seeds are in the pool yet.")
        for i in run["iterations"]:
            if not i["done"]:
                what = f"; finished so far: {', '.join(i['reached'])}" if i["reached"] else ""
                said.append(f"{where}iteration {i['iteration']} is unfinished{what}.")
        if reader.there("review.csv"):
            said.append(f"{where}the run waits for a person: read review.csv, edit it and give the same command again.")
        if not _stop(reader):
            said.append(f"{where}the run has not come to its end: {len(done)} of at most {wanted} iteration(s) are finished.")
    if not page["evaluations"]:
        said.append("There is no verdict: no pair was kept, so no model was tuned." if _is_judged(config) and page["finished"] else
                    "There is no verdict yet: the evaluation has not finished." if _is_judged(config) else
                    "There is no verdict: the run was given nothing to judge on (a benchmark, a test file, a share of the pairs, or "
                    "folds).")
    return said


def _is_judged(config: Row) -> bool:
    """Whether the run was given something to judge on."""
    data = table(config.get("data"))
    return bool(table(config.get("eval")).get("benchmark") or any(data.get(name) for name in ("test", "test_share", "folds")))


# ----------------------------------------------------------------------------------------------------------------------- parts
def _seeds(reader: Reader, config: Row) -> Row:
    """Counts and provenance of the seeds."""
    data = table(config.get("data"))
    rows = reader.rows("pool/000-seeds.jsonl", id=str, question=str, answer=str)
    held = reader.rows("held_out.jsonl", question=str, answer=str)
    origin = lambda name: sorted({str(r.get(name) or "unknown") for r in rows + held})
    return {"file": str(data.get("seeds") or "unknown"), "train": len(rows), "held_out": len(held),
            **{name: ", ".join(origin(name)) or "unknown" for name in ("author", "source", "licence")}}


def _joint_seeds(inside: Sequence[tuple[int, Reader]], config: Row) -> Row:
    """Of folds: all different pairs that any of them trains on or holds out."""
    rows = {(r["question"], r["answer"]): r for _, reader in inside for name in ("pool/000-seeds.jsonl", "held_out.jsonl")
            for r in reader.rows(name, question=str, answer=str)}
    origin = lambda name: sorted({str(r.get(name) or "unknown") for r in rows.values()})
    return {"file": str(table(config.get("data")).get("seeds") or "unknown"), "train": len(rows), "held_out": 0,
            **{name: ", ".join(origin(name)) or "unknown" for name in ("author", "source", "licence")}}


def _losses(reader: Reader, t: int) -> list[tuple[int, float]]:
    """(step, loss per token) of an iteration's fine-tuning."""
    made = []
    for row in reader.inside(f"iterations/{t:02d}").rows("loss.jsonl", step=int) if t else []:
        loss, tokens = number(row.get("loss_sum")), number(row.get("tokens"))
        if loss is not None and tokens:
            made.append((row["step"], loss / tokens))
    return made


def _diversity(reader: Reader, iterations: Sequence[Row]) -> list[Row]:
    """How much the new questions of each iteration differ from one another, beside the seeds; of equally many questions each."""
    sets = {0: reader.rows("pool/000-seeds.jsonl", question=str)}
    for i in iterations:
        if i["iteration"]:
            sets[i["iteration"]] = reader.inside(f"iterations/{i['iteration']:02d}").rows("kept.jsonl", question=str)
    sets = {t: [r["question"] for r in rows] for t, rows in sets.items() if len(rows) >= 2}
    most = min([DIVERSE, *map(len, sets.values())])
    if len(sets) < 2:
        return []
    return [{"iteration": t, "questions": most, "distinct_1": diversity.distinct_n(q[:most], 1),
             "distinct_2": diversity.distinct_n(q[:most], 2), "self_bleu": diversity.self_bleu(q[:most])} for t, q in sets.items()]


def _samples(reader: Reader, fold: int, iterations: Sequence[Row]) -> list[Row]:
    """Questions with a reference and the answer of every iteration, 0 being the starting model."""
    by_question: dict[str, Row] = collections.OrderedDict()
    for i in iterations:
        for row in reader.inside(f"iterations/{i['iteration']:02d}").rows("samples.jsonl", question=str, answer=str):
            made = by_question.setdefault(row["question"], {"fold": fold, "question": row["question"],
                                                            "reference": _text(row.get("reference")), "answers": {}})
            made["answers"][i["iteration"]] = row["answer"]
    return [{**s, "answers": list(s["answers"].items())} for s in by_question.values()]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""
