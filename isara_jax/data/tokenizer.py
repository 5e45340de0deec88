"""Text to token ids and back, one behaviour for HF folders, GGUF files and bytes. Imports neither jax nor torch.

What people or models wrote is encoded with special tokens as plain text; only template segments make them live. A beginning-of-sequence
token stands exactly once, and only where the model's own tokenizer adds one. Where a tokenizer puts a space before a text (SentencePiece),
it stands before the whole text, not before each of its segments.
"""
from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any, Iterable, Mapping, Sequence

import jinja2
import jinja2.ext
import jinja2.sandbox
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from isara_jax.common import UserError, atomic_write, content_hash
from isara_jax.data import special_tokens
from isara_jax.data.special_tokens import Declared

Segments = Sequence[tuple[str, bool]]


class Splits:
    """What all tokenizers do with segments, pairs and chats, from their `_ids(text, special, begins)`.

    Attributes:
        eos_id, bos_id: None where the model has none.
        eos_token, bos_token: how they are spelled, "" where there is none.
        adds_bos: whether a text begins with `bos_id`.
        chat_template: Jinja text, None for base models.
        opening: ids after which a text is begun anew, with the space that SentencePiece puts before one.
    """

    eos_id: int | None = None
    bos_id: int | None = None
    adds_bos: bool = False
    chat_template: str | None = None
    opening: frozenset[int] = frozenset()
    _special: Mapping[str, str] = {}  # "eos_token", "bos_token", … -> text, as chat templates use them
    _name = ""

    @property
    def eos_token(self) -> str:
        return self._special.get("eos_token", "")

    @property
    def bos_token(self) -> str:
        return self._special.get("bos_token", "")

    def encode(self, text: str, *, bos: bool = False) -> list[int]:
        """Ids of a text in which special tokens are plain text; with `bos` as the beginning of a sequence."""
        return ([self.bos_id] if bos and self.adds_bos else []) + self._ids(text, False, True)

    def encode_segments(self, segments: Segments, *, bos: bool = True) -> list[int]:
        """Segments encoded apart from one another and joined; a template that spells BOS itself is not given a second one."""
        ids = self._joined(self._respaced(segments))
        return self._with_bos(ids) if bos else ids

    def encode_pair(self, prompt: str | Segments, continuation: str) -> tuple[list[int], list[int]]:
        """(prompt ids, continuation ids), split as lm-evaluation-harness does.

        White space at the end of the prompt moves to the continuation; both are encoded together and cut at the length of the prompt alone.
        After a template segment the continuation is encoded apart.
        """
        segments = [(prompt, False)] if isinstance(prompt, str) else self._respaced(prompt)
        text, is_template = segments[-1] if segments else ("", False)
        if is_template:  # one that leaves no white space before an answer ("[/INST]") shows answers behind a space ("[/INST] answer")
            ids = self._joined(segments)
            return self._with_bos(ids), self._ids(continuation, False, not text[-1:].isspace() or self._begins(ids))
        before = self._joined(segments[:-1])
        begins, kept = self._begins(before), text.rstrip()
        alone = self._ids(kept, False, begins)
        whole = self._ids(text + continuation, False, begins)
        return self._with_bos(before) + alone, whole[len(alone):]

    def render_chat(self, messages: list[dict[str, str]], *, add_generation_prompt: bool) -> str:
        """The messages (role, content) as the model's chat template spells them. Raises `UserError` when it refuses them."""
        if self.chat_template is None:
            raise UserError(f"{self._name} has no chat template: use --config.model.form=plain")
        try:
            return _compiled(self.chat_template).render(messages=messages, add_generation_prompt=add_generation_prompt, **self._special)
        except jinja2.TemplateError as e:
            raise UserError(f"the chat template of {self._name} refuses these messages: {e}") from None

    def _ids(self, text: str, special: bool, begins: bool) -> list[int]:
        """Ids of a text. special: whether special tokens are live in it. begins: whether a space is put before it, if one ever is."""
        raise NotImplementedError

    def _joined(self, segments: Segments) -> list[int]:
        ids: list[int] = []
        for text, is_template in segments:
            ids += self._ids(text, is_template, self._begins(ids))
        return ids

    def _begins(self, ids: list[int]) -> bool:
        return not ids or ids[-1] in self.opening

    def _respaced(self, segments: Segments) -> list[tuple[str, bool]]:
        """Segments in which spaces before a text belong to it: vocabularies hold words together with the space before them."""
        out = list(segments)
        for i in range(1, len(out)):
            (before, was_template), (text, is_template) = out[i - 1], out[i]
            if was_template and not is_template:
                kept = before.rstrip(" ")
                out[i - 1], out[i] = (kept, True), (before[len(kept):] + text, False)
        return out

    def _with_bos(self, ids: list[int]) -> list[int]:
        return [self.bos_id, *ids] if self.adds_bos and ids[:1] != [self.bos_id] else ids


