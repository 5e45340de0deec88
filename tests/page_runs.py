"""Folders of runs for the tests of the page: small ones to be read by eye, and one of any size."""
from __future__ import annotations

import json
import random
from pathlib import Path

from isara_jax import config
from isara_jax.common import write_jsonl
from isara_jax.data.pool import pair_id

SEEDS = [("Why is the sky blue?", "Air scatters blue light more than red light."),
         ("Do fish sleep at night?", "Many fish rest, though they have no eyelids."),
         ("What makes bread rise?", "Yeast makes gas, and the dough holds it.")]
FILTERS = ("parse", "truncated", "min_words", "ngram_loop", "exemplar_copy")


def seed(question, answer, **changes):
    """A seed as a row of the pool."""
    return {"id": pair_id(question, answer), "question": question, "answer": answer, "iteration": 0, "origin": "seed",
            "question_exemplars": [], "answer_exemplars": [], "template": "", "sampling": {}, "address": {}, "filters": {},
            "author": "human", "source": "our own", "licence": "CC0-1.0"} | changes


def verdict(name, passed=True, score=None, neighbour=None):
    """A filter's verdict as the requests' files have it."""
    return {"name": name, "passed": passed, "score": score, "neighbour": neighbour}


def request(number, question, exemplars, verdicts, answer=None):
    """A row of questions.jsonl, or with an answer of answers.jsonl."""
    row = {"request": number, "address": {"iteration": 1, "attempt": 0, "anchor": exemplars[0], "sample": 0}, "exemplars": exemplars,
           "question": question, **({} if answer is None else {"answer": answer}), "accepted": all(v["passed"] for v in verdicts),
           "verdicts": verdicts, "finish": "stop", "tokens": 9, "text": question if answer is None else answer}
    return row


def kept(question, answer, exemplars, t=1):
    """A kept pair as a row of the pool."""
    sampling = {"question": {"temperature": 0.7, "top_p": 0.95, "max_new_tokens": 24}}
    return seed(question, answer, iteration=t, origin="generated", question_exemplars=exemplars, answer_exemplars=exemplars[:1],
                template="994a9c5922665a29", sampling=sampling, filters={"question/novelty": {"verdict": "pass", "score": 0.25}})


def rejected(number, question, reason, score, neighbour, stage="question", answer=None):
    """A row of rejected.jsonl."""
    return {"stage": stage, "request": number, "reason": reason, "score": score, "neighbour": neighbour, "question": question,
            "answer": answer, "text": answer or question, "finish": "stop"}


def start(root: Path, seeds=SEEDS, changes=None, **of_seeds) -> list[str]:
    """A run that has its seeds and nothing else; the ids of the seeds."""
    root.mkdir(parents=True, exist_ok=True)
    asked = {"model": {"name": "smollm2-135m-instruct"}, "data": {"seeds": "mine.csv"}, "generate": {"requests": 4},
             "eval": {"benchmark": "misconceptions"}}
    for section, values in (changes or {}).items():
        asked[section] = {**asked.get(section, {}), **values} if isinstance(values, dict) else values
    made = config.from_dict(asked)
    resolved = {"dtype": "float32", "question_tokens": 24, "answer_tokens": 40}
    stored = {"format": 1, "identity": {**config.identity(made), "resolved": resolved}, "config": config.to_dict(made)}
    (root / "config.json").write_text(json.dumps(stored))
    (root / "versions.json").write_text('{"jax": "0.10.2"}')
    (root / "command.txt").write_text("python -m isara_jax.train --config=configs/own.py --workdir=runs/mine\n")
    rows = [seed(q, a, **of_seeds) for q, a in seeds]
    write_jsonl(root / "pool/000-seeds.jsonl", rows)
    return [row["id"] for row in rows]


def small(root: Path, changes=None, question="How do fish sleep?", answer="They float and rest without moving.", **of_seeds) -> Path:
    """A finished run of one iteration and four requests: two kept, a question and an answer rejected; judged on two rows."""
    ids = start(root, changes=changes, **of_seeds)
    folder, novel = root / "iterations/01", lambda score, near: [*map(verdict, FILTERS[:2]), verdict("novelty", score <= 0.7, score, near)]
    ok = [verdict("parse"), verdict("min_words", True, 6)]
    write_jsonl(folder / "questions.jsonl", [
        request(0, question, ids[:2], novel(0.6, ids[1])), request(1, "Why is the sea salty?", ids[1:], novel(0.4, "request 0")),
        request(2, "Why is the sky so blue?", ids[:2], novel(0.9, ids[0])),
        request(3, "What makes dough sticky?", ids[2:], novel(0.5, ids[2]))])
    write_jsonl(folder / "answers.jsonl", [
        request(0, question, ids[:1], ok, answer), request(1, "Why is the sea salty?", ids[:1], ok, "Rivers bring salt into it."),
        request(3, "What makes dough sticky?", ids[:1], [verdict("parse"), verdict("min_words", False, 1)], "Water.")])
    rows = [kept(question, answer, ids[:2]), kept("Why is the sea salty?", "Rivers bring salt into it.", ids[1:])]
    write_jsonl(folder / "kept.jsonl", rows)
    write_jsonl(root / "pool/001.jsonl", rows)
    write_jsonl(folder / "rejected.jsonl", [rejected(2, "Why is the sky so blue?", "novelty", 0.9, ids[0]),
                                            rejected(3, "What makes dough sticky?", "min_words", 1, None, "answer", "Water.")])
    write_jsonl(folder / "loss.jsonl", [{"step": s, "rate": 1e-4, "loss_sum": 60.0 / s, "tokens": 20} for s in (1, 2, 3)])
    for t, said in ((0, "No idea, no idea."), (1, "Cold air.")):
        sample = {"question": "Why does ice float?", "reference": "It is lighter than water.", "answer": said, "finish": "eos"}
        write_jsonl(root / f"iterations/{t:02d}/samples.jsonl", [sample])
    (root / "iterations/00/DONE").write_text('{"iteration": 0, "held_out": 2.5}')
    summary = {"iteration": 1, "requests": 4, "kept": 2, "pool": 5, "held_out": 2.25, "probe": {"rougeL": 0.3, "right": 0.5},
               "funnel": {"requests": 4, "questions": 3, "pairs": 2, "rejected": {"question novelty": 1, "answer min_words": 1}}}
    (folder / "DONE").write_text(json.dumps(summary))
    cost = {"kind": "cost", "iteration": 1, "compile_seconds": 0.5, "prefilled": 100, "generated": 20, "trained": 0, "peak_gib": 1.5}
    write_jsonl(root / "metrics.jsonl", [{**cost, "stage": "questions", "seconds": 2.0}, {**cost, "stage": "questions", "seconds": 1.5},
                                         {"kind": "iteration", **summary},
                                         {"kind": "stop", "iteration": 1, "reason": "stop.iterations=1 reached"}])
    return judge(root)


