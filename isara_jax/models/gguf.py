"""GGUF files of the Llama family (llama.cpp's format): metadata to `ModelConfig`, quantised tensors to our parameter tree."""
from __future__ import annotations

from pathlib import Path
from typing import Any, Iterator

import numpy as np

from isara_jax.common import UserError
from isara_jax.models import decoder, gguf_tensors
from isara_jax.models.config import LayerKind, ModelConfig, Rope
from isara_jax.models.gguf_header import Tensor, read_header
from isara_jax.models.gguf_tensors import Heads, Reader
from isara_jax.models.families.table import ParamPath
from isara_jax.models.hf import build
from isara_jax.models.place import Place, Read
from isara_jax.models.rope import frequencies

PARTS = {
    "attn_norm": ("attn_norm",), "ffn_norm": ("mlp_norm",),
    "attn_q": ("attn", "q"), "attn_k": ("attn", "k"), "attn_v": ("attn", "v"), "attn_output": ("attn", "o"),
    "ffn_gate": ("mlp", "gate"), "ffn_up": ("mlp", "up"), "ffn_down": ("mlp", "down"),
}
OUTER_NAMES = {"token_embd.weight": ("embed", "embedding"), "output_norm.weight": ("norm", "scale"), "output.weight": ("head", "kernel")}
ROPE_FACTORS = "rope_freqs.weight"  # a divisor for each rotary frequency
LLAMA3 = {"low": 1.0, "high": 4.0, "original": 8192}  # the parameters of every Llama 3.1, 3.2 and 3.3; their factor is 8 or 32


def metadata(file: Path, key: str, default: Any = None) -> Any:
    """A metadata value; without a default a missing one is a `UserError`."""
    found = read_header(file).metadata.get(key, default)
    if found is None:
        raise UserError(f"{file} lacks the metadata {key}; it is not the GGUF of a Llama model.")
    return found


def model_config(file: Path) -> ModelConfig:
    """The mathematics in the file's metadata. Raises `UserError` for another family and for what we could not honour exactly.

    That includes tensors stored in a way that is not read, so that nothing is undone before all of it can be.
    """
    try:
        return _config(file)
    except (TypeError, ValueError, ZeroDivisionError) as e:
        raise UserError(f"{file} has metadata of a wrong kind: {e}. The file is damaged; get it again.") from None


