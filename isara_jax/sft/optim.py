"""The optimizer: AdamW with global-norm clipping, and the learning rate of each step.

The rate is an argument of the train step and not part of its program, so that fine-tunings of different lengths share one program.
"""
from __future__ import annotations

import math
from typing import Any

import jax
import optax

from isara_jax.config import Sft


def optimizer(sft: Sft) -> optax.GradientTransformation:
    """Clip to `sft.clip`, Adam, decoupled weight decay (Loshchilov and Hutter 2019): updates for a learning rate of -1.

    Norm scales and biases are not decayed, as in Hugging Face's Trainer and safe-rlhf.
    """
    return optax.chain(
        optax.clip_by_global_norm(sft.clip),
        optax.scale_by_adam(*sft.betas, eps=1e-8),
        optax.add_decayed_weights(sft.weight_decay, mask=_decays),
    )


def _decays(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key not in ("scale", "bias"), params)


def learning_rate(sft: Sft, step: int, steps: int) -> float:
    """The rate of step `step` (from 0) of `steps`: linear warm-up over ceil(warmup * steps) steps, then a half cosine to 0.

    This is `get_cosine_schedule_with_warmup` of transformers: the first step of a warm-up has rate 0. A single step is not warmed up,
    or it would teach nothing.
    """
    warmup = min(math.ceil(sft.warmup * steps), steps - 1)
    if step < warmup:
        return sft.lr * step / warmup
    return sft.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
