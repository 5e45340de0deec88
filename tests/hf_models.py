"""Tiny random Hugging Face models of every family, every field of their configs away from its default. Needs torch and transformers."""
from __future__ import annotations

from pathlib import Path
from typing import Any

LAYERS, CONTEXT, VOCABULARY = 4, 128, 96
SHAPE = {"vocab_size": VOCABULARY, "hidden_size": 48, "num_hidden_layers": LAYERS, "num_attention_heads": 6, "intermediate_size": 80,
         "max_position_embeddings": CONTEXT, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GROUPED = SHAPE | {"num_key_value_heads": 2, "rms_norm_eps": 1e-3, "hidden_act": "gelu"}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 777.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 8.0, "beta_slow": 0.5}
LONG = {"rope_type": "longrope", "rope_theta": 900.0, "partial_rotary_factor": 0.5, "short_factor": [1.0, 1.5], "long_factor": [2.0, 9.0]}
SLIDING, FULL = "sliding_attention", "full_attention"
GEMMA = GROUPED | {"head_dim": 10, "hidden_act": "silu", "tie_word_embeddings": False, "attention_bias": True}
GEMMA2 = {**GEMMA, "hidden_activation": "relu", "query_pre_attn_scalar": 5, "sliding_window": 7, "final_logit_softcapping": 4.0,
          "attn_logit_softcapping": 3.0, "layer_types": [FULL, SLIDING, SLIDING, FULL]}
OPT = {k: v for k, v in SHAPE.items() if k != "intermediate_size"} | {
    "ffn_dim": 80, "activation_function": "gelu_new", "dropout": 0.0, "tie_word_embeddings": False}
NEOX = SHAPE | {"hidden_act": "gelu_fast", "layer_norm_eps": 1e-3, "tie_word_embeddings": True,
                "rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 700.0, "partial_rotary_factor": 0.5}}

# name -> (class of transformers, fields of its config)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", GROUPED | {"head_dim": 12, "rope_parameters": LLAMA3, "attention_bias": True, "mlp_bias": True,
                                  "tie_word_embeddings": True}),
    "smollm3": ("SmolLM3", GROUPED | {
        "rope_parameters": {"rope_type": "linear", "rope_theta": 300.0, "factor": 2.0}, "no_rope_layers": [1, 0, 0, 1],
        "use_sliding_window": True, "sliding_window": 9, "layer_types": [FULL, SLIDING, FULL, SLIDING], "attention_bias": True,
        "mlp_bias": True, "tie_word_embeddings": False}),
    "mistral": ("Mistral", GROUPED | {"head_dim": 12, "rope_parameters": YARN, "sliding_window": 7, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2", GROUPED | {"rope_parameters": YARN | {"truncate": False, "attention_factor": 1.3}, "use_sliding_window": True,
                                  "sliding_window": 8, "max_window_layers": 1, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3", GROUPED | {"head_dim": 14, "rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 0.4}, "attention_bias": True,
                                  "use_sliding_window": True, "sliding_window": 6, "layer_types": [SLIDING, FULL, SLIDING, SLIDING],
                                  "tie_word_embeddings": True}),
    "gemma": ("Gemma", GEMMA | {"rope_parameters": {"rope_type": "default", "rope_theta": 333.0}}),
    "gemma2": ("Gemma2", GEMMA2 | {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 444.0}}),
    "gemma3_text": ("Gemma3", GEMMA2 | {"rope_parameters": {
        FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 5000.0}, SLIDING: {"rope_type": "default", "rope_theta": 50.0}}}),
    "opt": ("OPT", OPT),
    "opt_post": ("OPT", OPT | {"do_layer_norm_before": False, "word_embed_proj_dim": 20, "activation_function": "relu",
                               "tie_word_embeddings": True}),
    "opt_plain": ("OPT", OPT | {"enable_bias": False, "layer_norm_elementwise_affine": False, "_remove_final_layer_norm": True}),
    "gpt_neox": ("GPTNeoX", NEOX),
    "gpt_neox_serial": ("GPTNeoX", NEOX | {"use_parallel_residual": False, "attention_bias": False, "tie_word_embeddings": False}),
    "gpt2": ("GPT2", {"vocab_size": VOCABULARY, "n_positions": CONTEXT, "n_embd": 48, "n_layer": LAYERS, "n_head": 6, "n_inner": 80,
                      "activation_function": "quick_gelu", "layer_norm_epsilon": 1e-3, "scale_attn_by_inverse_layer_idx": True,
                      "scale_attn_weights": False, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2}),
    "phi3": ("Phi3", GROUPED | {"rope_parameters": LONG, "original_max_position_embeddings": 64, "sliding_window": 8,
                                "tie_word_embeddings": True}),
    "olmo2": ("Olmo2", GROUPED | {"rope_parameters": LLAMA3, "attention_bias": True, "tie_word_embeddings": True}),
    "olmo3": ("Olmo3", GROUPED | {"rope_parameters": {FULL: YARN, SLIDING: {"rope_type": "default", "rope_theta": 60.0}},
                                  "sliding_window": 6, "layer_types": [SLIDING, FULL, FULL, SLIDING], "attention_bias": True,
                                  "tie_word_embeddings": True}),
}


def make(family: str, folder: Path, *, seed: int = 0, dtype: str = "float32", shard: str = "5GB", **overrides: Any):
    """A tiny random model of `MODELS`, saved in `folder` (no tokenizer); every parameter is random, biases and norms too.

    Returns the transformers model in evaluation mode, with the attention that honours softcaps ("eager"). `overrides` are config fields;
    `shard` is the largest size of one file.
    """
    import torch
    import transformers

    name, fields = MODELS[family]
    text = "Text" if name == "Gemma3" else ""
    config = getattr(transformers, f"{name}{text}Config")(**_copy({**fields, **overrides}), initializer_range=0.02)
    architecture = "GPT2LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM"
    model = getattr(transformers, architecture)._from_config(config, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                centre = 1.0 if key.endswith("weight") and not name.startswith("Gemma") else 0.0
                parameter.copy_(centre + 0.3 * drawn)
            else:
                parameter.copy_(drawn * (1.0 if "emb" in key or "wte" in key or "wpe" in key else 1.5 * parameter.shape[-1] ** -0.5))
            parameter.data = parameter.data.to(getattr(torch, dtype))  # and not model.to, which would round rotary frequencies too
    model.save_pretrained(folder, max_shard_size=shard)
    return model


def _copy(value: Any) -> Any:
    """Configs change the dicts they are given."""
    if isinstance(value, dict):
        return {k: _copy(v) for k, v in value.items()}
    return list(value) if isinstance(value, list) else value
