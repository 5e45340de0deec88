"""Low-rank adapters as data, and their files in PEFT's format (adapter_config.json, adapter_model.safetensors). Imports no jax.

PEFT knows an adapter by the module of transformers it stands beside. Where a checkpoint holds several of our products in one module
(GPT-2's c_attn, GPT-NeoX's query_key_value, Phi-3's qkv_proj and gate_up_proj), theirs is one adapter too, and both ways are exact:

* saved, the inputs stand side by side and the outputs are blocks: [a_q a_k a_v] and diag(b_q, b_k, b_v) in the order of the module's rows,
  with the ranks added up and alpha grown with them, so that the scale alpha / rank stays;
* loaded, each of our products has the module's a and its own columns of b, less the ranks whose columns are all zero.
"""
from __future__ import annotations

import collections
import json
import math
import os
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterator, Mapping

import numpy as np

from isara_jax.common import UserError
from isara_jax.models import tensors
from isara_jax.models.config import ModelConfig
from isara_jax.models.families import FAMILIES, Family, find
from isara_jax.models.families.table import Entry, ParamPath, Shape, param_shapes, pieces
from isara_jax.models.resolve import Source, read_json

CONFIG, WEIGHTS, OLD_WEIGHTS = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
KEY = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<half>[AB])(?:\.default)?\.weight")

# What an adapter_config.json (PEFT 0.21) may say: fields that have no part in the result, and those with the values that have none.
SILENT = {"peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "lora_dropout",
          "fan_in_fan_out", "megatron_core", "qalora_group_size", "eva_config", "runtime_config", "target_modules", "exclude_modules",
          "layers_to_transform", "layers_pattern", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "ensure_weight_tying"}
ALLOWED = {"bias": ("none",), "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal")}
WHY = {"use_dora": "DoRA", "bias": "trained biases", "modules_to_save": "modules trained whole",
       "trainable_token_indices": "trained embeddings", "layer_replication": "repeated layers", "lora_bias": "biases of adapters",
       "target_parameters": "adapters of parameters that are no linear modules", "use_qalora": "QA-LoRA",
       "init_lora_weights": "adapters whose base model was changed when they were made; save them converted to plain LoRA"}


@dataclass(frozen=True)
class LowRank:
    """The adapter of one product: it adds alpha / r * (x @ a) @ b to x @ kernel. a [in, r] and b [r, out] are float32 (numpy or jax)."""

    a: Any
    b: Any
    alpha: float

    @property
    def rank(self) -> int:
        return self.a.shape[-1]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


Adapter = dict[ParamPath, LowRank]  # by the path of the product, for example ("layers", "0", "attn", "q")


def family_of(source: Source) -> Family:
    """The family whose module names an adapter of this model has; models without a config.json (GGUF, tiny) are Llamas."""
    if source.kind != "hf":
        return FAMILIES["llama"]
    path = source.path / "config.json"
    return find(read_json(path), path)


def chain(first: Adapter, then: Adapter) -> Adapter:
    """One adapter that adds what two add: their ranks side by side, the scale of the first one."""
    made = dict(first)
    for path, low in then.items():
        if before := made.get(path):
            b = np.concatenate([before.b, np.asarray(low.b) * np.float32(low.scale / before.scale)])
            a = np.concatenate([before.a, np.asarray(low.a)], axis=1)
            made[path] = LowRank(a, b, before.scale * a.shape[1])
        else:
            made[path] = low
    return made


# --------------------------------------------------------------------------------------------------------------------- saving
def save(folder: str | Path, adapter: Adapter, cfg: ModelConfig, family: Family, *, base: str, dropout: float = 0.0) -> None:
    """Write an adapter in PEFT's format, whole or not at all; a folder that is there is replaced.

    Args:
        cfg, family: of the model it belongs to.
        base: name of that model, as PEFT is to find it.
        dropout: what it was trained with.
    """
    folder = Path(folder)
    modules = dict(_fused(adapter, cfg, family))
    stored = {f"base_model.model.{name}.lora_{half}.weight": np.ascontiguousarray(array.T)
              for name, low in modules.items() for half, array in (("A", low.a), ("B", low.b))}
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent))
    try:
        tensors.write_file(temporary / WEIGHTS, [(name, "F32", array.shape, [array]) for name, array in stored.items()])
        (temporary / CONFIG).write_text(json.dumps(_config(modules, cfg, family, base, dropout), indent=2) + "\n", encoding="utf-8")
        os.chmod(temporary, 0o755)
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _fused(adapter: Adapter, cfg: ModelConfig, family: Family) -> Iterator[tuple[str, LowRank]]:
    """(module of transformers, its adapter in our layout [in, r], [r, out]) in the order of the checkpoint."""
    shapes = param_shapes(cfg)
    for module, entry in _modules(family, cfg).items():
        ours = [(number, adapter[path[:-1]]) for number, path in enumerate(entry.paths) if path[:-1] in adapter]
        if not ours:
            continue
        scale, rank = ours[0][1].scale, sum(low.rank for _, low in ours)
        b, first = np.zeros((rank, sum(shapes[path][-1] for path in entry.paths)), np.float32), 0
        for number, low in ours:
            part = np.asarray(low.b, np.float32) * np.float32(low.scale / scale)
            for at, stored, count in pieces(entry, number, shapes, cfg.head_dim):
                b[first:first + low.rank, stored:stored + count] = part[:, at:at + count]
            first += low.rank
        yield module, LowRank(np.concatenate([np.asarray(low.a, np.float32) for _, low in ours], axis=1), b, scale * rank)


