"""One resolver: what each kind of name becomes, and what is said when it becomes nothing."""
from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import types

import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from isara_jax.common import UserError
from isara_jax.models import assets, resolve


@pytest.fixture
def model(tmp_path):
    """A folder that looks like a model."""
    folder = tmp_path / "owner" / "model"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "tokenizer.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty hub cache, a hub that answers, and `asked`, the calls of snapshot_download; set `answer` to what it does online."""
    class Hub:
        answer, asked = None, []

    def download(name, *, local_files_only=False, **kwargs):
        Hub.asked.append((name, local_files_only))
        if local_files_only:
            return original(name, local_files_only=True, cache_dir=tmp_path / "hub", **kwargs)
        if isinstance(Hub.answer, Exception):
            raise Hub.answer
        return str(Hub.answer)

    Hub.asked = []
    original = huggingface_hub.snapshot_download
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(resolve.common, "reachable", lambda endpoint: True)
    Hub.cache = tmp_path / "hub"
    return Hub


# --------------------------------------------------------------------------------------------------------------------- what is found
def test_the_tiny_model_needs_no_files():
    source = resolve.resolve("tiny-random")
    assert (source.kind, source.path) == ("tiny", None) and source.content_hash() == resolve.resolve("tiny-random").content_hash()


def test_a_folder_a_file_and_a_folder_with_one_gguf(model, tmp_path, monkeypatch):
    assert resolve.resolve(str(model)) == resolve.Source("hf", model, str(model))
    monkeypatch.chdir(tmp_path)
    assert resolve.resolve("owner/model").kind == "hf", "a path that exists comes before the hub"
    (tmp_path / "g").mkdir()
    (tmp_path / "g" / "m.gguf").write_bytes(b"GGUF")
    assert resolve.resolve("g/m.gguf").kind == resolve.resolve("g").kind == "gguf"
    assert resolve.resolve("g").path.name == "m.gguf"


def test_an_embedded_name_that_may_not_be_fetched_says_how_to(monkeypatch):
    monkeypatch.setattr(assets, "find", lambda name: None)
    with pytest.raises(UserError, match="python -m isara_jax.fetch minilm-l6"):
        resolve.resolve("minilm-l6", fetch=False)


def test_a_snapshot_in_the_hub_cache_is_used_without_asking_the_hub(hub, model):
    commit = "0" * 40
    repository = hub.cache / "models--owner--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots").mkdir()
    model.rename(repository / "snapshots" / commit)
    source = resolve.resolve("owner/name")
    assert source.kind == "hf" and source.path == repository / "snapshots" / commit
    assert hub.asked == [("owner/name", True)]


def test_what_the_cache_lacks_is_downloaded(hub, model):
    hub.answer = model
    assert resolve.resolve("owner/name", say=lambda text: None).path == model
    assert hub.asked == [("owner/name", True), ("owner/name", False)]


# -------------------------------------------------------------------------------------- repositories that ship pytorch_model.bin alone
def discussion(number, title=resolve.CONVERTED, author=resolve.CONVERTER):
    return types.SimpleNamespace(num=number, title=title, author=author, is_pull_request=True, git_reference=f"refs/pr/{number}")


@pytest.fixture
def pickled(hub, model, tmp_path, monkeypatch):
    """A repository "owner/old" of the hub without safetensors; `requests` are its pull requests, `holding` those references with some."""
    hub.requests, hub.holding, hub.downloaded = [], set(), []
    repository = hub.cache / "models--owner--old"
    (repository / "refs" / "refs" / "pr").mkdir(parents=True)

    def download(name, *, revision=None, local_files_only=False, allow_patterns=(), **kwargs):
        """As snapshot_download: fills the cache with the revision's files, or finds what is there."""
        commit = (revision or "main").replace("/", "-")
        folder = repository / "snapshots" / commit
        if local_files_only and not folder.exists():
            raise errors.LocalEntryNotFoundError("not here")
        if not local_files_only:
            assert "*.bin" not in allow_patterns, "pickles are never downloaded"
            hub.downloaded.append(revision or "main")
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "config.json").write_text("{}")
            if revision in hub.holding:
                (folder / "model.safetensors").write_bytes(b"weights")
            (repository / "refs" / (revision or "main")).write_text(commit)
        return str(folder)

    def discussions(self, name, *, author, discussion_type):
        assert (name, author, discussion_type) == ("owner/old", "SFconvertbot", "pull_request")
        return iter(hub.requests)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub.HfApi, "get_repo_discussions", discussions)
    hub.repository = repository
    return hub


