"""Generated text to a candidate question or answer, with a verdict where there is none in it. Kept small: nothing is mended."""
from __future__ import annotations

import unicodedata
from dataclasses import dataclass

from isara_jax.data.prompts import Template, tidy


@dataclass(frozen=True)
class Parsed:
    """The candidate text and, where it is none, why.

    Attributes:
        verdict: None, "empty", "marker" (a line of it begins with a marker) or "control" (control characters, or bytes that are no text).
    """

    text: str
    verdict: str | None


def parse(text: str, template: Template) -> Parsed:
    """A question or an answer from the text the model wrote up to its stop string: stripped, inner blank lines closed, quotes kept."""
    text = tidy(text)
    if not text:
        return Parsed("", "empty")
    if template.form == "plain" and any(line.startswith((template.question_marker, template.answer_marker)) for line in text.split("\n")):
        return Parsed(text, "marker")
    if any(c == "\ufffd" or unicodedata.category(c) == "Cc" and c not in "\n\t" for c in text):
        return Parsed(text, "control")
    return Parsed(text, None)
