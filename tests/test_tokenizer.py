"""Tokenizers: equal to transformers' own, special tokens inert in user text, BOS once, pairs split as lm-evaluation-harness does."""
from __future__ import annotations

import functools
import json

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, models, pre_tokenizers, processors

from isara_jax.common import UserError
from isara_jax.data import tokenizer as tokenizer_lib
from isara_jax.data.tokenizer import ByteTokenizer, Tokenizer
from isara_jax.models import gguf

ODD = ["", " ", "Hello world", "  two  spaces ", "tab\tand\nnewlines\n\n\n", "1234567 3.14", "naïve café", "日本語 です。", "ไทย", "👩‍👩‍👧 emoji",
       "don't I'll WE'RE", "a\u00a0b\u2003c", "x = y[0]; // code", "\u0000\u0007 control",
       "É vs E\u0301", "<notspecial>", "Q: a\nA:", "é" * 50]


@pytest.fixture(scope="module")
def smollm2(smollm2_gguf):
    return tokenizer_lib.from_gguf(functools.partial(gguf.metadata, smollm2_gguf), smollm2_gguf)


def word_backend(bos_in_processor: bool) -> tokenizers.Tokenizer:
    words = {"<s>": 0, "</s>": 1, "a": 2, "b": 3, "<": 4, "s": 5, ">": 6, "/": 7, "<unk>": 8}
    backend = tokenizers.Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.Punctuation()])
    backend.add_special_tokens([AddedToken("<s>"), AddedToken("</s>")])
    if bos_in_processor:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return backend


def folder_with(path, backend, config=None, **files):
    backend.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": {"content": "</s>"}} | (config or {})))
    for name, value in files.items():
        (path / f"{name}.json").write_text(json.dumps(value))
    return tokenizer_lib.from_folder(path)


# ------------------------------------------------------------------------------------------------------------------------- SmolLM2
def test_the_tokenizer_of_a_gguf_equals_transformers(smollm2, smollm2_gguf):
    pytest.importorskip("torch")  # transformers reads GGUF only with it
    transformers = pytest.importorskip("transformers")
    reference = transformers.AutoTokenizer.from_pretrained(smollm2_gguf.parent, gguf_file=smollm2_gguf.name)
    for text in ODD:
        assert smollm2.encode(text) == reference.encode(text, add_special_tokens=False), text
        assert smollm2.decode(smollm2.encode(text)) == text
    assert (smollm2.eos_id, smollm2.bos_id) == (reference.eos_token_id, reference.bos_token_id) == (2, 1)
    assert not smollm2.adds_bos and smollm2.stop_ids == {2} and smollm2.vocab_size == 49152
    messages = [{"role": "system", "content": ""}, {"role": "user", "content": "Hi 12?"}, {"role": "assistant", "content": "Yes."},
                {"role": "user", "content": "\nWhy"}]
    for ask in (True, False):
        expected = reference.apply_chat_template(messages, add_generation_prompt=ask, tokenize=False)
        assert smollm2.render_chat(messages, add_generation_prompt=ask) == expected
        assert smollm2.encode_segments(((expected, True),)) == reference.encode(expected, add_special_tokens=False)


def test_a_saved_tokenizer_reads_back_the_same(smollm2, tmp_path):
    smollm2.save(tmp_path)
    again = tokenizer_lib.from_folder(tmp_path)
    assert all(again.encode(text) == smollm2.encode(text) for text in ODD)


def test_each_numeral_stands_alone(smollm2):
    """As the model's own tokenizer and llama.cpp (pre-tokenizer smollm) split; transformers' reading of GGUF files leaves this step out."""
    pieces = lambda text: [smollm2.decode([i]) for i in smollm2.encode(text)]
    assert pieces("in 2024 x ½²") == ["in", " ", "2", "0", "2", "4", " x", " ", "½", "²"]


@settings(max_examples=100, deadline=None)
@given(text=st.text(st.characters(max_codepoint=0x2FFF, exclude_categories=["Cc", "Cs"]), max_size=40))
def test_any_text_survives_encoding(smollm2, text):
    assert smollm2.decode(smollm2.encode(text)) == text


def test_special_tokens_in_user_text_are_plain_text(smollm2):
    text = "say <|im_end|> and <|endoftext|>"
    ids = smollm2.encode(text)
    assert not {0, 1, 2} & set(ids) and smollm2.decode(ids) == text
    segments = (("<|im_start|>user\n", True), (text, False), ("<|im_end|>\n", True))
    ids = smollm2.encode_segments(segments)
    assert [i for i in ids if i < 17] == [1, 2] and ids[0] == 1
    assert ids[3:-2] == smollm2.encode(text), "after <|im_start|> user \\n and before <|im_end|> \\n"


def test_pairs_are_split_as_lm_evaluation_harness_splits_them(smollm2):
    encode = smollm2.encode
    for prompt, continuation in (("Q: a\nA:", " Paris"), ("Q: a\nA: ", "Paris"), ("Q: a\n", "Paris"), ("un", "believable"), ("x", "")):
        spaces = len(prompt) - len(prompt.rstrip())  # its _encode_pair
        context, rest = prompt[:len(prompt) - spaces], prompt[len(prompt) - spaces:] + continuation
        whole = encode(context + rest)
        assert smollm2.encode_pair(prompt, continuation) == (encode(context), whole[len(encode(context)):])
    assert smollm2.encode_pair("Q: a\nA: ", "Paris") == smollm2.encode_pair("Q: a\nA:", " Paris")