class Tokenizer(Splits):
    """A `tokenizers.Tokenizer` with its special tokens and chat template.

    Attributes:
        vocab_size: ids go from 0 to vocab_size - 1 (those of tokens that are no text left out).
        stop_ids: the ids that end a generated text: EOS, and those of generation_config.json.
        hash: identifies vocabulary, merges and template in cache keys.
    """

    def __init__(self, backend: tokenizers.Tokenizer, *, eos: str | None, bos: str | None, chat_template: str | None,
                 stop_ids: Iterable[int] = (), adds_bos: bool | None = None, name: str = "", named: Mapping[str, str] | None = None,
                 not_text: frozenset[str] = frozenset()):
        backend.no_padding()
        backend.no_truncation()
        self._backend, self._name = backend, name
        self.eos_id = backend.token_to_id(eos) if eos else None
        self.bos_id = backend.token_to_id(bos) if bos else None
        front = _front(backend)
        if self.bos_id is None and front is not None:  # nobody names it, but the backend puts one there
            self.bos_id, bos = front, backend.id_to_token(front)
        self.adds_bos = self.bos_id is not None and (front == self.bos_id if adds_bos is None else adds_bos)
        self._special = {**(named or {}), "eos_token": eos or "", "bos_token": bos or ""}
        self.vocab_size = 1 + max((i for token, i in backend.get_vocab().items() if token not in not_text), default=-1)
        self.stop_ids = frozenset(stop_ids) | ({self.eos_id} if self.eos_id is not None else set())
        self.chat_template = chat_template
        self._inner, always = _without_prefix(backend)
        unknown = backend.token_to_id(getattr(backend.model, "unk_token", None) or "")
        self.opening = frozenset(backend.get_added_tokens_decoder()) - {unknown} if always else frozenset()

    @functools.cached_property
    def hash(self) -> str:
        return content_hash(self._backend.to_str(), self.chat_template or "", json.dumps([self._special, sorted(self.stop_ids)]))

    def _ids(self, text: str, special: bool, begins: bool) -> list[int]:
        if begins or self._inner is None:
            return _encode(self._backend, text, special).ids
        if not (special and self.opening):
            return _encode(self._inner, text, special).ids
        encoding = _encode(self._backend, text, special)
        at = next((start for i, (start, _) in zip(encoding.ids, encoding.offsets) if i in self.opening), len(text))
        return _encode(self._inner, text[:at], special).ids + _encode(self._backend, text[at:], special).ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; special tokens are skipped, bytes that are no text become U+FFFD."""
        return self._backend.decode(list(ids), skip_special_tokens=True)

    def save(self, folder: Path) -> None:
        """Write tokenizer.json."""
        atomic_write(folder / "tokenizer.json", self._backend.to_str(pretty=True))


class ByteTokenizer(Splits):
    """256 bytes and an end: for the tiny random model, where nothing else is needed."""

    vocab_size, eos_id, stop_ids, hash = 257, 256, frozenset({256}), "bytes"
    _special, _name = {"eos_token": "<|end|>", "bos_token": ""}, "the byte tokenizer"

    def _ids(self, text: str, special: bool, begins: bool) -> list[int]:
        return list(text.encode("utf-8", "replace"))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of bytes; what is none becomes U+FFFD, ids beyond the bytes are skipped."""
        return bytes(i for i in ids if i < 256).decode("utf-8", "replace")

    def save(self, folder: Path) -> None:
        """Write the same as a tokenizer.json: byte-level BPE without merges, in GPT-2's spelling of bytes."""
        as_is = [*range(33, 127), *range(161, 173), *range(174, 256)]  # the other bytes are spelled as the characters from 256 on
        spelled = as_is + [i for i in range(256) if i not in as_is]
        vocab = {chr(byte if byte in as_is else 256 + n - len(as_is)): byte for n, byte in enumerate(spelled)}
        backend = byte_level(vocab | {self.eos_token: self.eos_id}, [])
        backend.add_special_tokens([AddedToken(self.eos_token, special=True, normalized=False)])
        atomic_write(folder / "tokenizer.json", backend.to_str(pretty=True))


