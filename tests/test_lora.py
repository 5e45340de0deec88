"""Low-rank adapters: made, trained beside frozen weights, merged, and what a run makes of them. Their files: test_adapter.py."""
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import isara_jax
from isara_jax import train
from isara_jax.checkpoint import Checkpoints
from isara_jax.common import UserError
from isara_jax.config import ConfigError, Lora, Sft, from_dict
from isara_jax.data.batching import Example, collate
from isara_jax.models import decoder, lora
from isara_jax.models.adapter import LowRank
from isara_jax.models.config import ModelConfig
from isara_jax.sft import loop
from isara_jax.sft.step import Frozen, abstract_state, train_step
from tests.adapters import CFG, LLAMA, MESH, examples, fit

SPEC = Lora(rank=3, alpha=12.0, dropout=0.2)
SFT = Sft(epochs=2, batch=4, lr=1e-2, save_every=2, lora=SPEC)


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


# ------------------------------------------------------------------------------------------------------------------- adapters
def test_merging_by_hand():
    params = decoder.init_params(CFG, 0)
    low = LowRank(np.arange(24.0, dtype=np.float32).reshape(12, 2) / 10, np.ones((2, 24), np.float32), alpha=1.0)  # alpha / rank is 1 / 2
    merged = lora.merge(params, {("layers", "1", "attn", "q"): low})
    before, after = (np.asarray(p["layers"]["1"]["attn"]["q"]["kernel"]) for p in (params, merged))
    by_hand = before + 0.5 * (np.arange(0, 24, 2) + np.arange(1, 24, 2))[:, None] / 10  # b adds the columns of a
    np.testing.assert_allclose(after, by_hand, rtol=1e-6)
    assert merged["layers"]["0"] == params["layers"]["0"] and merged["embed"] is params["embed"]
    half = lora.merge(jax.tree.map(lambda x: x.astype(jnp.bfloat16), params), {("layers", "1", "attn", "q"): low})
    assert half["layers"]["1"]["attn"]["q"]["kernel"].dtype == jnp.bfloat16


def test_fresh_adapters_add_nothing_and_each_is_drawn_by_its_path():
    fresh = lora.init(CFG, SPEC, MESH, seed=7)["layers"]
    assert fresh.keys() == {"attn", "mlp"} and fresh["mlp"].keys() == {"gate", "up", "down"}
    for owners in fresh.values():
        for low in owners.values():
            a, b = np.asarray(low["lora_a"]), np.asarray(low["lora_b"])
            bound = a.shape[1] ** -0.5
            assert not b.any() and np.abs(a).max() <= bound and np.abs(a).max() > 0.9 * bound and abs(a.mean()) < 0.1 * bound
    parts = [np.asarray(low["lora_a"][i]).tobytes() for owners in fresh.values() for low in owners.values() for i in (0, 1)]
    assert len(set(parts)) == len(parts)
    fewer = lora.init(dataclasses.replace(CFG, n_layers=1), Lora(rank=3, targets="q"), MESH, seed=7)["layers"]
    assert fewer.keys() == {"attn"} and np.array_equal(fewer["attn"]["q"]["lora_a"][0], fresh["attn"]["q"]["lora_a"][0])
    assert not np.array_equal(lora.init(CFG, SPEC, MESH, seed=8)["layers"]["attn"]["q"]["lora_a"], fresh["attn"]["q"]["lora_a"])


def test_targets_name_products_whole():
    assert lora.products(CFG, Lora(targets="q|v")) == [("attn", "q"), ("attn", "v")]
    assert [name for _, name in lora.products(CFG, Lora())] == ["q", "k", "v", "o", "gate", "up", "down"]
    plain = dataclasses.replace(CFG, gated=False)
    assert [name for _, name in lora.products(plain, Lora(targets="gate|.*p.*"))] == ["up"]
    with pytest.raises(UserError, match=r"targets='gate' matches none of this model's products: q, k, v, o, up, down"):
        lora.products(plain, Lora(targets="gate"))
    with pytest.raises(UserError, match="matches none"):
        lora.products(CFG, Lora(targets="q_proj"))
    assert lora.n_params(CFG, Lora(rank=2, targets="q")) == 2 * 2 * (12 + 24) and lora.n_params(CFG, Lora()) == 0


@pytest.mark.parametrize("field, value", [("rank", -1), ("alpha", 0.0), ("dropout", 1.0), ("targets", "(")])
def test_a_bad_config_is_refused(field, value):
    with pytest.raises(ConfigError, match=f"config.sft.lora.{field}="):
        from_dict({"sft": {"lora": {field: value}}})


def test_identity_is_what_it_was_without_adapters_and_another_with_them():
    name = lambda sft: loop.identity(CFG, examples(2), sft, 3, dtype="float32", seed=0)
    assert name(Sft()) == name(Sft(lora=Lora(alpha=8.0, dropout=0.5, targets="q")))
    specs = Lora(), Lora(rank=2), Lora(rank=2, alpha=8.0), Lora(rank=2, dropout=0.1), Lora(rank=2, targets="q")
    assert len({name(Sft(lora=spec)) for spec in specs}) == 5


def test_dropout_is_addressed_by_step_layer_and_product():
    drop = lambda step, layer, number: np.asarray(lora.dropout(SPEC, lora.dropout_key(0, step))(layer)(jnp.ones((50, 40)), number))
    first = drop(0, 0, 0)
    assert set(np.unique(first)) == {0.0, np.float32(1 / 0.8)} and abs((first == 0).mean() - 0.2) < 0.04
    assert np.array_equal(first, drop(0, 0, 0))
    assert not any(np.array_equal(first, drop(*place)) for place in ((1, 0, 0), (0, 1, 0), (0, 0, 1)))
    assert lora.dropout(Lora(rank=2), lora.dropout_key(0, 0)) is None


