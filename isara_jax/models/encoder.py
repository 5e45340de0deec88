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
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from isara_jax.common import UserError
from isara_jax.models import tensors
from isara_jax.models.families.fields import Fields
from isara_jax.models.layers import ACTIVATIONS, NEG_INF
from isara_jax.models.resolve import read_json

Params = dict[str, Any]
ParamPath = tuple[str, ...]
HIGHEST = jax.lax.Precision.HIGHEST
# Keys of older pooling configs -> names of newer ones (sentence-transformers 5.4), in the order in which several are joined.
POOLINGS = {"pooling_mode_cls_token": "cls", "pooling_mode_max_tokens": "max", "pooling_mode_mean_tokens": "mean",
            "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens", "pooling_mode_weightedmean_tokens": "weightedmean",
            "pooling_mode_lasttoken": "lasttoken"}
# What transformers takes for fields that a config.json leaves out.
DEFAULTS = {"vocab_size": 30522, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072,
            "hidden_act": "gelu", "max_position_embeddings": 512, "type_vocab_size": 2, "layer_norm_eps": 1e-12}
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
    """Shape and constants of a BERT encoder and how a text's vector is pooled from it; every field changes the vectors.

    Attributes:
        activation: of the MLP, one of `config.ACTIVATIONS`.
        pooling: of `POOLINGS`: cls (the first token), max, mean, mean_sqrt_len_tokens (the sum over the root of the length), weightedmean
            (token t weighs t + 1), lasttoken; the vectors of several are joined in their order.
        normalise: whether the vector is made unit.
    """

    vocab_size: int                # V
    d_model: int                   # D
    n_layers: int                  # L
    n_heads: int                   # N
    d_ff: int                      # F
    max_positions: int
    n_types: int = 2
    norm_eps: float = 1e-12
    activation: str = "gelu"
    pooling: tuple[str, ...] = ("mean",)
    normalise: bool = False

    def __post_init__(self):
        if self.d_model % self.n_heads:
            raise ValueError(f"d_model={self.d_model} is not a multiple of n_heads={self.n_heads}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation={self.activation!r} is not one of {', '.join(ACTIVATIONS)}")
        if not self.pooling or not set(self.pooling) <= set(POOLINGS.values()):
            raise ValueError(f"pooling={self.pooling!r} is not a choice of {', '.join(POOLINGS.values())}")

    @property
    def width(self) -> int:
        """Width of a text's vector."""
        return self.d_model * len(self.pooling)


# ------------------------------------------------------------------------------------------------------------------------- modules
class _Layer(nnx.Module):
    """Post-norm block: each of attention and MLP is added to its input, then normalised."""

    def __init__(self, cfg: EncoderConfig, *, rngs: nnx.Rngs):
        linear = functools.partial(nnx.Linear, precision=HIGHEST, kernel_init=nnx.initializers.normal(0.02), rngs=rngs)
        D, F = cfg.d_model, cfg.d_ff
        self.n_heads, self.activation = cfg.n_heads, cfg.activation
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
        return self.mlp_norm(x_BTD + self.mlp["down"](ACTIVATIONS[self.activation](self.mlp["up"](x_BTD))))


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
    """Token rows to vectors [B, width] float32, as sentence-transformers would return them.

    What stands behind a row's length (at least 1) changes nothing. Vectors are unit where `cfg.normalise`.
    """
    visible_BT = jnp.arange(tokens_BT.shape[1]) < lengths_B[:, None]
    x_BTD = nnx.merge(_abstract(cfg)[0], nnx.State(params))(tokens_BT, visible_BT)
    out = jnp.concatenate([_pool(mode, x_BTD, visible_BT, lengths_B[:, None]) for mode in cfg.pooling], axis=-1)
    return unit(out) if cfg.normalise else out


def _pool(mode: str, x_BTD: jax.Array, visible_BT: jax.Array, lengths_B1: jax.Array) -> jax.Array:
    if mode == "cls":
        return x_BTD[:, 0]
    if mode == "lasttoken":
        return jnp.take_along_axis(x_BTD, lengths_B1[..., None] - 1, axis=1)[:, 0]
    if mode == "max":
        return jnp.max(jnp.where(visible_BT[..., None], x_BTD, NEG_INF), axis=1)
    if mode == "weightedmean":
        weights_BT = jnp.where(visible_BT, jnp.arange(1, x_BTD.shape[1] + 1, dtype=jnp.float32), 0)
        return weighted_sum(x_BTD, weights_BT) / jnp.sum(weights_BT, axis=1, keepdims=True)
    total_BD = weighted_sum(x_BTD, visible_BT.astype(jnp.float32))
    return total_BD / (lengths_B1 if mode == "mean" else jnp.sqrt(lengths_B1.astype(jnp.float32)))


