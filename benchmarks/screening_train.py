"""The parts of the screening that fine-tune: content or form, the learning rate, and damage to what was not trained."""
from __future__ import annotations

import dataclasses
import itertools
from typing import Sequence

from isara_jax.arms import shuffle
from isara_jax.config import Config
from isara_jax.data.pool import Record
from isara_jax.evals import quantities
from isara_jax.methods import isara
from isara_jax.sft import loop
from isara_jax.workdir import stage
from screening_ground import RATE, Ground, between, change, damaged, measured, say, table, tune

RATES = (2e-5, 1e-4, 3e-4)
EPOCHS, READ = 6, (1, 3)      # of the one run per rate; parameters are also read after these epochs
ALONE = {"short": (1e-4, 1), "slow": (2e-5, 3)}  # rate and epochs of runs with their own schedule
SHARES = (0.25, 0.5, 0.75)    # of the way from the starting model to a tuned one
INTERPOLATED = ("isara", "human")
COMPARED = (("isara", "shuffled"), ("isara", "seeds"), ("isara", "seeds_epochs"), ("isara", "greedy"), ("isara", "human"),
            ("top", "bottom"), ("top", "isara"), ("human", "human_shuffled"), ("human", "seeds"), ("isara@0.5", "isara"),
            ("human@0.5", "human"))
VARIANTS = (("answer", 0.3), ("question", 1.0))  # temperatures that are changed in whole iterations
TURN = 34                     # places on the circle of further human pairs from one seed to the next


# ---------------------------------------------------------------------------------------------------------------------------- pools
def iteration(ground: Ground, config: Config, name: str, *, answers: str = "answers") -> list[Record]:
    """The pairs that one iteration of ISARA makes of the seeds, kept in `pools/NAME`; `answers` is the stem of its answers' file."""
    setting, sample, pool, folder = ground.changed(config), ground.sampler(config), ground.seeds, ground.root / "pools" / name
    questions = stage(folder / "questions.jsonl", lambda: isara.ask(setting, 1, pool, sample))
    rows = stage(folder / f"{answers}.jsonl", lambda: isara.answer(setting, 1, pool, questions, sample))
    made = isara.records(setting, 1, pool, questions, rows)
    say(f"{name}, {answers}: {len(made)} pairs kept of {len(questions)} requests")
    return made


def isara_pairs(ground: Ground, seed: int) -> list[Record]:
    """The pairs of one iteration at the defaults."""
    return iteration(ground, dataclasses.replace(ground.config, seed=seed), f"seed{seed}")


def greedy_pairs(ground: Ground) -> list[Record]:
    """The questions of seed 0 answered greedily."""
    generate = dataclasses.replace(ground.config.generate, answer=dataclasses.replace(ground.config.generate.answer, temperature=0.0))
    return iteration(ground, dataclasses.replace(ground.config, generate=generate), "seed0", answers="greedy")


def named(arm: str, seed: int) -> str:
    """The name under which a model is kept."""
    return f"{arm}.seed{seed}" if seed else arm


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
            name = named(arm, seed)
            tune(ground, name, chosen, steps=steps, seed=seed)
            measured(ground, name)
            kinds.setdefault(arm, []).append(name)
    tune(ground, "seeds_epochs", ground.seeds, steps=loop.steps(len(ground.seeds), ground.config.sft))  # as many epochs instead of steps
    kinds["seeds_epochs"] = ["seeds_epochs"]
    kinds |= {f"{arm}@{share}": [f"{name}@{share}" for name in kinds[arm]] for arm in INTERPOLATED for share in SHARES}
    return "\n".join(notes) + "\n\n" + table(ground, kinds) + "\n\n" + between(ground, kinds, COMPARED)


def arms(ground: Ground, pairs: Sequence[Record], seed: int) -> dict[str, list[Record]]:
    """What each model is trained on, the seeds among it; with another seed than 0 only what tells how much a run varies."""
    seeds = list(ground.seeds)
    human = [*seeds, *human_pairs(ground, seed, len(pairs))]
    repeated = {"isara": [*seeds, *pairs], "shuffled": shuffle([*seeds, *pairs], seed), "human": human}
    if seed:
        return repeated
    top, bottom = halves(ground, pairs)
    return repeated | {"human_shuffled": shuffle(human, 0), "seeds": seeds, "greedy": [*seeds, *greedy_pairs(ground)],
                       "top": [*seeds, *top], "bottom": [*seeds, *bottom]}


