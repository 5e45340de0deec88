"""The ISARA loop and its command line.

    python -m isara_jax.train --config=configs/quickstart.py --workdir=runs/quickstart
    python -m isara_jax.train --config=configs/quickstart.py --workdir=runs/quickstart --dry_run

The same command continues an interrupted run at its first unfinished stage.
"""
from __future__ import annotations

import dataclasses
import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Sequence

from isara_jax import cards, cli, lm as lm_lib, preflight, preview
from isara_jax.checkpoint import Checkpoints
from isara_jax.common import atomic_write, read_jsonl, release_memory, write_jsonl
from isara_jax.config import Config, from_dict
from isara_jax.console import Console
from isara_jax.data import seeds as seeds_lib
from isara_jax.data.pool import Record
from isara_jax.decode.generate import Completion, Request
from isara_jax.ledger import Ledger
from isara_jax.metrics import MetricsWriter
from isara_jax.models import decoder
from isara_jax.session import Session, open_session, report_seeds, start_pool
from isara_jax.sft import loop as sft_loop
from isara_jax.sharding import make_mesh
from isara_jax.stop import Outcome, StopRule
from isara_jax.workdir import Workdir

SAMPLES = 4  # held-out (or seed) questions that the model answers before and after each iteration, for people to read


@dataclass(frozen=True)
class Run:
    """What an alignment run leaves: the tuned model, the pool, one summary for each iteration, and the folder with everything."""

    lm: lm_lib.LM
    pool: list[Record]
    metrics: list[dict[str, Any]]
    workdir: Path


def align(lm: lm_lib.LM, seeds: str | Path | Sequence[Any], config: Config | dict[str, Any] | None, workdir: str | Path) -> Run:
    """Align `lm` to the domain of `seeds` with ISARA; continue when `workdir` holds an unfinished run of the same config.

    Args:
        lm: the starting model; it is not changed.
        seeds: a file, the name of a built-in set, or question-answer pairs ((question, answer), or dicts with these keys).
        config: a `Config`, or a (partial) nested mapping of its fields; `config.model` is what `lm` is. None takes the defaults.
        workdir: the folder of the run.

    Returns a `Run` with the model of the last iteration.
    Raises `UserError` for seeds, configs and folders that cannot be used.
    """
    config = config if isinstance(config, Config) else from_dict({} if config is None else config)
    folder = Workdir(workdir)
    preflight.writable(folder.root)
    if isinstance(seeds, (str, Path)):
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, seeds=str(seeds)))
        seed_set = seeds_lib.load_seeds(config.data)
    else:
        seed_set = seeds_lib.from_pairs(seeds, config.data)
    with Console(None, sensitive=config.sensitive) as console:
        session = open_session(lm.blueprint, seed_set, config, folder, console, lm.dtype, lm.mesh)
        start(session)
        return run(session, lm)


def start(session: Session) -> None:
    """Open the folder (a changed identity is refused here) and say what is about to run."""
    for warning in session.workdir.open(session.config, session.resolved):
        session.console.warn(warning)
    session.console.log_to(session.workdir.root / "log.txt")
    report_seeds(session)
    start_pool(session)


# ------------------------------------------------------------------------------------------------------------------- the loop
def run(session: Session, lm: lm_lib.LM) -> Run:
    """Iterate until the stop rule has a reason: generate and filter new pairs, grow the pool, fine-tune, measure."""
    config, console, workdir, method = session.config, session.console, session.workdir, session.method
    lm = lm.with_engine(slots=config.generate.slots, chunk=config.generate.prefill_chunk, key_block=config.generate.key_block)
    rule = StopRule.of(config.stop)
    checkpoints = Checkpoints(workdir.checkpoints, keep=config.keep)
    with MetricsWriter(workdir.root) as metrics:
        ledger = Ledger(metrics)
        setting = session.setting(ledger.stage)
        current = Current(lm, checkpoints)

        before = finished(workdir.iteration(0)) or finish(workdir.iteration(0), measure(session, ledger, current.lm(0), 0), metrics)
        history: list[dict[str, Any]] = []
        for t in itertools.count(1):
            if reason := rule.reason(before["held_out"], [outcome(h) for h in history]):
                break
            if summary := finished(workdir.iteration(t)):
                console.note(f"iteration {t} is finished: {summary['kept']} pairs kept of {summary['requests']} requests")
            else:
                summary = finish(workdir.iteration(t), iterate(session, setting, method, ledger, current, checkpoints, t), metrics)
                tell(session, t, before, summary, ledger)
            history.append(summary)
        metrics.write("stop", iteration=t - 1, reason=reason)
        console.note(f"stopped: {reason}")
        last = max((h["iteration"] for h in history if h["kept"]), default=0)
        tuned = current.lm(last)
        pool = setting.pool.snapshot(setting.pool.last())
        cards.write(session, pool, before, history, reason)
        conclude(session, before, history, pool, last)
        return Run(tuned, pool, [before, *history], workdir.root)


