"""Configs that both versions of transformers read, and tensors written as the key-map tables say, in slices and in shards."""
import dataclasses
import json
import re

import ml_dtypes
import numpy as np
import pytest

from isara_jax.common import UserError
from isara_jax.models import decoder, families, hf, save, tensors
from isara_jax.models.config import LayerKind, ModelConfig, Rope
from isara_jax.models.families import table
from isara_jax.models.place import placer
from isara_jax.models.resolve import TINY_CONFIG, Source
from isara_jax.sharding import make_mesh, param_shardings

FULL, SLIDING = "full_attention", "sliding_attention"
SMALL = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
         "intermediate_size": 24, "max_position_embeddings": 64}
NEOX = {"model_type": "gpt_neox", "vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 24, "max_position_embeddings": 64}
GPT2 = {"model_type": "gpt2", "vocab_size": 32, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16}


def folder_of(path, raw, dtype="F32", seed=0):
    """A model folder with this config.json and random weights."""
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(raw))
    family = families.find(raw, path)
    cfg = family.read(raw, path)
    shapes, rng = table.param_shapes(cfg), np.random.default_rng(seed)
    wanted = {e.key: table.stored_shape(e, shapes) for e in family.entries(cfg)}
    kinds = {key: dtype if isinstance(dtype, str) else dtype(key) for key in wanted}
    made = {key: (rng.standard_normal(shape) * 0.1).astype(tensors.DTYPES[kinds[key]]) for key, shape in wanted.items()}
    tensors.write_file(path / "model.safetensors", [(key, kinds[key], a.shape, [a]) for key, a in made.items()])
    return made


def plan_of(path, dtype=""):
    source = Source("hf", path, str(path))
    return save.layout(source, hf.model_config(path), hf.context_length(path), dtype)


def load(path, dtype):
    cfg = hf.model_config(path)
    return hf.load_params(path, cfg, placer(param_shardings(decoder.abstract_params(cfg), make_mesh())), dtype)


