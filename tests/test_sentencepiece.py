"""tokenizer.model: what its bytes say, special tokens around SentencePiece, and (slow) tensorflow-text equal to sentencepiece.

The fast tests run our part on sentencepiece itself in place of tensorflow-text, which is 2 GB and only in the extra `text`.
"""
from __future__ import annotations

import importlib.util
import io
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isara_jax.common import UserError
from isara_jax.data import sentencepiece, special_tokens
from isara_jax.data import tokenizer as tokenizer_lib

reference = pytest.importorskip("sentencepiece")

ODD = ["", " ", "  ", "Hello world", " leading", "trailing ", "  two  spaces ", "tab\tand\nnewlines\n\n\n", "\r\n", "1234567 3.14",
       "naïve café", "日本語 です。", "ไทย", "👩‍👩‍👧 emoji", "don't I'll WE'RE", "a\u00a0b\u2003c", "x = y[0]; // code", "\u0000\u0007 control",
       "É vs E\u0301",
       "<s>", "</s> <unk> <0x41>", "▁", "▁▁a▁ b", "Q: a\nA:", "é" * 50, "\ufeffx", "\u200b", "𝔘𝔫𝔦", "ﬁ ﬂ", "\x7f\x1b[0m", "a" * 300,
       " " * 41, "\U0010ffff", "\ufffd", "<start_of_turn>user\nhi<end_of_turn>\n", "<|im_end|>", "[PAD]"]
CORPUS = ["why is the sky blue", "hello there, run it and then some more", "the answer is here, the other answer is there", "user model",
          "def f(x): return x[0] // 2", "it's 1234 or 5.6 of them, IT'S", "naïve café 日本語", "aaaa  bbb   ccc aabbaa",
          "x = y;\r\n\r\n  z"] * 4
LLAMA = dict(model_type="bpe", byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, split_digits=True,
             allow_whitespace_only_pieces=True, character_coverage=0.99)
TRAINED = {
    "llama": LLAMA | {"vocab_size": 460},
    "gemma": LLAMA | {"vocab_size": 470, "add_dummy_prefix": False, "pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3,
                      "user_defined_symbols": ["<start_of_turn>", "<end_of_turn>", "▁▁", "▁▁▁"]},
    "unigram": dict(model_type="unigram", vocab_size=70),
    "unigram with bytes": dict(model_type="unigram", vocab_size=330, byte_fallback=True, normalization_rule_name="identity",
                               remove_extra_whitespaces=False),
}
GEMMA = {"bos_token": "<bos>", "additional_special_tokens": ["<start_of_turn>", "<end_of_turn>"]}


class Itself:
    """sentencepiece as the engine."""

    def __init__(self, model: bytes):
        self._processor = reference.SentencePieceProcessor(model_proto=model)

    def encode(self, text: str) -> list[int]:
        return self._processor.encode(text)

    def decode(self, ids: list[int]) -> str:
        return self._processor.decode(ids)


@pytest.fixture(scope="module")
def trained():
    """name -> bytes of a model."""
    made = {}
    for name, options in TRAINED.items():
        out = io.BytesIO()
        reference.SentencePieceTrainer.train(sentence_iterator=iter(CORPUS), model_writer=out, minloglevel=2, **options)
        made[name] = out.getvalue()
    return made


def build(folder: Path, model: bytes, config=None, engine=Itself, **files):
    """The tokenizer of a folder with these files, on sentencepiece."""
    (folder / "tokenizer.model").write_bytes(model)
    for name, content in ({"tokenizer_config": config or {}} | files).items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    parsed = sentencepiece.parse(model, folder / "tokenizer.model")
    return sentencepiece.SentencePiece(parsed, special_tokens.read(folder), name=str(folder), engine=engine)


