"""The sides that sampling.py compares, and their prompts: our sampler, transformers' `generate`, llama.cpp's llama-batched-bench.

A side of the first two kinds is a process of its own, so that its peak memory is its own. `serve` loads, runs once, and writes a line of
JSON; then for each line that it reads it runs again and writes another. Between two lines it waits, so that sides can take turns on the
same cores.
"""
from __future__ import annotations

import dataclasses
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MODEL = "smollm2-135m-instruct"
DRAW = {"temperature": 0.7, "top_p": 0.95}
BATCHES, MICRO_BATCHES = (16, 32, 64), (256, 512, 1024, 2048)  # of transformers and of llama.cpp; the quickest of each is taken
ISARA_BATCH = 32   # of transformers on ISARA's prompts
SHOTS = 3         # pairs in ISARA's prompts: so many of the embedded seeds make about 150 tokens
PROBED = 17        # tokens drawn to find out how long a step of transformers takes

WHO = "Hana Bruno Ines Yusuf Clara Otto Priya Emil Nora Felix Aisha Jonas".split()
PLACES = "the harbour,the old mill,the town hall,the north gate,the palm house,the railway bridge,the school,the lighthouse".split(",")
GOODS = "letters,loaves of bread,bicycle tyres,flower pots,library books,bottles of milk,bags of flour,wooden chairs".split(",")


# ------------------------------------------------------------------------------------------------------------------------ prompts
def _asked(rng: random.Random, asides: int) -> tuple[str, str]:
    """(question, answer) about a delivery, with so many sentences that do not matter to it."""
    who, (start, end), goods = rng.choice(WHO), rng.sample(PLACES, 2), rng.choice(GOODS)
    hour, minute, takes, stop = rng.randint(6, 19), 5 * rng.randint(0, 11), rng.randint(11, 58), rng.randint(2, 15)
    text = (f"{who} leaves {start} at {hour}:{minute:02} with {rng.randint(4, 70)} {goods} and rides {takes} minutes to {end}, "
            f"resting {stop} on the way.")
    for _ in range(asides):
        weather, place, sold = rng.choice(("mild", "wet", "windy", "clear")), rng.choice(PLACES), rng.choice(GOODS)
        text += f" The weather is {weather}, and near {place} a few {sold} are for sale."
    away, total = takes + stop, hour * 60 + minute + takes + stop
    return (f"{text} When does {who} arrive?",
            f"The ride takes {takes} minutes and the rest {stop}, so {away} in all. {who} arrives at {total // 60}:{total % 60:02}.")


def few_shot(encode, rng: random.Random, count: int) -> list[list[int]]:
    """Prompts of 300 to 700 tokens that share next to nothing."""
    prompts: list[list[int]] = []
    while len(prompts) < count:
        pairs = [_asked(rng, rng.choice((0, 0, 1))) for _ in range(rng.randint(3, 7))]
        shots = "".join(f"Question: {q}\nAnswer: {a}\n\n" for q, a in pairs)
        ids = encode(f"{shots}Question: {_asked(rng, rng.choice((0, 1)))[0]}\nAnswer:")
        if 300 <= len(ids) <= 700:
            prompts.append(ids)
    return prompts


def shared_prefix(encode, rng: random.Random, count: int) -> tuple[list[int], list[list[int]]]:
    """A prefix of 514 tokens and suffixes of 36 to 81."""
    prefix: list[int] = []
    while len(prefix) < 514:
        prefix += encode("Question: {}\nAnswer: {}\n\n".format(*_asked(rng, rng.choice((0, 1)))))
    prefix = prefix[:514]
    suffixes: list[list[int]] = []
    while len(suffixes) < count:
        ids = encode(f"Question: {_asked(rng, rng.choice((0, 1)))[0]}\nAnswer:")
        if 36 <= len(ids) <= 81:
            suffixes.append(ids)
    return prefix, suffixes


def isara_stages(encode, rng: random.Random, seeds: list[dict], count: int) -> list[dict]:
    """The two generation stages of an iteration: an anchor's prompt holds other pairs, drawn at random in place of the nearest."""
    questions, answers = [], []
    for i in range(count):
        anchor = seeds[i % len(seeds)]
        shots = rng.sample([pair for pair in seeds if pair is not anchor], SHOTS)
        header = "".join(f"Q: {pair['question']}\nA: {pair['answer']}\n\n" for pair in shots)
        questions.append(encode(f"{header}Q:"))
        answers.append(encode(f"{header}Q: {anchor['question']}\nA:"))
    return [_stage("questions", questions, 48, stop=["\n"]), _stage("answers", answers, 96, stop=["\n\n", "\nQ:"])]


