"""GGUF files: header, dequantisation, the order of query and key rows, rotary scaling, and one clear error for whatever is wrong."""
from __future__ import annotations

import dataclasses
import math
import struct

import gguf as gguf_package
import numpy as np
import pytest

from isara_jax.common import UserError
from isara_jax.models import decoder, gguf, gguf_tensors
from isara_jax.models.config import LayerKind, ModelConfig, Rope
from isara_jax.models.gguf_header import Tensor, read_header
from isara_jax.models.layers import causal_attention
from isara_jax.models.rope import frequencies

CFG = ModelConfig(vocab_size=40, d_model=64, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=32, d_ff=96, norm_eps=1e-6,
                  pattern=(LayerKind(rope=Rope(theta=5e4)),))
KINDS = gguf_package.GGMLQuantizationType


def interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """The order of llama.cpp's converter (convert_hf_to_gguf.py, LlamaModel.permute), of weights and of biases."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def write(path, params, cfg=CFG, *, kind=KINDS.F32, skip=(), extra=None, stored=None, **metadata):
    """A tiny Llama GGUF as llama.cpp lays it out. stored: name -> (bytes [rows, bytes], kind) in place of a tensor."""
    writer = gguf_package.GGUFWriter(path, "llama")
    values = {"llama.context_length": 256, "llama.embedding_length": cfg.d_model, "llama.block_count": cfg.n_layers,
              "llama.feed_forward_length": cfg.d_ff, "llama.attention.head_count": cfg.n_heads,
              "llama.attention.head_count_kv": cfg.n_kv_heads, "llama.attention.key_length": cfg.head_dim,
              "llama.attention.value_length": cfg.head_dim,
              "llama.rope.dimension_count": cfg.head_dim} | {k.replace("__", "."): v for k, v in metadata.items()}
    for key, value in values.items():
        add = {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32}
        add[type(value)](key, value)
    writer.add_float32("llama.rope.freq_base", cfg.kind(0).rope.theta)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", cfg.norm_eps)
    writer.add_array("tokenizer.ggml.tokens", [f"t{i}é" for i in range(cfg.vocab_size)])
    tensors = {"token_embd.weight": params["embed"]["embedding"], "output_norm.weight": params["norm"]["scale"]}
    if not cfg.tie_embeddings:
        tensors["output.weight"] = params["head"]["kernel"].T
    for i, layer in params["layers"].items():
        for ours, name in (("q", "attn_q"), ("k", "attn_k"), ("v", "attn_v"), ("o", "attn_output")):
            if "bias" in layer["attn"][ours]:
                heads = {"q": cfg.n_heads, "k": cfg.n_kv_heads}.get(ours)
                bias = layer["attn"][ours]["bias"]
                tensors[f"blk.{i}.{name}.bias"] = interleave(bias, heads) if heads else bias
        tensors |= {f"blk.{i}.ffn_{n}.bias": layer["mlp"][n]["bias"] for n in ("gate", "up", "down") if "bias" in layer["mlp"][n]}
        tensors |= {f"blk.{i}.attn_norm.weight": layer["attn_norm"]["scale"], f"blk.{i}.ffn_norm.weight": layer["mlp_norm"]["scale"]}
        tensors |= {f"blk.{i}.ffn_{n}.weight": layer["mlp"][n]["kernel"].T for n in ("gate", "up", "down")}
        tensors |= {f"blk.{i}.attn_{n}.weight": interleave(layer["attn"][n]["kernel"].T, heads) for n, heads in
                    (("q", cfg.n_heads), ("k", cfg.n_kv_heads))}
        tensors |= {f"blk.{i}.attn_v.weight": layer["attn"]["v"]["kernel"].T, f"blk.{i}.attn_output.weight": layer["attn"]["o"]["kernel"].T}
    for name, array in (tensors | (extra or {})).items():
        if name in (stored or {}):
            writer.add_tensor(name, stored[name][0], raw_dtype=stored[name][1])
        elif name not in skip:
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


def whole(path, shape, dtype, read):
    return read(tuple(slice(None) for _ in shape))


def load(path, place=whole, dtype="float32"):
    return gguf.load_params(path, gguf.model_config(path), place, dtype)


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


# ------------------------------------------------------------------------------------------------------------------------- tensors
@pytest.mark.parametrize("kind", [KINDS.F16, KINDS.BF16, KINDS.Q8_0, KINDS.Q4_0, KINDS.Q4_1, KINDS.Q5_0, KINDS.Q5_1])
def test_stored_kinds_become_what_the_gguf_package_makes_of_them(tmp_path, params, kind):
    loaded = dict(leaves(load(write(tmp_path / "m.gguf", params, kind=kind))))
    for where, array in leaves(params):
        stored = array if array.ndim == 1 else array.T if where[-1] == "kernel" else array
        if array.ndim == 2:
            stored = gguf_package.quants.dequantize(gguf_package.quants.quantize(np.ascontiguousarray(stored), kind), kind)
        np.testing.assert_array_equal(loaded[where], stored.T if where[-1] == "kernel" else stored, err_msg="/".join(where))
        assert loaded[where].dtype == np.float32


def pack_six_bits(scales, mins):
    """Eight 6-bit scales and eight 6-bit minima in 12 bytes, as ggml's get_scale_min_k4 unpacks them."""
    low = [scales[j] | (scales[j + 4] >> 4) << 6 for j in range(4)] + [mins[j] | (mins[j + 4] >> 4) << 6 for j in range(4)]
    return bytes(low + [scales[j + 4] & 15 | (mins[j + 4] & 15) << 4 for j in range(4)])