def weighted_sum(x_BTD: jax.Array, weights_BT: jax.Array) -> jax.Array:
    """The sum over T of weighted states [B, D]; a state of weight 0 adds nothing, whatever it holds."""
    return jnp.sum(jnp.where(weights_BT[..., None] > 0, x_BTD * weights_BT[..., None], 0), axis=1)


def unit(x_BD: jax.Array) -> jax.Array:
    """Rows of length 1; the floor is that of torch's normalize."""
    return x_BD / jnp.maximum(jnp.linalg.norm(x_BD, axis=-1, keepdims=True), 1e-12)


# ------------------------------------------------------------------------------------------------------------------------- loading
def encoder_config(folder: Path) -> EncoderConfig:
    """What a folder of sentence-transformers says about its vectors; a plain BERT folder is pooled by the mean and not made unit.

    Raises `UserError` for another family, for modules behind the pooling and for every field that we could not honour exactly.
    """
    path = folder / "config.json"
    raw = read_json(path)
    if raw.get("model_type") != "bert":
        raise UserError(f"{path}: model_type {raw.get('model_type')!r} is not supported as an encoder; supported is bert (MiniLM, BGE, "
                        "GTE, E5 and others that use its layout). Set --config.retrieval.encoder=minilm-l6 or another folder.")
    f = Fields(raw, path, DEFAULTS)
    f.only("position_embedding_type", "absolute")
    f.only("is_decoder", False)
    shape = {"vocab_size": f.whole("vocab_size"), "d_model": f.whole("hidden_size"), "n_layers": f.whole("num_hidden_layers"),
             "n_heads": f.whole("num_attention_heads"), "d_ff": f.whole("intermediate_size"),
             "max_positions": f.whole("max_position_embeddings"), "n_types": f.whole("type_vocab_size"),
             "norm_eps": f.real("layer_norm_eps"), "activation": f.activation("hidden_act")}
    f.done()
    pooling, normalise = _modules(folder)
    try:
        return EncoderConfig(**shape, pooling=pooling, normalise=normalise)
    except ValueError as e:
        raise UserError(f"{path}: {e}. The folder is damaged; get it again.") from None


def _modules(folder: Path) -> tuple[tuple[str, ...], bool]:
    """(pooling modes, whether vectors are made unit) of modules.json; the mean and no where the folder has none."""
    path = folder / "modules.json"
    if not path.exists():
        return ("mean",), False
    listed = [m if isinstance(m, dict) else {} for m in read_json(path, list)]
    types = [str(m.get("type", "")) for m in listed]
    names = [t.rsplit(".", 1)[-1] if t.startswith("sentence_transformers.") else t for t in types]  # others are code of the folder
    if extra := [t for t, n in zip(types, names) if n not in ("Transformer", "Pooling", "Normalize")]:
        raise UserError(f"{path}: the module {extra[0]} is not supported yet (supported: Transformer, Pooling, Normalize). "
                        "Running without it would give wrong vectors.")
    if names not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise UserError(f"{path} lists {', '.join(names) or 'no module'}; supported is Transformer, Pooling, and Normalize behind them.")
    outer, inner = (str(m.get("path", "")) for m in listed[:2])
    if Path(inner).name != inner:
        raise UserError(f"{path} names {inner!r}, which is not a folder beside it; it is not read.")
    if outer:
        raise UserError(f"{path} names {outer!r} for the transformer, whose files are read from {folder} alone. Move them there.")
    return _pooling(folder / inner / "config.json", _default_prompt(folder)), "Normalize" in names