def _config(file: Path) -> ModelConfig:
    if (family := metadata(file, "general.architecture")) != "llama":
        raise UserError(f"{file}: architecture {family!r}: family not supported in GGUF files; supported is llama. Take the model's "
                        "Hugging Face folder.")
    field = lambda key, default=None: metadata(file, f"llama.{key}", default)
    tensors = {t.name: t for t in read_header(file).tensors}
    heads, kv_heads = field("attention.head_count"), field("attention.head_count_kv", field("attention.head_count"))
    if isinstance(heads, list) or isinstance(kv_heads, list):
        raise UserError(f"{file}: not supported: heads that differ by layer. Running it anyway would give wrong logits.")
    width, layers, inner = field("embedding_length"), field("block_count"), field("feed_forward_length")
    head_dim = field("attention.key_length", width // heads)
    for what, number in (("heads", heads), ("key heads", kv_heads), ("a width", width), ("a head width", head_dim), ("layers", layers),
                         ("a feed-forward width", inner)):
        if type(number) is not int or number < 1:
            raise ValueError(f"{what}: {number!r} is no whole number from 1 on")
    scaling = field("rope.scaling.type", "linear")
    refused = {
        f"rope scaling {scaling!r} (supported: none, linear)": scaling not in ("none", "linear"),
        "rope scaling both by a factor and by frequency": ROPE_FACTORS in tensors and _linear(file) != 1,
        "experts": field("expert_count", 0) > 0,
        "a sliding window": field("attention.sliding_window", 0) > 0,
        "partial rotary embeddings": field("rope.dimension_count", head_dim) != head_dim,
        "values of another width than keys": field("attention.value_length", head_dim) != head_dim,
    }
    problems = [what for what, found in refused.items() if found] + gguf_tensors.problems(list(tensors.values()))
    if problems:
        raise UserError(f"{file}: not supported: {'; '.join(problems)}. Running it anyway would give wrong logits.")
    biased = lambda parts: any(path and path[-1] == "bias" and path[-2] in parts for path in map(_path, tensors))
    rows = tensors["token_embd.weight"].shape[0] if "token_embd.weight" in tensors else len(metadata(file, "tokenizer.ggml.tokens"))
    return ModelConfig(
        vocab_size=rows, d_model=width, n_layers=layers, n_heads=heads, n_kv_heads=kv_heads, head_dim=head_dim, d_ff=inner,
        norm_eps=_float32(field("attention.layer_norm_rms_epsilon")),
        pattern=(LayerKind(rope=_rope(file, head_dim, tensors.get(ROPE_FACTORS))),), tie_embeddings="output.weight" not in tensors,
        qkv_bias=biased(("q", "k", "v")), o_bias=biased(("o",)), mlp_bias=biased(("gate", "up", "down")))


def context_length(file: Path) -> int:
    """Longest sequence in tokens."""
    return int(metadata(file, "llama.context_length", 2048))


def load_params(file: Path, cfg: ModelConfig, place: Place, dtype: str = "float32") -> decoder.Params:
    """Dequantise tensor by tensor to `dtype`, the largest first; `place` puts each on its devices, and no more of the file is read for it
    than the rows of the parts that it asks for.

    Raises one `UserError` listing every missing, unexpected or wrongly shaped tensor.
    """
    shapes = {path: tuple(x.shape) for path, x in _leaves(decoder.abstract_params(cfg))}
    found: dict[ParamPath, Tensor] = {}
    problems = []
    for tensor in read_header(file).tensors:
        path = _path(tensor.name)
        if path not in shapes or path in found:
            if tensor.name != ROPE_FACTORS:
                problems.append(f"{tensor.name} is {'there twice' if path in found else 'unexpected'}")
            continue
        ours = shapes[path][::-1] if path[-1] == "kernel" else shapes[path]  # kernels are stored as [out, in]
        if tensor.shape != ours:
            problems.append(f"{tensor.name} has shape {list(tensor.shape)}, the metadata says {list(ours)}")
        found[path] = tensor
    problems += [f"{'/'.join(path)} is missing" for path in shapes if path not in found]
    problems += gguf_tensors.problems(list(found.values()))
    if problems:
        raise UserError(f"{file}: the tensors do not fit the metadata:\n  " + "\n  ".join(problems[:20])
                        + (f"\n  and {len(problems) - 20} more" if len(problems) > 20 else ""))
    with Reader(file) as reader:
        order = sorted(found, key=lambda path: -int(np.prod(shapes[path])))
        return build((path, place(path, shapes[path], np.dtype(dtype), _read(reader, cfg, path, found[path], np.dtype(dtype))))
                     for path in order)


def _read(reader: Reader, cfg: ModelConfig, path: ParamPath, tensor: Tensor, dtype: np.dtype) -> Read:
    """The function that reads parts of the parameter at `path`."""
    heads = Heads(cfg.head_dim) if path[-2] in ("q", "k") else None

    def read(index: tuple[slice, ...]) -> np.ndarray:
        if path[-1] == "kernel":
            return reader.part(tensor, index[1], index[0], dtype, heads=heads, transposed=True)
        if len(tensor.shape) == 2:
            return reader.part(tensor, *index, dtype)
        values = reader.part(tensor, slice(None), slice(None), dtype)[0]
        if heads:
            values, stored = np.empty_like(values), values
            values[heads.ours(np.arange(len(stored)))] = stored
        return values[index[0]]

    return read


def _rope(file: Path, head_dim: int, factors: Tensor | None) -> Rope:
    """The rotary embedding: plain, linearly scaled, or with a divisor for each frequency, which for Llama 3 follows from one factor."""
    theta, linear = float(metadata(file, "llama.rope.freq_base", 10_000.0)), _linear(file)
    if factors is None:
        return Rope(theta) if linear == 1 else Rope(theta, scaling="linear", factor=linear)
    with Reader(file) as reader:
        divisors = reader.part(factors, slice(None), slice(None), np.dtype("float32")).reshape(-1)
    if np.all(divisors == 1):
        return Rope(theta)
    llama3 = Rope(theta, scaling="llama3", factor=_float32(divisors.max()), **LLAMA3)
    implied = frequencies(Rope(theta), head_dim) / frequencies(llama3, head_dim)
    if implied.shape == divisors.shape and np.allclose(implied, divisors, rtol=1e-5, atol=0):  # so it can be written as llama3 again
        return llama3
    return Rope(theta, scaling="factors", factors=tuple(map(float, divisors)))


def _linear(file: Path) -> float:
    """How many times longer positions are made; a type that is not given means linear, as in llama.cpp."""
    factor = metadata(file, "llama.rope.scaling.factor", metadata(file, "llama.rope.scale_linear", 0.0))
    return _float32(factor) if factor and metadata(file, "llama.rope.scaling.type", "linear") == "linear" else 1.0


def _path(name: str) -> ParamPath | None:
    if name in OUTER_NAMES:
        return OUTER_NAMES[name]
    parts = name.split(".")
    if len(parts) != 4 or parts[0] != "blk" or parts[2] not in PARTS or parts[3] not in ("weight", "bias"):
        return None
    kind = "bias" if parts[3] == "bias" else "scale" if parts[2].endswith("_norm") else "kernel"
    return ("layers", parts[1], *PARTS[parts[2]], kind)


def _leaves(tree: Any, path: ParamPath = ()) -> Iterator[tuple[ParamPath, Any]]:
    for key, value in tree.items():
        yield from _leaves(value, (*path, key)) if isinstance(value, dict) else (((*path, key), value),)


def _float32(value: float) -> float:
    """The shortest number that is the same in float32: 1e-05 where a file's float32 reads as 9.999999747378752e-06."""
    return float(str(np.float32(value)))
