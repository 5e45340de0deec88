"""Hugging Face folders: every part of every tensor where it belongs, little memory, and one clear error for whatever does not fit."""
from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from isara_jax.common import UserError
from isara_jax.models import hf, tensors
from isara_jax.models.families import table
from isara_jax.models.families.table import Entry

SMALL = {"vocab_size": 40, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 36}
CONFIGS = {
    "llama": {"model_type": "llama", **SMALL, "num_key_value_heads": 2, "head_dim": 8, "attention_bias": True,
              "max_position_embeddings": 99},
    "phi3": {"model_type": "phi3", **SMALL, "num_key_value_heads": 2},
    "gpt_neox": {"model_type": "gpt_neox", **SMALL, "rotary_pct": 1.0},
    "gpt2": {"model_type": "gpt2", "vocab_size": 40, "n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 16},
    "opt": {"model_type": "opt", **{k: v for k, v in SMALL.items() if k != "intermediate_size"}, "ffn_dim": 36, "word_embed_proj_dim": 8,
            "do_layer_norm_before": False, "max_position_embeddings": 16},
}


def to_folder(folder, name="llama", *, stored=np.float32, rename=lambda key: key, more=None, **changes):
    """A folder with random tensors, written without transformers; returns (config, our parameters by path, tensors by key)."""
    raw = CONFIGS[name] | changes
    (folder / "config.json").write_text(json.dumps(raw))
    cfg, family = hf.model_config(folder), hf.family(folder)
    shapes, rng = table.param_shapes(cfg), np.random.default_rng(0)
    ours = {path: rng.standard_normal(shape).astype(stored) for path, shape in shapes.items()}
    arrays = {rename(e.key): table.join(e, [ours[path] for path in e.paths], cfg) for e in family.entries(cfg)}
    save_file(arrays | (more or {}), folder / "model.safetensors", metadata={"format": "pt"})
    return cfg, ours, arrays


def whole(path, shape, dtype, read):
    """A `Place` that keeps numpy arrays."""
    return read((slice(None),) * len(shape))


def leaves(tree, path=()):
    return {k: v for key, value in tree.items() for k, v in (leaves(value, (*path, key)) if isinstance(value, dict) else {
        (*path, key): value}).items()}


# --------------------------------------------------------------------------------------------------------------------- contents
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stored", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_tensors_arrive_in_our_layout_and_dtype(tmp_path, monkeypatch, name, stored, dtype):
    monkeypatch.setattr(tensors, "BLOCK", 700)  # some rows at a time
    cfg, ours, _ = to_folder(tmp_path, name, stored=stored)
    loaded = leaves(hf.load_params(tmp_path, cfg, whole, dtype))
    assert loaded.keys() == ours.keys()
    for path, array in loaded.items():
        assert array.dtype == dtype and array.flags.c_contiguous and array.ctypes.data % 64 == 0
        np.testing.assert_array_equal(array, ours[path].astype(dtype), err_msg="/".join(path))
    assert hf.stored_dtypes(tmp_path) == dict.fromkeys((e.key for e in hf.family(tmp_path).entries(cfg)), {
        "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}[np.dtype(stored).name])


@pytest.mark.parametrize("name", CONFIGS)
def test_any_part_of_a_tensor_is_that_part_of_the_whole(tmp_path, monkeypatch, name):
    monkeypatch.setattr(tensors, "BLOCK", 300)
    cfg, ours, _ = to_folder(tmp_path, name)
    rng = np.random.default_rng(1)

    def parts(path, shape, dtype, read):
        for _ in range(6):
            index = tuple(slice(*sorted(rng.integers(0, size + 1, 2).tolist())) for size in shape)
            np.testing.assert_array_equal(read(index), ours[path][index], err_msg=f"{path} {index}")
        return None

    hf.load_params(tmp_path, cfg, parts)


def test_the_largest_tensors_come_first_and_the_head_of_tied_ones_not_at_all(tmp_path):
    cfg, ours, arrays = to_folder(tmp_path, tie_word_embeddings=True)
    sizes = []
    loaded = leaves(hf.load_params(tmp_path, cfg, lambda path, shape, dtype, read: sizes.append(int(np.prod(shape)))))
    assert sizes == sorted(sizes, reverse=True) and ("head", "kernel") not in loaded and "lm_head.weight" not in arrays


DEVICES = """
import sys
from pathlib import Path
import jax, numpy as np
sys.path.insert(0, {tests!r})
from families_peer import load
from isara_jax.models import tensors
from isara_jax.sharding import make_mesh
assert len(jax.devices()) == 8
read, pread = [], tensors._pread
tensors._pread = lambda d, into, at, file: read.append(into.nbytes) or pread(d, into, at, file)
for folder in sys.argv[1:]:
    alone = load(Path(folder))[1]
    size = sum(read)
    for data, fsdp, tensor in ((1, 1, 8), (2, 2, 2), (1, 8, 1), (8, 1, 1)):
        read.clear()
        cfg, shared = load(Path(folder), mesh=make_mesh(data, fsdp, tensor))
        pairs = zip(jax.tree.leaves(alone), jax.tree.leaves(shared), strict=True)
        assert all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in pairs)
        assert sum(read) <= 1.3 * size, (folder, data, fsdp, tensor, sum(read), size)  # norms and biases are whole on each
        if fsdp * tensor > 1:
            kernel = shared["layers"]["0"]["mlp"]["up"]["kernel"]
            assert kernel.addressable_shards[0].data.size * fsdp * tensor == kernel.size
    read.clear()
"""


def test_eight_devices_hold_the_same_and_each_part_is_read_once(tmp_path):
    folders = []
    for name in CONFIGS:
        folders.append(tmp_path / name)
        folders[-1].mkdir()
        wide = {"hidden_size": 32, "num_attention_heads": 8, "num_key_value_heads": 8, "intermediate_size": 64, "ffn_dim": 64}
        to_folder(folders[-1], name, **({"n_embd": 32, "n_head": 8} if name == "gpt2" else wide))
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", DEVICES.format(tests=str(Path(__file__).parent)), *map(str, folders)], env=env,
                          cwd=Path(__file__).parent.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


MEMORY = """
import sys
from pathlib import Path
import jax, numpy as np
from isara_jax.models import decoder, hf, tensors
from isara_jax.models.place import placer
from isara_jax.sharding import make_mesh, param_shardings
tensors.BLOCK = 1 << 20  # as small beside this model as the real one beside a model of 1e9 parameters
folder, dtype = Path(sys.argv[1]), sys.argv[2]
cfg = hf.model_config(folder)
place = placer(param_shardings(decoder.abstract_params(cfg), make_mesh()))
jax.device_put(np.zeros(9)).astype(dtype)
status = lambda: {line.split(":")[0]: int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("Vm")}
before = status()["VmRSS"]
params = hf.load_params(folder, cfg, place, dtype)
size = sum(x.nbytes for x in jax.tree.leaves(params))
print((status()["VmHWM"] - before) / size, size)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peaks are read from /proc")
@pytest.mark.parametrize("stored, dtype, files", [(ml_dtypes.bfloat16, "bfloat16", 1), (np.float32, "bfloat16", 3),
                                                  (np.float32, "float32", 1)])
def test_loading_peaks_at_little_more_than_the_weights(tmp_path, stored, dtype, files):
    """Resident memory above what imports took; the weights are 67 MB in bfloat16, of which the embedding is 18."""
    raw = CONFIGS["llama"] | {"vocab_size": 12_000, "hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072,
                              "head_dim": 64, "num_key_value_heads": 4, "num_hidden_layers": 3, "attention_bias": False,
                              "tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    cfg = hf.model_config(tmp_path)
    shapes = table.param_shapes(cfg)
    named = [(e.key, table.stored_shape(e, shapes)) for e in hf.family(tmp_path).entries(cfg)]
    names = ["model.safetensors"] if files == 1 else [f"part{i}.safetensors" for i in range(files)]
    for i, file in enumerate(names):
        save_file({key: np.full(shape, 0.5, stored) for key, shape in named[i::files]}, tmp_path / file)
    if files > 1:
        weight_map = {key: names[i] for i in range(files) for key, _ in named[i::files]}
        (tmp_path / tensors.INDEX).write_text(json.dumps({"weight_map": weight_map}))
    done = subprocess.run([sys.executable, "-c", MEMORY, str(tmp_path), dtype], env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
                          cwd=Path(__file__).parent.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ratio, size = map(float, done.stdout.split())
    assert size > 60e6 and 0.9 < ratio < 1.25


# -------------------------------------------------------------------------------------------------------------------- spellings
@pytest.mark.parametrize("name, prefix", [("llama", "model."), ("opt", "model."), ("gpt2", "transformer."), ("gpt_neox", "gpt_neox.")])
def test_keys_of_the_base_model_and_buffers_of_old_releases_are_read(tmp_path, name, prefix):
    """As openai-community/gpt2 and facebook/opt-350m spell them: without the prefix of the causal language model."""
    buffers = {f"{place}.{leaf}": np.zeros((1, 1, 4, 4), np.uint8)
               for place, leaf in (("h.0.attn", "bias"), ("h.1.attn", "masked_bias"), ("layers.0.self_attn.rotary_emb", "inv_freq"),
                                   ("layers.1.attention", "masked_bias"), ("layers.1.attention.rotary_emb", "inv_freq"))}
    cfg, ours, _ = to_folder(tmp_path, name, rename=lambda key: key.removeprefix(prefix), more=buffers)
    loaded = leaves(hf.load_params(tmp_path, cfg, whole))
    assert all(np.array_equal(loaded[path], ours[path]) for path in ours)


def test_the_head_of_gpt_neox_has_two_names(tmp_path):
    cfg, ours, arrays = to_folder(tmp_path, "gpt_neox", rename=lambda key: key.replace("embed_out", "lm_head"))
    assert "lm_head.weight" in arrays
    np.testing.assert_array_equal(leaves(hf.load_params(tmp_path, cfg, whole))["head", "kernel"], ours["head", "kernel"])


def test_a_tied_model_may_store_its_head_where_it_is_the_embedding(tmp_path):
    cfg, ours, arrays = to_folder(tmp_path, tie_word_embeddings=True)
    embedding = arrays.pop("model.embed_tokens.weight")
    file = tmp_path / "model.safetensors"
    for stored in ({"model.embed_tokens.weight": embedding, "lm_head.weight": embedding}, {"lm_head.weight": embedding}):
        save_file(arrays | stored, file)
        assert np.array_equal(leaves(hf.load_params(tmp_path, cfg, whole))["embed", "embedding"], ours["embed", "embedding"])
    other = embedding.copy()
    other[-1, -1] += 1
    save_file(arrays | {"model.embed_tokens.weight": embedding, "lm_head.weight": other}, file)
    with pytest.raises(UserError, match="lm_head.weight differs from model.embed_tokens.weight, but config.json says tie_word_embeddings"):
        hf.load_params(tmp_path, cfg, whole)


def test_further_tensors_come_back_in_the_same_tree(tmp_path):
    score, bias = np.arange(72, dtype=np.float32).reshape(3, 24), np.arange(3, dtype=np.float32)
    cfg, _, arrays = to_folder(tmp_path, more={"score.weight": score, "score.bias": bias}, tie_word_embeddings=True)
    also = {Entry("score.weight", (("score", "kernel"),), "linear"): (24, 3), Entry("score.bias", (("score", "bias"),), "plain"): (3,)}
    loaded = leaves(hf.load_params(tmp_path, cfg, whole, also=also))
    assert np.array_equal(loaded["score", "kernel"], score.T) and np.array_equal(loaded["score", "bias"], bias)
    with pytest.raises(UserError, match="score.bias is unexpected\n  score.weight is unexpected"):
        hf.load_params(tmp_path, cfg, whole)
    with pytest.raises(UserError, match=r"score.weight has shape \[3, 24\], config.json says \[2, 24\]"):
        hf.load_params(tmp_path, cfg, whole, also={Entry("score.weight", (("score", "kernel"),), "linear"): (24, 2), list(also)[1]: (3,)})


def test_the_context_is_that_of_the_config(tmp_path):
    to_folder(tmp_path)
    assert hf.context_length(tmp_path) == 99


# ----------------------------------------------------------------------------------------------------------------------- errors
def test_tensors_that_do_not_fit_are_all_listed(tmp_path):
    cfg, _, _ = to_folder(tmp_path)
    arrays = load_file(tmp_path / "model.safetensors")
    del arrays["model.norm.weight"]
    arrays["model.layers.0.mlp.up_proj.weight"] = np.zeros((36, 23), np.float32)
    arrays["model.layers.1.mlp.up_proj.weight"] = np.zeros((36, 24), np.int8)
    arrays["model.layers.0.self_attn.q_norm.weight"] = np.zeros(8, np.float32)
    arrays["layers.0.self_attn.k_proj.bias"] = arrays["model.layers.0.self_attn.k_proj.bias"]
    save_file(arrays, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="the weights do not fit config.json") as caught:
        hf.load_params(tmp_path, cfg, whole)
    assert sorted(line.strip() for line in str(caught.value).splitlines()[1:]) == [
        "layers.0.self_attn.k_proj.bias and model.layers.0.self_attn.k_proj.bias are the same tensor",
        "model.layers.0.mlp.up_proj.weight has shape [36, 23], config.json says [36, 24]",
        "model.layers.0.self_attn.q_norm.weight is unexpected",
        "model.layers.1.mlp.up_proj.weight is stored as I8; read are F64, F32, F16, BF16", "model.norm.weight is missing"]


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    cfg, _, _ = to_folder(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "a.safetensors")
    save_file({"lm_head.weight": np.zeros((40, 24), np.float32)}, tmp_path / "b.safetensors")
    weight_map = {"model.norm.weight": "a.safetensors", "lm_head.weight": "b.safetensors"}
    (tmp_path / tensors.INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(UserError, match="lm_head.weight is in a.safetensors and in b.safetensors"):
        hf.load_params(tmp_path, cfg, whole)


def test_a_file_cut_short_is_one_clear_error_before_anything_is_placed(tmp_path):
    cfg, _, _ = to_folder(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="model.safetensors is not a whole safetensors file"):
        hf.load_params(tmp_path, cfg, lambda *args: pytest.fail("something was read"))


@pytest.mark.parametrize("text, message", [("{", "is not valid JSON"), ("[]", "holds a list"), (None, "cannot be read"),
                                           ('{"model_type": "bert"}', "'bert': family not supported")])
def test_a_config_that_is_none_is_one_clear_error(tmp_path, text, message):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=f"config.json.*{message}"):
        hf.model_config(tmp_path)


# ---------------------------------------------------------------------------------------------------- as transformers writes it
@pytest.mark.parametrize("dtype, shard", [("float32", "20KB"), ("bfloat16", "20KB"), ("float16", "5GB")])
def test_what_transformers_saves_in_shards_loads_with_its_logits(tmp_path, dtype, shard):
    pytest.importorskip("transformers")
    from families_peer import expected_logits, load, logits, tokens_of
    from hf_models import make

    model = make("qwen3", tmp_path, dtype=dtype, shard=shard)
    assert (tmp_path / tensors.INDEX).exists() is (shard == "20KB")
    tokens = tokens_of(96)
    expected = expected_logits(model.float(), tokens)
    np.testing.assert_allclose(logits(*load(tmp_path), tokens), expected, rtol=0, atol=1e-5 * np.abs(expected).max())