# ------------------------------------------------------------------------------------------------------------------- training
def test_a_fit_merges_what_it_trained_and_nothing_else():
    params, rows = decoder.init_params(CFG, 0), examples(10)
    sft = dataclasses.replace(SFT, epochs=8, lr=0.1, lora=Lora(rank=3, targets="q|down"))
    made = fit(params, CFG, rows, sft)
    assert made.adapter.keys() == {("layers", i, *p) for i in "01" for p in (("attn", "q"), ("mlp", "down"))}
    changed = {tuple(k.key for k in path) for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(made.params))
               if not np.array_equal(a, b)}
    assert changed == {(*path, "kernel") for path in made.adapter}
    assert same(made.params, lora.merge(params, made.adapter))
    held = [loop.held_out(p, CFG, rows, mesh=MESH, dtype="float32", context=128, batch=4)[0] for p in (params, made.params)]
    assert held[1] < 0.995 * held[0]


def test_the_losses_of_the_first_step_are_those_of_the_starting_model():
    params, rows = decoder.init_params(CFG, 0), examples(4)
    made = fit(params, CFG, rows, dataclasses.replace(SFT, epochs=1, lora=Lora(rank=3)))
    before, _ = loop.held_out(params, CFG, rows, mesh=MESH, dtype="float32", context=128, batch=4)
    assert made.losses[0][0] == pytest.approx(before, rel=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_interrupted_fit_continues_to_the_same_bits(tmp_path, dtype):
    params, rows = decoder.init_params(CFG, 0), examples(10)
    whole = fit(params, CFG, rows, SFT, dtype=dtype)
    assert all(low.a.dtype == low.b.dtype == np.float32 for low in whole.adapter.values())
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(whole.params))

    def die(step, loss, tokens):
        if step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(params, CFG, rows, SFT, dtype=dtype, checkpoints=Checkpoints(tmp_path), name="1", on_step=die)
    saved = {path.name for path in (tmp_path / "unfinished").rglob("*")}
    assert not any("kernel" in name for name in saved)  # adapters and moments alone
    steps = []
    continued = fit(params, CFG, rows, SFT, dtype=dtype, checkpoints=Checkpoints(tmp_path), name="1", on_step=lambda i, *_: steps.append(i))
    assert steps == [5, 6] and continued.losses == whole.losses and same(continued.params, whole.params)


def test_no_gradient_of_a_kernel_is_made():
    """The step's own memory is less than the kernels take, where training them takes gradients of all."""
    cfg = ModelConfig(vocab_size=500, d_model=256, n_layers=8, n_heads=4, n_kv_heads=2, head_dim=64, d_ff=1024)
    stacked = jax.eval_shape(decoder.stack_layers, decoder.abstract_params(cfg))
    batch = collate([Example((1, 2, 3, 4), 2)], 1, 128)

    def taken(spec):
        sft = Sft(lora=spec)
        frozen = Frozen(stacked, jax.ShapeDtypeStruct((2,), np.uint32)) if spec.rank else None
        lowered = train_step(cfg, sft, MESH, "float32").lower(abstract_state(cfg, sft, MESH), batch, np.float32(1), frozen)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    weights = 4 * decoder.n_params(cfg)
    assert taken(Lora()) > 0.8 * weights and taken(Lora(rank=2)) < 0.5 * weights


# ----------------------------------------------------------------------------------------------------------------------- runs
class Killed(BaseException):
    """Stands for a process that ends here."""


def test_a_run_writes_an_adapter_of_its_starting_model_in_each_iteration(tmp_path, monkeypatch):
    """Training goes on from iteration 1 in iteration 2; a run that ends before its second checkpoint continues to the same bytes."""
    options = ["--config.sft.init=last", "--config.sft.lora.rank=2", "--config.sft.lora.dropout=0.1", "--config.generate.requests=8"]
    command = lambda name: ["--config=configs/tiny.py", f"--workdir={tmp_path / name}", *options]
    train.main(command("whole"))
    lm = isara_jax.load("tiny-random", "float32")
    for t, rank in ((1, 2), (2, 4)):
        folder = tmp_path / "whole" / "iterations" / f"{t:02d}" / "adapter"
        config = json.loads((folder / "adapter_config.json").read_text())
        assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (rank, 8 * rank, 0.1)
        tuned = Checkpoints(tmp_path / "whole" / "checkpoints").restore(t, lm.abstract_params())
        merged = lora.apply_folder(lm.params, folder, lm.cfg, LLAMA)
        for a, b in zip(jax.tree.leaves(merged), jax.tree.leaves(tuned), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6)
        q, before = (p["layers"]["0"]["attn"]["q"]["kernel"] for p in (tuned, lm.params))
        assert np.abs(np.asarray(q) - before).max() > 1e-4

    original = Checkpoints.save

    def dies(self, t, params):
        if t == 2:
            raise Killed
        original(self, t, params)

    monkeypatch.setattr(Checkpoints, "save", dies)
    with pytest.raises(Killed):
        train.main(command("killed"))
    monkeypatch.undo()
    train.main(command("killed"))
    texts = [{p.relative_to(tmp_path / name): p.read_bytes() for p in (tmp_path / name / "iterations").rglob("*") if p.is_file()}
             for name in ("whole", "killed")]
    assert texts[0] == texts[1] and any(p.name == "adapter_model.safetensors" for p in texts[0])
