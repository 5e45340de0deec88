"""Sampling and fine-tuning on the tiny model of every family: the cache equals the full forward, and a fit lowers the loss."""
from __future__ import annotations

import jax
import numpy as np
import pytest
from families_peer import load, logits
from hf_models import FULL, MODELS, SLIDING, make

from isara_jax.config import Sft
from isara_jax.data.batching import Example
from isara_jax.decode.engine import EngineConfig
from isara_jax.decode.generate import Request, generate
from isara_jax.sft import loop
from isara_jax.sharding import make_mesh

pytest.importorskip("transformers")
LENGTHS = [1, 2, 7, 15, 16, 17, 33, 40]  # of prompts: below, at and beyond windows, chunks and blocks
NEW = 12
TWO = {"layer_types": [SLIDING, FULL], "no_rope_layers": [0, 1]}  # two layers, one of each kind, so that programs compile fast
NAMES = [name for name in MODELS if name not in ("opt_plain", "gpt_neox_serial")]
QUICK = ("smollm3", "gemma3_text", "opt_post", "gpt_neox")  # between them all that a layer may do; the others compile for minutes


@pytest.fixture(scope="module", params=[pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in NAMES])
def loaded(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    fields = MODELS[request.param][1]
    layers = {"n_layer" if "n_layer" in fields else "num_hidden_layers": 2}
    make(request.param, folder, **layers, **{key: value for key, value in TWO.items() if key in fields})
    return load(folder)


def test_cached_equals_full_for_ragged_prompts(loaded):
    """Greedy tokens of the engine are the best of the full forward over the same text, near-ties of 1e-4 aside."""
    cfg, params = loaded
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, cfg.vocab_size, length).tolist() for length in LENGTHS]
    made = generate(params, cfg, EngineConfig("float32", slots=8, chunk=16, key_block=32), make_mesh(devices=jax.devices()[:1]),
                    [Request(tuple(p), i, NEW, 0.0, 1.0) for i, p in enumerate(prompts)], seed=0, stop_ids=(), context=64,
                    decode=lambda ids: "")
    rows = np.zeros((len(prompts), 64), np.int64)
    for i, (prompt, completion) in enumerate(zip(prompts, made)):
        rows[i, :len(prompt) + NEW] = [*prompt, *completion.ids]
    full = logits(cfg, params, rows)
    for i, (prompt, completion) in enumerate(zip(prompts, made)):
        seen = full[i, len(prompt) - 1:len(prompt) + NEW - 1]
        chosen = seen[np.arange(NEW), completion.ids]
        np.testing.assert_allclose(chosen, seen.max(-1), rtol=0, atol=1e-4, err_msg=f"a prompt of {len(prompt)} tokens")
    assert len({tuple(c.ids) for c in made}) > len(prompts) // 2, "the model says the same whatever the prompt"


def test_a_fit_lowers_the_loss(loaded):
    cfg, params = loaded
    rng = np.random.default_rng(1)
    pairs = [Example(tuple(rng.integers(0, cfg.vocab_size, 20).tolist()), 8) for _ in range(4)]
    made = loop.fit(params, cfg, pairs, Sft(epochs=4, batch=4, lr=3e-3), mesh=make_mesh(devices=jax.devices()[:1]), dtype="float32", seed=0,
                    context=64)
    losses = [total / count for total, count in made.losses]
    assert len(losses) == 4 and losses[-1] < 0.9 * losses[0]
