"""Data inside a page: JSON that no text in it can end or turn into markup."""
from __future__ import annotations

import json
from typing import Any

# "<" opens a tag or a comment, "&" a reference in XHTML; U+2028 and U+2029 end a line in old scripts.
_ESCAPES = {ord(c): f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029\x7f"}


def script_json(value: Any) -> str:
    """`value` as compact JSON for a <script type="application/json">. Lone surrogates become escapes, so that it can be encoded.

    Raises ValueError for numbers that are not finite.
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).translate(_ESCAPES)
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