def test_weights_that_the_hub_converted_are_taken_from_their_pull_request(pickled):
    pickled.requests = [discussion(7, title="Fix a typo"), discussion(3), discussion(9, author="somebody"), discussion(5)]
    pickled.holding = {"refs/pr/3", "refs/pr/9", "refs/pr/7"}
    said = []
    source = resolve.resolve("owner/old", say=said.append)
    assert source.path == pickled.repository / "snapshots" / "refs-pr-3" and source.name == "owner/old"
    assert pickled.downloaded == ["main", "refs/pr/5", "refs/pr/3"], "the newest first, and nobody else's"
    assert "refs/pr/3" in said[-1]


def test_converted_weights_are_found_again_without_asking_the_hub(pickled, monkeypatch):
    pickled.requests, pickled.holding = [discussion(3)], {"refs/pr/3"}
    first = resolve.resolve("owner/old", say=lambda text: None)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked = list(pickled.downloaded)
    assert resolve.resolve("owner/old") == first and pickled.downloaded == asked


def test_a_reference_in_the_cache_that_leaves_its_folder_is_not_followed(pickled, model, monkeypatch):
    pickled.requests, pickled.holding = [discussion(3)], {"refs/pr/3"}
    resolve.resolve("owner/old", say=lambda text: None)
    (pickled.repository / "refs" / "refs" / "pr" / "3").write_text(f"../../../{model.name}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        resolve.resolve("owner/old")


def test_where_nobody_converted_them_the_way_out_is_named(pickled, monkeypatch):
    way_out = "`hf download owner/old` prints a folder.*`python -m isara_jax.export --model=FOLDER --from_bin --out=NEW`"
    with pytest.raises(UserError, match=f"holds no weights as .*has added none.*{way_out}"):
        resolve.resolve("owner/old", say=lambda text: None)

    def closed(*args, **kwargs):
        raise errors.HfHubHTTPError("discussions are disabled", response=response(403))

    monkeypatch.setattr(huggingface_hub.HfApi, "get_repo_discussions", closed)
    with pytest.raises(UserError, match=f"cannot be told: .*{way_out}"):
        resolve.resolve("owner/old", say=lambda text: None)


def test_a_folder_without_a_tokenizer_is_a_model(model):
    (model / "tokenizer.json").unlink()
    assert resolve.resolve(str(model)).kind == "hf"


# -------------------------------------------------------------------------------------------------------------------- what is not
def response(status):
    return types.SimpleNamespace(status_code=status, headers={}, request=None)


@pytest.mark.parametrize("error, message", [
    (errors.GatedRepoError("gated", response=response(403)), "Accept its licence .* HF_TOKEN"),
    (errors.RepositoryNotFoundError("no", response=response(401)), "no such model, or it is private .* HF_TOKEN"),
    (errors.HfHubHTTPError("server on fire", response=response(500)), "The download failed: server on fire"),
    (errors.LocalEntryNotFoundError("lost the line"), "The download failed: lost the line"),
])
def test_what_the_hub_refuses_is_explained(hub, error, message):
    hub.answer = error
    with pytest.raises(UserError, match=message) as caught:
        resolve.resolve("owner/name", say=lambda text: None)
    for part in ("'owner/name'", "hub cache", "isara_jax.fetch", "hf download owner/name", "HF_HOME"):
        assert part in str(caught.value)


@pytest.mark.parametrize("offline, reachable, fetch, message", [
    (True, True, True, "HF_HUB_OFFLINE is set"), (False, False, True, "does not answer from this machine"),
    (False, True, False, "not asked to download"),
])
def test_nothing_is_downloaded_without_leave_or_a_network(hub, monkeypatch, offline, reachable, fetch, message):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(resolve.common, "reachable", lambda endpoint: reachable)
    with pytest.raises(UserError, match=message):
        resolve.resolve("owner/name", fetch=fetch)
    assert hub.asked == [("owner/name", True)]


def test_a_hub_that_does_not_answer_is_given_up_soon(monkeypatch):
    monkeypatch.setattr(resolve.common, "PROBE_SECONDS", 0.2)
    with socket.socket() as listener:  # accepts nobody, so that a client waits
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        start = time.monotonic()
        assert resolve.common.reachable(f"http://127.0.0.1:{listener.getsockname()[1]}") is False
        assert time.monotonic() - start < 30, "the hub's own client tries for most of a minute"
        closed = listener.getsockname()[1]
    assert resolve.common.reachable(f"http://127.0.0.1:{closed}") is False


@pytest.mark.parametrize("name, message", [
    ("{model}x", r"no such file or folder. Did you mean .*owner/model\?"),
    ("/nowhere/at/all", "Nor is there a folder /nowhere/at"),
    ("./weights.gguf", "no such file or folder"),
    ("{model}/config.json", "is a file, but not a .gguf file"),
    ("not a name!", "neither a path here, nor an embedded model"),
    ("smollm2-135m", "Did you mean 'smollm2-135m-instruct'"),
])
def test_wrong_names_say_what_is_near(hub, monkeypatch, model, name, message):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=message):
        resolve.resolve(name.format(model=model))


