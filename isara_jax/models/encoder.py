"""A BERT-family sentence encoder (Devlin et al. 2019; Reimers and Gurevych 2019) as a pure function of a parameter tree.

Parameters are a plain nested dict with string keys, one entry a layer (kernels are [in, out]):

    embed/{word,position,type}/embedding      layers/0/attn/{q,k,v,o}/{kernel,bias}    layers/0/mlp/{up,down}/{kernel,bias}
    embed_norm/{scale,bias}                   layers/0/attn_norm/{scale,bias}          layers/0/mlp_norm/{scale,bias}

Everything is float32 at the highest matmul precision on every device: the encoder is small, and neighbours must not depend on the device.
Dimension letters as in models/layers.py.
"""
from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from flax import nnx

from isara_jax.common import UserError
from isara_jax.models.layers import NEG_INF
from isara_jax.models.resolve import read_json

Params = dict[str, Any]
ParamPath = tuple[str, ...]
HIGHEST = jax.lax.Precision.HIGHEST
POOLINGS = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls", "pooling_mode_max_tokens": "max"}
# Fields of a config.json that change the mathematics and have one supported value.
FIXED = {"hidden_act": "gelu", "position_embedding_type": "absolute", "is_decoder": False, "add_cross_attention": False}
UNUSED = ("embeddings.position_ids", "pooler.", "cls.")  # tensors of checkpoints that no sentence vector depends on

# Our path -> the name in the checkpoint; a layer's names stand below encoder.layer.N.
_NORM = {"scale": "weight", "bias": "bias"}
_LINEAR = {"kernel": "weight", "bias": "bias"}
_TABLES = {"word": "word", "position": "position", "type": "token_type"}
_OUTER = {**{("embed", p, "embedding"): f"embeddings.{n}_embeddings.weight" for p, n in _TABLES.items()},
          **{("embed_norm", p): f"embeddings.LayerNorm.{n}" for p, n in _NORM.items()}}
_OWNERS = {("attn", "q"): "attention.self.query", ("attn", "k"): "attention.self.key", ("attn", "v"): "attention.self.value",
           ("attn", "o"): "attention.output.dense", ("mlp", "up"): "intermediate.dense", ("mlp", "down"): "output.dense"}
_LAYER = {**{(*owner, p): f"{name}.{n}" for owner, name in _OWNERS.items() for p, n in _LINEAR.items()},
          **{("attn_norm", p): f"attention.output.LayerNorm.{n}" for p, n in _NORM.items()},
          **{("mlp_norm", p): f"output.LayerNorm.{n}" for p, n in _NORM.items()}}


@dataclass(frozen=True)
class EncoderConfig:
    """Shape and constants of a BERT encoder and how a text's vector is pooled from it; every field changes the vectors."""

    vocab_size: int                # V
    d_model: int                   # D
    n_layers: int                  # L
    n_heads: int                   # N
    d_ff: int                      # F
    max_positions: int
    n_types: int = 2
    norm_eps: float = 1e-12
    pooling: str = "mean"          # mean, cls (the first token) or max

    def __post_init__(self):
        if self.d_model % self.n_heads:
            raise ValueError(f"d_model={self.d_model} is not a multiple of n_heads={self.n_heads}")
        if self.pooling not in POOLINGS.values():
            raise ValueError(f"pooling={self.pooling!r} is not one of {', '.join(POOLINGS.values())}")


# ------------------------------------------------------------------------------------------------------------------------- modules
class _Layer(nnx.Module):
    """Post-norm block: each of attention and MLP is added to its input, then normalised."""

    def __init__(self, cfg: EncoderConfig, *, rngs: nnx.Rngs):
        linear = functools.partial(nnx.Linear, precision=HIGHEST, kernel_init=nnx.initializers.normal(0.02), rngs=rngs)
        D, F = cfg.d_model, cfg.d_ff
        self.n_heads = cfg.n_heads
        self.attn = nnx.Dict({name: linear(D, D) for name in "qkvo"})
        self.attn_norm = _norm(cfg, rngs)
        self.mlp = nnx.Dict(up=linear(D, F), down=linear(F, D))
        self.mlp_norm = _norm(cfg, rngs)

    def __call__(self, x_BTD: jax.Array, visible_BS: jax.Array) -> jax.Array:
        B, T, D = x_BTD.shape
        q_BTNH, k_BSNH, v_BSNH = (self.attn[name](x_BTD).reshape(B, T, self.n_heads, -1) for name in "qkv")
        scores = jnp.einsum("BTNH,BSNH->BNTS", q_BTNH, k_BSNH, precision=HIGHEST) * q_BTNH.shape[-1] ** -0.5
        weights = jax.nn.softmax(jnp.where(visible_BS[:, None, None, :], scores, NEG_INF), axis=-1)
        out_BTD = jnp.einsum("BNTS,BSNH->BTNH", weights, v_BSNH, precision=HIGHEST).reshape(B, T, D)
        x_BTD = self.attn_norm(x_BTD + self.attn["o"](out_BTD))
        return self.mlp_norm(x_BTD + self.mlp["down"](jax.nn.gelu(self.mlp["up"](x_BTD), approximate=False)))


