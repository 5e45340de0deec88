"""Every family with every field of its config away from the default: logits, layouts, spellings, defaults, and what is refused."""
from __future__ import annotations

import copy
import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from families_peer import expected_logits, load, logits, tokens_of
from hf_models import FULL, MODELS, SLIDING, make

from isara_jax.common import UserError
from isara_jax.models import families, hf, tensors
from isara_jax.models.config import LayerKind, ModelConfig, Rope
from isara_jax.models.families import llama, table

pytest.importorskip("transformers")
HERE = Path("config.json")
TINY = {"model_type": "llama", "vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 20}


def read(raw):
    return families.find(raw, HERE).read(raw, HERE)


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


# ----------------------------------------------------------------------------------------------------------------------- parity
@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_transformers(tmp_path, name):
    model = make(name, tmp_path)
    tokens = tokens_of(96)
    expected = expected_logits(model, tokens)
    np.testing.assert_allclose(logits(*load(tmp_path), tokens), expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("name", MODELS)
def test_bfloat16_is_no_further_from_float32_than_torch_is(tmp_path, name):
    """Root mean squares over 3 x 40 x 96 logits; ours are nearer because sums and norms stay float32."""
    import torch

    model, tokens = make(name, tmp_path), tokens_of(96)
    exact = expected_logits(model, tokens)
    ours = logits(*load(tmp_path, "bfloat16"), tokens, "bfloat16") - exact
    rounded = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16, attn_implementation="eager")
    theirs = expected_logits(rounded, tokens) - exact
    assert 0 < np.sqrt(np.mean(ours ** 2)) <= np.sqrt(np.mean(theirs ** 2))


def test_every_family_is_tried():
    assert {families.find({"model_type": name.removesuffix("_post").removesuffix("_plain").removesuffix("_serial")}, HERE).model_type
            for name in MODELS} == set(families.FAMILIES) - {"gemma3"}


# ---------------------------------------------------------------------------------------------------------------------- layouts
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "mixed"])
@pytest.mark.parametrize("name", MODELS)
def test_to_ours_and_back_is_the_same_bits_under_the_same_keys(tmp_path, name, dtype):
    make(name, tmp_path, dtype="float32" if dtype == "mixed" else dtype)
    cfg, checkpoint = hf.model_config(tmp_path), tensors.open_folder(tmp_path)
    stored = {key: checkpoint.read(key) for key in checkpoint.entries}
    if dtype == "mixed":  # norms and biases wider than the rest
        stored = {key: array if array.ndim == 1 else array.astype(ml_dtypes.bfloat16) for key, array in stored.items()}
    entries, shapes = hf.family(tmp_path).entries(cfg), table.param_shapes(cfg)
    assert sorted(entry.key for entry in entries) == sorted(stored)
    for entry in entries:
        ours = table.split(entry, stored[entry.key], cfg)
        assert [a.shape for a in ours] == [shapes[path] for path in entry.paths] and all(a.flags.c_contiguous for a in ours)
        back = table.join(entry, ours, cfg)
        assert (back.dtype, back.shape, back.tobytes()) == (stored[entry.key].dtype, stored[entry.key].shape, stored[entry.key].tobytes())


def test_layouts_by_hand():
    """Heads of width 2: what GPT-NeoX, GPT-2 and Phi-3 keep together."""
    cfg = read({"model_type": "gpt_neox", "hidden_size": 4, "num_attention_heads": 2, "intermediate_size": 1, "num_hidden_layers": 1,
                "vocab_size": 3, "rotary_pct": 1.0})
    entry = next(e for e in families.FAMILIES["gpt_neox"].entries(cfg) if e.key.endswith("query_key_value.weight"))
    q, k, v = table.split(entry, np.arange(12)[:, None] * np.ones((1, 4)), cfg)  # row r of the stored [12, 4] holds r
    assert [x[0].tolist() for x in (q, k, v)] == [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11]]
    cfg = read({"model_type": "gpt2", "n_embd": 2, "n_head": 1, "n_layer": 1, "vocab_size": 3})
    entry = next(e for e in families.FAMILIES["gpt2"].entries(cfg) if e.key == "transformer.h.0.attn.c_attn.weight")
    q, k, v = table.split(entry, np.arange(12).reshape(2, 6), cfg)
    assert [x.tolist() for x in (q, k, v)] == [[[0, 1], [6, 7]], [[2, 3], [8, 9]], [[4, 5], [10, 11]]]
    cfg = read({"model_type": "phi3", "hidden_size": 4, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 1,
                "num_hidden_layers": 1, "vocab_size": 3})
    entry = next(e for e in families.FAMILIES["phi3"].entries(cfg) if e.key.endswith("qkv_proj.weight"))
    assert [x[0].tolist() for x in table.split(entry, np.arange(8)[:, None] * np.ones((1, 4)), cfg)] == [[0, 1, 2, 3], [4, 5], [6, 7]]


