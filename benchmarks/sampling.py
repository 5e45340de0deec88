"""How fast text is sampled: `decode.generate` against transformers and llama.cpp, the same prompts and weights on the same cores.

    pip install torch
    python benchmarks/sampling.py [--dtype=bfloat16] [--llama=FOLDER] [--repeats=3] [--only=separate,isara] [--quick]

Parts:
    separate   64 prompts of 300 to 700 tokens that share next to nothing, 128 new tokens each
    shared     64 prompts that begin with the same 514 tokens, 128 new tokens each
    isara      the two stages of an iteration of 192 requests: about 150 tokens in, stop strings and end-of-text on
    samples    n = 4 texts of 16 tokens for each of 32 of the first part's prompts
    precision  how far bfloat16's next-token distributions are from float32's
    shapes     how many of 1,000 texts another engine shape changes; long, and run only where --only names it

All draw at temperature 0.7 with top-p 0.95. "Ours, apart" is our sampler with sharing off. The sides of a part are processes of their own
that take turns, one run each, --repeats times: seconds are medians, ratios are medians of the ratios of runs side by side. The first call
of a side of ours, which compiles (no compiled program is kept), stands apart; loading is in no seconds. transformers takes the quickest of
three batch sizes (on ISARA's prompts 32), llama.cpp (FOLDER holds a build with llama-batched-bench and llama-quantize) the quickest of four
micro-batches. On an accelerator our side runs alone.

The floor is the time that the products and reads which cannot be saved take at the machine's best, measured before and after: each distinct
beginning is prefilled once, and each decode step takes the longer of its products and of reading weights and distinct keys. The result is
printed and, but for --quick, becomes the section of its heading in RESULTS.md.
"""
from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import sampling_peers as sides

from isara_jax import preflight
from isara_jax.common import atomic_write

RESULTS = Path(__file__).parent / "RESULTS.md"
TRIED = 16  # rows, and new tokens of each, on which llama.cpp's micro-batch is chosen
PARTS = ("separate", "shared", "isara", "samples", "precision", "shapes")
COLUMNS = {"bfloat16": 0, "float32": 1}
ASKED = {  # of each part and other side the least ratio and the one aimed at, in bfloat16 where the CPU has it and in float32 where not
    ("separate", "transformers"): ("2.1 / 3", "1.3 / 2"), ("separate", "llama.cpp"): ("0.9 / 1.2", "0.8 / 1.1"),
    ("shared", "llama.cpp"): ("1.1 / 1.6", "0.9 / 1.4"), ("shared", "ours, apart"): ("2 / 3", "2 / 3"),
    ("isara", "transformers"): ("2 / 4", "1.4 / 2.5"), ("samples", "ours, apart"): ("2.5", "2.5")}
ASKED_SHARE, ASKED_PEAK, ASKED_BUSY = ("- / 50 %", "- / 60 %"), ("3.2 / 2.5", "4.5 / 3.5"), "75 / 85 %"


@dataclass
class Side:
    """A row of the table.

    Attributes:
        name: "ours", "ours, apart", "transformers" or "llama.cpp".
        first: what it said when it was ready, with its first run.
        runs: what it said of each run after that: seconds, cpu (seconds), tokens (drawn), peak (GiB).
    """

    name: str
    first: dict
    runs: list[dict]

    def median(self, key: str) -> float:
        return statistics.median(run[key] for run in self.runs)


# -------------------------------------------------------------------------------------------------------------------------- sides
class Process:
    """A side of `sides.serve`, started and ready."""

    def __init__(self, name: str, part: str, folder: Path, dtype: str, batches: str = ""):
        command = [sys.executable, __file__, f"--side={name}", f"--part={part}", f"--folder={folder}", f"--dtype={dtype}",
                   f"--batches={batches}"]
        env = {**os.environ, "HF_HUB_OFFLINE": "1", "ISARA_NO_COMPILATION_CACHE": "1"}
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
        self.side = Side(name, self._read(), [])

    def go(self) -> None:
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        self.side.runs.append(self._read())

    def end(self) -> None:
        self.process.stdin.close()
        if self.process.wait():
            raise SystemExit(f"{self.side.name} ended with code {self.process.returncode}")

    def _read(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"a side ended with code {self.process.wait()}; what it said stands above")
        return json.loads(line)


