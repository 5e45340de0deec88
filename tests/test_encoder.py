"""The sentence encoder: equal to torch, a vector depends on its text alone, folders are read as they say or refused."""
import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from isara_jax.common import UserError
from isara_jax.models import encoder
from isara_jax.models.encoder import EncoderConfig
from isara_jax.retrieval.embed import TINY, Embedder

CFG = EncoderConfig(vocab_size=19, d_model=12, n_layers=2, n_heads=3, d_ff=20, max_positions=16, n_types=3, norm_eps=1e-3,
                    activation="gelu_tanh")
TOKENS = np.array([[1, 5, 9, 2, 0, 0], [1, 3, 3, 7, 11, 2]])
LENGTHS = np.array([4, 6])
ODD = ["", "a", " \n\t", "Which planet is the largest?", "Ünïcödé ﬁ ß 漢字かな ไทย 😀", "[CLS] [SEP] [MASK] x", "bell \x07 nul \x00 end",
       "word " * 40, "long " * 400, "don't -- 3.14%"]


def torch_bert(cfg, hidden_act="gelu_new", seed=0):
    """A random torch BERT of the same shape, larger than its default initialisation so that every part matters."""
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(seed)
    model = BertModel(BertConfig(vocab_size=cfg.vocab_size, hidden_size=cfg.d_model, num_hidden_layers=cfg.n_layers,
                                 num_attention_heads=cfg.n_heads, intermediate_size=cfg.d_ff, max_position_embeddings=cfg.max_positions,
                                 type_vocab_size=cfg.n_types, layer_norm_eps=cfg.norm_eps, hidden_act=hidden_act)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.4)
    return model


def torch_vectors(model, tokens, lengths, *modes):
    """What sentence-transformers' Pooling makes of torch's hidden states, text by text and without padding."""
    import torch

    rows = []
    for row, length in zip(tokens, lengths):
        with torch.no_grad():
            x = model(torch.tensor(row[None, :length])).last_hidden_state[0]
        weights = torch.arange(1, length + 1)[:, None]
        pooled = {"cls": x[0], "max": x.amax(0), "mean": x.mean(0), "mean_sqrt_len_tokens": x.sum(0) / length ** 0.5,
                  "weightedmean": (x * weights).sum(0) / weights.sum(), "lasttoken": x[-1]}
        rows.append(torch.cat([pooled[mode] for mode in modes]).numpy())
    return np.stack(rows)


def unit(vectors):
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def bert_folder(tmp_path_factory):
    """A folder as sentence-transformers writes it, with constants that are not the usual ones."""
    folder = tmp_path_factory.mktemp("bert")
    torch_bert(CFG).save_pretrained(folder)
    write_modules(folder, TRANSFORMER, POOLING)
    (folder / "1_Pooling").mkdir()
    write_pooling(folder, "pooling_mode_mean_tokens")
    return folder


TRANSFORMER = {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}
POOLING = {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}
NORMALIZE = {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"}


def write_modules(folder, *modules):
    (folder / "modules.json").write_text(json.dumps(modules))


def write_pooling(folder, *modes, **fields):
    fields = {"word_embedding_dimension": 12, "pooling_mode_cls_token": False, **dict.fromkeys(modes, True), **fields}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(fields))


@pytest.fixture
def copy(bert_folder, tmp_path):
    return shutil.copytree(bert_folder, tmp_path / "copy")


def change(path, **fields):
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize("key, mode", encoder.POOLINGS.items())
def test_a_folder_with_unusual_constants_equals_torch(copy, key, mode):
    write_pooling(copy, key)
    params, cfg = encoder.load_encoder(copy)
    assert cfg == dataclasses.replace(CFG, pooling=(mode,))
    ours, theirs = np.asarray(encoder.encode(params, cfg, TOKENS, LENGTHS)), torch_vectors(torch_bert(CFG), TOKENS, LENGTHS, mode)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    write_modules(copy, TRANSFORMER, POOLING, NORMALIZE)
    params, cfg = encoder.load_encoder(copy)
    assert cfg == dataclasses.replace(CFG, pooling=(mode,), normalise=True)
    np.testing.assert_allclose(encoder.encode(params, cfg, TOKENS, LENGTHS), unit(theirs), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("written, modes", [
    ({"pooling_mode": "cls", "include_prompt": True}, ("cls",)), ({"pooling_mode": ["mean", "cls"], "pooling_mode_max_tokens": True},
                                                                  ("mean", "cls")),
    ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True, "pooling_mode_max_tokens": True}, ("cls", "max", "mean")),
    ({"pooling_mode_mean_tokens": False}, ("mean",)), ({"include_prompt": False}, ("mean",))])
