"""From the name of a model to the files that hold it: one resolver, one message when it cannot be found. Imports no jax."""
from __future__ import annotations

import difflib
import functools
import json
import os
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable

from isara_jax import common
from isara_jax.common import UserError, content_hash, file_hash
from isara_jax.models import assets, published
from isara_jax.models.config import ModelConfig

# "tiny-random": a random decoder for a byte tokenizer, so that every stage can run in seconds
TINY_CONFIG = ModelConfig(vocab_size=264, d_model=64, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=16, d_ff=128, tie_embeddings=True)
TINY_CONTEXT = 512

WHOLE_FILE = 200_000_000  # bytes; larger weight files are identified by samples of their content
PATTERNS = ["*.json", "*.safetensors", "*.jinja", "*.txt", "tokenizer.model", "LICENSE*", "README.md"]
IGNORED = ["original/*", "onnx/*", "openvino/*", "consolidated*"]
CONVERTER, CONVERTED = "SFconvertbot", "Adding `safetensors` variant of this model"  # who converts weights on the hub, and under what title


@dataclass(frozen=True)
class Source:
    """Where a model lies.

    `kind` is "hf" (`path` is a folder), "gguf" (`path` is a file), "shape" (`path` is the JSON of a published shape; no weights, no
    tokenizer) or "tiny" (no files; `path` is None).
    """

    kind: str
    path: Path | None
    name: str

    def content_hash(self) -> str:
        """Sixteen hex digits that identify config, tokenizer and weights, wherever the files lie.

        Files under 200 MB enter with the SHA-256 of all their bytes; larger ones with their size, their first MiB and 64 blocks of
        64 KiB at even distances, which tells fine-tuned siblings apart without reading 100 GB.
        """
        if self.kind == "tiny":
            return content_hash("tiny-random", "2")
        if self.kind != "hf":
            return content_hash(_fingerprint(self.path))
        files = _hf_files(self.path)
        return content_hash(*(f.relative_to(self.path).as_posix() for f in files), *(_fingerprint(f) for f in files))


def resolve(name: str, *, fetch: bool = True, shape_only: bool = False, say: Callable[[str], None] = print) -> Source:
    """Find a model by explicit path, embedded name, published name or hub id.

    Order: the names "tiny-random" and of the embedded models (fetched when `fetch`) → an existing path → a published name, which stands
    for its hub id → the local hub cache → the hub, unless HF_HUB_OFFLINE is set or it does not answer within three seconds. With
    `shape_only` a published model that is not in the cache is its shape alone, and the hub is not asked for it.
    Raises one `UserError`: where was looked, what to do.
    """
    path = Path(name).expanduser()
    if name == "tiny-random":
        return Source("tiny", None, name)
    if name in assets.ASSETS:
        folder = assets.ensure(name, say) if fetch else assets.find(name)
        if folder is None:
            raise UserError(f"{name} is not on this machine yet: run `python -m isara_jax.fetch {name}`.")
        return _local(folder, name)
    if path.exists():
        return _local(path, name)
    if path.suffix == ".gguf" or path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or "\\" in name:
        raise UserError(f"{name}: no such file or folder.{_nearest(path)}")
    if shape := published.find(name):
        shape.model_config()  # a family that is not supported ends here, before anything is downloaded
        if shape_only and not _cached(shape.hub):
            return Source("shape", shape.path, name)
    return Source("hf", _hub(shape.hub if shape else name, fetch, say), name)


