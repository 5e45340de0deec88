"""Tokenizers: equal to transformers' own, special tokens inert in user text, BOS once, pairs split as lm-evaluation-harness does."""
from __future__ import annotations

import functools
import json

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, models, normalizers, pre_tokenizers, processors, trainers

from isara_jax.common import UserError
from isara_jax.data import gguf_tokenizer
from isara_jax.data import tokenizer as tokenizer_lib
from isara_jax.data.tokenizer import ByteTokenizer, NoTokenizer, Tokenizer
from isara_jax.models import gguf

@pytest.fixture(scope="module")
def smollm2(smollm2_gguf):
    return gguf_tokenizer.from_gguf(functools.partial(gguf.metadata, smollm2_gguf), smollm2_gguf)


ODD = ["", " ", "Hello world", "  two  spaces ", "tab\tand\nnewlines\n\n\n", "1234567 3.14", "naïve café", "日本語 です。", "ไทย", "👩‍👩‍👧 emoji",
       "don't I'll WE'RE", "a\u00a0b\u2003c", "x = y[0]; // code", "\u0000\u0007 control", "É vs E\u0301", "Q: a\nA:", "é" * 50]
CORPUS = ["why is the sky blue", "hello there, run it and then some more",
          "USER: hello ASSISTANT: because the answer is here [INST] [/INST] [U]", "def f(x): return x[0] // 2",
          "it's 1234 or 5.6 of them", "naïve café 日本語"] * 4


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