def judge(root: Path) -> Path:
    """An evaluation on two rows, with answers, in the folder of a run."""
    quantity = lambda value: {"name": "rougeL", "label": "ROUGE-L", "value": value, "low": value - 0.1, "high": value + 0.1, "rows": 2}
    arms = {"base": (0.2, ["It is ice.", "Yes."]), "isara": (0.4, ["Ice is light.", "No, they cannot."])}
    folder = root / "evaluation/dev"
    write_jsonl(folder / "items.jsonl", [{"id": "e1", "question": "Why is ice light?", "answer": "Its crystals are loose.", "kind": ""},
                                         {"id": "e2", "question": "Can pigs fly?", "answer": "", "kind": ""}])
    for name, (_, answers) in arms.items():
        write_jsonl(folder / f"{name}.plain-1.jsonl", [{"id": i, "answer": a, "rougeL": 0.3} for i, a in zip(("e1", "e2"), answers)])
    made = {"benchmark": "misconceptions", "note": "ours", "split": "dev", "rows": 2, "label": "", "primary": "rougeL", "iteration": 1,
            "model": "smollm2-135m-instruct", "dtype": "float32", "seed": 0,
            "arms": [{"arm": n, "form": "plain", "judged": True, "file": f"{n}.plain-1.jsonl", "quantities": [quantity(v)]}
                     for n, (v, _) in arms.items()],
            "verdict": {"primary": "rougeL", "label": "ROUGE-L", "better": 1, "alpha": 0.05, "control": None, "comparisons": [
                {"baseline": "base", "said": "not distinguishable with 2 rows", "difference": 0.2, "low": -0.1, "high": 0.5, "p": 0.5,
                 "p_adjusted": 0.5, "detectable": 0.6, "groups": 2, "rows": 2}]},
            "sentences": ["against base: not distinguishable with 2 rows; ROUGE-L +20.0 points", "2 rows cannot give a p under 0.5"],
            "yield": 0.5, "scaling_ratio": 0.7}
    (folder / "results.json").write_text(json.dumps(made))
    return root


def large(root: Path, pairs: int, words: int = 30) -> Path:
    """A run that kept so many pairs in 5 iterations, each with 10 exemplars and 11 verdicts, and rejected half as many."""
    random_ = random.Random(0)
    lexicon = ["".join(random_.choices("abcdefghijklmnopqrstuvwxyz", k=random_.randint(2, 9))) for _ in range(4000)]
    text = lambda n: " ".join(random_.choices(lexicon, k=n)).capitalize()
    ids = start(root, [(text(10) + "?", text(words)) for _ in range(64)])
    for t in range(1, 6):
        questions, answers, made, thrown = [], [], [], []
        for n in range(pairs // 5 * 3 // 2):
            question, shots, score = text(10) + "?", random_.sample(ids, 5), round(random_.random(), 6)
            seen = [*map(verdict, FILTERS), verdict("novelty", n % 3 > 0, score, random_.choice(ids))]
            questions.append(request(n, question, shots, seen))
            if n % 3:
                answer = text(words)
                answers.append(request(n, question, shots, [verdict(f, True, 12) for f in FILTERS], answer))
                made.append(kept(question, answer, shots, t) | {"answer_exemplars": random_.sample(ids, 5)})
            else:
                thrown.append(rejected(n, question, "novelty", score, random_.choice(ids)))
        for name, rows in (("questions", questions), ("answers", answers), ("kept", made), ("rejected", thrown)):
            write_jsonl(root / f"iterations/{t:02d}/{name}.jsonl", rows)
        write_jsonl(root / f"pool/{t:03d}.jsonl", made)
        (root / f"iterations/{t:02d}/DONE").write_text(json.dumps({"iteration": t, "requests": len(questions), "kept": len(made)}))
        ids += [row["id"] for row in made]
    return root