def read_json(path: Path, kind: type = dict) -> Any:
    """The object (or, with `kind=list`, the list) in a JSON file of a model folder. Raises `UserError` when it is absent or damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise UserError(f"{path} cannot be read ({e.strerror}); it belongs to the model. Get the model again, with this file.") from None
    except ValueError as e:
        raise UserError(f"{path} is not valid JSON ({e}). The folder is damaged; get it again.") from None
    if not isinstance(value, kind):
        raise UserError(f"{path} holds a {type(value).__name__} where a {kind.__name__} is expected. The folder is damaged; get it again.")
    return value


# ------------------------------------------------------------------------------------------------------------------ local files
def _local(path: Path, name: str) -> Source:
    if path.is_file():
        if path.suffix == ".gguf":
            return Source("gguf", path, name)
        raise UserError(f"{path} is a file, but not a .gguf file. Give the folder that holds config.json and the safetensors.")
    if (path / "config.json").is_file():
        _check_folder(path)
        return Source("hf", path, name)
    ggufs = sorted(path.glob("*.gguf"))
    if len(ggufs) == 1:
        return Source("gguf", ggufs[0], name)
    if ggufs:
        raise UserError(f"{path} holds {len(ggufs)} GGUF files; name one: {', '.join(str(f) for f in ggufs[:5])}.")
    raise UserError(f"{path} is no model folder: it has no config.json. {_listing(path)} "
                    "Give a folder with config.json and *.safetensors, or a .gguf file.")


def _check_folder(folder: Path) -> None:
    if list(folder.glob("*.safetensors")):
        return
    pickled = sorted(f.name for f in folder.iterdir() if f.suffix in (".bin", ".pt", ".pth")) if folder.is_dir() else []
    if bins := [name for name in pickled if name.startswith("pytorch_model") and name.endswith(".bin")]:
        why = (f" Its {bins[0]} is a pickle, which is never opened to run a model. Convert it once, where torch is installed: "
               f"{_conversion(str(folder))} and then take --model=NEW.")
    elif pickled:
        why = f" Its {pickled[0]} is a pickle, which this package never opens: convert it with transformers' save_pretrained."
    else:
        why = " Download it again, with its *.safetensors files."
    raise UserError(f"{folder} holds no weights (*.safetensors). {_listing(folder)}{why}")


def _conversion(folder: str) -> str:
    return f"`python -m isara_jax.export --model={shlex.quote(folder)} --from_bin --out=NEW`"


def _listing(folder: Path) -> str:
    names = sorted(f.name for f in folder.iterdir())
    return f"It holds {', '.join(names[:8])}{' …' if len(names) > 8 else ''}." if names else "It is empty."


def _nearest(path: Path) -> str:
    if not path.parent.is_dir():
        return f" Nor is there a folder {path.parent}."
    near = difflib.get_close_matches(path.name, [f.name for f in path.parent.iterdir()], 3)
    return f" Did you mean {' or '.join(str(path.parent / n) for n in near)}?" if near else f" In {path.parent} nothing has a similar name."


def _hf_files(folder: Path) -> list[Path]:
    kept = [f for f in folder.iterdir() if f.suffix in (".json", ".safetensors", ".jinja") or f.name in ("tokenizer.model", "merges.txt")]
    return sorted(kept + [f for f in [folder / "1_Pooling" / "config.json"] if f.is_file()])


def _fingerprint(path: Path) -> str:
    stat = os.stat(path)
    return _fingerprint_of(os.path.realpath(path), stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=256)
def _fingerprint_of(path: str, size: int, changed: int) -> str:
    del changed  # part of the cache key
    if size < WHOLE_FILE:
        return file_hash(path)
    with open(path, "rb") as f:
        parts = [f.read(1 << 20)]
        for i in range(64):
            f.seek(i * (size - (1 << 16)) // 63)
            parts.append(f.read(1 << 16))
    return content_hash(str(size), *parts, size=64)


# -------------------------------------------------------------------------------------------------------------------------- hub
def _hub(name: str, fetch: bool, say: Callable[[str], None]) -> Path:
    """The snapshot folder of a hub repository, from the local cache or downloaded."""
    from huggingface_hub import constants, errors

    if folder := _cached(name):
        return folder
    if not fetch:
        raise _not_found(name, "It was not asked to download anything.")
    if constants.HF_HUB_OFFLINE:
        raise _not_found(name, "HF_HUB_OFFLINE is set, so the hub was not asked.")
    if not common.reachable(constants.ENDPOINT):
        raise _not_found(name, f"The hub ({constants.ENDPOINT}) does not answer from this machine.")
    say(f"Downloading {name} from the hub …")
    try:
        folder = _snapshot(name)
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, OSError) as e:
        raise _not_found(name, _explain(name, e)) from None
    if not (folder / "config.json").is_file():
        raise UserError(f"{name} on the hub has no config.json, so it is no model in the transformers format. {_listing(folder)}")
    return folder if _whole(folder) else _converted(name, folder, say)


def _converted(name: str, folder: Path, say: Callable[[str], None]) -> Path:
    """The snapshot of the pull request in which the hub's converter added safetensors to a repository that has none.

    `folder` is the snapshot of the repository itself. Raises `UserError` where nobody converted it.
    """
    from huggingface_hub import HfApi, errors

    tried = "The hub's converter has added none to it either."
    try:
        found = [d for d in HfApi().get_repo_discussions(name, author=CONVERTER, discussion_type="pull_request")
                 if d.is_pull_request and d.author == CONVERTER and d.title == CONVERTED]
        for request in sorted(found, key=lambda d: -d.num):
            say(f"{name} has no safetensors; those that {CONVERTER} made of its weights are taken: {request.git_reference} …")
            if _whole(made := _snapshot(name, revision=request.git_reference)):
                return made
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, OSError) as e:
        tried = f"Whether the hub's converter has added some cannot be told: {_explain(name, e)}"
    raise UserError(f"{name} on the hub holds no weights as *.safetensors. {tried} {_listing(folder)} If it ships pytorch_model.bin: "
                    f"`hf download {name}` prints a folder; convert it once, where torch is installed: {_conversion('FOLDER')} and "
                    "then take --model=NEW.")


def _whole(folder: Path) -> bool:
    return (folder / "config.json").is_file() and bool(list(folder.glob("*.safetensors")))


def _cached(name: str) -> Path | None:
    """The snapshot folder in the local hub cache, None when it is not there or not whole."""
    from huggingface_hub import errors

    try:
        folder = _snapshot(name, local_files_only=True)
    except errors.HFValidationError:
        raise UserError(f"{name!r} is neither a path here, nor an embedded model ({', '.join(assets.ASSETS)}), nor a published one "
                        f"({', '.join(published.names())}), nor a hub id (owner/name).{_suggest(name)}") from None
    except (errors.LocalEntryNotFoundError, OSError):
        return None
    return folder if _whole(folder) else _cached_conversion(folder.parents[1])


def _cached_conversion(repository: Path) -> Path | None:
    """The converted weights of a repository's cache folder, where a pull request with some was downloaded; the newest of several."""
    numbers = [int(f.name) for f in (repository / "refs" / "refs" / "pr").glob("*") if f.name.isdecimal()]
    for number in sorted(numbers, reverse=True):
        commit = (repository / "refs" / "refs" / "pr" / str(number)).read_text(encoding="utf-8").strip()
        if Path(commit).name == commit and _whole(folder := repository / "snapshots" / commit):
            return folder
    return None


