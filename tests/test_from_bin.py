"""pytorch_model.bin, read by torch in a process of its own: tensors as they were, shared ones once, and nothing but tensors."""
import json
import pickle
import subprocess
import sys

import numpy as np
import pytest

from isara_jax.common import UserError
from isara_jax.models import from_bin, tensors

torch = pytest.importorskip("torch")
CONFIG = {"model_type": "llama", "tie_word_embeddings": True}


@pytest.fixture
def places(tmp_path):
    (tmp_path / "model").mkdir(), (tmp_path / "out").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    (tmp_path / "model" / "LICENSE").write_text("as is")
    (tmp_path / "model" / "optimizer.pt").write_bytes(b"not looked at")
    return tmp_path / "model", tmp_path / "out"


def state():
    embedding = torch.randn(7, 3, generator=torch.Generator().manual_seed(1))
    return {"model.embed.weight": embedding, "half": torch.arange(6).reshape(2, 3).to(torch.float16),
            "brain": torch.full((3,), 1 / 3).bfloat16(), "mask": torch.tensor([True, False]), "count": torch.tensor(5),
            "turned": torch.arange(6.0).reshape(2, 3).T, "part": embedding[2:4], "lm_head.weight": embedding}


def test_every_kind_of_tensor_comes_out_as_it_was_and_shared_ones_once(places):
    model, out = places
    torch.save(state(), model / "pytorch_model.bin")
    assert from_bin.convert(model, out) == 7
    written = tensors.open_folder(out)
    assert set(written.entries) == set(state()) - {"lm_head.weight"}, "the first of the names stays"
    for key, value in state().items():
        if key in written.entries:
            wide = lambda a: np.asarray(a, np.float64)
            np.testing.assert_array_equal(wide(written.read(key)), value.double().numpy())
    assert [written.entries[key].dtype for key in ("half", "brain", "mask", "count")] == ["F16", "BF16", "BOOL", "I64"]
    assert written.entries["count"].shape == () and written.entries["turned"].shape == (3, 2)
    assert sorted(f.name for f in out.iterdir()) == ["LICENSE", "config.json", "model.safetensors", "tokenizer.json"]


def test_tensors_that_config_json_calls_untied_both_stay(places):
    model, out = places
    (model / "config.json").write_text(json.dumps(CONFIG | {"tie_word_embeddings": False}))
    torch.save(state(), model / "pytorch_model.bin")
    assert from_bin.convert(model, out) == 8


def test_shards_stay_shards(places):
    model, out = places
    all_of_it = state()
    halves = [dict(list(all_of_it.items())[:4]), dict(list(all_of_it.items())[4:7])]
    for i, half in enumerate(halves):
        torch.save(half, model / f"pytorch_model-{i}.bin")
    weight_map = {key: f"pytorch_model-{i}.bin" for i, half in enumerate(halves) for key in half}
    (model / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert from_bin.convert(model, out) == 7
    written = tensors.open_folder(out)
    assert set(written.entries) == set(weight_map) and not written.problems
    assert {f.name for f in out.glob("*.safetensors")} == {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}


def test_a_file_of_old_torch_is_read_without_mapping(places):
    model, out = places
    torch.save(state(), model / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert from_bin.convert(model, out) == 7


class Harmful:
    """What a pickle may do when it is opened in the ordinary way."""

    def __reduce__(self):
        return (open, ("touched", "w"))


def test_a_pickle_that_is_more_than_tensors_is_not_opened(places, monkeypatch):
    model, out = places
    monkeypatch.chdir(out.parent)
    torch.save({"a": torch.ones(1), "b": Harmful()}, model / "pytorch_model.bin")
    with pytest.raises(UserError, match="cannot be read by torch's weights_only reader"):
        from_bin.convert(model, out)
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Harmful()))
    with pytest.raises(UserError, match="cannot be read by torch's weights_only reader"):
        from_bin.convert(model, out)
    assert not (out.parent / "touched").exists()


@pytest.mark.parametrize("content, message", [
    ({"model": {"a": 1}, "step": 3}, "is no table of tensors by name .it holds model, step."),
    ([1], "it holds list"), ({}, "it holds dict"),
    ({"a": torch.ones(2).to_sparse()}, "a is of a kind that is no plain tensor"),
    ({"a": torch.ones(2, dtype=torch.complex64)}, "torch.complex64")])
def test_checkpoints_of_another_kind_are_refused(places, content, message):
    model, out = places
    torch.save(content, model / "pytorch_model.bin")
    with pytest.raises(UserError, match=message):
        from_bin.convert(model, out)


def test_a_file_cut_short_is_named(places):
    model, out = places
    torch.save(state(), model / "pytorch_model.bin")
    data = (model / "pytorch_model.bin").read_bytes()
    (model / "pytorch_model.bin").write_bytes(data[:len(data) // 2])
    with pytest.raises(UserError, match=r"pytorch_model.bin \([\d,]+ bytes\) cannot be read .*cut short"):
        from_bin.convert(model, out)


@pytest.mark.parametrize("weight_map, message", [
    ({"a": "../x.bin"}, "names '../x.bin', which is not a .bin file of this folder"), ({"a": "/etc/passwd"}, "is not a .bin file"),
    ({"a": "gone.bin"}, "names gone.bin, which is not in"), ({}, "names no files"), ([1], "names no files")])
def test_an_index_stays_in_its_folder(places, weight_map, message):
    model, out = places
    (model / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(UserError, match=message):
        from_bin.convert(model, out)


def test_where_there_is_nothing_to_convert_it_says_so(places, tmp_path):
    with pytest.raises(UserError, match="holds neither pytorch_model.bin nor"):
        from_bin.bin_files(places[0])
    with pytest.raises(UserError, match="and .*nowhere is none: name the folder"):
        from_bin.bin_files(tmp_path / "nowhere")


@pytest.mark.parametrize("torch_there, message", [("None", "needs torch, which is not installed in this Python: pip install torch"),
                                                  ("type('torch', (), {'__version__': '2.5.1'})", "needs torch 2.6 or later")])
def test_without_a_safe_torch_it_names_the_way_to_one(places, torch_there, message):
    code = (f"import sys; sys.modules['torch'] = {torch_there}\nfrom pathlib import Path\nfrom isara_jax.models import from_bin\n"
            f"print(from_bin.main(Path({str(places[0])!r}), Path({str(places[1])!r})))")
    assert message in subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout


def test_a_process_that_dies_is_an_error(places, monkeypatch):
    torch.save(state(), places[0] / "pytorch_model.bin")
    monkeypatch.setattr(from_bin.sys, "executable", "/bin/false")
    with pytest.raises(UserError, match="the process ended with status 1"):
        from_bin.convert(*places)


def test_torch_is_imported_in_the_other_process_alone():
    code = "import sys, isara_jax.models.from_bin; sys.exit('torch' in sys.modules or 'jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
