"""Text to token ids and back, one behaviour for HF folders, GGUF files and bytes. Imports neither jax nor torch.

What people or models wrote is encoded with special tokens as plain text; only template segments make them live. A beginning-of-sequence
token stands exactly once, and only where the model's own tokenizer adds one.
"""
from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any, Iterable, Sequence

import jinja2
import jinja2.ext
import jinja2.sandbox
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from isara_jax.common import UserError, atomic_write, content_hash

Segments = Sequence[tuple[str, bool]]


class _Splits:
    """What both tokenizers do with the boundary of a pair, from their `encode`."""

    def encode_segments(self, segments: Segments, *, bos: bool = True) -> list[int]:
        """Segments encoded apart from one another and joined; a template that spells BOS itself is not given a second one."""
        ids = [i for text, is_template in segments for i in self._ids(text, is_template)]
        return [self.bos_id, *ids] if bos and self.adds_bos and ids[:1] != [self.bos_id] else ids

    def encode_pair(self, prompt: str | Segments, continuation: str) -> tuple[list[int], list[int]]:
        """(prompt ids, continuation ids), split as lm-evaluation-harness does.

        White space at the end of the prompt moves to the continuation; both are encoded together and cut at the length of the prompt alone.
        After a template segment the continuation is encoded apart.
        """
        segments = [(prompt, False)] if isinstance(prompt, str) else list(prompt)
        text, is_template = segments[-1] if segments else ("", False)
        if is_template:
            return self.encode_segments(segments), self._ids(continuation, False)
        kept = text.rstrip()
        alone = self._ids(kept, False)
        whole = self._ids(text + continuation, False)
        return self.encode_segments(segments[:-1]) + alone, whole[len(alone):]


class Tokenizer(_Splits):
    """A `tokenizers.Tokenizer` with its special tokens and chat template.

    Attributes:
        vocab_size: ids go from 0 to vocab_size - 1.
        eos_id, bos_id: None where the model has none.
        adds_bos: whether a text begins with `bos_id`.
        stop_ids: the ids that end a generated text: EOS, and those of generation_config.json.
        chat_template: Jinja text, None for base models.
        hash: identifies vocabulary, merges and template in cache keys.
    """

    def __init__(self, backend: tokenizers.Tokenizer, *, eos: str | None, bos: str | None, chat_template: str | None,
                 stop_ids: Iterable[int] = (), adds_bos: bool | None = None, name: str = ""):
        backend.no_padding()
        backend.no_truncation()
        self._backend, self._name = backend, name
        self._special = {"eos_token": eos or "", "bos_token": bos or ""}
        self.vocab_size = backend.get_vocab_size(with_added_tokens=True)
        self.eos_id = backend.token_to_id(eos) if eos else None
        self.bos_id = backend.token_to_id(bos) if bos else None
        if adds_bos is None:  # nobody says: what the backend itself does
            adds_bos = backend.encode("a", add_special_tokens=True).ids[:1] == [self.bos_id]
        self.adds_bos = self.bos_id is not None and adds_bos
        self.stop_ids = frozenset(stop_ids) | ({self.eos_id} if self.eos_id is not None else set())
        self.chat_template = chat_template

    @functools.cached_property
    def hash(self) -> str:
        return content_hash(self._backend.to_str(), self.chat_template or "", json.dumps([self._special, sorted(self.stop_ids)]))

    def _ids(self, text: str, special: bool) -> list[int]:
        self._backend.encode_special_tokens = not special  # True encodes special tokens as the characters they are spelled with
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode(self, text: str, *, bos: bool = False) -> list[int]:
        """Ids of a text in which special tokens are plain text; with `bos` as the beginning of a sequence."""
        return ([self.bos_id] if bos and self.adds_bos else []) + self._ids(text, False)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; special tokens are skipped, bytes that are no text become U+FFFD."""
        return self._backend.decode(list(ids), skip_special_tokens=True)

    def render_chat(self, messages: list[dict[str, str]], *, add_generation_prompt: bool) -> str:
        """The messages (role, content) as the model's chat template spells them. Raises `UserError` when it refuses them."""
        if self.chat_template is None:
            raise UserError(f"{self._name} has no chat template: use --config.model.form=plain")
        try:
            return _compiled(self.chat_template).render(messages=messages, add_generation_prompt=add_generation_prompt, **self._special)
        except jinja2.TemplateError as e:
            raise UserError(f"the chat template of {self._name} refuses these messages: {e}") from None

    def save(self, folder: Path) -> None:
        """Write tokenizer.json."""
        atomic_write(folder / "tokenizer.json", self._backend.to_str(pretty=True))


