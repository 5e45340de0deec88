"""Safetensors read with pread and written as a stream: equal to the safetensors package, and one clear error for whatever is not whole."""
from __future__ import annotations

import json
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from isara_jax.common import UserError
from isara_jax.models import tensors

ARRAYS = {"a.weight": np.arange(12, dtype=np.float32).reshape(3, 4), "b": np.arange(5, dtype=np.float16),
          "c": np.full((2, 3, 2), 7, np.int64), "d": np.arange(6, dtype=ml_dtypes.bfloat16).reshape(2, 3),
          "e": np.array([True, False, True]), "f": np.array(2.5, np.float64), "é\n": np.zeros((0, 4), np.uint8)}
KINDS = {"a.weight": "F32", "b": "F16", "c": "I64", "d": "BF16", "e": "BOOL", "f": "F64", "é\n": "U8"}


def same(a, b):
    return (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())


def raw_file(path, header, data=b""):
    """A file with this header, as text or as an object, before `data`."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(start, end, shape=None, dtype="F32"):
    return {"dtype": dtype, "shape": [(end - start) // 4] if shape is None else shape, "data_offsets": [start, end]}


# ---------------------------------------------------------------------------------------------------------------------- reading
def test_what_the_package_wrote_is_read_as_it_is(tmp_path):
    safetensors.numpy.save_file(ARRAYS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    checkpoint = tensors.open_folder(tmp_path)
    assert {name: stored.dtype for name, stored in checkpoint.entries.items()} == KINDS and not checkpoint.problems
    for name, array in ARRAYS.items():
        assert same(checkpoint.read(name), array), name
    assert same(checkpoint.read("a.weight", slice(1, 3)), ARRAYS["a.weight"][1:3])
    assert same(checkpoint.read("c", slice(-1, None)), ARRAYS["c"][1:])


@given(st.integers(0, 9), st.integers(0, 9), st.integers(0, 7), st.integers(0, 7), st.integers(1, 200))
def test_blocks_are_the_rows_and_columns_asked_for(a, b, left, right, block):
    (start, stop), (left, right) = sorted((a, b)), sorted((left, right))
    array = np.arange(63, dtype=np.float32).reshape(9, 7)
    with pytest.MonkeyPatch.context() as patch, _folder({"x": array}) as folder:
        patch.setattr(tensors, "BLOCK", block)
        checkpoint, seen, read = tensors.open_folder(folder), start, []
        pread = tensors._pread
        patch.setattr(tensors, "_pread", lambda d, into, at, file: read.append(into.nbytes) or pread(d, into, at, file))
        for first, part in checkpoint.blocks("x", start, stop, (left, right)):
            assert first == seen and np.array_equal(part, array[first:first + len(part), left:right])
            seen += len(part)
    assert seen == stop and sum(read) <= max(2 * (stop - start) * (right - left) * 4, 1)


def _folder(arrays):
    import contextlib
    import tempfile

    @contextlib.contextmanager
    def made():
        with tempfile.TemporaryDirectory() as name:
            safetensors.numpy.save_file(arrays, Path(name) / "model.safetensors")
            yield Path(name)

    return made()


def test_no_page_of_the_file_is_mapped_and_one_buffer_serves_all(tmp_path, monkeypatch):
    monkeypatch.setattr(tensors, "BLOCK", 1 << 16)
    safetensors.numpy.save_file({name: np.ones((500, 400), np.float32) for name in "ab"}, tmp_path / "model.safetensors")
    checkpoint, places = tensors.open_folder(tmp_path), set()
    for name in "ab":
        for _, block in checkpoint.blocks(name):
            places.add(block.ctypes.data)
            assert str(tmp_path) not in Path("/proc/self/maps").read_text() and block.nbytes <= 1 << 16
    assert len(places) == 1


@pytest.mark.parametrize("shape", [(3,), (5, 7), (600, 900)])
def test_jax_on_a_cpu_takes_an_empty_array_without_a_copy(shape):
    array = tensors.empty(shape, np.float32)
    array[...] = 1
    assert array.shape == shape and array.ctypes.data % 64 == 0
    assert jax.device_put(array, jax.devices("cpu")[0]).unsafe_buffer_pointer() == array.ctypes.data


# ---------------------------------------------------------------------------------------------------------------------- writing
def test_what_is_written_the_package_reads(tmp_path):
    pieces = lambda array: iter(np.array_split(array, 2)) if array.ndim else iter([array])
    tensors.write_file(tmp_path / "x.safetensors", [(name, KINDS[name], a.shape, pieces(a)) for name, a in ARRAYS.items()])
    with safetensors.safe_open(tmp_path / "x.safetensors", framework="numpy") as f:
        assert f.metadata() == {"format": "pt"} and set(f.keys()) == set(ARRAYS)
    found = safetensors.numpy.load_file(tmp_path / "x.safetensors")
    assert all(same(found[name], array) for name, array in ARRAYS.items())
    starts = {name: stored.start for name, stored in tensors.read_header(tmp_path / "x.safetensors").items()}
    assert all(starts[name] % ARRAYS[name].dtype.itemsize == 0 for name in starts), "every value is aligned"


@pytest.mark.parametrize("given, message", [
    ([("a", "F32", (2,), [np.zeros(1, np.float32)])], "a: 4 bytes were given"),
    ([("a", "F32", (2,), [np.zeros(2, np.float64)])], "a: a piece is float64, not F32"),
    ([("a", "F32", (0,), []), ("a", "F32", (0,), [])], "a is there twice")])
def test_what_does_not_fit_its_header_is_not_written_silently(tmp_path, given, message):
    with pytest.raises(ValueError, match=message):
        tensors.write_file(tmp_path / "x", given)


# ----------------------------------------------------------------------------------------------------------------------- broken
@pytest.mark.parametrize("kept", [0, 5, 8, 9, 100, 300, -1, -50])
def test_a_file_cut_short_is_one_clear_error(tmp_path, kept):
    safetensors.numpy.save_file(ARRAYS, tmp_path / "model.safetensors")
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(UserError, match="model.safetensors is not a whole safetensors file.*get it again"):
        tensors.open_folder(tmp_path)


@pytest.mark.parametrize("header, size, message", [
    ({"a": entry(0, 8)}, 9, "it has .* bytes, its tensors need"),
    ({"a": entry(0, 8), "b": entry(4, 12)}, 12, "b begins at byte .*, within what lies before it"),
    ({"a": entry(0, 8), "b": entry(12, 16)}, 16, "b begins at byte .*, behind a gap"),
    ({"a": entry(0, 8, [3])}, 8, r"a has 8 bytes, which is not F32 \[3\]"),
    ({"a": entry(0, 8, [2, -1])}, 8, "entry of a is not dtype, shape and data_offsets"),
    ({"a": entry(8, 0, [2])}, 8, "entry of a is not"),
    ({"a": {"dtype": "F32", "shape": [2]}}, 8, "entry of a is not"),
    ({"a": 3}, 8, "entry of a is not"),
    ([1, 2], 0, "its header is a list"),
    (b'{"a": %s, "a": %s}' % ((json.dumps(entry(0, 4)).encode(),) * 2), 4, "a is there twice"),
    (b"{not json", 0, "no JSON"), (b"\xff\xfe{}", 0, "no JSON"), (b"[" * 100_000, 0, "no JSON")],
    ids=["longer", "overlap", "gap", "size", "negative", "backwards", "lacks", "number", "list", "twice", "text", "bytes", "deep"])
def test_a_header_that_contradicts_itself_is_one_clear_error(tmp_path, header, size, message):
    raw_file(tmp_path / "model.safetensors", header, b"\0" * size)
    with pytest.raises(UserError, match=f"model.safetensors is not a whole safetensors file: .*{message}"):
        tensors.open_folder(tmp_path)


def test_a_header_longer_than_the_file_is_not_read(tmp_path):
    (tmp_path / "model.safetensors").write_bytes((1 << 62).to_bytes(8, "little") + b"{}")
    with pytest.raises(UserError, match="its header would need 4,611,686,018,427,387,904"):
        tensors.open_folder(tmp_path)


def test_a_dtype_without_numbers_of_ours_is_named_when_it_is_read(tmp_path):
    raw_file(tmp_path / "model.safetensors", {"a": entry(0, 8, [4, 4], "F4")}, b"\0" * 8)
    with pytest.raises(UserError, match="a is stored as F4; read are F64, F32"):
        tensors.open_folder(tmp_path).read("a")


def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path):
    safetensors.numpy.save_file(ARRAYS, tmp_path / "model.safetensors")
    checkpoint = tensors.open_folder(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="it became shorter"):
        checkpoint.read("a.weight")


# ------------------------------------------------------------------------------------------------------------------------ index
def sharded(folder, weight_map, **files):
    for name, arrays in files.items():
        safetensors.numpy.save_file(arrays, folder / f"{name}.safetensors")
    (folder / tensors.INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_the_index_names_the_files(tmp_path):
    one, two = np.ones(2, np.float32), np.zeros(3, np.float32)
    sharded(tmp_path, {"x": "a.safetensors", "y": "b.safetensors"}, a={"x": one}, b={"y": two}, stray={"z": one})
    checkpoint = tensors.open_folder(tmp_path)
    assert set(checkpoint.entries) == {"x", "y"} and same(checkpoint.read("y"), two) and not checkpoint.problems


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "/etc/x.safetensors", "sub/../../x.safetensors", "model.bin", "",
                                  7, None, ["a"]])
def test_an_index_cannot_point_elsewhere(tmp_path, name):
    (tmp_path.parent / "secret.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="not a .safetensors file of this folder"):
        tensors.open_folder(sharded(tmp_path, {"a": name}))


@pytest.mark.parametrize("index, message", [
    ({"weight_map": {"x": "b.safetensors"}}, "names b.safetensors, which is not in .* The download is unfinished"),
    ({"weight_map": {}}, "names no files"), ({}, "names no files"), ({"weight_map": ["a"]}, "weight_map is a list"), ([], "holds a list"),
    ("{", "is not valid JSON")], ids=str)
def test_an_index_that_is_not_whole_is_one_clear_error(tmp_path, index, message):
    (tmp_path / tensors.INDEX).write_text(index if isinstance(index, str) else json.dumps(index))
    with pytest.raises(UserError, match=message):
        tensors.open_folder(tmp_path)


def test_all_that_does_not_fit_is_listed_at_once(tmp_path):
    x = np.ones((2, 3), np.float32)
    sharded(tmp_path, {"both": "a.safetensors", "moved": "a.safetensors", "gone": "a.safetensors", "y": "b.safetensors"},
            a={"both": x, "y2": x, "base.y": x}, b={"both": x, "moved": x, "y": x, "whole": x.astype(np.int8), "wide": x})
    wanted = {"both": (2, 3), "moved": (2, 3), "gone": (1,), "y": (2, 3), "whole": (2, 3), "wide": (3, 2)}
    with pytest.raises(UserError) as caught:
        tensors.fit(tensors.open_folder(tmp_path), wanted, lambda name: False, canonical=lambda name: name.removeprefix("base."))
    assert [line.strip() for line in str(caught.value).splitlines()[1:]] == [
        "both is in a.safetensors and in b.safetensors",
        "moved is in b.safetensors, and model.safetensors.index.json names a.safetensors for it",
        "gone is in none of the files, and model.safetensors.index.json names a.safetensors for it", "base.y and y are the same tensor",
        "gone is missing", "y2 is unexpected", "whole is stored as I8; read are F64, F32, F16, BF16",
        "wide has shape [2, 3], config.json says [3, 2]"]