def _pooling(path: Path, prompt: str) -> tuple[str, ...]:
    """The modes of a Pooling module, in the old form (pooling_mode_mean_tokens: true, …) or the new (pooling_mode: a name or several)."""
    raw = read_json(path)
    if prompt and raw.get("include_prompt") is False:
        raise UserError(f"{path}: include_prompt=false, with a default prompt in config_sentence_transformers.json, is not supported: its "
                        "tokens would have to be left out of the pooling.")
    modes = raw.get("pooling_mode")
    if modes is None:
        older = [key for key, value in raw.items() if key.startswith("pooling_mode_") and value]
        if unknown := sorted(set(older) - set(POOLINGS)):
            raise UserError(f"{path}: pooling {unknown[0]} is not supported; supported are {', '.join(POOLINGS)}.")
        modes = [mode for key, mode in POOLINGS.items() if key in older] or ["mean"]  # as sentence-transformers does
    modes = [modes] if isinstance(modes, str) else modes
    if not isinstance(modes, list) or not modes or not all(mode in POOLINGS.values() for mode in modes):
        raise UserError(f"{path}: pooling_mode={raw['pooling_mode']!r} is not supported; supported are {', '.join(POOLINGS.values())}.")
    return tuple(modes)


def text_rules(folder: Path, cfg: EncoderConfig) -> tuple[int, bool, str]:
    """(most tokens of a text, whether it is lower-cased first, what is put before it), as sentence-transformers reads a folder.

    The first two are in sentence_bert_config.json; without a length there the tokenizer's own limit counts, and at most all positions.
    The third is the default prompt of config_sentence_transformers.json. Raises `UserError` for a length that the model has not got.
    """
    path = folder / "sentence_bert_config.json"
    raw = read_json(path) if path.exists() else {}
    longest = raw.get("max_seq_length")
    if longest is None:
        own = folder / "tokenizer_config.json"
        limit = read_json(own).get("model_max_length") if own.exists() else None
        longest = int(min(limit, cfg.max_positions)) if isinstance(limit, (int, float)) and limit > 0 else cfg.max_positions
    if not isinstance(longest, int) or not 3 <= longest <= cfg.max_positions:
        raise UserError(f"{path}: max_seq_length={longest!r} is not a number from 3 to the {cfg.max_positions} positions of config.json.")
    return longest, bool(raw.get("do_lower_case", False)), _default_prompt(folder)


def _default_prompt(folder: Path) -> str:
    path = folder / "config_sentence_transformers.json"
    raw = read_json(path) if path.exists() else {}
    name, prompts = raw.get("default_prompt_name"), raw.get("prompts") or {}
    if name is None:
        return ""
    if not isinstance(prompts, dict) or not isinstance(prompts.get(name), str):
        raise UserError(f"{path}: default_prompt_name={name!r} is not one of its prompts. The folder is damaged; get it again.")
    return prompts[name]


def keys(cfg: EncoderConfig) -> dict[str, ParamPath]:
    """Checkpoint key -> our path, for every parameter of an encoder."""
    layers = {f"encoder.layer.{i}.{name}": ("layers", str(i), *path) for i in range(cfg.n_layers) for path, name in _LAYER.items()}
    return {**{name: path for path, name in _OUTER.items()}, **layers}


def load_encoder(folder: Path) -> tuple[Params, EncoderConfig]:
    """Read an encoder from a folder with config.json and safetensors, as float32 whatever the stored dtype. No torch, no pickle.

    Raises one `UserError` listing every missing, unexpected, duplicate or wrongly shaped tensor.
    """
    cfg = encoder_config(folder)
    if not tensors.weight_files(folder):
        raise UserError(f"{folder} holds no .safetensors weights (a pytorch_model.bin is a pickle and is never read). "
                        "Get the folder again, or name another.")
    shapes = {tuple(path): leaf.get_value().shape for path, leaf in nnx.to_flat_state(_abstract(cfg)[1])}
    names = {path: name for name, path in keys(cfg).items()}
    stored = {names[path]: shape[::-1] if path[-1] == "kernel" else shape for path, shape in shapes.items()}
    plain = lambda name: name.removeprefix("bert.")  # as checkpoints with a head call the encoder
    checkpoint = tensors.open_folder(folder)
    found = tensors.fit(checkpoint, stored, lambda name: plain(name).startswith(UNUSED), canonical=plain)

    def read(key_path: tuple, _: Any) -> jax.Array:
        path = tuple(key.key for key in key_path)
        array = checkpoint.read(found[names[path]]).astype(np.float32)
        return jnp.asarray(array.T if path[-1] == "kernel" else array)

    return jax.tree_util.tree_map_with_path(read, nnx.to_pure_dict(_abstract(cfg)[1])), cfg
