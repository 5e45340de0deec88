"""What a generated text holds."""
import pytest

from isara_jax.data.parse import Parsed, parse
from isara_jax.data.prompts import Template

PLAIN, CHAT = Template("plain"), Template("chat")


@pytest.mark.parametrize("text, expected", [
    (" What is rain?", Parsed("What is rain?", None)),
    ("\n\nTwo.\n\n\n  \nlines \t\n", Parsed("Two.\nlines", None)),
    (' "Quoted?" ', Parsed('"Quoted?"', None)),
    ("a\tb", Parsed("a\tb", None)),
    ("Vitamin A: what is it?", Parsed("Vitamin A: what is it?", None)),
    ("Ein Tier 🐟 und 日本", Parsed("Ein Tier 🐟 und 日本", None)),
    ("", Parsed("", "empty")),
    (" \n\n ", Parsed("", "empty")),
    ("A: Because.", Parsed("A: Because.", "marker")),
    ("Q:", Parsed("Q:", "marker")),
    ("Because.\nA: Or not.", Parsed("Because.\nA: Or not.", "marker")),
    ("ring\x07", Parsed("ring\x07", "control")),
    ("nul\x00l", Parsed("nul\x00l", "control")),
    ("broken \ufffd", Parsed("broken \ufffd", "control")),
])
def test_parse(text, expected):
    assert parse(text, PLAIN) == expected


def test_chat_has_no_markers():
    assert parse("A: Because.", CHAT) == Parsed("A: Because.", None)
