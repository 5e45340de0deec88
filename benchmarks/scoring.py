"""How fast multiple choice is scored: isara_jax's `LM.score` against lm-evaluation-harness's `hf` model, the same requests on the same CPU.

    pip install lm_eval==0.4.13 torch
    python benchmarks/scoring.py --data=FOLDER [--rows=200] >> benchmarks/RESULTS.md

FOLDER holds TruthfulQA's mc_task.json, or has it in a folder truthfulqa/. The requests are those of the tasks truthfulqa_mc1 and
truthfulqa_mc2 of lm-evaluation-harness 0.4.13, both for every row, in the form they are published in (six pairs before the question, the
primer) and without them (plain). Both sides get strings and tokenise them within the time measured; both multiply in float32. An item is a
row. One side runs after the other. Compilation (ours) and loading are not in the figures; the first call, which compiles, is printed beside
them. The result, in Markdown, goes to stdout, all else to stderr.
"""
from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MODEL = "smollm2-135m-instruct"
BATCHES = (1, 2, 4, 8, 16, 32)  # batch sizes the peer may choose from, by a trial on its first requests
PASSES = {"ours": 3, "peer": 1}
TOLERANCE = 1e-3                # nats between the two sides, on the sum over a continuation


def requests_of(rows: list[dict], before: str) -> list[tuple[str, str]]:
    """(context, continuation) of every choice of every row, mc1's and then mc2's, as truthfulqa_mc1.yaml spells them behind `before`."""
    return [(f"{before}Q: {row['question']}\nA:", " " + choice)
            for row in rows for key in ("mc1_targets", "mc2_targets") for choice in row[key]]


def timed(work) -> tuple[float, float, list[float]]:
    """(seconds, CPU seconds of this process, what `work` gave)."""
    wall, cpu = time.perf_counter(), time.process_time()
    made = work()
    return time.perf_counter() - wall, time.process_time() - cpu, made


def median_pass(work, passes: int) -> dict:
    made = [timed(work) for _ in range(passes)]
    return {"seconds": statistics.median(m[0] for m in made), "cpu": statistics.median(m[1] for m in made), "values": made[-1][2]}


# --------------------------------------------------------------------------------------------------------------------------- ours
def ours(lm, requests: list[tuple[str, str]]) -> dict:
    """Our figures, and the floor: the seconds that the products which cannot be saved take at the speed of large ones, here and now."""
    from isara_jax import preflight
    from isara_jax.decode.score import TOKENS, plan

    prompts, continuations = zip(*requests)
    first = timed(lambda: lm.score(prompts, continuations))[0]
    speed = preflight.measure_speed("float32")
    made = median_pass(lambda: lm.score(prompts, continuations), PASSES["ours"])
    speed = max(speed, preflight.measure_speed("float32"))  # the faster one: the floor is not to look high because of other work
    planned, cfg = plan([lm.tokenizer.encode_pair(*r) for r in requests], TOKENS["cpu"]), lm.cfg
    body = cfg.n_layers * cfg.d_model * (2 * cfg.n_heads * cfg.head_dim + 2 * cfg.n_kv_heads * cfg.head_dim + 3 * cfg.d_ff)
    seen = sum(range(1, len(planned.prefix) + 1)) + sum(int(tree.positions.sum()) + len(tree.positions) for tree in planned.trees)
    head, attention = cfg.d_model * cfg.vocab_size, cfg.n_layers * 2 * cfg.n_heads * cfg.head_dim
    flops = 2 * (body * planned.tokens + head * planned.heads + attention * seen)
    return made | {"first": first, "speed": speed, "floor": flops / speed / 1e9, "tokens": planned.tokens, "heads": planned.heads,
                   "prefix": len(planned.prefix)}


# --------------------------------------------------------------------------------------------------------------------------- peer
def peer(folder: Path) -> None:
    """In a process of its own: reads requests.json of the folder, writes results.json beside it."""
    import jinja2
    import lm_eval
    import torch
    import yaml
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    asked = json.loads((folder / "requests.json").read_text())
    task = yaml.safe_load((Path(lm_eval.__file__).parent / "tasks/truthfulqa/truthfulqa_mc1.yaml").read_text())
    published = [jinja2.Template(task["doc_to_text"]).render(question=question) for question in asked["questions"]]
    if published != list(dict.fromkeys(context for context, _ in asked["forms"]["primer"])):
        raise SystemExit("the contexts are not those of truthfulqa_mc1.yaml")
    seconds, _, model = timed(lambda: HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=1))
    results: dict = {"threads": torch.get_num_threads(), "torch": torch.__version__, "load": seconds, "forms": {}}
    for form, requests in asked["forms"].items():
        instances = [Instance("loglikelihood", {}, (context, continuation), i) for i, (context, continuation) in enumerate(requests)]
        run = lambda some: [value for value, _ in model.loglikelihood(some, disable_tqdm=True)]
        subset, trials = instances[:asked["subset"][form]], {}
        run(subset[:8])
        for model.batch_size_per_gpu in BATCHES:
            seconds = trials[model.batch_size_per_gpu] = timed(lambda: run(subset))[0]
            print(f"peer, {form}: batch {model.batch_size_per_gpu}: {seconds:.1f} s on {len(subset)} requests", file=sys.stderr)
        model.batch_size_per_gpu = min(trials, key=trials.get)
        results["forms"][form] = median_pass(lambda: run(instances), PASSES["peer"]) | {"batch": model.batch_size_per_gpu, "trials": trials}
    (folder / "results.json").write_text(json.dumps(results))


