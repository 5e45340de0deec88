"""The form a model was trained in as a Jinja chat template, which transformers, vLLM and llama.cpp render.

    plain   Q: {question}\\nA:     and after it " {answer}" with the EOS token, as in training; an earlier pair ends with a blank line
    chat    the model's own template behind an empty system turn, which is how it was trained (none where the template refuses one)

BOS is part of the text, once, where the tokenizer adds one: programs that render a chat add no special tokens of their own. What people
write is encoded together with the template there, so special tokens spelled in it are live; here they are plain text.
"""
from __future__ import annotations

import copy
from typing import Any, NamedTuple, Sequence

from isara_jax.common import UserError
from isara_jax.data.prompts import Segments, Template, show
from isara_jax.data.tokenizer import Splits

NO_SYSTEM = ("this model was trained on questions and answers alone and has no place for a system message: leave it out, or put its text "
             "into the question")
NO_ORDER = "the messages must be user and assistant in turn, beginning with user, and each content a text"
# tidy() of prompts.py: lines with nothing but white space vanish. Each statement drops the white space around it, so lines break freely.
TIDY = r"""{%- macro isara_tidy(text) -%}
{%- for line in text.strip().split('\n') if line.strip() -%}{{- line ~ ('' if loop.last else '\n') -}}{%- endfor -%}
{%- endmacro -%}
"""
EMPTY_SYSTEM = """{%- if not messages or messages[0]['role'] != 'system' -%}
{%- set messages = [{'role': 'system', 'content': ''}] + messages -%}
{%- endif -%}
"""
# Messages of text alone are tidied before the model's own template sees them; an answer that is last is what training supervised, as it is.
# Jinja drops the line break behind the last statement, as transformers sets it up, and nothing else: the template begins as it always did.
TIDY_ALL = TIDY + """{%- set isara = namespace(messages=[]) -%}
{%- for message in messages -%}
{%- set tidied = message['role'] == 'user' or message['role'] == 'assistant' and not loop.last -%}
{%- set tidied = tidied and message | length == 2 and message['content'] is string -%}
{%- set isara.messages = isara.messages + [{'role': message['role'], 'content': isara_tidy(message['content'])} if tidied else message] -%}
{%- endfor -%}
{%- set messages = isara.messages %}
"""
# Chats whose rendering is compared with our own: one turn and three, white space, several lines, letters outside ASCII.
PROBES: tuple[tuple[str, ...], ...] = (
    ("Why do cats purr?",), ("  Two lines:\n\n  the second?  ",), ("Größe – 大きさ 😀?",), ("1 + 1 =",),
    ("Why do cats purr?", "Nobody knows.\n\nPerhaps they are content.", "And lions?"), ("A?", "b", "C?", "d", "E?"))


def of_form(template: Template, tokenizer: Splits) -> tuple[str, list[str]]:
    """(the chat template that renders a run's form, what of it comes out differently: one line for each, usually none).

    A SentencePiece tokenizer may put its leading space elsewhere where BOS is part of the text; a space behind BOS is tried then.
    """
    if template.form == "chat":
        text = _chat(template, tokenizer)
        return text, differences(text, template, tokenizer)
    found = []
    for lead in ("", " ") if tokenizer.adds_bos else ("",):
        text = plain(template.question_marker, template.answer_marker, bos=tokenizer.adds_bos, lead=lead)
        found.append((text, differences(text, template, tokenizer, lead)))
    return min(found, key=lambda f: len(f[1]))


