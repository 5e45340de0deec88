"""The ISARA loop and its command line.

    python -m isara_jax.train --config=configs/quickstart.py --workdir=runs/quickstart
    python -m isara_jax.train --config=configs/quickstart.py --workdir=runs/quickstart --dry_run
    python -m isara_jax.train --config=configs/own.py --workdir=runs/mine --config.data.seeds=mine.csv --config.data.folds=3 --refit_all

The same command continues an interrupted run at its first unfinished stage.
"""
from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Sequence

from isara_jax import cards, cli, evalset, folds, judge, preflight, preview, review, summary
from isara_jax import lm as lm_lib
from isara_jax.common import UserError
from isara_jax.config import Config, from_dict
from isara_jax.console import Console
from isara_jax.data import seeds as seeds_lib
from isara_jax.data import splits
from isara_jax.data.pool import Record
from isara_jax.folds import Job
from isara_jax.ledger import Ledger
from isara_jax.methods.setting import Setting
from isara_jax.metrics import MetricsWriter
from isara_jax.models import lora
from isara_jax.session import Session, open_session, report_pairs, report_seeds, start_pool
from isara_jax.sharding import make_mesh
from isara_jax.stop import StopRule
from isara_jax.work import Work
from isara_jax.workdir import Workdir

FORESEEN = 10_000  # requests that are looked at before the weights are there, to know for which sizes to compile


@dataclass(frozen=True)
class Run:
    """What an alignment run leaves: the tuned model, the pool, one summary for each iteration, and the folder with everything.

    `evaluation` is what stands in `evaluation/dev/results.json`: arms, table and verdict; None where `eval.benchmark` is empty.
    """

    lm: lm_lib.LM
    pool: list[Record]
    metrics: list[dict[str, Any]]
    workdir: Path
    evaluation: dict[str, Any] | None


def align(lm: lm_lib.LM, seeds: str | Path | Sequence[Any], config: Config | dict[str, Any] | str | None, workdir: str | Path, *,
          refit_all: bool = False) -> Run:
    """Align `lm` to the domain of `seeds` with ISARA; continue when `workdir` holds an unfinished run of the same config.

    Args:
        lm: the starting model; it is not changed.
        seeds: a file, the name of a built-in set, or question-answer pairs ((question, answer), or dicts with these keys).
        config: a `Config`, a (partial) nested mapping of its fields, or a config file ("configs/tiny.py"); None takes the defaults. What
            it says of the model's name and dtype does not count: `lm` is the model.
        workdir: the folder of the run.
        refit_all: after the judged run (or the folds), train on every pair, in `workdir`/all, and return that model.

    Returns a `Run` with the model of the last iteration; its `evaluation` is that of the judged run or of all folds.
    Raises `UserError` for seeds, configs and folders that cannot be used, and `review.Pending` where config.review waits for a person.
    """
    if not isinstance(config, Config):
        config = from_dict(cli.load(config) if isinstance(config, str) else config or {})
    if config.data.folds and not refit_all:
        raise UserError(f"config.data.folds={config.data.folds} makes so many models, none of which has seen every pair. Call align with "
                        "refit_all=True for one that has, or set data.folds=0.")
    root = Workdir(workdir)
    preflight.writable(root.root)
    pairs = None
    if isinstance(seeds, (str, Path)):
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, seeds=str(seeds)))
    else:
        pairs = seeds_lib.from_pairs(seeds, config.data)
    parts = folds.jobs(config, root, pairs)
    lm = lm.masters()
    with Console(None, sensitive=config.sensitive) as console:
        ready = [open_session(lm.blueprint, job.seed_set, job.eval_set, job.config, job.workdir, console, lm.dtype, lm.mesh) for job in parts]
        return carry_out(config, root, parts, ready, lm, pairs, refit_all)


def start(session: Session) -> None:
    """Open the folder (a changed identity is refused here) and say what is about to run."""
    for warning in session.workdir.open(session.config, session.resolved):
        session.console.warn(warning)
    session.console.log_to(session.workdir.root / "log.txt")
    report_seeds(session)
    judge.announce(session)
    start_pool(session)