def _config(modules: Mapping[str, LowRank], cfg: ModelConfig, family: Family, base: str, dropout: float) -> dict[str, Any]:
    """Module names are given by their end, for all layers at once, wherever all layers are alike."""
    rank, alpha = collections.Counter((low.rank, low.alpha) for low in modules.values()).most_common(1)[0][0]
    by_end: dict[str, list[str]] = {}
    for name, entry in _modules(family, cfg).items():
        above = family.keys.prefix + family.keys.layer.format(entry.paths[0][1])
        by_end.setdefault(name.removeprefix(above), []).append(name)
    targets, ranks, alphas = [], {}, {}
    for end, names in by_end.items():
        alike = len({(modules[name].rank, modules[name].alpha) if name in modules else None for name in names}) == 1
        for written, name in [(end, names[0])] if alike else zip(names, names):
            if name in modules:
                targets.append(written)
                if (modules[name].rank, modules[name].alpha) != (rank, alpha):
                    ranks[written], alphas[written] = modules[name].rank, _whole(modules[name].alpha)
    return {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "inference_mode": True, "r": rank,
            "lora_alpha": _whole(alpha), "lora_dropout": dropout, "target_modules": targets, "rank_pattern": ranks, "alpha_pattern": alphas,
            "bias": "none", "fan_in_fan_out": any(entry.layout == "conv1d" for entry in _modules(family, cfg).values()),
            "use_rslora": False, "use_dora": False, "modules_to_save": None, "init_lora_weights": True}


def _whole(x: float) -> int | float:
    return int(x) if float(x).is_integer() else x


def _modules(family: Family, cfg: ModelConfig) -> dict[str, Entry]:
    """The linear modules by the name that transformers gives them; the vocabulary head is one where it is not tied."""
    return {entry.key.removesuffix(".weight"): entry for entry in family.entries(cfg) if entry.paths[0][-1] == "kernel"}


# -------------------------------------------------------------------------------------------------------------------- loading
def load(folder: str | Path, cfg: ModelConfig, family: Family) -> Adapter:
    """Read an adapter in PEFT's format; arrays are float32 in numpy.

    Raises one `UserError` that lists all that does not fit the model or is not supported (`WHY`): what is loaded adds exactly what PEFT
    would add.
    """
    folder = Path(folder)
    raw, checkpoint = _checked_config(folder), _checkpoint(folder)
    modules, shapes = _modules(family, cfg), param_shapes(cfg)
    pairs, problems = _pairs(checkpoint, modules, family)
    made: Adapter = {}
    for module, entry in modules.items():
        names = pairs.get(module, {})
        if missing := [half for half in "AB" if half not in names]:
            if names or _targeted(module, raw):
                problems.append(f"{module}: its lora_{' and lora_'.join(missing)} {'are' if len(missing) > 1 else 'is'} missing")
            continue
        a, b = (checkpoint.read(names[half]).astype(np.float32) for half in "AB")
        rank, scale = _scale(KEY.fullmatch(names["A"])["module"], raw)
        wanted = (rank, shapes[entry.paths[0]][0]), (sum(shapes[path][-1] for path in entry.paths), rank)
        if (a.shape, b.shape) == wanted:
            made |= _ours(entry, a.T, b.T, scale, shapes, cfg)
        else:
            problems.append(f"{module}: lora_A and lora_B have shapes {list(a.shape)} and {list(b.shape)}; by {CONFIG} and this model they "
                            f"are {list(wanted[0])} and {list(wanted[1])}")
    if not pairs and not problems:
        problems.append(f"{WEIGHTS} holds no adapter")
    if problems:
        raise UserError(f"{folder}: this adapter cannot be used with this model ({family.model_type}, {cfg.n_layers} layers):\n  "
                        + "\n  ".join(problems[:20]) + (f"\n  and {len(problems) - 20} more" if len(problems) > 20 else ""))
    return made


