"""Heads that read one token of a decoder: sequence classification with n labels, and scalar scores.

Two layouts of checkpoints, told apart by the key of the head:

    score.weight [n, E]                      transformers' XForSequenceClassification (Beaver-Dam-7B: 14 sigmoids), n from id2label
    score_head.{weight [n, E], bias [n]}     safe-rlhf's score models (rewards and costs), n from score_dim; normalizer.{mean,var} [n]

In the parameter tree a head stands where the vocabulary head of a language model would: head/{kernel [E, n], bias [n]}. Letters as in
models/layers.py.
"""
from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from isara_jax.common import UserError
from isara_jax.models import decoder, tensors
from isara_jax.models.config import ModelConfig
from isara_jax.models.families.table import Entry, Shape
from isara_jax.models.layers import causal_attention, matmul
from isara_jax.models.resolve import read_json

CLASSIFIER, SCORE = "score.weight", "score_head.weight"
LINKS = {"regression": "none", "multi_label_classification": "sigmoid", "single_label_classification": "softmax"}
# safe-rlhf: score_type -> what its normaliser does to a score where do_normalize is set
NORMALISERS = {"reward": "affine", "cost": "scale", "critic": "identity"}


@dataclass(frozen=True)
class Head:
    """What stands on the decoder.

    Attributes:
        key: of its kernel in the checkpoint, `CLASSIFIER` or `SCORE`.
        labels: name of each output, in their order.
        link: what makes probabilities of the outputs: "sigmoid", "softmax" or "none".
        bias: whether it has one.
        shift, divide: the normalised output is (output - shift) / divide; empty where nothing is normalised.
    """

    key: str
    labels: tuple[str, ...]
    link: str
    bias: bool = False
    shift: tuple[float, ...] = ()
    divide: tuple[float, ...] = ()


# ------------------------------------------------------------------------------------------------------------------------- folders
def head_key(folder: Path) -> str:
    """`CLASSIFIER` or `SCORE`, whichever the checkpoint in a folder has; "" for a language model. Reads headers only."""
    names = tensors.open_folder(folder).entries
    return next((key for key in (CLASSIFIER, SCORE) if key in names), "")


def check_language_model(folder: Path) -> None:
    """Raise `UserError` where a folder holds a classifier or a score model, which generates no text."""
    if key := head_key(folder):
        kind = "classifier" if key == CLASSIFIER else "score model"
        raise UserError(f"{folder} holds a {kind} ({key}), not a causal language model: load it with isara_jax.load_scorer.")


def read_head(folder: Path) -> Head:
    """The head that a folder's checkpoint and its config.json describe.

    Raises `UserError` for a language model, and for fields of config.json that cannot be honoured.
    """
    path, key = folder / "config.json", head_key(folder)
    raw = read_json(path)
    if not key:
        raise UserError(f"{folder} has no head for scores: neither {CLASSIFIER} (sequence classification in transformers) nor {SCORE} "
                        f"(safe-rlhf) is among its tensors{_named(raw)}. A causal language model is loaded with isara_jax.load.")
    return _classifier(raw, path) if key == CLASSIFIER else _score(raw, path, tensors.open_folder(folder))


def _named(raw: dict[str, Any]) -> str:
    return f", and config.json names {', '.join(map(str, raw['architectures']))}" if isinstance(raw.get("architectures"), list) else ""


def _classifier(raw: dict[str, Any], path: Path) -> Head:
    """As transformers: labels of id2label, else num_labels or two of them; the link as its text-classification pipeline chooses it."""
    named, count = raw.get("id2label"), raw.get("num_labels")
    if named is None:
        count = 2 if count is None else count
        if not _whole(count):
            raise UserError(f"{path}: num_labels={count!r} is not a whole number of at least 1.")
        labels = tuple(f"LABEL_{i}" for i in range(count))
    else:
        if not isinstance(named, dict) or not named or set(named) != {str(i) for i in range(len(named))}:
            raise UserError(f"{path}: id2label={named!r} does not name the labels 0, 1, … one by one. Mend it.")
        labels = tuple(str(named[str(i)]) for i in range(len(named)))
        if count is not None and count != len(labels):
            raise UserError(f"{path}: num_labels={count!r}, but id2label names {len(labels)}. Mend the one that is wrong.")
    problem = raw.get("problem_type")
    if problem is not None and problem not in LINKS:
        raise UserError(f"{path}: problem_type={problem!r} is not supported (supported: {', '.join(LINKS)}).")
    return Head(CLASSIFIER, labels, LINKS.get(problem) or ("sigmoid" if len(labels) == 1 else "softmax"))