def compile_ahead(session: Session) -> None:
    """Have what the first questions take compiled in the background, while the weights are read."""
    if (session.workdir.iteration(1) / "questions.jsonl").exists() or not session.embedder.ready:
        return  # nothing is to be asked, or which prompts are is not known before the weights
    setting, count = dataclasses.replace(session.setting(), say=lambda _: None), min(session.config.generate.requests, FORESEEN)
    asked = session.method.question_prompts(setting, 1, session.train_seeds, count)
    said = lm_lib.compile_ahead(session.blueprint, session.dtype, session.mesh, session.config.generate,
                                session.method.requests_for(setting, "question", asked))
    session.console.note(f"compiling for the first questions while the weights are read: {said}")


def carry_out(config: Config, root: Workdir, parts: Sequence[Job], ready: Sequence[Session], lm: lm_lib.LM, pairs: seeds_lib.SeedSet | None,
              refit_all: bool) -> Run:
    """Make the runs one after the other, join the folds, and train on all pairs where that is asked for."""
    console, judged, done = ready[0].console, [], None
    if config.data.folds:
        for warning in folds.open_root(ready[0].config, root, parts, ready[0].resolved):
            console.warn(warning)
    report_pairs(ready[0])
    for job, session in zip(parts, ready, strict=True):
        if job.title:
            console.rule(job.title)
        session.embedder.bind(lm.params)
        start(session)
        preview.plan(session)
        done = None  # the weights of the run before make room
        done = run(session, lm)
        judged.append(done.evaluation)
    if config.data.folds:
        console.log_to(root.root / "log.txt")
        done = dataclasses.replace(done, workdir=root.root, evaluation=folds.join(console, root.root, parts, judged))
        summary.page(console, root.root)
    summary.next_steps(console, root.root)
    if refit_all:
        job, evaluation, done = folds.on_all(config, root, pairs, judged), done.evaluation, None
        console.rule(job.title)
        session = open_session(lm.blueprint, job.seed_set, job.eval_set, job.config, job.workdir, console, lm.dtype, lm.mesh)
        session.embedder.bind(lm.params)
        start(session)
        done = dataclasses.replace(run(session, lm), evaluation=evaluation)
        summary.page(console, root.root)  # again, now that there is a run to link to
        summary.next_steps(console, job.workdir.root)
    return done


# ------------------------------------------------------------------------------------------------------------------- the loop
def run(session: Session, lm: lm_lib.LM) -> Run:
    """Iterate until the stop rule has a reason: generate and filter new pairs, grow the pool, fine-tune, measure. Then judge."""
    console, workdir, rule = session.console, session.workdir, StopRule.of(session.config.stop)
    with MetricsWriter(workdir.root) as metrics:
        work = Work(session, lm, Ledger(metrics))
        setting = session.setting(work.ledger.stage)

        before = summary.finished(workdir.iteration(0)) or summary.finish(workdir.iteration(0), work.measure(0), metrics)
        history: list[dict[str, Any]] = []
        for t in itertools.count(1):
            if reason := rule.reason(before["held_out"], [summary.outcome(h) for h in history]):
                break
            if done := summary.finished(workdir.iteration(t)):
                console.note(f"iteration {t} is finished: {done['kept']} pairs kept of {done['requests']} requests")
            else:
                done = summary.finish(workdir.iteration(t), iterate(session, setting, work, t), metrics)
                summary.tell(session, t, before, done, work.ledger)
                summary.page(session.console, session.workdir.root)
            history.append(done)
        metrics.write("stop", iteration=t - 1, reason=reason)
        console.note(f"stopped: {reason}")

        last = max((h["iteration"] for h in history if h["kept"]), default=0)
        pool = setting.pool.snapshot(setting.pool.last())
        cards.write(session, pool, before, history, reason, None)
        judged = judge.judge(session, setting, work, history, metrics)
        cards.write(session, pool, before, history, reason, judged)
        summary.conclude(session, before, history, pool, last)
        summary.page(session.console, session.workdir.root)
        return Run(work.lm(last), pool, [before, *history], workdir.root, judged)


