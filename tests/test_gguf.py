"""GGUF files: header, dequantisation, the order of query and key rows, and one clear error for whatever is wrong."""
from __future__ import annotations

import dataclasses

import gguf as gguf_package
import numpy as np
import pytest

from isara_jax.common import UserError
from isara_jax.models import decoder, gguf
from isara_jax.models.config import ModelConfig
from isara_jax.models.gguf_header import read_header

CFG = ModelConfig(vocab_size=40, d_model=64, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=32, d_ff=96, rope_theta=5e4, norm_eps=1e-6)
KINDS = gguf_package.GGMLQuantizationType


def interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """The order of llama.cpp's converter (convert_hf_to_gguf.py, LlamaModel.permute)."""
    rows, width = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, width).swapaxes(1, 2).reshape(rows, width)


def write(path, params, cfg=CFG, *, kind=KINDS.F32, skip=(), extra=None, **metadata):
    """A tiny Llama GGUF as llama.cpp lays it out."""
    writer = gguf_package.GGUFWriter(path, "llama")
    values = {"llama.context_length": 256, "llama.embedding_length": cfg.d_model, "llama.block_count": cfg.n_layers,
              "llama.feed_forward_length": cfg.d_ff, "llama.attention.head_count": cfg.n_heads,
              "llama.attention.head_count_kv": cfg.n_kv_heads, "llama.attention.key_length": cfg.head_dim,
              "llama.attention.value_length": cfg.head_dim,
              "llama.rope.dimension_count": cfg.head_dim} | {k.replace("__", "."): v for k, v in metadata.items()}
    for key, value in values.items():
        (writer.add_string if isinstance(value, str) else writer.add_uint32)(key, value)
    writer.add_float32("llama.rope.freq_base", cfg.rope_theta)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", cfg.norm_eps)
    writer.add_array("tokenizer.ggml.tokens", [f"t{i}é" for i in range(cfg.vocab_size)])
    tensors = {"token_embd.weight": params["embed"]["embedding"], "output_norm.weight": params["norm"]["scale"]}
    if not cfg.tie_embeddings:
        tensors["output.weight"] = params["head"]["kernel"].T
    for i, layer in params["layers"].items():
        tensors |= {f"blk.{i}.attn_norm.weight": layer["attn_norm"]["scale"], f"blk.{i}.ffn_norm.weight": layer["mlp_norm"]["scale"]}
        tensors |= {f"blk.{i}.ffn_{n}.weight": layer["mlp"][n]["kernel"].T for n in ("gate", "up", "down")}
        tensors |= {f"blk.{i}.attn_{n}.weight": interleave(layer["attn"][n]["kernel"].T, heads) for n, heads in
                    (("q", cfg.n_heads), ("k", cfg.n_kv_heads))}
        tensors |= {f"blk.{i}.attn_v.weight": layer["attn"]["v"]["kernel"].T, f"blk.{i}.attn_output.weight": layer["attn"]["o"]["kernel"].T}
    for name, array in (tensors | (extra or {})).items():
        if name not in skip:
            array = np.ascontiguousarray(array, np.float32)
            if array.ndim == 1 or kind is KINDS.F32:
                writer.add_tensor(name, array)
            else:
                writer.add_tensor(name, gguf_package.quants.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def params():
    return _numpy(decoder.init_params(CFG, 3))


def _numpy(tree):
    return {k: _numpy(v) for k, v in tree.items()} if isinstance(tree, dict) else np.array(tree)


def load(path):
    return gguf.load_params(path, gguf.model_config(path), lambda where, array: array)


def leaves(tree, path=()):
    return [leaf for k, v in tree.items() for leaf in (leaves(v, (*path, k)) if isinstance(v, dict) else [((*path, k), v)])]


def test_config_and_float32_tensors_come_back_exactly(tmp_path, params):
    path = write(tmp_path / "m.gguf", params)
    assert gguf.model_config(path) == CFG and gguf.context_length(path) == 256
    loaded = load(path)
    assert [p for p, _ in sorted(leaves(loaded))] == [p for p, _ in sorted(leaves(params))]
    for where, array in leaves(params):
        mine = dict(leaves(loaded))[where]
        assert mine.dtype == np.float32 and mine.flags.c_contiguous
        np.testing.assert_array_equal(mine, array, err_msg="/".join(where))


def test_a_file_without_an_output_matrix_is_tied(tmp_path, params):
    path = write(tmp_path / "m.gguf", params, skip=("output.weight",))
    assert gguf.model_config(path) == dataclasses.replace(CFG, tie_embeddings=True)
    assert "head" not in load(path)


@pytest.mark.parametrize("kind, tolerance", [(KINDS.F16, 1e-4), (KINDS.BF16, 1e-3), (KINDS.Q8_0, 1e-3), (KINDS.Q4_0, 2e-2),
                                             (KINDS.Q4_1, 2e-2)])
def test_stored_kinds_become_float32(tmp_path, params, kind, tolerance):
    loaded = dict(leaves(load(write(tmp_path / "m.gguf", params, kind=kind))))
    for where, array in leaves(params):
        assert loaded[where].dtype == np.float32
        np.testing.assert_allclose(loaded[where], array, rtol=0, atol=tolerance, err_msg="/".join(where))


def test_the_header_agrees_with_the_gguf_package(smollm2_gguf):
    header, reader = read_header(smollm2_gguf), gguf_package.GGUFReader(smollm2_gguf)
    for name, field in reader.fields.items():
        if not name.startswith("GGUF."):
            assert header.metadata[name] == field.contents(), name
    assert [(t.name, t.shape, t.kind, t.offset, t.size) for t in header.tensors] == [
        (t.name, tuple(int(n) for n in t.shape)[::-1], int(t.tensor_type), int(t.data_offset), int(t.n_bytes)) for t in reader.tensors]


@pytest.mark.parametrize("kept, message", [(0.999, "cut short: it has .* bytes, its tensors need"), (0.5, "cut short: it has"),
                                           (0.005, "cut short or damaged: its header does not end"), (0, "not a GGUF")])
def test_a_file_cut_short_is_one_clear_error(tmp_path, params, kept, message):
    path = write(tmp_path / "m.gguf", params)
    data = path.read_bytes()
    path.write_bytes(data[:int(len(data) * kept)])
    with pytest.raises(UserError, match=message) as caught:
        gguf.model_config(path)
    assert str(path) in str(caught.value)


def test_no_prefix_of_a_file_reads_as_a_whole_one(tmp_path, params):
    data = write(tmp_path / "m.gguf", params).read_bytes()
    for length in range(0, 4000, 37):
        path = tmp_path / f"{length}.gguf"
        path.write_bytes(data[:length])
        with pytest.raises(UserError):
            read_header(path)


@pytest.mark.parametrize("head, message", [(b"PK\x03\x04", "begins with"), (b"GGUF\x01\0\0\0", "version 1"),
                                           (b"GGUF\0\0\0\x03", "version 50331648")])
def test_other_files_are_refused(tmp_path, head, message):
    (tmp_path / "x.gguf").write_bytes(head + bytes(100))
    with pytest.raises(UserError, match=message):
        read_header(tmp_path / "x.gguf")


@pytest.mark.parametrize("metadata, message", [
    ({"general__architecture": "qwen2"}, "family not supported yet"),
    ({"llama__rope__scaling__type": "yarn"}, "rope scaling"),
    ({"llama__expert_count": 8}, "experts"),
    ({"llama__attention__sliding_window": 4096}, "sliding window"),
    ({"llama__rope__dimension_count": 16}, "partial rotary"),
])
def test_what_cannot_be_run_exactly_is_refused(tmp_path, params, metadata, message):
    with pytest.raises(UserError, match=message):
        gguf.model_config(write(tmp_path / "m.gguf", params, **metadata))


def test_tensors_that_do_not_fit_are_all_listed(tmp_path, params):
    path = write(tmp_path / "m.gguf", params, skip=("blk.1.attn_q.weight",),
                 extra={"blk.0.ffn_up.weight": np.zeros((96, 32)), "blk.9.attn_q.weight": np.zeros((4, 4))})
    with pytest.raises(UserError) as caught:
        load(path)
    for part in ("layers/1/attn/q/kernel is missing", "blk.0.ffn_up.weight has shape [96, 32], the metadata says [96, 64]",
                 "blk.9.attn_q.weight is unexpected"):
        assert part in str(caught.value)