def _score(raw: dict[str, Any], path: Path, checkpoint: tensors.Checkpoint) -> Head:
    """As safe-rlhf's ScoreModelMixin. Its normaliser is of the stored mean and variance, else of config.json's, else of 0 and 1."""
    count, kind = raw.get("score_dim", 1), raw.get("score_type", "reward")
    if not _whole(count):
        raise UserError(f"{path}: score_dim={count!r} is not a whole number of at least 1.")
    if kind not in NORMALISERS:
        raise UserError(f"{path}: score_type={kind!r} is not supported (supported: {', '.join(NORMALISERS)}).")
    bias = raw.get("score_bias", raw.get("bias"))  # its name in newer versions and in older ones, whose defaults differ
    bias = "score_head.bias" in checkpoint.entries if bias is None else bool(bias)
    labels = (kind,) if count == 1 else tuple(f"{kind}_{i}" for i in range(count))
    mean, deviation = _moment(raw, path, checkpoint, "mean", 0.0, count), np.sqrt(_moment(raw, path, checkpoint, "var", 1.0, count))
    plain = Head(SCORE, labels, "none", bias)
    if not raw.get("do_normalize", False) or NORMALISERS[kind] == "identity":
        return plain
    shift = mean if NORMALISERS[kind] == "affine" else np.zeros(count)
    return dataclasses.replace(plain, shift=tuple(shift.tolist()), divide=tuple((deviation + 1e-8).tolist()))


def _moment(raw: dict[str, Any], path: Path, checkpoint: tensors.Checkpoint, name: str, default: float, count: int) -> np.ndarray:
    """A moment [n] of the normaliser."""
    key, value = f"normalizer.{name}", raw.get(name)
    if key in checkpoint.entries:
        values, where = checkpoint.read(key).astype(np.float64), f"{checkpoint.entries[key].file}: {key}"
    else:
        where = f"{path}: {name}={value!r}"
        try:
            values = np.full(count, default) if value is None else np.asarray(value, np.float64)
        except (TypeError, ValueError):
            values = np.zeros(0)
    if values.shape != (count,) or not np.isfinite(values).all() or (name == "var" and (values < 0).any()):
        raise UserError(f"{where} is not the {name} of {count} score(s). The folder is damaged; get it again.")
    return values


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


# ------------------------------------------------------------------------------------------------------------------------ parameters
def body(cfg: ModelConfig) -> ModelConfig:
    """The decoder below a head: that of `cfg` without a vocabulary head of its own."""
    return dataclasses.replace(cfg, tie_embeddings=True)


def entries(head: Head, cfg: ModelConfig) -> dict[Entry, Shape]:
    """The head's tensors in a checkpoint and their shapes in our layout, as `hf.load_params` takes them beside the body's."""
    n, found = len(head.labels), {Entry(head.key, (("head", "kernel"),), "linear"): (cfg.embed_dim, len(head.labels))}
    return found | ({Entry(head.key.replace("weight", "bias"), (("head", "bias"),), "plain"): (n,)} if head.bias else {})


def abstract_params(head: Head, cfg: ModelConfig) -> decoder.Params:
    """The parameter tree of body and head as `jax.ShapeDtypeStruct`s (float32)."""
    made = {entry.paths[0][1]: jax.ShapeDtypeStruct(shape, jnp.float32) for entry, shape in entries(head, cfg).items()}
    return {**decoder.abstract_params(body(cfg)), "head": made}


# --------------------------------------------------------------------------------------------------------------------------- forward
@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def outputs(params: decoder.Params, cfg: ModelConfig, head: Head, dtype: str, tokens_BT: jax.Array, lengths_B: jax.Array) -> jax.Array:
    """The head's outputs [B, n] float32 at the last token of each row, normalised where the model does that.

    What stands behind a row's length (at least 1) changes nothing. transformers looks for the last token that is not the padding token,
    which is another one where a text ends with that.
    """
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    hidden_BTE, _ = decoder.forward(params, body(cfg), tokens_BT, positions_BT, causal_attention(jnp.dtype(dtype)))
    last_BE = jnp.take_along_axis(hidden_BTE, (lengths_B - 1)[:, None, None], axis=1)[:, 0]
    out_BN = matmul(last_BE, params["head"]["kernel"])
    if head.bias:
        out_BN = out_BN + params["head"]["bias"].astype(jnp.float32)
    return (out_BN - jnp.array(head.shift, jnp.float32)) / jnp.array(head.divide, jnp.float32) if head.shift else out_BN
