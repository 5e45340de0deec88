"""The stages that need weights: sampling, fine-tuning, measuring, each with its progress line and its cost on the ledger."""
from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Callable, Sequence

from isara_jax.checkpoint import Checkpoints
from isara_jax.common import content_hash, release_memory, write_jsonl
from isara_jax.data.batching import Example
from isara_jax.data.items import Item
from isara_jax.data.pool import Record
from isara_jax.decode.generate import Counts
from isara_jax.decode.requests import Completion, Request
from isara_jax.evals import evaluate, forms, quantities
from isara_jax.ledger import Ledger
from isara_jax.lm import LM
from isara_jax.methods.setting import Sampler, Setting
from isara_jax.models import adapter as adapter_lib
from isara_jax.models import decoder
from isara_jax.models.adapter import Adapter
from isara_jax.session import Session
from isara_jax.sft import loop as sft_loop
from isara_jax.workdir import stage

PROBED = 32  # validation rows that each iteration's generator answers in context
SAMPLES = 4  # held-out (or seed) questions that the model answers before and after each iteration, for people to read


@dataclass(frozen=True)
class Tuned:
    """A fine-tuned model, its loss curve, the learning rate it was made with, and the adapter where one was trained (and merged)."""

    lm: LM
    losses: list[tuple[float, int]]
    rate: float
    adapter: Adapter | None


