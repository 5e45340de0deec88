"""What a run will do, before it does it: `--dry_run`, the lines at the start of a run, and models side by side (`--plan_models`)."""
from __future__ import annotations

from typing import Any, Sequence

from isara_jax import lm as lm_lib
from isara_jax import preflight
from isara_jax.common import UserError
from isara_jax.config import Config
from isara_jax.console import Console
from isara_jax.data import prompts
from isara_jax.folds import Job
from isara_jax.models import decoder, lora
from isara_jax.session import Session, make_plan, open_session
from isara_jax.sharding import make_mesh

PROMPTS = 3


def show(session: Session, runs: int = 1) -> None:
    """Print three whole question prompts with their token counts, then the plan. Nothing is generated and nothing written.

    Args:
        runs: how many runs like this one the command makes (folds, and the one on all pairs).
    """
    setting = session.setting()
    rows = session.method.question_prompts(setting, 1, session.train_seeds, PROMPTS)
    if not session.embedder.ready:
        session.console.note("retrieval.encoder=own needs the model's weights: another encoder chose the exemplars of these prompts")
    count = lambda segments: len(session.blueprint.tokenizer.encode_segments(segments))
    for number, row in enumerate(rows, 1):
        session.console.note(f"--- prompt {number} of {session.config.generate.requests}: {len(row['exemplars'])} exemplars, "
                             f"{count(row['segments'])} tokens; the model continues after the last character")
        session.console.text(prompts.show(row["segments"]), ids=row["exemplars"])
    session.console.note("--- plan" + (f" (of each of {runs} runs)" if runs > 1 else ""))
    plan(session)


def plan(session: Session) -> None:
    """Say how many requests and tokens an iteration takes, how long all may last here, and what memory is needed against what is there.

    Raises `UserError` when the memory cannot suffice.
    """
    gflops = preflight.measure_speed(session.dtype)
    estimate = make_plan(session, _sampled(session), gflops)
    session.console.note(
        f"an iteration issues {estimate.requests} question requests (prompts of about {estimate.prompt_tokens:.0f} tokens; at most "
        f"{session.limits.question} new tokens a question, {session.limits.answer} an answer): about {estimate.prefilled:,} tokens "
        f"prefilled, {estimate.generated:,} generated; the last of {session.config.stop.iterations} trains on about {estimate.trained:,}")
    if session.eval_set:
        session.console.note(f"the evaluation of {len(session.config.eval.chosen_arms)} arms scores and generates about "
                             f"{estimate.evaluated:,} tokens; arms that another run of the same identity evaluated cost nothing")
    session.console.note(f"estimated {max(estimate.minutes, 1):.0f} min for the run at {gflops:.0f} GFLOP/s measured here "
                         f"({session.dtype}), compiling aside")
    if hint := preflight.accelerator_hint():
        session.console.warn(hint)
    session.console.note(preflight.check_memory(session.cfg, session.dtype, session.mesh.devices.flatten().tolist(), **_sizes(session)))


def compare(config: Config, names: str, parts: Sequence[Job]) -> None:
    """A table of models: what a run with these seeds would take of this machine with each. Nothing is loaded but tokenizers and shapes.

    Args:
        names: what config.model.name may be, with commas between; models that cannot be planned stand there with the reason.
        parts: the runs that the command would make.
    """
    chosen = list(dict.fromkeys(n.strip() for n in names.split(",") if n.strip()))
    if not chosen:
        raise UserError("--plan_models names no model. For example --plan_models=smollm2-135m-instruct,llama-7b.")
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    devices, speeds, rows, notes = mesh.devices.flatten().tolist(), {}, [], []
    first = parts[0]
    with Console(None, sensitive=config.sensitive) as console:
        for name in chosen:
            try:
                dtype, _ = preflight.choose_dtype(config.model.dtype, devices)
                blueprint = lm_lib.describe(name, context=config.model.context, shape_only=True)
                session = open_session(blueprint, first.seed_set, first.eval_set, first.config, first.workdir, console, dtype, mesh)
                speeds[dtype] = speeds.get(dtype) or preflight.measure_speed(dtype)
                rows.append((name, *_planned(session, speeds[dtype], len(parts))))
                notes += [f"{name}: {blueprint.note}"] if blueprint.note else []
            except UserError as e:
                rows.append((name, "-", "-", "-", "-", "-", "no"))
                notes.append(f"{name}: {e}")
        console.table(f"models with {len(first.seed_set.pairs)} seeds of {first.seed_set.path} on this machine",
                      ("model", "parameters", "context", "k", "minutes", "GiB", "fits"), rows)
        for note in notes:
            console.note(note)
        console.note("minutes: of the whole command at the speed measured here, compiling aside; GiB: the most that sampling or training takes, "
                     f"of {preflight.memory_there(devices[0])[0] / preflight.GIB:.1f}")


def _planned(session: Session, gflops: float, runs: int) -> tuple[str, ...]:
    devices = session.mesh.devices.flatten().tolist()
    estimate, there = make_plan(session, _sampled(session), gflops), preflight.memory_there(devices[0])[0]
    needed = max(preflight.memory_in_all(session.cfg, session.dtype, devices, **_sizes(session)).values())
    return (f"{decoder.n_params(session.cfg) / 1e6:,.0f} M", f"{session.blueprint.context:,}", str(session.config.retrieval.k),
            f"{max(runs * estimate.minutes, 1):,.0f}", f"{needed / preflight.GIB:.1f}", "yes" if needed <= there or not there else "no")


def _sampled(session: Session) -> list[dict[str, Any]]:
    """Some question prompts, to count tokens of."""
    return session.method.question_prompts(session.setting(), 1, session.train_seeds, min(len(session.train_seeds), 32))


def _sizes(session: Session) -> dict[str, int]:
    """What memory depends on beside the model."""
    mesh, config = session.mesh, session.config
    return {"fsdp": mesh.shape["fsdp"], "tensor": mesh.shape["tensor"], "slots": config.generate.slots, "batch": config.sft.batch,
            "tokens_per_slot": session.slot_tokens, "train_tokens": session.longest_pair,
            "adapters": lora.n_params(session.cfg, config.sft.lora)}