def iterate(session: Session, setting: Setting, work: Work, t: int) -> dict[str, Any]:
    """One iteration: new pairs into the pool, a fine-tuned model into the checkpoints, and its summary."""
    config, method = session.config, session.method
    session.console.rule(f"iteration {t} of at most {config.stop.iterations}")
    new = method.expand(setting, t, work.sampler(t))
    decided = (session.workdir.iteration(t) / "review.done").exists()  # stays decided when config.review is changed later
    if decided or config.review and setting.pool.last() < t:
        new = _reviewed(session, setting, t, new)
    setting.pool.append(t, new)
    made = {"iteration": t, "requests": config.generate.requests, "kept": len(new), "funnel": summary.funnel(session.workdir.iteration(t)),
            "pool": len(setting.pool.snapshot(t)), "held_out": None, "probe": work.probe(setting, t)}
    if not new:
        return made
    if t not in work.checkpoints.iterations():
        work.fit(method.training_pairs(setting, t), 0 if config.sft.init == "base" else t - 1, t)
    made |= work.measure(t)
    work.checkpoints.measured(t, made["held_out"])
    return made


def _reviewed(session: Session, setting: Setting, t: int, new: list[Record]) -> list[Record]:
    """What a person makes of the new pairs. An edit must stay as far from evaluation rows and held-out seeds as a generated question."""
    barred = splits.LeakIndex([*evalset.items_of("held-out seeds", session.held_out), *(session.eval_set.guarded if session.eval_set else ())])
    by_id = {r.id: r for r in setting.pool.snapshot(t - 1)}
    try:
        return review.reviewed(session.workdir.root, session.workdir.iteration(t), t, new, by_id, barred.near, session.console.note,
                               fits=session.too_long)
    except review.Pending:
        summary.page(session.console, session.workdir.root)
        raise


# --------------------------------------------------------------------------------------------------------------- command line
def main(argv: Sequence[str] | None = None) -> None:
    """`python -m isara_jax.train --config=FILE --workdir=DIR [--config.section.field=VALUE …] [--dry_run] [--refit_all]`"""
    cli.main(_train, argv)


def _train(args: cli.Args) -> None:
    config, root = args.config, Workdir(args.workdir or "unused")
    parts = folds.jobs(config, root)
    if args.plan_models:
        return preview.compare(config, args.plan_models, parts)
    stored = parts[0].workdir.stored()
    preflight.compilation_cache()
    with Console(None, sensitive=config.sensitive) as console:
        mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
        asked = stored["identity"]["resolved"]["dtype"] if stored and config.model.dtype == "auto" else config.model.dtype
        dtype, why = preflight.choose_dtype(asked, mesh.devices.flatten().tolist())
        console.note(f"{dtype}: {why}")
        if not args.dry_run:
            preflight.writable(root.root)
        blueprint = lm_lib.describe(config.model.name, context=config.model.context, shape_only=args.dry_run)
        if blueprint.note:
            console.warn(blueprint.note)
        ready = [open_session(blueprint, job.seed_set, job.eval_set, job.config, job.workdir, console, dtype, mesh) for job in parts]
        if args.dry_run:
            report_pairs(ready[0])
            for job, session in zip(parts, ready):
                if job.title:
                    console.rule(job.title)
                report_seeds(session)
                judge.announce(session)
            return preview.show(ready[-1], runs=len(parts) + bool(args.refit_all))
        missing = sum(summary.finished(job.workdir.iteration(t)) is None for job in parts for t in range(1, config.stop.iterations + 1))
        more = config.stop.iterations if args.refit_all else 0
        preflight.writable(root.root, preflight.disk_needed(blueprint.cfg, iterations=missing + more, keep=config.keep,
                                                              adapters=lora.n_params(blueprint.cfg, config.sft.lora)))
        compile_ahead(ready[0])
        lm = lm_lib.load(config.model.name, dtype, mesh=mesh, blueprint=blueprint, weights="float32")
        try:
            carry_out(config, root, parts, ready, lm, None, args.refit_all)
        except review.Pending as waiting:  # no failure: the next step is a person's
            console.rule("your turn")
            console.note(str(waiting))


if __name__ == "__main__":
    main()
