"""Checkpoints that ship only tokenizer.model: SentencePiece (Kudo and Richardson 2018) through tensorflow-text's SentencepieceTokenizer.

tensorflow-text is 2 GB and takes seconds to import, so it is the extra `text` and is imported where a text is first encoded. Its
FastSentencepieceTokenizer is no choice: it differs from SentencePiece on models with byte fallback. What the op does not know is here:
special tokens beside the model's own, which are live in template segments only, and segments that continue a text.

The model file is a protocol buffer (sentencepiece_model.proto); the few fields that are needed are read from its bytes.
"""
from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import os
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, Protocol

from isara_jax.common import UserError, atomic_write, content_hash
from isara_jax.data.special_tokens import FILES, Declared
from isara_jax.data.tokenizer import Splits

CONTROL, USER_DEFINED = 3, 4         # types of pieces; sentencepiece_model.proto, ModelProto.SentencePiece.Type
UNPREFIXED = b"\x1a\x02\x18\x00"     # ModelProto.normalizer_spec.add_dummy_prefix = false; appended to a model it overrides the model's own


class Engine(Protocol):
    """SentencePiece itself, on one model."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: list[int]) -> str: ...


@dataclass(frozen=True)
class Model:
    """What a tokenizer.model says.

    Attributes:
        data: the whole file.
        pieces: the text of each id; types: its type.
        bos_id, eos_id: -1 where there is none.
        prefixes: whether a space is put before a text.
        tidies: whether spaces at the ends of a text, and all but one of several, are dropped.
    """

    data: bytes
    pieces: tuple[str, ...]
    types: tuple[int, ...]
    bos_id: int
    eos_id: int
    prefixes: bool
    tidies: bool


def parse(data: bytes, path: Path) -> Model:
    """The model in the bytes of `path`. Raises `UserError` when they are no SentencePiece model."""
    try:
        fields = list(_fields(data))
        pieces = [dict(_fields(value)) for number, value in fields if number == 1]
        trainer, normalizer = (dict(kv for number, value in fields if number == n for kv in _fields(value)) for n in (2, 3))
        texts = tuple(p[1].decode("utf-8") for p in pieces)
        types = tuple(p.get(3, 1) for p in pieces)
    except (IndexError, KeyError, ValueError, TypeError, AttributeError, struct.error):
        texts = ()
    if not texts:
        raise UserError(f"{path} is not a SentencePiece model ({len(data):,} bytes). It may be cut short, or of another kind (Llama 3's is "
                        "tiktoken's): get it again, or take a folder with tokenizer.json.")
    bos, eos = (_int32(trainer.get(number, default)) for number, default in ((41, 1), (42, 2)))
    return Model(data, texts, types, *(i if 0 <= i < len(texts) else -1 for i in (bos, eos)), bool(normalizer.get(3, 1)),
                 bool(normalizer.get(4, 1)))


def from_folder(folder: Path, declared: Declared) -> SentencePiece:
    """The tokenizer of a folder with tokenizer.model. Raises `UserError` when the file is damaged or tensorflow-text is not installed."""
    path = folder / "tokenizer.model"
    model = parse(path.read_bytes(), path)
    if importlib.util.find_spec("tensorflow_text") is None:
        raise UserError(f'{folder} has its tokenizer as tokenizer.model only, which is read by tensorflow-text: pip install '
                        '"isara_jax[text]" (2 GB). Or save the tokenizer once with transformers to get a tokenizer.json.')
    files = {name: (folder / name).read_bytes() for name in FILES if (folder / name).exists()}
    return SentencePiece(model, declared, name=str(folder), files=files)


class SentencePiece(Splits):
    """A SentencePiece model with its special tokens and chat template: the interface of `Tokenizer`."""

    def __init__(self, model: Model, declared: Declared, *, name: str, files: dict[str, bytes] | None = None,
                 engine: Callable[[bytes], Engine] | None = None):
        """engine: makes SentencePiece of a model's bytes; by default tensorflow-text's."""
        self._model, self._name, self._files, self._make = model, name, files or {}, engine or _TensorFlowText
        known = {piece: i for i, piece in reversed(list(enumerate(model.pieces)))}
        added = {a.content: a for a in declared.added}
        self._live = {text: known.get(text, a.id) for text, a in added.items() if text in known or a.id is not None}
        self._live |= {piece: i for i, (piece, kind) in enumerate(zip(model.pieces, model.types)) if kind == CONTROL}
        self._texts = {i: text for text, i in self._live.items() if i >= len(model.pieces)}
        self._skipped = {i for text, i in self._live.items() if text not in added or added[text].special}
        self._strips = {a.content: (a.lstrip, a.rstrip) for a in declared.added}
        self.vocab_size = max([len(model.pieces) - 1, *(i for t, i in self._live.items() if t not in declared.not_text)]) + 1
        self.eos_id = self._id(declared.named.get("eos_token"), *declared.eos_ids[:1], model.eos_id)
        self.bos_id = self._id(declared.named.get("bos_token"), model.bos_id)
        self.adds_bos = self.bos_id is not None and declared.adds_bos is not False  # the default of Llama's and Gemma's tokenizers
        spelled = {i: text for text, i in self._live.items()}
        self._special = {**declared.named, "eos_token": spelled.get(self.eos_id, ""), "bos_token": spelled.get(self.bos_id, "")}
        self.stop_ids = frozenset(declared.eos_ids) | ({self.eos_id} if self.eos_id is not None else set())
        self.chat_template = declared.chat_template
        self.opening = frozenset(self._live.values()) if declared.legacy and model.prefixes else frozenset()
        self._find_live = _alternatives(self._live)
        self._find_always = _alternatives(text for text, i in self._live.items() if i not in self._skipped)
        # the model itself finds its user-defined pieces in any text; those that are special are cut there
        self._find_inert = _alternatives(text for text, i in self._live.items() if i in self._skipped and i < len(model.pieces)
                                         and model.types[i] == USER_DEFINED)

    def _id(self, text: str | None, *ids: int) -> int | None:
        return self._live.get(text or "", next((i for i in ids if 0 <= i < self.vocab_size), None))

    @functools.cached_property
    def hash(self) -> str:
        return content_hash(self._model.data, self.chat_template or "",
                            json.dumps([self._special, sorted(self.stop_ids), sorted(self._live.items()), self.adds_bos]))

    @functools.cached_property
    def _outer(self) -> Engine:
        return self._make(self._model.data)

    @functools.cached_property
    def _inner(self) -> Engine:
        """Without the space before a text."""
        return self._make(self._model.data + UNPREFIXED) if self._model.prefixes else self._outer

    def _ids(self, text: str, special: bool, begins: bool) -> list[int]:
        ids: list[int] = []
        for part, token in self._cut(text, self._find_live if special else self._find_always):
            if token is not None:
                ids.append(token)
            elif part:
                ids += self._plain(part, begins if not ids else ids[-1] in self.opening)
        return ids

    def _plain(self, text: str, begins: bool) -> list[int]:
        ids, start = [], 0
        for found in self._find_inert.finditer(text):  # "<end>" as "<" and "end>"
            ids += (self._outer if begins and start == 0 else self._inner).encode(text[start:found.start() + 1])
            start = found.start() + 1
        return ids + (self._outer if begins and start == 0 else self._inner).encode(text[start:])

    def _cut(self, text: str, find: re.Pattern[str]) -> Iterator[tuple[str, int | None]]:
        """(text, None) and ("", id) in their order; white space that belongs to a token goes with it."""
        start, rstrip = 0, False
        for found in find.finditer(text):
            lstrip, then = self._strips.get(found[0], (False, False))
            part = text[start:found.start()]
            part = part.lstrip() if rstrip else part
            yield part.rstrip() if lstrip else part, None
            yield "", self._live[found[0]]
            start, rstrip = found.end(), then
        yield text[start:].lstrip() if rstrip else text[start:], None

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; special tokens are skipped, and ids beyond the vocabulary; bytes that are no text become U+FFFD."""
        out: list[str] = []
        run: list[int] = []
        kept = [i for i in ids if i not in self._skipped and (0 <= i < len(self._model.pieces) or i in self._texts)]
        for i, last in zip(kept, [*(j in self._texts for j in kept[1:]), True]):
            if i in self._texts:
                out.append(self._texts[i])
            else:
                run.append(i)
                if last:
                    out.append(self._text(run, not out))
                    run = []
        return "".join(out)

    def _text(self, ids: list[int], begins: bool) -> str:
        """The text of the model's own ids. At the beginning one space goes, the one that was put there.

        The op of tensorflow-text 2.21 would drop all spaces there, where sentencepiece 0.2.3 drops one; so it
        decodes as if none had been put.
        """
        text = self._inner.decode(ids)
        put = begins and self._model.prefixes and not self._model.tidies and self._model.pieces[ids[0]].startswith("▁")
        return text[1:] if put else text

    def save(self, folder: Path) -> None:
        """Write tokenizer.model, and the files that declare the special tokens as they are at the source."""
        for name, data in {"tokenizer.model": self._model.data, **self._files}.items():
            atomic_write(folder / name, data)


