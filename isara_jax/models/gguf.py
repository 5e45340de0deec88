"""GGUF files of the Llama family (llama.cpp's format): metadata to `ModelConfig`, quantised tensors to our float32 parameter tree."""
from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np

from isara_jax.common import UserError
from isara_jax.models import decoder
from isara_jax.models.config import ModelConfig
from isara_jax.models.hf import ParamPath, Place, build

LAYER_NAMES = {"attn_norm": ("attn_norm", "scale"), "ffn_norm": ("mlp_norm", "scale"), "attn_q": ("attn", "q", "kernel"), "attn_k": ("attn", "k", "kernel"),
               "attn_v": ("attn", "v", "kernel"), "attn_output": ("attn", "o", "kernel"), "ffn_gate": ("mlp", "gate", "kernel"),
               "ffn_up": ("mlp", "up", "kernel"), "ffn_down": ("mlp", "down", "kernel")}
OUTER_NAMES = {"token_embd.weight": ("embed", "embedding"), "output_norm.weight": ("norm", "scale"), "output.weight": ("head", "kernel")}


@functools.lru_cache(maxsize=2)
def reader(file: Path) -> Any:
    """The opened file (memory-mapped). Raises `UserError` when it is not a whole GGUF file."""
    import gguf

    size = file.stat().st_size
    try:
        opened = gguf.GGUFReader(file)
        end = max((int(t.data_offset) + int(t.n_bytes) for t in opened.tensors), default=0)
    except Exception as e:  # the reader raises whatever its parsing stumbles over
        raise UserError(f"{file} is not a whole GGUF file ({type(e).__name__}: {e}; it has {size:,} bytes). It may be cut short; get it again.") from None
    if end > size:
        raise UserError(f"{file} is cut short: it has {size:,} bytes, its tensors need {end:,}. Get it again.")
    return opened


def metadata(file: Path, key: str, default: Any = None) -> Any:
    """A metadata value; without a default a missing one is a `UserError`."""
    found = reader(file).fields.get(key)
    if found is None and default is None:
        raise UserError(f"{file} lacks the metadata {key}; it is not the GGUF of a Llama model.")
    return default if found is None else found.contents()


def model_config(file: Path) -> ModelConfig:
    """The mathematics in the file's metadata. Raises `UserError` for another family or what we could not honour exactly."""
    if (family := metadata(file, "general.architecture")) != "llama":
        raise UserError(f"{file}: architecture {family!r}: family not supported yet; supported is llama.")
    names = {t.name for t in reader(file).tensors}
    scaling = metadata(file, "llama.rope.scaling.type", "none")
    if scaling != "none" or "rope_freqs.weight" in names or any(n.endswith(".bias") for n in names):
        raise UserError(f"{file}: rope scaling or biases are not supported yet; running it anyway would give wrong logits.")
    heads, width = metadata(file, "llama.attention.head_count"), metadata(file, "llama.embedding_length")
    return ModelConfig(
        vocab_size=len(metadata(file, "tokenizer.ggml.tokens")), d_model=width, n_layers=metadata(file, "llama.block_count"), n_heads=heads,
        n_kv_heads=metadata(file, "llama.attention.head_count_kv", heads), head_dim=metadata(file, "llama.attention.key_length", width // heads),
        d_ff=metadata(file, "llama.feed_forward_length"), rope_theta=float(metadata(file, "llama.rope.freq_base", 10_000.0)),
        norm_eps=float(metadata(file, "llama.attention.layer_norm_rms_epsilon")), tie_embeddings="output.weight" not in names)


def context_length(file: Path) -> int:
    """Longest sequence in tokens."""
    return int(metadata(file, "llama.context_length", 2048))


def load_params(file: Path, cfg: ModelConfig, place: Place) -> decoder.Params:
    """Dequantise tensor by tensor to float32; `place` puts each on its devices.

    Raises one `UserError` listing every missing, unexpected or wrongly shaped tensor.
    """
    import gguf

    shapes = {path: tuple(x.shape) for path, x in _leaves(decoder.abstract_params(cfg))}
    found, problems = {}, []
    for tensor in reader(file).tensors:
        path = _path(tensor.name)
        if path not in shapes or path in found:
            problems.append(f"{tensor.name} is {'there twice' if path in found else 'unexpected'}")
            continue
        stored = tuple(int(n) for n in tensor.shape)  # innermost first, which is [in, out] for kernels
        if stored != (shapes[path] if path[-1] == "kernel" else shapes[path][::-1]):
            problems.append(f"{tensor.name} has shape {list(stored)[::-1]}, the metadata says {list(shapes[path])}")
        found[path] = tensor
    problems += [f"{'/'.join(path)} is missing" for path in shapes if path not in found]
    if problems:
        raise UserError(f"{file}: the tensors do not fit the metadata:\n  " + "\n  ".join(problems[:20]))

    def items():
        for path, tensor in found.items():
            array = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
            if path[-2] in ("q", "k"):
                array = unpermute(array, cfg.n_heads if path[-2] == "q" else cfg.n_kv_heads)
            yield path, place(path, np.ascontiguousarray(array.T) if path[-1] == "kernel" else np.array(array))

    return build(items())


def unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's order of query and key rows: it interleaves the two rotary halves of each head. weight: [heads * H, in]."""
    rows, width = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, width).swapaxes(1, 2).reshape(rows, width)


def _path(name: str) -> ParamPath | None:
    if name in OUTER_NAMES:
        return OUTER_NAMES[name]
    parts = name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[3] == "weight" and parts[2] in LAYER_NAMES:
        return ("layers", parts[1], *LAYER_NAMES[parts[2]])
    return None


def _leaves(tree: Any, path: ParamPath = ()):
    for key, value in tree.items():
        yield from _leaves(value, (*path, key)) if isinstance(value, dict) else (((*path, key), value),)
