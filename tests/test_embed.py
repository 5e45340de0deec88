"""The model's own pooled states as vectors: equal to torch, the same alone, in company and on eight devices."""
import subprocess
import sys

import hf_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isara_jax.common import UserError
from isara_jax.models import decoder, hf
from isara_jax.models.place import placer
from isara_jax.models.resolve import TINY_CONFIG
from isara_jax.retrieval.embed import OWN, Embedder
from isara_jax.sharding import make_mesh, param_shardings

TEXTS = ["rain", "", "What is rain?", "x" * 200, "Which planet is the largest, and how do we know?"]


def spell(text, bos=None):
    """Token ids from 3 to 90, one a character."""
    return ([] if bos is None else [bos]) + [3 + ord(c) % 88 for c in text]


def own(folder, bos=None, context=0):
    cfg, mesh = hf.model_config(folder), make_mesh()
    params = hf.load_params(folder, cfg, placer(param_shardings(decoder.abstract_params(cfg), mesh)))
    return Embedder.from_model(cfg, lambda text: spell(text, bos), bos, context or hf.context_length(folder), "a model", mesh, params)


def of_torch(model, rows, skip):
    """Unit means of the last, normed hidden states; the first `skip` tokens are read, but not pooled where others follow."""
    import torch

    made = []
    for row in rows:
        with torch.no_grad():
            states = getattr(model, model.base_model_prefix)(torch.tensor([row])).last_hidden_state[0]
        made.append(torch.nn.functional.normalize((states[skip:] if len(row) > skip else states).mean(0), dim=0).numpy())
    return np.stack(made)


@pytest.mark.parametrize("bos", [None, 1])
@pytest.mark.parametrize("family", ["llama", "gemma2", "opt_post", "gpt_neox"])
def test_pooled_states_equal_torch(family, bos, tmp_path):
    model = hf_models.make(family, tmp_path)
    embedder = own(tmp_path, bos, 100)
    rows = [(spell(text, bos) or [0])[:100] for text in TEXTS]  # cut to the context; a text of no tokens is that of id 0
    assert embedder.max_length == 100 and embedder.dim == hf.model_config(tmp_path).embed_dim
    np.testing.assert_allclose(embedder.embed(TEXTS), of_torch(model, rows, bos is not None), atol=1e-5)
    assert embedder.tokens == sum(map(len, rows))


def make_tiny(params=None, mesh=None, context=96, source="a model"):
    encode = lambda text: list(text.encode())
    return Embedder.from_model(TINY_CONFIG, encode, None, context, source, mesh or make_mesh(), params)


def test_a_vector_is_bit_equal_alone_and_in_any_company():
    embedder = make_tiny(decoder.init_params(TINY_CONFIG, 0))
    texts = [*TEXTS, *(f"What is {i}?" for i in range(70))]
    together = embedder.embed(texts)
    assert together.dtype == np.float32 and embedder.embed([]).shape == (0, 64)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-6)
    for i in (0, 1, 3, 4, 40, 74):
        assert np.array_equal(embedder.embed([texts[i]])[0], together[i])
    assert np.array_equal(embedder.embed(texts[::-1])[::-1], together)
    assert len({v.tobytes() for v in together}) == len(set(texts))


def test_weights_held_in_bfloat16_give_the_vectors_of_the_same_numbers_in_float32():
    """All arithmetic is float32, so that a vector hangs on the weights alone and not on how a run holds them."""
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), decoder.init_params(TINY_CONFIG, 0))
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), narrow)
    np.testing.assert_allclose(make_tiny(narrow).embed(TEXTS), make_tiny(wide).embed(TEXTS), atol=1e-6)


def test_weights_may_come_later_and_are_then_kept():
    params = decoder.init_params(TINY_CONFIG, 0)
    embedder = make_tiny()
    assert not embedder.ready
    with pytest.raises(RuntimeError, match="no weights yet"):
        embedder.embed(["rain"])
    embedder.bind(params)
    assert embedder.ready
    embedder.bind(decoder.init_params(TINY_CONFIG, 1))  # the model of a later iteration
    assert np.array_equal(embedder.embed(["rain"]), make_tiny(params).embed(["rain"]))


def test_the_hash_is_known_before_the_weights_and_names_model_and_context():
    assert make_tiny().hash == make_tiny(decoder.init_params(TINY_CONFIG, 0)).hash
    assert len({make_tiny().hash, make_tiny(context=95).hash, make_tiny(source="another").hash}) == 3


def test_own_is_no_encoder_that_can_be_fetched():
    with pytest.raises(UserError, match='"own" is the model itself'):
        Embedder.from_source(OWN)


def test_eight_devices_give_the_bits_of_one():
    """Each of them runs the program that one alone would, on its own rows; weights that lie apart are another program."""
    code = """
import os
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
import jax, numpy as np
from test_embed import TEXTS, TINY_CONFIG, decoder, make_mesh, make_tiny, param_shardings
params, texts = decoder.init_params(TINY_CONFIG, 0), [*TEXTS, *(f"What is {i}?" for i in range(70))]
alone = make_tiny(params, make_mesh(1, 1, 1, devices=jax.devices()[:1])).embed(texts)
for mesh in (make_mesh(), make_mesh(2, 4, 1)):
    spread = jax.device_put(params, param_shardings(params, mesh))
    made = make_tiny(spread, mesh).embed(texts)
    print(np.array_equal(made, alone), np.abs(made - alone).max() < 1e-6)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=__file__.rsplit("/", 1)[0])
    (same, near), (_, near_apart) = (line.split() for line in done.stdout.splitlines())
    assert same == near == near_apart == "True", done.stdout + done.stderr[-2000:]