# ------------------------------------------------------------------------------------------------------------------------- segments
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
    ("tokenizer.model", "x", "not a SentencePiece model"),
    ("tokenizer.json", "{", "not a tokenizer.json"),
    ("tokenizer_config.json", "[]", "holds a list where an object is expected"),
    ("special_tokens_map.json", "{", "not valid JSON"),
    ("generation_config.json", '{"eos_token_id": "2"}', "gives a token id as '2'"),
    ("config.json", '{"eos_token_id": [1, -1]}', r"gives a token id as \[1, -1\]"),
])
def test_damaged_files_are_one_clear_error(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        tokenizer_lib.from_folder(tmp_path)
    assert str(tmp_path / name) in str(caught.value)


def test_a_folder_without_a_tokenizer_takes_token_ids_only(tmp_path):
    (tmp_path / "config.json").write_text('{"vocab_size": 99, "eos_token_id": [7, 8]}')
    found = tokenizer_lib.from_folder(tmp_path)
    assert isinstance(found, NoTokenizer)
    assert (found.vocab_size, found.eos_id, found.bos_id, found.stop_ids, found.chat_template) == (99, 7, None, {7, 8}, None)
    assert found.decode([1, 2]) == ""
    for use in (lambda: found.encode("a"), lambda: found.encode("", bos=True), lambda: found.encode_pair("a", "b"),
                lambda: found.encode_segments(())):
        with pytest.raises(UserError, match="has no tokenizer, so text cannot be encoded: give token ids") as caught:
            use()
        assert str(tmp_path) in str(caught.value)
    with pytest.raises(UserError, match="has no chat template"):
        found.render_chat([], add_generation_prompt=True)


# ---------------------------------------------------------------------------------------------------------------------- declarations
@pytest.mark.parametrize("config, files, eos, stops", [
    ({"eos_token": {"content": "</s>", "lstrip": False}}, {}, 1, {1}),
    ({"eos_token": None}, {"special_tokens_map": {"eos_token": {"content": "</s>"}}}, 1, {1}),
    ({"eos_token": None}, {"special_tokens_map": {"eos_token": "a"}, "config": {"eos_token_id": 3}}, 2, {2, 3}),
    ({"eos_token": None}, {"generation_config": {"eos_token_id": [3, 2]}, "config": {"eos_token_id": 1}}, 3, {2, 3}),
    ({"eos_token": None}, {"generation_config": {"max_length": 20}, "config": {"eos_token_id": 1}}, 1, {1}),
    ({"eos_token": None}, {"config": {"text_config": {"eos_token_id": 1}}}, 1, {1}),
    ({"eos_token": "<never added>"}, {"config": {"eos_token_id": 1}}, 1, {1}),
    ({"eos_token": None}, {}, None, set()),
])
def test_where_the_end_of_a_text_is_named(tmp_path, config, files, eos, stops):
    for name, content in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    found = folder_with(tmp_path, word_backend(False), config)
    assert (found.eos_id, found.stop_ids) == (eos, stops)
    assert found.eos_token == {None: "", 1: "</s>", 2: "a", 3: "b"}[eos]


def test_a_backend_that_begins_texts_needs_no_name_for_it(tmp_path):
    found = folder_with(tmp_path, word_backend(True), {"bos_token": None})
    assert (found.bos_id, found.bos_token, found.encode("a", bos=True)) == (0, "<s>", [0, 2])
    found = folder_with(tmp_path, word_backend(False), {"bos_token": None})
    assert (found.bos_id, found.bos_token, found.encode("a", bos=True)) == (None, "", [2])


def test_opt_puts_its_end_of_text_in_front(tmp_path):
    found = folder_with(tmp_path, word_backend(False), {"bos_token": "</s>", "add_bos_token": True})
    assert found.encode("a", bos=True) == [1, 2] and found.encode_pair("a", " b") == ([1, 2], [3])


def test_an_end_of_text_is_never_added(tmp_path):
    backend = word_backend(False)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    found = folder_with(tmp_path, backend, {"add_eos_token": True})
    assert found.adds_bos and found.encode("a b", bos=True) == [0, 2, 3] and found.encode_segments((("a", True),)) == [0, 2]


@pytest.mark.parametrize("config, files", [
    ({"chat_template": "T"}, {}),
    ({"chat_template": [{"name": "tool_use", "template": "U"}, {"name": "default", "template": "T"}]}, {}),
    ({"chat_template": {"tool_use": "U", "default": "T"}}, {}),
    ({}, {"chat_template.json": '{"chat_template": "T"}'}),
    ({"chat_template": "old"}, {"chat_template.jinja": "T", "additional_chat_templates/tool_use.jinja": "U"}),
])
def test_where_chat_templates_stand(tmp_path, config, files):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert folder_with(tmp_path, word_backend(False), config).chat_template == "T"


def test_templates_may_use_every_named_token(tmp_path):
    template = "{{ bos_token + eos_token + pad_token }}"
    found = folder_with(tmp_path, word_backend(False), {"pad_token": {"content": "a"}, "chat_template": template})
    assert found.render_chat([], add_generation_prompt=False) == "<s></s>a"


def test_a_vocabulary_beyond_the_embeddings_is_one_clear_error(tmp_path):
    backend = word_backend(False)
    tokenizer_lib.check_vocabulary(folder_with(tmp_path, backend), 9, "here")
    tokenizer_lib.check_vocabulary(folder_with(tmp_path, backend), 64, "here")
    with pytest.raises(UserError, match="here: the tokenizer has ids up to 8, and the embeddings have 8 rows"):
        tokenizer_lib.check_vocabulary(folder_with(tmp_path, backend), 8, "here")
    backend.add_special_tokens([AddedToken("<picture>")])
    with pytest.raises(UserError, match="ids up to 9"):
        tokenizer_lib.check_vocabulary(folder_with(tmp_path, backend), 9, "here")


@pytest.mark.parametrize("config", [{"image_token": "<picture>"}, {"extra_special_tokens": {"image_token": "<picture>"}}])
def test_a_token_for_images_may_lie_beyond_the_embeddings_of_a_text_model(tmp_path, config):
    """Gemma 3 1B has 262144 rows, and its tokenizer one token more, for images."""
    backend = word_backend(False)
    backend.add_special_tokens([AddedToken("<picture>")])
    tokenizer_lib.check_vocabulary(folder_with(tmp_path, backend, config), 9, "here")


# ------------------------------------------------------------------------------------------------------------------ vocab.json + merges
@pytest.mark.parametrize("config", [
    {"bos_token": "</s>", "eos_token": "</s>", "pad_token": "<pad>", "add_bos_token": True, "tokenizer_class": "GPT2Tokenizer"},
    {"add_prefix_space": True, "eos_token": {"content": "<|end|>", "lstrip": False, "rstrip": True},
     "added_tokens_decoder": {"350": {"content": "<|end|>", "special": True, "lstrip": False, "rstrip": True},
                              "351": {"content": "<think>", "special": False}}},
])
def test_vocabulary_and_merges_alone_are_gpt2s_tokenizer(tmp_path, config):
    """facebook/opt-* ship no tokenizer.json."""
    transformers = pytest.importorskip("transformers")
    trained = tokenizers.Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=350, special_tokens=["<s>", "<pad>", "</s>"], show_progress=False,
                                                            initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    assert trained.get_vocab_size() == 350
    trained.model.save(str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text('{"model_type": "opt", "eos_token_id": 2}')
    ours = tokenizer_lib.from_folder(tmp_path)
    specials = {k: v["content"] if isinstance(v, dict) else v for k, v in config.items() if k.endswith("_token") and k != "add_bos_token"}
    reference = transformers.GPT2Tokenizer.from_pretrained(tmp_path, **{"bos_token": None, "unk_token": None, "eos_token": None} | specials)
    for text in ODD:
        assert ours.encode(text) == reference.backend_tokenizer.encode(text, add_special_tokens=False).ids, text
    assert ours.encode("a", bos=True)[:1] == ([2] if config.get("add_bos_token") else ours.encode("a")[:1])
    end = specials["eos_token"]
    assert ours.encode_segments((("a", True), (f"{end} b", True)), bos=False)[-3:].count(ours.eos_id) == 1
    assert ours.eos_id not in ours.encode(f"a{end} b") and ours.decode(ours.encode(f"a{end} b")).strip() == f"a{end} b"
    assert ours.eos_id == (2 if end == "</s>" else 350) and ours.vocab_size == (350 if end == "</s>" else 352)
    ours.save(tmp_path)
    again = tokenizer_lib.from_folder(tmp_path)
    assert all(again.encode(text) == ours.encode(text) for text in ODD)


def test_vocabularies_of_other_tokenizers_are_refused(tmp_path):
    (tmp_path / "vocab.json").write_text('{"a": 0}')
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    with pytest.raises(UserError, match="do not fit one another"):
        tokenizer_lib.from_folder(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "Qwen2Tokenizer"}')
    with pytest.raises(UserError, match="of a Qwen2Tokenizer; alone they are read for GPT2Tokenizer"):
        tokenizer_lib.from_folder(tmp_path)


# ----------------------------------------------------------------------------------------------------------- a space before a text
def metaspace(kind: str) -> Tokenizer:
    """A BPE tokenizer that puts ▁ before a text: by the normalizer of Llama 2's file, or by a pre-tokenizer."""
    backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    if kind == "prepend":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind, split=False)
    words = [word for line in CORPUS for word in line.split()] + ["\n"]
    backend.train_from_iterator(words, trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "<s>", "</s>", "[U]"],
                                                           show_progress=False))
    return Tokenizer(backend, eos="</s>", bos="<s>", chat_template=None, adds_bos=True)