def iterate(session: Session, setting: Any, method: Any, ledger: Ledger, current: Current, checkpoints: Checkpoints, t: int) -> dict[str, Any]:
    """One iteration: new pairs into the pool, a fine-tuned model into the checkpoints, and its summary."""
    config, console = session.config, session.console
    console.rule(f"iteration {t} of at most {config.stop.iterations}")

    def sample(name: str, requests: Sequence[Request]) -> list[Completion]:
        return generate(console, ledger, current.lm(t - 1), name, requests, seed=config.seed, iteration=t)

    new = method.expand(setting, t, sample)
    setting.pool.append(t, new)
    summary = {"iteration": t, "requests": config.generate.requests, "kept": len(new), "funnel": funnel(session.workdir.iteration(t)),
               "pool": len(setting.pool.snapshot(t)), "held_out": None}
    if not new:
        return summary
    if t not in checkpoints.iterations():
        start_from = 0 if config.sft.init == "base" else t - 1
        current.keep_only(start_from)  # the generator's weights make room for training
        fit(session, ledger, current, checkpoints, method.training_pairs(setting, t), start_from, t)
    summary |= measure(session, ledger, current.lm(t), t)
    checkpoints.measured(t, summary["held_out"])
    return summary


def fit(session: Session, ledger: Ledger, current: Current, checkpoints: Checkpoints, pairs: Sequence[Record], start_from: int, t: int) -> None:
    """Fine-tune, write the loss curve, save the parameters."""
    config, console = session.config, session.console
    examples = [session.example(r.question, r.answer) for r in pairs]
    lm = current.lm(start_from)
    with ledger.stage("fine-tuning", t) as cost, console.progress("fine-tuning", sft_loop.steps(len(examples), config.sft)) as progress:

        def on_step(step: int, loss: float, tokens: int) -> None:
            cost.add(trained=tokens)
            progress.update(step, loss=f"{loss:.3f}")

        fitted = sft_loop.fit(lm.params, lm.cfg, examples, config.sft, mesh=lm.mesh, dtype=lm.dtype, seed=config.seed, context=lm.context,
                              checkpoints=checkpoints, iteration=t, on_step=on_step)
    write_jsonl(session.workdir.iteration(t) / "loss.jsonl", [{"step": i, "loss_sum": s, "tokens": n} for i, (s, n) in enumerate(fitted.losses, 1)])
    with ledger.stage("checkpoint", t):
        checkpoints.save(t, fitted.params)
    current.put(t, fitted.params)


def measure(session: Session, ledger: Ledger, lm: lm_lib.LM, t: int) -> dict[str, Any]:
    """Held-out loss of the model of iteration t (0: the starting model), and its answers to a few questions."""
    found = {"iteration": t, "held_out": None}
    if session.held_out:
        examples = [session.example(s.question, s.answer) for s in session.held_out]
        with ledger.stage("held-out loss", t):
            total, count = sft_loop.held_out(lm.params, lm.cfg, examples, mesh=lm.mesh, dtype=lm.dtype, context=lm.context, batch=session.config.sft.batch)
        found["held_out"] = round(total / count, 6)
    asked = [(s.question, s.answer) for s in session.held_out or session.seed_set.pairs][:SAMPLES]
    segments = [session.template.training_segments(q) for q, _ in asked]
    requests = [Request(tuple(lm.tokenizer.encode_segments(s)), 0, session.limits.answer, 0.0, 1.0, session.template.stops("answer")) for s in segments]
    answers = generate(session.console, ledger, lm, "samples", requests, seed=session.config.seed, iteration=t)
    write_jsonl(session.workdir.iteration(t) / "samples.jsonl", [
        {"question": q, "reference": a, "answer": c.text.strip(), "finish": c.finish} for (q, a), c in zip(asked, answers, strict=True)])
    return found


def generate(console: Console, ledger: Ledger, lm: lm_lib.LM, name: str, requests: Sequence[Request], *, seed: int, iteration: int) -> list[Completion]:
    """Run requests with a progress line and their cost on the ledger."""
    with ledger.stage(name, iteration) as cost, console.progress(name, len(requests)) as progress:

        def on_progress(done: int, total: int, prefilled: int, generated: int) -> None:
            cost.set(prefilled=prefilled, generated=generated)
            progress.update(done, tokens=prefilled + generated)

        return lm.run(requests, seed=seed, on_progress=on_progress)


class Current:
    """The parameters of one iteration at a time, beside those of the starting model; others come from their checkpoint."""

    def __init__(self, lm: lm_lib.LM, checkpoints: Checkpoints):
        self._base, self._checkpoints = lm, checkpoints
        self._held: tuple[int, decoder.Params] | None = None

    def lm(self, t: int) -> lm_lib.LM:
        """The model after iteration t; 0 is the starting model."""
        if t == 0:
            return self._base
        if self._held is None or self._held[0] != t:
            self._held = None  # free before loading
            self._held = t, self._checkpoints.restore(t, self._base.abstract_params())
        return self._base.with_params(self._held[1])

    def put(self, t: int, params: decoder.Params) -> None:
        self._held = t, params

    def keep_only(self, t: int) -> None:
        """Free what is held unless it is iteration t, and what sampling left behind."""
        if self._held is not None and self._held[0] != t:
            self._held = None
        release_memory()


