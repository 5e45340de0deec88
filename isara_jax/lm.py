"""`load` and the `LM` that people hold: logits, score, generate.

    lm = isara_jax.load("smollm2-135m-instruct")
    lm.generate(["Q: Why is the sky blue?\\nA:"], max_new_tokens=32, temperature=0.7, top_p=0.95, seed=0, stop=["\\nQ:"])
"""
from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from isara_jax import config, preflight
from isara_jax.common import UserError, address
from isara_jax.data import gguf_tokenizer
from isara_jax.data import tokenizer as tokenizer_lib
from isara_jax.data.tokenizer import ByteTokenizer, Tokenizer
from isara_jax.decode import recipes
from isara_jax.decode.engine import EngineConfig, prepare
from isara_jax.decode.generate import Counts, Sampler
from isara_jax.decode.requests import Completion, Request, check_sampling
from isara_jax.decode.score import score
from isara_jax.models import adapter as adapter_lib
from isara_jax.models import assets, decoder, gguf, heads, hf, lora, published, resolve
from isara_jax.models.config import ModelConfig
from isara_jax.models.layers import causal_attention
from isara_jax.models.place import placer
from isara_jax.sharding import ShardingConfig, make_mesh, param_shardings, put_rows, row_devices

WIDTHS = 64   # rows of tokens are padded to a multiple of this, so that few programs are compiled
STAND_IN = "smollm2-135m-instruct"  # whose tokenizer counts for a published model that is not on this machine


@dataclass(frozen=True)
class Blueprint:
    """All that is known of a model before its weights are read."""

    source: resolve.Source
    cfg: ModelConfig
    context: int                    # longest sequence in tokens
    tokenizer: Tokenizer | ByteTokenizer
    note: str = ""                  # what stands in for the model's own where its files are not here; "" where nothing does


@dataclass(frozen=True)
class Sample:
    """One generated continuation: its text (without the stop string), its token ids (without the EOS) and why it ended."""

    text: str
    ids: list[int]
    finish: str                     # stop, eos, length, or nan where the model's logits were no numbers
    log_p: list[float] | None = None  # of each token, under the model at temperature 1 without filters, where it was asked for


