"""Classifiers and score models: equal to transformers and to safe-rlhf's definition, and read as their folders say or refused."""
import dataclasses
import json
import shutil

import hf_models
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from isara_jax import scorer
from isara_jax.common import UserError
from isara_jax.models import heads, hf
from isara_jax.models.families import table

ROWS = [[5, 9, 11, 3, 64, 8, 7, 6, 5, 4, 33], [7], [21, 20, 19, 18], [95, 2], list(range(3, 60))]
FAMILIES = ["llama", "smollm3", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "opt", "opt_post", "gpt_neox", "gpt2",
            "phi3", "olmo2", "olmo3"]
LABELS = {0: "hate", 1: "violence", 2: "fraud"}


def make_classifier(family, folder, labels=LABELS, **fields):
    """A tiny random classifier of transformers, saved in `folder`: the body of `hf_models` under a random head."""
    import torch
    import transformers

    body = hf_models.make(family, folder, **{"tie_word_embeddings": True})
    config = body.config
    config.id2label, config.label2id = labels, {v: k for k, v in labels.items()}
    config.pad_token_id = 0
    for name, value in fields.items():
        setattr(config, name, value)
    name = hf_models.MODELS[family][0]
    architecture = f"{name}{'Text' if name == 'Gemma3' else ''}ForSequenceClassification"
    model = getattr(transformers, architecture)._from_config(config, attn_implementation="eager").eval()
    getattr(model, model.base_model_prefix).load_state_dict(getattr(body, body.base_model_prefix).state_dict())
    with torch.no_grad():
        model.score.weight.copy_(torch.randn(model.score.weight.shape, generator=torch.Generator().manual_seed(1)))
    shutil.rmtree(folder)
    model.save_pretrained(folder)
    return model


def of_torch(model, rows):
    """Logits of all rows in one batch, padded on the right with the padding token."""
    import torch

    width = max(map(len, rows))
    tokens = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    with torch.no_grad():
        return model(tokens, attention_mask=mask).logits.numpy()


def close(ours, theirs):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4 * np.abs(theirs).max())


@pytest.mark.parametrize("family", FAMILIES)
def test_classifiers_of_every_family_equal_transformers(family, tmp_path):
    model = make_classifier(family, tmp_path / "m")
    judge = scorer.load_scorer(str(tmp_path / "m"), "float32")
    assert judge.labels == ("hate", "violence", "fraud")
    close(judge.logits(ROWS), of_torch(model, ROWS))


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    folder = tmp_path_factory.mktemp("heads") / "classifier"
    return folder, make_classifier("llama", folder)


@pytest.fixture
def copy(classifier, tmp_path):
    return shutil.copytree(classifier[0], tmp_path / "copy")


def change(folder, drop=(), **fields):
    path = folder / "config.json"
    raw = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({k: v for k, v in raw.items() if k not in drop}))


def test_the_keys_of_body_and_head_come_back_bit_equal(classifier):
    folder, _ = classifier
    judge, stored = scorer.load_scorer(str(folder), "float32"), load_file(folder / "model.safetensors")
    made = {"score.weight": np.asarray(judge.params["head"]["kernel"]).T}
    for entry in hf.family(folder).entries(judge.cfg):
        leaves = []
        for path in entry.paths:
            leaf = judge.params
            for key in path:
                leaf = leaf[key]
            leaves.append(np.asarray(leaf))
        made[entry.key] = table.join(entry, leaves, judge.cfg)
    assert set(made) == set(stored) and all(np.array_equal(made[k], stored[k]) for k in stored)