def test_old_and_new_pooling_configs(copy, written, modes):
    """Several modes are joined in the order in which sentence-transformers joins them, and no mode at all is the mean."""
    write_pooling(copy, **written)
    params, cfg = encoder.load_encoder(copy)
    assert cfg.pooling == modes and cfg.width == 12 * len(modes)
    ours, theirs = encoder.encode(params, cfg, TOKENS, LENGTHS), torch_vectors(torch_bert(CFG), TOKENS, LENGTHS, *modes)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("hidden_act", ["gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu", "quick_gelu"])
def test_activations_equal_torch(copy, hidden_act):
    change(copy / "config.json", hidden_act=hidden_act)
    params, cfg = encoder.load_encoder(copy)
    theirs = torch_vectors(torch_bert(CFG, hidden_act), TOKENS, LENGTHS, "mean")
    np.testing.assert_allclose(encoder.encode(params, cfg, TOKENS, LENGTHS), theirs, rtol=1e-4, atol=1e-5)


def test_fields_that_a_config_leaves_out_are_those_of_transformers(copy):
    from transformers import BertConfig

    path, theirs = copy / "config.json", BertConfig()
    path.write_text('{"model_type": "bert"}')
    cfg = encoder.encoder_config(copy)
    assert cfg == EncoderConfig(theirs.vocab_size, theirs.hidden_size, theirs.num_hidden_layers, theirs.num_attention_heads,
                                theirs.intermediate_size, theirs.max_position_embeddings, theirs.type_vocab_size, theirs.layer_norm_eps,
                                theirs.hidden_act)


def test_minilm_equals_torch_on_odd_texts(minilm_folder):
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(minilm_folder), AutoModel.from_pretrained(minilm_folder).eval()
    batch = tokenizer(ODD, padding=True, truncation=True, max_length=256, return_tensors="pt")
    with torch.no_grad():
        hidden, mask = model(**batch).last_hidden_state, batch["attention_mask"][..., None]
    theirs = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1).numpy()
    embedder = Embedder.from_source(str(minilm_folder))
    np.testing.assert_allclose(embedder.embed(ODD), theirs, rtol=0, atol=1e-5)
    assert embedder.tokens == batch["attention_mask"].sum() and embedder.dim == 384 and embedder.max_length == 256


def test_every_field_changes_the_vectors():
    params = jax.tree.map(lambda x: x * 20 + 0.1, encoder.init_params(CFG, 0))
    base = np.asarray(encoder.encode(params, CFG, TOKENS, LENGTHS))
    for field, value in {"n_heads": 4, "norm_eps": 0.5, "activation": "relu", "pooling": ("cls",), "normalise": True}.items():
        other = np.asarray(encoder.encode(params, dataclasses.replace(CFG, **{field: value}), TOKENS, LENGTHS))
        assert np.abs(other - base).max() > 1e-4, field
    shapes = lambda cfg: jax.tree.map(np.shape, jax.eval_shape(lambda: encoder.init_params(cfg, 0)))
    ours = shapes(CFG)
    for fields in ({"vocab_size": 20}, {"d_model": 15}, {"n_layers": 1}, {"d_ff": 21}, {"max_positions": 17}, {"n_types": 2}):
        assert shapes(dataclasses.replace(CFG, **fields)) != ours, fields


def test_what_stands_behind_a_text_changes_nothing():
    params = encoder.init_params(CFG, 0)
    other = np.where(np.arange(6) < LENGTHS[:, None], TOKENS, 13)
    assert np.array_equal(encoder.encode(params, CFG, TOKENS, LENGTHS), encoder.encode(params, CFG, other, LENGTHS))


@pytest.mark.parametrize("name", [TINY, "minilm"])
def test_a_vector_is_bit_equal_alone_and_in_any_company(name, request):
    embedder = Embedder.from_source(str(request.getfixturevalue("minilm_folder")) if name == "minilm" else name)
    texts = [*ODD[:3], *(f"What is {i}?" for i in range(70)), "Which planet is the largest, and how do we know?"]
    together = embedder.embed(texts)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-6)
    for i in (0, 3, 40, 73):
        assert np.array_equal(embedder.embed([texts[i]])[0], together[i])
    assert np.array_equal(embedder.embed(texts[::-1])[::-1], together)