@dataclass(frozen=True)
class LM:
    """A language model with its tokenizer, placed on a mesh. Nothing here changes it; `with_params` makes another."""

    params: decoder.Params
    blueprint: Blueprint
    dtype: str                      # float32 or bfloat16: the arithmetic of sampling and scoring
    mesh: Mesh
    engine: EngineConfig
    as_stored: bool = False         # whether the weights are those of the model's files

    @property
    def cfg(self) -> ModelConfig:
        return self.blueprint.cfg

    @property
    def tokenizer(self) -> Tokenizer | ByteTokenizer:
        return self.blueprint.tokenizer

    @property
    def context(self) -> int:
        return self.blueprint.context

    @property
    def instruction_tuned(self) -> bool:
        """Whether the model ships a chat template, which base models do not."""
        return self.tokenizer.chat_template is not None

    def with_params(self, params: decoder.Params) -> LM:
        """The same model with other weights."""
        return dataclasses.replace(self, params=params, as_stored=False)

    def masters(self) -> LM:
        """The same model with its weights in float32, as fine-tuning starts from them; read again where this one holds them rounded."""
        if not self.as_stored or all(x.dtype == jnp.float32 for x in jax.tree.leaves(self.params)):
            return self
        again = load(self.blueprint.source.name, self.dtype, mesh=self.mesh, blueprint=self.blueprint, weights="float32")
        return dataclasses.replace(again, engine=self.engine)

    def prepared(self) -> LM:
        """The same model with its weights as sampling and scoring use them, so that many calls cast them once instead of once a call.

        Where that makes a copy (bfloat16), it lives as long as what is returned, and is not for training or saving.
        """
        return self.with_params(self._compute_params())

    def with_settings(self, settings: config.Generate) -> LM:
        """The same model sampled as a run's config says."""
        return self.with_engine(**_engine_settings(settings, self.cfg, self.dtype, self.mesh))

    def with_engine(self, **changes: Any) -> LM:
        """The same model sampled with another engine shape (slots, chunk, key_block)."""
        return dataclasses.replace(self, engine=dataclasses.replace(self.engine, **changes))

    def abstract_params(self, dtype: str = "") -> decoder.Params:
        """The shapes, dtypes (or one `dtype` for all) and places of the weights, as a checkpoint is restored to."""
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype or x.dtype, sharding=x.sharding), self.params)

    # ------------------------------------------------------------------------------------------------------------------------
    def logits(self, token_ids: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Next-token logits at every position: rows of T ids to float32 arrays [T, V]. Needs no tokenizer."""
        rows = [list(r) for r in token_ids]
        check_rows(rows, self.cfg, self.context)
        params, out = self._compute_params(), [np.zeros((0, self.cfg.vocab_size), np.float32)] * len(rows)
        size = row_devices(self.mesh)
        for batch in _batches([len(r) for r in rows], size):
            tokens = put_rows(self.mesh, _pad([rows[i] for i in batch], size))
            made = np.asarray(_full_logits(params, self.cfg, self.dtype, tokens))
            for i, values in zip(batch, made):
                out[i] = values[:len(rows[i])]
        return out

    def score(self, prompts: Sequence[str | Sequence[int]], continuations: Sequence[str | Sequence[int]]) -> list[float]:
        """Summed log-likelihood (natural log) of each continuation after its prompt.

        Strings are split into tokens as lm-evaluation-harness does (`Tokenizer.encode_pair`); token ids are taken as they are. What pairs
        have in common is computed once, so give all pairs in one call.
        """
        if len(prompts) != len(continuations):
            raise UserError(f"score got {len(prompts)} prompts and {len(continuations)} continuations; give one for one.")
        pairs = [self._split(i, p, c) for i, (p, c) in enumerate(zip(prompts, continuations))]
        check_rows([p + c for p, c in pairs], self.cfg, self.context)
        return score(self._compute_params(), self.cfg, self.dtype, self.mesh, pairs)

    def generate(self, prompts: Sequence[str | Sequence[int]], *, max_new_tokens: int = 64, min_new_tokens: int = 0, temperature: float = 0.0,
                 top_p: float = 1.0, top_k: int = 0, repetition_penalty: float = 1.0, n: int = 1, seed: int | None = None,
                 stop: Sequence[str] = (), stop_ids: Sequence[int] = (), ignore_eos: bool = False, log_p: bool = False) -> list[list[Sample]]:
        """Continue each prompt n times; prompts are strings or token ids and no template is applied.

        Special tokens spelled in a string are plain text; give token ids to use them. A draw depends on (seed, prompt, how often
        this prompt occurred before it in this call, sample, position) and on nothing else, so a call repeated gives the same. Where
        the context leaves less room than `max_new_tokens`, the text ends there (finish "length"). What prompts have in common at their
        beginning, and the prompt of n samples, is computed once. The other arguments are those of `decode.requests.Request`.
        Raises `UserError` when temperature > 0 without a seed, for prompts that are empty or do not fit the context, and where every
        text ended because the model's logits are no numbers.
        """
        if isinstance(prompts, str):
            raise UserError("generate takes a list of prompts, not one string: write generate([prompt]).")
        if n < 1:
            raise UserError(f"generate: n={n} is out of range: at least 1 sample a prompt.")
        check_sampling("generate", max_new_tokens=max_new_tokens, min_new_tokens=min_new_tokens, temperature=temperature, top_p=top_p,
                       top_k=top_k, repetition_penalty=repetition_penalty, stop=stop, seed=seed)
        if temperature > 0 and seed is None:
            raise UserError(f"temperature={temperature} draws at random: give seed=NUMBER (any), or temperature=0 for greedy text.")
        if stop:
            self.tokenizer.encode(stop[0])  # without a tokenizer there is no text to find them in
        seen: dict[tuple[int, ...], int] = {}
        requests = []
        for i, prompt in enumerate(prompts):
            ids = tuple(self._encode(i, prompt))
            occurrence = seen[ids] = seen.get(ids, -1) + 1
            digest = ",".join(map(str, ids))
            requests += [Request(ids, address("generate", digest, occurrence, j), max_new_tokens, temperature, top_p, tuple(stop), ignore_eos,
                                 top_k, repetition_penalty, min_new_tokens, tuple(stop_ids), log_p=log_p) for j in range(n)]
        made = self.run(requests, seed=seed or 0)
        samples = [Sample(c.text if c.text is not None else self.tokenizer.decode(c.ids), c.ids, c.finish, c.log_p) for c in made]
        return [samples[i * n:(i + 1) * n] for i in range(len(prompts))]

    def run(self, requests: Sequence[Request], *, seed: int, on_progress=None, on_text=None, sampler: Sampler | None = None,
            on_end: Callable[[Counts], None] | None = None) -> list[Completion]:
        """Completions of prepared requests, in their order: what `generate` and the loop are made of.

        Args:
            on_progress, on_text: called while they are drawn (`decode.generate.Sampler.stream`).
            sampler: one of `sampler()` that stays from call to call, and with it the beginnings of prompts that it knows.
            on_end: called with what the call did.

        Raises `UserError` where keys and values of all slots would not fit the memory that is free, with the number of slots that would,
        and where every text ended because the model's logits are no numbers.
        """
        sampler = sampler or self.sampler()
        sampler.check(requests)
        self._check_room(sampler, requests)
        made = list(sampler.stream(requests, seed=seed, on_progress=on_progress, on_text=on_text))
        if on_end:
            on_end(sampler.counts)
        if made and all(c.finish == "nan" for c in made):
            raise UserError(f"the model's logits are no numbers (NaN or infinite) for every one of {len(made)} prompts: its weights are damaged, "
                            "or fine-tuning diverged. Check the model's files, or lower --config.sft.lr.")
        return made

    def sampler(self, room: int = 0) -> Sampler:
        """A sampler of these weights that remembers the beginnings of prompts from one `run` to the next, as the turns of a chat need.

        room: tokens that it is to hold at least, so that later calls need no larger pool.
        """
        return Sampler(self._compute_params(), self.cfg, self.engine, self.mesh, stop_ids=self.tokenizer.stop_ids, context=self.context,
                       decode=self.tokenizer.decode, room=room)

    # ------------------------------------------------------------------------------------------------------------------------
    def _check_room(self, sampler: Sampler, requests: Sequence[Request]) -> None:
        device = self.mesh.devices.flat[0]
        free = preflight.memory_there(device)[1]
        devices = row_devices(self.mesh) if device.platform == "cpu" else 1  # these share one memory
        needed = lambda slots: devices * sampler.bytes_needed(requests, slots)
        slots = self.engine.slots
        if free and needed(slots) > free:
            fits = slots
            while fits > 2 and needed(fits) > free / 2:
                fits = max(2, fits // 2)
            raise UserError(f"{slots} slots for {len(requests)} prompts need {needed(slots) / 2**30:.1f} GiB for keys and values, and "
                            f"{free / 2**30:.1f} GiB are free. Use lm.with_engine(slots={fits}) or --config.generate.slots, or shorter prompts.")

    def _compute_params(self) -> decoder.Params:
        return prepare(self.params, self.dtype, self.mesh, stacked=recipes.is_scanned(self.engine.attention))

    def _encode(self, i: int, prompt: str | Sequence[int]) -> list[int]:
        ids = self.tokenizer.encode(prompt, bos=True) if isinstance(prompt, str) else [int(t) for t in prompt]
        if not ids:
            raise UserError(f"prompt {i} is empty: a model needs at least one token to continue.")
        return ids

    def _split(self, i: int, prompt: str | Sequence[int], continuation: str | Sequence[int]) -> tuple[list[int], list[int]]:
        if isinstance(prompt, str) != isinstance(continuation, str):
            raise UserError(f"pair {i}: prompt and continuation must both be strings or both be token ids.")
        pair = self.tokenizer.encode_pair(prompt, continuation) if isinstance(prompt, str) else (list(prompt), list(continuation))
        if not pair[0] or not pair[1]:
            raise UserError(f"pair {i}: the {'prompt' if not pair[0] else 'continuation'} has no tokens, so there is nothing to score.")
        return pair


# ---------------------------------------------------------------------------------------------------------------------------------
def describe(name: str, *, context: int = 0, shape_only: bool = False) -> Blueprint:
    """Find a model and read everything but its weights. `context` shortens its context; 0 keeps the model's own.

    With `shape_only` a published model whose files are not on this machine is described by its shape, and another model's tokenizer
    stands in for its own: enough to plan a run, nothing that can be loaded. `Blueprint.note` says so.
    """
    source, note = resolve.resolve(name, shape_only=shape_only), ""
    if source.kind == "tiny":
        cfg, own, tokenizer = resolve.TINY_CONFIG, resolve.TINY_CONTEXT, ByteTokenizer()
    elif source.kind == "gguf":
        cfg, own = gguf.model_config(source.path), gguf.context_length(source.path)
        tokenizer = gguf_tokenizer.from_gguf(functools.partial(gguf.metadata, source.path), source.path)
    elif source.kind == "shape":
        shape, (tokenizer, counter) = published.find(name), _stand_in()
        cfg, own = shape.model_config(), shape.context
        note = (f"{name} (hub id {shape.hub}) is not on this machine: its shape is the published one, and token counts are estimates made "
                f"with {counter}")
    else:
        heads.check_language_model(source.path)
        cfg, own, tokenizer = hf.model_config(source.path), hf.context_length(source.path), tokenizer_lib.from_folder(source.path)
    if context > own:
        raise UserError(f"config.model.context={context} is longer than the {own} tokens of {name}; set it to at most {own}, or 0.")
    if source.kind != "shape":
        tokenizer_lib.check_vocabulary(tokenizer, cfg.vocab_size, name)
    return Blueprint(source, cfg, context or own, tokenizer, note)


def _stand_in() -> tuple[Tokenizer | ByteTokenizer, str]:
    """(tokenizer, what it is) to count tokens with: an embedded model's where that is on this machine, else bytes. Nothing is fetched.

    It has no chat template, as the published models have none.
    """
    if folder := assets.find(STAND_IN):
        file = next(folder.glob("*.gguf"))
        tokenizer = gguf_tokenizer.from_gguf(functools.partial(gguf.metadata, file), file)
        tokenizer.chat_template = None
        return tokenizer, f"the tokenizer of {STAND_IN}"
    return ByteTokenizer(), "bytes for tokens, which are about four times as many"


def load(name: str, dtype: str = "auto", *, mesh: Mesh | None = None, blueprint: Blueprint | None = None, weights: str = "",
         adapter: str | Path = "") -> LM:
    """Load a model by embedded name, hub id, HF folder or GGUF file; weights go straight to their place on the mesh, tensor by tensor.

    Args:
        name: for example "smollm2-135m-instruct"; what it lacks is fetched.
        dtype: "float32", "bfloat16", or "auto": bfloat16 where the device multiplies it natively.
        mesh: where to put it; by default all devices share out rows.
        blueprint: the result of `describe(name)`, when it is at hand already.
        weights: the dtype in which weights are held, `dtype` by default. "float32" is what fine-tuning starts from.
        adapter: the folder of a LoRA adapter in PEFT's format, to be merged into the weights.
    """
    preflight.compilation_cache()
    blueprint = blueprint or describe(name)
    mesh = make_mesh() if mesh is None else mesh
    dtype, _ = preflight.choose_dtype(dtype, mesh.devices.flatten().tolist())
    cfg, source = blueprint.cfg, blueprint.source
    shardings = param_shardings(decoder.abstract_params(cfg), mesh)
    if source.kind == "tiny":
        params = jax.device_put(jax.tree.map(lambda x: x.astype(weights or dtype), decoder.init_params(cfg, seed=0)), shardings)
    else:
        reader = gguf if source.kind == "gguf" else hf
        params = reader.load_params(source.path, cfg, placer(shardings), weights or dtype)
    if adapter:
        params = lora.apply_folder(params, Path(adapter), cfg, adapter_lib.family_of(source))
    return LM(params, blueprint, dtype, mesh, default_engine(blueprint.cfg, dtype, mesh), as_stored=not adapter)


def default_engine(cfg: ModelConfig, dtype: str, mesh: Mesh) -> EngineConfig:
    """How a model is sampled where nobody says otherwise."""
    return EngineConfig(dtype, attention=recipes.choose("auto", mesh.devices.flat[0], dtype, cfg))


def _engine_settings(settings: config.Generate, cfg: ModelConfig, dtype: str, mesh: Mesh) -> dict[str, Any]:
    return {"slots": settings.slots, "chunk": settings.prefill_chunk, "key_block": settings.key_block,
            "attention": recipes.choose(settings.attention, mesh.devices.flat[0], dtype, cfg)}


def compile_ahead(blueprint: Blueprint, dtype: str, mesh: Mesh, settings: config.Generate, requests: Sequence[Request]) -> str:
    """Start to compile, in the background, what sampling these requests takes, before there are weights. Returns what that is, in words."""
    engine = EngineConfig(dtype, **_engine_settings(settings, blueprint.cfg, dtype, mesh))
    params = jax.eval_shape(functools.partial(prepare, dtype=dtype, mesh=mesh, stacked=recipes.is_scanned(engine.attention)),
                            decoder.abstract_params(blueprint.cfg))
    places = param_shardings(params, mesh, ShardingConfig().for_sampling())
    params = jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), params, places)
    return Sampler(params, blueprint.cfg, engine, mesh, stop_ids=blueprint.tokenizer.stop_ids, context=blueprint.context).compile(requests)


# ---------------------------------------------------------------------------------------------------------------------------------
def check_rows(rows: Sequence[Sequence[int]], cfg: ModelConfig, context: int) -> None:
    """Raise `UserError` for the first row of token ids that is empty, longer than the context, or holds an id outside the vocabulary."""
    for i, row in enumerate(rows):
        if not 0 < len(row) <= context:
            raise UserError(f"row {i} has {len(row)} tokens; this model takes 1 to {context}.")
        if min(row) < 0 or max(row) >= cfg.vocab_size:
            bad = min(row) if min(row) < 0 else max(row)
            raise UserError(f"row {i} holds token id {bad}; ids go from 0 to {cfg.vocab_size - 1}.")


def _batches(lengths: list[int], size: int) -> list[list[int]]:
    """Row numbers in groups of at most `size`, rows of similar length together."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    return [order[i:i + size] for i in range(0, len(order), size)]


def _pad(rows: list[list[int]], size: int) -> np.ndarray:
    """Rows right-padded to a common width [size, T]; rows beyond the last stay zero. Nothing reads the padding: lengths rule."""
    width = -(-max(map(len, rows)) // WIDTHS) * WIDTHS
    tokens = np.zeros((size, width), np.int32)
    for i, row in enumerate(rows):
        tokens[i, :len(row)] = row
    return tokens


@functools.partial(jax.jit, static_argnums=(1, 2))
def _full_logits(params, cfg, dtype, tokens_BT):
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    hidden_BTD, _ = decoder.forward(params, cfg, tokens_BT, positions_BT, causal_attention(jnp.dtype(dtype)))
    return decoder.lm_head(params, cfg, hidden_BTD)
