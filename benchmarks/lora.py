"""What adapters save: a training step of SmolLM2-135M's shape with LoRA and without, ours and peft's on torch, on the same CPU.

    pip install peft==0.21.2 torch
    python benchmarks/lora.py >> benchmarks/RESULTS.md

Weights are random: time and memory do not depend on them. A step is 16 pairs of 64 tokens, adapters have rank 16 on all linear modules,
both sides multiply in float32 and use AdamW. Ours is `sft.loop.fit` as a run calls it, which recomputes blocks in the backward pass and
merges at the end; theirs is forward, backward, optimizer step, without checkpointing. Each side runs in a process of its own, one after the
other: seconds (and CPU seconds) are the median of 5 steps after the first, which compiles; memory is the peak of resident memory above what
imports took.
"""
from __future__ import annotations

import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

SHAPE = {"vocab_size": 49152, "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
         "intermediate_size": 1536, "head_dim": 64, "tie_word_embeddings": True, "max_position_embeddings": 2048}
PAIRS, TOKENS, PROMPT, STEPS, RANK = 16, 64, 32, 6, 16
SIDES = {"ours": 0, "ours, LoRA": RANK, "torch": 0, "peft": RANK}


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process in bytes."""
    return 1024 * int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))[1])


def rows() -> list[list[int]]:
    return [[(7 * i + 13 * j) % SHAPE["vocab_size"] for j in range(TOKENS + 1)] for i in range(PAIRS)]


def now() -> tuple[float, float]:
    """Seconds and CPU seconds of this process."""
    return time.perf_counter(), time.process_time()


def ours(rank: int) -> tuple[list[tuple[float, float]], int]:
    import jax

    from isara_jax.config import Lora, Sft
    from isara_jax.data.batching import Example
    from isara_jax.models import decoder
    from isara_jax.models.config import ModelConfig
    from isara_jax.sft import loop
    from isara_jax.sharding import make_mesh

    cfg = ModelConfig(vocab_size=SHAPE["vocab_size"], d_model=SHAPE["hidden_size"], n_layers=SHAPE["num_hidden_layers"], n_heads=9,
                      n_kv_heads=3, head_dim=64, d_ff=SHAPE["intermediate_size"], tie_embeddings=True)
    sft, before, ends = Sft(batch=PAIRS, lora=Lora(rank=rank)), resident("VmRSS"), []
    examples = [Example(tuple(row), PROMPT) for row in rows()]
    mesh = make_mesh(devices=jax.devices()[:1])
    loop.fit(decoder.init_params(cfg, 0), cfg, examples, sft, mesh=mesh, dtype="float32", seed=0, context=2048, n_steps=STEPS,
             on_step=lambda *_: ends.append(now()))
    return ends, resident("VmHWM") - before


def theirs(rank: int) -> tuple[list[tuple[float, float]], int]:
    import peft
    import torch
    import transformers

    before, ends = resident("VmRSS"), []
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE))
    if rank:
        model = peft.get_peft_model(model, peft.LoraConfig(r=rank, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-5)
    tokens = torch.tensor(rows())
    for _ in range(STEPS):
        logits = model(tokens[:, :-1]).logits[:, PROMPT - 1:]
        loss = torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), tokens[:, PROMPT:].reshape(-1))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        loss.item()
        ends.append(now())
    return ends, resident("VmHWM") - before


def main() -> None:
    if len(sys.argv) > 1:
        ends, peak = (ours if sys.argv[1].startswith("ours") else theirs)(SIDES[sys.argv[1]])
        seconds, cpu = (statistics.median(after[i] - before[i] for before, after in zip(ends, ends[1:])) for i in (0, 1))
        print(json.dumps({"seconds": seconds, "cpu": cpu, "peak": peak / 2**30}))
        return
    made = {}
    for side in SIDES:
        command, env = [sys.executable, __file__, side], {**os.environ, "JAX_PLATFORMS": "cpu"}
        made[side] = json.loads(subprocess.run(command, env=env, stdout=subprocess.PIPE, check=True).stdout.decode().splitlines()[-1])
    print(f"\n## lora.py\n\n`python benchmarks/lora.py`: {PAIRS} pairs of {TOKENS} tokens a step, rank {RANK}, float32. {os.cpu_count()} "
          f"cores, {platform.machine()}; load average at the end {os.getloadavg()[0]:.1f}. Ratios are of seconds, CPU seconds, memory.\n")
    print("| side | step s | CPU s | peak GiB | to training all parameters | ours to theirs |\n|---|---|---|---|---|---|")
    for side, own in made.items():
        whole, peer = made["ours" if side.startswith("ours") else "torch"], made[{"ours": "torch", "ours, LoRA": "peft"}.get(side, side)]
        ratios = (", ".join(f"{own[key] / other[key]:.2f}" for key in own) if other is not own else "" for other in (whole, peer))
        print(f"| {side} | {own['seconds']:.2f} | {own['cpu']:.2f} | {own['peak']:.2f} | " + " | ".join(ratios) + " |")


if __name__ == "__main__":
    main()