def test_the_tiny_encoder_needs_no_files_and_tells_texts_apart():
    embedder = Embedder.from_source(TINY)
    vectors = embedder.embed(["What is rain?", "What is snow?", "x" * 500, ""])
    assert vectors.shape == (4, embedder.dim) and vectors.dtype == np.float32 and np.isfinite(vectors).all()
    assert len({v.tobytes() for v in vectors}) == 4 and embedder.tokens == 14 + 14 + 128 + 1
    assert embedder.embed([]).shape == (0, embedder.dim)
    assert embedder.hash == Embedder.from_source(TINY).hash


def test_half_precision_weights_become_float32(copy):
    file = copy / "model.safetensors"
    save_file({f"bert.{k}": v.astype(np.float16) for k, v in load_file(file).items()}, file)
    params, cfg = encoder.load_encoder(copy)
    assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    theirs = torch_vectors(torch_bert(CFG), TOKENS, LENGTHS, "mean")
    np.testing.assert_allclose(encoder.encode(params, cfg, TOKENS, LENGTHS), theirs, atol=2e-2)


def test_a_plain_bert_folder_is_pooled_by_the_mean(copy):
    (copy / "modules.json").unlink()
    assert encoder.encoder_config(copy) == CFG


@pytest.mark.parametrize("normalise", [False, True])
def test_search_is_by_cosine_whatever_the_folder_makes_of_its_vectors(minilm_folder, tmp_path, normalise):
    """A BGE-like folder: the first token, with and without a Normalize module, its types and pooling spelled as newer versions do."""
    folder, kind = shutil.copytree(minilm_folder, tmp_path / "bge"), "sentence_transformers.sentence_transformer.modules"
    modules = [TRANSFORMER | {"type": "sentence_transformers.base.modules.transformer.Transformer"},
               POOLING | {"type": f"{kind}.pooling.Pooling"}, NORMALIZE | {"type": f"{kind}.normalize.Normalize"}]
    write_modules(folder, *modules[:3 if normalise else 2])
    (folder / "1_Pooling" / "config.json").write_text('{"embedding_dimension": 384, "pooling_mode": "cls", "include_prompt": true}')
    embedder, (params, cfg) = Embedder.from_source(str(folder)), encoder.load_encoder(folder)
    assert cfg.pooling == ("cls",) and cfg.normalise == normalise
    ids = embedder._tokenize("Which planet is the largest?")
    plain = np.asarray(encoder.encode(params, cfg, np.array([ids]), np.array([len(ids)])))
    assert (abs(np.linalg.norm(plain) - 1) < 1e-6) == normalise
    np.testing.assert_allclose(embedder.embed(["Which planet is the largest?"]), unit(plain), atol=1e-6)


def test_a_default_prompt_stands_before_each_text(minilm_folder, tmp_path):
    folder = shutil.copytree(minilm_folder, tmp_path / "prompted")
    plain, rules = Embedder.from_source(str(folder)), folder / "config_sentence_transformers.json"
    rules.write_text('{"prompts": {"query": "query: ", "passage": "passage: "}, "default_prompt_name": "query"}')
    assert np.array_equal(Embedder.from_source(str(folder)).embed(["rain"]), plain.embed(["query: rain"]))
    rules.write_text('{"prompts": {"query": "query: "}, "default_prompt_name": null}')
    assert np.array_equal(Embedder.from_source(str(folder)).embed(["rain"]), plain.embed(["rain"]))
    rules.write_text('{"prompts": {"query": "query: "}, "default_prompt_name": "question"}')
    with pytest.raises(UserError, match="default_prompt_name='question'"):
        Embedder.from_source(str(folder))
    rules.write_text('{"prompts": {"query": "query: "}, "default_prompt_name": "query"}')
    change(folder / "1_Pooling" / "config.json", include_prompt=False)
    with pytest.raises(UserError, match="include_prompt"):
        Embedder.from_source(str(folder))