# ---------------------------------------------------------------------------------------------------------------------- safe-rlhf
def make_score_model(folder, *, moments=None, mean=None, var=None, bias_key="score_bias", **fields):
    """A score model as safe-rlhf stores it: a body, score_head, and a normaliser's buffers (`moments`: mean and variance)."""
    import torch

    body = hf_models.make("llama", folder, tie_word_embeddings=True)
    n, bias, draw = fields.get("score_dim", 1), fields.pop("bias", True), torch.Generator().manual_seed(2)
    head = torch.nn.Linear(48, n, bias=bias)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw))
    stored = {k: v for k, v in load_file(folder / "model.safetensors").items() if k != "lm_head.weight"}
    stored |= {f"score_head.{k}": v.detach().numpy() for k, v in head.state_dict().items()}
    if moments:
        stored |= {"normalizer.mean": np.array(moments[0], np.float32), "normalizer.var": np.array(moments[1], np.float32),
                   "normalizer.count": np.array([7], np.int64)}
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    change(folder, architectures=["LlamaForScore"], **({bias_key: bias} if bias_key else {}), **fields,
           **({"mean": mean, "var": var} if mean is not None else {}))
    return body, head


def by_definition(body, head, rows, kind="identity", mean=0.0, var=1.0):
    """safe-rlhf: the head over all positions, of them the last attended one; (score - mean) / (deviation + 1e-8), or without the mean."""
    import torch

    made = []
    for row in rows:
        with torch.no_grad():
            scores = head(body.model(torch.tensor([row])).last_hidden_state)[0, -1].numpy()
        deviation = np.sqrt(np.asarray(var, np.float32)) + 1e-8
        made.append({"identity": scores, "affine": (scores - np.asarray(mean, np.float32)) / deviation, "scale": scores / deviation}[kind])
    return np.stack(made)


@pytest.mark.parametrize("bias, bias_key", [(True, "score_bias"), (False, "score_bias"), (True, "bias"), (False, "bias"), (True, ""),
                                            (False, "")])
def test_scores_equal_the_definition_of_safe_rlhf(tmp_path, bias, bias_key):
    """Older versions call the field bias, newer ones score_bias, with other defaults: where it is absent the tensors decide."""
    body, head = make_score_model(tmp_path / "m", bias=bias, bias_key=bias_key, score_type="cost")
    judge = scorer.load_scorer(str(tmp_path / "m"), "float32")
    close(judge.logits(ROWS), by_definition(body, head, ROWS))
    assert judge.labels == ("cost",) and judge.logits(ROWS).shape == (5, 1)
    assert np.array_equal(judge.probabilities(ROWS), judge.logits(ROWS))  # a score is no probability


@pytest.mark.parametrize("score_type, kind", [("reward", "affine"), ("cost", "scale"), ("critic", "identity")])
def test_scores_are_normalised_where_the_model_does_that(tmp_path, score_type, kind):
    """By the stored moments where there are some, whatever config.json says of them; by those of config.json else."""
    fields = {"score_dim": 2, "score_type": score_type, "normalizer_type": "ExponentialMovingAverage", "momentum": 0.9}
    body, head = make_score_model(tmp_path / "m", moments=([1.5, -2.0], [4.0, 0.25]), mean=[9.0, 9.0], var=[9.0, 9.0], do_normalize=True,
                                  **fields)
    judge = scorer.load_scorer(str(tmp_path / "m"), "float32")
    close(judge.logits(ROWS), by_definition(body, head, ROWS, kind, [1.5, -2.0], [4.0, 0.25]))
    assert judge.labels == (f"{score_type}_0", f"{score_type}_1")
    change(tmp_path / "m", do_normalize=False)
    close(scorer.load_scorer(str(tmp_path / "m"), "float32").logits(ROWS), by_definition(body, head, ROWS))
    body, head = make_score_model(tmp_path / "n", mean=[0.5, 0.25], var=[0.04, 4.0], do_normalize=True, **fields)
    close(scorer.load_scorer(str(tmp_path / "n"), "float32").logits(ROWS), by_definition(body, head, ROWS, kind, [0.5, 0.25], [0.04, 4.0]))


def test_moments_that_are_none_are_refused(tmp_path):
    make_score_model(tmp_path / "m", do_normalize=True)
    for fields, said in (({"mean": [1.0, 2.0]}, "mean=.1.0, 2.0."), ({"var": [-1.0]}, "var=.-1.0."), ({"var": "x"}, "var='x'"),
                         ({"score_dim": 0}, "score_dim=0"), ({"score_type": "prize"}, "score_type='prize' is not supported")):
        folder = shutil.copytree(tmp_path / "m", tmp_path / "copy", dirs_exist_ok=True)
        change(folder, **fields)
        with pytest.raises(UserError, match=said):
            scorer.load_scorer(str(folder))


