"""`load_scorer`: texts and ids, probabilities, rows alone and in company, one device and eight."""
import subprocess
import sys

import numpy as np
import pytest
from test_heads import LABELS, ROWS, close, make_classifier, make_score_model, of_torch

from isara_jax import scorer
from isara_jax.common import UserError
from isara_jax.data.tokenizer import ByteTokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A multi-label classifier with learned positions, of as many as its context, and a vocabulary that holds all bytes."""
    folder = tmp_path_factory.mktemp("scorer") / "opt"
    make_classifier("opt", folder, problem_type="multi_label_classification", max_position_embeddings=128)
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A score model that reads texts as bytes."""
    import hf_models

    folder = tmp_path_factory.mktemp("scorer") / "llama"
    before = dict(hf_models.SHAPE)
    with pytest.MonkeyPatch.context() as patch:
        name, fields = hf_models.MODELS["llama"]
        patch.setitem(hf_models.MODELS, "llama", (name, fields | {"vocab_size": 264}))
        make_score_model(folder)
    assert hf_models.SHAPE == before
    ByteTokenizer().save(folder)
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|end|>"}')
    return folder


def test_probabilities_are_those_of_transformers(folder):
    import torch
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    judge = scorer.load_scorer(str(folder), "float32")
    assert judge.labels == tuple(LABELS.values()) and model.config.problem_type == "multi_label_classification"
    theirs = torch.tensor(of_torch(model, ROWS))
    close(judge.logits(ROWS), theirs.numpy())
    np.testing.assert_allclose(judge.probabilities(ROWS), torch.sigmoid(theirs), atol=1e-4)
    assert judge.logits(ROWS).dtype == judge.probabilities(ROWS).dtype == np.float32


def test_a_softmax_sums_to_one(tmp_path):
    make_classifier("qwen2", tmp_path / "m")
    judge = scorer.load_scorer(str(tmp_path / "m"), "float32")
    made, logits = judge.probabilities(ROWS), judge.logits(ROWS).astype(np.float64)
    np.testing.assert_allclose(made, np.exp(logits) / np.exp(logits).sum(1, keepdims=True), atol=1e-6)


def test_a_row_is_the_same_alone_and_in_company(folder):
    """Lengths that straddle the padded widths, up to the whole context; the padding token counts where it is part of a row."""
    judge = scorer.load_scorer(str(folder), "float32")
    rows = [[3 + i % 90 for i in range(n)] for n in (1, 2, 63, 64, 65, 127, 128)] + [[5, 0], [5]]
    together = judge.logits(rows)
    assert np.isfinite(together).all() and np.abs(together[-1] - together[-2]).max() > 1e-3
    for i, row in enumerate(rows):
        np.testing.assert_allclose(judge.logits([row])[0], together[i], rtol=1e-5, atol=1e-5)
    assert judge.logits([]).shape == (0, 3)


def test_texts_are_read_as_token_ids_and_end_where_asked(texts):
    judge = scorer.load_scorer(str(texts), "float32")
    text = "Why? <|end|>"
    assert np.array_equal(judge.logits([text]), judge.logits([list(text.encode())]))  # special tokens in a text are text
    assert np.array_equal(judge.logits([text], eos=True), judge.logits([[*text.encode(), 256]]))
    assert np.array_equal(judge.logits([[65, 66]], eos=True), judge.logits([[65, 66]]))  # ids are taken as they are


def test_rows_that_cannot_be_scored_are_refused(folder, texts):
    judge = scorer.load_scorer(str(folder), "float32")
    for rows, said in (([[5], []], "row 1 has 0 tokens; this model takes 1 to 128"), ([[5] * 129], "row 0 has 129 tokens"),
                       ([[5, 96]], "row 0 holds token id 96; ids go from 0 to 95"), ([[-1]], "token id -1"), (["Why?"], "has no tokenizer"),
                       ("Why?", "not one string")):
        with pytest.raises(UserError, match=said):
            judge.logits(rows)
    with pytest.raises(UserError, match="row 0 has 0 tokens"):
        scorer.load_scorer(str(texts), "float32").logits([""])


def test_bfloat16_holds_its_weights_so_and_stays_near(folder):
    wide, narrow = (scorer.load_scorer(str(folder), dtype) for dtype in ("float32", "bfloat16"))
    assert str(narrow.params["head"]["kernel"].dtype) == "bfloat16"
    theirs = wide.logits(ROWS)
    assert 0 < np.abs(narrow.logits(ROWS) - theirs).max() < 0.1 * np.abs(theirs).max()


def test_eight_devices_give_the_same(folder):
    """Rows over eight devices, and weights over two, four and two of them, as a fresh process with fake devices sees it."""
    code = f"""
import os
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
import numpy as np
from isara_jax import scorer, sharding
rows = {ROWS!r} * 3
alone = scorer.load_scorer({str(folder)!r}, "float32", sharding.make_mesh(1, 1, 1, devices=__import__("jax").devices()[:1])).logits(rows)
for mesh in (sharding.make_mesh(), sharding.make_mesh(2, 2, 2)):
    judge = scorer.load_scorer({str(folder)!r}, "float32", mesh)
    assert len(judge.params["layers"]["0"]["mlp"]["up"]["kernel"].sharding.device_set) == 8
    np.testing.assert_allclose(judge.logits(rows), alone, rtol=1e-5, atol=1e-5 * np.abs(alone).max())
print("same")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip().endswith("same"), done.stderr[-2000:]
