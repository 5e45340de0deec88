"""Texts to unit vectors: with a sentence encoder, or with the pooled states of the language model itself.

A text's vector depends on the text alone, never on what it was embedded with.
"""
from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from jax.sharding import Mesh

from isara_jax.common import UserError, content_hash
from isara_jax.models import decoder, encoder
from isara_jax.models.config import ModelConfig
from isara_jax.models.encoder import EncoderConfig, Params
from isara_jax.models.layers import causal_attention
from isara_jax.models.resolve import resolve
from isara_jax.sharding import put_rows, row_devices

TINY = "tiny-random-encoder"  # random weights on bytes, for tests and configs/tiny.py; no files
OWN = "own"                   # the pooled states of the model that the run starts from
TINY_CONFIG = EncoderConfig(vocab_size=257, d_model=32, n_layers=2, n_heads=2, d_ff=64, max_positions=128)
PROGRAM = 1024  # tokens of one call, padding included: rows x length is the same in every bucket, and large enough for full speed on a CPU
SHORTEST = 16   # tokens of the first length bucket; each further one is twice as long

Tokenize = Callable[[str], list[int]]
Vectors = Callable[[Params, np.ndarray, np.ndarray], jax.Array]  # weights, tokens [rows, T], lengths [rows] -> unit vectors [rows, dim]