def q4_k(rng, five=False):
    """(block, its 256 values): d * scale * q - dmin * min for each 32 values; two groups share 32 bytes, low half first."""
    d, dmin, scales, mins = 0.03125, 0.0625, rng.integers(0, 64, 8).tolist(), rng.integers(0, 64, 8).tolist()
    q = rng.integers(0, 32 if five else 16, (8, 32))
    nibbles = b"".join((q[g] % 16 | (q[g + 1] % 16) << 4).astype(np.uint8).tobytes() for g in range(0, 8, 2))
    fifth = sum((q[g] >> 4) << g for g in range(8)).astype(np.uint8).tobytes() if five else b""
    values = np.concatenate([d * scales[g] * q[g] - dmin * mins[g] for g in range(8)])
    return struct.pack("<ee", d, dmin) + pack_six_bits(scales, mins) + fifth + nibbles, values


def q6_k(rng):
    """(block, its 256 values): d * scale * (q - 32) for each 16 values; 4 low bits, then 2 high bits, in halves of 128 values."""
    d, scales, q = 0.125, rng.integers(-128, 128, 16), rng.integers(0, 64, (2, 4, 32))
    low = b"".join((half[g] % 16 | (half[g + 2] % 16) << 4).astype(np.uint8).tobytes() for half in q for g in (0, 1))
    high = b"".join(sum((half[g] >> 4) << 2 * g for g in range(4)).astype(np.uint8).tobytes() for half in q)
    values = d * np.repeat(scales, 16) * (q.reshape(256) - 32)
    return low + high + scales.astype(np.int8).tobytes() + struct.pack("<e", d), values


@pytest.mark.parametrize("kind, make", [(KINDS.Q4_K, q4_k), (KINDS.Q5_K, lambda rng: q4_k(rng, five=True)), (KINDS.Q6_K, q6_k)])
def test_blocks_of_256_packed_by_hand(tmp_path, kind, make):
    cfg = dataclasses.replace(CFG, d_model=256, d_ff=512, n_layers=1)
    params, rng = _numpy(decoder.init_params(cfg, 0)), np.random.default_rng(0)

    def tensor(rows, blocks):
        made = [[make(rng) for _ in range(blocks)] for _ in range(rows)]
        return (np.stack([np.frombuffer(b"".join(block for block, _ in row), np.uint8) for row in made]),
                np.stack([np.concatenate([values for _, values in row]) for row in made]).astype(np.float32))

    up, q, embedding = tensor(512, 1), tensor(128, 1), tensor(40, 1)
    down = tensor(256, 2)
    stored = {"blk.0.ffn_up.weight": (up[0], kind), "blk.0.ffn_down.weight": (down[0], kind), "blk.0.attn_q.weight": (q[0], kind),
              "token_embd.weight": (embedding[0], kind)}
    loaded = load(write(tmp_path / "m.gguf", params, cfg, stored=stored))
    np.testing.assert_array_equal(loaded["embed"]["embedding"], embedding[1])
    np.testing.assert_array_equal(loaded["layers"]["0"]["mlp"]["up"]["kernel"], up[1].T)
    np.testing.assert_array_equal(loaded["layers"]["0"]["mlp"]["down"]["kernel"], down[1].T)
    ours = loaded["layers"]["0"]["attn"]["q"]["kernel"].T
    np.testing.assert_array_equal(interleave(ours, cfg.n_heads), q[1])


