"""What all parts of the screening stand on: the rows, the run in which prompts are built, fine-tuning, and measuring.

TruthfulQA's pool is divided once: 64 seeds as configs/truthfulness.py takes them, 136 further human pairs by the same rule (whole
components of near questions, in order of a hash), and the dev rows that are left. Nothing that is trained on is near a dev, validation or
test row; test rows are never measured. All seeds take part in prompts and training: nothing is held out.
"""
from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Mapping, Sequence

import jax
import numpy as np

from isara_jax import config as config_lib
from isara_jax import lm as lm_lib
from isara_jax.common import atomic_path, release_memory
from isara_jax.config import Config
from isara_jax.console import Console
from isara_jax.data import benchmarks, splits
from isara_jax.data.batching import Example
from isara_jax.data.items import Item
from isara_jax.data.pool import Record
from isara_jax.decode.requests import Completion, Request
from isara_jax.evals import evaluate, quantities, stats
from isara_jax.evalset import load_data
from isara_jax.lm import LM
from isara_jax.methods.setting import Sampler, Setting
from isara_jax.models import decoder
from isara_jax.retrieval.store import VectorStore
from isara_jax.session import Session, open_session, record
from isara_jax.sft import loop
from isara_jax.workdir import Workdir, stage

SEEDS, FURTHER = 64, 136  # human pairs: the run's seeds, and more of the benchmark's pool, 200 together
RATE = 1e-4
REQUESTS = 192            # question prompts issued
MEANS = ("mc1", "mc1_blind", "mc1_cond", "mc2", "mc2_blind", "mc2_cond", "nll")  # of a row, that are averaged over runs

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Ground:
    """The rows and the run of the screening, with the starting model.

    Attributes:
        session: a run of the defaults on the 64 seeds; parts change single fields of its config.
        setting: the same as the method sees it.
        seeds, further: the human pairs as records.
        dev, validation: rows to measure on; `rows` are both.
        held: rows that are no seed, further human pairs among them: questions for the starting model.
    """

    root: Path
    lm: LM
    session: Session
    setting: Setting
    seeds: tuple[Record, ...]
    further: tuple[Record, ...]
    dev: tuple[Item, ...]
    validation: tuple[Item, ...]
    held: tuple[Item, ...]
    damage: tuple[Example, ...]

    @property
    def rows(self) -> tuple[Item, ...]:
        return *self.dev, *self.validation

    @property
    def config(self) -> Config:
        return self.session.config

    def changed(self, config: Config) -> Setting:
        """The method's view of the run with another config."""
        return dataclasses.replace(self.setting, config=config)

    def sampler(self, config: Config) -> Sampler:
        """Draws from the starting model."""
        return lambda name, requests: self.draw(requests, config.seed)

    def draw(self, requests: Sequence[Request], seed: int) -> list[Completion]:
        """Completions of the starting model, all slots at work."""
        return self.lm.prepared().run(requests, seed=seed)

    def examples(self, pairs: Sequence[Record]) -> list[Example]:
        """The pairs as they are trained on."""
        return [self.session.example(r.question, r.answer) for r in pairs]


def open_ground(data: str, root: Path) -> Ground:
    """Read the benchmark's files in the folder `data`, divide the rows and load the model."""
    config = config_lib.from_dict({
        "data": {"seeds": "truthfulqa", "path": data, "limit": SEEDS, "holdout": 0.0}, "generate": {"requests": REQUESTS},
        "sft": {"lr": RATE}, "eval": {"benchmark": "truthfulqa", "primary": "mc2_cond"}})
    lm = lm_lib.load(config.model.name)
    seed_set, eval_set = load_data(config)
    benchmark = benchmarks.open_benchmark("truthfulqa", data)
    _, held = splits.seeds_and_dev(benchmark, SEEDS)
    further, dev = splits.seeds_and_dev(dataclasses.replace(benchmark, pool=held), FURTHER)
    eval_set = dataclasses.replace(eval_set, rows=dev, guarded=(*dev, *benchmark.validation, *benchmark.test))
    lm = lm.with_settings(config.generate)
    session = open_session(lm.blueprint, seed_set, eval_set, config, Workdir(root / "run"), Console(None), lm.dtype, lm.mesh)
    setting = dataclasses.replace(session.setting(), vectors=VectorStore(root / "vectors", session.embedder))
    tasks = benchmarks.open_benchmark("self_instruct", data)
    damage = [session.example(i.question, i.answer) for i in (*tasks.pool, *tasks.validation) if i.answer]
    damage = tuple(e for e in damage if len(e.tokens) <= lm.context)
    made = Ground(root, lm, session, setting, session.train_seeds, tuple(map(record, splits.seed_set(benchmark, further).pairs)), dev,
                  benchmark.validation, held, damage)
    say(f"{len(made.seeds)} seeds, {len(made.further)} further human pairs, {len(dev)} dev rows, {len(made.validation)} validation rows, "
        f"{len(damage)} seed tasks; {lm.dtype}; limits {session.limits}")
    return made