@pytest.mark.parametrize("files, message", [
    ([], "It is empty"),
    (["notes.txt"], "has no config.json. It holds notes.txt"),
    (["a.gguf", "b.gguf"], "holds 2 GGUF files; name one"),
    (["config.json"], "holds no weights"),
    (["config.json", "pytorch_model.bin"], r"pytorch_model.bin is a pickle.*`python -m isara_jax.export --model=\S+ --from_bin --out=NEW`"),
    (["config.json", "pytorch_model-00001-of-00002.bin"], "--from_bin"),
    (["config.json", "weights.pth"], "weights.pth is a pickle, which this package never opens: convert it with transformers"),
])
def test_folders_that_are_no_model_say_why(tmp_path, files, message):
    for name in files:
        (tmp_path / name).write_text("{}")
    with pytest.raises(UserError, match=message):
        resolve.resolve(str(tmp_path))


# ---------------------------------------------------------------------------------------------------------------------------- content
def test_the_content_hash_follows_content_and_not_place(model, tmp_path):
    hash_of = lambda folder: resolve.resolve(str(folder)).content_hash()
    before = hash_of(model)
    moved = tmp_path / "elsewhere"
    model.rename(moved)
    assert hash_of(moved) == before
    (moved / "README.md").write_text("a card is not the model")
    assert hash_of(moved) == before
    (moved / "model.safetensors").write_bytes(b"Weights")
    assert hash_of(moved) != before
    changed = hash_of(moved)
    (moved / "tokenizer.json").write_text('{"a": 1}')
    assert hash_of(moved) != changed


def test_large_files_are_told_apart_by_samples(tmp_path, monkeypatch):
    monkeypatch.setattr(resolve, "WHOLE_FILE", 1000)
    data = bytearray(range(256)) * 20_000
    (tmp_path / "a.gguf").write_bytes(data)
    before = resolve.resolve(str(tmp_path / "a.gguf")).content_hash()
    data[len(data) // 2: len(data) // 2 + 100_000] = bytes(100_000)
    (tmp_path / "b.gguf").write_bytes(data)
    assert resolve.resolve(str(tmp_path / "b.gguf")).content_hash() != before


@pytest.mark.parametrize("text, message", [("{", "not valid JSON"), ("[]", "holds a list where a dict is expected"),
                                           (None, "cannot be read")])
def test_damaged_json_names_its_file(tmp_path, text, message):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=message):
        resolve.read_json(tmp_path / "config.json")
    (tmp_path / "fine.json").write_text(json.dumps([1]))
    assert resolve.read_json(tmp_path / "fine.json", list) == [1]


def test_resolving_and_fetching_import_no_jax():
    code = ("import sys, isara_jax.fetch, isara_jax.models.resolve, isara_jax.models.gguf_header, isara_jax.data.tokenizer; "
            "sys.exit('jax' in sys.modules or 'torch' in sys.modules)")
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
