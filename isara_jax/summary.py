"""The account of an iteration: what is recorded when it is finished, and what is shown of it and of the whole run."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Sequence

from isara_jax import advice, report
from isara_jax.common import atomic_write, read_jsonl
from isara_jax.console import Console
from isara_jax.data.pool import Pool, Record
from isara_jax.ledger import Ledger
from isara_jax.metrics import MetricsWriter
from isara_jax.session import Session
from isara_jax.stop import Outcome


def finished(folder: Path) -> dict[str, Any] | None:
    """The summary of a finished iteration, from its DONE file."""
    done = folder / "DONE"
    return json.loads(done.read_text(encoding="utf-8")) if done.exists() else None


def finish(folder: Path, summary: dict[str, Any], metrics: MetricsWriter) -> dict[str, Any]:
    """Record the summary of an iteration: from here on it is finished."""
    metrics.write("iteration", **summary)
    atomic_write(folder / "DONE", json.dumps(summary, indent=1) + "\n")
    return summary


def outcome(summary: dict[str, Any]) -> Outcome:
    """The part of a summary that the stop rule looks at."""
    reasons = summary["funnel"]["rejected"]
    most = max(reasons, key=reasons.get, default="")
    return Outcome(summary["iteration"], summary["requests"], summary["kept"], summary["held_out"], most)


def funnel(folder: Path) -> dict[str, Any]:
    """How many requests became questions, answers and pairs, and how many each filter rejected."""
    questions, answers = read_jsonl(folder / "questions.jsonl"), read_jsonl(folder / "answers.jsonl")
    rejected: dict[str, int] = {}
    for row in read_jsonl(folder / "rejected.jsonl"):
        name = f"{row['stage']} {row['reason']}"
        rejected[name] = rejected.get(name, 0) + 1
    pairs = sum(a["accepted"] for a in answers)
    if (folder / "review.jsonl").exists():
        turned_down = sum(row["decision"] in ("reject", "deleted") for row in read_jsonl(folder / "review.jsonl"))
        pairs, rejected = pairs - turned_down, rejected | ({"review human": turned_down} if turned_down else {})
    return {"requests": len(questions), "questions": len(answers), "pairs": pairs, "rejected": rejected}


def tell(session: Session, t: int, before: dict[str, Any], summary: dict[str, Any], ledger: Ledger) -> None:
    """Show an iteration: funnel, some pairs, before and after, losses, cost."""
    console, folder = session.console, session.workdir.iteration(t)
    console.funnel_table(t, summary["funnel"])
    if summary["kept"]:
        new = [r for r in Pool(session.workdir.pool).snapshot(t) if r.iteration == t]
        console.pairs_table([r.to_row() for r in new[:5]])
        console.samples_table(read_jsonl(session.workdir.iteration(0) / "samples.jsonl"), read_jsonl(folder / "samples.jsonl"))
    if summary["held_out"] is not None:
        console.note(f"held-out loss {before['held_out']:.4f} before, {summary['held_out']:.4f} after iteration {t} (nats per answer "
                     f"token, {len(session.held_out)} seeds)")
    if summary["probe"]:
        shown = ", ".join(f"{name} {value:.3f}" for name, value in summary["probe"].items())
        console.note(f"answer probe, the generator on human validation questions in context: {shown}")
    ratio = (summary["pool"] - len(session.train_seeds)) / len(session.seed_set.pairs)
    console.note(f"yield {summary['kept'] / summary['requests']:.0%} ({summary['kept']} of {summary['requests']} requests); "
                 f"scaling ratio {ratio:.1f} new pairs per seed so far")
    console.cost_table(ledger.rows(t))


def conclude(session: Session, before: dict[str, Any], history: Sequence[dict[str, Any]], pool: Sequence[Record], last: int) -> None:
    """The last words: what came out, how it was made, where it lies."""
    console, root = session.console, session.workdir.root
    new = len(pool) - len(session.train_seeds)
    tuned = "was already instruction-tuned (it ships a chat template)" if session.blueprint.tokenizer.chat_template else "is a base model"
    console.rule("done")
    console.note(f"{new} new pairs from {len(session.seed_set.pairs)} seeds in {len(history)} iteration(s); the prompts held "
                 f"{session.template.human_words()} human-written words beside the pairs; the starting model "
                 f"{session.blueprint.source.name} {tuned}")
    losses = [h["held_out"] for h in (before, *history) if h["held_out"] is not None]
    if losses:
        console.note("held-out loss: " + " -> ".join(f"{x:.4f}" for x in losses) + ". It says how closely the references are imitated, not "
                     "whether answers are right")
    console.note("generated answers are not fact-checked: read them before you rely on them")
    console.note(f"page {root / 'report.html'}; pool {root / 'pool'}; pairs and rejections {root / 'iterations'}; parameters "
                 f"{root / 'checkpoints'} (last: iteration {last}); cards {root / 'model_card.md'}, {root / 'dataset_card.md'}")


def next_steps(console: Console, root: Path) -> None:
    """What to do with the outcome, each step with its command."""
    console.rule("what next")
    for step in advice.advise(root):
        console.note(f"- {step.text}" + (f"\n    {step.command}" if step.command else ""))


def page(console: Console, root: Path) -> None:
    """Write report.html anew. A page that fails must not take a run with it."""
    try:
        report.write(root)
    except Exception as e:
        console.warn(f"report.html could not be written ({type(e).__name__}: {e}); the run goes on. Try python -m isara_jax.report "
                     f"--workdir={root} when it is done")