class Llama:
    """llama.cpp on the shape of a part, at the micro-batch that a trial found quickest. What it cannot prefill counts at its own rate."""

    def __init__(self, stage: dict, build: Path, model: Path, micro_batches: tuple[int, ...]):
        lengths = [len(prompt) for prompt in stage["prompts"]]
        shared = stage.get("prefix", 0)
        self.missing = sum(lengths) - len(lengths) * shared if shared else 0
        self.how = {"build": build, "model": model, "prompt": shared or round(statistics.mean(lengths)), "new": stage["new"],
                    "rows": len(lengths), "shared": bool(shared)}
        trials = {size: self._run(size, rows=min(TRIED, len(lengths)), new=TRIED) for size in micro_batches}
        self.best = min(trials, key=lambda size: trials[size]["seconds"])
        self.side = Side("llama.cpp", {"batch": self.best, "trials": {size: made["seconds"] for size, made in trials.items()}}, [])

    def go(self) -> None:
        self.side.runs.append(self._run(self.best))

    def end(self) -> None:
        pass

    def _run(self, size: int, **instead: int) -> dict:
        made = sides.llama(micro_batch=size, **self.how | instead)
        return made | {"seconds": made["seconds"] + self.missing / made["prefill"]}


def measure(part: str, stages: list[dict], args, folder: Path, llama_model: Path | None, peers: bool) -> list[Side]:
    """The sides of a part, taking turns."""
    running: list = []
    try:
        running.append(Process("ours", part, folder, args.dtype))
        if part in ("shared", "samples"):
            running.append(Process("ours, apart", part, folder, args.dtype))
        if peers and part in ("separate", "isara"):
            sizes = [sides.ISARA_BATCH] if part == "isara" else sorted({min(size, len(stages[0]["prompts"])) for size in sides.BATCHES})
            running.append(Process("transformers", part, folder, args.dtype, ",".join(map(str, sizes))))
        if llama_model and part in ("separate", "shared"):
            running.append(Llama(stages[0], args.llama, llama_model, sides.MICRO_BATCHES[1:2] if args.quick else sides.MICRO_BATCHES))
        for _ in range(args.repeats):
            for one in running:
                one.go()
                say(f"{part}: {one.side.name} {one.side.runs[-1]['seconds']:.1f} s")
    finally:
        for one in running:
            one.end()
    return [one.side for one in running]


def once(name: str, folder: Path, args, *flags: str) -> dict:
    """What a side says that has one line to say."""
    command = [sys.executable, __file__, f"--side={name}", f"--folder={folder}", f"--dtype={args.dtype}", *["--quick"][:args.quick], *flags]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1])


def be(args) -> None:
    """In a process of its own: a side."""
    load = lambda: json.loads((args.folder / "workload.json").read_text())
    if args.side in ("ours", "ours, apart"):
        sides.serve(lambda: sides.ours(load()[args.part], args.dtype, args.side == "ours"))
    elif args.side == "transformers":
        batches = [int(n) for n in args.batches.split(",")]
        sides.serve(lambda: sides.transformers(load()[args.part], args.dtype, args.folder / "model", batches))
    else:
        made = {"machine": lambda: sides.machine(args.dtype), "prepare": lambda: sides.prepare(args.folder, args.quick, args.export),
                "precision": lambda: sides.precision(load()["isara"][0], 4 if args.quick else 32),
                "shapes": lambda: sides.shapes(load()["shapes"], args.dtype)}[args.side]()
        print(json.dumps(made))


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


# -------------------------------------------------------------------------------------------------------------------------- floor
def floor(stage: dict, drawn: list[int], shape: dict, engine: dict, machine: dict) -> float:
    """Least seconds of a stage of which request i drew `drawn[i]` tokens.

    Rows that decode together are at most the slots; weights are read for each such group, keys that rows have in common once.
    """
    prompts = [prompt for prompt in stage["prompts"] for _ in range(stage["n"])]
    size, held = {"bfloat16": 2, "float32": 4}[engine["dtype"]], [_beginnings(prompt[:-1]) for prompt in prompts]
    flops, read = machine["gflops"] * 1e9, machine["gbytes"] * 1e9
    distinct = {name: place for names in held for place, name in enumerate(names)}
    seconds = sum(2 * shape["body"] + shape["pair"] * (place + 1) for place in distinct.values()) / flops
    together = min(engine["slots"] * machine["devices"], len(prompts)) / machine["devices"]
    weights, at_work, keys = (shape["body"] + shape["head"]) * size, -1, 0
    for t in range(max(drawn, default=0)):
        rows = [i for i, n in enumerate(drawn) if n > t]
        if len(rows) != at_work:
            at_work, keys = len(rows), len(set().union(*(held[i] for i in rows)))
        seen = sum(len(held[i]) + t + 1 for i in rows)
        products = 2 * len(rows) * (shape["body"] + shape["head"]) + shape["pair"] * seen
        seconds += max(products / flops, (weights * len(rows) / together + shape["keys"] * size * (keys + len(rows) * t)) / read)
    return seconds


