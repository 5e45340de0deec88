"""The families of models there are: which config.json each reads, and which keys its checkpoints have. Imports no jax.

A family is a function from fields to `ModelConfig` and one key-map table; the forward is the same for all (models/decoder.py).
"""
from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Mapping

from isara_jax.common import UserError
from isara_jax.models.config import ModelConfig
from isara_jax.models.families import gemma, gpt, llama
from isara_jax.models.families.fields import Fields
from isara_jax.models.families.table import Entry, Keys

# Tensors that are no parameters: rotary frequencies and causal masks of old releases, the moments of score models (see models/heads.py).
BUFFERS = re.compile(r"(^|\.)(rotary_emb\.inv_freq|(attn|attention)\.(bias|masked_bias)|position_ids)$|^normalizer\.(mean|var|count)$")
VISION = re.compile(r"^(model\.)?(vision_tower|multi_modal_projector)\.")


@dataclass(frozen=True)
class Family:
    """One model_type of transformers.

    Attributes:
        architecture: the class of its causal language model there.
        parse: fields of its config.json to (config, longest text in tokens).
        defaults: of the fields that a config.json may leave out.
        keys: its key-map table.
        inside: field of config.json that holds the text model's own config; "" where the file is it.
    """

    model_type: str
    architecture: str
    parse: Callable[[Fields], tuple[ModelConfig, int]]
    defaults: Mapping[str, Any]
    keys: Keys
    inside: str = ""

    def read(self, raw: Mapping[str, Any], path: Path) -> ModelConfig:
        """The mathematics. Raises one `UserError` naming `path` and every field that cannot be honoured exactly."""
        return self._parsed(raw, path)[0]

    def context_length(self, raw: Mapping[str, Any], path: Path) -> int:
        """Longest text in tokens for which the mathematics is that of transformers."""
        return self._parsed(raw, path)[1]

    def entries(self, cfg: ModelConfig) -> list[Entry]:
        """The tensors of a checkpoint, by canonical key."""
        return self.keys.entries(cfg)

    def text(self, raw: Mapping[str, Any], path: Path) -> dict[str, Any]:
        """The config.json of the text model alone, `raw` itself where there is nothing else in it."""
        if not self.inside:
            return dict(raw)
        own = raw.get(self.inside)
        if not isinstance(own, dict):
            raise UserError(f"{path}: {self.inside} is {own!r}, not an object. The folder is damaged; get it again.")
        tied = raw.get("tie_word_embeddings", own.get("tie_word_embeddings", self.defaults["tie_word_embeddings"]))
        return own | {"model_type": f"{self.model_type}_text", "architectures": [self.architecture], "tie_word_embeddings": tied}

    def ignores(self, key: str) -> bool:
        """Whether a stored tensor is none of the text model's parameters: a buffer, or of the vision tower."""
        return bool(BUFFERS.search(key) or self.inside and VISION.search(key))

    def _parsed(self, raw: Mapping[str, Any], path: Path) -> tuple[ModelConfig, int]:
        for where in (raw, raw.get(self.inside) or {}):
            if isinstance(where, dict) and where.get("quantization_config"):
                raise UserError(f"{path}: quantization_config: quantised checkpoints of transformers are not supported. Take the model's "
                                "folder in bfloat16 or float16, or a .gguf file.")
        return self.parse(Fields(self.text(raw, path), path, self.defaults))


FAMILIES = {family.model_type: family for family in (
    Family("llama", "LlamaForCausalLM", llama.llama, llama.LLAMA, llama.KEYS),
    Family("smollm3", "SmolLM3ForCausalLM", llama.smollm3, llama.SMOLLM3, llama.KEYS),
    Family("mistral", "MistralForCausalLM", llama.mistral, llama.MISTRAL, llama.KEYS),
    Family("qwen2", "Qwen2ForCausalLM", llama.qwen2, llama.QWEN2, llama.KEYS),
    Family("qwen3", "Qwen3ForCausalLM", llama.qwen3, llama.QWEN3, llama.KEYS),
    Family("gemma", "GemmaForCausalLM", gemma.gemma, gemma.GEMMA, gemma.GEMMA_KEYS),
    Family("gemma2", "Gemma2ForCausalLM", gemma.gemma2, gemma.GEMMA2, gemma.GEMMA2_KEYS),
    Family("gemma3_text", "Gemma3ForCausalLM", gemma.gemma3, gemma.GEMMA3, gemma.GEMMA3_KEYS),
    Family("gemma3", "Gemma3ForCausalLM", gemma.gemma3, gemma.GEMMA3, gemma.GEMMA3_KEYS, inside="text_config"),
    Family("opt", "OPTForCausalLM", gpt.opt, gpt.OPT, gpt.OPT_KEYS),
    Family("gpt_neox", "GPTNeoXForCausalLM", gpt.gpt_neox, gpt.NEOX, gpt.NEOX_KEYS),
    Family("gpt2", "GPT2LMHeadModel", gpt.gpt2, gpt.GPT2, gpt.GPT2_KEYS),
    Family("phi3", "Phi3ForCausalLM", llama.phi3, llama.PHI3, llama.PHI3_KEYS),
    Family("olmo2", "Olmo2ForCausalLM", llama.olmo2, llama.OLMO2, llama.OLMO2_KEYS),
    Family("olmo3", "Olmo3ForCausalLM", llama.olmo3, llama.OLMO3, llama.OLMO2_KEYS),
)}
LLAMA = FAMILIES["llama"]  # what GGUF files of llama.cpp's "llama" and the tiny model are


def find(raw: Mapping[str, Any], path: Path) -> Family:
    """The family of a config.json by its model_type. Raises `UserError` with the list of those there are."""
    name = raw.get("model_type")
    if isinstance(name, str) and name in FAMILIES:
        return FAMILIES[name]
    near = difflib.get_close_matches(str(name), FAMILIES, 1, 0.8)
    said = "there is no model_type" if name is None else f"model_type {name!r}: family not supported"
    named = raw.get("architectures")
    raise UserError(f"{path}: {said}{f' (architectures {named})' if named else ''}{f'; is {near[0]!r} meant?' if near else '.'} "
                    f"Supported are {', '.join(FAMILIES)}.")