# -------------------------------------------------------------------------------------------------------------------------- folders
@pytest.mark.parametrize("fields, link", [({"problem_type": "multi_label_classification"}, "sigmoid"), ({}, "softmax"),
                                          ({"problem_type": "single_label_classification"}, "softmax"),
                                          ({"problem_type": "regression"}, "none"), ({"id2label": {"0": "good"}}, "sigmoid")])
def test_the_link_is_that_of_transformers(copy, fields, link):
    change(copy, **fields)
    assert heads.read_head(copy).link == link


def test_labels_follow_their_numbers_and_default_to_those_of_transformers(copy):
    change(copy, id2label={str(i): f"category {i}" for i in reversed(range(14))})
    assert heads.read_head(copy).labels == tuple(f"category {i}" for i in range(14))
    change(copy, drop=["id2label", "label2id"])
    assert heads.read_head(copy).labels == ("LABEL_0", "LABEL_1")
    change(copy, num_labels=1)
    assert heads.read_head(copy).labels == ("LABEL_0",)


@pytest.mark.parametrize("fields, said", [({"id2label": {"0": "a", "2": "b"}}, "id2label="), ({"id2label": {}}, "id2label="),
                                          ({"id2label": ["a"]}, "id2label="), ({"num_labels": 5}, "num_labels=5, but id2label names 3"),
                                          ({"id2label": None, "num_labels": "x"}, "num_labels='x'"),
                                          ({"problem_type": "ranking"}, "problem_type='ranking' is not supported")])
def test_fields_that_contradict_each_other_are_refused(copy, fields, said):
    change(copy, **fields)
    with pytest.raises(UserError, match=said):
        scorer.load_scorer(str(copy))


def test_tensors_that_do_not_fit_are_listed(copy):
    file = copy / "model.safetensors"
    stored = load_file(file)
    stored["score.weight"] = stored["score.weight"][:2].copy()
    stored["score.bias"] = np.zeros(2, np.float32)
    del stored["model.norm.weight"]
    save_file(stored, file, {"format": "pt"})
    with pytest.raises(UserError) as raised:
        scorer.load_scorer(str(copy))
    for said in ("score.weight has shape [2, 48], config.json says [3, 48]", "score.bias is unexpected", "model.norm.weight is missing"):
        assert said in str(raised.value)


def test_a_language_model_has_no_head_and_a_classifier_is_no_language_model(tmp_path, classifier):
    hf_models.make("llama", tmp_path / "lm")
    with pytest.raises(UserError, match="has no head for scores.*LlamaForCausalLM.*isara_jax.load"):
        scorer.load_scorer(str(tmp_path / "lm"))
    heads.check_language_model(tmp_path / "lm")
    with pytest.raises(UserError, match=r"classifier \(score.weight\).*isara_jax.load_scorer"):
        heads.check_language_model(classifier[0])
    with pytest.raises(UserError, match="transformers format"):
        scorer.load_scorer("tiny-random")


def test_every_field_of_a_head_changes_what_comes_out(classifier):
    folder, _ = classifier
    judge = scorer.load_scorer(str(folder), "float32")
    params = judge.params | {"head": judge.params["head"] | {"bias": np.ones(3, np.float32)}}
    base = dataclasses.replace(judge, params=params)
    for fields in ({"bias": True}, {"shift": (0.1,) * 3, "divide": (1.0,) * 3}, {"shift": (0.0,) * 3, "divide": (2.0,) * 3}):
        other = dataclasses.replace(base, head=dataclasses.replace(base.head, **fields))
        assert np.abs(other.logits(ROWS) - base.logits(ROWS)).max() > 0.05, fields
    for link in ("sigmoid", "none"):
        other = dataclasses.replace(base, head=dataclasses.replace(base.head, link=link))
        assert np.abs(other.probabilities(ROWS) - base.probabilities(ROWS)).max() > 0.05
    assert dataclasses.replace(base, head=dataclasses.replace(base.head, labels=("a", "b", "c"))).labels == ("a", "b", "c")