def _snapshot(name: str, **where: Any) -> Path:
    import huggingface_hub

    return Path(huggingface_hub.snapshot_download(name, allow_patterns=PATTERNS, ignore_patterns=IGNORED, **where))


def _explain(name: str, error: Exception) -> str:
    from huggingface_hub import errors

    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError) or status == 403:
        return ("The hub refused it (401 or 403): the model is gated. Accept its licence at the model's page while logged in, then set "
                "HF_TOKEN to a token of that account (or run `hf auth login`).")
    if isinstance(error, errors.RepositoryNotFoundError) or status in (401, 404):
        return ("The hub knows no such model, or it is private (401): check the spelling, and for a private or gated model set HF_TOKEN "
                "(or run `hf auth login`).")
    first = str(error).strip().splitlines() or [type(error).__name__]
    return f"The download failed: {first[0][:300]}"


def _not_found(name: str, why: str) -> UserError:
    from huggingface_hub import constants

    return UserError(
        f"Model {name!r} cannot be found. {why}\n"
        f"Looked for: a path {name} here; an embedded model ({', '.join(assets.ASSETS)}); "
        f"a published one ({', '.join(published.names())}); the hub cache {constants.HF_HUB_CACHE}.{_suggest(name)}\n"
        f"Ways out: give a folder (config.json, *.safetensors, tokenizer.json) or a .gguf file; or take an embedded model "
        f"(`python -m isara_jax.fetch smollm2-135m-instruct`); or run `hf download {name}` on a machine with a network and set HF_HOME "
        f"to a copy of its cache.")


def _suggest(name: str) -> str:
    if shape := published.find(name):
        return f" Its shape is known as {shape.name!r}: `python -m isara_jax.train … --dry_run` plans a run without its files."
    plain = re.sub(r"^.*/", "", name).lower()
    near = difflib.get_close_matches(plain, [*assets.ASSETS, *published.names(), "tiny-random"], 1, 0.7)
    return f" Did you mean {near[0]!r}?" if near else ""
