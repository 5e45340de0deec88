"""Hugging Face folders of the Llama family: config.json to `ModelConfig`, safetensors to our parameter tree. No torch, no pickle."""
from __future__ import annotations

from pathlib import Path
from typing import Any, Callable, Iterator

import numpy as np
import safetensors

from isara_jax.common import UserError
from isara_jax.models import decoder
from isara_jax.models.config import ModelConfig
from isara_jax.models.resolve import read_json

ParamPath = tuple[str, ...]
Place = Callable[[ParamPath, np.ndarray], Any]  # puts one float32 array where it belongs

# Our path inside a layer -> the name in the checkpoint below model.layers.N.; kernels are stored there as [out, in].
LAYER_KEYS: dict[ParamPath, str] = {
    ("attn_norm", "scale"): "input_layernorm.weight", ("mlp_norm", "scale"): "post_attention_layernorm.weight",
    **{("attn", p, "kernel"): f"self_attn.{p}_proj.weight" for p in "qkvo"},
    **{("mlp", p, "kernel"): f"mlp.{p}_proj.weight" for p in ("gate", "up", "down")},
}
OUTER_KEYS: dict[ParamPath, str] = {("embed", "embedding"): "model.embed_tokens.weight", ("norm", "scale"): "model.norm.weight",
                                    ("head", "kernel"): "lm_head.weight"}
# Fields of a config.json that change the mathematics and have one supported value.
FIXED = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "sliding_window": None, "partial_rotary_factor": 1.0,
         "quantization_config": None}
STORED = ("F64", "F32", "F16", "BF16")  # what becomes float32 without a scale of its own


