"""What models of the hub's shapes take of memory to sample from and to fine-tune: estimated for all, measured for the small ones.

    python benchmarks/memory.py [--measure=SIZE]

The estimate is the one that a run makes before it begins (`preflight.memory_needed`). Models of at most SIZE parameters (default 2e8) are also run,
with random weights, each in a process of its own: its peak less what imports take, beside the estimate and the half GiB that a run adds to
it on a CPU. There is no peer: the estimate is what is judged.
"""
from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from isara_jax import preflight
from isara_jax.config import Lora, Sft
from isara_jax.models import decoder, families, lora

SHAPES = Path(__file__).parent / "shapes.json"
SLOTS, TOKENS, BATCH, LENGTH, RANK = 16, 512, 8, 128, 16


def read(name: str):
    entry = json.loads(SHAPES.read_text(encoding="utf-8"))[name]
    return families.find(entry["config"], SHAPES).read(entry["config"], SHAPES)


def estimates(cfg, dtype: str) -> dict[str, int]:
    """Bytes on one device: sampling, training, training adapters."""
    sizes = {"slots": SLOTS, "tokens_per_slot": TOKENS, "batch": BATCH, "train_tokens": LENGTH}
    plain = preflight.memory_needed(cfg, dtype, **sizes)
    adapted = preflight.memory_needed(cfg, dtype, **sizes, adapters=lora.n_params(cfg, Lora(rank=RANK)))
    return {"sample": plain["sampling"], "train": plain["training"], "adapters": adapted["training"]}


def main(largest: float) -> None:
    rows = []
    for name, entry in json.loads(SHAPES.read_text(encoding="utf-8")).items():
        cfg = read(name)
        cells = [name, entry["config"]["model_type"], f"{decoder.n_params(cfg) / 1e6:,.0f} M"]
        for dtype in ("float32", "bfloat16"):
            cells += [f"{n / 2**30:,.1f}" for n in estimates(cfg, dtype).values()]
        rows.append(cells)
    head = ["model", "family", "parameters", "f32: sample", "train", "adapters", "bf16: sample", "train", "adapters"]
    print(f"GiB on one device; {SLOTS} slots of {TOKENS} tokens, {BATCH} pairs of {LENGTH} tokens a step, adapters of rank {RANK}\n")
    for cells in (head, ["---"] * len(head), *rows):
        print(f"| {' | '.join(cells)} |")
    print("\nMeasured in float32, and as a multiple of the estimate\n\n| model | stage | measured | of the estimate |\n|---|---|---|---|")
    for name in (cells[0] for cells in rows):
        cfg = read(name)
        if decoder.n_params(cfg) > largest:
            continue
        for stage, estimate in estimates(cfg, "float32").items():
            done = subprocess.run([sys.executable, __file__, "--stage", stage, "--name", name], capture_output=True, text=True, check=True)
            peak = int(done.stdout.split()[-1])
            print(f"| {name} | {stage} | {peak / 2**30:.2f} GiB | {peak / (estimate + preflight.GIB // 2):.2f} |", flush=True)


def measure(stage: str, name: str) -> None:
    """Print the bytes that a stage takes at most, beyond imports."""
    import jax
    import numpy as np

    from isara_jax.data.batching import Example
    from isara_jax.decode.engine import EngineConfig, prepare
    from isara_jax.decode.generate import Request, generate
    from isara_jax.sft.loop import fit
    from isara_jax.sharding import make_mesh

    preflight.compilation_cache()
    cfg, mesh, rng = read(name), make_mesh(), np.random.default_rng(0)
    before = _status("VmRSS")
    params = jax.block_until_ready(decoder.init_params(cfg, 0))
    if stage == "sample":
        requests = [Request(tuple(rng.integers(0, cfg.vocab_size, TOKENS - 16).tolist()), i, 16, 0.7, 0.95) for i in range(SLOTS)]
        base = params, jax.tree.map(lambda x: x + 0, params)  # a run holds its starting model and the tuned one
        generate(prepare(base[1], "float32", mesh), cfg, EngineConfig(slots=SLOTS), mesh, requests, seed=0, stop_ids=[], context=TOKENS)
    else:
        examples = [Example(tuple(rng.integers(0, cfg.vocab_size, LENGTH).tolist()), 16) for _ in range(BATCH)]
        sft = Sft(batch=BATCH, epochs=1, lora=Lora(rank=RANK if stage == "adapters" else 0))
        fit(params, cfg, examples, sft, mesh=mesh, dtype="float32", seed=0, context=LENGTH, n_steps=2)
    print(_status("VmHWM") - before)


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(key)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", type=float, default=2e8, metavar="SIZE")
    parser.add_argument("--stage")
    parser.add_argument("--name")
    args = parser.parse_args()
    measure(args.stage, args.name) if args.stage else main(args.measure)
