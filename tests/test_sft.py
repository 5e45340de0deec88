"""Fine-tuning: the loss by hand, the optimizer against torch, packing and masks, resume, several devices."""
import math
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isara_jax.checkpoint import Checkpoints
from isara_jax.common import UserError
from isara_jax.config import Sft
from isara_jax.data.batching import Batch, Example, collate
from isara_jax.models import decoder
from isara_jax.models.config import ModelConfig
from isara_jax.models.layers import Layer, causal_attention
from isara_jax.sft import loop
from isara_jax.sft.attention import packed_attention
from isara_jax.sft.loss import CHUNK, nll_sum
from isara_jax.sft.optim import learning_rate, optimizer
from isara_jax.sft.step import eval_step, init_state, train_step
from isara_jax.sharding import make_mesh

CFG = ModelConfig(vocab_size=23, d_model=12, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=6, d_ff=20)
TIED = ModelConfig(vocab_size=23, d_model=12, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=6, d_ff=20, tie_embeddings=True)
MESH = make_mesh(devices=jax.devices()[:1])
SFT = Sft(epochs=2, batch=4, lr=1e-2, save_every=2)  # one for most tests, so that they share a compiled step


def examples(n, seed=0):
    rng = np.random.default_rng(seed)
    return [Example(tuple(rng.integers(0, 23, int(rng.integers(4, 30))).tolist()), int(rng.integers(1, 4))) for _ in range(n)]


def fit(params, cfg=CFG, rows=None, sft=SFT, **kwargs):
    options = {"mesh": MESH, "dtype": "float32", "seed": 0, "context": 128, **kwargs}
    return loop.fit(params, cfg, rows or examples(10), sft, **options)


def reference_nll(params, cfg, example):
    """Summed loss of one pair alone: unrolled layers, plain causal attention, float64 softmax in numpy."""
    tokens = jnp.asarray(example.tokens[:-1])[None]
    hidden, _ = decoder.forward(params, cfg, tokens, jnp.arange(tokens.shape[1])[None], causal_attention(jnp.float32))
    logits = np.asarray(decoder.lm_head(params, cfg, hidden), np.float64)[0]
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return -sum(log_p[t - 1, example.tokens[t]] for t in range(example.prompt_length, len(example.tokens)))


# --------------------------------------------------------------------------------------------------------------------------- loss
def test_the_loss_by_hand():
    cfg = ModelConfig(vocab_size=3, d_model=2, n_layers=1, n_heads=1, n_kv_heads=1, head_dim=2, d_ff=2)
    head = {"head": {"kernel": jnp.array([[1.0, 0.0, 2.0], [0.0, 1.0, 0.0]])}}
    hidden = jnp.array([[[1.0, 0.0], [0.0, 3.0], [5.0, 5.0]]])  # logits (1, 0, 2), (0, 3, 0), and one that does not count
    made = nll_sum(head, cfg, 1, hidden, jnp.array([[2, 0, 1]]), jnp.array([[True, True, False]]))
    by_hand = math.log(math.e + 1 + math.e**2) - 2 + math.log(1 + math.e**3 + 1) - 0
    assert float(made) == pytest.approx(by_hand, rel=1e-6)


@pytest.mark.parametrize("cfg", [CFG, TIED], ids=["untied", "tied"])
@pytest.mark.parametrize("groups", [1, 2])
def test_loss_and_gradients_equal_the_plain_computation_over_many_chunks(cfg, groups):
    rng = np.random.default_rng(0)
    params = decoder.init_params(cfg, 0)
    head = {k: params[k] for k in (("embed",) if cfg.tie_embeddings else ("head",))}
    B, T = 4, CHUNK
    hidden, targets = jnp.asarray(rng.standard_normal((B, T, 12)), jnp.float32), jnp.asarray(rng.integers(0, 23, (B, T)))
    mask = jnp.asarray(rng.random((B, T)) < np.array([0.9, 0.8, 0.3, 0.0])[:, None])

    def plain(head, hidden):
        log_p = jax.nn.log_softmax(decoder.lm_head(head, cfg, hidden))
        return -jnp.sum(jnp.where(mask, jnp.take_along_axis(log_p, targets[..., None], -1)[..., 0], 0))

    got = jax.jit(jax.value_and_grad(lambda h, x: nll_sum(h, cfg, groups, x, targets, mask) * 0.5, argnums=(0, 1)))(head, hidden)
    want = jax.value_and_grad(lambda h, x: plain(h, x) * 0.5, argnums=(0, 1))(head, hidden)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)
    assert not np.any(np.asarray(got[1][1])[~np.asarray(mask)])  # a position that does not count has no gradient
    assert float(nll_sum(head, cfg, groups, hidden, targets, mask)) == pytest.approx(2 * float(got[0]), rel=1e-6)


