"""Llama and the families that differ from it by little: RMSNorm, gated MLP, rotary embeddings.

What each reads, and the default of each absent field, is as in transformers 5.23 (configuration_*.py and modeling_*.py of the family);
transformers 4.57 agrees unless a comment says otherwise.
"""
from __future__ import annotations

from typing import Any

from isara_jax.common import UserError
from isara_jax.models.config import LayerKind, ModelConfig, Rope
from isara_jax.models.families import rotary
from isara_jax.models.families.fields import ACTIVATIONS, Fields
from isara_jax.models.families.table import Keys

OUTER = (("embed_tokens", "embed", "embedding"), ("norm", "norm", "norm"))
ATTENTION = tuple((f"self_attn.{p}_proj", f"attn/{p}", "linear") for p in "qkvo")
MLP = tuple((f"mlp.{p}_proj", f"mlp/{p}", "linear") for p in ("gate", "up", "down"))
QK_NORMS = tuple((f"self_attn.{p}_norm", f"attn/{p}_norm", "norm") for p in "qk")
NORMS = (("input_layernorm", "attn_norm", "norm"), ("post_attention_layernorm", "mlp_norm", "norm"))

KEYS = Keys("model.", "layers.{}.", OUTER, (*NORMS, *ATTENTION, *QK_NORMS, *MLP))
PHI3_KEYS = Keys("model.", "layers.{}.", OUTER, (
    *NORMS, ("self_attn.qkv_proj", "attn/q attn/k attn/v", "linear"), ("self_attn.o_proj", "attn/o", "linear"),
    ("mlp.gate_up_proj", "mlp/gate mlp/up", "linear"), ("mlp.down_proj", "mlp/down", "linear")))
OLMO2_KEYS = Keys("model.", "layers.{}.", OUTER, (
    *ATTENTION, *QK_NORMS, *MLP, ("post_attention_layernorm", "attn_out_norm", "norm"),
    ("post_feedforward_layernorm", "mlp_out_norm", "norm")))

LLAMA = {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
         "num_key_value_heads": None, "head_dim": None, "hidden_act": "silu", "max_position_embeddings": 2048, "rms_norm_eps": 1e-6,
         "tie_word_embeddings": False, "rope_theta": 10_000.0, "attention_bias": False, "mlp_bias": False}
SMOLLM3 = LLAMA | {"vocab_size": 128256, "hidden_size": 2048, "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 4,
                   "max_position_embeddings": 32768, "tie_word_embeddings": True, "rope_theta": 2_000_000.0, "use_sliding_window": False,
                   "sliding_window": None, "no_rope_layers": None, "no_rope_layer_interval": 4}
