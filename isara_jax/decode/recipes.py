"""Which attention sampling runs: one recipe for CPUs, one for GPUs and TPUs, behind the same five functions.

* "blocks" (decode/attention.py): blocks with an online softmax, layers unrolled. Tuned for XLA:CPU, whose bits it keeps the same in any
  company; the products that it makes are too small for a GPU.
* "xla" and "cudnn" (decode/dense.py): each row's keys gathered and attended at once, layers scanned.
"""
from __future__ import annotations

import functools
import re
from typing import Any, Callable, NamedTuple

import jax

from isara_jax.common import UserError
from isara_jax.decode import attention, dense
from isara_jax.models.config import ModelConfig

KINDS = ("blocks", "cudnn", "xla")


class Recipe(NamedTuple):
    """The functions by which the engine's programs keep and attend keys. Letters as in decode/attention.py.

    Attributes:
        empty: (cfg, blocks, width) -> the pool.
        prefill: (start [P], table [P, C]) -> an `attend` whose state is the pool.
        begin: (cfg, pool, places, steps) -> the state of a run of decode steps.
        decode: (pool, places, groups, cached [S], j) -> an `attend` with that state, for the j-th token of the run.
        flush: (pool, state, at [S, J], block [S, J]) -> the pool with the keys of the run, each position into the block named for it.
    """

    empty: Callable[..., Any]
    prefill: Callable[..., Any]
    begin: Callable[..., Any]
    decode: Callable[..., Any]
    flush: Callable[..., Any]


def of(kind: str, dtype: str) -> Recipe:
    """The recipe of a kind (one of `KINDS`), with products in `dtype`."""
    if kind == "blocks":
        return Recipe(empty=lambda cfg, blocks, width: attention.empty(cfg, dtype, blocks, width),
                      prefill=functools.partial(attention.prefill, dtype),
                      begin=lambda cfg, pool, places, steps: attention.empty_recent(cfg, len(places.table), steps),
                      decode=functools.partial(attention.decode, dtype),
                      flush=lambda pool, state, at, block: attention.flush(dtype, pool, state, block, at % pool[0][0].shape[-1]))
    return Recipe(empty=lambda cfg, blocks, width: dense.empty(cfg, dtype, blocks, width),
                  prefill=functools.partial(dense.prefill, kind, dtype),
                  begin=lambda cfg, pool, places, steps: dense.gather(pool, places.table),
                  decode=lambda pool, places, groups, cached, j: dense.decode(kind, dtype, cached, j),
                  flush=dense.flush)


def is_scanned(kind: str) -> bool:
    """Whether the layers are scanned, and so wanted stacked. XLA:CPU takes 4 times as long for a scanned layer in decode."""
    return kind != "blocks"


def choose(wanted: str, device: jax.Device, dtype: str, cfg: ModelConfig) -> str:
    """The kind for a device: what is asked for, or for "auto" blocks on a CPU, cudnn where it takes the model, else xla.

    Raises `UserError` for a kind that there is not, and for cudnn where it cannot run this model on this device in this dtype.
    """
    if wanted not in ("auto", *KINDS):
        raise UserError(f"config.generate.attention={wanted!r} is not one of auto, {', '.join(KINDS)}.")
    if wanted not in ("auto", "cudnn"):
        return wanted
    if wanted == "auto" and device.platform == "cpu":
        return "blocks"
    if not (trouble := _against_cudnn(device, dtype, cfg)):
        return "cudnn"
    if wanted == "auto":
        return "xla"
    raise UserError(f"config.generate.attention=cudnn: {trouble}. Set config.generate.attention=auto, which takes what fits.")


def _against_cudnn(device: jax.Device, dtype: str, cfg: ModelConfig) -> str:
    """Why cuDNN's attention cannot be used; "" where it can. The limits are those of its support matrix (9.18) and of jax's own check."""
    found = re.fullmatch(r"\d+\.\d+", str(getattr(device, "compute_capability", "")))
    if device.platform != "gpu" or not found:
        return f"it runs on NVIDIA GPUs only, and this device is {device.device_kind} ({device.platform})"
    capability = float(found[0])
    if capability < 8:
        return f"it needs compute capability 8.0 (Ampere), and {device.device_kind} has {capability}"
    if dtype != "bfloat16":
        return f"it computes in bfloat16, and the dtype is {dtype}"
    if cfg.attn_softcap:
        return f"it cannot cap scores, which this model does (attn_softcap={cfg.attn_softcap})"
    most = 256 if capability >= 9 else 128
    if cfg.head_dim % 8 or cfg.head_dim > most:
        return f"it takes heads of a multiple of 8 up to {most} on {device.device_kind}, and this model's are {cfg.head_dim} wide"
    return ""