class Work:
    """The models of a run: the starting one, and the parameters of one iteration at a time; others come from their checkpoint."""

    def __init__(self, session: Session, base: LM, ledger: Ledger):
        self._base = base.with_settings(session.config.generate)
        self._held: tuple[int, decoder.Params] | None = None
        self.session, self.ledger = session, ledger
        self.checkpoints = Checkpoints(session.workdir.checkpoints, keep=session.config.keep)

    def lm(self, t: int) -> LM:
        """The model after iteration t; 0 is the starting model."""
        if t == 0:
            return self._base
        if self._held is None or self._held[0] != t:
            self._held = None  # free before loading
            self._held = t, self.checkpoints.restore(t, self._base.abstract_params("float32"))
        return self._base.with_params(self._held[1])

    def sampler(self, t: int) -> Sampler:
        """What iteration t generates with: the model of the iteration before."""
        return lambda name, requests: self._generate(name, requests, self.lm(t - 1), t)

    def _generate(self, name: str, requests: Sequence[Request], lm: LM, t: int) -> list[Completion]:
        with self.ledger.stage(name, t) as cost, self.session.console.progress(name, len(requests)) as progress:

            def on_progress(done: int, total: int, prefilled: int, generated: int) -> None:
                cost.set(prefilled=prefilled, generated=generated)
                progress.update(done, tokens=prefilled + generated)

            def on_end(counts: Counts) -> None:
                cost.set(shared=counts.shared)
                self.session.console.note(f"{name}: {counts}")

            return lm.run(requests, seed=self.session.config.seed, on_progress=on_progress, on_end=on_end)

    # ---------------------------------------------------------------------------------------------------------------- fine-tuning
    def steps(self, pairs: int) -> int:
        """Optimizer steps of a fine-tuning on so many pairs."""
        return sft_loop.steps(pairs, self.session.config.sft)

    def fit(self, pairs: Sequence[Record], start_from: int, t: int) -> None:
        """Fine-tune the model of iteration `start_from` on `pairs`; write loss curve, adapter and parameters of iteration t."""
        session = self.session
        tuned = self.tune(start_from, [session.example(r.question, r.answer) for r in pairs], self.steps(len(pairs)), str(t), t)
        curve = [{"step": i, "rate": tuned.rate, "loss_sum": total, "tokens": count} for i, (total, count) in enumerate(tuned.losses, 1)]
        write_jsonl(session.workdir.iteration(t) / "loss.jsonl", curve)
        with self.ledger.stage("checkpoint", t):
            if tuned.adapter:
                self._save_adapter(tuned.adapter, start_from, t)
            self.checkpoints.save(t, tuned.lm.params)
        self._held = t, tuned.lm.params

    def _save_adapter(self, adapter: Adapter, start_from: int, t: int) -> None:
        """Write iterations/NN/adapter for the starting model: behind what iteration `start_from` learnt where training went on from it."""
        blueprint, folder = self.session.blueprint, lambda i: self.session.workdir.iteration(i) / "adapter"
        family = adapter_lib.family_of(blueprint.source)
        if start_from:
            adapter = adapter_lib.chain(adapter_lib.load(folder(start_from), blueprint.cfg, family), adapter)
        dropout = self.session.config.sft.lora.dropout
        adapter_lib.save(folder(t), adapter, blueprint.cfg, family, base=blueprint.source.name, dropout=dropout)

    def tune(self, start_from: int, examples: Sequence[Example], n_steps: int, name: str, t: int) -> Tuned:
        """The model of iteration `start_from` fine-tuned for so many steps: the one care that every trained arm gets.

        With `sft.rates` at each of them; the one that does best on validation rows is taken, the first of equals.
        """
        sft, best = self.session.config.sft, None
        if self._held is not None and self._held[0] != start_from:
            self._held = None  # the generator's weights, and what sampling left behind, make room for training
        for rate in sft.rates or (sft.lr,):
            release_memory()
            tuned = self._tune_at(start_from, examples, n_steps, name, t, rate)
            if len(sft.rates) < 2:
                return tuned
            value = self._validate(tuned.lm, f"{name}, rate {rate:g}", t)
            if best is None or value > best[0]:
                best = value, tuned
        self.session.console.note(f"{name}: the learning rate {best[1].rate:g} does best on the validation rows")
        return best[1]

    def _tune_at(self, start_from: int, examples: Sequence[Example], n_steps: int, name: str, t: int, rate: float) -> Tuned:
        session, lm = self.session, self.lm(start_from)
        sft, label = dataclasses.replace(session.config.sft, lr=rate), "fine-tuning" if name.isdecimal() else f"fine-tuning {name}"
        with self.ledger.stage(label, t) as cost, session.console.progress(label, n_steps) as progress:

            def on_step(step: int, loss: float, tokens: int) -> None:
                cost.add(trained=tokens)
                progress.update(step, loss=f"{loss:.3f}")

            fitted = sft_loop.fit(lm.params, lm.cfg, examples, sft, mesh=lm.mesh, dtype=lm.dtype, seed=session.config.seed, context=lm.context,
                                  n_steps=n_steps, checkpoints=self.checkpoints, name=name, on_step=on_step)
        return Tuned(lm.with_params(fitted.params), fitted.losses, rate, fitted.adapter)

    def _validate(self, lm: LM, name: str, t: int) -> float:
        """The quantity of the verdict on validation rows, so that more is better."""
        session, chosen = self.session, self.session.eval_set
        rows = self.evaluate(lm, chosen.validation, session.form, name, t, parts=(chosen.primary.part,), answer_rows=None,
                             new_tokens=session.eval_tokens)
        value = quantities.table(rows)[chosen.primary.name]
        session.console.note(f"{name}: {chosen.primary.label} {value * chosen.primary.scale:.2f} on {len(rows)} validation rows")
        return value * chosen.primary.better

    def identity(self, t: int, pairs_of: Callable[[int], Sequence[Record]]) -> str:
        """Names the parameters of iteration t by what led to them: the starting model and every fine-tuning on the way."""
        start = self.session.resolved["model"]
        if t == 0:
            return start
        pairs = pairs_of(t)
        before = start if self.session.config.sft.init == "base" else self.identity(t - 1, pairs_of)
        return self.tuned_identity(before, [self.session.example(r.question, r.answer) for r in pairs], self.steps(len(pairs)))

    def tuned_identity(self, start: str, examples: Sequence[Example], n_steps: int) -> str:
        """Names what `tune` makes of the parameters named `start`."""
        session, sft = self.session, self.session.config.sft
        made = [sft_loop.identity(session.cfg, examples, dataclasses.replace(sft, lr=rate), n_steps, dtype=session.dtype,
                                  seed=session.config.seed) for rate in sft.rates or (sft.lr,)]
        chosen_on = [session.eval_set.validation_hash, session.eval_set.primary.name] if len(sft.rates) > 1 else []
        return content_hash(start, *made, *chosen_on)

    # ------------------------------------------------------------------------------------------------------------------ measuring
    def evaluate(self, lm: LM, items: Sequence[Item], form: forms.Form, name: str, t: int, *, parts: Sequence[str], answer_rows: int | None,
                 new_tokens: int) -> list[dict[str, Any]]:
        """Evaluation rows of a model in a form, with a progress line and a cost."""
        title = f"evaluate {name}"
        with self.ledger.stage(title, t) as cost, self.session.console.progress(title, len(items)) as progress:

            def on_progress(done: int, prefilled: int, generated: int) -> None:
                cost.set(prefilled=prefilled, generated=generated)
                progress.update(done, tokens=prefilled + generated)

            return evaluate.measure(lm.prepared(), items, form, parts=parts, answer_rows=answer_rows, new_tokens=new_tokens,
                                    seed=self.session.config.seed, on_progress=on_progress)

    def probe(self, setting: Setting, t: int) -> dict[str, float] | None:
        """What iteration t's generator makes of human questions in context, beside their right and wrong references: the answer probe.

        It says what the answers of the pairs that are kept are worth. The rows are validation rows, which are in no table. None where
        there are none with references.
        """
        session = self.session
        items = [i for i in session.eval_set.validation if i.right][:PROBED] if session.eval_set else []
        if not items:
            return None

        def make() -> list[dict[str, Any]]:
            form = session.icl_form(setting.pool.snapshot(t - 1), setting.vectors, "knn")
            with self.ledger.stage("answer probe", t):
                return evaluate.probe(self.lm(t - 1), form, items, setting.vectors, session.eval_tokens)

        return evaluate.probe_summary(stage(session.workdir.iteration(t) / "probe.jsonl", make))

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
