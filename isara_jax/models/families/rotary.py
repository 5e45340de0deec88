"""Rotary embeddings in a config.json to `Rope`, as transformers 5 reads them (modeling_rope_utils.py), in its spelling and in that of 4.

Transformers 4 writes rope_theta and rope_scaling {rope_type or type, ...}, 5 writes rope_parameters with everything in it. Where a file
has both, rope_scaling counts, as there.
"""
from __future__ import annotations

import math
from typing import Any

from isara_jax.models.config import Rope
from isara_jax.models.families.fields import Fields

TYPES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
ODD = ("default", "linear", "dynamic", "llama3")  # with which transformers rotates an odd number of values, and one more
BY_LAYER = ("full_attention", "sliding_attention")


def read(f: Fields, head_dim: int, context: int, *, theta: str = "rope_theta", fraction: str = "",
         legacy: tuple[str, ...] = ()) -> tuple[Rope, int]:
    """(the one rope of all layers, longest text in tokens for which it is right).

    Args:
        head_dim: width of a head.
        context: max_position_embeddings.
        theta, fraction: names of the fields beside rope_parameters; an empty `fraction` is a family that rotates whole heads.
        legacy: names of types that this family means as "longrope".
    """
    name = "rope_scaling" if f.table("rope_scaling") else "rope_parameters"
    table = f.table(name)
    if any(key in table for key in BY_LAYER):
        f.unsupported.append(f"{name} by layer type (supported: one for all layers)")
    base = f.number(theta, f.get(theta)) if table.get("rope_theta") is None else f.number(f"{name}.rope_theta", table["rope_theta"])
    part = table.get("partial_rotary_factor")
    if part is None:
        part = f.get(fraction or "partial_rotary_factor")
    part = 1.0 if part is None and not fraction else f.number(fraction or "partial_rotary_factor", part)
    if not fraction and part != 1:
        f.unsupported.append(f"partial_rotary_factor={part!r} (supported: 1.0)")
        part = 1.0
    width = int(head_dim * part)
    odd_fits = (table.get("rope_type") or table.get("type") or "default") in ODD
    if not 0 < width + width % 2 <= head_dim or width % 2 and not odd_fits:
        f.unsupported.append(f"{fraction or 'head_dim'}: {width} of {head_dim} values of a head are rotated "
                             "(supported: an even number of them)")
        return Rope(), context
    original = f.get("original_max_position_embeddings")
    if original is None:
        original = table.get("original_max_position_embeddings")
    return scaled(f, table, name, base, part, width, context, context if original is None else original, bool(table.get("truncate", True)),
                  legacy)


def by_layer(f: Fields, head_dim: int, context: int, thetas: dict[str, float]) -> tuple[dict[str, Rope], int]:
    """(the rope of each layer type, longest text in tokens). `thetas` are those of types whose own table gives none.

    As transformers 5: rope_scaling adds to full_attention only, and `truncate` (of yarn) is read beside the layer types.
    """
    outer, extra = f.table("rope_parameters"), f.table("rope_scaling")
    if any(key in extra for key in BY_LAYER) or outer and not any(key in outer for key in BY_LAYER):
        f.unsupported.append(f"{'rope_scaling by' if extra else 'rope_parameters not by'} layer type (supported: rope_parameters of "
                             f"{' and '.join(BY_LAYER)}, or rope_scaling for all layers of full_attention)")
    ropes, longest = {}, context
    for kind in BY_LAYER:
        table = outer.get(kind) or {}
        if not isinstance(table, dict):
            f.wrong.append(f"rope_parameters.{kind}={table!r} where an object is needed")
            table = {}
        if kind == "full_attention":
            table = table | {k: v for k, v in extra.items() if k not in BY_LAYER}
        name = f"rope_parameters.{kind}"
        theta = thetas[kind] if table.get("rope_theta") is None else f.number(f"{name}.rope_theta", table["rope_theta"])
        if table.get("partial_rotary_factor") not in (None, 1, 1.0):
            f.unsupported.append(f"{name}.partial_rotary_factor={table['partial_rotary_factor']!r} (supported: 1.0)")
        original = table.get("original_max_position_embeddings")
        ropes[kind], limit = scaled(f, table, name, theta, 1.0, head_dim, context, context if original is None else original,
                                    bool(outer.get("truncate", True)), ())
        longest = min(longest, limit)
    return ropes, longest


def scaled(f: Fields, table: dict[str, Any], name: str, theta: float, fraction: float, width: int, context: int, original: Any,
           truncate: bool, legacy: tuple[str, ...]) -> tuple[Rope, int]:
    """One rope from its table. `original` is the context before scaling, `width` the rotated part of a head."""
    kind = table.get("rope_type") or table.get("type") or "default"
    kind = "longrope" if kind in legacy else kind
    number = lambda key, above=0.0: f.number(f"{name}.{key}", table.get(key), above)
    rope = {"theta": theta, "fraction": fraction}
    if kind in ("default", "dynamic"):  # dynamic changes nothing up to max_position_embeddings, and longer texts are not taken
        return Rope(**rope), context
    if kind == "linear":
        return Rope(**rope, scaling="linear", factor=number("factor")), context
    if kind not in TYPES:
        f.unsupported.append(f"{name} of type {kind!r} (supported: {', '.join(TYPES)})")
        return Rope(**rope), context
    original = int(f.number(f"{name}.original_max_position_embeddings", original))
    if kind == "llama3":
        low, high = number("low_freq_factor"), number("high_freq_factor")
        if high <= low:
            f.unsupported.append(f"{name}.high_freq_factor={high} (supported: above low_freq_factor={low})")
        return Rope(**rope, scaling="llama3", factor=number("factor"), original=original, low=low, high=high), context
    factor = context / original if table.get("factor") is None else number("factor")
    gain = None if table.get("attention_factor") is None else number("attention_factor")
    if kind == "longrope":
        if gain is None:
            gain = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
        factors = f.numbers(f"{name}.short_factor", table.get("short_factor"), width // 2)
        # beyond the original context the long factors count instead, for all positions; such texts are not taken
        return Rope(**rope, scaling="factors", factors=factors, gain=gain), min(context, original)
    if gain is None:
        m, all_dim = table.get("mscale"), table.get("mscale_all_dim")
        gain = _mscale(factor, number("mscale")) / _mscale(factor, number("mscale_all_dim")) if m and all_dim else _mscale(factor, 1.0)
    low = number("beta_slow") if table.get("beta_slow") else 1.0
    high = number("beta_fast") if table.get("beta_fast") else 32.0
    return Rope(**rope, scaling="yarn", factor=factor, original=original, gain=gain, round_ends=truncate, low=low, high=high), context


def _mscale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0
