"""The tokenizers in GGUF files: equal to transformers', to the tokenizer that a file was made of, and to sentencepiece."""
from __future__ import annotations

import functools
import io
import json
import random
from pathlib import Path

import gguf as gguf_package
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, models, pre_tokenizers, trainers

from isara_jax.common import UserError
from isara_jax.data import gguf_tokenizer
from isara_jax.data import tokenizer as tokenizer_lib
from isara_jax.data.tokenizer import NoTokenizer
from isara_jax.models import gguf

ODD = ["", " ", "Hello world", "  two  spaces ", "tab\tand\nnewlines\n\n\n", "1234567 3.14", "naïve café", "日本語 です。", "ไทย", "👩‍👩‍👧 emoji",
       "don't I'll WE'RE", "a\u00a0b\u2003c", "x = y[0]; // code", "\u0000\u0007 control",
       "É vs E\u0301", "<notspecial>", "Q: a\nA:", "é" * 50]
HARD = ["▁", "▁▁a▁ b", "<s>", "</s> <unk> <0x41>", "\r\n", "\ufeffx", "\u200b", "𝔘𝔫𝔦", "ﬁ ﬂ", "\x7f\x1b[0m", "a" * 300, " " * 41,
        "\U0010ffff", "\ufffd"]
CORPUS = ["why is the sky blue", "hello there, run it and then some more", "the answer is here, the other answer is there",
          "def f(x): return x[0] // 2", "it's 1234 or 5.6 of them, IT'S", "naïve café 日本語", "aaaa  bbb   ccc aabbaa",
          "x = y;\r\n\r\n  z"] * 4


@pytest.fixture(scope="module")
def smollm2(smollm2_gguf):
    return gguf_tokenizer.from_gguf(functools.partial(gguf.metadata, smollm2_gguf), smollm2_gguf)


def read(values):
    """The tokenizer of these metadata, as models/gguf.py hands them over."""
    return gguf_tokenizer.from_gguf(lambda key, default=None: values.get(key, default), Path("m.gguf"))


def texts(alphabet, count, seed=0):
    draw = random.Random(seed)
    return ["".join(draw.choice(alphabet) for _ in range(draw.randrange(40))) for _ in range(count)]


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