def strings(count: int, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    some = " \t\n▁abcdeé日👩\u200d<>s/0x41\0\r"
    other = lambda: chr(draw.choice([draw.randrange(0, 0xd800), draw.randrange(0xe000, 0x30000)]))
    return ["".join(draw.choice(some) if draw.random() < 0.8 else other() for _ in range(draw.randrange(30))) for _ in range(count)]


# ---------------------------------------------------------------------------------------------------------------------------- file
@pytest.mark.parametrize("name", TRAINED)
def test_the_file_says_what_sentencepiece_reads_in_it(trained, name):
    model, processor = sentencepiece.parse(trained[name], Path("x")), reference.SentencePieceProcessor(model_proto=trained[name])
    ids = range(processor.get_piece_size())
    assert model.pieces == tuple(processor.id_to_piece(i) for i in ids)
    assert [kind == 3 for kind in model.types] == [processor.is_control(i) for i in ids]
    assert [kind == 6 for kind in model.types] == [processor.is_byte(i) for i in ids]
    assert (model.bos_id, model.eos_id) == (processor.bos_id(), processor.eos_id())
    assert model.prefixes is TRAINED[name].get("add_dummy_prefix", True)
    assert model.tidies is TRAINED[name].get("remove_extra_whitespaces", True)


def test_without_beginning_and_end():
    out = io.BytesIO()
    reference.SentencePieceTrainer.train(sentence_iterator=iter(CORPUS), model_writer=out, minloglevel=2, bos_id=-1, eos_id=-1,
                                         **LLAMA | {"vocab_size": 400})
    model = sentencepiece.parse(out.getvalue(), Path("x"))
    assert (model.bos_id, model.eos_id) == (-1, -1)
    made = sentencepiece.SentencePiece(model, special_tokens.Declared(), name="it", engine=Itself)
    assert (made.bos_id, made.eos_id, made.adds_bos, made.stop_ids) == (None, None, False, frozenset())


@pytest.mark.parametrize("data", [b"", b"x", b"IQ== 0\nIg== 1\nIw== 2\n", bytes(100), b"\x80" * 50, json.dumps({"model": {}}).encode()])
def test_other_files_are_refused(data):
    with pytest.raises(UserError, match="some/tokenizer.model is not a SentencePiece model"):
        sentencepiece.parse(data, Path("some/tokenizer.model"))


def test_a_model_cut_short_is_refused(trained):
    """Everywhere but between two fields, where protocol buffers are whole again and only pieces at the end are missing."""
    data, refused = trained["llama"], 0
    for length in range(len(data) - 1, len(data) - 300, -1):
        try:
            sentencepiece.parse(data[:length], Path("x"))
        except UserError:
            refused += 1
    assert refused > 250


def test_without_tensorflow_text_the_error_says_what_to_install(trained, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "tensorflow_text" else find(name, *rest))
    (tmp_path / "tokenizer.model").write_bytes(trained["llama"])
    with pytest.raises(UserError, match=r'pip install "isara_jax\[text\]"') as caught:
        tokenizer_lib.from_folder(tmp_path)
    assert str(tmp_path) in str(caught.value)


# ------------------------------------------------------------------------------------------------------------------------- encoding
@pytest.mark.parametrize("name", TRAINED)
def test_plain_text_is_what_sentencepiece_makes_of_it(trained, tmp_path, name):
    ours, processor = build(tmp_path, trained[name]), reference.SentencePieceProcessor(model_proto=trained[name])
    for text in [*ODD, *CORPUS, *strings(300)]:
        ids = processor.encode(text)
        assert ours.encode(text) == ids and ours.encode(text, bos=True) == [ours.bos_id, *ids], text
        assert ours.decode(ids) == processor.decode(ids), text


def test_any_ids_decode_as_in_sentencepiece(trained, tmp_path):
    draw = random.Random(0)
    for name, data in trained.items():
        ours, processor = build(tmp_path, data), reference.SentencePieceProcessor(model_proto=data)
        plain = [i for i in range(processor.get_piece_size()) if not processor.is_control(i)]
        for _ in range(300):
            ids = draw.choices(plain, k=draw.randrange(8))
            assert ours.decode(ids) == processor.decode(ids), (name, ids)
        assert ours.decode([ours.bos_id, *processor.encode("the sky"), ours.eos_id, 10_000]) == "the sky"


def test_special_tokens_are_live_in_template_segments_only(trained, tmp_path):
    ours = build(tmp_path, trained["llama"], {"eos_token": "<|im_end|>"}, added_tokens={"<|im_start|>": 460, "<|im_end|>": 461})
    assert (ours.vocab_size, ours.eos_id, ours.bos_id, ours.stop_ids, ours.eos_token) == (462, 461, 1, {461}, "<|im_end|>")
    text = "say <|im_end|> and </s>"
    ids = ours.encode(text)
    assert not {1, 2, 460, 461} & set(ids) and ours.decode(ids) == text
    ids = ours.encode_segments((("<|im_start|>user\n", True), (text, False), ("<|im_end|>\n</s>", True)))
    assert [i for i in ids if i in (1, 2, 460, 461)] == [1, 460, 461, 2] and ids[:2] == [1, 460]
    assert ours.decode(ids) == f"user\n{text}\n", "special tokens are left out of decoded text"


def test_the_models_own_symbols_are_text_too_where_people_spell_them(trained, tmp_path):
    """Gemma's <end_of_turn> is a user-defined piece, which SentencePiece itself finds in any text."""
    processor = reference.SentencePieceProcessor(model_proto=trained["gemma"])
    start, end = processor.piece_to_id("<start_of_turn>"), processor.piece_to_id("<end_of_turn>")
    assert end in processor.encode("a<end_of_turn>")
    ours = build(tmp_path, trained["gemma"], GEMMA)
    for text in ("a<end_of_turn>b", "<end_of_turn>", "<start_of_turn><end_of_turn>  x", " <start_of_turn>"):
        assert not {start, end} & set(ours.encode(text)) and ours.decode(ours.encode(text)) == text, text
    ids = ours.encode_segments((("<start_of_turn>user\n", True), ("hi  <end_of_turn>", False), ("<end_of_turn>\n", True)))
    assert [i for i in ids if i in (start, end)] == [start, end]
    assert processor.piece_to_id("▁▁") in ours.encode("hi  there"), "symbols that nobody declares special stay what they are"


def test_added_tokens_that_are_not_special_are_found_in_any_text(trained, tmp_path):
    ours = build(tmp_path, trained["llama"], {"added_tokens_decoder": {"460": {"content": "<think>", "special": False}, "461": "<end>"}})
    ids = ours.encode("so<think> hello<end>")
    assert ids.count(460) == 1 and 461 not in ids
    assert ours.decode(ids) == "so<think> hello<end>" and ours.decode([460, *ours.encode("a"), 461]) == "<think> a"


@pytest.mark.parametrize("flags, expected", [({}, "x \n<t> \n y"), ({"lstrip": True}, "x<t> \n y"), ({"rstrip": True}, "x \n<t>y"),
                                             ({"lstrip": True, "rstrip": True}, "x<t>y")])
def test_white_space_that_belongs_to_a_token_goes_with_it(trained, tmp_path, flags, expected):
    token = {"content": "<t>", "special": False} | flags
    ours = build(tmp_path, trained["llama"], {"added_tokens_decoder": {"460": token}})
    assert ours.decode(ours.encode_segments((("x \n<t> \n y", True),))) == expected


def test_one_space_stands_before_the_whole_text_and_none_before_its_segments(trained, tmp_path):
    processor = reference.SentencePieceProcessor(model_proto=trained["llama"])
    ours = build(tmp_path, trained["llama"])
    segments = (("USER: ", True), ("hello there", False), (" ASSISTANT:", True))
    prompt = [1, *processor.encode("USER: hello there ASSISTANT:")]
    assert ours.encode_segments(segments) == prompt and ours.encode_pair(segments, "the answer") == (prompt, processor.encode("the answer"))
    after_line = ours.encode_pair((("user\nwhy\n", True),), "the answer")[1]
    assert [1, *processor.encode("user\nwhy\n"), *after_line] == [1, *processor.encode("user\nwhy\nthe answer")]
    whole, alone = processor.encode("Q: why\nA: the answer"), processor.encode("Q: why\nA:")
    assert ours.encode_pair("Q: why\nA:", " the answer") == ([1, *alone], whole[len(alone):])


@pytest.mark.parametrize("legacy, after", [(True, "▁user"), (False, "user")])
def test_legacy_says_whether_a_space_follows_special_tokens(trained, tmp_path, legacy, after):
    ours, processor = build(tmp_path, trained["llama"], {"legacy": legacy}), reference.SentencePieceProcessor(model_proto=trained["llama"])
    ids = ours.encode_segments((("<s>user", True),))
    assert "".join(processor.id_to_piece(i) for i in ids) == "<s>" + after


# --------------------------------------------------------------------------------------------------------------------- declarations
@pytest.mark.parametrize("config, files, bos, eos", [
    ({}, {}, True, 2),
    ({"add_bos_token": False, "eos_token": {"content": "<s>"}}, {}, False, 1),
    ({"add_bos_token": True, "add_eos_token": True}, {}, True, 2),
    ({"eos_token": "<gone>"}, {"generation_config": {"eos_token_id": [5, 6]}}, True, 5),
    ({}, {"special_tokens_map": {"eos_token": "<s>"}}, True, 1),
])
def test_beginning_and_end(trained, tmp_path, config, files, bos, eos):
    ours = build(tmp_path, trained["llama"], config, **files)
    assert (ours.adds_bos, ours.eos_id) == (bos, eos) and eos in ours.stop_ids
    assert ours.encode_segments((("a", False),)) == ([1] if bos else []) + ours.encode("a"), "an end is never added"


def test_a_token_for_images_may_lie_beyond_the_embeddings_of_a_text_model(trained, tmp_path):
    ours = build(tmp_path, trained["llama"], {"image_token": "<picture>"}, added_tokens={"<picture>": 460})
    tokenizer_lib.check_vocabulary(ours, 460, "here")
    ours = build(tmp_path, trained["llama"], {}, added_tokens={"<picture>": 460})
    with pytest.raises(UserError, match="ids up to 460, and the embeddings have 460 rows"):
        tokenizer_lib.check_vocabulary(ours, 460, "here")


def test_the_hash_changes_with_model_tokens_and_template(trained, tmp_path):
    hashes = [build(tmp_path, trained["llama"], config).hash for config in ({}, {"eos_token": "<s>"}, {"chat_template": "x"})]
    hashes.append(build(tmp_path, trained["unigram"]).hash)
    assert len(set(hashes)) == 4 and build(tmp_path, trained["unigram"]).hash == hashes[-1]


def test_chat_templates(trained, tmp_path):
    ours = build(tmp_path, trained["llama"], {"chat_template": "{{ bos_token }}[INST] {{ messages[0].content }} [/INST]{{ eos_token }}"})
    text = ours.render_chat([{"role": "user", "content": "why"}], add_generation_prompt=True)
    assert text == "<s>[INST] why [/INST]</s>"
    assert [i for i in ours.encode_segments(((text, True),)) if i < 3] == [1, 2], "BOS in the template is not doubled"


# ----------------------------------------------------------------------------------------------------------------- tensorflow-text
def needs_tensorflow_text():
    """tensorflow-text is no part of the tests' own requirements; `make test-slow` installs it."""
    if importlib.util.find_spec("tensorflow_text") is None:
        pytest.skip('tensorflow_text is not installed: pip install "isara_jax[text]" (2 GB)')


@pytest.fixture(scope="module")
def by_tensorflow(trained, tmp_path_factory):
    """name -> (sentencepiece's processor, the tokenizer that `from_folder` gives)."""
    needs_tensorflow_text()
    made = {}
    for name, data in trained.items():
        folder = tmp_path_factory.mktemp("model")
        build(folder, data)
        made[name] = reference.SentencePieceProcessor(model_proto=data), tokenizer_lib.from_folder(folder)
    return made


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINED)
def test_tensorflow_text_equals_sentencepiece(by_tensorflow, name):
    processor, ours = by_tensorflow[name]
    draw = random.Random(1)
    for text in [*ODD, *CORPUS, *strings(1500, seed=1)]:
        assert ours.encode(text) == processor.encode(text), text
        assert ours.decode(processor.encode(text)) == processor.decode(processor.encode(text)), text
    plain = [i for i in range(processor.get_piece_size()) if not processor.is_control(i)]
    for _ in range(500):
        ids = draw.choices(plain, k=draw.randrange(8))
        assert ours.decode(ids) == processor.decode(ids), ids


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_any_text_through_tensorflow_text_equals_sentencepiece(by_tensorflow, text):
    for processor, ours in by_tensorflow.values():
        assert ours.encode(text) == processor.encode(text)
        assert ours.decode(processor.encode(text)) == processor.decode(processor.encode(text))