def model_config(folder: Path) -> ModelConfig:
    """The mathematics of a folder's config.json, in the form of transformers 4 (rope_theta) or 5 (rope_parameters).

    Raises `UserError` for another family and for every field that we could not honour exactly.
    """
    path = folder / "config.json"
    raw = read_json(path)
    if raw.get("model_type") != "llama":
        raise UserError(f"{path}: model_type {raw.get('model_type')!r}: family not supported yet; supported is llama (Llama, "
                        "SmolLM2 and others that use its layout).")
    rope = raw.get("rope_parameters") or {}
    problems = [f"{k}={raw[k]!r} (supported: {v!r})" for k, v in FIXED.items() if (raw.get(k) or v) != v]
    for name in ("rope_parameters", "rope_scaling"):
        kind = (raw.get(name) or {}).get("rope_type") or (raw.get(name) or {}).get("type") or "default"
        if kind != "default":
            problems.append(f"{name} of type {kind!r} (supported: 'default')")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        problems.append(f"partial_rotary_factor={rope['partial_rotary_factor']!r} (supported: 1.0)")
    if problems:
        raise UserError(f"{path}: not supported yet: {', '.join(problems)}. Running it anyway would give wrong logits.")
    try:
        heads = int(raw["num_attention_heads"])
        return ModelConfig(
            vocab_size=int(raw["vocab_size"]), d_model=int(raw["hidden_size"]), n_layers=int(raw["num_hidden_layers"]), n_heads=heads,
            n_kv_heads=int(raw.get("num_key_value_heads") or heads), head_dim=int(raw.get("head_dim") or raw["hidden_size"] // heads),
            d_ff=int(raw["intermediate_size"]), rope_theta=float(rope.get("rope_theta", raw.get("rope_theta", 10_000.0))),
            norm_eps=float(raw.get("rms_norm_eps", 1e-6)), tie_embeddings=bool(raw.get("tie_word_embeddings", False)))
    except KeyError as e:
        raise UserError(f"{path} lacks {e}; it is not the config.json of a Llama model.") from None
    except (TypeError, ValueError) as e:
        raise UserError(f"{path} has a field of a wrong kind: {e}.") from None


def context_length(folder: Path) -> int:
    """Longest sequence in tokens."""
    return int(read_json(folder / "config.json").get("max_position_embeddings", 2048))


def keys(cfg: ModelConfig) -> dict[str, ParamPath]:
    """Checkpoint key -> our path, for every parameter of a model."""
    layers = {f"model.layers.{i}.{name}": ("layers", str(i), *path) for i in range(cfg.n_layers) for path, name in LAYER_KEYS.items()}
    return {**{name: path for path, name in OUTER_KEYS.items() if not (path[0] == "head" and cfg.tie_embeddings)}, **layers}


def load_params(folder: Path, cfg: ModelConfig, place: Place) -> decoder.Params:
    """Read the weights tensor by tensor as float32; `place` puts each on its devices.

    Raises one `UserError` listing every missing, unexpected, duplicate or wrongly shaped tensor.
    """
    wanted, where = keys(cfg), {}
    problems = []
    for file in weight_files(folder):
        for name in _open(file).keys():
            if name in where:
                problems.append(f"{name} is in {where[name].name} and in {file.name}")
            where[name] = file
    ignored = {n for n in where if n.endswith("rotary_emb.inv_freq") or (n == "lm_head.weight" and cfg.tie_embeddings)}
    problems += [f"{n} is missing" for n in wanted if n not in where]
    problems += [f"{n} is unexpected" for n in where if n not in wanted and n not in ignored]
    for name in (n for n in wanted if n in where):
        stored, shape = _open(where[name]).get_slice(name), _shape(cfg, wanted[name])
        shape = shape[::-1] if wanted[name][-1] == "kernel" else shape
        if tuple(stored.get_shape()) != shape:
            problems.append(f"{name} has shape {stored.get_shape()}, config.json says {list(shape)}")
        if stored.get_dtype() not in STORED:
            problems.append(f"{name} is stored as {stored.get_dtype()}; read are {', '.join(STORED)}")
    if problems:
        raise UserError(f"{folder}: the weights do not fit config.json:\n  " + "\n  ".join(problems[:20])
                        + (f"\n  and {len(problems) - 20} more" if len(problems) > 20 else ""))
    return build(_stream(wanted, where, place))


def _stream(wanted: dict[str, ParamPath], where: dict[str, Path], place: Place) -> Iterator[tuple[ParamPath, Any]]:
    for name, path in wanted.items():
        array = _open(where[name]).get_tensor(name).astype(np.float32)
        yield path, place(path, np.ascontiguousarray(array.T) if path[-1] == "kernel" else array)


def build(items: Iterator[tuple[ParamPath, Any]]) -> decoder.Params:
    """A nested dict from (path, value) pairs."""
    tree: decoder.Params = {}
    for path, value in items:
        inner = tree
        for key in path[:-1]:
            inner = inner.setdefault(key, {})
        inner[path[-1]] = value
    return tree


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder: model.safetensors, or those its index names, or all. Names in an index cannot leave the folder."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]
    if not index.exists():
        return sorted(folder.glob("*.safetensors"))
    files = []
    for name in sorted(set(read_json(index).get("weight_map", {}).values())):
        path = folder / str(name)
        if Path(str(name)).name != name or not str(name).endswith(".safetensors"):
            raise UserError(f"{index} names {name!r}, which is not a .safetensors file of this folder; it is not read.")
        if not path.is_file():
            raise UserError(f"{index} names {name}, which is not in {folder}. The download is unfinished; get it again.")
        files.append(path)
    if not files:
        raise UserError(f"{index} names no files. The folder is damaged; get it again.")
    return files


def _shape(cfg: ModelConfig, path: ParamPath) -> tuple[int, ...]:
    tree = decoder.abstract_params(cfg)
    for key in path:
        tree = tree[key]
    return tree.shape


def _open(file: Path):
    try:
        return safetensors.safe_open(file, framework="numpy")
    except (safetensors.SafetensorError, OSError) as e:
        raise UserError(f"{file} is not a whole safetensors file ({e}; {file.stat().st_size:,} bytes). "
                        "The download may be cut short; get it again.") from None
