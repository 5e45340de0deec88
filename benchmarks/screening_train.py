"""The parts of the screening that fine-tune: content or form, the learning rate, and damage to what was not trained."""
from __future__ import annotations

import dataclasses
import itertools
from typing import Sequence

from isara_jax.arms import shuffle
from isara_jax.config import Config, Sampling
from isara_jax.data.pool import Record
from isara_jax.evals import quantities
from isara_jax.methods import isara
from isara_jax.sft import loop
from isara_jax.workdir import stage
from screening_ground import RATE, Ground, between, change, damaged, measured, say, table, tune

RATES = (2e-5, 1e-4, 3e-4)
EPOCHS, READ = 6, (1, 3)      # of the one run per rate; parameters are also read after these epochs
SHARES = (0.25, 0.5, 0.75)    # of the way from the starting model to a tuned one
INTERPOLATED = ("isara", "human")
COMPARED = (("isara", "shuffled"), ("isara", "seeds"), ("isara", "greedy"), ("isara", "human"), ("top", "bottom"), ("top", "isara"),
            ("human", "human_shuffled"), ("human", "seeds"), ("isara@0.5", "isara"), ("human@0.5", "human"))
TURN = 34                     # places on the circle of further human pairs from one seed to the next


# ---------------------------------------------------------------------------------------------------------------------------- pools
def config_of(ground: Ground, seed: int, **answer: float) -> Config:
    """The run's config with another seed; `answer` changes how answers are sampled."""
    generate = dataclasses.replace(ground.config.generate, answer=dataclasses.replace(Sampling(), **answer))
    return dataclasses.replace(ground.config, seed=seed, generate=generate)


def isara_pairs(ground: Ground, seed: int, *, greedy: bool = False) -> list[Record]:
    """The pairs that one iteration of ISARA makes of the seeds, kept as a run keeps them; `greedy` answers the same questions greedily."""
    config, folder = config_of(ground, seed), ground.root / "pools" / f"seed{seed}"
    setting, sample, pool = ground.changed(config), ground.sampler(config), ground.seeds
    questions = stage(folder / "questions.jsonl", lambda: isara.ask(setting, 1, pool, sample))
    name = "answers"
    if greedy:
        setting, name = ground.changed(config_of(ground, seed, temperature=0.0)), "greedy"
    answers = stage(folder / f"{name}.jsonl", lambda: isara.answer(setting, 1, pool, questions, sample))
    made = isara.records(setting, 1, pool, questions, answers)
    say(f"seed {seed}, {name}: {len(made)} pairs kept of {len(questions)} requests")
    return made


def human_pairs(ground: Ground, seed: int, count: int) -> list[Record]:
    """`count` of the further human pairs; another seed takes them from another place of their circle."""
    return [ground.further[(TURN * seed + i) % len(ground.further)] for i in range(count)]


