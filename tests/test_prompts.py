"""Prompts of pairs alone: the plain form letter by letter, the chat form against real templates' habits."""
import functools
from types import SimpleNamespace

import jinja2
import pytest

from isara_jax.common import UserError
from isara_jax.data import gguf_tokenizer
from isara_jax.data.prompts import Template, fit, marker_warnings, show
from isara_jax.models import gguf

FISH = SimpleNamespace(id="1", question="Do fish sleep?", answer="Yes.\n\nMost of them rest.", row=2)
BATS = SimpleNamespace(id="0", question="Are bats blind?", answer="No, they see.", row=3)
PLAIN = Template("plain")

CHATML = ("{% for m in messages %}{% if loop.first and m['role'] != 'system' %}"
          "<|im_start|>system\nYou are a helpful assistant<|im_end|>\n{% endif %}"
          "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
REFUSES_SYSTEM = ("{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
                  "{% if m['role'] == 'user' %}[INST] {{ m['content'] | trim }} [/INST]"
                  "{% else %} {{ m['content'] | trim }}</s>{% endif %}{% endfor %}")
LAST_ONLY = "<|user|>{{ messages[-1]['content'] }}"


def chat(template):
    """A chat-form template over a jinja text, refusing as a tokenizer does."""
    def refuse(message):
        raise jinja2.TemplateError(message)

    def render(messages, *, add_generation_prompt):
        try:
            return jinja2.Template(template, keep_trailing_newline=True).render(
                messages=messages, add_generation_prompt=add_generation_prompt, raise_exception=refuse)
        except jinja2.TemplateError as e:
            raise UserError(str(e)) from None

    return Template("chat", render_chat=render)


# ---------------------------------------------------------------------------------------------------------------------- plain
def test_plain_prompts_letter_by_letter():
    assert PLAIN.question_segments([FISH, BATS]) == (
        ("Q: Are bats blind?\nA: No, they see.\n\nQ: Do fish sleep?\nA: Yes.\nMost of them rest.\n\nQ:", False),)
    assert PLAIN.answer_segments([BATS], " Why?\n\nTell me. ") == (
        ("Q: Are bats blind?\nA: No, they see.\n\nQ: Why?\nTell me.\nA:", False),)
    assert PLAIN.question_segments([]) == (("Q:", False),)
    assert PLAIN.training_segments("Why?") == PLAIN.answer_segments([], "Why?") == (("Q: Why?\nA:", False),)
    assert PLAIN.continuation("Because.") == " Because."


def test_plain_stops():
    assert PLAIN.stops("question") == ("\nA:", "\nQ:")
    assert PLAIN.stops("answer") == ("\nQ:",)
    assert Template("plain", "Frage:", "Antwort:").stops("question") == ("\nAntwort:", "\nFrage:")


@pytest.mark.parametrize("order, first", [("nearest_last", "Are bats"), ("nearest_first", "Do fish"), ("id", "Are bats")])
def test_order(order, first):
    shown = show(Template("plain", order=order).question_segments([FISH, BATS]))
    assert shown.startswith(f"Q: {first}")


def test_plain_prompts_hold_no_human_words_beside_the_pairs():
    assert PLAIN.human_words() == 0
    assert show(PLAIN.answer_segments([], "")) == "Q: \nA:"
    assert Template("plain", "Please answer this:", "A:").human_words() == 3


# ----------------------------------------------------------------------------------------------------------------------- chat
def test_chat_opens_a_user_turn_and_keeps_contents_apart():
    template = chat(CHATML)
    assert template.question_segments([BATS]) == (
        ("<|im_start|>system\n<|im_end|>\n<|im_start|>user\n", True), ("Are bats blind?", False),
        ("<|im_end|>\n<|im_start|>assistant\n", True), ("No, they see.", False), ("<|im_end|>\n<|im_start|>user\n", True))
    assert template.answer_segments([], "Why?") == (
        ("<|im_start|>system\n<|im_end|>\n<|im_start|>user\n", True), ("Why?", False), ("<|im_end|>\n<|im_start|>assistant\n", True))
    assert template.training_segments("Why?") == template.answer_segments([], "Why?")
    assert template.continuation("Because.") == "Because."
    assert template.stops("question") == template.stops("answer") == ()


def test_markers_in_a_pair_stay_text_in_chat():
    pair = SimpleNamespace(id="2", question="<|im_end|>\x020\x03", answer="[INST] {{ x }}", row=1)
    assert [s for s in chat(CHATML).question_segments([pair]) if not s[1]] == [("<|im_end|>\x020\x03", False), ("[INST] {{ x }}", False)]


def test_a_template_that_refuses_a_system_turn_gets_none():
    template = chat(REFUSES_SYSTEM)
    assert show(template.answer_segments([BATS], "Why?")) == "[INST] Are bats blind? [/INST] No, they see.</s>[INST] Why? [/INST]"
    assert show(template.question_segments([BATS])) == "[INST] Are bats blind? [/INST] No, they see.</s>[INST] "


def test_human_words_of_chat_templates():
    assert chat(CHATML).human_words() == chat(REFUSES_SYSTEM).human_words() == 0
    assert chat("Be kind, {{ 'please' }}. USER: " + CHATML).human_words() == 3


def test_a_template_that_loses_messages_is_refused():
    with pytest.raises(UserError, match="does not show every message.*--config.model.form=plain"):
        chat(LAST_ONLY).question_segments([BATS])


def test_hash_follows_what_the_template_makes():
    made = [PLAIN, Template("plain", "Frage:"), Template("plain", answer_marker="R:"), Template("plain", order="id"), chat(CHATML),
            chat(REFUSES_SYSTEM), chat(CHATML.replace("if add_generation_prompt", "if false"))]
    assert len({t.hash for t in made}) == len(made)
    assert chat(CHATML).hash == chat(CHATML).hash


# ---------------------------------------------------------------------------------------------------------------- fit and warn
def words(segments):
    return len(show(segments).split())


def test_fit_drops_the_farthest_first():
    def build(used):
        return PLAIN.answer_segments(used, "Why?")

    assert fit([FISH, BATS], build, words, 100) == (build([FISH, BATS]), [FISH, BATS])
    assert fit([FISH, BATS], build, words, words(build([FISH, BATS]))) == (build([FISH, BATS]), [FISH, BATS])
    assert fit([FISH, BATS], build, words, words(build([FISH, BATS])) - 1) == (build([FISH]), [FISH])
    assert fit([FISH, BATS], build, words, 3) == (build([]), [])
    with pytest.raises(UserError, match="has 3 tokens, of 2 allowed"):
        fit([FISH, BATS], build, words, 2)


def test_seeds_that_hold_a_marker_are_warned_of():
    bad = SimpleNamespace(question="What follows?", answer="One.\nQ: two?", row=7)
    worse = SimpleNamespace(question="What?\nA: this", answer="One.", row=9)
    inside = SimpleNamespace(question="Is vitamin A: good?", answer="Yes, FAQ: read.", row=10)
    warnings = marker_warnings([FISH, bad, worse, inside], PLAIN)
    assert len(warnings) == 1 and "2 seed(s)" in warnings[0] and "rows 7, 9)" in warnings[0]
    assert marker_warnings([FISH, inside], PLAIN) == marker_warnings([bad], chat(CHATML)) == []


def test_smollm2_with_its_own_template(smollm2_gguf):
    made = gguf_tokenizer.from_gguf(functools.partial(gguf.metadata, smollm2_gguf), smollm2_gguf)
    template = Template("chat", render_chat=made.render_chat)
    assert show(template.answer_segments([BATS], "Why?")) == (
        "<|im_start|>system\n<|im_end|>\n<|im_start|>user\nAre bats blind?<|im_end|>\n<|im_start|>assistant\nNo, they see.<|im_end|>\n"
        "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n")
    assert template.human_words() == 0
