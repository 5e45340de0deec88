"""The parts of the screening that only generate: answers in context by exemplars and temperature, and what questions come out."""
from __future__ import annotations

import collections
import dataclasses
import itertools
from dataclasses import dataclass
from typing import Any, Sequence

import numpy as np

from isara_jax.common import UserError, address, read_jsonl, write_jsonl
from isara_jax.config import Config
from isara_jax.data import splits
from isara_jax.data.pool import Record
from isara_jax.decode.requests import Completion, Request
from isara_jax.evals import diversity, evaluate, forms, stats
from isara_jax.evals.forms import Form
from isara_jax.lm import LM
from isara_jax.methods import isara
from isara_jax.workdir import stage
from screening_ground import Ground, Rows, say

KS, ANSWERED = (0, 1, 3, 5, 8), 160      # exemplars of an answer; questions answered
ANSWER_TEMPERATURES = (0.0, 0.3, 0.7)
TOP_P = 0.95                             # the default
READ = ((0, 0.0), (5, 0.0), (5, 0.7), (8, 0.0))  # (k, temperature) whose answers are judged by a reader
SHEET = 20                               # answers of each
VERDICTS = ("right", "wrong", "nonsense")

QUESTION_TEMPERATURES = (0.7, 1.0)
STRATEGIES = ("knn", "mmr", "random")


# ------------------------------------------------------------------------------------------------------------------------- answers
@dataclass(frozen=True)
class Warm:
    """A model that draws at a temperature what it is asked to answer greedily; a draw depends on the prompt alone."""

    lm: LM
    temperature: float

    @property
    def tokenizer(self) -> Any:
        return self.lm.tokenizer

    def run(self, requests: Sequence[Request], *, seed: int, on_progress: Any = None) -> list[Completion]:
        warm = {"temperature": self.temperature, "top_p": TOP_P}
        drawn = [dataclasses.replace(r, address=address("screening", *r.tokens), **warm) for r in requests]
        return self.lm.run(drawn, seed=seed, on_progress=on_progress)


def form(ground: Ground, k: int) -> Form:
    """The plain form behind the k nearest seeds."""
    session = ground.session
    if not k:
        return session.form
    return forms.icl(session.template, session.room, ground.seeds, ground.setting.vectors, strategy="knn", k=k, seed=0)


def answered(ground: Ground, k: int, temperature: float) -> Rows:
    """The answer probe of the starting model in one setting, made once and kept."""
    items = splits.choose(ground.held, ANSWERED)

    def make() -> Rows:
        say(f"answers: k {k}, temperature {temperature}")
        warm = Warm(ground.lm.prepared(), temperature)
        return evaluate.probe(warm, form(ground, k), items, ground.setting.vectors, ground.session.limits.answer)

    return stage(ground.root / "answers" / f"k{k}-t{temperature}.jsonl", make)