def halves(ground: Ground, pairs: Sequence[Record]) -> tuple[list[Record], list[Record]]:
    """(top, bottom) half of the pairs by how much the question adds to the answer's log-likelihood under the starting model, a token.

    Unconditional is the answer after the bare answer marker.
    """

    def make() -> list[dict]:
        tokenizer, template, form = ground.lm.tokenizer, ground.session.template, ground.session.form
        after = [form.pair(tokenizer, template.training_segments(r.question), r.answer) for r in pairs]
        alone = [form.pair(tokenizer, ((template.answer_marker, False),), r.answer) for r in pairs]
        own, none = (ground.lm.score([p for p, _ in side], [c for _, c in side]) for side in (after, alone))
        return [{"id": r.id, "tokens": len(c), "conditional": round(a, 6), "unconditional": round(b, 6)}
                for r, (_, c), a, b in zip(pairs, after, own, none, strict=True)]

    rows = stage(ground.root / "pools" / "seed0" / "likelihood.jsonl", make)
    worth = {row["id"]: (row["conditional"] - row["unconditional"]) / row["tokens"] for row in rows}
    order = sorted(pairs, key=lambda r: (-worth[r.id], r.id))
    top, bottom = order[:len(order) // 2], order[len(order) // 2:]
    for name, side in (("top", top), ("bottom", bottom)):
        say(f"{name} half: {sum(worth[r.id] for r in side) / len(side):.2f} nats a token from the question, "
            f"{sum(len(r.answer.split()) for r in side) / len(side):.1f} words an answer")
    return top, bottom


# ---------------------------------------------------------------------------------------------------------------- content or form
def content(ground: Ground, repeats: int) -> str:
    """A pool of ISARA's and what becomes of the model with its parts, at equal steps; with `repeats` further pools, each with its seed."""
    kinds: dict[str, list[str]] = {}
    notes = []
    for seed in range(repeats + 1):
        pairs = isara_pairs(ground, seed)
        steps = loop.steps(len(ground.seeds) + len(pairs), ground.config.sft)
        notes.append(f"seed {seed}: {len(pairs)} pairs of ISARA's, {steps} steps at {RATE:g}")
        for arm, chosen in arms(ground, pairs, seed).items():
            name = f"{arm}.seed{seed}" if seed else arm
            tune(ground, name, chosen, steps=steps, seed=seed)
            measured(ground, name)
            kinds.setdefault(arm, []).append(name)
    kinds |= {name: [name] for name in (f"{arm}@{share}" for arm in INTERPOLATED for share in SHARES)}
    return "\n".join(notes) + "\n\n" + table(ground, kinds) + "\n\n" + between(ground, kinds, COMPARED)


def arms(ground: Ground, pairs: Sequence[Record], seed: int) -> dict[str, list[Record]]:
    """What each model is trained on, the seeds among it; with another seed than 0 only what tells how much a run varies."""
    seeds = list(ground.seeds)
    human = [*seeds, *human_pairs(ground, seed, len(pairs))]
    repeated = {"isara": [*seeds, *pairs], "shuffled": shuffle([*seeds, *pairs], seed), "human": human}
    if seed:
        return repeated
    top, bottom = halves(ground, pairs)
    return repeated | {"human_shuffled": shuffle(human, 0), "seeds": seeds, "greedy": [*seeds, *isara_pairs(ground, 0, greedy=True)],
                       "top": [*seeds, *top], "bottom": [*seeds, *bottom]}


# ----------------------------------------------------------------------------------------------------------------------------- rate
def rate(ground: Ground, repeats: int) -> str:
    """Three learning rates, one run of six epochs each, on human pairs and on ISARA's pool, read after one, three and six epochs.

    Then runs of one epoch with a schedule of their own, on the pools of `repeats` further seeds too.
    """
    names = []
    for lr in RATES:
        for pool, chosen in pools(ground, 0).items():
            run, epoch = f"{pool}.lr{lr:g}", epoch_steps(ground, chosen)
            tune(ground, f"{run}.epoch{EPOCHS}", chosen, steps=EPOCHS * epoch, rate=lr, epochs=EPOCHS,
                 read={e * epoch: f"{run}.epoch{e}" for e in READ})
            names += [f"{run}.epoch{e}" for e in (*READ, EPOCHS)]
            for name in names[-3:]:
                measured(ground, name)
    kinds = {name: [name] for name in sorted(names)}
    for seed in range(repeats + 1):
        for pool, chosen in pools(ground, seed).items():
            name = f"{pool}.short" + (f".seed{seed}" if seed else "")
            tune(ground, name, chosen, steps=epoch_steps(ground, chosen), epochs=1, seed=seed)
            measured(ground, name)
            kinds.setdefault(f"{pool}, {RATE:g}, one epoch alone", []).append(name)
    return table(ground, kinds)


def pools(ground: Ground, seed: int) -> dict[str, list[Record]]:
    """Human pairs, and as many of ISARA's; the seeds stand in both."""
    pairs = isara_pairs(ground, seed)
    return {"human": [*ground.seeds, *human_pairs(ground, seed, len(pairs))], "isara": [*ground.seeds, *pairs]}


def epoch_steps(ground: Ground, pairs: Sequence[Record]) -> int:
    return loop.steps(len(pairs), dataclasses.replace(ground.config.sft, epochs=1))


# --------------------------------------------------------------------------------------------------------------------------- damage
def damage(ground: Ground) -> str:
    """The loss on Self-Instruct's seed tasks, which no model was trained on."""
    names = ["base", "human", "isara", "shuffled", "human@0.5", "isara@0.5", "human.lr0.0003.epoch6", "isara.lr0.0003.epoch6"]
    base = damaged(ground, "base")
    lines = [f"{len(base)} seed tasks, {sum(r['nll_tokens'] for r in base)} tokens of answers", "",
             "| model | NLL a token | change |", "|---|---|---|"]
    for name in names:
        rows = damaged(ground, name)
        lines.append(f"| {name} | {quantities.table(rows)['nll']:.3f} | {'' if name == 'base' else change(rows, base, 'nll')} |")
    return "\n".join(lines)