class _TensorFlowText:
    """tensorflow-text's SentencepieceTokenizer on the CPU, one text at a time."""

    def __init__(self, model: bytes):
        with _quiet():
            self._op = _tensorflow_text().SentencepieceTokenizer(model=model)

    def encode(self, text: str) -> list[int]:
        return self._op.tokenize(text.encode("utf-8", "replace")).numpy().tolist()

    def decode(self, ids: list[int]) -> str:
        return self._op.detokenize(ids).numpy().decode("utf-8", "replace") if ids else ""


@functools.cache
def _tensorflow_text() -> Any:
    """The module, with TensorFlow kept to one thread and away from accelerators: their memory is jax's."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    with _quiet():
        import tensorflow
        import tensorflow_text
    with contextlib.suppress(RuntimeError):  # somebody has used it already, with settings of their own
        tensorflow.config.set_visible_devices([], "GPU")
        tensorflow.config.threading.set_inter_op_parallelism_threads(1)
        tensorflow.config.threading.set_intra_op_parallelism_threads(1)
    return tensorflow_text


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """A block whose C++ code prints nothing: TensorFlow greets on the error stream at any log level."""
    kept = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _alternatives(texts: Iterable[str]) -> re.Pattern[str]:
    """Matches any of the texts, the longest first; nothing where there are none."""
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or r"(?!)")


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """(field number, value) of a protocol buffer message: bytes for what has a length, integers, and raw 4 or 8 bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _varint(data, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
            value, at = data[at:at + size], at + size
        elif wire == 2:
            size, at = _varint(data, at)
            value, at = data[at:at + size], at + size
        else:
            raise ValueError(wire)
        if at > len(data) or number == 0:
            raise IndexError(at)
        yield number, value


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
        if byte < 128:
            return value, at
        if shift > 63:
            raise ValueError(at)


def _int32(value: int) -> int:
    """Protocol buffers write -1 as 2**64 - 1."""
    return value - (1 << 64) if value >= 1 << 63 else value
