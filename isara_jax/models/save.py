"""A model as a Hugging Face folder: its config.json, which transformers 4 and 5 both read right, and its tensors as safetensors.

Tensors are written one after the other, in slices of rows, from the parameters as they lie on their devices: no second copy of the model.
"""
from __future__ import annotations

import functools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterator, Mapping, Sequence

import jax
import ml_dtypes
import numpy as np

from isara_jax.common import UserError, atomic_write
from isara_jax.models import families, gguf, hf, published, tensors
from isara_jax.models.config import ModelConfig, Rope
from isara_jax.models.families import table
from isara_jax.models.families.table import Entry
from isara_jax.models.resolve import Source, read_json

NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}     # as safetensors and as config.json name the dtypes that are written
STORED = {name: stored for stored, name in NAMES.items()}
BLOCK = 16 << 20                                                      # bytes of a slice that is written at once
PRIVATE = ("_name_or_path", "auto_map", "transformers_version", "quantization_config")  # what says nothing true of the exported files
BY_LAYER = ("full_attention", "sliding_attention")


@dataclass(frozen=True)
class Layout:
    """How a model lies in files.

    Attributes:
        raw: its config.json.
        family: whose keys its tensors have.
        dtypes: key -> dtype as safetensors names it, in the order of the computation.
        notes: what a person should know of the config.
    """

    raw: dict[str, Any]
    family: families.Family
    cfg: ModelConfig
    dtypes: dict[str, str]
    notes: tuple[str, ...] = ()

    @functools.cached_property
    def entries(self) -> dict[str, Entry]:
        """Key -> which of our parameters the tensor holds."""
        return {entry.key: entry for entry in self.family.entries(self.cfg)}

    @functools.cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Key -> stored shape."""
        ours = table.param_shapes(self.cfg)
        return {key: table.stored_shape(entry, ours) for key, entry in self.entries.items()}

    def size(self, key: str) -> int:
        """Bytes of a tensor."""
        return math.prod(self.shapes[key]) * np.dtype(tensors.DTYPES[self.dtypes[key]]).itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(map(self.size, self.dtypes))


def layout(source: Source, cfg: ModelConfig, context: int, dtype: str = "") -> Layout:
    """How the model of `source` is to be written.

    Args:
        context: longest sequence in tokens, for sources without a config.json.
        dtype: of all tensors ("float32", "bfloat16", "float16"); "" keeps each as it is stored. GGUF files and the tiny model, which store
            none of these, become float32, and so does float64.
    """
    if source.kind == "hf":
        path = source.path / "config.json"
        raw = read_json(path)
        raw = families.find(raw, path).text(raw, path)
        stored = hf.stored_dtypes(source.path)
    else:
        raw, stored = families.llama.write(cfg, context), {}
    family = families.find(raw, Path("config.json"))
    kept = {entry.key: stored.get(entry.key, "F32") for entry in family.entries(cfg)}
    dtypes = {key: STORED[dtype] if dtype else kind if kind in NAMES else "F32" for key, kind in kept.items()}
    made = Layout(raw, family, cfg, dtypes)
    most = max(NAMES, key=lambda kind: sum(made.size(key) for key in dtypes if dtypes[key] == kind))
    raw = {k: v for k, v in raw.items() if k not in PRIVATE}
    if "sliding_window" not in family.defaults:  # no such model has one, but transformers' cache would forget what lies before it
        raw.pop("sliding_window", None)
    raw |= {"architectures": [family.architecture], "model_type": family.model_type, "dtype": NAMES[most], "torch_dtype": NAMES[most]}
    rotary, notes = _rope_fields(raw, family, cfg)
    return Layout(raw | rotary, family, cfg, dtypes, tuple(notes))


def stored_kinds(source: Source) -> set[str]:
    """The dtypes of a model's tensors, as safetensors names them; none for sources of another kind than a folder."""
    return set(hf.stored_dtypes(source.path).values()) if source.kind == "hf" else set()


def held(source: Source) -> str:
    """The dtype in which a model is read so that nothing of its stored values is lost (but of float64)."""
    kinds = stored_kinds(source)
    return NAMES[kinds.pop()] if len(kinds) == 1 and kinds <= set(NAMES) else "float32"