def say(text: str) -> None:
    """A line of progress."""
    print(text, flush=True)


# --------------------------------------------------------------------------------------------------------------------- fine-tuning
class Reader:
    """Stands where a fine-tuning keeps its unfinished state and hands the parameters at those steps on: nothing is kept or restored."""

    def __init__(self, read: Callable[[int, decoder.Params], None], n_layers: int):
        self._read, self._layers = read, n_layers

    def restore_unfinished(self, tag: str, like: Any) -> None:
        return None

    def save_unfinished(self, tag: str, state: Any, notes: dict[str, Any]) -> None:
        self._read(len(notes["losses"]), decoder.unstack_layers(jax.tree.map(np.array, state.params), self._layers))


def tune(ground: Ground, name: str, pairs: Sequence[Record], *, steps: int, rate: float = RATE, epochs: int = 3, seed: int = 0,
         read: dict[int, str] | None = None) -> None:
    """Fine-tune the starting model for so many steps and keep the parameters as `name`; those after step n as `read[n]`.

    The learning rate falls along a half cosine over all `steps`, so that parameters read in between have not come to rest. What is kept
    already is not made again.
    """
    read = read or {}
    wanted = [weights_file(ground, n) for n in (name, *read.values())]
    if all(f.exists() for f in wanted):
        return
    say(f"fine-tuning {name}: {len(pairs)} pairs, {steps} steps at {rate:g}, seed {seed}")
    every = next(iter(read), steps)
    sft = dataclasses.replace(ground.config.sft, lr=rate, epochs=epochs, save_every=every)
    keep = lambda step, params: save(weights_file(ground, read[step]), params) if step in read else None

    def on_step(step: int, loss: float, tokens: int) -> None:
        if step % 10 == 0 or step == steps:
            say(f"  step {step} of {steps}: loss {loss:.3f}")

    lm = ground.lm
    fitted = loop.fit(lm.params, lm.cfg, ground.examples(pairs), sft, mesh=lm.mesh, dtype=lm.dtype, seed=seed, context=lm.context,
                      n_steps=steps, checkpoints=Reader(keep, lm.cfg.n_layers), name=name, on_step=on_step)
    save(weights_file(ground, name), fitted.params)
    del fitted
    release_memory()


def weights_file(ground: Ground, name: str) -> Path:
    return ground.root / "weights" / f"{name}.npz"


def save(path: Path, params: decoder.Params) -> None:
    """Parameters as one .npz file, keys joined by slashes."""
    flat = {"/".join(str(k.key) for k in keys): np.asarray(x) for keys, x in jax.tree_util.tree_leaves_with_path(params)}
    with atomic_path(path) as temporary, open(temporary, "wb") as f:
        np.savez(f, **flat)


def tuned(ground: Ground, name: str) -> LM:
    """The model with the parameters kept as `name`; "base" is the starting model, and "NAME@0.25" lies a quarter of the way to NAME."""
    name, _, share = name.partition("@")
    if name == "base":
        return ground.lm
    with np.load(weights_file(ground, name), allow_pickle=False) as flat:
        at = float(share or 1)
        key = lambda keys: "/".join(str(k.key) for k in keys)
        mix = lambda keys, x: jax.device_put(flat[key(keys)] if at == 1 else np.asarray(x) * (1 - at) + flat[key(keys)] * at, x.sharding)
        return ground.lm.with_params(jax.tree_util.tree_map_with_path(mix, ground.lm.params))


# ----------------------------------------------------------------------------------------------------------------------- measuring
def measured(ground: Ground, name: str) -> Rows:
    """Multiple choice and the loss on the references of the dev and validation rows, made once for a model and kept."""

    def make() -> Rows:
        say(f"measuring {name}")
        made = evaluate.measure(tuned(ground, name).prepared(), ground.rows, ground.session.form, parts=("mc", "nll"),
                                new_tokens=ground.session.limits.answer)
        release_memory()
        say("  " + ", ".join(f"{n} {v:.3f}" for n, v in quantities.table(made).items() if n in ("mc2_cond", "mc2", "mc2_blind", "nll")))
        return made

    return stage(ground.root / "rows" / f"{name}.jsonl", make)


def damaged(ground: Ground, name: str) -> Rows:
    """The loss (sum in nats, tokens) of each Self-Instruct seed task, made once for a model and kept."""

    def make() -> Rows:
        say(f"measuring {name} on seed tasks")
        lm = tuned(ground, name).prepared()
        values = lm.score([e.tokens[:e.prompt_length] for e in ground.damage], [e.tokens[e.prompt_length:] for e in ground.damage])
        release_memory()
        return [{"nll": round(-v, 6), "nll_tokens": len(e.tokens) - e.prompt_length} for v, e in zip(values, ground.damage, strict=True)]

    return stage(ground.root / "damage" / f"{name}.jsonl", make)