MISTRAL = LLAMA | {"intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096}
QWEN2 = LLAMA | {"vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32, "max_position_embeddings": 32768,
                 "use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}
QWEN3 = QWEN2 | {"head_dim": 128}
PHI3 = LLAMA | {"vocab_size": 32064, "hidden_size": 3072, "intermediate_size": 8192, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
                "sliding_window": None, "original_max_position_embeddings": 4096, "partial_rotary_factor": 1.0}
OLMO2 = LLAMA | {"vocab_size": 50304, "rms_norm_eps": 1e-5}
OLMO3 = OLMO2 | {"rope_theta": 500_000.0, "sliding_window": 4096}

Parsed = tuple[ModelConfig, int]  # and the longest text in tokens


def shape(f: Fields, activation: str = "hidden_act") -> tuple[dict[str, Any], int]:
    """(the arguments of a `ModelConfig` that all these families read alike, max_position_embeddings)."""
    heads, width = f.whole("num_attention_heads"), f.whole("hidden_size")
    head_dim = f.whole("head_dim", null=f.defaults["head_dim"] is None)
    if head_dim is None and width % heads:
        f.wrong.append(f"hidden_size={width} is not a multiple of num_attention_heads={heads}, and there is no head_dim")
    kv_heads = f.whole("num_key_value_heads", null=True) or heads
    if heads % kv_heads:
        f.wrong.append(f"num_attention_heads={heads} is not a multiple of num_key_value_heads={kv_heads}")
    return {"vocab_size": f.whole("vocab_size"), "d_model": width, "n_layers": f.whole("num_hidden_layers"), "n_heads": heads,
            "n_kv_heads": kv_heads, "head_dim": head_dim or max(1, width // heads),
            "d_ff": f.whole("intermediate_size"), "norm_eps": f.real("rms_norm_eps"), "activation": f.activation(activation),
            "tie_embeddings": f.flag("tie_word_embeddings")}, f.whole("max_position_embeddings")


def finish(f: Fields, kinds: list[LayerKind], context: int, **arguments: Any) -> Parsed:
    """The config, once nothing that was read is bad. `kinds` has one for each layer; the pattern is as short as they allow."""
    f.done()
    period = next(p for p in range(1, len(kinds) + 1) if all(kind == kinds[i % p] for i, kind in enumerate(kinds)))
    try:
        return ModelConfig(pattern=tuple(kinds[:period]), **arguments), context
    except ValueError as e:
        f.wrong.append(str(e))
        f.done()
        raise


def llama(f: Fields) -> Parsed:
    """A sliding_window is not read, as in LlamaModel: every layer sees all of the text."""
    arguments, context = shape(f)
    rope, longest = rotary.read(f, arguments["head_dim"], context)
    bias = f.flag("attention_bias")
    kinds = [LayerKind(rope)] * arguments["n_layers"]
    return finish(f, kinds, longest, qkv_bias=bias, o_bias=bias, mlp_bias=f.flag("mlp_bias"), **arguments)


def mistral(f: Fields) -> Parsed:
    arguments, context = shape(f)
    window = f.whole("sliding_window", null=True) or 0
    f.only("layer_types", None, ["sliding_attention" if window else "full_attention"] * arguments["n_layers"])
    rope, longest = rotary.read(f, arguments["head_dim"], context)
    return finish(f, [LayerKind(rope, window)] * arguments["n_layers"], longest, **arguments)


def smollm3(f: Fields) -> Parsed:
    arguments, context = shape(f)
    layers, interval, turned = range(arguments["n_layers"]), f.whole("no_rope_layer_interval"), f.get("no_rope_layers")
    if turned is not None and not (isinstance(turned, list) and len(turned) >= len(layers) and all(x in (0, 1) for x in turned)):
        f.wrong.append(f"no_rope_layers={turned!r} where a list of {len(layers)} zeros and ones is needed")
        turned = None
    turned = [(i + 1) % interval for i in layers] if turned is None else turned
    window, bias = f.whole("sliding_window", null=True), f.flag("attention_bias")
    without = f.flag("use_sliding_window") and window is not None
    windows = f.windows(["sliding_attention" if without and not turned[i] else "full_attention" for i in layers], window)
    rope, longest = rotary.read(f, arguments["head_dim"], context)
    kinds = [LayerKind(rope if turned[i] else None, windows[i]) for i in layers]
    return finish(f, kinds, longest, qkv_bias=bias, o_bias=bias, mlp_bias=f.flag("mlp_bias"), **arguments)


def qwen2(f: Fields) -> Parsed:
    return _qwen(f, qkv_bias=True)


def qwen3(f: Fields) -> Parsed:
    bias = f.flag("attention_bias")
    return _qwen(f, qkv_bias=bias, o_bias=bias, qk_norm="head")


def _qwen(f: Fields, **more: Any) -> Parsed:
    arguments, context = shape(f)
    window = f.whole("sliding_window", null=True) if f.flag("use_sliding_window") else None
    first = f.whole("max_window_layers", least=0)
    types = ["full_attention" if window is None or i < first else "sliding_attention" for i in range(arguments["n_layers"])]
    windows = f.windows(types, window)
    rope, longest = rotary.read(f, arguments["head_dim"], context)
    return finish(f, [LayerKind(rope, w) for w in windows], longest, **more, **arguments)


def phi3(f: Fields) -> Parsed:
    arguments, context = shape(f)
    rope, longest = rotary.read(f, arguments["head_dim"], context, fraction="partial_rotary_factor", legacy=("su", "yarn"))
    return finish(f, [LayerKind(rope, f.whole("sliding_window", null=True) or 0)] * arguments["n_layers"], longest, **arguments)


def olmo2(f: Fields) -> Parsed:
    arguments, context = shape(f)
    rope, longest = rotary.read(f, arguments["head_dim"], context)
    return _olmo(f, [LayerKind(rope)] * arguments["n_layers"], longest, arguments)


def olmo3(f: Fields) -> Parsed:
    arguments, context = shape(f)
    theta = f.real("rope_theta")
    ropes, longest = rotary.by_layer(f, arguments["head_dim"], context, dict.fromkeys(rotary.BY_LAYER, theta))
    types = ["sliding_attention" if (i + 1) % 4 else "full_attention" for i in range(arguments["n_layers"])]
    windows = f.windows(types, f.whole("sliding_window", null=True))
    sliding = f.table("rope_parameters").get("sliding_attention")
    if theta != OLMO3["rope_theta"] and any(windows) and not (isinstance(sliding, dict) and sliding.get("rope_theta")):
        f.unsupported.append(f"rope_theta={theta} without rope_parameters (transformers 4 and 5 read it differently for windowed layers; "
                             f"supported: {OLMO3['rope_theta']}, or rope_parameters by layer type)")
    return _olmo(f, [LayerKind(ropes["sliding_attention" if w else "full_attention"], w) for w in windows], longest, arguments)


def _olmo(f: Fields, kinds: list[LayerKind], longest: int, arguments: dict[str, Any]) -> Parsed:
    bias = f.flag("attention_bias")
    return finish(f, kinds, longest, norm_at="output", qk_norm="row", qkv_bias=bias, o_bias=bias, **arguments)


# ------------------------------------------------------------------------------------------------------------------- writing
def write(cfg: ModelConfig, context: int) -> dict[str, Any]:
    """The config.json of a Llama with this mathematics, in the spelling of transformers 4 and of 5; `llama` reads it back.

    Raises `UserError` for a model that is no Llama.
    """
    kind = cfg.pattern[0]
    same = ModelConfig(cfg.vocab_size, cfg.d_model, cfg.n_layers, cfg.n_heads, cfg.n_kv_heads, cfg.head_dim, cfg.d_ff,
                       (LayerKind(kind.rope),), norm_eps=cfg.norm_eps, qkv_bias=cfg.qkv_bias, o_bias=cfg.qkv_bias, mlp_bias=cfg.mlp_bias,
                       activation=cfg.activation, tie_embeddings=cfg.tie_embeddings)
    if same != cfg or kind.rope is None or kind.rope.fraction != 1:
        raise UserError("this model's mathematics is not Llama's, so no config.json of a Llama can say it.")
    rope = _rope_table(kind.rope, context)
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": cfg.vocab_size, "hidden_size": cfg.d_model,
            "intermediate_size": cfg.d_ff, "num_hidden_layers": cfg.n_layers, "num_attention_heads": cfg.n_heads,
            "num_key_value_heads": cfg.n_kv_heads, "head_dim": cfg.head_dim, "max_position_embeddings": context,
            "hidden_act": next(name for name, ours in ACTIVATIONS.items() if ours == cfg.activation), "rms_norm_eps": cfg.norm_eps,
            "attention_bias": cfg.qkv_bias, "mlp_bias": cfg.mlp_bias, "tie_word_embeddings": cfg.tie_embeddings,
            "rope_theta": kind.rope.theta, "rope_scaling": rope if rope["rope_type"] != "default" else None,
            "rope_parameters": {"rope_theta": kind.rope.theta, **rope}}


def _rope_table(rope: Rope, context: int) -> dict[str, Any]:
    if rope.scaling == "linear":
        return {"rope_type": "linear", "factor": rope.factor}
    if rope.scaling == "llama3":
        return {"rope_type": "llama3", "factor": rope.factor, "low_freq_factor": rope.low, "high_freq_factor": rope.high,
                "original_max_position_embeddings": rope.original}
    if rope.scaling == "yarn":
        return {"rope_type": "yarn", "factor": rope.factor, "original_max_position_embeddings": rope.original,
                "attention_factor": rope.gain, "beta_slow": rope.low, "beta_fast": rope.high, "truncate": rope.round_ends}
    if rope.scaling == "factors":  # the same divisors whatever the length
        return {"rope_type": "longrope", "factor": 1.0, "original_max_position_embeddings": context, "attention_factor": rope.gain,
                "short_factor": list(rope.factors), "long_factor": list(rope.factors)}
    return {"rope_type": "default"}
