"""GGUF files of the Llama family (llama.cpp's format): metadata to `ModelConfig`, quantised tensors to our float32 parameter tree."""
from __future__ import annotations

from pathlib import Path
from typing import Any, Iterator

import numpy as np

from isara_jax.common import UserError
from isara_jax.models import decoder
from isara_jax.models.config import ModelConfig
from isara_jax.models.gguf_header import Tensor, read_header
from isara_jax.models.hf import ParamPath, Place, build

LAYER_NAMES = {
    "attn_norm": ("attn_norm", "scale"), "ffn_norm": ("mlp_norm", "scale"),
    "attn_q": ("attn", "q", "kernel"), "attn_k": ("attn", "k", "kernel"), "attn_v": ("attn", "v", "kernel"),
    "attn_output": ("attn", "o", "kernel"),
    "ffn_gate": ("mlp", "gate", "kernel"), "ffn_up": ("mlp", "up", "kernel"), "ffn_down": ("mlp", "down", "kernel"),
}
OUTER_NAMES = {"token_embd.weight": ("embed", "embedding"), "output_norm.weight": ("norm", "scale"), "output.weight": ("head", "kernel")}


def metadata(file: Path, key: str, default: Any = None) -> Any:
    """A metadata value; without a default a missing one is a `UserError`."""
    found = read_header(file).metadata.get(key, default)
    if found is None:
        raise UserError(f"{file} lacks the metadata {key}; it is not the GGUF of a Llama model.")
    return found


def model_config(file: Path) -> ModelConfig:
    """The mathematics in the file's metadata. Raises `UserError` for another family or what we could not honour exactly."""
    if (family := metadata(file, "general.architecture")) != "llama":
        raise UserError(f"{file}: architecture {family!r}: family not supported yet; supported is llama.")
    field = lambda key, default=None: metadata(file, f"llama.{key}", default)
    names = {t.name for t in read_header(file).tensors}
    heads, width = field("attention.head_count"), field("embedding_length")
    head_dim = field("attention.key_length", width // heads if isinstance(heads, int) else 0)
    problems = {
        "rope scaling": field("rope.scaling.type", "none") != "none" or "rope_freqs.weight" in names,
        "biases": any(name.endswith(".bias") for name in names),
        "experts": field("expert_count", 0) > 0,
        "a sliding window": field("attention.sliding_window", 0) > 0,
        "heads that differ by layer": not isinstance(heads, int) or not isinstance(field("attention.head_count_kv", heads), int),
        "partial rotary embeddings": field("rope.dimension_count", head_dim) != head_dim,
        "values of another width than keys": field("attention.value_length", head_dim) != head_dim,
    }
    if any(problems.values()):
        named = ", ".join(name for name, found in problems.items() if found)
        raise UserError(f"{file}: not supported yet: {named}. Running it anyway would give wrong logits.")
    return ModelConfig(
        vocab_size=len(metadata(file, "tokenizer.ggml.tokens")), d_model=width, n_layers=field("block_count"), n_heads=heads,
        n_kv_heads=field("attention.head_count_kv", heads), head_dim=head_dim, d_ff=field("feed_forward_length"),
        rope_theta=float(field("rope.freq_base", 10_000.0)), norm_eps=_float32(field("attention.layer_norm_rms_epsilon")),
        tie_embeddings="output.weight" not in names)


def context_length(file: Path) -> int:
    """Longest sequence in tokens."""
    return int(metadata(file, "llama.context_length", 2048))


def load_params(file: Path, cfg: ModelConfig, place: Place) -> decoder.Params:
    """Dequantise tensor by tensor to float32; `place` puts each on its devices.

    Raises one `UserError` listing every missing, unexpected or wrongly shaped tensor.
    """
    shapes = {path: tuple(x.shape) for path, x in _leaves(decoder.abstract_params(cfg))}
    found: dict[ParamPath, Tensor] = {}
    problems = []
    for tensor in read_header(file).tensors:
        path = _path(tensor.name)
        if path not in shapes or path in found:
            problems.append(f"{tensor.name} is {'there twice' if path in found else 'unexpected'}")
            continue
        ours = shapes[path][::-1] if path[-1] == "kernel" else shapes[path]  # kernels are stored as [out, in]
        if tensor.shape != ours:
            problems.append(f"{tensor.name} has shape {list(tensor.shape)}, the metadata says {list(ours)}")
        found[path] = tensor
    problems += [f"{'/'.join(path)} is missing" for path in shapes if path not in found]
    if problems:
        raise UserError(f"{file}: the tensors do not fit the metadata:\n  " + "\n  ".join(problems[:20])
                        + (f"\n  and {len(problems) - 20} more" if len(problems) > 20 else ""))
    return build(_stream(file, cfg, found, place))


def _stream(file: Path, cfg: ModelConfig, found: dict[ParamPath, Tensor], place: Place) -> Iterator[tuple[ParamPath, Any]]:
    data = np.memmap(file, mode="r")
    for path, tensor in found.items():
        array = _dequantise(file, tensor, data[tensor.offset:tensor.offset + tensor.size])
        if path[-2] in ("q", "k"):
            array = unpermute(array, cfg.n_heads if path[-2] == "q" else cfg.n_kv_heads)
        yield path, place(path, np.ascontiguousarray(array.T if path[-1] == "kernel" else array))


def _dequantise(file: Path, tensor: Tensor, raw: np.ndarray) -> np.ndarray:
    """The float32 values of a tensor, in memory of their own. raw: its bytes."""
    from gguf import quants
    from gguf.constants import GGMLQuantizationType

    kind = GGMLQuantizationType(tensor.kind)
    plain = {GGMLQuantizationType.F32: np.float32, GGMLQuantizationType.F16: np.float16}
    if kind in plain:
        return raw.view(plain[kind]).reshape(tensor.shape).astype(np.float32)
    try:
        return quants.dequantize(raw.reshape(*tensor.shape[:-1], -1), kind)
    except NotImplementedError:
        raise UserError(f"{file}: {tensor.name} is quantised as {kind.name}, which the gguf package cannot undo. "
                        "Take a file in F16, Q8_0 or Q4_1.") from None


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


def _float32(value: float) -> float:
    """The shortest number that is the same in float32: 1e-05 where a file's float32 reads as 9.999999747378752e-06."""
    return float(str(np.float32(value)))
