"""Texts to unit vectors with a sentence encoder. A text's vector depends on the text alone, never on what it was embedded with."""
from __future__ import annotations

from pathlib import Path
from typing import Callable, Iterator, Sequence

import jax.numpy as jnp
import numpy as np
import tokenizers

from isara_jax.common import UserError, content_hash
from isara_jax.models import encoder
from isara_jax.models.encoder import EncoderConfig, Params
from isara_jax.models.resolve import resolve

TINY = "tiny-random-encoder"  # random weights on bytes, for tests and configs/tiny.py; no files
TINY_CONFIG = EncoderConfig(vocab_size=257, d_model=32, n_layers=2, n_heads=2, d_ff=64, max_positions=128)
PROGRAM = 1024  # tokens of one call, padding included: rows x length is the same in every bucket, and large enough for full speed on a CPU
SHORTEST = 16   # tokens of the first length bucket; each further one is twice as long


class Embedder:
    """A sentence encoder with its tokenizer.

    Attributes:
        dim: width of a vector.
        hash: identifies weights, tokenizer, pooling and the longest text.
        max_length: tokens of a text that are read; what stands behind them does not count, as in sentence-transformers.
        tokens: tokens embedded so far, padding not counted.
    """

    def __init__(self, params: Params, cfg: EncoderConfig, tokenize: Callable[[str], list[int]], max_length: int, source_hash: str):
        self._params, self._cfg, self._tokenize = params, cfg, tokenize
        self.dim, self.max_length, self.tokens = cfg.d_model, max_length, 0
        self.hash = content_hash(source_hash, repr(cfg), str(max_length))

    @classmethod
    def from_source(cls, name: str) -> Embedder:
        """Load the encoder called `name`: an embedded name, a folder, a hub id, or "tiny-random-encoder".

        Raises `UserError` when it cannot be found, is no BERT encoder or is damaged.
        """
        if name == TINY:
            return cls(encoder.init_params(TINY_CONFIG, 0), TINY_CONFIG, lambda text: [256, *text.encode()][:TINY_CONFIG.max_positions],
                       TINY_CONFIG.max_positions, TINY)
        source = resolve(name)
        if source.kind != "hf":
            raise UserError(f"config.retrieval.encoder={name!r} is not a sentence encoder in a Hugging Face folder. Use minilm-l6, or a "
                            "folder or hub id of a BERT encoder with config.json, tokenizer.json and model.safetensors.")
        params, cfg = encoder.load_encoder(source.path)
        max_length, lower = encoder.text_rules(source.path, cfg)
        return cls(params, cfg, _tokenizer(source.path, cfg, max_length, lower), max_length, source.content_hash())

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Unit vectors [len(texts), dim] float32. A text gives the same bits alone, in any company and in any order (DESIGN rule 1)."""
        rows = [self._tokenize(text) for text in texts]
        self.tokens += sum(map(len, rows))
        out = np.zeros((len(rows), self.dim), np.float32)
        for members, shape in self._calls(rows):
            tokens, lengths = np.zeros(shape, np.int32), np.ones(shape[0], np.int32)  # unused rows read one token and are dropped
            for slot, row in enumerate(members):
                tokens[slot, :len(rows[row])], lengths[slot] = rows[row], len(rows[row])
            out[members] = np.asarray(encoder.encode(self._params, self._cfg, jnp.asarray(tokens), jnp.asarray(lengths)))[:len(members)]
        return out

    def _calls(self, rows: Sequence[list[int]]) -> Iterator[tuple[list[int], tuple[int, int]]]:
        """(indices of rows, [rows, tokens] of the program) of each call. The program that a row runs in follows from its own length."""
        buckets: dict[int, list[int]] = {}
        for i, row in enumerate(rows):
            length = SHORTEST
            while length < len(row):
                length *= 2
            buckets.setdefault(min(length, self._cfg.max_positions), []).append(i)
        for length, members in sorted(buckets.items()):
            size = max(PROGRAM // length, 2)
            yield from ((members[at:at + size], (size, length)) for at in range(0, len(members), size))


def _tokenizer(folder: Path, cfg: EncoderConfig, max_length: int, lower: bool) -> Callable[[str], list[int]]:
    """Text to token ids with the folder's tokenizer.json, [CLS] and [SEP] included."""
    path = folder / "tokenizer.json"
    try:
        inner = tokenizers.Tokenizer.from_file(str(path))
    except Exception as e:  # the library raises bare Exception
        raise UserError(f"{path} cannot be read as a tokenizer ({e}). An encoder folder needs its tokenizer.json; get it again.") from None
    if inner.get_vocab_size() > cfg.vocab_size:
        raise UserError(f"{path} knows {inner.get_vocab_size()} tokens, config.json {cfg.vocab_size}: they are not of one "
                        "model. Get the folder again.")
    inner.no_padding()  # files carry the padding and truncation of whoever saved them: MiniLM's says 128 tokens, always
    inner.enable_truncation(max_length)
    return lambda text: inner.encode(text.lower() if lower else text).ids
