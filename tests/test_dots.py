"""The engine's programs looked at without running them: every product of both recipes is one that this CPU can take, and cuDNN's calls.

XLA:CPU refuses some layouts of a bfloat16 product with a float32 result, and only when it is run ("UNIMPLEMENTED DotThunk"). So the
products of all programs are listed, and each is run alone.
"""
from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isara_jax.decode import attention, engine, recipes
from isara_jax.decode.attention import GROUPS, Groups, Places
from isara_jax.decode.engine import Engine, EngineConfig, Rows
from isara_jax.decode.sampling import Controls
from isara_jax.models import decoder
from isara_jax.models.config import LayerKind, ModelConfig, Rope
from isara_jax.sharding import make_mesh

SMOLLM2 = ModelConfig(vocab_size=4096, d_model=576, n_layers=2, n_heads=9, n_kv_heads=3, head_dim=64, d_ff=1536, tie_embeddings=True)
OPT = ModelConfig(vocab_size=512, d_model=64, n_layers=2, n_heads=4, n_kv_heads=4, head_dim=16, d_ff=96, pattern=(LayerKind(None),),
                  norm="layer", qkv_bias=True, o_bias=True, mlp_bias=True, activation="relu", gated=False, embed_width=32, positions=2050)
ONE_KEY_HEAD = ModelConfig(vocab_size=512, d_model=64, n_layers=2, n_heads=8, n_kv_heads=1, head_dim=24, d_ff=96)
WINDOW = dataclasses.replace(ONE_KEY_HEAD, pattern=(LayerKind(Rope(), window=24),))
TWO_WINDOWS = dataclasses.replace(ONE_KEY_HEAD, pattern=(LayerKind(Rope(), window=24), LayerKind(Rope())))
MODELS = {"smollm2": SMOLLM2, "opt": OPT, "one key head": ONE_KEY_HEAD}
TABLE = 8