# ----------------------------------------------------------------------------------------------------------------------------- rate
def rate(ground: Ground, repeats: int) -> str:
    """Three learning rates, one run of six epochs each, on human pairs and on ISARA's pool, read after one, three and six epochs.

    Then shorter runs with a schedule of their own, on the pools of `repeats` further seeds too.
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
    for (which, (lr, epochs)), seed in itertools.product(ALONE.items(), range(repeats + 1)):
        for pool, chosen in pools(ground, seed).items():
            name = named(f"{pool}.{which}", seed)
            tune(ground, name, chosen, steps=epochs * epoch_steps(ground, chosen), rate=lr, epochs=epochs, seed=seed)
            measured(ground, name)
            kinds.setdefault(f"{pool}.{which}", []).append(name)
    lr, epochs = ALONE["slow"]
    steps = epochs * epoch_steps(ground, pools(ground, 0)["isara"])
    tune(ground, "seeds.slow", ground.seeds, steps=steps, rate=lr)
    kinds["seeds.slow"] = ["seeds.slow"]  # in as many steps
    return table(ground, kinds) + "\n\n" + between(ground, kinds, (("isara.slow", "seeds.slow"), ("isara.slow", "human.slow")))


def pools(ground: Ground, seed: int) -> dict[str, list[Record]]:
    """Human pairs, and as many of ISARA's; the seeds stand in both."""
    pairs = isara_pairs(ground, seed)
    return {"human": [*ground.seeds, *human_pairs(ground, seed, len(pairs))], "isara": [*ground.seeds, *pairs]}


def epoch_steps(ground: Ground, pairs: Sequence[Record]) -> int:
    return loop.steps(len(pairs), dataclasses.replace(ground.config.sft, epochs=1))


# ---------------------------------------------------------------------------------------------------------------------- generation
def generation(ground: Ground, repeats: int) -> str:
    """ISARA with one temperature of its generation changed, trained as by default, against the unchanged pool of equal seed."""
    kinds, kept = {}, {}
    for seed in range(repeats + 1):
        unchanged = isara_pairs(ground, seed)
        kinds.setdefault("isara", []).append(named("isara", seed))
        kept.setdefault("isara", []).append(len(unchanged))
        for stage_name, temperature in VARIANTS:
            variant = f"{stage_name}s at {temperature}"
            name = named(variant.replace(" ", "-"), seed)
            sampling = dataclasses.replace(getattr(ground.config.generate, stage_name), temperature=temperature)
            generate = dataclasses.replace(ground.config.generate, **{stage_name: sampling})
            pairs = iteration(ground, dataclasses.replace(ground.config, seed=seed, generate=generate), name)
            tune(ground, name, [*ground.seeds, *pairs], steps=loop.steps(len(ground.seeds) + len(pairs), ground.config.sft), seed=seed)
            kinds.setdefault(variant, []).append(name)
            kept.setdefault(variant, []).append(len(pairs))
    counts = "; ".join(f"{kind}: {', '.join(map(str, numbers))}" for kind, numbers in kept.items())
    return f"pairs kept: {counts}\n\n{table(ground, kinds)}\n\n{between(ground, kinds, [(v, 'isara') for v in kinds if v != 'isara'])}"


# --------------------------------------------------------------------------------------------------------------------------- damage
def damage(ground: Ground) -> str:
    """The loss on Self-Instruct's seed tasks, which no model was trained on."""
    names = ["base", "shuffled", *(f"{pool}{which}" for pool in ("human", "isara") for which in (
        "", "@0.25", "@0.5", "@0.75", ".short", ".slow", ".lr2e-05.epoch3", ".lr2e-05.epoch6", ".lr0.0001.epoch6", ".lr0.0003.epoch6"))]
    base = damaged(ground, "base")
    lines = [f"{len(base)} seed tasks, {sum(r['nll_tokens'] for r in base)} tokens of answers", "",
             "| model | NLL a token | change |", "|---|---|---|"]
    for name in names:
        rows = damaged(ground, name)
        lines.append(f"| {name} | {quantities.table(rows)['nll']:.3f} | {'' if name == 'base' else change(rows, base, 'nll')} |")
    return "\n".join(lines)