def figure(rows: Rows, name: str) -> str:
    """A quantity of the rows as it is shown, without its interval."""
    quantity = quantities.QUANTITIES[name]
    value = quantities.table(rows)[name] * quantity.scale
    return f"{value:.1f}" if quantity.scale == 100 else f"{value:.3f}"


def with_interval(rows: Rows, name: str) -> str:
    """The same with its 95 % interval over rows."""
    quantity = quantities.QUANTITIES[name]
    parts = [quantity.parts(r) for r in rows]
    low, high = stats.bootstrap([p[0] for p in parts], [p[1] for p in parts], [r["group"] for r in rows])
    return f"{figure(rows, name)} [{low * quantity.scale:.1f}, {high * quantity.scale:.1f}]"


def change(rows: Rows, base: Rows, name: str) -> str:
    """The paired difference to `base` with interval and p, in the unit in which the quantity is shown."""
    quantity = quantities.QUANTITIES[name]
    a, b = ([quantity.parts(r) for r in side] for side in (rows, base))
    groups = [r.get("group", str(i)) for i, r in enumerate(rows)]
    found = stats.paired([p[0] for p in a], [p[1] for p in a], [p[0] for p in b], [p[1] for p in b], groups)
    digits, scale = (1, 100) if quantity.scale == 100 else (3, 1)
    p = "p < 0.001" if found.p < 0.001 else f"p {found.p:.3f}"
    return f"{found.difference * scale:+.{digits}f} [{found.low * scale:+.{digits}f}, {found.high * scale:+.{digits}f}], {p}"


def averaged(runs: Sequence[Rows]) -> Rows:
    """The rows of several models of one kind as one: each figure of a row is the mean over them."""
    return [{**rows[0], **{name: float(np.mean([r[name] for r in rows])) for name in MEANS}} for rows in zip(*runs, strict=True)]


def table(ground: Ground, kinds: Mapping[str, Sequence[str]]) -> str:
    """Kinds of models side by side, as Markdown; differences are to the starting model.

    Args:
        kinds: the models of each kind. Of several, every row counts with its mean over them.
    """
    base, dev = measured(ground, "base"), {i.id for i in ground.dev}
    of_dev = lambda rows: [r for r in rows if r["id"] in dev]
    lines = ["| model | MC2 conditioned | change | each run | change, dev rows alone | MC1 conditioned | MC2 | change | MC2 blind | "
             "answer NLL |", "|---" * 10 + "|", _line("base", base, [""] * 3, "")]
    for kind, names in kinds.items():
        runs = [measured(ground, name) for name in names]
        rows, of = averaged(runs), lambda one: f"{100 * (quantities.table(one)['mc2_cond'] - quantities.table(base)['mc2_cond']):+.1f}"
        changes = [change(rows, base, "mc2_cond"), ", ".join(map(of, runs)), change(of_dev(rows), of_dev(base), "mc2_cond")]
        lines.append(_line(kind, rows, changes, change(rows, base, "mc2")))
    return "\n".join(lines)


def _line(kind: str, rows: Rows, changes: Sequence[str], plain: str) -> str:
    cells = [with_interval(rows, "mc2_cond"), *changes, figure(rows, "mc1_cond"), figure(rows, "mc2"), plain, figure(rows, "mc2_blind"),
             figure(rows, "nll")]
    return f"| {kind} | " + " | ".join(cells) + " |"


def between(ground: Ground, kinds: Mapping[str, Sequence[str]], pairs: Sequence[tuple[str, str]]) -> str:
    """Differences in the question-conditioned MC2 between two kinds of models, as Markdown; runs of equal place share a seed."""
    lines = ["| | MC2 conditioned | runs | their standard deviation | answer NLL |", "|---" * 5 + "|"]
    for a, b in pairs:
        both = min(len(kinds[a]), len(kinds[b]))
        one, other = ([measured(ground, name) for name in kinds[kind][:both]] for kind in (a, b))
        gaps = [100 * (quantities.table(x)["mc2_cond"] - quantities.table(y)["mc2_cond"]) for x, y in zip(one, other, strict=True)]
        spread = f"{np.std(gaps, ddof=1):.1f}" if len(gaps) > 1 else ""
        lines.append(f"| {a} less {b} | {change(averaged(one), averaged(other), 'mc2_cond')} | {both} | {spread} | "
                     f"{change(averaged(one), averaged(other), 'nll')} |")
    return "\n".join(lines)