@functools.cache
def traced(cfg, config):
    """The prefill and decode programs of an engine, with groups, without them, and with repetition penalties: {name: traced}."""
    of, number = jax.ShapeDtypeStruct, lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
    made = Engine(cfg, config, make_mesh(devices=jax.devices()[:1]), 80, TABLE)
    S, P, tiles = made.slots, made.lanes, len(attention.tiles(made.slots))
    U, M = -(-S // 2 // GROUPS) * GROUPS, attention.members(cfg)
    params = jax.tree.map(lambda x: of(x.shape, config.dtype), decoder.abstract_params(cfg))
    if recipes.is_scanned(config.attention):
        params = jax.eval_shape(decoder.stack_layers, params)
    state = jax.eval_shape(made.empty_state)
    real, flag = of((S,), jnp.float32), of((S,), jnp.bool)
    rows = Rows(number(S), number(S), number(S), number(S), of((S, 2), jnp.uint32), number(S, 8), flag,
                Controls(temperature=real, top_p=real, top_k=number(S), repetition_penalty=real, min_new=number(S), log_p=flag))
    places = Places(number(S, TABLE), number(S), number(S), number(tiles), number(tiles))
    groups = Groups(number(U, TABLE), number(U), number(U, M), number(U // GROUPS), number(S))
    decode = lambda *more: engine._decode.trace(made, params, state, rows, places, *more)
    programs = {"prefill": engine._prefill.trace(made, params, state, number(P, config.chunk), number(P), number(P, TABLE)),
                "decode": decode(None, None), "penalties": decode(None, of((S, cfg.vocab_size), jnp.bool))}
    return programs | ({"groups": decode(groups, None)} if config.attention == "blocks" else {})


def dots(jaxpr):
    """Every product of a program, those of its inner programs too."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (a, b), p = (x.aval for x in equation.invars), equation.params
            yield a.shape, str(a.dtype), b.shape, str(b.dtype), p["dimension_numbers"], str(jnp.dtype(p["preferred_element_type"]))
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            if hasattr(value, "eqns") or hasattr(value, "jaxpr"):
                yield from dots(getattr(value, "jaxpr", value))


def product(shape_a, shape_b, dims, dtype):
    """(what this CPU makes of a product in `dtype` with a float32 result, the same in float64)."""
    rng = np.random.default_rng(0)
    a, b = (jnp.asarray(rng.normal(size=shape), dtype) for shape in (shape_a, shape_b))
    out = jax.jit(lambda a, b: jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32))(a, b)
    (over_a, over_b), (batch_a, batch_b) = dims
    free = iter(range(20, 40))

    def axes(shape, over, batch):
        return [over.index(i) if i in over else 10 + batch.index(i) if i in batch else next(free) for i in range(len(shape))]

    axes_a, axes_b = axes(shape_a, over_a, batch_a), axes(shape_b, over_b, batch_b)
    result = [10 + i for i in range(len(batch_a))] + [x for x in axes_a + axes_b if x >= 20]
    return np.asarray(out), np.einsum(np.asarray(a, np.float64), axes_a, np.asarray(b, np.float64), axes_b, result, optimize=True)


# ---------------------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["blocks", "xla"])
def test_every_product_runs(kind, dtype):
    """At the slots of a run and at those of a chat: each product, alone, gives what float64 gives but for rounding."""
    found = set()
    for cfg in MODELS.values():
        for slots in (1, 4, 64):
            config = EngineConfig(dtype, slots=slots, attention=kind)
            for name, program in traced(cfg, config).items():
                here = set(dots(program.jaxpr.jaxpr))
                # q like o, k like v, gate like up, down, scores, values; the head in decode; without a gate and with equal heads fewer
                assert len(here) >= (5 if name == "prefill" else 6), (name, here)
                found |= here
    for shape_a, dtype_a, shape_b, dtype_b, dims, into in sorted(found, key=str):
        case = (shape_a, shape_b, dims)
        assert (dtype_a, dtype_b, into) == (dtype, dtype, "float32"), case
        batch = tuple(range(len(dims[1][0])))
        assert dims[1] == (batch, batch), f"the batch dimensions of {case} do not come first"
        made, right = product(shape_a, shape_b, dims, dtype)
        np.testing.assert_allclose(made, right, rtol=0, atol=1e-3 * np.abs(right).max(), err_msg=str(case))


def test_a_layout_that_cannot_run_would_be_seen():
    """What the test above guards against. Where this product runs, XLA:CPU has learnt it and the order of dimensions is free."""
    dims = (((1,), (3,)), ((0,), (1,)))  # keys kds with queries bkqd, where k is not the first
    with pytest.raises(Exception, match="UNIMPLEMENTED.*DotThunk"):
        product((3, 64, 128), (8, 3, 4, 64), dims, "bfloat16")


@pytest.mark.parametrize("cfg, decode_call", [(SMOLLM2, "__cudnn$fmhaSoftmax"), (WINDOW, "__cudnn$fmhaScaleBiasSoftmax"),
                                              (TWO_WINDOWS, "__cudnn$fmhaScaleBiasSoftmax")], ids=["plain", "window", "two windows"])
def test_cudnn_accepts_what_it_is_given(cfg, decode_call, monkeypatch):
    """Lowered for NVIDIA GPUs, which needs none: jax checks types, widths and masks against what cuDNN takes. What it computes is tested
    where there is a GPU (tests/test_dense.py). Only windows need a mask in decode, which reads no more keys than a row has without one."""
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91800)
    programs = traced(cfg, EngineConfig("bfloat16", slots=4, attention="cudnn"))
    calls = {name: program.lower(lowering_platforms=("cuda",)).as_text() for name, program in programs.items()}
    assert "@__cudnn$fmhaScaleBiasSoftmax(" in calls["prefill"] and f"@{decode_call}(" in calls["decode"]
    for text in calls.values():
        assert text.count("stablehlo.custom_call @__cudnn") == 1  # layers are scanned: there is one for all
