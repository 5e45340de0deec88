"""Folders that appear whole: written beside their place under a hidden name, and renamed at the end. Imports no jax."""
from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from pathlib import Path
from typing import Iterator

from isara_jax.common import UserError


def check(out: Path) -> None:
    """Raise `UserError` unless `out` can be made, or is an empty folder; folders above it are made."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out={out} is a file. Name a new folder.")
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"--out={out} is not empty, and nothing in it is overwritten. Name a new folder, or empty this one.")
    with _explained(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out.parent) as probe:
            probe.write(b"isara")


def check_room(out: Path, nbytes: int) -> None:
    """Raise `UserError` unless the disk has room for tensors of `nbytes` and what goes with them."""
    free, needed = shutil.disk_usage(out.parent).free, int(nbytes * 1.01) + (32 << 20)
    if free < needed:
        raise UserError(f"--out={out}: {needed / 2**30:.2f} GiB are needed and {free / 2**30:.2f} GiB are free there. Make room, name "
                        "another place, or halve it with --dtype=bfloat16.")


@contextlib.contextmanager
def hidden(out: Path, end: str) -> Iterator[Path]:
    """A new folder beside `out` under a hidden name, which is gone after the block unless `appear` renamed it."""
    with _explained(out):
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=f".{end}", dir=out.parent))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def appear(folder: Path, out: Path) -> None:
    """Rename a finished hidden folder to `out`, with the rights that a new folder has, once its files are on the disk."""
    for file in folder.iterdir():
        with open(file, "rb") as f:
            os.fsync(f.fileno())
    mask = os.umask(0)
    os.umask(mask)
    os.chmod(folder, 0o777 & ~mask)
    os.rename(folder, out)


@contextlib.contextmanager
def _explained(out: Path) -> Iterator[None]:
    """Errors of the file system in the words of the command."""
    try:
        yield
    except OSError as e:
        full = e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        where = f" ({e.filename})" if e.filename else ""
        raise UserError(f"--out={out} could not be written: {e.strerror or e}{where}. Nothing is left there. "
                        + ("Make room, or name another place." if full else "Name another place.")) from None
