"""OPT, GPT-NeoX (Pythia) and GPT-2: LayerNorm with bias, an MLP without gate, one key head for each query head.

As transformers 5.23 reads them (configuration_*.py, modeling_*.py of the family).
"""
from __future__ import annotations

from isara_jax.models.config import LayerKind
from isara_jax.models.families import rotary
from isara_jax.models.families.fields import Fields
from isara_jax.models.families.llama import Parsed, finish
from isara_jax.models.families.table import Keys

OPT_EPS = 1e-5  # torch.nn.LayerNorm's default: OPT's config has no field for it
OPT_OFFSET = 2  # rows of its position table that are never read

OPT_KEYS = Keys("model.", "decoder.layers.{}.", (
    ("decoder.embed_tokens", "embed", "embedding"), ("decoder.embed_positions", "positions", "embedding"),
    ("decoder.project_in", "project_in", "linear"), ("decoder.project_out", "project_out", "linear"),
    ("decoder.final_layer_norm", "norm", "norm")), (
    ("self_attn_layer_norm", "attn_norm", "norm"), *((f"self_attn.{p}_proj", f"attn/{p}", "linear") for p in "qkv"),
    ("self_attn.out_proj", "attn/o", "linear"), ("final_layer_norm", "mlp_norm", "norm"), ("fc1", "mlp/up", "linear"),
    ("fc2", "mlp/down", "linear")))
# transformers 4 and the hub call the head embed_out; 5 renames it in memory and writes the old name
NEOX_KEYS = Keys("gpt_neox.", "layers.{}.", (("embed_in", "embed", "embedding"), ("final_layer_norm", "norm", "norm")), (
    ("input_layernorm", "attn_norm", "norm"), ("post_attention_layernorm", "mlp_norm", "norm"),
    ("attention.query_key_value", "attn/q attn/k attn/v", "heads"), ("attention.dense", "attn/o", "linear"),
    ("mlp.dense_h_to_4h", "mlp/up", "linear"), ("mlp.dense_4h_to_h", "mlp/down", "linear")), "embed_out.weight", heads=("lm_head.weight",))
GPT2_KEYS = Keys("transformer.", "h.{}.", (
    ("wte", "embed", "embedding"), ("wpe", "positions", "embedding"), ("ln_f", "norm", "norm")), (
    ("ln_1", "attn_norm", "norm"), ("attn.c_attn", "attn/q attn/k attn/v", "conv1d"), ("attn.c_proj", "attn/o", "conv1d"),
    ("ln_2", "mlp_norm", "norm"), ("mlp.c_fc", "mlp/up", "conv1d"), ("mlp.c_proj", "mlp/down", "conv1d")))

OPT = {"vocab_size": 50272, "hidden_size": 768, "num_hidden_layers": 12, "ffn_dim": 3072, "max_position_embeddings": 2048,
       "do_layer_norm_before": True, "_remove_final_layer_norm": False, "word_embed_proj_dim": None, "num_attention_heads": 12,
       "activation_function": "relu", "enable_bias": True, "layer_norm_elementwise_affine": True, "tie_word_embeddings": True}
NEOX = {"vocab_size": 50432, "hidden_size": 6144, "num_hidden_layers": 44, "num_attention_heads": 64, "intermediate_size": 24576,
        "hidden_act": "gelu", "max_position_embeddings": 2048, "layer_norm_eps": 1e-5, "tie_word_embeddings": False,
        "use_parallel_residual": True, "attention_bias": True, "rotary_emb_base": 10_000.0, "rotary_pct": 0.25}
GPT2 = {"vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12, "n_inner": None,
        "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
        "tie_word_embeddings": True}


def opt(f: Fields) -> Parsed:
    width, heads, head_dim = _heads(f, "hidden_size", "num_attention_heads")
    context, before, bias = f.whole("max_position_embeddings"), f.flag("do_layer_norm_before"), f.flag("enable_bias")
    embed_width = f.whole("word_embed_proj_dim", null=True) or width
    return finish(
        f, [LayerKind(None)], context, vocab_size=f.whole("vocab_size"), d_model=width, n_layers=f.whole("num_hidden_layers"),
        n_heads=heads, n_kv_heads=heads, head_dim=head_dim, d_ff=f.whole("ffn_dim"), norm="layer", norm_eps=OPT_EPS,
        norm_affine=f.flag("layer_norm_elementwise_affine"), norm_at="pre" if before else "post",
        final_norm=before and not f.flag("_remove_final_layer_norm"), qkv_bias=bias, o_bias=bias, mlp_bias=bias,
        activation=f.activation("activation_function"), gated=False, embed_width=embed_width if embed_width != width else 0,
        positions=context + OPT_OFFSET, position_offset=OPT_OFFSET, tie_embeddings=f.flag("tie_word_embeddings"))


def gpt_neox(f: Fields) -> Parsed:
    width, heads, head_dim = _heads(f, "hidden_size", "num_attention_heads")
    context, bias = f.whole("max_position_embeddings"), f.flag("attention_bias")
    rope, longest = rotary.read(f, head_dim, context, theta="rotary_emb_base", fraction="rotary_pct")
    return finish(
        f, [LayerKind(rope)], longest, vocab_size=f.whole("vocab_size"), d_model=width, n_layers=f.whole("num_hidden_layers"),
        n_heads=heads, n_kv_heads=heads, head_dim=head_dim, d_ff=f.whole("intermediate_size"), norm="layer",
        norm_eps=f.real("layer_norm_eps"), parallel=f.flag("use_parallel_residual"), qkv_bias=bias, o_bias=bias, mlp_bias=True,
        activation=f.activation("hidden_act"), gated=False, tie_embeddings=f.flag("tie_word_embeddings"))


def gpt2(f: Fields) -> Parsed:
    """reorder_and_upcast_attn changes no float32 result and is not read; scores are float32 here anyway."""
    width, heads, head_dim = _heads(f, "n_embd", "n_head")
    context, layers = f.whole("n_positions"), f.whole("n_layer")
    scale, by_layer = head_dim ** -0.5 if f.flag("scale_attn_weights") else 1.0, f.flag("scale_attn_by_inverse_layer_idx")
    return finish(
        f, [LayerKind(None, scale=scale / (i + 1 if by_layer else 1)) for i in range(layers)], context, vocab_size=f.whole("vocab_size"),
        d_model=width, n_layers=layers, n_heads=heads, n_kv_heads=heads, head_dim=head_dim, d_ff=f.whole("n_inner", null=True) or 4 * width,
        norm="layer", norm_eps=f.real("layer_norm_epsilon"), qkv_bias=True, o_bias=True, mlp_bias=True,
        activation=f.activation("activation_function"), gated=False, positions=context, tie_embeddings=f.flag("tie_word_embeddings"))


def _heads(f: Fields, width: str, heads: str) -> tuple[int, int, int]:
    """(model width, heads, width of a head)."""
    d_model, n = f.whole(width), f.whole(heads)
    if d_model % n:
        f.wrong.append(f"{width}={d_model} is not a multiple of {heads}={n}")
    return d_model, n, max(1, d_model // n)