def roundoff(plan: Layout) -> float:
    """The most by which rounding to the coarsest dtype of a layout moves a value, relative to it."""
    return max(float(ml_dtypes.finfo(tensors.DTYPES[kind]).eps) for kind in plan.dtypes.values()) / 2


def licence(source: Source) -> str:
    """The licence as the model's own files, or the table of published models, name it; "" where none does."""
    if source.kind == "gguf":
        return str(gguf.metadata(source.path, "general.license", ""))
    shape = published.find(source.name)
    if source.kind != "hf" or not (source.path / "README.md").is_file():
        return shape.licence if shape else ""
    from huggingface_hub import ModelCard

    try:
        said = ModelCard.load(source.path / "README.md", ignore_metadata_errors=True).data
        return str(said.get("license_name") or said.get("license") or "")
    except Exception:  # a card that cannot be read says nothing
        return shape.licence if shape else ""


# -------------------------------------------------------------------------------------------------------------------- config.json
def _rope_fields(raw: Mapping[str, Any], family: families.Family, cfg: ModelConfig) -> tuple[dict[str, Any], list[str]]:
    """(the rotary fields in the spelling of transformers 4 and in that of 5, what 4 cannot be told).

    Transformers 4 has rope_theta (GPT-NeoX: rotary_emb_base), the share of the head in a field of the family and rope_scaling (null for
    "default"), 5 all of it in rope_parameters. Where a file has both, 5 reads rope_scaling first, so both say the same.
    """
    kinds = {kind.window > 0: kind.rope for kind in cfg.pattern if kind.rope}
    if not kinds:
        return {}, []
    if family.model_type in ("gemma3_text", "olmo3"):
        return _by_layer(raw, family, cfg)
    rope = next(iter(kinds.values()))
    given = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    theta, fraction = {"gpt_neox": ("rotary_emb_base", "rotary_pct"), "phi3": ("rope_theta", "partial_rotary_factor")}.get(
        family.model_type, ("rope_theta", ""))
    share = {"partial_rotary_factor": rope.fraction} if fraction else {}
    scaling, notes = _scaling(given, rope, family), []
    new = {**(scaling or {"rope_type": "default"}), "rope_theta": rope.theta, **share}
    old = {theta: rope.theta, **({fraction: rope.fraction} if fraction else {}), "rope_scaling": scaling}
    if family.model_type == "phi3" and scaling:  # where transformers 4 spells the type so, and takes exactly these three
        old["rope_scaling"] = _typed(scaling)
        context, name = raw["max_position_embeddings"], "original_max_position_embeddings"
        original = old[name] = raw.get(name, scaling.get(name, context))
        for name, said in ((name, original), ("factor", context / original)):
            if old["rope_scaling"].get(name) == said:  # as the two fields outside say
                del old["rope_scaling"][name]
        if more := sorted(set(old["rope_scaling"]) - {"type", "short_factor", "long_factor"}):
            notes.append(f"transformers 4 refuses this config: it takes no {', '.join(more)} in Phi-3's rope_scaling; take transformers 5")
    if family.model_type == "olmo2" and scaling:  # the same of the types linear and dynamic
        old["rope_scaling"] = _typed(scaling)
        if set(old["rope_scaling"]) != {"type", "factor"}:
            notes.append(f"transformers 4 refuses this config: it has no {scaling['rope_type']} scaling in OLMo 2; take transformers 5")
    return old | {"rope_parameters": new}, notes


