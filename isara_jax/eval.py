"""Evaluate anything that loads on a config's benchmark, with the evaluators that judge a run.

    python -m isara_jax.eval --model=smollm2-135m-instruct --config=configs/misconceptions.py
    python -m isara_jax.eval --model=runs/safety --config=configs/safety.py --config.data.path=FOLDER --config.eval.split=test

`--model` is an embedded name, a hub id, a Hugging Face folder, a .gguf file or the workdir of a run (its last iteration, in the form it
was trained in).
"""
from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, Sequence

import jax
import numpy as np

from isara_jax import cli, evalset, judge, kept, preflight
from isara_jax import lm as lm_lib
from isara_jax.checkpoint import Checkpoints
from isara_jax.common import UserError, atomic_write, content_hash
from isara_jax.config import Config, from_dict
from isara_jax.console import Console
from isara_jax.data.pool import Pool
from isara_jax.evals import evaluate, forms
from isara_jax.evalset import EvalSet
from isara_jax.lm import LM
from isara_jax.session import make_template
from isara_jax.sharding import make_mesh
from isara_jax.workdir import Workdir

COMMAND = cli.Command("isara_jax.eval", (
    cli.Flag("model", "Name, hub id, folder, .gguf file or workdir of a run.", "runs/first"),
    cli.Flag("out", "Folder for rows and table; else evaluation/ of the workdir, or runs/eval/MODEL.")))
ANSWER_TOKENS = 64  # of an answer that is generated, where neither config.eval.answer_tokens nor the run says


def main(argv: Sequence[str] | None = None) -> None:
    """`python -m isara_jax.eval --model=MODEL --config=FILE [--out=DIR] [--config.section.field=VALUE …]`"""
    cli.main(_evaluate, argv, COMMAND)


def _evaluate(args: cli.Args) -> None:
    workdir = _workdir(args.model)
    config = _of_run(args.config, workdir) if workdir else dataclasses.replace(
        args.config, model=dataclasses.replace(args.config.model, name=args.model))
    if not config.eval.benchmark:
        raise UserError("config.eval.benchmark is empty, so there is nothing to evaluate on. Name a benchmark or a file with it.")
    _, chosen = evalset.load_data(config)
    usual = workdir.evaluation if workdir else Path("runs/eval") / Path(args.model).name
    folder = (Path(args.out) if args.out else usual) / chosen.split
    preflight.writable(folder)
    preflight.compilation_cache()
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    blueprint = lm_lib.describe(config.model.name, context=config.model.context)
    with Console(None, sensitive=config.sensitive) as console:
        if workdir:
            _warn_of_leaks(workdir, chosen, console)
        lm = lm_lib.load(config.model.name, config.model.dtype, mesh=mesh, blueprint=blueprint).with_engine(
            slots=config.generate.slots, chunk=config.generate.prefill_chunk, key_block=config.generate.key_block)
        lm, iteration = _last(workdir, lm) if workdir else (lm, 0)
        made = _measure(lm, config, chosen, folder, console)
        made |= {"model": f"{args.model}, iteration {iteration}" if workdir else args.model, "iteration": iteration}
        atomic_write(folder / "model.json", json.dumps(made, indent=1) + "\n")
        atomic_write(folder / "model.md", judge.markdown(made))
        judge.show(console, made)
        console.note(f"the whole table: {folder / 'model.md'}; every row beside it")


def _measure(lm: LM, config: Config, chosen: EvalSet, folder: Path, console: Console) -> dict[str, Any]:
    """The rows of the model in its own form (and in the primer's), kept, and their summary as `judge` has it."""
    settings, arms = config.eval, []
    parts = evalset.parts(chosen.rows, settings.answer_rows)
    tokens = settings.answer_tokens or config.generate.answer.max_new_tokens or ANSWER_TOKENS
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

            rows = kept.rows(folder, f"model.{form.name}", key, make, reuse=settings.reuse)
        arms.append({"arm": "model", "form": form.name, "judged": not arms, "quantities": evaluate.summarise(rows)})
    return {"benchmark": chosen.name, "note": chosen.note, "split": chosen.split, "rows": len(chosen.rows), "label": settings.label,
            "primary": chosen.primary.name, "dtype": lm.dtype, "seed": config.seed, "arms": arms, "sentences": []}


# ----------------------------------------------------------------------------------------------------------------- workdir of a run
def _workdir(name: str) -> Workdir | None:
    """The run whose folder this is, or None for a model."""
    path = Path(name) / "config.json"
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return Workdir(name) if isinstance(stored, dict) and "identity" in stored else None


def _of_run(config: Config, workdir: Workdir) -> Config:
    """`config` with what the run says of its model, its form and its answers."""
    stored = workdir.stored()
    run = from_dict(stored["config"])
    resolved = stored["identity"]["resolved"]
    answer = dataclasses.replace(config.generate.answer, max_new_tokens=resolved["answer_tokens"])
    return dataclasses.replace(
        config, model=dataclasses.replace(run.model, dtype=resolved["dtype"]), prompt=run.prompt, sensitive=config.sensitive or run.sensitive,
        generate=dataclasses.replace(run.generate, answer=answer, slots=config.generate.slots))


def _last(workdir: Workdir, lm: LM) -> tuple[LM, int]:
    checkpoints = Checkpoints(workdir.checkpoints)
    iterations = checkpoints.iterations()
    if not iterations:
        raise UserError(f"{workdir.root} holds no parameters: no iteration of this run was finished. Continue it first.")
    return lm.with_params(checkpoints.restore(iterations[-1], lm.abstract_params())), iterations[-1]


def _warn_of_leaks(workdir: Workdir, chosen: EvalSet, console: Console) -> None:
    """Say how many pairs that the model was trained on are near a row it is evaluated on now."""
    pool, rows = Pool(workdir.pool), {i.id for i in chosen.rows}
    near = [found for r in pool.snapshot(pool.last()) if (found := chosen.leaks.near(r.question)) and found[1] in rows]
    if near:
        console.warn(f"{len(near)} pair(s) that this model was trained on are equal or near to evaluation rows (ROUGE-L F > 0.6), for example "
                     f"to row {near[0][1]}: the figures flatter it")


if __name__ == "__main__":
    main()