# -------------------------------------------------------------------------------------------------------------------- spellings
def as_four(raw):
    """A config.json in the spelling of transformers 4."""
    raw = copy.deepcopy(raw)
    rope = raw.pop("rope_parameters", None)
    if not rope:
        return raw
    if FULL in rope:
        raw |= {"rope_theta": rope[FULL].pop("rope_theta"), "rope_local_base_freq": rope[SLIDING].pop("rope_theta")}
        rope = rope[FULL]
    theta, part = rope.pop("rope_theta", None), rope.pop("partial_rotary_factor", None)
    if raw["model_type"] == "gpt_neox":
        raw |= {"rotary_emb_base": theta, "rotary_pct": part}
    else:
        raw |= ({} if theta is None else {"rope_theta": theta}) | ({} if part is None else {"partial_rotary_factor": part})
    kind = rope.pop("rope_type")
    return raw | {"rope_scaling": None if kind == "default" else {"type": kind, **rope}, "torch_dtype": raw.pop("dtype", "float32")}


@pytest.mark.parametrize("name", [name for name in MODELS if name != "olmo3"])  # whose thetas transformers 4 cannot say
def test_both_spellings_of_rotary_fields_read_the_same(tmp_path, name):
    make(name, tmp_path)
    raw = config_of(tmp_path)
    family, old = families.find(raw, HERE), as_four(raw)
    assert family.read(raw, HERE) == family.read(old, HERE) and family.context_length(raw, HERE) == family.context_length(old, HERE)
    assert "rope_parameters" not in old


@pytest.mark.parametrize("name", sorted(set(families.FAMILIES) - {"gemma3"}))
def test_absent_fields_have_the_defaults_of_transformers(name):
    """A config.json of the model_type alone is the default config of transformers written out whole, and as it writes it."""
    import transformers

    config = transformers.AutoConfig.for_model(name)
    family, bare = families.FAMILIES[name], {"model_type": name}
    for whole in (True, False):
        raw = json.loads(config.to_json_string(use_diff=not whole))
        assert (family.read(raw, HERE), family.context_length(raw, HERE)) == (family.read(bare, HERE), family.context_length(bare, HERE))


@pytest.mark.parametrize("raw, pattern", [
    ({"model_type": "smollm3", "num_hidden_layers": 4}, [LayerKind(Rope(2e6))] * 3 + [LayerKind(None)]),
    ({"model_type": "gemma3_text", "num_hidden_layers": 6, "sliding_window_pattern": 3},
     [LayerKind(Rope(1e4), 4096, 1 / 16)] * 2 + [LayerKind(Rope(1e6), 0, 1 / 16)]),
    ({"model_type": "qwen2", "num_hidden_layers": 3, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2},
     [LayerKind(), LayerKind(), LayerKind(window=5)]),
    ({"model_type": "gpt2", "n_layer": 2, "n_embd": 64, "n_head": 4, "scale_attn_by_inverse_layer_idx": True},
     [LayerKind(None, scale=0.25), LayerKind(None, scale=0.125)]),
    ({"model_type": "llama", "rope_theta": 7.0, "rope_scaling": {"type": "linear", "factor": 2}, "rope_parameters": {"rope_theta": 9.0}},
     [LayerKind(Rope(7.0, scaling="linear", factor=2.0))]),  # rope_scaling counts where both are there, as in transformers 5
], ids=["smollm3", "gemma3", "qwen2", "gpt2", "both"])
def test_patterns_of_layers(raw, pattern):
    assert read(raw).pattern == tuple(pattern)


def test_a_llama_takes_no_notice_of_a_sliding_window(tmp_path):
    model, tokens = make("llama", tmp_path, sliding_window=4), tokens_of(96)
    np.testing.assert_allclose(logits(*load(tmp_path), tokens), expected_logits(model, tokens), atol=1e-4)