def test_pairs_in_a_packed_row_do_not_see_each_other():
    params, rows = decoder.init_params(CFG, 0), examples(7)
    total, count = loop.held_out(params, CFG, rows, mesh=MESH, dtype="float32", context=128, batch=7)
    assert count == sum(len(e.tokens) - e.prompt_length for e in rows)
    assert total == pytest.approx(sum(reference_nll(params, CFG, e) for e in rows), rel=1e-5)


@pytest.mark.parametrize("window, softcap", [(0, 0.0), (2, 0.5)])
def test_one_segment_is_plain_causal_attention(window, softcap):
    rng, layer = np.random.default_rng(0), Layer(0, window, 1.0, softcap, None)
    q, k, v = (jnp.asarray(rng.standard_normal((2, 5, n, 6)), jnp.float32) for n in (4, 2, 2))
    packed, _ = packed_attention(jnp.float32, jnp.ones((2, 5), int))(q, k, v, layer, None)
    plain, _ = causal_attention(jnp.float32)(q, k, v, layer, None)
    np.testing.assert_allclose(packed, plain, atol=1e-6)


def test_sum_and_count_do_not_depend_on_how_pairs_are_batched():
    params, rows = decoder.init_params(TIED, 0), examples(9)
    sums = {b: loop.held_out(params, TIED, rows, mesh=MESH, dtype="float32", context=128, batch=b) for b in (1, 4, 9)}
    assert len({count for _, count in sums.values()}) == 1
    for total, _ in sums.values():
        assert total == pytest.approx(sums[9][0], rel=1e-6)


def test_prompt_and_padding_do_not_teach():
    """The loss ignores what the prompt predicts, and what stands in padding changes no gradient."""
    params = decoder.init_params(CFG, 0)
    batch = collate([Example((4, 5, 6, 7, 8), 3)], rows=2, width=8)
    changed_padding = Batch(np.where(batch.segments > 0, batch.tokens, 9), np.where(batch.segments > 0, batch.targets, 9), *batch[2:])
    changed_prompt_targets = batch._replace(targets=np.where(batch.loss_mask, batch.targets, 11))
    step = train_step(CFG, SFT, MESH, "float32")
    batches = (batch, changed_padding, changed_prompt_targets)
    results = [step(init_state(params, CFG, SFT, MESH), b, np.float32(0.1), None)[0].params for b in batches]
    for other in results[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(results[0]), jax.tree.leaves(other), strict=True))


# ---------------------------------------------------------------------------------------------------------------------- optimizer
def test_rate_is_that_of_transformers():
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    assert learning_rate(Sft(lr=0.5), 0, 1) == 0.5, "a single step is not warmed up"
    for steps in (2, 3, 40):
        tx = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2e-5)
        schedule = transformers.get_cosine_schedule_with_warmup(tx, math.ceil(0.03 * steps), steps)
        for step in range(steps):
            assert learning_rate(Sft(), step, steps) == pytest.approx(schedule.get_last_lr()[0], abs=1e-12)
            tx.step()
            schedule.step()


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_optimizer_is_torch_adamw_with_clipping(decay):
    torch = pytest.importorskip("torch")
    sft, rng = Sft(weight_decay=decay), np.random.default_rng(0)
    start = {"q": {"kernel": rng.standard_normal((3, 2)).astype(np.float32)}, "norm": {"scale": np.ones(3, np.float32)}}
    kernel, scale = (torch.nn.Parameter(torch.tensor(x)) for x in (start["q"]["kernel"], start["norm"]["scale"]))
    groups = [{"params": [kernel], "weight_decay": decay}, {"params": [scale], "weight_decay": 0.0}]
    theirs = torch.optim.AdamW(groups, lr=0.01, betas=sft.betas, eps=1e-8)
    tx, ours = optimizer(sft), jax.tree.map(jnp.asarray, start)
    state = tx.init(ours)
    for size in (0.1, 3.0, 1.0, 0.01):  # below and above the clip of 1
        grads = jax.tree.map(lambda x: (size * rng.standard_normal(x.shape)).astype(np.float32), start)
        kernel.grad, scale.grad = torch.tensor(grads["q"]["kernel"]), torch.tensor(grads["norm"]["scale"])
        torch.nn.utils.clip_grad_norm_([kernel, scale], sft.clip)
        theirs.step()
        updates, state = tx.update(jax.tree.map(jnp.asarray, grads), state, ours)
        ours = jax.tree.map(lambda p, u: p - 0.01 * u, ours, updates)
        np.testing.assert_allclose(ours["q"]["kernel"], kernel.detach(), atol=1e-6)
        np.testing.assert_allclose(ours["norm"]["scale"], scale.detach(), atol=1e-6)