def _by_layer(raw: Mapping[str, Any], family: families.Family, cfg: ModelConfig) -> tuple[dict[str, Any], list[str]]:
    """The same for families whose windowed layers have a rotary embedding of their own (Gemma 3, OLMo 3)."""
    nested, extra = raw.get("rope_parameters") or {}, raw.get("rope_scaling") or {}
    ropes = {name: next((k.rope for k in cfg.pattern if k.rope and (k.window > 0) == (name == "sliding_attention")), None)
             for name in BY_LAYER}
    made, scalings = {}, {}
    for name in BY_LAYER:
        given = {**(nested.get(name) or {}), **(extra if name == "full_attention" else {})}
        rope = ropes[name] or Rope(theta=float(given.get("rope_theta") or next(r.theta for r in ropes.values() if r)))
        scalings[name] = _scaling(given, rope, family)
        made[name] = {**(scalings[name] or {"rope_type": "default"}), "rope_theta": rope.theta}
    full, sliding = (made[name] for name in BY_LAYER)
    notes = []
    if ropes["sliding_attention"] and scalings["sliding_attention"]:
        notes.append("transformers 4 reads this config otherwise: it scales no rotary embedding of windowed layers; take transformers 5")
    old = {"rope_theta": full["rope_theta"], "rope_scaling": scalings["full_attention"]}
    if family.model_type == "gemma3_text":
        old["rope_local_base_freq"] = sliding["rope_theta"]
    elif all(ropes.values()) and full["rope_theta"] != sliding["rope_theta"]:
        notes.append("transformers 4 reads this config otherwise: it has one rope_theta for all layers; take transformers 5")
    return old | {"rope_parameters": made}, notes


def _scaling(given: Mapping[str, Any], rope: Rope, family: families.Family) -> dict[str, Any] | None:
    """rope_scaling as transformers 4 wants it: its type and parameters, and None for none."""
    kind = given.get("rope_type") or given.get("type") or "default"
    if kind == "default":
        return None
    kept = {k: v for k, v in given.items() if k not in ("type", "rope_type", "rope_theta", "partial_rotary_factor") and v is not None}
    if family.model_type == "phi3":  # which calls one thing by three names
        return {"rope_type": "longrope", **kept}
    if kind == "yarn":
        kept["factor"] = rope.factor
    if kind in ("yarn", "llama3"):
        kept["original_max_position_embeddings"] = rope.original
    return {"rope_type": kind, **kept}


def _typed(scaling: Mapping[str, Any]) -> dict[str, Any]:
    """rope_scaling as the first families with it had it in transformers 4."""
    return {"type" if k == "rope_type" else k: float(v) if k == "factor" else v for k, v in scaling.items()}


