"""The trained form as Jinja: what transformers renders from it is, text for text and token for token, what training had."""
import functools

import pytest
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from isara_jax.common import UserError
from isara_jax.data import chat_templates, tokenizer_files
from isara_jax.data.chat_templates import literal, plain
from isara_jax.data.prompts import Template, show
from isara_jax.data.tokenizer import ByteTokenizer, Tokenizer

CHATML = ("{% for message in messages %}{% if loop.first and message['role'] != 'system' %}{{ '<s>You are helpful.\n' }}{% endif %}"
          "{{ '<' + message['role'] + '>' + message['content'] + '</s>\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}")


def user(*texts):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


@functools.lru_cache
def jinja(text):
    """What transformers compiles a chat template to."""
    from transformers.utils import chat_template_utils

    return chat_template_utils._compile_jinja_template(text)


def render(text, messages, add_generation_prompt=True, **special):
    named = {"bos_token": "<s>", "eos_token": "</s>"} | special
    return jinja(text).render(messages=messages, add_generation_prompt=add_generation_prompt, **named)


def pieces(prefix, *, bos=True, chat_template=None):
    """A SentencePiece-like tokenizer (a space is put before a text) in one of the ways in which there are."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, "▁": 3} | {c: i for i, c in enumerate("QA:abcdefghijklmnopqrstuvwxyz?.\n", 4)}
    vocab |= {"▁Q": 60, "▁a": 61, "Q:": 62}
    backend = tokenizers.Tokenizer(models.BPE(vocab, [("▁", "Q"), ("▁", "a"), ("Q", ":")], unk_token="<unk>"))
    if prefix == "prepend":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prefix)
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ("<unk>", "<s>", "</s>")])
    return Tokenizer(backend, eos="</s>", bos="<s>", adds_bos=bos, chat_template=chat_template)


# ----------------------------------------------------------------------------------------------------------------------- plain form
def test_a_question_opens_its_answer_and_an_answer_ends_with_eos():
    text = plain("Q:", "A:")
    assert render(text, user(" Why?\n")) == "Q: Why?\nA:"
    assert render(text, user("Why?"), add_generation_prompt=False) == "Q: Why?\n"
    assert render(text, user("Why?", "So."), add_generation_prompt=False) == "Q: Why?\nA: So.</s>"
    as_trained = "Q: Why?\nA:  as it is\n\n </s>"
    assert render(text, user("Why?", " as it is\n\n "), add_generation_prompt=False) == as_trained
    assert render(text, user("Why?", "a\n\nb", "How?")) == "Q: Why?\nA: a\nb\n\nQ: How?\nA:"
    assert render(plain("Q:", "A:", bos=True, lead=" "), user("Why?")) == "<s> Q: Why?\nA:"


def test_an_empty_system_message_is_nothing_and_another_is_refused():
    text = plain("Q:", "A:")
    assert render(text, [{"role": "system", "content": " \n"}, *user("Why?")]) == "Q: Why?\nA:"
    with pytest.raises(Exception, match="no place for a system message"):
        render(text, [{"role": "system", "content": "Be kind."}, *user("Why?")])


@pytest.mark.parametrize("messages", [
    user("a", "b", "c")[1:], [*user("a"), *user("b")], [*user("a"), {"role": "system", "content": ""}], [{"role": "tool", "content": "x"}],
    [{"role": "user", "content": [{"type": "text", "text": "x"}]}], [{"role": "user", "content": None}]])
def test_chats_that_were_never_trained_are_refused(messages):
    with pytest.raises(Exception, match="user and assistant in turn"):
        render(plain("Q:", "A:"), messages)


lines = st.text(st.sampled_from("ab \n\t\r\x0b\x0c\x1c\x85\u2028\u3000{%}'\"\\<é😀"), max_size=24)
markers = st.text(st.characters(codec="utf-8", exclude_characters="\n"), min_size=1, max_size=12).filter(lambda m: m.strip())


@settings(max_examples=300, deadline=None)
@given(markers, markers, lines, lines, lines)
def test_any_text_and_any_marker_come_out_as_ours(question_marker, answer_marker, first, answer, second):
    template = Template("plain", question_marker, answer_marker, "nearest_first")
    text = plain(question_marker, answer_marker)
    assert render(text, user(first)) == show(template.training_segments(first))
    exemplar = chat_templates._Turn(first, answer)
    assert render(text, user(first, answer, second)) == show(template.answer_segments([exemplar], second))
    whole = show(template.training_segments(first)) + template.continuation(answer) + "</s>"
    assert render(text, user(first, answer), add_generation_prompt=False) == whole


@given(st.text(max_size=20))
@settings(deadline=None)
def test_a_literal_is_its_text(text):
    quoted = literal(text)
    assert "\n" not in quoted and render("{{ " + quoted + " }}", []) == text


# ---------------------------------------------------------------------------------------------------------------------------- tokens
@pytest.mark.parametrize("prefix", ["prepend", "first", "always", "never"])
@pytest.mark.parametrize("bos", [True, False])
def test_a_space_that_the_tokenizer_puts_stands_where_training_had_it(prefix, bos):
    tokenizer = pieces(prefix, bos=bos)
    text, differ = chat_templates.of_form(Template("plain"), tokenizer)
    assert differ == []
    rendered = render(text, user("a?"))
    ids = tokenizer.encode_segments(Template("plain").training_segments("a?"))
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer._backend, bos_token="<s>", eos_token="</s>")
    assert fast(rendered, add_special_tokens=False)["input_ids"] == ids
    assert (ids[0] == 1) is bos and (rendered.startswith("<s>")) is bos


def test_what_cannot_be_rendered_alike_is_said():
    """The template shows the question twice, which ours refuses to build prompts with; here it renders other text than ours."""
    ours = Template("plain", "Q:", "A:")
    (first, *_) = chat_templates.differences(plain("Question:", "A:"), ours, ByteTokenizer())
    assert first == "'Question: Why do cats purr?\\nA:' where training had 'Q: Why do cats purr?\\nA:'"


# ------------------------------------------------------------------------------------------------------------------------- chat form
def chat_form(tokenizer):
    return Template("chat", render_chat=tokenizer.render_chat)


def test_a_chat_without_system_message_gets_the_empty_one_it_was_trained_with():
    tokenizer = pieces("never", bos=False, chat_template=CHATML)
    text, differ = chat_templates.of_form(chat_form(tokenizer), tokenizer)
    assert differ == []
    assert render(CHATML, user("Why?")).startswith("<s>You are helpful."), "the template alone has words of its own"
    assert render(text, user("Why?")) == "<system></s>\n<user>Why?</s>\n<assistant>"
    assert render(text, [{"role": "system", "content": "Be kind."}, *user("Why?")]) == "<system>Be kind.</s>\n<user>Why?</s>\n<assistant>"
    tidied = "<system></s>\n<user>a\nb</s>\n<assistant>c\n\nd</s>\n<assistant>"
    assert render(text, user(" a\n\nb ", "c\n\nd")) == tidied


def test_a_template_that_refuses_system_messages_gets_none():
    refusing = "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}[{{ m['content'] }}]{% endfor %}"
    tokenizer = pieces("never", bos=False, chat_template=refusing)
    text, differ = chat_templates.of_form(chat_form(tokenizer), tokenizer)
    assert differ == [] and render(text, user("Why?")) == "[Why?]"


@pytest.mark.parametrize("own, begins", [("{% for m in messages %}({{ m['content'] }}){% endfor %}", "<s>()(Why?)"),
                                         ("{{ bos_token }}{% for m in messages %}({{ m['content'] }}){% endfor %}", "<s>()(Why?)")])
def test_bos_stands_once_whether_the_template_spells_it_or_not(own, begins):
    tokenizer = pieces("never", chat_template=own)
    text, differ = chat_templates.of_form(chat_form(tokenizer), tokenizer)
    assert differ == [] and render(text, user("Why?")) == begins


@pytest.mark.parametrize("own", ["\n {{ messages[-1]['content'] }}", "  {% if true %}\n x {% endif %}{{ messages[-1]['content'] }}",
                                 "{#- a comment -#}\n\n[{{ messages[-1]['content'] }}]"])
def test_white_space_at_the_beginning_of_a_template_stays(own):
    tokenizer = pieces("never", bos=False, chat_template=own)
    text, _ = chat_templates.of_form(chat_form(tokenizer), tokenizer)
    assert render(text, user("q")) == render(own, user("q"))


def test_macros_and_tool_messages_of_the_models_own_template_still_work():
    own = ("{% macro say(m) %}<{{ m.role }}{% if m.tool_calls %}!{{ m.tool_calls | length }}{% endif %}>{{ m.content }}{% endmacro %}"
           "{% for m in messages %}{{ say(m) }}{% endfor %}")
    tokenizer = pieces("never", bos=False, chat_template=own)
    text, _ = chat_templates.of_form(chat_form(tokenizer), tokenizer)
    messages = [*user("a"), {"role": "assistant", "content": " x ", "tool_calls": [1, 2]}, {"role": "tool", "content": " 5\n\n6"}]
    assert render(text, messages) == "<system><user>a<assistant!2> x <tool> 5\n\n6"


# ----------------------------------------------------------------------------------------------------------------------------- files
def test_tokenizer_files_are_read_by_transformers_as_ours_are(tmp_path):
    """BOS is declared beside a backend that does not put it, as GGUF files do; the file gets it."""
    tokenizer = pieces("first")
    assert tokenizer._backend.encode("a").ids[0] != 1
    tokenizer_files.write(tmp_path, tokenizer, None, plain("Q:", "A:", bos=True), 77)
    fast = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert fast("a b")["input_ids"] == tokenizer.encode("a b", bos=True) and fast.model_max_length == 77
    assert (fast.eos_token, fast.bos_token) == ("</s>", "<s>")
    assert fast.apply_chat_template(user("Why?"), tokenize=False, add_generation_prompt=True) == "<s>Q: Why?\nA:"


def test_a_tokenizer_json_is_taken_as_it_is_but_for_an_eos_that_it_appends(tmp_path):
    (tmp_path / "from").mkdir(), (tmp_path / "to").mkdir()
    tokenizer = pieces("never", bos=False)
    tokenizer.save(tmp_path / "from")
    tokenizer_files.write(tmp_path / "to", tokenizer, tmp_path / "from", None, 10)
    assert (tmp_path / "to" / "tokenizer.json").read_bytes() == (tmp_path / "from" / "tokenizer.json").read_bytes()
    assert not (tmp_path / "to" / "chat_template.jinja").exists()
    backend = tokenizers.Tokenizer.from_file(str(tmp_path / "from" / "tokenizer.json"))
    backend.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    backend.save(str(tmp_path / "from" / "tokenizer.json"))
    tokenizer_files.write(tmp_path / "to", tokenizer, tmp_path / "from", None, 10)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "to")("a b")["input_ids"] == tokenizer.encode("a b")


def test_lists_of_special_tokens_are_written_as_both_versions_read_them(tmp_path):
    (tmp_path / "from").mkdir(), (tmp_path / "to").mkdir()
    tokenizer = pieces("never", bos=False)
    tokenizer.save(tmp_path / "from")
    (tmp_path / "from" / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "TokenizersBackend", "backend": "tokenizers", "extra_special_tokens": ["<unk>"],'
        ' "pad_token": {"content": "<unk>"}, "padding_side": "left", "add_bos_token": true, "eos_token": "</s>"}')
    tokenizer_files.write(tmp_path / "to", tokenizer, tmp_path / "from", None, 10)
    written = tokenizer_files.special_tokens.read(tmp_path / "to").config
    assert written == {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, "eos_token": "</s>",
                       "bos_token": "<s>", "pad_token": "<unk>", "padding_side": "left", "model_max_length": 10}


def test_a_template_that_fails_on_a_probe_is_a_difference_not_a_crash():
    tokenizer = pieces("never", bos=False, chat_template="{% if messages | length > 3 %}{{ raise_exception('too long') }}{% endif %}"
                       "{% for m in messages %}({{ m['content'] }}){% endfor %}")
    _, differ = chat_templates.of_form(Template("chat", render_chat=lambda messages, **how: "".join(f"({m['content']})" for m in messages)),
                                       tokenizer)
    assert len(differ) == 2 and "too long" in differ[0]
    with pytest.raises(UserError):
        tokenizer.render_chat(user("a", "b", "c", "d"), add_generation_prompt=True)