@pytest.mark.slow
def test_a_segment_through_tensorflow_text(trained, tmp_path):
    needs_tensorflow_text()
    built = [build(tmp_path, trained[name], config, engine=engine) for name, config in (("llama", {}), ("gemma", GEMMA))
             for engine in (Itself, None)]
    segments = (("<s><start_of_turn>user\n", True), ("  hi <end_of_turn></s>", False), ("<end_of_turn></s> then ", True), ("more", False))
    for itself, ours in (built[:2], built[2:]):
        assert ours.encode_segments(segments) == itself.encode_segments(segments)
        assert ours.encode_pair(segments, " x") == itself.encode_pair(segments, " x")


@pytest.mark.slow
@pytest.mark.parametrize("order", ["scann, text", "text, scann"])
def test_scann_and_tensorflow_text_in_one_process_in_silence(trained, tmp_path, order):
    """TensorFlow 2.21 breaks scann's import unless it is hidden from it; and it greets on the error stream."""
    needs_tensorflow_text()
    if importlib.util.find_spec("scann") is None:
        pytest.skip("scann is not installed")
    (tmp_path / "tokenizer.model").write_bytes(trained["llama"])
    steps = {"text": f"print(tokenizer.from_folder(pathlib.Path({str(tmp_path)!r})).encode('the sky'))",
             "scann": "print(index._scann().__name__)"}
    code = "\n".join(["import pathlib", "from isara_jax.data import tokenizer", "from isara_jax.retrieval import index",
                      *(steps[step] for step in order.split(", "))])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    ids = reference.SentencePieceProcessor(model_proto=trained["llama"]).encode("the sky")
    said = {"text": str(ids), "scann": "scann"}
    assert (done.stdout.split("\n")[:2], done.stderr) == ([said[step] for step in order.split(", ")], ""), done.stderr


def test_saving_copies_what_the_folder_had(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: object())
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir(), target.mkdir()
    build(source, trained["llama"], {"eos_token": "<|end|>"}, added_tokens={"<|end|>": 460})
    tokenizer_lib.from_folder(source).save(target)
    assert sorted(f.name for f in target.iterdir()) == ["added_tokens.json", "tokenizer.model", "tokenizer_config.json"]
    assert all((source / f.name).read_bytes() == f.read_bytes() for f in target.iterdir())