def generation_config(source: Source, raw: Mapping[str, Any], stop_ids: Sequence[int], eos_id: int | None) -> dict[str, Any]:
    """generation_config.json: what the source says of sampling, and every id that ends a text, EOS first.

    The source's is None or lacks fields where it has no such file; a model without tokenizer keeps what its config.json says.
    """
    path = source.path / "generation_config.json" if source.kind == "hf" else None
    kept = read_json(path) if path and path.is_file() else {k: raw[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id") if k in raw}
    kept = {k: v for k, v in kept.items() if k != "transformers_version"}
    ends = sorted(stop_ids, key=lambda i: (i != eos_id, i))
    return kept | ({"eos_token_id": ends[0] if len(ends) == 1 else ends} if ends else {})


# ------------------------------------------------------------------------------------------------------------------------ tensors
def cast(params: Any, plan: Layout) -> Any:
    """The parameters rounded to the dtypes they are stored in, all held in the widest of these; the tree that was given is not kept.

    Raises `UserError` naming the tensor whose values do not fit its dtype (float16 ends at 65,504) or are no numbers.
    """
    wide = widest(plan)
    tree = jax.tree.map(lambda x: x, params)  # new dicts, the same arrays
    for key, entry in plan.entries.items():
        stored = tensors.DTYPES[plan.dtypes[key]]
        for path in entry.paths:
            inner = functools.reduce(lambda node, name: node[name], path[:-1], tree)
            before = inner[path[-1]]
            inner[path[-1]] = made = before.astype(stored).astype(wide)
            if not bool(jax.numpy.isfinite(made).all()):
                largest = float(jax.numpy.abs(before.astype("float32")).max())
                if math.isfinite(largest):
                    raise UserError(f"{key} holds values up to {largest:,.0f}, which {NAMES[plan.dtypes[key]]} cannot: it ends at "
                                    f"{float(ml_dtypes.finfo(stored).max):,.0f}. Take --dtype=bfloat16 or float32.")
                raise UserError(f"{key} holds values that are no finite numbers: the weights are damaged, or the training diverged.")
    return tree


def widest(plan: Layout) -> str:
    """The one dtype that holds every tensor's values exactly."""
    kinds = set(plan.dtypes.values())
    return NAMES[kinds.pop()] if len(kinds) == 1 else "float32"


def stored_rows(entry: Entry, arrays: Sequence[np.ndarray], plan: Layout) -> Iterator[np.ndarray]:
    """The stored tensor that holds `arrays`, in slices of rows of about 16 MiB and in its dtype; together they are `table.join`."""
    stored, shapes = tensors.DTYPES[plan.dtypes[entry.key]], table.param_shapes(plan.cfg)
    step = max(1, BLOCK // max(1, arrays[0][..., :1].nbytes if table.transposed(entry) else arrays[0][:1].nbytes))
    if not table.transposed(entry) and arrays[0].ndim == 2:
        for row in range(0, len(arrays[0]), step):
            yield np.ascontiguousarray(np.concatenate([a[row:row + step] for a in arrays], axis=1).astype(stored, copy=False))
        return
    parts = sorted((first, number, ours, count) for number in range(len(arrays))
                   for ours, first, count in table.pieces(entry, number, shapes, plan.cfg.head_dim))
    for _, number, ours, count in parts:
        for at in range(ours, ours + count, step):
            yield np.ascontiguousarray(arrays[number][..., at:min(at + step, ours + count)].T.astype(stored, copy=False))


def write_tensors(folder: Path, params: Any, plan: Layout, shard_size: int) -> list[str]:
    """Write the weights: model.safetensors, or shards of up to `shard_size` bytes with an index. Returns the names of the weight files."""
    shards: list[list[str]] = [[]]
    for key in plan.dtypes:
        if shards[-1] and sum(map(plan.size, shards[-1])) + plan.size(key) > shard_size:
            shards.append([])
        shards[-1].append(key)
    total = len(shards)
    names = [f"model-{i + 1:05d}-of-{total:05d}.safetensors" for i in range(total)] if total > 1 else [tensors.SINGLE]
    for name, keys in zip(names, shards):
        tensors.write_file(folder / name, [(key, plan.dtypes[key], plan.shapes[key], _rows(params, key, plan)) for key in keys])
    if total > 1:
        index = {"metadata": {"total_size": plan.nbytes}, "weight_map": {key: name for name, keys in zip(names, shards) for key in keys}}
        atomic_write(folder / tensors.INDEX, json.dumps(index, indent=2) + "\n")
    return names


def check_tensors(folder: Path, params: Any, plan: Layout) -> int:
    """Compare every byte of the weights in `folder` with what they should be; return how many there are.

    Raises `UserError` naming a tensor that differs, is missing or should not be there.
    """
    checkpoint, compared = tensors.open_folder(folder), 0
    if problems := checkpoint.problems + sorted(f"{key} is missing or surplus" for key in set(checkpoint.entries) ^ set(plan.dtypes)):
        raise _unlike(folder, "; ".join(problems[:5]))
    for key in plan.dtypes:
        stored = checkpoint.entries[key]
        if (stored.dtype, stored.shape) != (plan.dtypes[key], plan.shapes[key]):
            raise _unlike(folder, f"{key} is {stored.dtype} {list(stored.shape)}")
        row = 0
        for block in _rows(params, key, plan):
            if checkpoint.read(key, slice(row, row + len(block))).tobytes() != block.tobytes():
                raise _unlike(folder, f"{key} has other bytes from row {row} on")
            row, compared = row + len(block), compared + block.nbytes
    return compared


def _rows(params: Any, key: str, plan: Layout) -> Iterator[np.ndarray]:
    """Lazily, so that a tensor is fetched from its devices when it is written."""
    entry = plan.entries[key]
    arrays = [np.asarray(functools.reduce(lambda node, name: node[name], path, params)) for path in entry.paths]
    yield from stored_rows(entry, arrays, plan)


def _unlike(folder: Path, what: str) -> UserError:
    return UserError(f"{folder} does not hold what was written ({what}): the disk or the file system damaged it. Try another place.")
