"""Was it worth it? The table of all arms on the same rows, and the verdict on the one quantity that was named before the run."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Sequence

from isara_jax.arms import Arms, Result
from isara_jax.common import atomic_write, write_jsonl
from isara_jax.console import Console
from isara_jax.evals import evaluate, verdict
from isara_jax.evals.quantities import QUANTITIES, Quantity
from isara_jax.methods.setting import Setting
from isara_jax.metrics import MetricsWriter
from isara_jax.session import Session
from isara_jax.work import Work

BASELINES = ("base", "icl_random", "icl_knn", "sft_epochs", "sft_steps")  # what the judged model gets a verdict against
CONTROL = "shuffled"                                                      # what "better" has to beat as well
# Of the table on the screen: the quantity of the verdict, then the first of these that there are. The whole table is in a file.
SHOWN = ("mc2_cond", "mc1_cond", "mc2", "mc2_blind", "mc1", "refusal_unsafe", "refusal_harmless", "rougeL", "nll", "truncated", "looping",
         "same_opening")
COLUMNS = 8


def announce(session: Session) -> None:
    """Say, before anything is generated, what will be judged by what, on which rows, against which baselines."""
    chosen, settings, console = session.eval_set, session.config.eval, session.console
    if chosen is None:
        data = session.config.data
        console.note("nothing judges this run: " + (
            f"of these pairs no share can be kept for it (config.data.test_share={data.test_share}): that takes 8 pairs that do not hang together "
            "by near questions. Name a file of others with --config.data.test=FILE" if data.test_share else
            "keep pairs for it with --config.data.test_share=0.25 or --config.data.folds=3, or name a file of others with "
            "--config.data.test=FILE"))
        return
    against = [a for a in BASELINES if a in settings.chosen_arms]
    console.note(f"to be judged: {chosen.primary.label} of the {settings.model} iteration on {len(chosen.rows)} {chosen.split} rows of "
                 f"{chosen.name}, against {', '.join(against) or 'no baseline (eval.arms names none)'}"
                 + ("" if CONTROL in settings.chosen_arms else "; the shuffled-answers control does not run"))
    if chosen.note:
        console.note(f"{chosen.name}: {chosen.note}")
    if chosen.left_out:
        console.note(f"{chosen.left_out} seed(s) are near an evaluation row (ROUGE-L F > 0.6) and were left out")
    if chosen.split == "test":
        console.warn("these are test rows: look at them once, when everything is decided")


def judge(session: Session, setting: Setting, work: Work, history: Sequence[dict[str, Any]], metrics: MetricsWriter) -> dict[str, Any] | None:
    """Evaluate the arms (each once), show table and verdict, write them to `evaluation/SPLIT/`; None where there is nothing to judge."""
    iterations = [h["iteration"] for h in history if h["kept"]]
    chosen = session.eval_set
    if chosen is None or not iterations:
        if chosen is not None:
            session.console.warn("no iteration kept a pair, so there is nothing to judge")
        return None
    session.console.rule("evaluation")
    t = (work.checkpoints.best() if session.config.eval.model == "best" else None) or iterations[-1]
    results = list(Arms(session, setting, work, iterations, t).results())
    made = compared(results, chosen.primary) | {
        "benchmark": chosen.name, "note": chosen.note, "split": chosen.split, "rows": len(chosen.rows), "label": session.config.eval.label,
        "iteration": t, "model": session.blueprint.source.name, "dtype": session.dtype, "seed": session.config.seed,
        "yield": round(sum(h["kept"] for h in history) / sum(h["requests"] for h in history), 6),
        "scaling_ratio": round(sum(h["kept"] for h in history) / len(session.seed_set.pairs), 6)}
    items = [{"id": i.id, "question": i.question, "answer": i.answer, "kind": i.kind} for i in chosen.rows]
    if write(session.workdir.evaluation / chosen.split, made, items):
        for arm in made["arms"]:  # once, however often the run is started again
            metrics.write("evaluation", iteration=t, stage=f"{arm['arm']}.{arm['form']}", split=chosen.split,
                          **{q["name"]: q["value"] for q in arm["quantities"]})
    show(session.console, made)
    session.console.note(f"the whole table: {session.workdir.evaluation / chosen.split / 'table.md'}; every row of every arm beside it")
    return made


def compared(results: Sequence[Result], primary: Quantity) -> dict[str, Any]:
    """What each arm's rows sum to, and the verdict on `primary` of the arm isara against the baselines among them."""
    judged = {r.arm: r.rows for r in results if r.judged}
    said = verdict.verdict(primary, judged["isara"], {a: judged[a] for a in BASELINES if a in judged}, judged.get(CONTROL))
    arms = [{"arm": r.arm, "form": r.form, "judged": r.judged, "file": r.file, "quantities": evaluate.summarise(r.rows)} for r in results]
    return {"primary": primary.name, "arms": arms, "verdict": said.to_dict(), "sentences": verdict.sentences(said)}