def _stage(name: str, prompts: list[list[int]], new: int, *, stop: list[str] | None = None, n: int = 1) -> dict:
    """What one call of a sampler is to do. Without stop strings every text has `new` tokens: end-of-text does not end it."""
    return {"name": name, "prompts": prompts, "new": new, "stop": stop or [], "n": n}


def workload(encode, seeds: list[dict], quick: bool) -> dict[str, list[dict]]:
    """The stages of every part, the same on every machine."""
    rng, count, new = random.Random(7), 8 if quick else 64, 8 if quick else 128
    prompts = few_shot(encode, rng, count)
    prefix, suffixes = shared_prefix(encode, rng, count)
    return {"separate": [_stage("separate", prompts, new)],
            "shared": [_stage("shared", [prefix + s for s in suffixes], new) | {"prefix": len(prefix)}],
            "samples": [_stage("samples", prompts[:max(4, count // 2)], 16, n=4)],
            "isara": isara_stages(encode, rng, seeds, 16 if quick else 192),
            "shapes": isara_stages(encode, rng, seeds, 8 if quick else 500)}


# ----------------------------------------------------------------------------------------------------------------------- protocol
def serve(load) -> None:
    """Be a side: `load()` gives (what to say at first, a function that does the work once and says what it did)."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints is not to stand among the lines
    first, work = load()
    say = lambda line: print(json.dumps(line), file=out, flush=True)
    say(first | timed(work))
    for _ in sys.stdin:
        say(timed(work))


def timed(work) -> dict:
    wall, cpu = time.perf_counter(), time.process_time()
    made = work()
    return made | {"seconds": time.perf_counter() - wall, "cpu": time.process_time() - cpu, "peak": peak()}


def peak() -> float:
    """GiB of the most resident memory of this process; ru_maxrss would hold what the parent had when it started this one."""
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))[1]) / 2**20


# --------------------------------------------------------------------------------------------------------------------------- ours
def run(lm, stage: dict, share: bool = True):
    """(completions, counts) of a stage; `lm` is prepared. Requests differ in their address, nothing else."""
    from isara_jax.common import address
    from isara_jax.decode.generate import generate
    from isara_jax.decode.requests import Request

    requests = [Request(tuple(prompt), address("benchmark", stage["name"], i, j), stage["new"], **DRAW, stop=tuple(stage["stop"]),
                        ignore_eos=not stage["stop"]) for i, prompt in enumerate(stage["prompts"]) for j in range(stage["n"])]
    counts: list = []
    made = generate(lm.params, lm.cfg, lm.engine, lm.mesh, requests, seed=0, stop_ids=lm.tokenizer.stop_ids, context=lm.context,
                    decode=lm.tokenizer.decode, share=share, on_end=counts.append)
    return made, counts[0]


def ours(stages: list[dict], dtype: str, share: bool):
    """What `serve` loads for our sampler. Weights are cast before, as they are once an iteration. A repeat must draw the same tokens."""
    from isara_jax import lm as lm_lib

    start = time.perf_counter()
    lm, known = lm_lib.load(MODEL, dtype).prepared(), []
    cfg = lm.cfg
    body = cfg.n_layers * cfg.d_model * (2 * cfg.n_heads * cfg.head_dim + 2 * cfg.n_kv_heads * cfg.head_dim + 3 * cfg.d_ff)
    shape = {"body": body, "head": cfg.d_model * cfg.vocab_size, "pair": 4 * cfg.n_layers * cfg.n_heads * cfg.head_dim,
             "keys": 2 * cfg.n_layers * cfg.n_kv_heads * cfg.head_dim}

    def work() -> dict:
        made, counts = zip(*(run(lm, stage, share) for stage in stages))
        known.append([[c.ids for c in completions] for completions in made])
        if known[-1] != known[0]:
            raise SystemExit("the same requests drew other tokens the second time")
        drawn = [[len(c.ids) + (c.finish != "length") for c in completions] for completions in made]
        return {"tokens": sum(map(sum, drawn)), "counts": [dataclasses.asdict(c) for c in counts], "drawn": drawn}

    return {"load": time.perf_counter() - start, "engine": dataclasses.asdict(lm.engine), "shape": shape}, work


def precision(stage: dict, rows: int) -> dict:
    """KL(float32 || bfloat16) in nats of the next-token distributions at all positions of some prompts of a stage, and equal argmax."""
    import numpy as np

    from isara_jax import lm as lm_lib

    exact, rounded = (lm_lib.load(MODEL, dtype).prepared() for dtype in ("float32", "bfloat16"))
    found, same = [], []
    for prompt in random.Random(3).sample(stage["prompts"], min(rows, len(stage["prompts"]))):
        logits = (lm.logits([prompt])[0].astype(np.float64) for lm in (exact, rounded))
        p, q = (x - np.logaddexp.reduce(x, axis=-1, keepdims=True) for x in logits)
        found.append((np.exp(p) * (p - q)).sum(axis=-1))
        same.append(p.argmax(axis=-1) == q.argmax(axis=-1))
    values = np.concatenate(found)
    return {"positions": len(values), "prompts": len(found), "mean": values.mean(), "median": np.median(values),
            "p99": np.quantile(values, 0.99), "largest": values.max(), "same": np.concatenate(same).mean()}


def shapes(stages: list[dict], dtype: str) -> dict:
    """Of the texts that the default engine makes, how many another engine makes otherwise."""
    from isara_jax import lm as lm_lib

    lm, changes = lm_lib.load(MODEL, dtype).prepared(), ({"slots": 32}, {"chunk": 128})
    engines = (lm, *(lm.with_engine(**change) for change in changes))
    texts = [[c.text for stage in stages for c in run(other, stage)[0]] for other in engines]
    names = [" ".join(f"{key}={value}" for key, value in change.items()) for change in changes]
    return {"requests": len(texts[0]), "engine": f"slots={lm.engine.slots}, chunk={lm.engine.chunk}",
            "changed": [[name, sum(a != b for a, b in zip(texts[0], made))] for name, made in zip(names, texts[1:])]}


def machine(dtype: str) -> dict:
    """What this machine does at its best, here and now: GFLOP/s of a product, GB/s read or copied; of all devices together."""
    import jax
    import jax.numpy as jnp

    from isara_jax import preflight

    dtype, _ = preflight.choose_dtype(dtype, jax.devices())

    def quickest(work, *arguments) -> float:
        jax.block_until_ready(work(*arguments))
        found, end = [], time.perf_counter() + 1
        while len(found) < 3 or time.perf_counter() < end:
            start = time.perf_counter()
            jax.block_until_ready(work(*arguments))
            found.append(time.perf_counter() - start)
        return min(found)

    on_cpu = jax.default_backend() == "cpu"
    product = jax.jit(lambda a, b: jax.lax.dot_general(a, b, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32))
    sizes = [(512, 1024, 1024), (512, 576, 1536), (2048, 576, 1536), (1024, 2048, 2048)]
    if not on_cpu:
        sizes = [(8192, 8192, 8192), (16384, 8192, 8192)]
    flops = [2 * m * k * n / quickest(product, jnp.ones((m, k), dtype), jnp.ones((k, n), dtype)) for m, k, n in sizes]
    data = jnp.ones((64, 2**20 if on_cpu else 2**24), jnp.float32)
    moved = [data.nbytes / quickest(jax.jit(lambda x: x.sum(axis=1)), data), 2 * data.nbytes / quickest(jax.jit(lambda x: x + 1), data)]
    devices = 1 if on_cpu else jax.device_count()
    return {"dtype": dtype, "backend": jax.default_backend(), "kind": jax.devices()[0].device_kind, "devices": jax.device_count(),
            "jax": jax.__version__, "gflops": devices * max(flops) / 1e9, "gbytes": devices * max(moved) / 1e9}


def prepare(folder: Path, quick: bool, exported: bool) -> dict:
    """Write workload.json, and where wanted the model as a folder that transformers reads; gives the GGUF file."""
    from isara_jax import export
    from isara_jax import lm as lm_lib

    blueprint = lm_lib.describe(MODEL)
    lines = (Path(__file__).parent.parent / "configs" / "data" / "misconceptions.jsonl").read_text(encoding="utf-8").splitlines()
    (folder / "workload.json").write_text(json.dumps(workload(blueprint.tokenizer.encode, [json.loads(line) for line in lines], quick)))
    if exported:
        export.export(folder / "model", model=MODEL, say=lambda line: None)
    return {"gguf": str(blueprint.source.path)}


# --------------------------------------------------------------------------------------------------------------------------- peers
def transformers(stages: list[dict], dtype: str, folder: Path, batches: list[int]):
    """What `serve` loads for transformers' `generate`: sorted by length, padded on the left, in the batch size a trial finds quickest."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, StoppingCriteria, StopStringCriteria
    from transformers import __version__ as version
    from transformers.utils import logging

    logging.disable_progress_bar()
    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    tokenizer, eos, load = AutoTokenizer.from_pretrained(folder), model.config.eos_token_id, time.perf_counter() - start

    class Stamps(list, StoppingCriteria):
        """The time of every step; ends nothing."""

        def __call__(self, ids, scores, **rest):
            self.append(time.perf_counter())
            return torch.zeros(len(ids), dtype=torch.bool)

    def once(prompts: list[list[int]], new: int, **how) -> list[list[int]]:
        """The tokens drawn for prompts that make one batch."""
        width = max(map(len, prompts))
        ids, mask = torch.full((len(prompts), width), eos), torch.zeros((len(prompts), width), dtype=torch.long)
        for i, prompt in enumerate(prompts):
            ids[i, width - len(prompt):], mask[i, width - len(prompt):] = torch.tensor(prompt), 1
        with torch.inference_mode():
            made = model.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=True, **DRAW, top_k=0, pad_token_id=eos, **how)
        return made[:, width:].tolist()

    def batched(stage: dict, size: int) -> list[list[list[int]]]:
        ordered = sorted(stage["prompts"], key=len)
        return [ordered[b:b + size] for b in range(0, len(ordered), size)]

    def trial(size: int) -> float:
        """Seconds that the first stage would take: prefill as measured, and all its steps as long as the first few were."""
        seconds, stage = 0.0, stages[0]
        for prompts in batched(stage, size):
            drawn, began = min(PROBED, stage["new"]), time.perf_counter()
            stamps = Stamps()
            once(prompts, drawn, min_new_tokens=drawn, stopping_criteria=[stamps])
            seconds += stamps[0] - began + (stamps[-1] - stamps[0]) / max(1, drawn - 1) * (stage["new"] - 1)
        return seconds

    def work() -> dict:
        tokens = 0
        for stage in stages:
            how = ({"stopping_criteria": [StopStringCriteria(tokenizer, stage["stop"])], "eos_token_id": eos} if stage["stop"]
                   else {"min_new_tokens": stage["new"]})
            for prompts in batched(stage, size):
                for row in once(prompts, stage["new"], **how):
                    row = row[:row.index(eos)] if stage["stop"] and eos in row else row  # a row that ended is padded with it
                    tokens += len(row)
                    if stage["stop"]:
                        tokenizer.decode(row)
        return {"tokens": tokens}

    trials = {size: trial(size) for size in batches} if len(batches) > 1 else {}
    size = min(trials, key=trials.get) if trials else batches[0]
    return {"load": load, "batch": size, "trials": trials, "versions": f"torch {torch.__version__} with {torch.get_num_threads()} threads, "
            f"transformers {version}"}, work


def llama_model(build: Path, gguf: str, dtype: str, folder: Path) -> Path:
    """The GGUF file in the type that the others multiply in."""
    kind, quantize = {"bfloat16": "BF16", "float32": "F32"}[dtype], _program(build, "llama-quantize")
    subprocess.run([quantize, "--allow-requantize", gguf, folder / f"{kind}.gguf", kind], check=True, capture_output=True)
    return folder / f"{kind}.gguf"


def llama(build: Path, model: Path, *, prompt: int, new: int, rows: int, micro_batch: int, shared: bool) -> dict:
    """A run of llama-batched-bench, which draws no tokens: it feeds random ones. CPU seconds are with loading and its warm-up."""
    room = -(-(prompt + new) // 256) * 256
    command = [str(word) for word in (
        _program(build, "llama-batched-bench"), "-m", model, "-c", rows * room, "-b", 2048, "-ub", micro_batch, "-npp", prompt, "-ntg", new,
        "-npl", rows, "-t", os.cpu_count(), "-no-kvu", "--output-format", "jsonl", *(["-pps"] if shared else []))]
    with tempfile.TemporaryFile() as out, subprocess.Popen(command, stdout=out, stderr=subprocess.DEVNULL) as process:
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        lines = [line for line in out.read().decode().splitlines() if line.startswith("{")]
    if process.returncode or not lines:
        raise SystemExit(f"llama-batched-bench ended with code {process.returncode} and no result: {' '.join(command)}")
    made = json.loads(lines[-1])
    return {"seconds": made["t_pp"] + made["t_tg"], "cpu": used.ru_utime + used.ru_stime, "peak": used.ru_maxrss / 2**20,
            "tokens": rows * new, "prefill": made["speed_pp"]}


def _program(build: Path, name: str) -> str:
    found = next((path for path in sorted(build.rglob(name)) if path.is_file() and os.access(path, os.X_OK)), None)
    if found is None:
        raise SystemExit(f"--llama={build}: no program {name} lies below this folder; name the build folder of llama.cpp.")
    return str(found)