# ------------------------------------------------------------------------------------------------------------------------ config.json
@pytest.mark.parametrize("raw, expected", [
    ({"model_type": "llama", **SMALL, "rope_theta": 5.0}, {"rope_theta": 5.0, "rope_scaling": None,
                                                          "rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}),
    ({"model_type": "llama", **SMALL, "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5.0}},
     {"rope_theta": 5.0, "rope_scaling": {"rope_type": "linear", "factor": 2.0},
      "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5.0}}),
    ({"model_type": "qwen2", **SMALL, "rope_theta": 9.0, "rope_scaling": {"type": "yarn", "factor": 4.0}},
     {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
      "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 9.0}}),
    ({**NEOX, "rotary_pct": 0.5, "rotary_emb_base": 70},
     {"rotary_pct": 0.5, "rotary_emb_base": 70.0, "rope_scaling": None,
      "rope_parameters": {"rope_type": "default", "rope_theta": 70.0, "partial_rotary_factor": 0.5}}),
    ({**NEOX, "rope_parameters": {"rope_type": "default", "rope_theta": 70.0, "partial_rotary_factor": 0.25}},
     {"rotary_pct": 0.25, "rotary_emb_base": 70.0}),
    ({"model_type": "gemma3_text", **SMALL, "rope_theta": 100.0, "rope_local_base_freq": 5.0,
      "rope_scaling": {"rope_type": "linear", "factor": 8.0}, "layer_types": [SLIDING, FULL], "sliding_window": 4},
     {"rope_theta": 100.0, "rope_local_base_freq": 5.0, "rope_scaling": {"rope_type": "linear", "factor": 8.0},
      "rope_parameters": {FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 100.0},
                          SLIDING: {"rope_type": "default", "rope_theta": 5.0}}}),
    ({"model_type": "phi3", **SMALL, "original_max_position_embeddings": 32, "rope_theta": 7.0,
      "rope_scaling": {"type": "su", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}},
     {"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}, "partial_rotary_factor": 1.0,
      "rope_parameters": {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "rope_theta": 7.0,
                          "partial_rotary_factor": 1.0}}),
    (GPT2, {}),
], ids=lambda v: v.get("model_type", ""))
def test_rotary_fields_are_in_both_spellings_and_mean_the_same(tmp_path, raw, expected):
    folder_of(tmp_path / "a", raw)
    plan = plan_of(tmp_path / "a")
    assert {k: plan.raw.get(k) for k in expected} == expected and plan.notes == ()
    assert (plan.raw["dtype"], plan.raw["torch_dtype"]) == ("float32", "float32")
    assert plan.raw["architectures"] == [plan.family.architecture]
    of_four = ("rope_theta", "rope_scaling", "rope_local_base_freq", "rotary_emb_base", "rotary_pct", "partial_rotary_factor")
    four = lambda raw: {k: v for k, v in raw.items() if k != "rope_parameters"}
    five = lambda raw: {k: v for k, v in raw.items() if k not in of_four}
    for version in (dict, four, five) if "rope_theta" in raw or "rope_parameters" in raw else (dict,):  # each spelling alone says it all
        assert families.find(plan.raw, tmp_path).read(version(plan.raw), tmp_path) == hf.model_config(tmp_path / "a")


@pytest.mark.parametrize("raw, note", [
    ({"model_type": "olmo2", **SMALL, "rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}},
     "transformers 4 refuses .* no llama3 scaling"),
    ({"model_type": "phi3", **SMALL, "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4,
                                                      "attention_factor": 1.5}}, "takes no attention_factor in Phi-3's rope_scaling"),
    ({"model_type": "gemma3_text", **SMALL, "layer_types": [SLIDING, FULL], "sliding_window": 4, "rope_parameters": {
        FULL: {"rope_type": "default", "rope_theta": 9.0}, SLIDING: {"rope_type": "linear", "factor": 2.0, "rope_theta": 5.0}}},
     "scales no rotary embedding of windowed layers"),
])
def test_what_transformers_4_cannot_be_told_is_said(tmp_path, raw, note):
    folder_of(tmp_path / "a", raw)
    assert re.search(note, " ".join(plan_of(tmp_path / "a").notes))


def test_a_window_that_the_model_has_not_got_is_left_out(tmp_path):
    """transformers' LlamaModel reads none, and its cache would drop keys for it."""
    folder_of(tmp_path / "llama", {"model_type": "llama", **SMALL, "sliding_window": 4})
    folder_of(tmp_path / "mistral", {"model_type": "mistral", **SMALL, "sliding_window": 4})
    assert "sliding_window" not in plan_of(tmp_path / "llama").raw
    assert plan_of(tmp_path / "mistral").raw["sliding_window"] == 4


def test_what_is_private_or_of_the_vision_model_is_left_out(tmp_path):
    raw = {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "_name_or_path": "/home/somebody",
           "auto_map": {"a": "b"}, "text_config": {**SMALL, "layer_types": [SLIDING, FULL], "sliding_window": 4},
           "vision_config": {"hidden_size": 9}}
    folder_of(tmp_path / "a", raw)
    written = plan_of(tmp_path / "a").raw
    assert written["model_type"] == "gemma3_text" and written["architectures"] == ["Gemma3ForCausalLM"]
    assert not {"vision_config", "text_config", "_name_or_path", "auto_map"} & set(written)


def test_the_tiny_model_becomes_a_llama():
    plan = save.layout(Source("tiny", None, "tiny-random"), TINY_CONFIG, 512)
    assert plan.family.read(plan.raw, None) == TINY_CONFIG and plan.raw["max_position_embeddings"] == 512
    assert set(plan.dtypes.values()) == {"F32"} and save.licence(Source("tiny", None, "tiny-random")) == ""


@pytest.mark.parametrize("file, stop_ids, eos, expected", [
    (None, [7], 7, {"bos_token_id": 1, "eos_token_id": 7}), (None, [], None, {"bos_token_id": 1, "eos_token_id": 2}),
    ({"temperature": 0.6, "do_sample": True, "transformers_version": "4.1", "eos_token_id": 3}, [9, 3, 7], 7,
     {"temperature": 0.6, "do_sample": True, "eos_token_id": [7, 3, 9]})])
def test_generation_ends_where_ours_does(tmp_path, file, stop_ids, eos, expected):
    if file:
        (tmp_path / "generation_config.json").write_text(json.dumps(file))
    raw = {"bos_token_id": 1, "eos_token_id": 2, "vocab_size": 9}
    assert save.generation_config(Source("hf", tmp_path, "a"), raw, stop_ids, eos) == expected


# --------------------------------------------------------------------------------------------------------------------------- tensors
@pytest.mark.parametrize("raw", [{"model_type": "llama", **SMALL}, {"model_type": "phi3", **SMALL}, NEOX, GPT2,
                                 {"model_type": "qwen2", **SMALL}], ids=lambda raw: raw["model_type"])
@pytest.mark.parametrize("block", [1, 100, 1 << 20])
def test_slices_of_stored_rows_are_the_joined_tensor(tmp_path, monkeypatch, raw, block):
    monkeypatch.setattr(save, "BLOCK", block)
    stored = folder_of(tmp_path / "a", raw)
    plan, params = plan_of(tmp_path / "a"), load(tmp_path / "a", "float32")
    for key, entry in plan.entries.items():
        arrays = [np.asarray(_at(params, path)) for path in entry.paths]
        slices = list(save.stored_rows(entry, arrays, plan))
        np.testing.assert_array_equal(np.concatenate(slices), stored[key])
        np.testing.assert_array_equal(table.join(entry, arrays, plan.cfg), stored[key])
        assert len(slices) > 1 or block > 1 or stored[key].ndim == 1


def _at(tree, path):
    for name in path:
        tree = tree[name]
    return tree


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16", lambda key: "F32" if "norm" in key else "BF16"],
                         ids=["F32", "BF16", "F16", "mixed"])
@pytest.mark.parametrize("shard", [10**9, 3000])
def test_keys_dtypes_and_bytes_survive(tmp_path, dtype, shard):
    folder_of(tmp_path / "a", {"model_type": "llama", **SMALL}, dtype)
    plan = plan_of(tmp_path / "a")
    params = save.cast(load(tmp_path / "a", save.held(Source("hf", tmp_path / "a", "a"))), plan)
    (tmp_path / "b").mkdir()
    names = save.write_tensors(tmp_path / "b", params, plan, shard)
    before, after = tensors.open_folder(tmp_path / "a"), tensors.open_folder(tmp_path / "b")
    assert not after.problems and set(before.entries) == set(after.entries)
    for key, stored in before.entries.items():
        assert (stored.dtype, before.read(key).tobytes()) == (after.entries[key].dtype, after.read(key).tobytes())
    assert save.check_tensors(tmp_path / "b", params, plan) == plan.nbytes
    if shard > 10**6:
        assert names == ["model.safetensors"]
    else:
        assert names[0] == f"model-00001-of-{len(names):05d}.safetensors" and len(names) > 3
        index = json.loads((tmp_path / "b" / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == plan.nbytes and set(index["weight_map"]) == set(before.entries)
        for name in names:
            keys = [key for key, file in index["weight_map"].items() if file == name]
            assert sum(map(plan.size, keys)) <= shard or len(keys) == 1


def test_another_dtype_rounds_to_the_nearest(tmp_path):
    stored = folder_of(tmp_path / "a", {"model_type": "llama", **SMALL})
    plan = plan_of(tmp_path / "a", "bfloat16")
    params = save.cast(load(tmp_path / "a", "float32"), plan)
    (tmp_path / "b").mkdir()
    save.write_tensors(tmp_path / "b", params, plan, 10**9)
    written = tensors.open_folder(tmp_path / "b")
    assert plan.raw["dtype"] == "bfloat16" and save.widest(plan) == "bfloat16" and save.roundoff(plan) == 2**-8
    for key, array in stored.items():
        assert written.read(key).tobytes() == array.astype(ml_dtypes.bfloat16).tobytes()


@pytest.mark.parametrize("value, message", [
    (70_000.0, r"model.layers.1.mlp.down_proj.weight holds values up to 70,000, which float16 cannot: it ends at 65,504. Take "
               "--dtype=bfloat16"),
    (np.nan, "down_proj.weight holds values that are no finite")])
def test_values_that_do_not_fit_name_their_tensor(tmp_path, value, message):
    folder_of(tmp_path / "a", {"model_type": "llama", **SMALL})
    params = load(tmp_path / "a", "float32")
    params["layers"]["1"]["mlp"]["down"]["kernel"] = params["layers"]["1"]["mlp"]["down"]["kernel"].at[3, 4].set(value)
    with pytest.raises(UserError, match=message):
        save.cast(params, plan_of(tmp_path / "a", "float16"))


@pytest.mark.parametrize("damage, message", [
    (lambda data: data[:-1] + bytes([data[-1] ^ 1]), "has other bytes from row"), (lambda data: data[:-8], "not a whole safetensors file"),
    (lambda data: data.replace(b"model.norm.weight", b"model.worm.weight"), "model.norm.weight is missing or surplus")])
def test_a_damaged_copy_is_noticed(tmp_path, damage, message):
    folder_of(tmp_path / "a", {"model_type": "llama", **SMALL})
    plan, params = plan_of(tmp_path / "a"), load(tmp_path / "a", "float32")
    file = tmp_path / "a" / "model.safetensors"
    save.check_tensors(tmp_path / "a", params, plan)
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(UserError, match=message):
        save.check_tensors(tmp_path / "a", params, plan)


def test_a_gguf_with_frequency_factors_has_a_config():
    kind = LayerKind(Rope(theta=9.0, scaling="factors", factors=(1.0, 2.0)))
    cfg = ModelConfig(32, 8, 1, 2, 2, 4, 16, (kind,))
    raw = families.llama.write(cfg, 64)
    rotary, notes = save._rope_fields(raw, families.FAMILIES["llama"], cfg)
    assert families.FAMILIES["llama"].read(raw | rotary, None) == cfg and notes == []
    assert dataclasses.replace(cfg, vocab_size=33) != cfg