@pytest.mark.parametrize("share, rotated", [(0.4, 3), (0.9, 7)])
def test_an_odd_number_of_rotated_values_rotates_one_more(tmp_path, share, rotated):
    """Three of eight: the exponents of the frequencies are thirds, and two pairs turn."""
    rope = {"rope_type": "linear", "factor": 3.0, "rope_theta": 700.0, "partial_rotary_factor": share}
    model, tokens = make("gpt_neox", tmp_path, rope_parameters=rope), tokens_of(96)
    cfg, params = load(tmp_path)
    assert cfg.rotary_dim == rotated
    np.testing.assert_allclose(logits(cfg, params, tokens), expected_logits(model, tokens), atol=1e-4)


def test_the_context_ends_where_transformers_would_change_the_frequencies():
    raw = {"model_type": "phi3", "max_position_embeddings": 131072, "original_max_position_embeddings": 4096, "hidden_size": 32,
           "num_attention_heads": 4, "rope_scaling": {"type": "su", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}}
    family = families.find(raw, HERE)
    assert family.context_length(raw, HERE) == 4096
    assert family.read(raw, HERE).pattern[0].rope.gain == pytest.approx((1 + np.log(32) / np.log(4096)) ** 0.5)


def test_the_text_part_of_a_gemma_3_with_vision(tmp_path):
    """Its config inside text_config, keys under other prefixes, the vision tower left out: the logits of the text model."""
    model = make("gemma3_text", tmp_path / "text")
    raw, checkpoint = config_of(tmp_path / "text"), tensors.open_folder(tmp_path / "text")
    tokens = tokens_of(96)
    for i, (body, head) in enumerate((("language_model.model.", "language_model.lm_head."), ("model.language_model.", "lm_head."))):
        folder = tmp_path / str(i)
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"],
                                                        "tie_word_embeddings": False, "text_config": raw, "vision_config": {}}))
        arrays = {name.replace("model.", body, 1) if name.startswith("model.") else name.replace("lm_head.", head): checkpoint.read(name)
                  for name in checkpoint.entries}
        arrays |= {"vision_tower.x.weight": np.zeros((2, 2), np.float32), "model.multi_modal_projector.y": np.zeros(3, np.float32)}
        tensors.write_file(folder / "model.safetensors", [(name, "F32", a.shape, [a]) for name, a in arrays.items()])
        expected = expected_logits(model, tokens)
        np.testing.assert_allclose(logits(*load(folder), tokens), expected, atol=1e-4)
        assert hf.family(folder).text(config_of(folder), HERE)["architectures"] == ["Gemma3ForCausalLM"]


@pytest.mark.parametrize("rope", [
    Rope(5.0), Rope(5.0, scaling="linear", factor=2.0), Rope(5.0, scaling="llama3", factor=8.0, original=64, low=1.0, high=4.0),
    Rope(5.0, scaling="yarn", factor=8.0, original=64, low=1.0, high=4.0, round_ends=False, gain=1.1),
    Rope(5.0, scaling="factors", factors=(1.0, 2.0, 3.0))], ids=lambda rope: rope.scaling)
def test_a_written_llama_reads_back_the_same(rope):
    cfg = ModelConfig(30, 16, 3, 4, 2, 6, 20, (LayerKind(rope),), norm_eps=1e-3, qkv_bias=True, o_bias=True, activation="gelu_tanh",
                      tie_embeddings=True)
    raw = llama.write(cfg, 100)
    assert read(raw) == cfg and families.LLAMA.context_length(raw, HERE) == 100
    old = {k: v for k, v in raw.items() if k != "rope_parameters"}
    new = {k: v for k, v in raw.items() if k not in ("rope_theta", "rope_scaling")}
    assert read(old) == read(new) == cfg
    with pytest.raises(UserError, match="not Llama's"):
        llama.write(ModelConfig(30, 16, 3, 4, 2, 6, 20, qk_norm="head"), 100)


