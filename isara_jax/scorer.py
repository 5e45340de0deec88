"""`load_scorer` and the `Scorer` that people hold: classifiers and reward models on the decoder of a language model.

    judge = isara_jax.load_scorer("PKU-Alignment/beaver-7b-v1.0-cost")
    judge.logits(["BEGINNING OF CONVERSATION: USER: … ASSISTANT:…"], eos=True)
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Sequence

import numpy as np
from jax.sharding import Mesh

from isara_jax import preflight
from isara_jax.common import UserError
from isara_jax.data import tokenizer as tokenizer_lib
from isara_jax.data.tokenizer import Splits
from isara_jax.lm import WIDTHS, check_rows
from isara_jax.models import decoder, heads, hf, resolve
from isara_jax.models.config import ModelConfig
from isara_jax.models.heads import Head
from isara_jax.models.place import placer
from isara_jax.sharding import make_mesh, param_shardings, put_rows, row_devices

PROGRAM = 4096  # tokens of one call on each device, padding included

Row = str | Sequence[int]


@dataclass(frozen=True)
class Scorer:
    """A classifier or score model with its tokenizer, placed on a mesh."""

    params: decoder.Params
    cfg: ModelConfig
    head: Head
    tokenizer: Splits
    context: int                    # longest text in tokens
    dtype: str                      # float32 or bfloat16: the arithmetic of products
    mesh: Mesh

    @property
    def labels(self) -> tuple[str, ...]:
        """Name of each output, in their order: those of config.json's id2label, or what a score model scores ("reward", "cost")."""
        return self.head.labels

    def logits(self, rows: Sequence[Row], *, eos: bool = False) -> np.ndarray:
        """The outputs [len(rows), n] float32 at the last token of each row; scores are normalised where the model does that.

        Args:
            rows: texts or token ids. A text is encoded as the beginning of a sequence, special tokens spelled in it as plain text; for
                a chat give the ids of `tokenizer.encode_segments([(tokenizer.render_chat(messages, add_generation_prompt=False), True)])`.
            eos: put the end of sequence behind each text (not behind token ids): Beaver-Dam and safe-rlhf's models read their score there.

        Raises `UserError` for rows that are empty, too long or hold ids that the model has not got.
        """
        if isinstance(rows, str):
            raise UserError("logits takes a list of rows, not one string: write logits([text]).")
        ids = [self._ids(row, eos) for row in rows]
        check_rows(ids, self.cfg, self.context)
        out, devices = np.zeros((len(ids), len(self.labels)), np.float32), row_devices(self.mesh)
        by_width: dict[int, list[int]] = {}
        for i, row in enumerate(ids):
            by_width.setdefault(min(-(-len(row) // WIDTHS) * WIDTHS, self.context), []).append(i)
        for width, members in sorted(by_width.items()):
            size = max(PROGRAM // width, 1) * devices
            for at in range(0, len(members), size):
                batch = members[at:at + size]
                tokens, lengths = np.zeros((size, width), np.int32), np.ones(size, np.int32)  # unused rows read one token and are dropped
                for slot, i in enumerate(batch):
                    tokens[slot, :len(ids[i])], lengths[slot] = ids[i], len(ids[i])
                made = heads.outputs(self.params, self.cfg, self.head, self.dtype, *put_rows(self.mesh, (tokens, lengths)))
                out[batch] = np.asarray(made)[:len(batch)]
        return out

    def probabilities(self, rows: Sequence[Row], *, eos: bool = False) -> np.ndarray:
        """What transformers' text-classification pipeline makes of `logits`, [len(rows), n] float32.

        Sigmoids of several labels that may hold at once, and of a single one; a softmax of labels that exclude each other; regressions and
        scores (`head.link` "none") as they are, for they are no probabilities.
        """
        logits = self.logits(rows, eos=eos)
        if self.head.link == "none":
            return logits
        if self.head.link == "sigmoid":
            return np.exp(-np.logaddexp(0, -logits))
        raised = np.exp(logits - logits.max(axis=1, keepdims=True))
        return raised / raised.sum(axis=1, keepdims=True)

    def _ids(self, row: Row, eos: bool) -> list[int]:
        if not isinstance(row, str):
            return [int(t) for t in row]
        if eos and self.tokenizer.eos_id is None:
            raise UserError("the tokenizer has no end-of-sequence token, so eos=True cannot be done. Give token ids.")
        return self.tokenizer.encode(row, bos=True) + ([self.tokenizer.eos_id] if eos else [])


def load_scorer(name: str, dtype: str = "auto", mesh: Mesh | None = None) -> Scorer:
    """Load a classifier or score model by hub id or Hugging Face folder; weights go straight to their place on the mesh.

    Args:
        name: for example "PKU-Alignment/beaver-dam-7b".
        dtype: "float32", "bfloat16", or "auto": bfloat16 where the device multiplies it natively.
        mesh: where to put it; by default all devices share out rows.

    Raises `UserError` for a causal language model, and one that lists every missing, unexpected or wrongly shaped tensor.
    """
    preflight.compilation_cache()
    source = resolve.resolve(name)
    if source.kind != "hf":
        raise UserError(f"{name} is no folder in the transformers format, and classifiers and score models are read from those alone.")
    head, cfg, context = heads.read_head(source.path), hf.model_config(source.path), hf.context_length(source.path)
    tokenizer = tokenizer_lib.from_folder(source.path)
    tokenizer_lib.check_vocabulary(tokenizer, cfg.vocab_size, str(source.path))
    mesh = make_mesh() if mesh is None else mesh
    dtype, _ = preflight.choose_dtype(dtype, mesh.devices.flatten().tolist())
    place = placer(param_shardings(heads.abstract_params(head, cfg), mesh))
    params = hf.load_params(source.path, heads.body(cfg), place, dtype, heads.entries(head, cfg))
    return Scorer(params, heads.body(cfg), head, tokenizer, context, dtype, mesh)