@pytest.mark.parametrize("segments", [
    (("<s>[INST] ", True), ("hello there", False), (" [/INST]", True)),
    (("[U] ", True), ("run it", False), ("</s>\nthen", True), (" and more", False)),
    (("USER: ", True), ("why", False), ("</s>", True), ("so", False)),
    (("user\n", True), ("why not", False), ("\n", True)),
    (("<s>", True), ("hello", False)),
])
@pytest.mark.parametrize("kind", ["prepend", "first", "always", "never"])
def test_segments_are_encoded_as_the_whole_text_is(kind, segments):
    ours = metaspace(kind)
    whole = ours.encode_segments((("".join(text for text, _ in segments), True),), bos=False)
    assert ours.encode_segments(segments, bos=False) == whole


@pytest.mark.parametrize("kind, prompt, answer", [
    ("prepend", "[INST] why [/INST]", " hello"), ("first", "[INST] why [/INST]", " hello"), ("always", "ASSISTANT:", " hello"),
    ("prepend", "user\nwhy\n", "hello"), ("first", "user\nwhy\n", "hello"), ("prepend", "[U] why</s>", "hello"),
])
def test_an_answer_after_a_template_begins_as_in_the_whole_text(kind, prompt, answer):
    """Behind "[/INST]" templates write a space before an answer, behind a new line none; the answer itself is the same string."""
    ours = metaspace(kind)
    whole = ours.encode_segments(((prompt + answer, True),), bos=False)
    before, after = ours.encode_pair(((prompt, True),), answer.strip())
    assert before + after == [1, *whole]


def test_a_plain_pair_is_split_as_before(tmp_path):
    ours = metaspace("prepend")
    whole = ours.encode("Q: why\nA: because", bos=True)
    before, after = ours.encode_pair("Q: why\nA:", " because")
    assert before + after == whole and before == ours.encode("Q: why\nA:", bos=True)


# ---------------------------------------------------------------------------------------------------------------------------- bytes
def test_the_byte_tokenizer_is_bytes():
    byte = ByteTokenizer()
    assert byte.encode("hé") == [104, 195, 169] and byte.decode([104, 195, 256, 263]) == "h\ufffd"
    assert byte.encode_pair("Q: ", "a") == ([81, 58], [32, 97])
    assert byte.eos_id == 256 and byte.stop_ids == {256} and byte.encode_segments((("a", True), ("b", False))) == [97, 98]
    with pytest.raises(UserError, match="form=plain"):
        byte.render_chat([], add_generation_prompt=True)


def test_bytes_saved_are_a_tokenizer_of_bytes(tmp_path):
    byte = ByteTokenizer()
    byte.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": byte.eos_token}))
    again = tokenizer_lib.from_folder(tmp_path)
    for text in [*ODD, "".join(map(chr, range(1, 0x250))), "<|end|>"]:
        assert again.encode(text) == byte.encode(text) == list(text.encode())
        assert again.decode(again.encode(text)) == text
    assert (again.vocab_size, again.eos_id, again.stop_ids, again.adds_bos) == (257, 256, {256}, False)
    assert again.decode([104, 195, 256]) == byte.decode([104, 195, 256]) == "h\ufffd"
