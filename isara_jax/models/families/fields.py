"""Reading the fields of a config.json: absent ones get the family's default, and all that is wrong is said at once."""
from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Mapping

from isara_jax.common import UserError

# transformers' names of activations (ACT2FN) -> ours
ACTIVATIONS = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_python": "gelu", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh", "gelu_python_tanh": "gelu_tanh", "gelu_accurate": "gelu_tanh", "quick_gelu": "quick_gelu",
    "relu": "relu", "relu2": "relu2", "sigmoid": "sigmoid", "tanh": "tanh"}
# what no family supports -> the value it may have
NEVER = {"quantization_config": None, "is_encoder_decoder": False, "add_cross_attention": False, "pruned_heads": {},
         "per_layer_config": None, "use_bidirectional_attention": False}


class Fields:
    """One config.json being read. A bad field is noted and stands in with something harmless; `done` raises when any was noted."""

    def __init__(self, raw: Mapping[str, Any], path: Path, defaults: Mapping[str, Any]):
        self.raw, self.path, self.defaults = raw, path, defaults
        self.unsupported: list[str] = []
        self.wrong: list[str] = []
        for name, allowed in NEVER.items():
            self.only(name, allowed)

    def get(self, name: str) -> Any:
        return self.raw[name] if name in self.raw else self.defaults.get(name)

    def only(self, name: str, *allowed: Any) -> None:
        """Refuse every value of a field but these; absent and null are the first."""
        if name in self.raw and self.raw[name] is not None and not any(_same(self.raw[name], value) for value in allowed):
            self.unsupported.append(f"{name}={_short(self.raw[name])} (supported: {' or '.join(map(repr, allowed))})")

    def whole(self, name: str, *, null: bool = False, least: int = 1) -> int | None:
        """A whole number; None only where `null` allows it."""
        value = self.get(name)
        if value is None and null:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            return self._bad(name, value, f"a whole number of at least {least}", least)
        return value

    def real(self, name: str, *, null: bool = False, above: float = 0.0) -> float | None:
        """A finite number greater than `above`; None only where `null` allows it."""
        value = self.get(name)
        return None if value is None and null else self.number(name, value, above)

    def number(self, name: str, value: Any, above: float = 0.0) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value <= above:
            return self._bad(name, value, f"a number above {above:g}", above + 1.0)
        return float(value)

    def flag(self, name: str) -> bool:
        value = self.get(name)
        return value if isinstance(value, bool) else self._bad(name, value, "true or false", False)

    def activation(self, name: str) -> str:
        """Our name of the activation; unknown ones are refused with the list."""
        value = self.get(name)
        if not isinstance(value, str):
            return self._bad(name, value, "the name of an activation", "silu")
        if value not in ACTIVATIONS:
            self.unsupported.append(f"{name}={value!r} (supported: {', '.join(ACTIVATIONS)})")
        return ACTIVATIONS.get(value, "silu")

    def table(self, name: str) -> dict[str, Any]:
        """An object; empty where absent or null."""
        value = self.get(name)
        if value is not None and not isinstance(value, dict):
            return self._bad(name, value, "an object", {})
        return value or {}

    def numbers(self, name: str, value: Any, length: int) -> tuple[float, ...]:
        """A list of `length` positive numbers."""
        if not isinstance(value, list) or len(value) != length:
            return self._bad(name, value, f"a list of {length} numbers", (1.0,) * length)
        return tuple(self.number(f"{name}[{i}]", x) for i, x in enumerate(value))

    def windows(self, types: list[str], window: int | None) -> list[int]:
        """The window of each layer from `layer_types` where the file has it, else from `types`; "sliding_attention" has `window`."""
        given = self.get("layer_types")
        if given is not None and (not isinstance(given, list) or len(given) != len(types)):
            given = self._bad("layer_types", given, f"a list of {len(types)} names, one for each layer", None)
        types = types if given is None else given
        if unknown := sorted({str(t) for t in types} - {"full_attention", "sliding_attention"}):
            self.unsupported.append(f"layer_types with {', '.join(unknown)} (supported: full_attention, sliding_attention)")
        if window is None and "sliding_attention" in types:
            self.wrong.append("layer_types has sliding_attention, but there is no sliding_window")
        return [window or 0 if t == "sliding_attention" else 0 for t in types]

    def done(self) -> None:
        """Raise one `UserError` with all that was noted."""
        said = []
        if self.unsupported:
            said.append(f"{self.path}: not supported: {', '.join(self.unsupported)}. Running it anyway would give wrong logits.")
        if self.wrong:
            said.append(f"{self.path} has fields of a wrong kind: {'; '.join(self.wrong)}. Get the file again, or mend it.")
        if said:
            raise UserError("\n".join(said))

    def _bad(self, name: str, value: Any, needed: str, stand_in: Any) -> Any:
        self.wrong.append(f"{name}={_short(value)} where {needed} is needed")
        return stand_in


def _same(value: Any, allowed: Any) -> bool:
    return value == allowed and isinstance(value, bool) == isinstance(allowed, bool)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