def test_the_loss_curve_is_that_of_torch_and_transformers():
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    theirs_cfg = transformers.LlamaConfig(vocab_size=23, hidden_size=12, intermediate_size=20, num_hidden_layers=2, num_attention_heads=4,
                                          num_key_value_heads=2, head_dim=6, rms_norm_eps=CFG.norm_eps, rope_theta=10_000.0)
    params, model = decoder.init_params(CFG, 0), transformers.LlamaForCausalLM(theirs_cfg)
    model.load_state_dict(_to_torch(torch, params))
    rows = examples(4)
    sft = Sft(epochs=8, batch=4, lr=1e-2)
    made = fit(params, rows=rows, sft=sft)
    tx = torch.optim.AdamW(model.parameters(), lr=sft.lr, betas=sft.betas, weight_decay=0.0)
    schedule = transformers.get_cosine_schedule_with_warmup(tx, math.ceil(sft.warmup * 8), 8)
    for ours, count in made.losses:
        losses = []
        for e in rows:
            logits = model(torch.tensor([e.tokens])).logits[0, e.prompt_length - 1:-1]
            losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(e.tokens[e.prompt_length:]), reduction="sum"))
        loss = sum(losses) / count
        assert ours / count == pytest.approx(loss.item(), abs=1e-4)
        tx.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), sft.clip)
        tx.step()
        schedule.step()
    assert made.losses[-1][0] < 0.95 * made.losses[0][0]


def _to_torch(torch, params):
    t = lambda x: torch.tensor(np.asarray(x))
    out = {"model.embed_tokens.weight": t(params["embed"]["embedding"]), "model.norm.weight": t(params["norm"]["scale"]),
           "lm_head.weight": t(params["head"]["kernel"]).T}
    for i, layer in params["layers"].items():
        out[f"model.layers.{i}.input_layernorm.weight"] = t(layer["attn_norm"]["scale"])
        out[f"model.layers.{i}.post_attention_layernorm.weight"] = t(layer["mlp_norm"]["scale"])
        out |= {f"model.layers.{i}.self_attn.{n}_proj.weight": t(layer["attn"][n]["kernel"]).T for n in "qkvo"}
        out |= {f"model.layers.{i}.mlp.{n}_proj.weight": t(layer["mlp"][n]["kernel"]).T for n in ("gate", "up", "down")}
    return out


# --------------------------------------------------------------------------------------------------------------------------- loop
def test_fit_learns_and_leaves_the_given_parameters_alone():
    params = decoder.init_params(TIED, 0)
    before = jax.tree.map(np.array, params)
    rows = examples(10)
    seen = []
    made = fit(params, TIED, rows, on_step=lambda *row: seen.append(row))
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(params), strict=True))
    assert jax.tree.structure(made.params) == jax.tree.structure(params)
    assert made.steps == loop.steps(10, SFT) == len(made.losses) == 6 and [s for s, *_ in seen] == [1, 2, 3, 4, 5, 6]
    assert seen[2][1] == pytest.approx(made.losses[2][0] / made.losses[2][1])
    assert sum(tokens for *_, tokens in seen) == made.tokens == 2 * sum(len(e.tokens) - 1 for e in rows)
    held = [loop.held_out(p, TIED, rows, mesh=MESH, dtype="float32", context=128, batch=4)[0] for p in (params, made.params)]
    assert held[1] < 0.98 * held[0]
    again = fit(params, TIED, rows)
    assert again.losses == made.losses


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_interrupted_fit_continues_to_the_same_bits(tmp_path, dtype):
    params = decoder.init_params(TIED, 0)
    whole = fit(params, TIED, dtype=dtype)

    def die(step, loss, tokens):
        if step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(params, TIED, dtype=dtype, checkpoints=Checkpoints(tmp_path), name="1", on_step=die)
    steps = []
    continued = fit(params, TIED, dtype=dtype, checkpoints=Checkpoints(tmp_path), name="1", on_step=lambda i, *_: steps.append(i))
    assert steps == [5, 6] and continued.losses == whole.losses
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(continued.params), jax.tree.leaves(whole.params), strict=True))
    other = []
    fit(params, TIED, dtype=dtype, checkpoints=Checkpoints(tmp_path), name="2", on_step=lambda i, *_: other.append(i))
    assert other == [1, 2, 3, 4, 5, 6]  # the state of iteration 1 is none of iteration 2