# ------------------------------------------------------------------------------------------------------------------------- Llama 3
@pytest.fixture(scope="module")
def llama3():
    """A small tokenizer of Llama 3's kind, in transformers' own spelling of its pattern."""
    mapping = pytest.importorskip("transformers.integrations.gguf.gguf_tokenizer_mapping")
    backend = tokenizers.Tokenizer(models.BPE(ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(mapping.GGUF_PRE_TOKENIZER_SPLITS["llama-bpe"]), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    backend.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=340, show_progress=False,
                                                            initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return backend


def llama3_metadata(backend, **further):
    vocab, spec = backend.get_vocab(), json.loads(backend.to_str())
    names = [*sorted(vocab, key=vocab.get), "Ġunmerged", "<|begin_of_text|>", "<|eot_id|>", "<think>"]
    n = len(names)
    values = {"model": "gpt2", "pre": "llama-bpe", "tokens": names, "token_type": [1] * (n - 3) + [3, 3, 4],
              "merges": [" ".join(merge) for merge in spec["model"]["merges"]], "bos_token_id": n - 3, "eos_token_id": n - 2}
    return {f"tokenizer.ggml.{key}": value for key, value in (values | further).items()}


@pytest.mark.parametrize("pre", ["llama-bpe", "llama3", "llama-v3"])
def test_llama_3_equals_the_tokenizer_that_the_file_was_made_of(llama3, pre):
    ours = read(llama3_metadata(llama3, pre=pre))
    for text in [*ODD, *HARD, *CORPUS, *texts("ab 12\n\r\t.'sTé日", 500)]:
        assert ours.encode(text) == llama3.encode(text).ids, text
        assert ours.decode(ours.encode(text)) == text
    n = ours.vocab_size
    assert (ours.bos_id, ours.eos_id, ours.stop_ids) == (n - 3, n - 2, {n - 2})
    assert ours.adds_bos, "as llama.cpp does where no key says it"
    assert ours.encode("is unmerged", bos=True)[-1] == n - 4, "a word that is a token is that token, though no merge makes it"
    assert ours.encode_segments((("<|eot_id|>", True), ("<|eot_id|>", False)))[:2] == [n - 3, n - 2]
    assert n - 2 not in ours.encode("<|eot_id|>") and ours.encode("<think>") == [n - 1]
    assert ours.decode([n - 3, *ours.encode("sky"), n - 2]) == "sky"


def test_metadata_that_say_otherwise_are_believed(llama3):
    ours = read(llama3_metadata(llama3, add_bos_token=False, eot_token_id=5, eom_token_id=7))
    assert not ours.adds_bos and ours.stop_ids == {5, 7, ours.eos_id}


@pytest.mark.parametrize("pre", ["gpt-2", "default"])
def test_gpt_2(pre):
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=340, show_progress=False,
                                                            initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    ours = read(llama3_metadata(backend, pre=pre))
    for text in [*ODD, *HARD, *CORPUS]:
        assert ours.encode(text) == backend.encode(text).ids, text
    assert not ours.adds_bos


# ------------------------------------------------------------------------------------------------------------------- SentencePiece
LLAMA = dict(model_type="bpe", byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, split_digits=True,
             allow_whitespace_only_pieces=True, character_coverage=0.99)
TRAINED = {  # name -> (options of the trainer, metadata that follow from them)
    "llama": (LLAMA | {"vocab_size": 460}, {}),
    "without a space in front": (LLAMA | {"vocab_size": 460, "add_dummy_prefix": False}, {"add_space_prefix": False}),
    "without bytes": (LLAMA | {"vocab_size": 200, "byte_fallback": False}, {}),
    "across words": (LLAMA | {"vocab_size": 460, "split_by_whitespace": False}, {}),
}


@pytest.fixture(scope="module", params=TRAINED)
def pieces(request):
    """(sentencepiece's processor, the tokenizer of the same model in GGUF metadata)."""
    sentencepiece = pytest.importorskip("sentencepiece")
    options, further = TRAINED[request.param]
    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(CORPUS), model_writer=made, minloglevel=2, **options)
    model = sentencepiece.SentencePieceProcessor(model_proto=made.getvalue())
    return model, read(metadata_of(model, **further))


def metadata_of(model, **further):
    """As llama.cpp's converter writes them (convert_hf_to_gguf.py, _set_vocab_sentencepiece)."""
    ids = range(model.get_piece_size())
    kind = lambda i: 2 if model.is_unknown(i) else 3 if model.is_control(i) else 5 if model.is_unused(i) else 6 if model.is_byte(i) else 1
    values = {"model": "llama", "pre": "default", "tokens": [model.id_to_piece(i) for i in ids],
              "scores": [model.get_score(i) for i in ids], "token_type": [kind(i) for i in ids]}
    return {f"tokenizer.ggml.{key}": value for key, value in (values | further).items()}


def test_pieces_equal_sentencepiece(pieces):
    model, ours = pieces
    for text in [*ODD, *HARD, *CORPUS, *texts("ab ▁", 800), *texts(" \t\n▁abceé日👩\u200d<>s/0x41\0\r", 800)]:
        ids = model.encode(text)
        assert ours.encode(text) == ids, text
        if 0 not in ids:  # the unknown piece, which sentencepiece shows as ⁇
            assert ours.decode(ids) == model.decode(ids), text
    assert (ours.vocab_size, ours.bos_id, ours.eos_id, ours.adds_bos) == (model.get_piece_size(), 1, 2, True)
    assert ours.encode("<s> a", bos=True) == [1, *model.encode("<s> a")], "spelled by a person it is text"
    assert ours.encode_segments((("<s>", True), ("a", False)))[0] == 1


@settings(max_examples=150, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
def test_any_text_equals_sentencepiece(pieces, text):
    model, ours = pieces
    assert ours.encode(text) == model.encode(text)


def test_a_saved_one_reads_back_the_same(pieces, tmp_path_factory):
    ours, folder = pieces[1], tmp_path_factory.mktemp("saved")
    ours.save(folder)
    again = tokenizer_lib.from_folder(folder)
    for text in ODD + HARD:
        ids = ours.encode(text)
        assert again.encode(text) == ids and again.decode(ids) == ours.decode(ids), text


def test_through_a_file(tmp_path):
    """What a GGUF file stores comes back: floats as float32, types as integers."""
    sentencepiece, made = pytest.importorskip("sentencepiece"), io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(CORPUS), model_writer=made, minloglevel=2, vocab_size=460, **LLAMA)
    model, path = sentencepiece.SentencePieceProcessor(model_proto=made.getvalue()), tmp_path / "m.gguf"
    writer = gguf_package.GGUFWriter(path, "llama")
    values = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata_of(model).items()}
    writer.add_tokenizer_model(values["model"])
    writer.add_token_list(values["tokens"])
    writer.add_token_scores(values["scores"])
    writer.add_token_types(values["token_type"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    ours = gguf_tokenizer.from_gguf(functools.partial(gguf.metadata, path), path)
    assert all(ours.encode(text) == model.encode(text) for text in ODD + HARD)


# -------------------------------------------------------------------------------------------------------------------------- others
@pytest.mark.parametrize("values, message", [
    ({"model": "t5"}, "m.gguf: tokenizer 't5' with pre-tokenizer 'default' is not supported .* 'gpt2' with gpt-2, default, smollm, llama"),
    ({"model": "gpt2", "pre": "qwen2"}, "tokenizer 'gpt2' with pre-tokenizer 'qwen2' is not supported"),
    ({"model": "llama", "tokens": ["a", "b"], "token_type": [1], "scores": [0.0, 0.0]}, "2 tokens and 1 token types"),
    ({"model": "llama", "tokens": ["a", "b"], "token_type": [1, 1], "scores": [0.0]}, "2 tokens and 1 scores"),
])
def test_others_are_one_clear_error(values, message):
    with pytest.raises(UserError, match=message):
        read({f"tokenizer.ggml.{key}": value for key, value in values.items()})


@pytest.mark.parametrize("values", [{}, {"tokenizer.ggml.model": "no_vocab"}, {"tokenizer.ggml.model": "none"}])
def test_a_file_without_a_tokenizer_takes_token_ids_only(values):
    found = read(values | {"llama.vocab_size": 77, "tokenizer.ggml.eos_token_id": 3})
    assert isinstance(found, NoTokenizer) and (found.vocab_size, found.eos_id, found.stop_ids) == (77, 3, {3})
