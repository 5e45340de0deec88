"""Which runs a command makes: one, or one a fold with a joint verdict, and where asked for a last one on all pairs.

    WORKDIR                 the run                                            data.folds=0
    WORKDIR/folds/1 …       a run a fold, judged on the pairs that it did not see; the joint table is WORKDIR/evaluation/dev
    WORKDIR/all             --refit_all: every pair is trained on, nothing is left to judge on
"""
from __future__ import annotations

import dataclasses
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Sequence

from isara_jax import judge
from isara_jax.arms import Result
from isara_jax.common import content_hash, read_jsonl, write_jsonl
from isara_jax.config import Config
from isara_jax.console import Console
from isara_jax.data.seeds import SeedSet
from isara_jax.evals.quantities import QUANTITIES
from isara_jax.evalset import EvalSet, load_data
from isara_jax.workdir import Workdir


@dataclass(frozen=True)
class Job:
    """A run to be made; `title` is "" where it is the only one."""

    title: str
    config: Config
    workdir: Workdir
    seed_set: SeedSet
    eval_set: EvalSet | None


def jobs(config: Config, workdir: Workdir, pairs: SeedSet | None = None) -> list[Job]:
    """The runs that are judged: one, or one a fold. Everything about the data is checked here, before a model is looked for.

    With folds nothing is reviewed by hand, which would be asked for in every fold; the run on all pairs is.
    """
    n = config.data.folds
    if not n:
        return [Job("", config, workdir, *load_data(config, pairs))]
    unread = dataclasses.replace(config, review=False)
    return [Job(f"fold {fold} of {n}", unread, Workdir(workdir.root / "folds" / str(fold)), *load_data(unread, pairs, fold))
            for fold in range(1, n + 1)]


def on_all(config: Config, workdir: Workdir, pairs: SeedSet | None, judged: Sequence[dict[str, Any] | None]) -> Job:
    """The run on every pair, of as many iterations as the models had that were `judged` (the median of folds)."""
    data = dataclasses.replace(config.data, test="", test_share=0.0, folds=0, holdout=0.0)
    iterations = [made["iteration"] for made in judged if made]
    stop = dataclasses.replace(config.stop, iterations=round(statistics.median(iterations)) if iterations else config.stop.iterations)
    every = dataclasses.replace(config, data=data, stop=stop, sft=dataclasses.replace(config.sft, rates=(), lr=_rate(workdir, config)),
                                eval=dataclasses.replace(config.eval, benchmark=""))
    return Job("all pairs", every, Workdir(workdir.root / "all"), *load_data(every, pairs))


def _rate(workdir: Workdir, config: Config) -> float:
    """The learning rate for the run on all pairs, which has no rows to choose one on: the one that the judged runs chose most often."""
    curves = sorted(p for root in (workdir.root, *workdir.root.glob("folds/*")) for p in root.glob("iterations/*/loss.jsonl"))
    chosen = [read_jsonl(path)[0]["rate"] for path in curves]
    return statistics.mode(chosen) if config.sft.rates and chosen else config.sft.lr


# ------------------------------------------------------------------------------------------------------------------ joint verdict
def open_root(config: Config, workdir: Workdir, parts: Sequence[Job], resolved: dict[str, Any]) -> list[str]:
    """Start or continue the folder over the folds, as `Workdir.open` does for a run; `resolved` is that of the first fold."""
    pairs = content_hash(*sorted({content_hash(s.question, s.answer) for job in parts for s in job.seed_set.pairs}))
    same = {name: value for name, value in resolved.items() if name not in ("guarded_rows", "validation_rows")}
    return workdir.open(config, same | {"seeds": pairs})


def join(console: Console, root: Path, parts: Sequence[Job], made: Sequence[dict[str, Any] | None]) -> dict[str, Any] | None:
    """One table and one verdict over the rows of all folds, in `evaluation/dev` of `root`; None where a fold has nothing to show.

    Args:
        made: what `judge` made of each fold.
    """
    console.rule("all folds together")
    if missing := [job.title for job, one in zip(parts, made) if one is None]:
        console.warn(f"{', '.join(missing)} kept no pair, so there is no joint verdict")
        return None
    folder, n = root / "evaluation" / "dev", len(parts)
    rows_of = lambda job, arm: read_jsonl(job.workdir.evaluation / "dev" / arm["file"])
    results = []
    for name in [arm["arm"] for arm in made[0]["arms"] if arm["judged"]]:
        arms = [next((a for a in one["arms"] if a["arm"] == name and a["judged"]), None) for one in made]
        if None in arms:  # an iteration that not every fold had
            continue
        rows = [row for job, arm in zip(parts, arms) for row in rows_of(job, arm)]
        write_jsonl(folder / f"{name}.jsonl", rows)
        results.append(Result(name, "/".join(dict.fromkeys(arm["form"] for arm in arms)), rows, judged=True, file=f"{name}.jsonl"))
    first, sizes = made[0], sorted({len(job.seed_set.pairs) for job in parts})
    joint = judge.compared(results, QUANTITIES[first["primary"]]) | {name: first[name] for name in ("split", "label", "model", "dtype", "seed")}
    joint |= {"benchmark": f"{Path(parts[0].seed_set.path).name} in {n} folds", "note": parts[0].eval_set.note,
              "rows": sum(one["rows"] for one in made), "iteration": max(one["iteration"] for one in made), "folds": n,
              "yield": round(statistics.mean(one["yield"] for one in made), 6),
              "scaling_ratio": round(statistics.mean(one["scaling_ratio"] for one in made), 6)}
    joint["sentences"].append(f"every row was answered by one of {n} models that had not seen it (each trained on {' or '.join(map(str, sizes))} "
                              "of the pairs); rows of one model are not independent of one another, so the intervals are a little narrow")
    judge.write(folder, joint, [item for job in parts for item in read_jsonl(job.workdir.evaluation / "dev" / "items.jsonl")])
    judge.show(console, joint)
    console.note(f"the joint table: {folder / 'table.md'}")
    return joint
