"""The tokenizers in GGUF metadata, built with `tokenizers`: byte-level BPE ("gpt2") and SentencePiece's BPE ("llama").

The keys are those of llama.cpp's GGUF specification; what they leave out has llama.cpp's defaults (src/llama-vocab.cpp).
"""
from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from isara_jax.common import UserError
from isara_jax.data.tokenizer import NoTokenizer, Splits, Tokenizer, byte_level

UNKNOWN, CONTROL, USER_DEFINED, BYTE = 2, 3, 4, 6  # types of tokens
# How text is cut before merges, by the name that llama.cpp's converter gives each. Llama 3's is the pattern of its tokenizer.json.
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
GPT2_LIKE = ("gpt-2", "default", "smollm")
LLAMA3_LIKE = ("llama-bpe", "llama3", "llama-v3")


def from_gguf(metadata: Any, file: Path) -> Splits:
    """The tokenizer of a GGUF file. Raises `UserError` for a kind that is not built here, and for metadata that do not fit one another.

    Args:
        metadata: key, default -> value of the file (`isara_jax.models.gguf.metadata` bound to it).
    """
    model, pre = metadata("tokenizer.ggml.model", ""), metadata("tokenizer.ggml.pre", "default")
    if model in ("", "none", "no_vocab"):
        ends = metadata("tokenizer.ggml.eos_token_id", -1)
        return NoTokenizer(metadata("llama.vocab_size", 0), [ends] if ends >= 0 else [], str(file))
    if model not in ("gpt2", "llama") or (model == "gpt2" and pre not in GPT2_LIKE + LLAMA3_LIKE):
        raise UserError(f"{file}: tokenizer {model!r} with pre-tokenizer {pre!r} is not supported in GGUF files; supported are 'gpt2' with "
                        f"{', '.join(GPT2_LIKE + LLAMA3_LIKE)}, and 'llama' (SentencePiece). Take the model's Hugging Face folder with its "
                        "tokenizer.json.")
    names = metadata("tokenizer.ggml.tokens")
    kinds = metadata("tokenizer.ggml.token_type", [1] * len(names))
    if len(kinds) != len(names):
        raise UserError(f"{file}: the metadata have {len(names)} tokens and {len(kinds)} token types. The file is damaged; get it again.")
    pieces = model == "llama"
    if pieces:
        backend = _sentencepiece(metadata, names, kinds, file)
    else:
        backend = _byte_level(names, metadata("tokenizer.ggml.merges"), pre)
    for kind, add in ((CONTROL, backend.add_special_tokens), (USER_DEFINED, backend.add_tokens)):
        add([AddedToken(t, special=kind == CONTROL, normalized=False) for t, k in zip(names, kinds) if k == kind and t])

    def token(key: str, default: int) -> str | None:
        i = metadata(f"tokenizer.ggml.{key}_token_id", default)
        return names[i] if 0 <= i < len(names) else None

    return Tokenizer(backend, eos=token("eos", 2 if pieces else -1), bos=token("bos", 1 if pieces else -1),
                     stop_ids=[i for key in ("eot", "eom") if (i := metadata(f"tokenizer.ggml.{key}_token_id", -1)) >= 0],
                     adds_bos=metadata("tokenizer.ggml.add_bos_token", pieces or pre in LLAMA3_LIKE),
                     chat_template=metadata("tokenizer.chat_template", "") or None, name=str(file))


def _byte_level(names: list[str], merges: list[str], pre: str) -> tokenizers.Tokenizer:
    backend = byte_level({t: i for i, t in enumerate(names)}, [tuple(m.split(" ")) for m in merges])
    if pre == "smollm":  # numbers are cut into single digits first
        backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), backend.pre_tokenizer])
    elif pre in LLAMA3_LIKE:
        backend.model.ignore_merges = True  # a word that is a token is that token, whatever its merges
        backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA3), "isolated"),
                                                         pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    return backend


def _sentencepiece(metadata: Any, names: list[str], kinds: list[int], file: Path) -> tokenizers.Tokenizer:
    """SentencePiece's BPE: spaces are ▁, one is put before a text, and what has no piece becomes bytes."""
    scores = metadata("tokenizer.ggml.scores")
    if len(scores) != len(names):
        raise UserError(f"{file}: the metadata have {len(names)} tokens and {len(scores)} scores. The file is damaged; get it again.")
    unknown = names[metadata("tokenizer.ggml.unknown_token_id", 0)]
    backend = tokenizers.Tokenizer(models.BPE({t: i for i, t in enumerate(names)}, _merges(names, scores, kinds), unk_token=unknown,
                                              fuse_unk=True, byte_fallback=BYTE in kinds))
    prefix = metadata("tokenizer.ggml.add_space_prefix", True)
    backend.normalizer = normalizers.Sequence([*([normalizers.Prepend("▁")] if prefix else []), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                         *([decoders.Strip(" ", 1, 0)] if prefix else [])])
    return backend


def _merges(names: list[str], scores: list[float], kinds: list[int]) -> list[tuple[str, str]]:
    """Merges in the order of SentencePiece, which joins the two neighbours whose piece has the best score, and the leftmost of equals.

    Every way to cut a piece into two others is a merge, since text decides which of them it meets.
    """
    whole = {t for t, kind in zip(names, kinds) if kind not in (UNKNOWN, CONTROL, USER_DEFINED, BYTE)}
    found: dict[float, list[tuple[str, str]]] = defaultdict(list)
    for piece, score in zip(names, scores):
        if piece in whole:
            found[score] += [cut for i in range(1, len(piece)) if (cut := (piece[:i], piece[i:]))[0] in whole and cut[1] in whole]
    return [cut for score in sorted(found, reverse=True) for cut in sorted(found[score], key=lambda c: (len(c[0] + c[1]), len(c[0])))]
