"""The tokenizer files of an exported model folder, as transformers 4 and 5, vLLM and llama.cpp read them.

tokenizer.json is the whole tokenizer: BOS stands in its post-processor, so that the generic class PreTrainedTokenizerFast, which both
versions know, does what ours does. tokenizer_config.json names special tokens and holds the chat template. Imports no jax.
"""
from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import processors

from isara_jax.common import atomic_write
from isara_jax.data import special_tokens
from isara_jax.data.tokenizer import ByteTokenizer, NoTokenizer, Splits

NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")  # those that every tokenizer may have
TEMPLATE = "chat_template.jinja"


def write(folder: Path, tokenizer: Splits, source: Path | None, chat_template: str | None, context: int) -> None:
    """Write the tokenizer files of a model into `folder`; nothing for a model without a tokenizer.

    Args:
        source: the folder the model came from; its tokenizer.json and tokenizer.model are taken byte by byte. None where there is none.
        chat_template: Jinja text; None writes none.
        context: longest sequence in tokens.
    """
    if isinstance(tokenizer, NoTokenizer):
        return
    if source and (source / "tokenizer.model").exists():
        shutil.copyfile(source / "tokenizer.model", folder / "tokenizer.model")
    if source and (source / "tokenizer.json").exists():
        shutil.copyfile(source / "tokenizer.json", folder / "tokenizer.json")
    else:
        tokenizer.save(folder)
    if (folder / "tokenizer.json").exists():
        _begin_as_ours(folder / "tokenizer.json", tokenizer)
        config = _config(tokenizer, source)
    else:  # SentencePiece alone: read by the class of its family, with the settings of the source
        config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": tokenizer.adds_bos, "add_eos_token": False,
                  **special_tokens.read_object(folder / "tokenizer_config.json")}
        config = {k: v for k, v in config.items() if k not in ("auto_map", "name_or_path", "chat_template")}
    config |= {"model_max_length": context, **({"chat_template": chat_template} if chat_template else {})}
    atomic_write(folder / "tokenizer_config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    if chat_template:
        atomic_write(folder / TEMPLATE, chat_template)


def _config(tokenizer: Splits, source: Path | None) -> dict[str, Any]:
    """tokenizer_config.json for a folder with tokenizer.json: named tokens as their texts, and nothing that would change the backend."""
    declared = special_tokens.read(source) if source else special_tokens.Declared()
    named = declared.named | {"bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token}
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    config |= {name: named[name] for name in NAMED if named.get(name)}
    if further := [a.content for a in declared.added if a.special and a.content not in named.values()]:
        config["additional_special_tokens"] = further  # transformers 4 knows no list under the name that 5 gives it, and 5 knows both
    if others := {name: text for name, text in named.items() if name not in NAMED and text}:
        config["extra_special_tokens"] = others
    if (side := declared.config.get("padding_side")) in ("left", "right"):
        config["padding_side"] = side
    return config


def _begin_as_ours(path: Path, tokenizer: Splits) -> None:
    """Let tokenizer.json put BOS before a text exactly where our tokenizer does, and nothing behind it."""
    if isinstance(tokenizer, ByteTokenizer):
        return
    backend = tokenizers.Tokenizer.from_file(str(path))
    plain = backend.encode("a", add_special_tokens=False).ids
    wanted = [tokenizer.bos_id, *plain] if tokenizer.adds_bos else plain
    if backend.encode("a", add_special_tokens=True).ids == wanted:
        return
    bos, first = tokenizer.bos_token, [f"{tokenizer.bos_token}:0"] if tokenizer.adds_bos else []
    second = [f"{bos}:1"] if first else []
    backend.post_processor = processors.TemplateProcessing(single=[*first, "$A:0"], pair=[*first, "$A:0", *second, "$B:1"],
                                                           special_tokens=[(bos, tokenizer.bos_id)] if first else [])
    atomic_write(path, backend.to_str(pretty=True))