def answers(ground: Ground) -> str:
    """Likeness of the answers to true and to false references, by exemplars and temperature."""
    lines = [f"{ANSWERED} questions; cosine and ROUGE-L in points", "",
             "| k | temperature | cosine, true | true less false | nearer to true | ROUGE-L, true | true less false | words | truncated |",
             "|---" * 9 + "|"]
    for temperature, k in itertools.product(ANSWER_TEMPERATURES, KS):
        rows = answered(ground, k, temperature)
        mean = lambda values: f"{100 * np.mean(values):.1f}"
        nearer = _mean(rows, lambda r: float(r["cosine_diff"] > 0))
        cells = [mean([r["cosine"] for r in rows]), _mean(rows, lambda r: r["cosine_diff"]), nearer, mean([r["rougeL"] for r in rows]),
                 _mean(rows, lambda r: r["rougeL_diff"]),
                 f"{np.mean([len(r['answer'].split()) for r in rows]):.1f}", mean([r["finish"] == "length" for r in rows])]
        lines.append(f"| {k} | {temperature} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _mean(rows: Rows, value: Any) -> str:
    """A mean over rows in points, with its 95 % interval."""
    values = [value(r) for r in rows]
    low, high = stats.bootstrap(values, [1.0] * len(values), [r["id"] for r in rows])
    return f"{100 * np.mean(values):.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def sheet(ground: Ground) -> str:
    """Write sheet.jsonl: answers of four settings to the same questions, in a random order; the settings are in key.jsonl."""
    items = splits.choose(ground.held, ANSWERED)
    chosen = sorted(range(len(items)), key=lambda i: address("sheet", items[i].id))[:SHEET]
    made = []
    for k, temperature in READ:
        rows = answered(ground, k, temperature)
        shown = lambda i: {"question": items[i].question, "answer": rows[i]["answer"], "right": list(items[i].right),
                           "wrong": list(items[i].wrong)}
        made += [(shown(i), {"k": k, "temperature": temperature, "id": items[i].id}) for i in chosen]
    made.sort(key=lambda pair: address("order", pair[1]["id"], str(pair[1])))
    write_jsonl(ground.root / "sheet.jsonl", [{"number": n, **row} for n, (row, _) in enumerate(made, 1)])
    write_jsonl(ground.root / "key.jsonl", [{"number": n, **hidden} for n, (_, hidden) in enumerate(made, 1)])
    return (f"{len(made)} answers in {ground.root / 'sheet.jsonl'}. Judge each in judgements.jsonl beside it, "
            f'one line {{"number": N, "verdict": "{" | ".join(VERDICTS)}"}} for each, then run tally.')


def tally(ground: Ground) -> str:
    """Count the judgements by setting."""
    key = {row["number"]: (row["k"], row["temperature"]) for row in read_jsonl(ground.root / "key.jsonl")}
    judged = {row["number"]: row["verdict"] for row in read_jsonl(ground.root / "judgements.jsonl")}
    if bad := [n for n in key if judged.get(n) not in VERDICTS]:
        raise UserError(f"{ground.root / 'judgements.jsonl'}: number {bad[0]} has no verdict among {', '.join(VERDICTS)}. Judge every "
                        "answer of sheet.jsonl.")
    counts = collections.Counter((key[n], judged[n]) for n in key)
    lines = ["| k | temperature | " + " | ".join(VERDICTS) + " |", "|---" * 5 + "|"]
    return "\n".join(lines + [f"| {k} | {t} | " + " | ".join(str(counts[(k, t), v]) for v in VERDICTS) + " |" for k, t in READ])


# ----------------------------------------------------------------------------------------------------------------------- questions
def questions(ground: Ground) -> str:
    """New questions by temperature, choice of exemplars and size of the pool: what is rejected why, and how much they differ."""
    made = {}
    for size, pool in ((len(ground.seeds), ground.seeds), (len(ground.seeds) + len(ground.further), (*ground.seeds, *ground.further))):
        for temperature, strategy in itertools.product(QUESTION_TEMPERATURES, STRATEGIES):
            made[size, temperature, strategy] = asked(ground, size, pool, temperature, strategy)
    good = {key: [r for r in rows if r["accepted"]] for key, rows in made.items()}
    same = min(map(len, good.values()))
    reasons = list(dict.fromkeys(r["verdicts"][-1]["name"] for rows in made.values() for r in rows if not r["accepted"]))
    lines = [f"{ground.config.generate.requests} requests each; diversity of the first {same} accepted of each", "",
             "| pool | temperature | exemplars | accepted | " + " | ".join(reasons)
             + " | nearest accepted | distinct-2 | self-BLEU | same opening |", "|---" * (8 + len(reasons)) + "|"]
    for (size, temperature, strategy), rows in made.items():
        accepted = good[size, temperature, strategy]
        count = collections.Counter(r["verdicts"][-1]["name"] for r in rows if not r["accepted"])
        texts = [r["question"] for r in accepted][:same]
        near = np.mean([v["score"] for r in accepted for v in r["verdicts"] if v["name"] == "novelty"])
        cells = [f"{100 * len(accepted) / len(rows):.0f} %", *(str(count[reason]) for reason in reasons), f"{near:.2f}",
                 f"{diversity.distinct_n(texts, 2):.2f}", f"{diversity.self_bleu(texts):.2f}", f"{diversity.same_opening(texts):.2f}"]
        lines.append(f"| {size} | {temperature} | {strategy} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def asked(ground: Ground, size: int, pool: Sequence[Record], temperature: float, strategy: str) -> Rows:
    """The question stage of one iteration in one setting, made once and kept."""
    config = _with(ground.config, temperature, strategy)
    setting, sample = ground.changed(config), ground.sampler(config)
    say(f"questions: pool {size}, temperature {temperature}, {strategy}")
    return stage(ground.root / "questions" / f"{size}-t{temperature}-{strategy}.jsonl", lambda: isara.ask(setting, 1, pool, sample))


def _with(config: Config, temperature: float, strategy: str) -> Config:
    question = dataclasses.replace(config.generate.question, temperature=temperature)
    return dataclasses.replace(config, generate=dataclasses.replace(config.generate, question=question),
                               retrieval=dataclasses.replace(config.retrieval, strategy=strategy))
