"""What the JSON files beside a tokenizer declare: named tokens, added tokens, the chat template, the ids that end a text.

Read are tokenizer_config.json, special_tokens_map.json, added_tokens.json, generation_config.json, config.json and chat_template.jinja, as
transformers 4 and 5 write them. None of them has to be there.
"""
from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from isara_jax.common import UserError

FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
NOT_TEXT = ("image", "audio", "video", "vision")  # words in the names of tokens that stand for something other than text


@dataclass(frozen=True)
class Added:
    """A token beside the vocabulary's own, or one of them that is never cut.

    Attributes:
        id: None where only its text is declared.
        special: plain text where people spell it, and left out of decoded text.
        lstrip, rstrip: white space before or after it belongs to it.
    """

    content: str
    id: int | None
    special: bool = True
    lstrip: bool = False
    rstrip: bool = False


@dataclass(frozen=True)
class Declared:
    """Everything declared beside a vocabulary.

    Attributes:
        named: "eos_token", "bos_token", "pad_token", … -> their texts.
        eos_ids: what generation_config.json, or without it config.json, says ends a text; the first is the EOS where no token is named.
        adds_bos: whether a text begins with BOS; None where nothing says it.
        legacy: whether SentencePiece adds its leading space after special tokens too (transformers' word for it).
        vocab_size: of config.json; 0 where it says none.
        config: tokenizer_config.json.
    """

    named: dict[str, str] = field(default_factory=dict)
    added: tuple[Added, ...] = ()
    eos_ids: tuple[int, ...] = ()
    adds_bos: bool | None = None
    legacy: bool = False
    chat_template: str | None = None
    vocab_size: int = 0
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def not_text(self) -> frozenset[str]:
        """Tokens for images and sounds. Text-only checkpoints keep them in the tokenizer, beyond their embeddings (Gemma 3 1B)."""
        return frozenset(text for name, text in self.named.items() if any(word in name for word in NOT_TEXT))


def read(folder: Path) -> Declared:
    """What the files of `folder` declare. Raises `UserError` for a damaged one."""
    config, token_map, added_map = (read_object(folder / name) for name in FILES)
    generation, model = read_object(folder / "generation_config.json"), read_object(folder / "config.json")
    extra = config.get("extra_special_tokens")  # transformers 5: a list, or by name
    sources = (token_map, extra if isinstance(extra, dict) else {}, config)
    named = {key: text for source in sources for key, value in source.items() if key.endswith("_token") and (text := _text(value))}
    model = {**(model["text_config"] if isinstance(model.get("text_config"), dict) else {}), **model}
    path = folder / ("generation_config.json" if generation else "config.json")
    ends = _ids((generation or model).get("eos_token_id"), path) or _ids(model.get("eos_token_id"), folder / "config.json")
    adds_bos = config.get("add_bos_token")
    return Declared(named, _added(config, token_map, added_map, named, folder), ends,
                    adds_bos if isinstance(adds_bos, bool) else None, config.get("legacy") is True, _template(folder, config),
                    size if type(size := model.get("vocab_size")) is int else 0, config)


def read_text(path: Path) -> str:
    """A text file of the folder. Raises `UserError` when it is no UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{path} cannot be read as UTF-8 text ({e}). The folder is damaged; get it again.") from None


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object of a file, {} where there is none. Raises `UserError` for what is none."""
    if not path.exists():
        return {}
    try:
        value = json.loads(read_text(path))
    except ValueError as e:
        raise UserError(f"{path} is not valid JSON ({e}). The folder is damaged; get it again.") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a {type(value).__name__} where an object is expected. The folder is damaged; get it again.")
    return value


def _text(token: Any) -> str | None:
    """A token is written as its text or as an object that holds it."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) and token else None


def _ids(value: Any, path: Path) -> tuple[int, ...]:
    found = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(i) is int and i >= 0 for i in found):
        raise UserError(f"{path} gives a token id as {value!r}; token ids are whole numbers from 0 on, or a list of them.")
    return tuple(found)


def _added(config: dict[str, Any], token_map: dict[str, Any], added_map: dict[str, Any], named: dict[str, str],
           folder: Path) -> tuple[Added, ...]:
    found = {text: Added(text, _one_id(i, folder / FILES[2])) for text, i in added_map.items() if text}
    for i, token in (config.get("added_tokens_decoder") or {}).items():
        if text := _text(token):
            flags = token if isinstance(token, dict) else {}
            found[text] = Added(text, _one_id(int(i) if str(i).isdigit() else i, folder / FILES[0]), flags.get("special", True) is True,
                                flags.get("lstrip") is True, flags.get("rstrip") is True)
    further = [source.get(key) for source in (token_map, config) for key in ("additional_special_tokens", "extra_special_tokens")]
    for text in [*named.values(), *(_text(t) for more in further for t in (more.values() if isinstance(more, dict) else more or ()))]:
        if text:
            found.setdefault(text, Added(text, None))
    return tuple(found.values())


def _one_id(value: Any, path: Path) -> int:
    return _ids(value, path)[0] if type(value) is int else _ids([value], path)[0]


def _template(folder: Path, config: dict[str, Any]) -> str | None:
    """The chat template: a file of its own, else in the config; of several named ones the default."""
    if (file := folder / "chat_template.jinja").exists():
        return read_text(file)
    template = config.get("chat_template") or read_object(folder / "chat_template.json").get("chat_template")
    if isinstance(template, list):
        template = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
    if isinstance(template, dict):
        template = template.get("default")
    return template if isinstance(template, str) else None