def test_the_longest_text_and_lower_casing_follow_the_folder(copy):
    assert encoder.text_rules(copy, CFG) == (16, False, "")
    (copy / "tokenizer_config.json").write_text('{"model_max_length": 11}')
    assert encoder.text_rules(copy, CFG) == (11, False, "")
    (copy / "tokenizer_config.json").write_text('{"model_max_length": 1000000000000000019884624838656}')
    assert encoder.text_rules(copy, CFG) == (16, False, "")
    rules = copy / "sentence_bert_config.json"
    rules.write_text('{"max_seq_length": 8, "do_lower_case": true}')
    assert encoder.text_rules(copy, CFG) == (8, True, "")
    rules.write_text('{"max_seq_length": 99}')
    with pytest.raises(UserError, match="max_seq_length=99"):
        encoder.text_rules(copy, CFG)


@pytest.mark.parametrize("fields, said", [({"model_type": "mpnet"}, "model_type 'mpnet'"), ({"hidden_act": "mish"}, "hidden_act='mish'"),
                                          ({"position_embedding_type": "relative_key"}, "relative_key"),
                                          ({"vocab_size": "many"}, "wrong kind"), ({"num_attention_heads": 5}, "n_heads=5"),
                                          ({"hidden_size": None}, "hidden_size=None")])
def test_configs_that_cannot_be_honoured_are_refused(copy, fields, said):
    change(copy / "config.json", **fields)
    with pytest.raises(UserError, match=said):
        encoder.load_encoder(copy)


def test_modules_that_cannot_be_honoured_are_refused(copy):
    for written, said in (({"pooling_mode_median": True}, "pooling_mode_median"), ({"pooling_mode": "median"}, "pooling_mode='median'"),
                          ({"pooling_mode": [["cls"]]}, "pooling_mode="), ({"pooling_mode": 1}, "pooling_mode=1")):
        write_pooling(copy, **written)
        with pytest.raises(UserError, match=said):
            encoder.load_encoder(copy)
    write_pooling(copy, "pooling_mode_mean_tokens")
    dense = {"path": "2_Dense", "type": "sentence_transformers.models.Dense"}
    for modules, said in (((TRANSFORMER, POOLING, dense), "module sentence_transformers.models.Dense"),
                          ((TRANSFORMER,), "lists Transformer"), ((), "no module"), ((1,), "the module"),
                          ((TRANSFORMER | {"type": "custom_st.Transformer"}, POOLING), "module custom_st.Transformer"),
                          ((TRANSFORMER, NORMALIZE, POOLING), "lists Transformer, Normalize, Pooling"),
                          ((TRANSFORMER, POOLING | {"path": "../elsewhere"}), "elsewhere"),
                          ((TRANSFORMER | {"path": "0_Transformer"}, POOLING), "0_Transformer")):
        write_modules(copy, *modules)
        with pytest.raises(UserError, match=said):
            encoder.load_encoder(copy)


def test_weights_that_do_not_fit_are_listed(copy):
    file = copy / "model.safetensors"
    tensors = load_file(file)
    tensors["surprise"] = tensors.pop("embeddings.LayerNorm.bias")
    tensors["encoder.layer.1.output.dense.weight"] = np.zeros((12, 12), np.float32)
    save_file(tensors, file)
    with pytest.raises(UserError) as raised:
        encoder.load_encoder(copy)
    for said in ("surprise is unexpected", "embeddings.LayerNorm.bias is missing",
                 "encoder.layer.1.output.dense.weight has shape [12, 12], config.json says [12, 20]"):
        assert said in str(raised.value)
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        encoder.load_encoder(copy)
    file.unlink()
    with pytest.raises(UserError, match="no .safetensors"):
        encoder.load_encoder(copy)


def test_a_folder_without_its_own_tokenizer_is_refused(copy, minilm_folder):
    with pytest.raises(UserError, match="needs its tokenizer.json"):
        Embedder.from_source(str(copy))
    shutil.copy(minilm_folder / "tokenizer.json", copy)
    with pytest.raises(UserError, match="30522 tokens, config.json 19"):
        Embedder.from_source(str(copy))


def test_the_hash_follows_pooling_and_length(minilm_folder, tmp_path):
    copy = shutil.copytree(minilm_folder, tmp_path / "copy")
    hashes = {Embedder.from_source(str(copy)).hash}
    change(copy / "1_Pooling" / "config.json", pooling_mode_mean_tokens=False, pooling_mode_cls_token=True)
    hashes.add(Embedder.from_source(str(copy)).hash)
    change(copy / "sentence_bert_config.json", max_seq_length=64)
    hashes.add(Embedder.from_source(str(copy)).hash)
    assert len(hashes) == 3
