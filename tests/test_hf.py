"""Hugging Face folders: logits equal to transformers', and one clear error for whatever does not fit."""
from __future__ import annotations

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from isara_jax.common import UserError
from isara_jax.models import decoder, hf
from isara_jax.models.config import ModelConfig
from isara_jax.models.layers import causal_attention

CFG = ModelConfig(vocab_size=50, d_model=48, n_layers=2, n_heads=6, n_kv_heads=2, head_dim=12, d_ff=80, rope_theta=777.0, norm_eps=1e-3)
TOKENS = np.array([[3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5, 8, 9, 7, 9, 0]])


def logits(params, cfg):
    positions = jnp.broadcast_to(jnp.arange(TOKENS.shape[1]), TOKENS.shape)
    hidden, _ = decoder.forward(params, cfg, jnp.asarray(TOKENS), positions, causal_attention(jnp.float32))
    return np.asarray(decoder.lm_head(params, cfg, hidden))


def load(folder):
    cfg = hf.model_config(folder)
    return cfg, hf.load_params(folder, cfg, lambda path, array: jnp.asarray(array))


def to_folder(folder, cfg=CFG, *, stored=np.float32, **changes):
    """A folder written without transformers: config.json and one safetensors file."""
    tree = decoder.init_params(cfg, 1)
    tensors = {}
    for name, path in hf.keys(cfg).items():
        array = tree
        for key in path:
            array = array[key]
        tensors[name] = np.ascontiguousarray(np.asarray(array).T if path[-1] == "kernel" else np.asarray(array)).astype(stored)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {"model_type": "llama", "vocab_size": cfg.vocab_size, "hidden_size": cfg.d_model, "num_hidden_layers": cfg.n_layers,
              "num_attention_heads": cfg.n_heads, "num_key_value_heads": cfg.n_kv_heads, "head_dim": cfg.head_dim,
              "intermediate_size": cfg.d_ff, "rope_theta": cfg.rope_theta, "rms_norm_eps": cfg.norm_eps, "tie_word_embeddings": cfg.tie_embeddings,
              "max_position_embeddings": 99}
    (folder / "config.json").write_text(json.dumps(config | changes))
    return tree


# -------------------------------------------------------------------------------------------------------------------------- parity
@pytest.mark.parametrize("tied, dtype, shard", [(False, "float32", "1GB"), (True, "float32", "20KB"), (False, "bfloat16", "20KB"),
                                                (True, "float16", "1GB")])
def test_logits_equal_transformers_on_a_random_llama(tmp_path, tied, dtype, shard):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=48, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2, head_dim=12, intermediate_size=80,
        rope_parameters={"rope_type": "default", "rope_theta": 777.0}, rms_norm_eps=1e-3, tie_word_embeddings=tied, initializer_range=0.3,
        max_position_embeddings=128)
    transformers.LlamaForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / "model.safetensors.index.json").exists() is (shard == "20KB")
    reference = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    cfg, params = load(tmp_path)
    assert cfg == dataclasses.replace(CFG, tie_embeddings=tied) and hf.context_length(tmp_path) == 128
    with torch.no_grad():
        expected = reference(torch.tensor(TOKENS)).logits.numpy()
    np.testing.assert_allclose(logits(params, cfg), expected, rtol=0, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------------------------- files
@pytest.mark.parametrize("stored", [np.float64, np.float32, np.float16])
def test_stored_dtypes_become_contiguous_float32(tmp_path, stored):
    tree = to_folder(tmp_path, stored=stored)
    seen = {}
    hf.load_params(tmp_path, CFG, lambda path, array: seen.setdefault(path, array))
    assert all(a.dtype == np.float32 and a.flags.c_contiguous for a in seen.values())
    np.testing.assert_allclose(seen["layers", "1", "mlp", "down", "kernel"], tree["layers"]["1"]["mlp"]["down"]["kernel"], atol=1e-4)


def test_both_ages_of_config_json_read_the_same(tmp_path):
    to_folder(tmp_path, rope_scaling=None)
    old = hf.model_config(tmp_path)
    to_folder(tmp_path, rope_theta=None, rope_parameters={"rope_type": "default", "rope_theta": 777.0}, attention_bias=False)
    assert hf.model_config(tmp_path) == old == CFG


def test_missing_fields_of_config_json_follow_from_others(tmp_path):
    to_folder(tmp_path, head_dim=None, num_key_value_heads=None)
    assert (hf.model_config(tmp_path).head_dim, hf.model_config(tmp_path).n_kv_heads) == (8, 6)


@pytest.mark.parametrize("changes, message", [
    ({"model_type": "gpt2"}, "model_type 'gpt2': family not supported yet"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling of type 'llama3'"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling of type 'linear'"),
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_parameters of type 'yarn'"),
    ({"attention_bias": True}, "attention_bias=True"),
    ({"mlp_bias": True}, "mlp_bias=True"),
    ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
    ({"sliding_window": 128}, "sliding_window=128"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"hidden_size": "wide"}, "wrong kind"),
    ({"num_attention_heads": 5, "num_key_value_heads": 2}, "wrong kind: n_heads=5 is not a multiple"),
])
def test_what_cannot_be_run_exactly_is_refused(tmp_path, changes, message):
    to_folder(tmp_path, **changes)
    with pytest.raises(UserError, match=message) as caught:
        hf.model_config(tmp_path)
    assert "config.json" in str(caught.value)


def test_tensors_that_do_not_fit_are_all_listed(tmp_path):
    to_folder(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.norm.weight"]
    tensors["model.layers.0.mlp.up_proj.weight"] = np.zeros((80, 47), np.float32)
    tensors["model.layers.1.mlp.up_proj.weight"] = np.zeros((80, 48), np.int8)
    tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(72, np.float32)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(6, np.float32)  # a buffer that old folders carry
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError) as caught:
        hf.load_params(tmp_path, CFG, lambda path, array: array)
    assert [line.strip() for line in str(caught.value).splitlines()[1:]] == [
        "model.norm.weight is missing", "model.layers.0.self_attn.q_proj.bias is unexpected",
        "model.layers.0.mlp.up_proj.weight has shape [80, 47], config.json says [80, 48]",
        "model.layers.1.mlp.up_proj.weight is stored as I8; read are F64, F32, F16, BF16"]


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    to_folder(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "a.safetensors")
    save_file({"lm_head.weight": np.zeros((50, 48), np.float32)}, tmp_path / "b.safetensors")
    index = {"weight_map": {"model.norm.weight": "a.safetensors", "lm_head.weight": "b.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="lm_head.weight is in a.safetensors and in b.safetensors"):
        hf.load_params(tmp_path, CFG, lambda path, array: array)


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "sub/../../x.safetensors", "model.bin", 7])
def test_an_index_cannot_point_elsewhere(tmp_path, name):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(UserError, match="not a .safetensors file of this folder"):
        hf.weight_files(tmp_path)


@pytest.mark.parametrize("kept", [0, 5, 500, 20_000])
def test_a_file_cut_short_is_one_clear_error(tmp_path, kept):
    to_folder(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(UserError, match="model.safetensors is not a whole safetensors file"):
        hf.load_params(tmp_path, CFG, lambda path, array: array)