# ---------------------------------------------------------------------------------------------------------------------- refused
@pytest.mark.parametrize("changes, message", [
    ({"model_type": "mamba"}, "model_type 'mamba': family not supported.*Supported are llama, smollm3, .*olmo3"),
    ({"model_type": "gemma2_text"}, "is 'gemma2' meant|Supported are"),
    ({"model_type": None}, "there is no model_type"),
    ({"model_type": ["llama"]}, "family not supported"),
    ({"hidden_act": "mish"}, "hidden_act='mish' .supported: silu, .*quick_gelu"),
    ({"rope_scaling": {"rope_type": "mrope"}}, "rope_scaling of type 'mrope' .supported: default, linear, dynamic, llama3, yarn, longrope"),
    ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling.factor=None where a number"),
    ({"rope_parameters": {FULL: {"rope_type": "default"}}}, "rope_parameters by layer type"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 .supported: 1.0"),
    ({"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0]}}, r"short_factor=\[1.0\] where a list of 2 numbers"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 4.0, "high_freq_factor": 1.0}},
     "high_freq_factor=1.0 .supported: above low_freq_factor=4.0"),
    ({"quantization_config": {"bits": 4}}, "quantization_config: quantised checkpoints"),
    ({"is_encoder_decoder": True}, "is_encoder_decoder=True .supported: False"),
    ({"model_type": "gpt2", "add_cross_attention": True}, "add_cross_attention=True"),
    ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
    ({"model_type": "qwen3", "layer_types": ["full_attention", "linear_attention"]}, "layer_types with linear_attention"),
    ({"model_type": "qwen2", "layer_types": ["sliding_attention"] * 2}, "there is no sliding_window"),
    ({"model_type": "mistral", "layer_types": ["full_attention"] * 2}, "layer_types=.*supported: None or"),
    ({"model_type": "gpt_neox", "rotary_pct": 0.3, "rope_scaling": {"type": "yarn", "factor": 2}}, "1 of 4 values of a head are rotated"),
    ({"model_type": "gpt_neox", "rotary_pct": 0.2}, "0 of 4 values of a head are rotated"),
    ({"model_type": "gemma3_text", "rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}, "rope_parameters not by layer type"),
    ({"model_type": "olmo3", "rope_theta": 5.0, "layer_types": [SLIDING, FULL]}, "transformers 4 and 5 read it differently"),
    ({"model_type": "gemma", "hidden_activation": "relu"}, "hidden_activation='relu' beside hidden_act"),
    ({"num_attention_heads": 5}, "hidden_size=16 is not a multiple of num_attention_heads=5"),
    ({"num_key_value_heads": 3}, "num_attention_heads=4 is not a multiple of num_key_value_heads=3"),
    ({"head_dim": 5}, "5 of 5 values of a head are rotated"),
    ({"model_type": "gemma3", "text_config": "large"}, "text_config is 'large', not an object"),
    ({"model_type": "smollm3", "no_rope_layers": [1]}, r"no_rope_layers=\[1\] where a list of 2"),
])
def test_what_cannot_be_run_exactly_is_refused(changes, message):
    with pytest.raises(UserError, match=message) as caught:
        read(TINY | changes)
    assert "config.json" in str(caught.value)


BAD = [None, "wide", [1], {}, -1, 0.5, True, float("nan")]
NUMBERS = {"llama": ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
                     "max_position_embeddings"],
           "opt": ["ffn_dim", "hidden_size"], "gpt2": ["n_embd", "n_head", "n_layer", "n_positions"],
           "qwen3": ["head_dim", "vocab_size"]}


@pytest.mark.parametrize("value", BAD, ids=repr)
@pytest.mark.parametrize("name, field", [(n, f) for n, fields in NUMBERS.items() for f in fields])
def test_whole_numbers_that_are_none_are_named(name, field, value):
    with pytest.raises(UserError, match=f"config.json has fields of a wrong kind: {field}=.* where a whole number"):
        read({"model_type": name, field: value})


@pytest.mark.parametrize("changes", [
    {"rms_norm_eps": "1e-5"}, {"rms_norm_eps": None}, {"tie_word_embeddings": "true"}, {"tie_word_embeddings": None}, {"attention_bias": 1},
    {"hidden_act": None}, {"hidden_act": 3}, {"rope_theta": "10000"}, {"rope_theta": [1]}, {"rope_scaling": "linear"},
    {"rope_scaling": [2]}, {"rope_parameters": 7}, {"head_dim": "8"}, {"num_key_value_heads": [2]},
    {"rope_scaling": {"type": "linear", "factor": "2"}}, {"rope_scaling": {"type": "yarn", "factor": 2, "beta_fast": "x"}}])
def test_fields_of_a_wrong_kind_are_named(changes):
    (field,) = changes
    with pytest.raises(UserError, match=f"config.json has fields of a wrong kind: {field}.* where "):
        read(TINY | changes)


def test_all_that_is_wrong_is_said_at_once():
    with pytest.raises(UserError) as caught:
        read(TINY | {"hidden_act": "mish", "partial_rotary_factor": 0.5, "vocab_size": "x", "rms_norm_eps": []})
    assert all(part in str(caught.value) for part in ("hidden_act='mish'", "partial_rotary_factor=0.5", "vocab_size='x'", "rms_norm_eps=[]"))