# ------------------------------------------------------------------------------------------------------------------------- report
def main(data: Path, count: int) -> None:
    import jax

    from isara_jax import export, preflight
    from isara_jax import lm as lm_lib
    from isara_jax.evals.forms import PRIMER

    file = next(f for f in (data / "mc_task.json", data / "truthfulqa" / "mc_task.json") if f.exists())
    rows = json.loads(file.read_text(encoding="utf-8"))[:count]
    primer = "".join(f"Q: {e.question}\nA: {e.answer}\n\n" for e in PRIMER)
    forms = {"primer": requests_of(rows, primer), "plain": requests_of(rows, "")}
    lm = lm_lib.load(MODEL, dtype="float32")
    mine = {}
    for form, requests in forms.items():
        mine[form] = ours(lm, requests)
        print(f"ours, {form}: {mine[form]['seconds']:.1f} s", file=sys.stderr)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "model"
        export.export(folder, model=MODEL, say=lambda line: None)
        asked = {"questions": list(dict.fromkeys(row["question"] for row in rows)), "forms": forms,
                 "subset": {"primer": len(requests_of(rows[:4], "")), "plain": len(requests_of(rows[:24], ""))}}
        (folder / "requests.json").write_text(json.dumps(asked))
        offline = {**os.environ, "HF_HUB_OFFLINE": "1"}
        subprocess.run([sys.executable, __file__, f"--peer={folder}"], check=True, stdout=sys.stderr, env=offline)
        theirs = json.loads((folder / "results.json").read_text())
    flags = " ".join(f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f in preflight.cpu_flags()) or "no avx2"
    print(f"\n## scoring.py --rows={len(rows)}\n\n"
          f"`python benchmarks/scoring.py --data=$ISARA_TEST_DATA --rows={len(rows)}`: {MODEL}, float32, {len(rows)} rows of TruthfulQA, "
          f"{len(forms['plain'])} requests a form. {os.cpu_count()} cores, {flags}; load average at the end {os.getloadavg()[0]:.1f}; "
          f"jax {jax.__version__}, torch {theirs['torch']} with {theirs['threads']} threads, lm_eval 0.4.13. Passes: {PASSES['ours']} "
          f"(median) of ours, {PASSES['peer']} of theirs.\n\n"
          "| form | ours items/s | lm_eval items/s | ratio | ratio of CPU time | largest difference | floor s | share of floor | "
          "first call s |\n|---|---|---|---|---|---|---|---|---|")
    worst, notes = 0.0, ""
    for form, a in mine.items():
        b = theirs["forms"][form]
        difference = max(abs(x - y) for x, y in zip(a["values"], b["values"], strict=True))
        worst = max(worst, difference)
        print(f"| {form} | {len(rows) / a['seconds']:.2f} | {len(rows) / b['seconds']:.3f} | {b['seconds'] / a['seconds']:.1f} | "
              f"{b['cpu'] / a['cpu']:.1f} | {difference:.1e} | {a['floor']:.2f} | {a['floor'] / a['seconds']:.0%} | {a['first']:.1f} |")
        tried = ", ".join(f"{size}: {seconds:.1f} s" for size, seconds in b["trials"].items())
        notes += (f"* {form}: ours {a['seconds']:.2f} s ({a['cpu']:.2f} CPU s; {a['tokens']} tokens through the layers, {a['heads']} "
                  f"through the head, prefix {a['prefix']}; large products {a['speed']:.0f} GF/s); lm_eval {b['seconds']:.1f} s "
                  f"({b['cpu']:.1f} CPU s), batch {b['batch']} (tried {tried}).\n")
    print(f"\n{notes}", end="")
    if worst > TOLERANCE:
        raise SystemExit(f"the two sides differ by {worst:.1e} nats, more than {TOLERANCE}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder with mc_task.json")
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--peer", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    peer(args.peer) if args.peer else main(args.data, args.rows)