@pytest.mark.parametrize("kind", [KINDS.Q2_K, KINDS.Q3_K, KINDS.IQ4_NL, KINDS.TQ1_0, KINDS.I32])
def test_other_kinds_are_refused_before_anything_is_undone(tmp_path, params, kind, monkeypatch):
    cfg = dataclasses.replace(CFG, d_ff=256)
    block, size = gguf_package.GGML_QUANT_SIZES[kind]
    stored = {f"blk.{i}.ffn_down.weight": (np.zeros((64, 256 // block * size), np.uint8), kind) for i in (0, 1)}
    path = write(tmp_path / "m.gguf", _numpy(decoder.init_params(cfg, 0)), cfg, stored=stored)
    monkeypatch.setattr(gguf_package.quants, "dequantize", lambda *_: pytest.fail("something was undone"))
    with pytest.raises(UserError, match=rf"blk.0.ffn_down.weight and 1 more of kind {kind.name} \(supported: F32, F16, BF16, Q8_0, Q4_0"):
        gguf.model_config(path)
    with pytest.raises(UserError, match=f"of kind {kind.name}"):
        gguf.load_params(path, cfg, whole)


def test_a_kind_that_nobody_knows_is_named_by_its_number():
    (problem,) = gguf_tensors.problems([Tensor("output.weight", (4, 32), 4711, 0, 0)])
    assert "output.weight of kind number 4711 (supported: F32" in problem
    assert gguf_tensors.problems([Tensor("a", (4, 48), int(KINDS.Q8_0), 0, 0)]) == [
        "a is Q8_0 with rows of 48 values, which are no whole blocks of 32"]


def test_biases_are_read_and_those_of_queries_and_keys_reordered(tmp_path):
    cfg = dataclasses.replace(CFG, qkv_bias=True, o_bias=True, mlp_bias=True, tie_embeddings=True)
    rng = np.random.default_rng(0)
    params = {k: v for k, v in _numpy(decoder.init_params(cfg, 1)).items()}
    params = _map(params, lambda path, x: rng.normal(size=x.shape).astype(np.float32) if path[-1] == "bias" else x)
    path = write(tmp_path / "m.gguf", params, cfg)
    assert gguf.model_config(path) == cfg
    loaded = dict(leaves(load(path)))
    for where, array in leaves(params):
        np.testing.assert_array_equal(loaded[where], array, err_msg="/".join(where))
    with pytest.raises(UserError, match="layers/1/attn/k/bias is missing"):
        load(write(tmp_path / "n.gguf", params, cfg, skip=("blk.1.attn_k.bias",)))


def _map(tree, function, path=()):
    return {k: _map(v, function, (*path, k)) if isinstance(v, dict) else function((*path, k), v) for k, v in tree.items()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_any_part_of_a_tensor_is_that_part_of_the_whole(tmp_path, params, dtype, monkeypatch):
    """Slices of a few rows, so that parts begin and end inside heads and inside what is read at once."""
    path = write(tmp_path / "m.gguf", params, kind=KINDS.Q8_0)
    expected = dict(leaves(load(path, dtype=dtype)))
    monkeypatch.setattr(gguf_tensors, "SLICE", 4 * 64 * 3)
    asked = []

    def place(where, shape, kind, read):
        assert kind == np.dtype(dtype) and shape == expected[where].shape
        for index in [tuple(slice(n // 3, n // 3 * 2 + 1) for n in shape), tuple(slice(n - 1, None) for n in shape),
                      tuple(slice(None, n // 2) for n in shape), tuple(slice(None, None, None) for _ in shape)]:
            part = read(index)
            assert part.dtype == kind
            np.testing.assert_array_equal(part, expected[where][index], err_msg=f"{where} {index}")
        asked.append(math.prod(shape))
        return part

    load(path, place, dtype)
    assert asked == sorted(asked, reverse=True), "the largest come first"


def test_only_the_rows_that_are_wanted_are_read(tmp_path, params, monkeypatch):
    path, read_bytes = write(tmp_path / "m.gguf", params), []
    read = gguf_tensors.Reader._read
    monkeypatch.setattr(gguf_tensors.Reader, "_read", lambda self, at, size: read_bytes.append(size) or read(self, at, size))
    load(path, lambda where, shape, dtype, read: read((slice(None), slice(0, shape[-1] // 2))) if where[-1] == "kernel" else None)
    kernels = sum(x.nbytes for where, x in leaves(params) if where[-1] == "kernel")
    assert sum(read_bytes) == kernels / 2


def test_a_file_that_shrinks_while_it_is_read_is_one_clear_error(tmp_path, params):
    path = write(tmp_path / "m.gguf", params)
    cfg = gguf.model_config(path)

    def place(where, shape, dtype, read):
        path.write_bytes(path.read_bytes()[:3000])
        return whole(where, shape, dtype, read)

    with pytest.raises(UserError, match="ended while it was read"):
        gguf.load_params(path, cfg, place)


# ------------------------------------------------------------------------------------------------------------------------- rotary
def llama3_divisors(theta, width, factor, low=1.0, high=4.0, original=8192):
    """rope_freqs.weight as llama.cpp's converter computes it (convert_hf_to_gguf.py, LlamaModel.generate_extra_tensors)."""
    found = []
    for frequency in 1.0 / theta ** (np.arange(0, width, 2) / width):
        wave = 2 * math.pi / frequency
        if wave < original / high:
            found.append(1.0)
        elif wave > original / low:
            found.append(factor)
        else:
            smooth = (original / wave - low) / (high - low)
            found.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(found, np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_the_divisors_of_llama_3_become_its_parameters(tmp_path, params, factor):
    cfg = dataclasses.replace(CFG, pattern=(LayerKind(rope=Rope(theta=5e5)),))
    divisors = llama3_divisors(5e5, 32, factor)
    assert 1 < np.median(divisors) < factor or len(set(divisors)) > 2
    path = write(tmp_path / "m.gguf", params, cfg, extra={"rope_freqs.weight": divisors})
    rope = gguf.model_config(path).kind(0).rope
    assert rope == Rope(theta=5e5, scaling="llama3", factor=factor, low=1.0, high=4.0, original=8192)
    np.testing.assert_allclose(frequencies(rope, 32) * divisors, frequencies(Rope(theta=5e5), 32), rtol=1e-6)
    assert set(dict(leaves(load(path)))) == set(dict(leaves(params))), "the divisors are no parameter"


def test_other_divisors_are_taken_as_they_are(tmp_path, params):
    divisors = np.linspace(1, 5, 16).astype(np.float32)
    path = write(tmp_path / "m.gguf", params, extra={"rope_freqs.weight": divisors})
    rope = gguf.model_config(path).kind(0).rope
    assert rope == Rope(theta=5e4, scaling="factors", factors=tuple(map(float, divisors)))
    assert gguf.model_config(write(tmp_path / "n.gguf", params, extra={"rope_freqs.weight": np.ones(16)})).kind(0).rope == Rope(theta=5e4)


@pytest.mark.parametrize("metadata, expected", [
    ({"llama__rope__scaling__type": "linear", "llama__rope__scaling__factor": 4.0}, Rope(theta=5e4, scaling="linear", factor=4.0)),
    ({"llama__rope__scale_linear": 2.5}, Rope(theta=5e4, scaling="linear", factor=2.5)),
    ({"llama__rope__scaling__type": "none", "llama__rope__scaling__factor": 4.0}, Rope(theta=5e4)),
    ({"llama__rope__scaling__type": "linear", "llama__rope__scaling__factor": 1.0}, Rope(theta=5e4)),
])
def test_linear_scaling(tmp_path, params, metadata, expected):
    assert gguf.model_config(write(tmp_path / "m.gguf", params, **metadata)).kind(0).rope == expected


# ------------------------------------------------------------------------------------------------------------------------- header
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
    ({"general__architecture": "qwen2"}, "family not supported in GGUF files; supported is llama"),
    ({"llama__rope__scaling__type": "yarn"}, r"rope scaling 'yarn' \(supported: none, linear\)"),
    ({"llama__attention__head_count": "four"}, "metadata of a wrong kind"),
    ({"llama__attention__head_count": 0}, "metadata of a wrong kind"),
    ({"llama__feed_forward_length": "x"}, "metadata of a wrong kind: a feed-forward width: 'x' is no whole number"),
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


@pytest.mark.parametrize("kind, tied", [(KINDS.F32, False), (KINDS.Q8_0, True), (KINDS.Q4_0, False)])
def test_logits_equal_those_that_transformers_computes_from_the_same_file(tmp_path, kind, tied):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    cfg = dataclasses.replace(CFG, tie_embeddings=tied, head_dim=16)  # transformers reads no head width of its own from a GGUF of Llama
    rng = np.random.default_rng(0)
    params = _map(_numpy(decoder.init_params(cfg, 0)),
                  lambda path, x: (x + rng.normal(0, 0.3, x.shape)).astype(np.float32) if x.ndim == 1 else 5 * x)
    path = write(tmp_path / "m.gguf", params, cfg, kind=kind)
    tokens = rng.integers(0, 40, (2, 24))
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    with torch.no_grad():
        expected = reference(torch.tensor(tokens)).logits.numpy()
    loaded, ours = load(path), gguf.model_config(path)
    hidden, _ = decoder.forward(loaded, ours, tokens, np.broadcast_to(np.arange(24), (2, 24)), causal_attention(np.dtype("float32")))
    np.testing.assert_allclose(decoder.lm_head(loaded, ours, hidden), expected, rtol=0, atol=1e-4 * np.abs(expected).max())