class Embedder:
    """What gives texts their vectors, with its tokenizer.

    Attributes:
        dim: width of a vector.
        hash: identifies weights, tokenizer, pooling and the longest text.
        max_length: tokens of a text that are read; what stands behind them does not count, as in sentence-transformers.
        tokens: tokens embedded so far, padding not counted.
    """

    def __init__(self, params: Params | None, vectors: Vectors, dim: int, tokenize: Tokenize, max_length: int, longest: int, hash: str,
                 devices: int = 1):
        """`longest`: tokens of the last length bucket. `devices`: how many ways the rows of a call are shared out."""
        self._params, self._vectors, self._tokenize, self._longest, self._devices = params, vectors, tokenize, longest, devices
        self.dim, self.max_length, self.tokens, self.hash = dim, max_length, 0, hash

    @classmethod
    def from_source(cls, name: str) -> Embedder:
        """Load the encoder called `name`: an embedded name, a folder, a hub id, or "tiny-random-encoder".

        Raises `UserError` when it cannot be found, is no BERT encoder or is damaged.
        """
        if name == OWN:
            raise UserError('the encoder "own" is the model itself, and there is none here. Name a sentence encoder, such as minilm-l6.')
        if name == TINY:
            tokenize = lambda text: [256, *text.encode()][:TINY_CONFIG.max_positions]
            return cls._of_bert(encoder.init_params(TINY_CONFIG, 0), TINY_CONFIG, tokenize, TINY_CONFIG.max_positions, TINY)
        source = resolve(name)
        if source.kind != "hf":
            raise UserError(f"config.retrieval.encoder={name!r} is not a sentence encoder in a Hugging Face folder. Use minilm-l6, or a "
                            "folder or hub id of a BERT encoder with config.json, tokenizer.json and model.safetensors.")
        params, cfg = encoder.load_encoder(source.path)
        max_length, lower, prompt = encoder.text_rules(source.path, cfg)
        return cls._of_bert(params, cfg, _tokenizer(source.path, cfg, max_length, lower, prompt), max_length, source.content_hash())

    @classmethod
    def _of_bert(cls, params: Params, cfg: EncoderConfig, tokenize: Tokenize, max_length: int, source_hash: str) -> Embedder:
        searched = dataclasses.replace(cfg, normalise=True)  # neighbours are found by cosine, whatever the folder makes of its vectors

        def vectors(params: Params, tokens: np.ndarray, lengths: np.ndarray) -> jax.Array:
            return encoder.encode(params, searched, jnp.asarray(tokens), jnp.asarray(lengths))

        found = content_hash(source_hash, repr(cfg), str(max_length))
        return cls(params, vectors, cfg.width, tokenize, max_length, cfg.max_positions, found)

    @classmethod
    def from_model(cls, cfg: ModelConfig, encode: Tokenize, bos_id: int | None, context: int, source_hash: str, mesh: Mesh,
                   params: decoder.Params | None = None) -> Embedder:
        """The pooled states of a language model: the mean of the last, normed hidden states of a text's tokens, made unit.

        Embeddings are computed once and stored, so in a run this is the model that the run started from, in all iterations. Weights may
        come later (`bind`). All arithmetic is float32 at the highest precision: neighbours must not depend on the device.

        Args:
            encode: text to token ids as the model reads a text, its first token included where the model has one.
            bos_id: that first token, None where there is none: it is read, but is no token of the text. Alone, of an empty text, it counts.
            context: tokens of a text that are read.
            source_hash: identifies weights and tokenizer.
            mesh: where `params` lie; rows are shared out over it.
        """

        def vectors(params: decoder.Params, tokens: np.ndarray, lengths: np.ndarray) -> jax.Array:
            first = (lengths > 1) & (tokens[:, 0] == bos_id) if bos_id is not None else np.zeros(len(tokens), bool)
            return _pooled_states(params, cfg, *put_rows(mesh, (tokens, first.astype(np.int32), lengths)))

        tokenize = lambda text: (encode(text) or [0])[:context]  # a text without tokens has some vector, and always the same
        found = content_hash(source_hash, OWN, repr(cfg), str(context))
        return cls(params, vectors, cfg.embed_dim, tokenize, context, context, found, row_devices(mesh))

    def bind(self, params: decoder.Params) -> None:
        """Hand over the weights that `from_model` was made without; an embedder that has its own keeps them."""
        self._params = params if self._params is None else self._params

    @property
    def ready(self) -> bool:
        """Whether the weights are there."""
        return self._params is not None

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Unit vectors [len(texts), dim] float32. A text gives the same bits alone, in any company and in any order (DESIGN rule 1)."""
        if not self.ready:
            raise RuntimeError("this embedder has no weights yet: bind them first")
        rows = [self._tokenize(text) for text in texts]
        self.tokens += sum(map(len, rows))
        out = np.zeros((len(rows), self.dim), np.float32)
        for members, shape in self._calls(rows):
            tokens, lengths = np.zeros(shape, np.int32), np.ones(shape[0], np.int32)  # unused rows read one token and are dropped
            for slot, row in enumerate(members):
                tokens[slot, :len(rows[row])], lengths[slot] = rows[row], len(rows[row])
            out[members] = np.asarray(self._vectors(self._params, tokens, lengths))[:len(members)]
        return out

    def _calls(self, rows: Sequence[list[int]]) -> Iterator[tuple[list[int], tuple[int, int]]]:
        """(indices of rows, [rows, tokens] of the program) of each call. The program that a row runs in follows from its own length.

        Each device has as many rows as one alone would have, so that all numbers of devices run the same program.
        """
        buckets: dict[int, list[int]] = {}
        for i, row in enumerate(rows):
            length = SHORTEST
            while length < len(row):
                length *= 2
            buckets.setdefault(min(length, self._longest), []).append(i)
        for length, members in sorted(buckets.items()):
            size = max(PROGRAM // length, 2) * self._devices
            yield from ((members[at:at + size], (size, length)) for at in range(0, len(members), size))


@functools.partial(jax.jit, static_argnums=1)
def _pooled_states(params: decoder.Params, cfg: ModelConfig, tokens_BT: jax.Array, first_B: jax.Array, lengths_B: jax.Array) -> jax.Array:
    """Unit means [B, E] of the hidden states of tokens [first, length) of each row."""
    position_T = jnp.arange(tokens_BT.shape[1])
    positions_BT = jnp.broadcast_to(position_T, tokens_BT.shape)
    params = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    with jax.default_matmul_precision("highest"):
        hidden_BTE, _ = decoder.forward(params, cfg, tokens_BT, positions_BT, causal_attention(jnp.float32))
    pooled_BT = (position_T >= first_B[:, None]) & (position_T < lengths_B[:, None])
    return encoder.unit(encoder.weighted_sum(hidden_BTE, pooled_BT.astype(jnp.float32)) / (lengths_B - first_B)[:, None])


def _tokenizer(folder: Path, cfg: EncoderConfig, max_length: int, lower: bool, prompt: str) -> Tokenize:
    """Text to token ids with the folder's tokenizer.json, [CLS] and [SEP] included, `prompt` before each text."""
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
    return lambda text: inner.encode((prompt + text).lower() if lower else prompt + text).ids
