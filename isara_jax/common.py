"""Small things every room needs: the one error type, atomic files, JSON lines, content hashes, versions. Imports no jax."""
from __future__ import annotations

import contextlib
import ctypes
import gc
import hashlib
import importlib.metadata
import json
import os
import platform
import tempfile
import threading
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, Iterable, Iterator

PROBE_SECONDS = 3.0  # that a server has to answer


class UserError(Exception):
    """Something the person at the keyboard can mend. The text is one clear message: what, where (file, row, value), what to do next.

    Command lines print it without a traceback and exit with status 2.
    """


# ---------------------------------------------------------------------------------------------------------------------- files
@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path` that becomes `path` when the block ends well, and vanishes when it does not."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    fd, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(fd)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb") as f:
            os.fsync(f.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def atomic_write(path: str | Path, data: str | bytes) -> None:
    """Write a whole file or nothing."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


def dump_line(row: dict[str, Any]) -> str:
    """One JSON line: real characters instead of escapes, keys in the order given, no stray newline inside."""
    return json.dumps(row, ensure_ascii=False, allow_nan=False).replace("\u2028", "\\u2028").replace("\u2029", "\\u2029") + "\n"


def write_jsonl(path: str | Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write rows as JSON lines, atomically."""
    atomic_write(path, "".join(map(dump_line, rows)))


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a file that `write_jsonl` wrote. Broken lines raise `UserError` with their number."""
    rows = []
    for number, line in enumerate(Path(path).read_bytes().decode("utf-8").split("\n"), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as e:
                raise UserError(f"{path}, line {number}: not valid JSON ({e.msg}). The file was changed or damaged; restore it.") from None
    return rows


# --------------------------------------------------------------------------------------------------------------------- memory
def release_memory() -> None:
    """Give freed memory back to the system: glibc keeps what many middle-sized arrays (a key-value cache) leave behind."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


# -------------------------------------------------------------------------------------------------------------------- network
def reachable(endpoint: str) -> bool:
    """Whether anything answers there within `PROBE_SECONDS`; the hub's own client would try for most of a minute. Proxies are honoured."""
    answers: list[bool] = []

    def probe() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=PROBE_SECONDS).close()
            answers.append(True)
        except urllib.error.HTTPError:
            answers.append(True)  # an answer, whatever it says
        except (OSError, ValueError) as e:
            answers.append("CERTIFICATE" in str(e))  # somebody is there; the hub's client may know the authority

    thread = threading.Thread(target=probe, daemon=True)  # looking up a name has no time limit of its own
    thread.start()
    thread.join(PROBE_SECONDS + 1)
    return bool(answers and answers[0])



# --------------------------------------------------------------------------------------------------------------------- hashes
def content_hash(*parts: str | bytes, size: int = 16) -> str:
    """The first `size` hex digits of SHA-256 over the parts, each preceded by its length so that no two splits collide."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "big") + data)
    return digest.hexdigest()[:size]


def address(*parts: str | int) -> int:
    """The 64-bit address of a draw: a hash of its coordinates (purpose, iteration, attempt, anchor id, sample, …). DESIGN rule 1."""
    return int(content_hash(*(f"{type(p).__name__}:{p}" for p in parts)), 16)


def file_hash(path: str | Path) -> str:
    """SHA-256 of a file, as hex."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


# ------------------------------------------------------------------------------------------------------------------- versions
def versions() -> dict[str, str]:
    """Python, platform and the packages whose version can change a result; packages that are absent are left out."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for name in ("isara_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "tokenizers", "numpy", "scann",
                 "rapidfuzz"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