def _beginnings(tokens: list[int]) -> list[int]:
    """A number for the text up to each token, equal where texts are equal up to there."""
    names, name = [], 0
    for token in tokens:
        name = hash((name, token))
        names.append(name)
    return names


# ------------------------------------------------------------------------------------------------------------------------- report
def table(part: str, made: list[Side], stages: list[dict], machine: dict, column: int) -> list[str]:
    """A part's rows, and what is to be said of each."""
    mine, rows, notes = made[0], [], []
    for side in made:
        ratio = statistics.median(other["seconds"] / own["seconds"] for other, own in zip(side.runs, mine.runs))
        spread = "{:.2f} to {:.2f}".format(min(run["seconds"] for run in side.runs), max(run["seconds"] for run in side.runs))
        cells = [part, side.name, f"{side.median('seconds'):.2f}", spread, f"{side.median('cpu'):.1f}", f"{side.median('tokens'):.0f}",
                 f"{side.median('tokens') / side.median('seconds'):.0f}", "" if side is mine else f"{ratio:.2f}",
                 ASKED.get((part, side.name), ("", ""))[column], f"{max(run['peak'] for run in side.runs):.2f}"]
        if side.name.startswith("ours"):
            least = sum(floor(stage, drawn, side.first["shape"], side.first["engine"], machine)
                        for stage, drawn in zip(stages, side.first["drawn"]))
            cells += [f"{side.first['seconds']:.1f}", f"{least:.2f}", f"{least / side.median('seconds'):.0%}"]
            notes += [_counted(part, side, i, stage) for i, stage in enumerate(stages)]
        else:
            cells += ["", "", ""]
            notes.append(_chosen(part, side))
        rows.append("| " + " | ".join(cells) + " |")
    if part == "isara":
        counts = {key: sum(c[key] for c in mine.first["counts"]) for key in mine.first["counts"][0]}
        notes.append(f"* isara, the whole iteration: {_busy(counts)}; asked while requests wait: {ASKED_BUSY}.")
    return [*rows, *notes]


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.0%}" if whole else "none"


def _busy(counts: dict) -> str:
    """How many slots had a token to draw."""
    return (f"slots at work while requests waited {_share(counts['busy'], counts['room'])} of {counts['room']} slot-steps, in the tail "
            f"{_share(counts['tail_busy'], counts['tail_room'])} of {counts['tail_room']}")


def _counted(part: str, side: Side, i: int, stage: dict) -> str:
    c = side.first["counts"][i]
    lengths = [len(prompt) for prompt in stage["prompts"]]
    kept, padding = statistics.mean(side.first["drawn"][i]), _share(c["prefill_room"] - c["prefilled"], c["prefill_room"])
    return (f"* {part}, {stage['name']}, {side.name}: {len(lengths) * stage['n']} requests of {min(lengths)} to {max(lengths)} tokens "
            f"(mean {statistics.mean(lengths):.0f}), {kept:.1f} a text kept, {c['generated']} drawn; {c['prefilled']} of "
            f"{c['prompt_tokens']} prompt tokens computed, {padding} of the room in prefills was padding; {c['steps']} steps; {_busy(c)}.")


def _chosen(part: str, side: Side) -> str:
    tried = ", ".join(f"{size}: {seconds:.1f} s" for size, seconds in side.first["trials"].items()) or "none other"
    if side.name == "transformers":
        return f"* {part}, transformers: batch {side.first['batch']} (tried {tried}); {side.first['versions']}."
    missing = " The suffixes count at the rate of that run's own prefill, but never stood in its cache." if part == "shared" else ""
    return (f"* {part}, llama.cpp: micro-batch {side.first['batch']} (tried {tried}). It draws no tokens in this program; all prompts have "
            f"the mean length; keys are held in its default type; CPU seconds are with loading.{missing}")