class Encoder(nnx.Module):
    """Defines the parameters, their initial values and the forward; `encode` runs it on a parameter tree."""

    def __init__(self, cfg: EncoderConfig, *, rngs: nnx.Rngs):
        embed = functools.partial(nnx.Embed, embedding_init=nnx.initializers.normal(0.02), rngs=rngs)
        self.embed = nnx.Dict(word=embed(cfg.vocab_size, cfg.d_model), position=embed(cfg.max_positions, cfg.d_model),
                              type=embed(cfg.n_types, cfg.d_model))
        self.embed_norm = _norm(cfg, rngs)
        self.layers = nnx.Dict({str(i): _Layer(cfg, rngs=rngs) for i in range(cfg.n_layers)})

    def __call__(self, tokens_BT: jax.Array, visible_BT: jax.Array) -> jax.Array:
        T = tokens_BT.shape[1]
        x_BTD = self.embed["word"](tokens_BT) + self.embed["type"].embedding[0] + self.embed["position"].embedding[:T]
        x_BTD = self.embed_norm(x_BTD)
        for i in range(len(self.layers)):
            x_BTD = self.layers[str(i)](x_BTD, visible_BT)
        return x_BTD


def _norm(cfg: EncoderConfig, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(cfg.d_model, epsilon=cfg.norm_eps, use_fast_variance=False, rngs=rngs)


@functools.partial(jax.jit, static_argnums=(0, 1))  # one program, which the compilation cache keeps, instead of many small ones
def init_params(cfg: EncoderConfig, seed: int) -> Params:
    """Random float32 parameters (normal, deviation 0.02; norms one, biases zero) drawn from `seed`."""
    return nnx.to_pure_dict(nnx.state(Encoder(cfg, rngs=nnx.Rngs(seed))))


@functools.lru_cache(maxsize=4)
def _abstract(cfg: EncoderConfig) -> tuple[nnx.GraphDef, nnx.State]:
    return nnx.split(nnx.eval_shape(lambda: Encoder(cfg, rngs=nnx.Rngs(0))))


@functools.partial(jax.jit, static_argnums=1)
def encode(params: Params, cfg: EncoderConfig, tokens_BT: jax.Array, lengths_B: jax.Array) -> jax.Array:
    """Token rows to unit vectors [B, D] float32; what stands behind a row's length (at least 1) changes nothing."""
    visible_BT = jnp.arange(tokens_BT.shape[1]) < lengths_B[:, None]
    x_BTD = nnx.merge(_abstract(cfg)[0], nnx.State(params))(tokens_BT, visible_BT)
    if cfg.pooling == "cls":
        pooled_BD = x_BTD[:, 0]
    elif cfg.pooling == "max":
        pooled_BD = jnp.max(jnp.where(visible_BT[..., None], x_BTD, NEG_INF), axis=1)
    else:
        pooled_BD = jnp.sum(jnp.where(visible_BT[..., None], x_BTD, 0), axis=1) / lengths_B[:, None]
    return pooled_BD / jnp.maximum(jnp.linalg.norm(pooled_BD, axis=-1, keepdims=True), 1e-12)  # the floor of torch's normalize


# ------------------------------------------------------------------------------------------------------------------------- loading
def encoder_config(folder: Path) -> EncoderConfig:
    """What a folder of sentence-transformers (or a plain BERT folder, then pooled by the mean) says about its vectors.

    A Normalize module is not needed: vectors are made unit in any case, because neighbours are found by cosine.
    Raises `UserError` for another family, for modules behind the pooling and for every field that we could not honour exactly.
    """
    path = folder / "config.json"
    raw = read_json(path)
    if raw.get("model_type") != "bert":
        raise UserError(f"{path}: model_type {raw.get('model_type')!r} is not supported as an encoder; supported is bert (MiniLM, BGE, "
                        "GTE, E5 and others that use its layout). Set --config.retrieval.encoder=minilm-l6 or another folder.")
    problems = [f"{k}={raw[k]!r} (supported: {v!r})" for k, v in FIXED.items() if raw.get(k, v) != v]
    if problems:
        raise UserError(f"{path}: not supported yet: {', '.join(problems)}. Running it anyway would give wrong vectors.")
    try:
        return EncoderConfig(
            vocab_size=int(raw["vocab_size"]), d_model=int(raw["hidden_size"]), n_layers=int(raw["num_hidden_layers"]),
            n_heads=int(raw["num_attention_heads"]), d_ff=int(raw["intermediate_size"]), max_positions=int(raw["max_position_embeddings"]),
            n_types=int(raw.get("type_vocab_size", 2)), norm_eps=float(raw.get("layer_norm_eps", 1e-12)), pooling=_pooling(folder))
    except KeyError as e:
        raise UserError(f"{path} lacks {e}; it is not the config.json of a BERT encoder.") from None
    except (TypeError, ValueError) as e:
        raise UserError(f"{path} has a field of a wrong kind: {e}.") from None


def _pooling(folder: Path) -> str:
    """The one pooling mode of modules.json's Pooling module; the mean where the folder has no modules.json."""
    path = folder / "modules.json"
    if not path.exists():
        return "mean"
    modules = {str(m.get("type", "")).rsplit(".", 1)[-1]: str(m.get("path", "")) for m in read_json(path, list)}
    if extra := sorted(set(modules) - {"Transformer", "Pooling", "Normalize"}):
        raise UserError(f"{path}: the module {extra[0]} is not supported yet (supported: Transformer, Pooling, Normalize). "
                        "Running without it would give wrong vectors.")
    if (inner := modules.get("Pooling")) is None:
        return "mean"
    if Path(inner).name != inner:
        raise UserError(f"{path} names {inner!r}, which is not a folder beside it; it is not read.")
    raw = read_json(folder / inner / "config.json")
    modes = [k for k, v in raw.items() if k.startswith("pooling_mode_") and v is True]
    if len(modes) != 1 or modes[0] not in POOLINGS:
        raise UserError(f"{folder / inner / 'config.json'}: pooling {' + '.join(modes) or 'none'} is not supported yet; supported is one "
                        f"of {', '.join(POOLINGS)}.")
    return POOLINGS[modes[0]]


def text_rules(folder: Path, cfg: EncoderConfig) -> tuple[int, bool]:
    """(most tokens of a text, whether it is lower-cased first), as sentence_bert_config.json says; without one, all positions and no."""
    path = folder / "sentence_bert_config.json"
    raw = read_json(path) if path.exists() else {}
    longest = raw.get("max_seq_length") or cfg.max_positions
    if not isinstance(longest, int) or not 3 <= longest <= cfg.max_positions:
        raise UserError(f"{path}: max_seq_length={longest!r} is not a number from 3 to the {cfg.max_positions} positions of config.json.")
    return longest, bool(raw.get("do_lower_case", False))


def keys(cfg: EncoderConfig) -> dict[str, ParamPath]:
    """Checkpoint key -> our path, for every parameter of an encoder."""
    layers = {f"encoder.layer.{i}.{name}": ("layers", str(i), *path) for i in range(cfg.n_layers) for path, name in _LAYER.items()}
    return {**{name: path for path, name in _OUTER.items()}, **layers}


def load_encoder(folder: Path) -> tuple[Params, EncoderConfig]:
    """Read an encoder from a folder with config.json and safetensors, as float32 whatever the stored dtype. No torch, no pickle.

    Raises one `UserError` listing every missing, unexpected or wrongly shaped tensor.
    """
    cfg = encoder_config(folder)
    shapes = {tuple(p): leaf.get_value().shape for p, leaf in nnx.to_flat_state(_abstract(cfg)[1])}
    wanted, arrays, problems = keys(cfg), {}, []
    for name, array in _tensors(folder):
        if name in wanted:
            arrays[name] = array
        elif not name.startswith(UNUSED):
            problems.append(f"{name} is unexpected")
    for name, path in wanted.items():
        expected = shapes[path][::-1] if path[-1] == "kernel" else shapes[path]
        if name not in arrays:
            problems.append(f"{name} is missing")
        elif arrays[name].shape != expected:
            problems.append(f"{name} has shape {list(arrays[name].shape)}, config.json says {list(expected)}")
    if problems:
        raise UserError(f"{folder}: the weights do not fit config.json:\n  " + "\n  ".join(problems[:20])
                        + (f"\n  and {len(problems) - 20} more" if len(problems) > 20 else ""))
    params: Params = {}
    for name, path in wanted.items():
        inner = params
        for key in path[:-1]:
            inner = inner.setdefault(key, {})
        array = arrays[name].T if path[-1] == "kernel" else arrays[name]
        inner[path[-1]] = jnp.asarray(array.astype(np.float32))
    return params, cfg


def _tensors(folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    """The (name, array) pairs of a folder's safetensors files; checkpoints with a head call the encoder "bert."."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"{folder} holds no .safetensors weights (a pytorch_model.bin is a pickle and is never read). "
                        "Get the folder again, or name another.")
    for file in files:
        try:
            with safetensors.safe_open(file, framework="numpy") as opened:
                for name in opened.keys():
                    yield name.removeprefix("bert."), opened.get_tensor(name)
        except (safetensors.SafetensorError, OSError) as e:
            raise UserError(f"{file} is not a whole safetensors file ({e}). The download may be cut short; get it again.") from None
