"""Vectors of questions, computed once and kept beside the pool: a restart reads them back bit for bit."""
from __future__ import annotations

from pathlib import Path
from typing import Sequence

import numpy as np

from isara_jax.common import UserError, atomic_path, content_hash
from isara_jax.retrieval.embed import Embedder


class VectorStore:
    """A folder of `.npz` files (text hashes, unit vectors), one for each time that new texts were embedded. None keeps nothing on disk."""

    def __init__(self, folder: Path | None, embedder: Embedder):
        self.folder, self.embedder = folder, embedder
        self._known: dict[str, np.ndarray] = {}
        for path in sorted(folder.glob("*.npz")) if folder else ():
            self._read(path)

    def _read(self, path: Path) -> None:
        try:
            with np.load(path, allow_pickle=False) as data:
                self._known.update(zip(data["hashes"].tolist(), data["vectors"], strict=True))
        except (OSError, ValueError, KeyError) as e:
            raise UserError(f"{path} is damaged ({e}). Delete it: the vectors are computed again.") from None

    def vectors(self, texts: Sequence[str]) -> np.ndarray:
        """Unit vectors [len(texts), d] float32; texts not seen before are embedded and written to disk."""
        hashes = [content_hash(t) for t in texts]
        if new := {h: t for h, t in zip(hashes, texts) if h not in self._known}:
            made = self.embedder.embed(list(new.values()))
            self._known.update(zip(new, made, strict=True))
            if self.folder:
                with atomic_path(self.folder / f"{len(list(self.folder.glob('*.npz'))):03d}.npz") as temporary, open(temporary, "wb") as f:
                    np.savez(f, hashes=np.array(list(new)), vectors=made)
        return np.stack([self._known[h] for h in hashes]) if texts else np.zeros((0, self.embedder.dim), np.float32)
