"""How much memory and time loading takes: `isara_jax.load` against transformers' from_pretrained, the same folder on the same CPU.

    pip install torch transformers
    python benchmarks/loading.py [--folder=DIR] >> benchmarks/RESULTS.md

The model is random and has the shape of Llama 3.2 1B (1.236e9 parameters, tied embeddings). It is written as bfloat16 in one file, bfloat16
in four and float32 in four (2.5 to 5 GB, one folder at a time, removed afterwards), and each is loaded to run in bfloat16. Every load is a
process of its own, ours and the peer's in turn, and ends when every weight has been looked at once: transformers maps a bfloat16 file and
reads it when it is used. The peak is VmHWM then less VmRSS when imports were done. The floor of the time is reading the files once. The
files are in the page cache for all. The result, in Markdown, goes to stdout, all else to stderr.
"""
from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SHAPE = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192,
         "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "hidden_act": "silu",
         "rms_norm_eps": 1e-5, "rope_theta": 500_000.0, "tie_word_embeddings": True, "attention_bias": False, "mlp_bias": False,
         "max_position_embeddings": 131072, "rope_scaling": {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0,
                                                             "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}}
FOLDERS = (("BF16", 1), ("BF16", 4), ("F32", 4))  # (stored dtype, number of files)
PASSES = 3


def write_folder(folder: Path, stored: str, files: int) -> int:
    """A random model, written a few rows at a time; returns the number of parameters."""
    import numpy as np

    from isara_jax.models import hf, tensors
    from isara_jax.models.families import table

    (folder / "config.json").write_text(json.dumps(SHAPE | {"torch_dtype": {"BF16": "bfloat16", "F32": "float32"}[stored]}))
    cfg = hf.model_config(folder)
    shapes, rng = table.param_shapes(cfg), np.random.default_rng(0)
    some = (rng.standard_normal(1 << 22, np.float32) * 0.02).astype(tensors.DTYPES[stored])

    def values(shape):
        left = int(np.prod(shape))
        while left:
            yield some[:min(left, len(some))]
            left -= min(left, len(some))

    named = [(entry.key, stored, shape, values(shape)) for entry in hf.family(folder).entries(cfg)
             for shape in [table.stored_shape(entry, shapes)]]
    names = [tensors.SINGLE] if files == 1 else [f"model-{i + 1:05d}-of-{files:05d}.safetensors" for i in range(files)]
    for i, name in enumerate(names):
        tensors.write_file(folder / name, named[i::files])
    if files > 1:
        weight_map = {key: name for i, name in enumerate(names) for key, *_ in named[i::files]}
        (folder / tensors.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return sum(int(np.prod(shape)) for _, _, shape, _ in named)


# ----------------------------------------------------------------------------------------------------------- in a process of its own
def memory() -> dict[str, int]:
    """VmRSS and VmHWM of this process in bytes."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if words[0] in ("VmRSS:", "VmHWM:")}


def measure(what: str, folder: Path) -> dict:
    if what == "ours":
        import jax
        import numpy as np

        from isara_jax import lm
        from isara_jax.sharding import make_mesh

        mesh = make_mesh(devices=jax.devices()[:1])
        load = lambda: lm.load(str(folder), "bfloat16", mesh=mesh)
        look = lambda model: [np.asarray(x).view(np.int16).max() for x in jax.tree.leaves(model.params)]
    else:
        import torch
        import transformers

        transformers.LlamaForCausalLM  # imported when it is first named

        def load():
            return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)

        look = lambda model: [x.detach().view(torch.int16).max() for x in model.parameters()]
    before, start = memory()["VmRSS"], time.perf_counter()
    kept = load()
    loaded = time.perf_counter() - start
    look(kept)
    seconds, after = time.perf_counter() - start, memory()
    return {"loaded": loaded, "seconds": seconds, "peak": after["VmHWM"] - before, "held": after["VmRSS"] - before, "imports": before}


def floor_seconds(folder: Path) -> float:
    """Seconds to read every byte of the weights once."""
    buffer, start = bytearray(16 << 20), time.perf_counter()
    for file in sorted(folder.glob("*.safetensors")):
        with open(file, "rb", buffering=0) as f:
            while f.readinto(buffer):
                pass
    return time.perf_counter() - start


# ------------------------------------------------------------------------------------------------------------------------- report
def best(folder: Path) -> list[dict]:
    """Of ours and the peer the quickest of some passes, with the highest peak of them."""
    made: dict[str, list[dict]] = {"ours": [], "peer": []}
    for _ in range(PASSES):
        for what, passes in made.items():
            done = subprocess.run([sys.executable, __file__, f"--measure={what}", f"--folder={folder}"], check=True, stdout=subprocess.PIPE,
                                  env={**os.environ, "HF_HUB_OFFLINE": "1", "JAX_PLATFORMS": "cpu"})
            passes.append(json.loads(done.stdout.splitlines()[-1]))
            print(f"{what}: {passes[-1]}", file=sys.stderr)
    return [min(passes, key=lambda m: m["seconds"]) | {"peak": max(m["peak"] for m in passes)} for passes in made.values()]


def main(root: Path | None) -> None:
    import jax
    import torch
    import transformers

    lines = []
    for stored, files in FOLDERS:
        with tempfile.TemporaryDirectory(dir=root) as name:
            folder = Path(name)
            parameters = write_folder(folder, stored, files)
            floor = min(floor_seconds(folder) for _ in range(PASSES))
            ours, peer = best(folder)
        size = 2 * parameters
        peaks = " | ".join(f"{side['peak'] / 2**30:.2f} GiB, {side['peak'] / size:.3f}" for side in (ours, peer))
        lines.append(f"| {stored}, {files} file{'s' * (files > 1)} | {peaks} | {ours['peak'] / peer['peak']:.2f} | "
                     f"{ours['seconds']:.1f} s | {peer['seconds']:.1f} s | {ours['seconds'] / peer['seconds']:.1f} | {floor:.1f} s |")
    print(f"\n## loading.py\n\n"
          f"`python benchmarks/loading.py`: a random model of {parameters / 1e9:.3f}e9 parameters (the shape of Llama 3.2 1B, tied) to run "
          f"in bfloat16 ({size / 2**30:.2f} GiB of weights) on one CPU device, {os.cpu_count()} cores; jax {jax.__version__}; peer "
          f"transformers {transformers.__version__} with torch {torch.__version__}. Peaks are above what imports took, and as a multiple "
          f"of the weights; the highest of {PASSES} loads, the time of the quickest, both until every weight was looked at once. Our load "
          f"transposes every kernel; the peer maps bfloat16 files and keeps them as they are.\n\n"
          "| stored | our peak | peer's peak | ours / peer's | our time | peer's time | ours / peer's | reading once |\n"
          "|---|---|---|---|---|---|---|---|\n" + "\n".join(lines))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, help="where the model is written; by default the folder for temporary files")
    parser.add_argument("--measure", choices=("ours", "peer"), help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.measure:
        print(json.dumps(measure(flags.measure, flags.folder)))
    else:
        main(flags.folder)
