"""config.json files as the hub has them, with the fields that they leave out and those that say nothing: the published sizes come out."""
from __future__ import annotations

from pathlib import Path

import pytest

from isara_jax.models import decoder, families

HERE = Path("config.json")
LLAMA3 = {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192, "rope_type": "llama3"}
# name -> (parameters, tied ones counted once; longest text for which frequencies stay as they are; config.json)
HUB = {
    "meta-llama/Llama-3.2-1B": (1_235_814_400, 131072, dict(
        model_type="llama", architectures=["LlamaForCausalLM"], attention_bias=False, attention_dropout=0.0, head_dim=64, hidden_act="silu",
        hidden_size=2048, intermediate_size=8192, max_position_embeddings=131072, mlp_bias=False, num_attention_heads=32,
        num_hidden_layers=16, num_key_value_heads=8, pretraining_tp=1, rms_norm_eps=1e-5, rope_scaling=LLAMA3, rope_theta=500000.0,
        tie_word_embeddings=True, torch_dtype="bfloat16", vocab_size=128256)),
    "HuggingFaceTB/SmolLM3-3B": (3_075_098_624, 65536, dict(
        model_type="smollm3", attention_bias=False, hidden_act="silu", hidden_size=2048, intermediate_size=11008,
        layer_types=["full_attention"] * 36, max_position_embeddings=65536, max_window_layers=28, mlp_bias=False, no_rope_layer_interval=4,
        no_rope_layers=[1, 1, 1, 0] * 9, num_attention_heads=16, num_hidden_layers=36, num_key_value_heads=4, pretraining_tp=2,
        rms_norm_eps=1e-6, rope_scaling=None, rope_theta=5000000.0, sliding_window=None, use_sliding_window=False, vocab_size=128256)),
    "mistralai/Mistral-7B-v0.1": (7_241_732_096, 32768, dict(
        model_type="mistral", hidden_act="silu", hidden_size=4096, intermediate_size=14336, max_position_embeddings=32768,
        num_attention_heads=32, num_hidden_layers=32, num_key_value_heads=8, rms_norm_eps=1e-5, rope_theta=10000.0, sliding_window=4096,
        tie_word_embeddings=False, vocab_size=32000)),
    "Qwen/Qwen2.5-0.5B": (494_032_768, 32768, dict(
        model_type="qwen2", attention_dropout=0.0, hidden_act="silu", hidden_size=896, intermediate_size=4864,
        max_position_embeddings=32768, max_window_layers=24, num_attention_heads=14, num_hidden_layers=24, num_key_value_heads=2,
        rms_norm_eps=1e-6, rope_theta=1000000.0, sliding_window=32768, tie_word_embeddings=True, use_mrope=False, use_sliding_window=False,
        vocab_size=151936)),
    "Qwen/Qwen3-0.6B": (596_049_920, 40960, dict(
        model_type="qwen3", attention_bias=False, head_dim=128, hidden_act="silu", hidden_size=1024, intermediate_size=3072,
        max_position_embeddings=40960, max_window_layers=28, num_attention_heads=16, num_hidden_layers=28, num_key_value_heads=8,
        rms_norm_eps=1e-6, rope_scaling=None, rope_theta=1000000, sliding_window=None, tie_word_embeddings=True, use_sliding_window=False,
        vocab_size=151936)),
    "google/gemma-2b": (2_506_172_416, 8192, dict(
        model_type="gemma", attention_bias=False, head_dim=256, hidden_act="gelu", hidden_activation=None, hidden_size=2048,
        intermediate_size=16384, max_position_embeddings=8192, num_attention_heads=8, num_hidden_layers=18, num_key_value_heads=1,
        rms_norm_eps=1e-6, rope_scaling=None, rope_theta=10000.0, vocab_size=256000)),
    "google/gemma-2-2b": (2_614_341_888, 8192, dict(
        model_type="gemma2", attn_logit_softcapping=50.0, cache_implementation="hybrid", final_logit_softcapping=30.0, head_dim=256,
        hidden_act="gelu_pytorch_tanh", hidden_activation="gelu_pytorch_tanh", hidden_size=2304, intermediate_size=9216,
        max_position_embeddings=8192, num_attention_heads=8, num_hidden_layers=26, num_key_value_heads=4, query_pre_attn_scalar=256,
        rms_norm_eps=1e-6, rope_theta=10000.0, sliding_window=4096, vocab_size=256000)),
    "google/gemma-3-1b-it": (999_885_952, 32768, dict(
        model_type="gemma3_text", attn_logit_softcapping=None, cache_implementation="hybrid", final_logit_softcapping=None, head_dim=256,
        hidden_activation="gelu_pytorch_tanh", hidden_size=1152, intermediate_size=6912, max_position_embeddings=32768,
        num_attention_heads=4, num_hidden_layers=26, num_key_value_heads=1, query_pre_attn_scalar=256, rms_norm_eps=1e-6,
        rope_local_base_freq=10000, rope_scaling=None, rope_theta=1000000, sliding_window=512, sliding_window_pattern=6,
        vocab_size=262144)),
    "google/gemma-3-4b-it": (3_880_263_168, 131072, dict(  # the text part
        model_type="gemma3", architectures=["Gemma3ForConditionalGeneration"], eos_token_id=[1, 106], image_token_index=262144,
        text_config=dict(hidden_size=2560, intermediate_size=10240, model_type="gemma3_text", num_hidden_layers=34,
                         rope_scaling={"factor": 8.0, "rope_type": "linear"}, sliding_window=1024), vision_config={"hidden_size": 1152})),
    "facebook/opt-125m": (125_239_296, 2048, dict(
        model_type="opt", _remove_final_layer_norm=False, activation_dropout=0.0, activation_function="relu", do_layer_norm_before=True,
        ffn_dim=3072, hidden_size=768, max_position_embeddings=2048, num_attention_heads=12, num_hidden_layers=12, prefix="</s>",
        vocab_size=50272, word_embed_proj_dim=768)),
    "EleutherAI/pythia-160m": (162_322_944, 2048, dict(
        model_type="gpt_neox", hidden_act="gelu", hidden_size=768, intermediate_size=3072, layer_norm_eps=1e-5,
        max_position_embeddings=2048, num_attention_heads=12, num_hidden_layers=12, rotary_emb_base=10000, rotary_pct=0.25,
        tie_word_embeddings=False, use_parallel_residual=True, vocab_size=50304)),
    "openai-community/gpt2": (124_439_808, 1024, dict(
        model_type="gpt2", activation_function="gelu_new", n_ctx=1024, n_embd=768, n_head=12, n_layer=12, n_positions=1024,
        layer_norm_epsilon=1e-5, vocab_size=50257, summary_type="cls_index", task_specific_params={})),
    "microsoft/Phi-3-mini-4k-instruct": (3_821_079_552, 4096, dict(
        model_type="phi3", attention_bias=False, auto_map={}, hidden_act="silu", hidden_size=3072, intermediate_size=8192,
        max_position_embeddings=4096, num_attention_heads=32, num_hidden_layers=32, num_key_value_heads=32,
        original_max_position_embeddings=4096, rms_norm_eps=1e-5, rope_scaling=None, rope_theta=10000.0, sliding_window=2047,
        tie_word_embeddings=False, vocab_size=32064)),
    "microsoft/Phi-4-mini-instruct": (3_836_021_760, 4096, dict(  # beyond 4096 the long factors count
        model_type="phi3", hidden_act="silu", hidden_size=3072, intermediate_size=8192, max_position_embeddings=131072,
        num_attention_heads=24, num_hidden_layers=32, num_key_value_heads=8, original_max_position_embeddings=4096,
        partial_rotary_factor=0.75, rms_norm_eps=1e-5, rope_theta=10000.0, sliding_window=262144, tie_word_embeddings=True,
        rope_scaling={"type": "longrope", "long_factor": [1.0] * 48, "short_factor": [1.0] * 48}, vocab_size=200064)),
    "allenai/OLMo-2-0425-1B": (1_484_916_736, 4096, dict(
        model_type="olmo2", attention_bias=False, hidden_act="silu", hidden_size=2048, intermediate_size=8192, max_position_embeddings=4096,
        num_attention_heads=16, num_hidden_layers=16, num_key_value_heads=16, rms_norm_eps=1e-6, rope_scaling=None, rope_theta=500000,
        tie_word_embeddings=False, vocab_size=100352)),
}


@pytest.mark.parametrize("name", HUB)
def test_a_config_of_the_hub_gives_the_published_size(name):
    parameters, context, raw = HUB[name]
    family = families.find(raw, HERE)
    assert decoder.n_params(family.read(raw, HERE)) == parameters and family.context_length(raw, HERE) == context