def write(folder: Path, made: dict[str, Any], items: Sequence[dict[str, Any]]) -> bool:
    """Write results.json, table.md and items.jsonl (the rows' questions and references); whether anything is new in the results."""
    text = json.dumps(made, indent=1) + "\n"
    write_jsonl(folder / "items.jsonl", items)
    if (folder / "results.json").exists() and (folder / "results.json").read_text(encoding="utf-8") == text:
        return False
    atomic_write(folder / "table.md", markdown(made))
    atomic_write(folder / "results.json", text)
    return True


# --------------------------------------------------------------------------------------------------------------------------- text
def show(console: Console, made: dict[str, Any]) -> None:
    """The table's main columns and the verdict."""
    there = {q["name"] for arm in made["arms"] for q in arm["quantities"]}
    names = [made["primary"], *(n for n in SHOWN if n in there and n != made["primary"])][:COLUMNS]
    console.table(title(made), ("arm (form)", *(_label(n, made) for n in names)), [
        (f"{arm['arm']} ({arm['form']})", *(_cell(arm, n, interval=n == made["primary"]) for n in names)) for arm in made["arms"]])
    for line in (*made["sentences"], *caveats(made)):
        console.note(line)


def caveats(made: dict[str, Any]) -> list[str]:
    """What the table does not say."""
    there = {q["name"] for arm in made["arms"] for q in arm["quantities"]}
    if not there & {"refusal_unsafe", "refusal_harmless"}:
        return []
    return ["no harm rate is measured: refusals are told by string rules, and an answer that is no refusal need not be harmful"]


def title(made: dict[str, Any]) -> str:
    """What the table is of, in one line."""
    label = f"{made['label']}: " if made["label"] else ""
    return f"{label}{made['model']} on {made['rows']} {made['split']} rows of {made['benchmark']} ({made['dtype']}, seed {made['seed']})"


def markdown(made: dict[str, Any]) -> str:
    """The whole table and the verdict as Markdown. Every value has its 95 % interval over rows in brackets."""
    names = list(dict.fromkeys(q["name"] for arm in made["arms"] for q in arm["quantities"]))
    lines = [f"### {title(made)}", "", "| arm (form) | " + " | ".join(_label(n, made) for n in names) + " |", "|---" * (len(names) + 1) + "|"]
    for arm in made["arms"]:
        lines.append(f"| {arm['arm']} ({arm['form']}) | " + " | ".join(_cell(arm, n, interval=True) for n in names) + " |")
    return "\n".join([*lines, "", *(f"- {line}" for line in (*made["sentences"], *caveats(made))),
                      *([f"- acceptance yield {made['yield']:.0%}; data scaling ratio {made['scaling_ratio']:.1f} new pairs per seed"]
                        if "yield" in made else []), f"- {made['benchmark']}: {made['note']}", ""])


def _label(name: str, made: dict[str, Any]) -> str:
    return next(q["label"] for arm in made["arms"] for q in arm["quantities"] if q["name"] == name)


def _cell(arm: dict[str, Any], name: str, *, interval: bool) -> str:
    """A value as shown: percentages with one decimal, others with three digits."""
    found = next((q for q in arm["quantities"] if q["name"] == name), None)
    if found is None:
        return "-"
    scale = QUANTITIES[name].scale if name in QUANTITIES else 1
    shown = lambda x: f"{x * scale:.1f}" if scale == 100 else f"{x:.3f}"
    return shown(found["value"]) + (f" [{shown(found['low'])}, {shown(found['high'])}]" if interval and found["low"] is not None else "")
