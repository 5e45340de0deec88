"""The stages that need weights: sampling, fine-tuning, measuring, each with its progress line and its cost on the ledger."""
from __future__ import annotations

from typing import Any, Sequence

from isara_jax.checkpoint import Checkpoints
from isara_jax.common import release_memory, write_jsonl
from isara_jax.data.pool import Record
from isara_jax.decode.generate import Completion, Request
from isara_jax.ledger import Ledger
from isara_jax.lm import LM
from isara_jax.methods.setting import Sampler
from isara_jax.models import decoder
from isara_jax.session import Session
from isara_jax.sft import loop as sft_loop

SAMPLES = 4  # held-out (or seed) questions that the model answers before and after each iteration, for people to read


class Work:
    """The models of a run: the starting one, and the parameters of one iteration at a time; others come from their checkpoint."""

    def __init__(self, session: Session, base: LM, ledger: Ledger):
        settings = session.config.generate
        self._base = base.with_engine(slots=settings.slots, chunk=settings.prefill_chunk, key_block=settings.key_block)
        self._held: tuple[int, decoder.Params] | None = None
        self.session, self.ledger = session, ledger
        self.checkpoints = Checkpoints(session.workdir.checkpoints, keep=session.config.keep)

    def lm(self, t: int) -> LM:
        """The model after iteration t; 0 is the starting model."""
        if t == 0:
            return self._base
        if self._held is None or self._held[0] != t:
            self._held = None  # free before loading
            self._held = t, self.checkpoints.restore(t, self._base.abstract_params())
        return self._base.with_params(self._held[1])

    def sampler(self, t: int) -> Sampler:
        """What iteration t generates with: the model of the iteration before."""
        return lambda name, requests: self._generate(name, requests, self.lm(t - 1), t)

    def _generate(self, name: str, requests: Sequence[Request], lm: LM, t: int) -> list[Completion]:
        with self.ledger.stage(name, t) as cost, self.session.console.progress(name, len(requests)) as progress:

            def on_progress(done: int, total: int, prefilled: int, generated: int) -> None:
                cost.set(prefilled=prefilled, generated=generated)
                progress.update(done, tokens=prefilled + generated)

            return lm.run(requests, seed=self.session.config.seed, on_progress=on_progress)

    def fit(self, pairs: Sequence[Record], start_from: int, t: int) -> None:
        """Fine-tune the model of iteration `start_from` on `pairs`; write the loss curve and the parameters of iteration t."""
        session, sft = self.session, self.session.config.sft
        examples = [session.example(r.question, r.answer) for r in pairs]
        if self._held is not None and self._held[0] != start_from:
            self._held = None  # the generator's weights, and what sampling left behind, make room for training
        release_memory()
        lm = self.lm(start_from)
        steps = sft_loop.steps(len(examples), sft)
        with self.ledger.stage("fine-tuning", t) as cost, session.console.progress("fine-tuning", steps) as progress:

            def on_step(step: int, loss: float, tokens: int) -> None:
                cost.add(trained=tokens)
                progress.update(step, loss=f"{loss:.3f}")

            fitted = sft_loop.fit(lm.params, lm.cfg, examples, sft, mesh=lm.mesh, dtype=lm.dtype, seed=session.config.seed,
                                  context=lm.context, checkpoints=self.checkpoints, iteration=t, on_step=on_step)
        curve = [{"step": i, "loss_sum": total, "tokens": count} for i, (total, count) in enumerate(fitted.losses, 1)]
        write_jsonl(session.workdir.iteration(t) / "loss.jsonl", curve)
        with self.ledger.stage("checkpoint", t):
            self.checkpoints.save(t, fitted.params)
        self._held = t, fitted.params

    def measure(self, t: int) -> dict[str, Any]:
        """Held-out loss of the model of iteration t (0: the starting model), and its answers to a few questions without exemplars."""
        session, lm, held_out = self.session, self.lm(t), None
        if session.held_out:
            examples = [session.example(s.question, s.answer) for s in session.held_out]
            with self.ledger.stage("held-out loss", t):
                total, count = sft_loop.held_out(lm.params, lm.cfg, examples, mesh=lm.mesh, dtype=lm.dtype, context=lm.context,
                                                 batch=session.config.sft.batch)
            held_out = round(total / count, 6)
        asked, stops = (session.held_out or session.seed_set.pairs)[:SAMPLES], session.template.stops("answer")
        prompts = [tuple(lm.tokenizer.encode_segments(session.template.training_segments(s.question))) for s in asked]
        answers = self._generate("samples", [Request(p, 0, session.limits.answer, 0.0, 1.0, stops) for p in prompts], lm, t)
        write_jsonl(session.workdir.iteration(t) / "samples.jsonl", [
            {"question": s.question, "reference": s.answer, "answer": c.text.strip(), "finish": c.finish}
            for s, c in zip(asked, answers, strict=True)])
        return {"iteration": t, "held_out": held_out}