def _pairs(checkpoint: tensors.Checkpoint, modules: Mapping[str, Entry], family: Family) -> tuple[dict[str, dict[str, str]], list[str]]:
    """(module -> "A" and "B" -> stored name, what is wrong with the other tensors)."""
    pairs, problems, keys = {}, [], {f"{module}.weight": None for module in modules}
    for name, stored in checkpoint.entries.items():
        found = KEY.fullmatch(name)
        module = found and family.keys.canonical(f"{found['module']}.weight", keys).removesuffix(".weight")
        if module not in modules:
            problems.append(f"{name}: {_unfit(name, found is not None)}")
        elif stored.dtype not in tensors.FLOATS:
            problems.append(f"{name} is stored as {stored.dtype}; read are {', '.join(tensors.FLOATS)}")
        elif twin := pairs.setdefault(module, {}).get(found["half"]):
            problems.append(f"{twin} and {name} are the same tensor")
        else:
            pairs[module][found["half"]] = name
    return pairs, problems


def _checked_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise UserError(f"{folder} holds no {CONFIG}: it is no adapter folder of PEFT. Name the folder with {CONFIG} and {WEIGHTS}.")
    raw = read_json(path)
    harmless = lambda name, value: name in SILENT or value in (None, False, "", [], {}) or any(
        value == v and type(value) is type(v) for v in ALLOWED.get(name, ()))
    bad = [f"{name}={json.dumps(value)[:60]}: {WHY.get(name, 'a field that is not known here')}"
           for name, value in raw.items() if not harmless(name, value)]
    bad += [f"{name}={raw.get(name)!r} is not {what}" for name, what, good in (
        ("peft_type", "'LORA'", raw.get("peft_type") == "LORA"),
        ("r", "a whole number of at least 1", _number(raw.get("r"), int)),
        ("lora_alpha", "a number above 0", _number(raw.get("lora_alpha"))),
        ("rank_pattern", "an object of whole numbers by regular expressions", _patterns(raw.get("rank_pattern"), int)),
        ("alpha_pattern", "an object of numbers by regular expressions", _patterns(raw.get("alpha_pattern")))) if not good]
    if bad:
        raise UserError(f"{path}: not supported or not valid:\n  " + "\n  ".join(bad) + "\nPlain LoRA adapters are read. Merge this one "
                        "with PEFT (merge_and_unload, save_pretrained) and load the merged folder.")
    return raw


def _number(value: Any, kind: Any = (int, float)) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def _patterns(value: Any, kind: Any = (int, float)) -> bool:
    try:
        return not value or isinstance(value, dict) and all(_number(v, kind) and re.compile(key) for key, v in value.items())
    except re.error:
        return False


def _checkpoint(folder: Path) -> tensors.Checkpoint:
    path = folder / WEIGHTS
    if not path.is_file():
        old = (folder / OLD_WEIGHTS).exists()
        way = f"{OLD_WEIGHTS} is not read: load it with PEFT and save it again (save_pretrained)." if old else "Get the folder again."
        raise UserError(f"{folder} holds no {WEIGHTS}. {way}")
    return tensors.Checkpoint(folder, tensors.read_header(path))


def _unfit(name: str, is_pair: bool) -> str:
    if is_pair or "lora_embedding" in name:
        return "this model has no such linear module (embeddings, and a vocabulary head that is tied to them, cannot have an adapter)"
    if ".base_layer." in name:
        return "this is a weight of the model itself; save the adapter without (save_pretrained with save_embedding_layers=False)"
    return "DoRA is not supported" if "lora_magnitude_vector" in name else "only lora_A and lora_B of linear modules are supported"


def _targeted(module: str, raw: Mapping[str, Any]) -> bool:
    """Whether PEFT expects tensors for a module. Only plain lists tell: other layers than those chosen have no adapter."""
    names = raw.get("target_modules")
    plain = isinstance(names, list) and raw.get("layers_to_transform") is None and not raw.get("exclude_modules")
    return plain and any(module == name or module.endswith(f".{name}") for name in names)


def _scale(module: str, raw: Mapping[str, Any]) -> tuple[int, float]:
    """(rank, scale) of a module, by the first pattern that matches its end (peft.utils.other.get_pattern_key)."""

    def chosen(field: str, default: Any) -> Any:
        patterns = raw.get(field) or {}
        return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)

    rank, alpha = chosen("rank_pattern", raw["r"]), chosen("alpha_pattern", raw["lora_alpha"])
    return rank, alpha / (math.sqrt(rank) if raw.get("use_rslora") else rank)


def _ours(entry: Entry, a: np.ndarray, b: np.ndarray, scale: float, shapes: Mapping[ParamPath, Shape], cfg: ModelConfig) -> Adapter:
    """The adapters of our products out of the one of their module: a [in, r] and b [r, out]."""
    made: Adapter = {}
    for number, path in enumerate(entry.paths):
        own = np.concatenate([b[:, stored:stored + count] for _, stored, count in pieces(entry, number, shapes, cfg.head_dim)], axis=1)
        kept = np.any(own != 0, axis=1) if len(entry.paths) > 1 else np.ones(len(own), bool)
        if kept.any():
            made[path[:-1]] = LowRank(np.ascontiguousarray(a[:, kept]), np.ascontiguousarray(own[kept]), scale * int(kept.sum()))
    return made