def tell(found: dict[str, list[Side]], work: dict, args, machine: dict, extra: dict, load: tuple[float, float]) -> str:
    """The section."""
    flags = " ".join(f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f in preflight.cpu_flags()) or "no avx2"
    column = COLUMNS[args.dtype]
    fits = machine["backend"] == "cpu" and (args.dtype == "bfloat16") == bool({"avx512_bf16", "amx_bf16"} & preflight.cpu_flags())
    command = " ".join(["python benchmarks/sampling.py", f"--dtype={args.dtype}", *(["--llama=FOLDER"] if args.llama else []),
                        f"--repeats={args.repeats}", *([f"--only={args.only}"] if args.only else []), *(["--quick"] if args.quick else [])])
    meant = "bfloat16 on a CPU that multiplies it" if not column else "float32 on a CPU with AVX2 only"
    lines = [heading(args), "",
             f"`{command}`: {sides.MODEL}, {args.dtype}. {os.cpu_count()} cores, {flags}; {machine['devices']} x {machine['kind']}; load "
             f"average {load[0]:.1f} at the start and {load[1]:.1f} at the end; jax {machine['jax']}. Best here: products "
             f"{machine['gflops']:.0f} GF/s, memory {machine['gbytes']:.1f} GB/s. Asked (must / goal) is what was set for {meant}"
             f"{'' if fits else ', which this machine is not'}; on separate prompts also of the peak {ASKED_PEAK[column]} GiB and of the "
             f"share of the floor {ASKED_SHARE[column]}.", ""]
    if found:
        head = ["part", "side", "seconds", "from, to", "CPU s", "tokens", "tokens/s", "ours is so many times as fast", "asked", "peak GiB",
                "first call s", "floor s", "share of floor"]
        made = [line for part, these in found.items() for line in table(part, these, work[part], machine, column)]
        lines += ["| " + " | ".join(head) + " |", "|---" * len(head) + "|", *(line for line in made if line[0] == "|"), "",
                  *(line for line in made if line[0] == "*")]
    if k := extra.get("precision"):
        lines.append(f"* precision: KL(float32 || bfloat16) at {k['positions']} positions of {k['prompts']} of ISARA's prompts, nats: mean "
                     f"{k['mean']:.2e}, median {k['median']:.2e}, 99th percentile {k['p99']:.2e}, largest {k['largest']:.2e}; the "
                     f"likeliest token is the same at {k['same']:.2%} of them.")
    if k := extra.get("shapes"):
        lines.append(f"* shapes: of {k['requests']} texts that {k['engine']} makes another shape changes " + ", ".join(
            f"{count} ({count / k['requests']:.1%}) with {change}" for change, count in k["changed"]) + ".")
    return "\n".join(lines) + "\n"


def heading(args) -> str:
    return f"## sampling.py --dtype={args.dtype}" + (f" --only={args.only}" if args.only else "")


def record(section: str) -> None:
    """Put the section in the place of the one of its heading, or at the end."""
    text, first = RESULTS.read_text(encoding="utf-8"), section.splitlines()[0]
    old = re.search(rf"^{re.escape(first)}\n.*?(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    before, after = (text[:old.start()], text[old.end():]) if old else (f"{text.rstrip()}\n\n", "")
    atomic_write(RESULTS, before + section + ("\n" + after if after else ""))


def main(args) -> None:
    asked, before = args.only.split(",") if args.only else [part for part in PARTS if part != "shapes"], os.getloadavg()[0]
    if unknown := set(asked) - set(PARTS):
        raise SystemExit(f"--only={args.only}: {', '.join(sorted(unknown))} is no part; the parts are {', '.join(PARTS)}.")
    with tempfile.TemporaryDirectory() as name:
        folder, found, extra = Path(name), {}, {}
        machine = once("machine", folder, args)
        args.dtype = machine["dtype"]
        peers = machine["backend"] == "cpu" and bool({"separate", "isara"} & set(asked))
        made = once("prepare", folder, args, *(["--export"] if peers else []))
        work = json.loads((folder / "workload.json").read_text())
        with_llama = args.llama and machine["backend"] == "cpu" and {"separate", "shared"} & set(asked)
        llama_model = sides.llama_model(args.llama, made["gguf"], args.dtype, folder) if with_llama else None
        for part in (part for part in PARTS if part in asked):
            if part in work and part != "shapes":
                found[part] = measure(part, work[part], args, folder, llama_model, peers)
            else:
                extra[part] = once(part, folder, args)
        again = once("machine", folder, args)
    machine |= {key: max(machine[key], again[key]) for key in ("gflops", "gbytes")}  # a floor is not to look high because of other work
    section = tell(found, work, args, machine, extra, (before, os.getloadavg()[0]))
    print(section, end="")
    if not args.quick:
        record(section)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=["auto", *COLUMNS], default="auto", help="of all sides; auto is what a run would take here")
    parser.add_argument("--llama", type=Path, help="folder of a llama.cpp build; without it llama.cpp is left out")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each side after its first call")
    parser.add_argument("--only", default="", help=f"parts, with commas between, of: {', '.join(PARTS)}; all but shapes without it")
    parser.add_argument("--quick", action="store_true", help="8 prompts, 8 new tokens: to see that all works; nothing is recorded")
    for hidden in ("--side", "--part", "--batches"):
        parser.add_argument(hidden, default="", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--export", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    be(arguments) if arguments.side else main(arguments)
