"""Configs that nobody wrote down: fields of every family drawn from seeds, logits against transformers and torch."""
from __future__ import annotations

import os

import numpy as np
import pytest
from families_peer import expected_logits, load, logits, tokens_of
from hf_models import FULL, MODELS, SLIDING, make

pytest.importorskip("transformers")
SEEDS = int(os.environ.get("ISARA_DRAWS", "3"))
ACTIVATIONS = ["silu", "swish", "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "quick_gelu", "relu", "relu2", "tanh", "sigmoid"]
FAMILIES = [name for name in MODELS if name not in ("opt_post", "opt_plain", "gpt_neox_serial")]


def draw_rope(rng, pick, width, types=("default", "linear", "dynamic", "llama3", "yarn", "longrope")):
    """A rope_parameters of one of the types; `width` values of a head are rotated. The texts are within all original contexts."""
    kind, rope = pick(types), {"rope_theta": float(rng.integers(10, 20_000))}
    some = lambda: rng.uniform(1, 4, width // 2).round(3).tolist()
    extra = {"linear": {"factor": 2.5}, "dynamic": {"factor": 3.0},
             "llama3": {"factor": 4.0, "low_freq_factor": 0.5, "high_freq_factor": pick([1.5, 4.0]),
                        "original_max_position_embeddings": pick([8, 64])},
             "yarn": {"factor": pick([0.5, 2.0, 16.0]), "original_max_position_embeddings": pick([16, 48])}
             | pick([{}, {"beta_fast": 4.0, "beta_slow": 2.0}, {"attention_factor": 0.8}, {"mscale": 1.1, "mscale_all_dim": 0.6},
                     {"truncate": False}]),
             "longrope": {"short_factor": some(), "long_factor": some(), "original_max_position_embeddings": 64}
             | pick([{}, {"factor": 3.0}, {"attention_factor": 1.4}])}
    return rope | {"rope_type": kind} | extra.get(kind, {})


def draw(name, seed):
    """Overrides of the config fields of `MODELS[name]`."""
    rng = np.random.default_rng([seed, *map(ord, name)])
    pick = lambda values: values[rng.integers(len(values))]
    heads, width, layers = pick([2, 4, 6]), pick([8, 12]), pick([2, 3, 5])
    fields = MODELS[name][1]
    drawn = {"vocab_size": pick([61, 128]), "hidden_size": heads * width, "num_attention_heads": heads, "num_hidden_layers": layers,
             "intermediate_size": pick([24, 70]), "rms_norm_eps": pick([1e-6, 1e-2]), "layer_norm_eps": pick([1e-6, 1e-2]),
             "hidden_act": pick(ACTIVATIONS), "hidden_activation": pick(ACTIVATIONS), "activation_function": pick(ACTIVATIONS),
             "tie_word_embeddings": pick([True, False]), "attention_bias": pick([True, False]), "mlp_bias": pick([True, False]),
             "num_key_value_heads": pick([k for k in (1, 2, heads) if heads % k == 0]), "head_dim": pick([6, 10, 16]),
             "query_pre_attn_scalar": pick([3, 20]), "attn_logit_softcapping": pick([None, 1.5]),
             "final_logit_softcapping": pick([None, 2.0]), "use_sliding_window": pick([True, False]),
             "sliding_window": pick([1, 5, 1000]), "max_window_layers": pick([0, 1, layers]),
             "layer_types": pick([None, [pick([SLIDING, FULL]) for _ in range(layers)]]),
             "no_rope_layers": pick([None, [pick([0, 1]) for _ in range(layers)]]),
             "ffn_dim": pick([24, 70]), "do_layer_norm_before": pick([True, False]), "enable_bias": pick([True, False]),
             "layer_norm_elementwise_affine": pick([True, False]), "_remove_final_layer_norm": pick([True, False]),
             "word_embed_proj_dim": pick([None, 14]), "use_parallel_residual": pick([True, False]), "n_embd": heads * width,
             "n_head": heads, "n_layer": layers, "n_inner": pick([None, 30]), "layer_norm_epsilon": pick([1e-6, 1e-2]),
             "scale_attn_weights": pick([True, False]),
             "scale_attn_by_inverse_layer_idx": pick([True, False]), "reorder_and_upcast_attn": pick([True, False])}
    more = {"opt": ["do_layer_norm_before", "enable_bias", "layer_norm_elementwise_affine", "_remove_final_layer_norm",
                    "word_embed_proj_dim"],
            "gpt_neox": ["use_parallel_residual", "attention_bias"], "gpt2": ["reorder_and_upcast_attn"], "qwen2": ["layer_types"],
            "qwen3": ["max_window_layers"]}
    drawn = {key: value for key, value in drawn.items() if key in fields or key in more.get(name, ())}
    head_dim = drawn.get("head_dim", width)
    if name in ("gemma3_text", "olmo3"):
        drawn["rope_parameters"] = {kind: draw_rope(rng, pick, head_dim) for kind in (FULL, SLIDING)}
    elif name in ("phi3", "gpt_neox"):
        part = pick([0.5, 1.0])
        types = ("default", "longrope") if name == "phi3" else ("default", "linear", "yarn", "llama3")
        drawn["rope_parameters"] = draw_rope(rng, pick, int(head_dim * part), types) | {"partial_rotary_factor": part}
    elif "rope_parameters" in fields:
        drawn["rope_parameters"] = draw_rope(rng, pick, head_dim)
    if "layer_types" in drawn and name in ("qwen2", "qwen3", "smollm3") and SLIDING in (drawn["layer_types"] or ()):
        drawn["use_sliding_window"] = True  # without it there is no window, and transformers raises
    return drawn


@pytest.mark.parametrize("seed", range(SEEDS))
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_equal_transformers_on_drawn_configs(tmp_path, name, seed):
    drawn = draw(name, seed)
    model = make(name, tmp_path, seed=seed, **drawn)
    tokens = tokens_of(model.config.vocab_size, rows=2, width=33)
    expected = expected_logits(model, tokens)
    got = logits(*load(tmp_path), tokens)
    np.testing.assert_allclose(got, expected, rtol=0, atol=3e-5 * np.abs(expected).max(), err_msg=str(drawn))


def test_draws_are_of_every_kind():
    """That the space is what the docstring says: over some seeds every family has each of its switches both ways."""
    for name in FAMILIES:
        drawn = [draw(name, seed) for seed in range(40)]
        for key in drawn[0]:
            assert len({str(d[key]) for d in drawn}) > 1, (name, key)