class NoTokenizer(Splits):
    """Stands in for the tokenizer of a model that has none: token ids go in and come out, and whatever needs text is a `UserError`.

    `decode` gives "", so that continuations of token ids can be generated: their ids are what counts.
    """

    hash = "none"

    def __init__(self, vocab_size: int, stop_ids: Sequence[int], name: str):
        self.vocab_size, self.stop_ids, self._name = vocab_size, frozenset(stop_ids), name
        self.eos_id = next(iter(stop_ids), None)

    def _ids(self, text: str, special: bool, begins: bool) -> list[int]:
        raise UserError(f"{self._name} has no tokenizer, so text cannot be encoded: give token ids, or put the model's tokenizer.json "
                        "there.")

    def encode_segments(self, segments: Segments, *, bos: bool = True) -> list[int]:
        return self._ids("", False, True)

    def decode(self, ids: Iterable[int]) -> str:
        return ""

    def save(self, folder: Path) -> None:
        """Nothing to write."""


def check_vocabulary(tokenizer: Splits, rows: int, where: str) -> None:
    """Raise `UserError` where a tokenizer has ids beyond the `rows` of the embeddings. More rows than ids are padding, and fine."""
    if tokenizer.vocab_size > rows:
        raise UserError(f"{where}: the tokenizer has ids up to {tokenizer.vocab_size - 1}, and the embeddings have {rows} rows, so some "
                        "texts could not be embedded. Take the tokenizer that belongs to the model, or the model whose embeddings were "
                        "resized for it.")


# ---------------------------------------------------------------------------------------------------------------------- templates
class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's words for transformers' masks; here it is only its content."""

    tags = {"generation"}

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@functools.lru_cache(maxsize=4)
def _compiled(template: str) -> jinja2.Template:
    """A chat template in a sandbox. It gets no clock: templates that print a date then fall back to their own fixed one."""

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                               extensions=["jinja2.ext.loopcontrols", _Generation])
    environment.globals["raise_exception"] = refuse
    environment.filters["tojson"] = lambda x, **kwargs: json.dumps(x, ensure_ascii=False, **kwargs)
    return environment.from_string(template)


# ----------------------------------------------------------------------------------------------------------------------- backends
def byte_level(vocab: dict[str, int], merges: list[tuple[str, str]], *, prefix: bool = False) -> tokenizers.Tokenizer:
    """GPT-2's byte-level BPE. prefix: a space is put before a text that has none."""
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    backend.decoder = decoders.ByteLevel()
    return backend


def _encode(backend: tokenizers.Tokenizer, text: str, special: bool) -> tokenizers.Encoding:
    backend.encode_special_tokens = not special  # True encodes special tokens as the characters they are spelled with
    return backend.encode(text, add_special_tokens=False)


def _front(backend: tokenizers.Tokenizer) -> int | None:
    """The id that the backend itself puts before a text."""
    whole, plain = backend.encode("a", add_special_tokens=True).ids, backend.encode("a", add_special_tokens=False).ids
    return whole[0] if len(whole) > len(plain) and whole[:1] != plain[:1] else None


def _without_prefix(backend: tokenizers.Tokenizer) -> tuple[tokenizers.Tokenizer | None, bool]:
    """(the backend without the space that it puts before a text, whether it puts one after special tokens too).

    None for a backend that puts none. There are three ways to do it: the normalizer Prepend, the pre-tokenizer Metaspace, and ByteLevel
    with add_prefix_space.
    """
    states = [part.__getstate__() for part in (backend.normalizer, backend.pre_tokenizer) if part is not None]
    if not any(sign in state for state in states for sign in (b'"Prepend"', b'"Metaspace"', b'"add_prefix_space":true')):
        return None, False
    spec, found = json.loads(backend.to_str()), set()

    def strip(part: Any) -> Any:
        if isinstance(part, list):
            return [kept for p in part if (kept := strip(p)) is not None]
        if not isinstance(part, dict):
            return part
        kind = part.get("type")
        if kind == "Prepend":
            found.add("always")
            return None
        if kind == "Metaspace" and part.get("prepend_scheme") != "never":
            found.add(part.get("prepend_scheme"))
            return part | {"prepend_scheme": "never"}
        if kind == "ByteLevel" and part.get("add_prefix_space"):
            found.add("always")
            return part | {"add_prefix_space": False}
        return part | {name: strip(part[name]) for name in ("normalizers", "pretokenizers") if name in part}

    spec["normalizer"], spec["pre_tokenizer"] = strip(spec["normalizer"]), strip(spec["pre_tokenizer"])
    return (tokenizers.Tokenizer.from_str(json.dumps(spec)), "always" in found) if found else (None, False)


