"""Evaluate anything that loads on a config's benchmark, with the evaluators that judge a run.

    python -m isara_jax.eval --model=smollm2-135m-instruct --config=configs/misconceptions.py
    python -m isara_jax.eval --model=runs/safety --config=configs/safety.py --config.data.path=FOLDER --config.eval.split=test
    python -m isara_jax.eval --model=runs/first --blind=20

`--model` is an embedded name, a hub id, a Hugging Face folder, a .gguf file or the workdir of a run (its last iteration, in the form it
was trained in), whose own config is taken where none is named. `--blind=N` writes N held-out questions with two answers in random order for
a person to judge, and reads the decisions back: see `isara_jax.blind`.
"""
from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any, Sequence

import jax
import numpy as np

from isara_jax import blind, cli, evalset, judge, kept, preflight, report, trained
from isara_jax import lm as lm_lib
from isara_jax.common import UserError, atomic_write, content_hash, read_jsonl
from isara_jax.config import Config
from isara_jax.console import Console
from isara_jax.data.items import Item
from isara_jax.data.pool import Pool
from isara_jax.evals import evaluate, forms
from isara_jax.evalset import EvalSet
from isara_jax.lm import LM
from isara_jax.session import make_template
from isara_jax.sharding import make_mesh
from isara_jax.workdir import Workdir

COMMAND = cli.Command("isara_jax.eval", (
    cli.Flag("model", "Name, hub id, folder, .gguf file or workdir of a run.", "runs/first"),
    cli.Flag("out", "Folder for rows and table; else evaluation/ of the workdir, or runs/eval/MODEL."),
    cli.Flag("blind", "Write so many held-out questions of a run for a blind comparison, and read the decisions back."),
    cli.Flag("against", "With --blind: the arm that the aligned model is compared with; else base.")), config_optional=True)
ANSWER_TOKENS = 64  # of an answer that is generated, where neither config.eval.answer_tokens nor the run says


def main(argv: Sequence[str] | None = None) -> None:
    """`python -m isara_jax.eval --model=MODEL [--config=FILE [--config.section.field=VALUE …]] [--out=DIR] [--blind=N [--against=ARM]]`"""
    cli.main(_run, argv, COMMAND)


def _run(args: cli.Args) -> None:
    if args.blind is not None:
        _blind(args, trained.run_folder(args.model))
    elif args.against is not None:
        raise UserError("--against says what a blind comparison is with. Add --blind=N, the number of questions.")
    else:
        _evaluate(args, trained.run_at(args.model))


def _evaluate(args: cli.Args, workdir: Workdir | None) -> None:
    if workdir is None and args.config is None:
        raise UserError(f"{args.model} is no folder of a run, so its config cannot be taken. {cli.no_config()}")
    config = trained.config_of(workdir, args.config) if workdir else dataclasses.replace(
        args.config, model=dataclasses.replace(args.config.model, name=args.model))
    _, chosen = evalset.load_data(config)
    if chosen is None:
        raise UserError("config.eval.benchmark is empty and config.data names no test rows of a single run, so there is nothing to "
                        "evaluate on. Name a benchmark or a file in config.eval.benchmark.")
    usual = workdir.evaluation if workdir else Path("runs/eval") / Path(args.model).name
    folder = (Path(args.out) if args.out else usual) / chosen.split
    preflight.writable(folder)
    preflight.compilation_cache()
    with Console(None, sensitive=config.sensitive) as console:
        if workdir:
            _warn_of_leaks(workdir, chosen, console)
        lm = _load(config)
        lm, iteration = trained.last(workdir, lm) if workdir else (lm, 0)
        made = _measure(lm, config, chosen, folder, console)
        made |= {"model": f"{args.model}, iteration {iteration}" if workdir else args.model, "iteration": iteration}
        atomic_write(folder / "model.json", json.dumps(made, indent=1) + "\n")
        atomic_write(folder / "model.md", judge.markdown(made))
        judge.show(console, made)
        console.note(f"the whole table: {folder / 'model.md'}; every row beside it")


def _load(config: Config) -> LM:
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    blueprint = lm_lib.describe(config.model.name, context=config.model.context)
    return lm_lib.load(config.model.name, config.model.dtype, mesh=mesh, blueprint=blueprint).with_settings(config.generate)


def _measure(lm: LM, config: Config, chosen: EvalSet, folder: Path, console: Console) -> dict[str, Any]:
    """The rows of the model in its own form (and in the primer's), kept, and their summary as `judge` has it."""
    settings, arms = config.eval, []
    parts = evalset.parts(chosen.rows, settings.answer_rows)
    tokens = _answer_tokens(config)
    answers = settings.answer_rows if "answers" in parts else 0
    room = lm.context - tokens
    asked = [forms.bare(make_template(config, lm.blueprint), room)]
    if settings.forms == "all" and "mc" in parts:
        asked.append(forms.primer(room))
    weights = content_hash(*(np.asarray(x).tobytes() for x in jax.tree.leaves(lm.params)))
    for form in asked:
        key = kept.key(weights, form.hash, evalset.rows_hash(chosen.rows), lm, [parts, answers, tokens])
        with console.progress(f"evaluate ({form.name})", len(chosen.rows)) as progress:

            def make() -> kept.Rows:
                return evaluate.measure(lm, chosen.rows, form, parts=parts, answer_rows=answers, new_tokens=tokens, seed=config.seed,
                                        on_progress=lambda done, prefilled, generated: progress.update(done, tokens=prefilled + generated))

            rows = kept.rows(kept.path(folder, f"model.{form.name}", key), key, make, reuse=settings.reuse)
        arms.append({"arm": "model", "form": form.name, "judged": not arms, "quantities": evaluate.summarise(rows)})
    return {"benchmark": chosen.name, "note": chosen.note, "split": chosen.split, "rows": len(chosen.rows), "label": settings.label,
            "primary": chosen.primary.name, "dtype": lm.dtype, "seed": config.seed, "arms": arms, "sentences": []}