def test_after_a_template_the_continuation_stands_apart(smollm2):
    prompt, answer = smollm2.encode_pair((("<|im_start|>assistant\n", True),), "Because <|im_end|>")
    assert prompt == smollm2.encode_segments((("<|im_start|>assistant\n", True),)) and prompt[0] == 1
    assert answer == smollm2.encode("Because <|im_end|>") and 2 not in answer


# ----------------------------------------------------------------------------------------------------------------------------- BOS
def test_bos_stands_exactly_once_and_only_where_the_tokenizer_adds_it(tmp_path):
    with_bos, without = (Tokenizer(word_backend(adds), eos="</s>", bos="<s>", chat_template=None) for adds in (True, False))
    assert (with_bos.encode("a b"), with_bos.encode("a b", bos=True)) == ([2, 3], [0, 2, 3])
    assert without.encode("a b", bos=True) == [2, 3]
    assert with_bos.encode_segments((("a", False), ("b", True))) == [0, 2, 3]
    assert with_bos.encode_segments((("a", False),), bos=False) == [2]
    assert with_bos.encode_segments((("<s>", True), ("a", False))) == [0, 2], "a template that spells BOS is not given a second one"
    assert with_bos.encode_pair("a", " b") == ([0, 2], [3])
    assert with_bos.encode("<s> a", bos=True) == [0, 4, 5, 6, 2], "BOS spelled by a user is text"


@pytest.mark.parametrize("config, expected", [({}, True), ({"add_bos_token": False}, False), ({"add_bos_token": True}, True)])
def test_a_config_that_says_whether_bos_is_added_is_believed(tmp_path, config, expected):
    assert folder_with(tmp_path, word_backend(True), config).adds_bos is expected


# -------------------------------------------------------------------------------------------------------------------------- folders
def test_stop_ids_join_eos_and_generation_config(tmp_path):
    assert folder_with(tmp_path, word_backend(False), generation_config={"eos_token_id": [3, 1]}).stop_ids == {1, 3}


def test_without_a_generation_config_the_models_config_says_what_stops(tmp_path):
    (tmp_path / "config.json").write_text('{"eos_token_id": 2}')
    assert folder_with(tmp_path, word_backend(False)).stop_ids == {1, 2}


def test_padding_and_truncation_of_the_file_are_off(tmp_path):
    backend = word_backend(False)
    backend.enable_padding(length=8)
    backend.enable_truncation(2)
    assert folder_with(tmp_path, backend).encode("a b a b") == [2, 3, 2, 3]


def test_the_hash_changes_with_vocabulary_and_template(tmp_path):
    make = lambda bos, template: Tokenizer(word_backend(bos), eos="</s>", bos="<s>", chat_template=template).hash
    assert make(True, None) == make(True, None)
    assert len({make(True, None), make(False, None), make(True, "{{ messages }}")}) == 3


def test_chat_templates_render_as_transformers_renders_them(tmp_path):
    transformers = pytest.importorskip("transformers")
    template = """{%- for m in messages %}
    {%- if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}
    {%- if loop.index > 9 %}{% break %}{% endif %}
{{ bos_token if loop.first }}[{{ m.role }}] {% generation %}{{ m.content | trim }}{% endgeneration %}{{ eos_token }} {{ m | tojson }}
{%- endfor %}
{%- if add_generation_prompt %}[assistant]{% endif %}"""
    backend = word_backend(False)
    ours = Tokenizer(backend, eos="</s>", bos="<s>", chat_template=template, name="the model")
    reference = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", chat_template=template)
    messages = [{"role": "user", "content": " a <é> 'x' "}, {"role": "assistant", "content": "b"}]
    for ask in (True, False):
        expected = reference.apply_chat_template(messages, add_generation_prompt=ask, tokenize=False)
        assert ours.render_chat(messages, add_generation_prompt=ask) == expected
    with pytest.raises(UserError, match="the model refuses these messages: no tools here"):
        ours.render_chat([{"role": "tool", "content": "x"}], add_generation_prompt=False)


def test_templates_cannot_reach_python():
    evil = Tokenizer(word_backend(False), eos=None, bos=None, chat_template="{{ messages.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(UserError, match="refuses"):
        evil.render_chat([], add_generation_prompt=False)


@pytest.mark.parametrize("name, content, message", [
    (None, None, "no tokenizer.json"),
    ("tokenizer.model", "x", "save the folder once with transformers"),
    ("tokenizer.json", "{", "not a tokenizer.json"),
])
def test_folders_without_a_readable_tokenizer_say_so(tmp_path, name, content, message):
    if name:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        tokenizer_lib.from_folder(tmp_path)


# ---------------------------------------------------------------------------------------------------------------------------- bytes
def test_the_byte_tokenizer_is_bytes():
    byte = ByteTokenizer()
    assert byte.encode("hé") == [104, 195, 169] and byte.decode([104, 195, 256, 263]) == "h\ufffd"
    assert byte.encode_pair("Q: ", "a") == ([81, 58], [32, 97])
    assert byte.eos_id == 256 and byte.stop_ids == {256} and byte.encode_segments((("a", True), ("b", False))) == [97, 98]
    with pytest.raises(UserError, match="form=plain"):
        byte.render_chat([], add_generation_prompt=True)
