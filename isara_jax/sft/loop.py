"""Fine-tuning on pairs, and the loss of pairs under a model."""
from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Any, Callable, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from isara_jax import config
from isara_jax.checkpoint import Checkpoints
from isara_jax.common import UserError, content_hash
from isara_jax.config import Sft
from isara_jax.data import batching
from isara_jax.data.batching import Example
from isara_jax.models import decoder, lora
from isara_jax.models.adapter import Adapter
from isara_jax.models.config import ModelConfig
from isara_jax.sft.optim import learning_rate
from isara_jax.sft.step import Frozen, Metrics, TrainState, abstract_state, eval_step, init_state, train_step
from isara_jax.sharding import put_rows, row_devices


@dataclass(frozen=True)
class FitResult:
    """Fine-tuned parameters and how they came about.

    Attributes:
        params: float32, one entry a layer, placed as the parameters that `fit` was given; adapters are merged into them.
        losses: (summed loss in nats, supervised tokens) of each step.
        steps: optimizer steps.
        tokens: tokens trained on, padding aside, over all steps.
        adapter: what was trained beside the given parameters; None where they were trained themselves.
    """

    params: decoder.Params
    losses: list[tuple[float, int]]
    steps: int
    tokens: int
    adapter: Adapter | None = None


def steps(n: int, sft: Sft) -> int:
    """Optimizer steps of a fine-tuning on n pairs."""
    return sft.epochs * -(-n // sft.batch)


def fit(params: decoder.Params, cfg: ModelConfig, examples: Sequence[Example], sft: Sft, *, mesh: Mesh, dtype: str, seed: int, context: int,
        n_steps: int | None = None, checkpoints: Checkpoints | None = None, name: str = "",
        on_step: Callable[[int, float, int], None] | None = None) -> FitResult:
    """Fine-tune a copy of `params`, or adapters beside them (`sft.lora`), on `examples`; only their answers are predicted.

    An interrupted fit continues where it last saved.

    Args:
        params: one entry a layer; they stay as they are.
        cfg: the model.
        examples: the pairs.
        sft: epochs, batch, rate, adapters and the rest.
        mesh: where rows, parameters and moments are shared out.
        dtype: of products, "float32" or "bfloat16"; what is trained and its moments are float32.
        seed: of the run; with the examples it decides which pairs share a step, and it draws what adapters start from and drop.
        context: most tokens in a pair.
        n_steps: optimizer steps; None takes those of `sft.epochs`. With more than that the epochs go on, with fewer the last is cut.
        checkpoints: keeps the unfinished state every `sft.save_every` steps, and gives it back; None keeps nothing.
        name: of the unfinished state, for example the iteration.
        on_step: called after each step with (steps done, mean loss, tokens of the step).

    Raises `UserError` for pairs that do not fit the context and for a loss that is not finite.
    """
    batching.check(examples, context)
    n_steps = steps(len(examples), sft) if n_steps is None else n_steps
    plan = batching.epochs(examples, sft.batch, -(-n_steps * sft.epochs // steps(len(examples), sft)), seed)[:n_steps]
    shapes = batching.layouts(examples, plan, row_devices(mesh))
    tag = f"{name}-{identity(cfg, examples, sft, n_steps, dtype=dtype, seed=seed)}"
    state, losses = _resume(checkpoints, tag, abstract_state(cfg, sft, mesh)) or (init_state(params, cfg, sft, mesh, seed), [])
    frozen = lora.frozen(params, cfg, mesh, dtype) if sft.lora.rank else None
    step = train_step(cfg, sft, mesh, dtype)

    for i in range(len(losses), len(plan)):
        batch = batching.collate([examples[j] for j in plan[i]], *shapes[i])
        beside = Frozen(frozen, lora.dropout_key(seed, i)) if frozen else None
        state, metrics = step(state, put_rows(mesh, batch), np.float32(learning_rate(sft, i, len(plan))), beside)
        losses.append(_finite(jax.device_get(metrics), i + 1, sft))
        if on_step:
            on_step(i + 1, losses[-1][0] / losses[-1][1], int(np.count_nonzero(batch.segments)))
        if checkpoints and (i + 1) % sft.save_every == 0 and i + 1 < len(plan):
            checkpoints.save_unfinished(tag, state, {"losses": losses})

    frozen = beside = None  # makes room for the result
    tokens = sum(examples[j].inputs for members in plan for j in members)
    if sft.lora.rank:
        adapter = lora.finished(state.params, cfg, sft.lora)
        return FitResult(lora.merge(jax.tree.map(lambda x: x.astype(np.float32), params), adapter), losses, len(plan), tokens, adapter)
    return FitResult(_unstack(state.params, cfg, jax.tree.map(lambda x: x.sharding, params)), losses, len(plan), tokens)


def identity(cfg: ModelConfig, examples: Sequence[Example], sft: Sft, n_steps: int, *, dtype: str, seed: int) -> str:
    """Sixteen hex digits that name a fine-tuning but for the parameters it starts from: no other continues from its state."""
    rows = json.dumps([[e.prompt_length, *e.tokens] for e in examples])
    said = ("epochs", "rates", "data", "init") + (() if sft.lora.rank else ("lora",))  # by the others, or nothing
    settings = {k: v for k, v in config.identity(sft).items() if k not in said}
    return content_hash(json.dumps(dataclasses.asdict(cfg)), json.dumps(settings), rows, str(n_steps), dtype, str(seed))


def held_out(params: decoder.Params, cfg: ModelConfig, examples: Sequence[Example], *, mesh: Mesh, dtype: str, context: int,
             batch: int) -> tuple[float, int]:
    """(summed loss in nats, number) of the supervised tokens of `examples`."""
    batching.check(examples, context)
    plan = batching.in_order(len(examples), batch)
    total, count, step = 0.0, 0, eval_step(cfg, mesh, dtype)
    for members, shape in zip(plan, batching.layouts(examples, plan, row_devices(mesh)), strict=True):
        loss, supervised = jax.device_get(step(params, put_rows(mesh, batching.collate([examples[j] for j in members], *shape))))
        total, count = total + float(loss), count + int(supervised)
    return total, count


# ---------------------------------------------------------------------------------------------------------------------------------
def _resume(checkpoints: Checkpoints | None, tag: str, like: TrainState) -> tuple[TrainState, list[tuple[float, int]]] | None:
    found = checkpoints.restore_unfinished(tag, like) if checkpoints else None
    return found and (found[0], [(total, count) for total, count in found[1]["losses"]])


def _finite(metrics: Metrics, step: int, sft: Sft) -> tuple[float, int]:
    total, count, norm = float(metrics.loss_sum), int(metrics.count), float(metrics.grad_norm)
    if not math.isfinite(total) or not math.isfinite(norm):
        raise UserError(f"fine-tuning left the finite numbers at step {step}: loss {total / count}, gradient norm {norm}. Lower "
                        f"--config.sft.lr (now {sft.lr}), or use --config.model.dtype=float32, with a new workdir.")
    return total, count


def _unstack(stacked: decoder.Params, cfg: ModelConfig, places: Any) -> decoder.Params:
    return jax.jit(lambda p: decoder.unstack_layers(p, cfg.n_layers), out_shardings=places)(stacked)