class ByteTokenizer(_Splits):
    """256 bytes and an end: for the tiny random model, where nothing else is needed."""

    vocab_size, eos_id, bos_id, adds_bos, chat_template = 257, 256, None, False, None
    stop_ids, hash = frozenset({256}), "bytes"

    def _ids(self, text: str, special: bool) -> list[int]:
        return list(text.encode("utf-8", "replace"))

    def encode(self, text: str, *, bos: bool = False) -> list[int]:
        """The bytes of a text."""
        return self._ids(text, False)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of bytes; what is none becomes U+FFFD, ids beyond the bytes are skipped."""
        return bytes(i for i in ids if i < 256).decode("utf-8", "replace")

    def render_chat(self, messages: list[dict[str, str]], *, add_generation_prompt: bool) -> str:
        """Bytes have no chat template."""
        raise UserError("the byte tokenizer has no chat template: use --config.model.form=plain")


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


# ---------------------------------------------------------------------------------------------------------------------------- load
def from_folder(folder: Path) -> Tokenizer:
    """The tokenizer of a Hugging Face folder with a tokenizer.json."""
    path = folder / "tokenizer.json"
    if not path.exists():
        also = " (tokenizer.model alone is not read yet; save the folder once with transformers to get a tokenizer.json)" if (
            folder / "tokenizer.model").exists() else ""
        raise UserError(f"{folder} has no tokenizer.json{also}.")
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as e:  # the Rust side raises plain Exception
        raise UserError(f"{path} is not a tokenizer.json ({e}). The folder is damaged; get it again.") from None
    config, generation = _optional(folder / "tokenizer_config.json"), _optional(folder / "generation_config.json")
    text = lambda token: token.get("content") if isinstance(token, dict) else token
    template_file = folder / "chat_template.jinja"
    template = template_file.read_text(encoding="utf-8") if template_file.exists() else config.get("chat_template")
    if isinstance(template, list):  # several named templates
        template = next((t["template"] for t in template if t.get("name") == "default"), None)
    ends = (generation or _optional(folder / "config.json")).get("eos_token_id")  # as transformers: without the one, the other's
    return Tokenizer(backend, eos=text(config.get("eos_token")), bos=text(config.get("bos_token")), chat_template=template,
                     stop_ids=ends if isinstance(ends, list) else [] if ends is None else [ends], adds_bos=config.get("add_bos_token"),
                     name=str(folder))


def from_gguf(metadata: Any, file: Path) -> Tokenizer:
    """The byte-level BPE tokenizer in a GGUF's metadata.

    Args:
        metadata: key, default -> value of the file (`isara_jax.models.gguf.metadata` bound to it).
    """
    model, pre = metadata("tokenizer.ggml.model"), metadata("tokenizer.ggml.pre", "default")
    if model != "gpt2" or pre not in ("smollm", "gpt-2", "default"):
        raise UserError(f"{file}: tokenizer {model!r} with pre-tokenizer {pre!r} is not supported in GGUF files; take the model's "
                        "Hugging Face folder with its tokenizer.json.")
    names = metadata("tokenizer.ggml.tokens")
    name = lambda key: names[metadata(key)] if metadata(key, -1) != -1 else None
    backend = _build_bpe(names, metadata("tokenizer.ggml.merges"), metadata("tokenizer.ggml.token_type"), digits=pre == "smollm")
    return Tokenizer(backend, eos=name("tokenizer.ggml.eos_token_id"), bos=name("tokenizer.ggml.bos_token_id"),
                     stop_ids=[i for key in ("eot", "eom") if (i := metadata(f"tokenizer.ggml.{key}_token_id", -1)) != -1],
                     adds_bos=metadata("tokenizer.ggml.add_bos_token", False),
                     chat_template=metadata("tokenizer.chat_template", "") or None, name=str(file))


def _build_bpe(names: list[str], merges: list[str], kinds: list[int], *, digits: bool) -> tokenizers.Tokenizer:
    """Byte-level BPE; `digits` splits numbers into single digits first, as the pre-tokenizer that GGUF calls smollm does."""
    backend = tokenizers.Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(names)}, merges=[tuple(m.split(" ")) for m in merges]))
    split = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    backend.pre_tokenizer = pre_tokenizers.Sequence([*split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)])
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t, kind in zip(names, kinds) if kind == 3])  # 3: control
    return backend


def _optional(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError as e:
        raise UserError(f"{path} is not valid JSON ({e}). The folder is damaged; get it again.") from None