def plain(question_marker: str, answer_marker: str, *, bos: bool = False, lead: str = "") -> str:
    """The plain form as Jinja.

    Args:
        bos: the text begins with the BOS token.
        lead: what follows it.
    """
    question, answer = literal(question_marker + " "), literal(answer_marker)
    return TIDY + "\n".join((
        *(["{{- bos_token ~ " + literal(lead) + " -}}"] if bos else []),
        "{%- set turns = messages -%}",
        "{%- if messages and messages[0]['role'] == 'system' -%}",
        "{%- if messages[0]['content'] is not string or messages[0]['content'].strip() -%}",
        "{{- raise_exception(" + literal(NO_SYSTEM) + ") -}}",
        "{%- endif -%}",
        "{%- set turns = messages[1:] -%}",
        "{%- endif -%}",
        "{%- for message in turns -%}",
        "{%- if message['role'] != ('user' if loop.index0 % 2 == 0 else 'assistant') or message['content'] is not string -%}",
        "{{- raise_exception(" + literal(NO_ORDER) + ") -}}",
        "{%- endif -%}",
        "{%- if message['role'] == 'user' -%}",
        "{{- " + question + r" ~ isara_tidy(message['content']) ~ '\n' -}}",
        "{%- elif loop.last -%}",
        "{{- " + answer + " ~ ' ' ~ message['content'] ~ eos_token -}}",
        "{%- else -%}",
        "{{- " + answer + r" ~ ' ' ~ isara_tidy(message['content']) ~ '\n\n' -}}",
        "{%- endif -%}",
        "{%- endfor -%}",
        "{%- if add_generation_prompt and (not turns or turns[-1]['role'] == 'user') -%}",
        "{{- " + answer + " -}}",
        "{%- endif -%}"))


def literal(text: str) -> str:
    """A text as a Jinja string: what is not printable, quotes and backslashes are escaped."""
    plain = lambda c: c.isprintable() and c not in "\\'"
    return "'" + "".join(c if plain(c) else c.encode("unicode-escape").decode() if c not in "\\'" else "\\" + c for c in text) + "'"


def differences(text: str, template: Template, tokenizer: Splits, lead: str = "") -> list[str]:
    """What the chat template `text` renders otherwise than `template`, as text (but for `lead` behind BOS) or as token ids.

    One line for each of `PROBES` that differs.
    """
    exported = copy.copy(tokenizer)
    exported.chat_template = text
    found = []
    for turns in PROBES:
        try:
            segments = _conversation(template, turns)
        except UserError:  # the model's own template takes no such chat
            continue
        ids = tokenizer.encode_segments(segments)
        bos = tokenizer.bos_token if ids != tokenizer.encode_segments(segments, bos=False) else ""
        try:
            rendered = exported.render_chat(_messages(turns), add_generation_prompt=True)
        except UserError as e:
            found.append(str(e))
            continue
        if rendered != bos + lead + show(segments):
            found.append(f"{rendered!r} where training had {bos + show(segments)!r}")
        elif tokenizer.encode_segments(((rendered, True),), bos=False) != ids:
            found.append(f"{rendered!r} has other token ids than in training")
    return found


# ---------------------------------------------------------------------------------------------------------------------------------
def _chat(template: Template, tokenizer: Splits) -> str:
    """The model's own template, with what ours puts before it."""
    question = [{"role": "user", "content": "q"}]
    try:
        tokenizer.render_chat([{"role": "system", "content": ""}, *question], add_generation_prompt=True)
        before = EMPTY_SYSTEM
    except UserError:
        before = ""
    ids = tokenizer.encode_segments(template.training_segments("q"), bos=False)
    if tokenizer.adds_bos and ids[:1] != [tokenizer.bos_id]:
        before = "{{- bos_token -}}\n" + before
    return before + TIDY_ALL + tokenizer.chat_template


def _conversation(template: Template, turns: Sequence[str]) -> Segments:
    """The prompt of a chat's last question behind its earlier turns, as in `isara_jax.chat`."""
    pairs = tuple(_Turn(q, a) for q, a in zip(turns[:-1:2], turns[1::2]))
    straight = Template(template.form, template.question_marker, template.answer_marker, "nearest_first", template.render_chat)
    return straight.answer_segments(pairs, turns[-1])


class _Turn(NamedTuple):
    """A question and its answer before the last question."""

    question: str
    answer: str
    id: str = ""


def _messages(turns: Sequence[str]) -> list[dict[str, Any]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