def test_another_fit_of_the_same_shape_compiles_nothing():
    params, rows = decoder.init_params(TIED, 0), examples(12, seed=1)
    sft = Sft(epochs=1, batch=4, lr=1e-3)
    fit(params, TIED, rows, sft)
    compiled = train_step(TIED, sft, MESH, "float32")._cache_size()
    fit(params, TIED, rows + rows, sft)  # more steps, another rate at each
    assert train_step(TIED, sft, MESH, "float32")._cache_size() == compiled == 1


def test_half_precision_products_keep_float32_parameters_close():
    params = decoder.init_params(TIED, 0)
    full, half = fit(params, TIED), fit(params, TIED, dtype="bfloat16")
    assert all(x.dtype == np.float32 for x in jax.tree.leaves(half.params))
    for (a, n), (b, m) in zip(full.losses, half.losses, strict=True):
        assert n == m and a != b and b == pytest.approx(a, rel=2e-2)


def test_what_cannot_be_fitted_is_said():
    params = decoder.init_params(TIED, 0)
    with pytest.raises(UserError, match="do not fit the context of 8 tokens"):
        fit(params, TIED, context=8)
    with pytest.raises(UserError, match=r"at step 1: loss nan.*--config.sft.lr"):
        fit(jax.tree.map(lambda x: x * np.nan, params), TIED)


def test_measuring_takes_stacked_layers_too():
    params = decoder.init_params(TIED, 0)
    batch = collate(examples(3), 1, 128)
    step = eval_step(TIED, MESH, "float32")
    (a, n), (b, m) = step(params, batch), step(decoder.stack_layers(params), batch)
    assert int(n) == int(m) and float(a) == pytest.approx(float(b), rel=1e-6)


EIGHT = """
import sys
import jax, numpy as np
from isara_jax.config import Lora, Sft
from isara_jax.data.batching import Example
from isara_jax.models import decoder
from isara_jax.models.config import ModelConfig
from isara_jax.sft import loop
from isara_jax.sharding import make_mesh, param_shardings
sft = Sft(epochs=2, batch=12, lr=1e-2, lora=Lora(rank=int(sys.argv[1])))
cfg = ModelConfig(vocab_size=32, d_model=16, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=4, d_ff=24, tie_embeddings=True)
rng = np.random.default_rng(0)
rows = [Example(tuple(rng.integers(0, 32, int(rng.integers(10, 90))).tolist()), 5) for _ in range(24)]
curves = []
for mesh in (make_mesh(devices=jax.devices()[:1]), make_mesh(data=8), make_mesh(data=2, fsdp=2, tensor=2)):
    params = decoder.init_params(cfg, 0)
    params = jax.device_put(params, param_shardings(params, mesh))
    made = loop.fit(params, cfg, rows, sft, mesh=mesh, dtype="float32", seed=0, context=128)
    assert jax.tree.map(lambda x: x.sharding, made.params) == jax.tree.map(lambda x: x.sharding, params)
    total, count = loop.held_out(made.params, cfg, rows, mesh=mesh, dtype="float32", context=128, batch=12)
    curves.append([x / n for x, n in made.losses] + [total / count])
np.testing.assert_allclose(curves[1], curves[0], atol=1e-5)
np.testing.assert_allclose(curves[2], curves[0], atol=1e-5)
assert curves[0][3] < curves[0][0]
"""


@pytest.mark.parametrize("rank", ["0", "4"], ids=["weights", "adapters"])
def test_eight_devices_learn_as_one_does(rank):
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", EIGHT, rank], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
