"""Gemma 1, 2 and 3 (text): RMSNorm scales stored around zero, scaled embeddings, tanh caps, norms behind the products too.

As transformers 5.23 reads them (configuration_gemma*.py, modeling_gemma*.py).
"""
from __future__ import annotations

from typing import Any

from isara_jax.models.config import LayerKind
from isara_jax.models.families import rotary
from isara_jax.models.families.fields import Fields
from isara_jax.models.families.llama import ATTENTION, KEYS, LLAMA, MLP, OUTER, QK_NORMS, Parsed, finish, shape
from isara_jax.models.families.table import Keys

SANDWICH = (("input_layernorm", "attn_norm", "norm"), ("post_attention_layernorm", "attn_out_norm", "norm"),
            ("pre_feedforward_layernorm", "mlp_norm", "norm"), ("post_feedforward_layernorm", "mlp_out_norm", "norm"))

GEMMA_KEYS = KEYS
GEMMA2_KEYS = Keys("model.", "layers.{}.", OUTER, (*SANDWICH, *ATTENTION, *QK_NORMS, *MLP))
# The text part of a checkpoint with vision: transformers 4.50 wrote the first of the other prefixes, later ones the second.
GEMMA3_KEYS = Keys("model.", "layers.{}.", OUTER, GEMMA2_KEYS.inner, prefixes=("language_model.model.", "model.language_model."),
                   heads=("language_model.lm_head.weight",))

GEMMA = LLAMA | {"vocab_size": 256000, "hidden_size": 3072, "intermediate_size": 24576, "num_hidden_layers": 28, "num_attention_heads": 16,
                 "num_key_value_heads": 16, "head_dim": 256, "hidden_act": "gelu_pytorch_tanh", "max_position_embeddings": 8192,
                 "tie_word_embeddings": True}
GEMMA2 = GEMMA | {"hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, "num_attention_heads": 8,
                  "num_key_value_heads": 4, "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256, "sliding_window": 4096,
                  "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
GEMMA3 = GEMMA2 | {"vocab_size": 262208, "max_position_embeddings": 131072, "attn_logit_softcapping": None, "final_logit_softcapping": None,
                   "rope_theta": 1_000_000.0, "rope_local_base_freq": 10_000.0, "sliding_window_pattern": 6}


def gemma(f: Fields) -> Parsed:
    arguments, context = shape(f)
    if f.get("hidden_act") == "gelu":  # the first releases said so and meant the approximation
        arguments["activation"] = "gelu_tanh"
    if f.get("hidden_activation") is not None and f.activation("hidden_activation") != arguments["activation"]:
        f.unsupported.append(f"hidden_activation={f.get('hidden_activation')!r} beside hidden_act={f.get('hidden_act')!r} "
                             "(supported: the same, or null)")
    rope, longest = rotary.read(f, arguments["head_dim"], context)
    return finish(f, [LayerKind(rope)] * arguments["n_layers"], longest, **_of_all(f, arguments))


def gemma2(f: Fields) -> Parsed:
    arguments, context = shape(f, "hidden_activation")
    windows = _windows(f, arguments["n_layers"], 2)
    rope, longest = rotary.read(f, arguments["head_dim"], context)
    scale = f.real("query_pre_attn_scalar") ** -0.5
    kinds = [LayerKind(rope, window, scale) for window in windows]
    return finish(f, kinds, longest, norm_at="sandwich", attn_softcap=f.real("attn_logit_softcapping", null=True) or 0.0,
                  logit_softcap=f.real("final_logit_softcapping", null=True) or 0.0, **_of_all(f, arguments))


def gemma3(f: Fields) -> Parsed:
    """transformers stores attn_logit_softcapping and never applies it here (Gemma3Attention.forward); neither do we."""
    arguments, context = shape(f, "hidden_activation")
    windows = _windows(f, arguments["n_layers"], f.whole("sliding_window_pattern"))
    thetas = {"full_attention": f.real("rope_theta"), "sliding_attention": f.real("rope_local_base_freq")}
    ropes, longest = rotary.by_layer(f, arguments["head_dim"], context, thetas)
    scale = f.real("query_pre_attn_scalar") ** -0.5
    kinds = [LayerKind(ropes["sliding_attention" if window else "full_attention"], window, scale) for window in windows]
    return finish(f, kinds, longest, norm_at="sandwich", qk_norm="head",
                  logit_softcap=f.real("final_logit_softcapping", null=True) or 0.0, **_of_all(f, arguments))


def _windows(f: Fields, layers: int, period: int) -> list[int]:
    types = ["sliding_attention" if (i + 1) % period else "full_attention" for i in range(layers)]
    return f.windows(types, f.whole("sliding_window", null=True))


def _of_all(f: Fields, arguments: dict[str, Any]) -> dict[str, Any]:
    bias = f.flag("attention_bias")
    return arguments | {"norm_offset": 1.0, "embed_scale": arguments["d_model"] ** 0.5, "qkv_bias": bias, "o_bias": bias}
