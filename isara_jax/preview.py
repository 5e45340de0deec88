"""What a run will do, before it does it: `--dry_run` and the lines at the start of a run."""
from __future__ import annotations

from isara_jax import preflight
from isara_jax.data import prompts
from isara_jax.session import Session, make_plan

PROMPTS = 3


def show(session: Session) -> None:
    """Print three whole question prompts with their token counts, then the plan. Nothing is generated and nothing written."""
    setting = session.setting()
    rows = session.method.question_prompts(setting, 1, session.train_seeds, PROMPTS)
    count = lambda segments: len(session.blueprint.tokenizer.encode_segments(segments))
    for number, row in enumerate(rows, 1):
        session.console.note(f"--- prompt {number} of {session.config.generate.requests}: {len(row['exemplars'])} exemplars, "
                             f"{count(row['segments'])} tokens; the model continues after the last character")
        session.console.text(prompts.show(row["segments"]), ids=row["exemplars"])
    session.console.note("--- plan")
    plan(session)


def plan(session: Session) -> None:
    """Say how many requests and tokens an iteration takes, how long all may last here, and what memory is needed against what is there.

    Raises `UserError` when the memory cannot suffice.
    """
    setting = session.setting()
    rows = session.method.question_prompts(setting, 1, session.train_seeds, min(len(session.train_seeds), 32))
    gflops = preflight.measure_speed(session.dtype)
    estimate = make_plan(session, rows, gflops)
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
    mesh, config = session.mesh, session.config
    session.console.note(preflight.check_memory(
        session.cfg, session.dtype, mesh.devices.flatten().tolist(), fsdp=mesh.shape["fsdp"], tensor=mesh.shape["tensor"],
        slots=config.generate.slots, tokens_per_slot=_longest(session), batch=config.sft.batch, train_tokens=_longest_pair(session)))


def _longest(session: Session) -> int:
    """Tokens a decode slot may hold: a prompt of k of the longest pairs and an answer."""
    longest = _longest_pair(session)
    return min(session.blueprint.context, (session.config.retrieval.k + 1) * longest + session.limits.answer)


def _longest_pair(session: Session) -> int:
    return max(len(session.example(s.question, s.answer).tokens) for s in session.seed_set.pairs)