# ---------------------------------------------------------------------------------------------------------------------------- load
def from_folder(folder: Path) -> Splits:
    """The tokenizer of a Hugging Face folder.

    Read are, in this order, tokenizer.json; tokenizer.model (SentencePiece, with the extra `text`); vocab.json with merges.txt (GPT-2's
    byte-level BPE, all that OPT ships). A folder with none of them gets a `NoTokenizer`. Raises `UserError` for damaged files.
    """
    declared = special_tokens.read(folder)
    if (folder / "tokenizer.json").exists():
        return _finished(_read_backend(folder / "tokenizer.json"), declared, folder)
    if (folder / "tokenizer.model").exists():
        from isara_jax.data import sentencepiece  # which is built on this file

        return sentencepiece.from_folder(folder, declared)
    if (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        return _finished(_from_merges(folder, declared), declared, folder)
    return NoTokenizer(declared.vocab_size, declared.eos_ids, str(folder))


def _read_backend(path: Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as e:  # the Rust side raises plain Exception
        raise UserError(f"{path} is not a tokenizer.json ({e}). The folder is damaged; get it again.") from None


def _finished(backend: tokenizers.Tokenizer, declared: Declared, folder: Path) -> Tokenizer:
    eos = declared.named.get("eos_token")
    if backend.token_to_id(eos or "") is None:  # not named, or not there: what the model's own files say
        eos = next((token for i in declared.eos_ids if (token := backend.id_to_token(i))), None)
    return Tokenizer(backend, eos=eos, bos=declared.named.get("bos_token"), chat_template=declared.chat_template, stop_ids=declared.eos_ids,
                     adds_bos=declared.adds_bos, name=str(folder), named=declared.named, not_text=declared.not_text)


def _from_merges(folder: Path, declared: Declared) -> tokenizers.Tokenizer:
    """GPT-2's tokenizer from vocab.json and merges.txt."""
    kind, path = declared.config.get("tokenizer_class"), folder / "vocab.json"
    if kind not in (None, "GPT2Tokenizer", "GPT2TokenizerFast"):
        raise UserError(f"{folder} has the vocab.json and merges.txt of a {kind}; alone they are read for GPT2Tokenizer. Save the "
                        "tokenizer once with transformers to get a tokenizer.json.")
    vocab = special_tokens.read_object(path)
    lines = [line for line in special_tokens.read_text(folder / "merges.txt").split("\n") if line and not line.startswith("#version")]
    try:
        backend = byte_level(vocab, [tuple(line.rstrip("\r").split(" ")) for line in lines],
                             prefix=declared.config.get("add_prefix_space") is True)
    except Exception as e:  # the Rust side raises plain Exception
        raise UserError(f"{path} and merges.txt do not fit one another ({e}). The folder is damaged; get it again.") from None
    texts = {token: i for token, i in vocab.items() if i in declared.eos_ids}
    added = [a for a in declared.added if a.id is not None or a.content in vocab]
    added += [special_tokens.Added(text, i) for text, i in texts.items() if text not in {a.content for a in added}]
    for a in sorted(added, key=lambda a: vocab.get(a.content, a.id)):
        token = AddedToken(a.content, special=a.special, normalized=False, lstrip=a.lstrip, rstrip=a.rstrip)
        (backend.add_special_tokens if a.special else backend.add_tokens)([token])
        if a.id not in (None, backend.token_to_id(a.content)):
            raise UserError(f"{folder}: the added token {a.content!r} is declared as id {a.id}, and comes as "
                            f"{backend.token_to_id(a.content)} after the {len(vocab)} entries of vocab.json. The folder is damaged; get it "
                            "again.")
    return backend
