"""Frequencies of rotary position embeddings, scaled as `Rope` says; equal to transformers' modeling_rope_utils, which computes in float32."""
from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from isara_jax.models.config import Rope


def frequencies(rope: Rope, width: int) -> np.ndarray:
    """Radians per position of each rotated pair, float32 [width / 2, rounded up]; `width` is the rotated part of a head."""
    exponents = np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
    powers = (rope.theta ** exponents.astype(np.float64)).astype(np.float32)
    if rope.scaling == "factors":
        return np.float32(1) / (np.array(rope.factors, np.float32) * powers)
    plain = np.float32(1) / powers
    if rope.scaling == "linear":
        return plain / np.float32(rope.factor)
    if rope.scaling == "llama3":
        return _llama3(rope, plain)
    return _yarn(rope, plain, width) if rope.scaling == "yarn" else plain


def _llama3(rope: Rope, plain: np.ndarray) -> np.ndarray:
    """Long waves are scaled, short ones kept, between them a blend that is linear in the rotations within the original context."""
    waves = 2 * np.pi / plain.astype(np.float64)
    kept = np.clip((rope.original / waves - rope.low) / (rope.high - rope.low), 0, 1)
    return ((1 - kept) * plain / rope.factor + kept * plain).astype(np.float32)


def _yarn(rope: Rope, plain: np.ndarray, width: int) -> np.ndarray:
    """Scaled where a wave makes few rotations within the original context, kept where it makes many (arXiv 2309.00071, section 3.2)."""

    def pair(rotations: float) -> float:
        """The (fractional) number of the pair that makes so many rotations."""
        return width * math.log(rope.original / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    first, last = pair(rope.high), pair(rope.low)
    if rope.round_ends:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, width - 1)
    scaled = np.clip((np.arange(width // 2) - first) / ((last - first) or 0.001), 0, 1)
    return (plain / rope.factor * scaled + plain * (1 - scaled)).astype(np.float32)


def turn(rope: Rope | None, width: int, positions_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(cos, sin), each [B, T, 1, width / 2, rounded up] float32, times the gain; without a rope the ones and zeros that rotate nothing."""
    if rope is None:
        shape = (*positions_BT.shape, 1, (width + 1) // 2)
        return jnp.ones(shape), jnp.zeros(shape)
    angles = positions_BT[:, :, None, None].astype(jnp.float32) * frequencies(rope, width)
    gain = np.float32(rope.gain)
    return jnp.cos(angles) * gain, jnp.sin(angles) * gain


def turn_once(rope: Rope | None, width: int, positions_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`turn`, computed in a loop of two: what stands before no loop XLA:CPU computes again wherever it is used, here for each head and layer."""
    axis = next((a for a in (1, 0) if positions_BT.shape[a] % 2 == 0), None)
    if rope is None or axis is None:
        return turn(rope, width, positions_BT)
    leading = jnp.moveaxis(positions_BT, axis, 0)
    halves = leading.reshape(2, -1, *leading.shape[1:])
    made = jax.lax.map(lambda places: turn(rope, width, places), halves)
    return tuple(jnp.moveaxis(x.reshape(*leading.shape, *x.shape[3:]), 0, axis) for x in made)