# ------------------------------------------------------------------------------------------------------------------- accounts
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
    reasons = summary["funnel"]["rejected"]
    return Outcome(summary["iteration"], summary["requests"], summary["kept"], summary["held_out"], max(reasons, key=reasons.get, default=""))


def funnel(folder: Path) -> dict[str, Any]:
    """How many requests became questions, answers and pairs, and how many each filter rejected."""
    questions, answers = read_jsonl(folder / "questions.jsonl"), read_jsonl(folder / "answers.jsonl")
    rejected: dict[str, int] = {}
    for row in read_jsonl(folder / "rejected.jsonl"):
        name = f"{row['stage']} {row['reason']}"
        rejected[name] = rejected.get(name, 0) + 1
    return {"requests": len(questions), "questions": len(answers), "pairs": sum(a["accepted"] for a in answers), "rejected": rejected}


def tell(session: Session, t: int, before: dict[str, Any], summary: dict[str, Any], ledger: Ledger) -> None:
    """Show an iteration: funnel, some pairs, before and after, losses, cost."""
    console, folder = session.console, session.workdir.iteration(t)
    console.funnel_table(t, summary["funnel"])
    if summary["kept"]:
        console.pairs_table(read_jsonl(folder / "kept.jsonl")[:5])
        console.samples_table(read_jsonl(session.workdir.iteration(0) / "samples.jsonl"), read_jsonl(folder / "samples.jsonl"))
    if summary["held_out"] is not None:
        console.note(f"held-out loss {before['held_out']:.4f} before, {summary['held_out']:.4f} after iteration {t} (nats per answer token, "
                     f"{len(session.held_out)} seeds)")
    console.note(f"yield {summary['kept'] / summary['requests']:.0%} ({summary['kept']} of {summary['requests']} requests); "
                 f"scaling ratio {(summary['pool'] - len(session.train_seeds)) / len(session.seed_set.pairs):.1f} new pairs per seed so far")
    console.cost_table(ledger.rows(t))


def conclude(session: Session, before: dict[str, Any], history: Sequence[dict[str, Any]], pool: Sequence[Record], last: int) -> None:
    """The last words: what came out, how it was made, where it lies."""
    console, root = session.console, session.workdir.root
    new = len(pool) - len(session.train_seeds)
    tuned = "was already instruction-tuned (it ships a chat template)" if session.blueprint.tokenizer.chat_template else "is a base model"
    console.rule("done")
    console.note(f"{new} new pairs from {len(session.seed_set.pairs)} seeds in {len(history)} iteration(s); the prompts held "
                 f"{session.template.human_words()} human-written words beside the pairs; the starting model {session.blueprint.source.name} {tuned}")
    losses = [h["held_out"] for h in (before, *history) if h["held_out"] is not None]
    if losses:
        console.note("held-out loss: " + " -> ".join(f"{x:.4f}" for x in losses) + ". It says how closely the references are imitated, not "
                     "whether answers are right")
    console.note("generated answers are not fact-checked: read kept.jsonl before you rely on them")
    console.note(f"pool {root / 'pool'}; pairs and rejections {root / 'iterations'}; parameters {root / 'checkpoints'} (last: iteration {last}); "
                 f"cards {root / 'model_card.md'}, {root / 'dataset_card.md'}")


# --------------------------------------------------------------------------------------------------------------- command line
def main(argv: Sequence[str] | None = None) -> None:
    """`python -m isara_jax.train --config=FILE --workdir=DIR [--config.section.field=VALUE …] [--dry_run]`"""
    cli.main(_train, argv)


def _train(args: cli.Args) -> None:
    config, workdir = args.config, Workdir(args.workdir)
    seed_set, stored = seeds_lib.load_seeds(config.data), workdir.stored()
    preflight.compilation_cache()
    with Console(None, sensitive=config.sensitive) as console:
        mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
        asked = stored["identity"]["resolved"]["dtype"] if stored and config.model.dtype == "auto" else config.model.dtype
        dtype, why = preflight.choose_dtype(asked, mesh.devices.flatten().tolist())
        console.note(f"{dtype}: {why}")
        if not args.dry_run:
            preflight.writable(workdir.root)
        blueprint = lm_lib.describe(config.model.name, context=config.model.context)
        session = open_session(blueprint, seed_set, config, workdir, console, dtype, mesh)
        if args.dry_run:
            report_seeds(session)
            preview.show(session)
            return
        missing = sum(finished(workdir.iteration(t)) is None for t in range(1, config.stop.iterations + 1))
        preflight.writable(workdir.root, preflight.disk_needed(blueprint.cfg, iterations=missing, keep=config.keep))
        start(session)
        preview.plan(session)
        run(session, lm_lib.load(config.model.name, dtype, mesh=mesh, blueprint=blueprint))


if __name__ == "__main__":
    main()