def _answer_tokens(config: Config) -> int:
    return config.eval.answer_tokens or config.generate.answer.max_new_tokens or ANSWER_TOKENS


# ------------------------------------------------------------------------------------------------------------------- blind sheets
def _blind(args: cli.Args, workdir: Workdir | None) -> None:
    if not re.fullmatch(r"0*[1-9]\d{0,5}", args.blind):
        raise UserError(f"--blind={args.blind}: give the number of questions that are compared, a whole number of at least 1, for example "
                        "--blind=20.")
    if args.out is not None:
        raise UserError("--out does not go with --blind: the sheets lie in the folder blind/ of the run.")
    if workdir is None:
        raise UserError(f"--blind compares a run with what it started from, and {args.model} is no folder of a run (it has no config.json "
                        "of one). Name the --workdir of a finished run as --model.")
    config = trained.config_of(workdir, args.config)
    asked = blind.Asked(int(args.blind), args.against or "base", config.eval.split, trained.config_of(workdir).seed)
    if asked.against == blind.TUNED:
        raise UserError(f"--against={asked.against} would compare the aligned model with itself. Take base or another arm of the run.")
    preflight.writable(workdir.root)
    with Console(None, sensitive=config.sensitive) as console:
        blind.run(workdir.root, asked, lambda: _both(workdir, config, asked, console), console.note)
        console.note(f"also on the page: {report.write(workdir.root)}")


def _both(workdir: Workdir, config: Config, asked: blind.Asked, console: Console) -> blind.Answers:
    """Greedy answers of the starting model, in its judged form where there is one, and of the last iteration in its own."""
    items = blind.pick(_items(workdir, config, asked.split), asked)
    preflight.compilation_cache()
    base, tokens = _load(config), _answer_tokens(config)
    room = base.context - tokens
    own, judged = forms.bare(make_template(config, base.blueprint), room), _judged_form(workdir, asked)
    chat = dataclasses.replace(own.template, form="chat", render_chat=base.tokenizer.render_chat)
    best = {"primer": forms.primer(room), "chat": forms.bare(chat, room)}.get(judged, own)
    tuned, iteration = trained.last(workdir, base)
    texts = []
    for lm, form in ((base, best), (tuned, own)):
        with console.progress(f"answers ({form.name})", len(items)) as progress:
            rows = evaluate.measure(lm.prepared(), items, form, parts=("answers",), new_tokens=tokens, seed=config.seed,
                                    on_progress=lambda done, prefilled, generated: progress.update(done, tokens=prefilled + generated))
        texts.append([row["answer"] for row in rows])
    rows = tuple(blind.Both(i.id, i.question, after, before) for i, before, after in zip(items, *texts, strict=True))
    return blind.Answers(iteration, own.name, best.name, rows)


def _items(workdir: Workdir, config: Config, split: str) -> Sequence[Item]:
    """The rows that the run was judged on, from the run itself where it kept them."""
    kept_items = workdir.evaluation / split / "items.jsonl"
    if kept_items.exists():
        return [Item(question=row["question"], answer=row["answer"], kind=row["kind"]) for row in read_jsonl(kept_items)]
    _, chosen = evalset.load_data(config)
    if chosen is None:
        raise UserError(f"{workdir.root} was judged on nothing, so there are no held-out questions to compare answers on. Start a run with "
                        "--config.data.test=FILE or --config.data.test_share=0.25, or name a config with an eval.benchmark: --config=FILE.")
    return chosen.rows


def _judged_form(workdir: Workdir, asked: blind.Asked) -> str:
    """The form in which the run compared its starting model, "" where it did not."""
    path = workdir.evaluation / asked.split / "results.json"
    arms = json.loads(path.read_text(encoding="utf-8"))["arms"] if path.exists() else []
    return next((arm["form"] for arm in arms if arm["arm"] == asked.against and arm["judged"]), "")


# ---------------------------------------------------------------------------------------------------------------------------------
def _warn_of_leaks(workdir: Workdir, chosen: EvalSet, console: Console) -> None:
    """Say how many pairs that the model was trained on are near a row it is evaluated on now."""
    pool, rows = Pool(workdir.pool), {i.id for i in chosen.rows}
    near = [found for r in pool.snapshot(pool.last()) if (found := chosen.leaks.near(r.question)) and found[1] in rows]
    if near:
        console.warn(f"{len(near)} pair(s) that this model was trained on are equal or near to evaluation rows (ROUGE-L F > 0.6), for "
                     f"example to row {near[0][1]}: the figures flatter it")


if __name__ == "__main__":
    main()
