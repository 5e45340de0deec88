"""The arms of a comparison: what each is trained on and shown, evaluated once on the same rows.

    base          the starting model, in the form that is best for it on validation rows
    icl_random    the starting model with random seeds in its prompt
    icl_knn       … with the nearest seeds in its prompt
    sft_epochs    fine-tuned on the seeds, as many epochs as ISARA
    sft_steps     fine-tuned on the seeds, as many steps as ISARA's last iteration
    isara         ISARA's last iteration (isara_each: every one)
    isara_icl_knn … with the nearest seeds in its prompt
    shuffled      control: fine-tuned on ISARA's own pairs with the answers shuffled among the questions; form without content
    off_domain    control: fine-tuned on pairs of another domain

Every fine-tuning starts from the starting model, sees the same held-out seeds as little, and is selected in the same way (`Work.tune`).
The controls and `sft_steps` take as many optimizer steps as led to the model that is judged.
"""
from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Callable, Iterator, Sequence

import numpy as np

from isara_jax import evalset, kept
from isara_jax.common import address
from isara_jax.data import splits
from isara_jax.data.items import Item
from isara_jax.data.pool import Record
from isara_jax.evals import forms, quantities
from isara_jax.evals.forms import Form
from isara_jax.lm import LM
from isara_jax.methods.setting import Setting
from isara_jax.session import Session, record
from isara_jax.work import Work

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Weights:
    """Parameters to evaluate: their identity, known before they are made, and the model with them."""

    identity: str
    lm: Callable[[], LM]


@dataclass(frozen=True)
class Result:
    """One arm in one form on the rows of the comparison.

    `judged` marks the form that verdicts look at; `file` is the name of the rows' file in `evaluation/SPLIT/`.
    """

    arm: str
    form: str
    rows: Rows
    judged: bool
    file: str


class Arms:
    """The arms of a finished loop: `iterations` have parameters, `t` is the one that is judged."""

    def __init__(self, session: Session, setting: Setting, work: Work, iterations: Sequence[int], t: int):
        self.session, self.work, self.iterations, self.t = session, work, list(iterations), t
        self._pairs = lambda iteration: session.method.training_pairs(setting, iteration)
        self._vectors = setting.vectors
        self._settings, self._set = session.config.eval, session.eval_set
        self._parts = evalset.parts(self._set.rows, self._settings.answer_rows)

    # ------------------------------------------------------------------------------------------------------------------ evaluate
    def results(self) -> Iterator[Result]:
        """Every chosen arm in its forms, in the order of the table; the weights of one arm at a time are in memory."""
        for arm in self._settings.chosen_arms:
            if arm == "isara_each":
                for t in self.iterations:
                    if t != self.t or "isara" not in self._settings.chosen_arms:
                        yield from self._in_forms(f"isara_{t}", self._isara(t), self.session.form)
            else:
                yield from self._in_forms(arm, *self._arm(arm))

    def _arm(self, arm: str) -> tuple[Weights, Form]:
        session, form, seeds = self.session, self.session.form, self.session.train_seeds
        base = Weights(session.resolved["model"], lambda: self.work.lm(0))
        made = {
            "base": lambda: (base, self._best_form(base)),
            "icl_random": lambda: (base, self._icl("random")),
            "icl_knn": lambda: (base, self._icl("knn")),
            "sft_epochs": lambda: (self._tuned(arm, seeds, self.work.steps(len(seeds))), form),
            "sft_steps": lambda: (self._tuned(arm, seeds, self._steps()), form),
            "isara": lambda: (self._isara(self.t), form),
            "isara_icl_knn": lambda: (self._isara(self.t), self._icl("knn")),
            "shuffled": lambda: (self._tuned(arm, shuffle(self._pairs(self.t), session.config.seed), self._steps()), form),
            "off_domain": lambda: (self._tuned(arm, self._off_domain(), self._steps()), form),
        }
        return made[arm]()

    def _in_forms(self, arm: str, weights: Weights, form: Form) -> Iterator[Result]:
        """The arm in the form that verdicts look at, and beside it in others.

        The starting model is also shown in the run's own form where another is better for it; and where all forms are asked for every arm
        in the published primer's, in which in-context arms have exemplars of as many tokens in the primer's place.
        """
        beside = [self.session.form] if arm == "base" else []
        if self._settings.forms == "all" and "mc" in self._parts:
            strategy = {"icl_random": "random", "icl_knn": "knn", "isara_icl_knn": "knn"}.get(arm)
            beside.append(self._icl(strategy, instead_of_primer=True) if strategy else primer(self.session))
        shown = [form, *(other for other in beside if other.name != form.name)]
        for i, one in enumerate(shown):
            rows, file = self._rows(arm, weights, one, self._set.rows, self._set.split)
            yield Result(arm, one.name, rows, judged=i == 0, file=file)

    def _rows(self, arm: str, weights: Weights, form: Form, items: Sequence[Item], split: str) -> tuple[Rows, str]:
        """The evaluation rows of weights in a form, from where they were kept or measured now, and the name of their file."""
        session, settings = self.session, self._settings
        chosen = self._parts if split == settings.split else (self._set.primary.part,)
        answers, tokens = (settings.answer_rows, session.eval_tokens) if "answers" in chosen else (0, 0)
        key = kept.key(weights.identity, form.hash, evalset.rows_hash(items), self.work.lm(0), [chosen, answers, tokens])

        def make() -> Rows:
            return self.work.evaluate(weights.lm(), items, form, f"{arm} ({form.name})", self.t, parts=chosen, answer_rows=answers,
                                      new_tokens=tokens)

        path = kept.path(session.workdir.evaluation / split, f"{arm}.{form.name}", key)
        return kept.rows(path, key, make, reuse=settings.reuse), path.name

    # -------------------------------------------------------------------------------------------------------------------- forms
    def _best_form(self, base: Weights) -> Form:
        """The form in which the starting model does best on rows it was not trained on: its own, chat, or (with choices) the primer."""
        session, quantity = self.session, self._set.primary
        candidates = [session.form]
        if session.config.model.form == "plain" and session.blueprint.tokenizer.chat_template is not None:
            candidates.append(forms.bare(chat(session), session.room))
        if "mc" in self._parts:
            candidates.append(primer(session))
        if len(candidates) == 1 or not self._set.unseen:
            return candidates[0]
        values = [quantities.table(self._rows("base", base, form, self._set.unseen, "validation")[0]).get(quantity.name)
                  for form in candidates]
        if None in values:
            return candidates[0]
        best = max(range(len(values)), key=lambda i: (quantity.better * values[i], -i))
        digits = 1 if quantity.scale == 100 else 3
        shown = ", ".join(f"{form.name} {value * quantity.scale:.{digits}f}" for form, value in zip(candidates, values))
        session.console.note(f"the starting model is compared in the form {candidates[best].name}: {quantity.label} on "
                             f"{len(self._set.unseen)} {'validation rows' if self._set.unseen == self._set.validation else 'seeds'} is {shown}")
        return candidates[best]

    def _icl(self, strategy: str, *, instead_of_primer: bool = False) -> Form:
        form = self.session.icl_form(self.session.train_seeds, self._vectors, strategy)
        return forms.at_equal_tokens(form, primer(self.session)) if instead_of_primer else form

    # ------------------------------------------------------------------------------------------------------------------ weights
    def _isara(self, t: int) -> Weights:
        return Weights(self.work.identity(t, self._pairs), lambda: self.work.lm(t))

    def _steps(self) -> int:
        """Optimizer steps that led from the starting model to the judged one."""
        first = self.t if self.session.config.sft.init == "base" else 1
        return sum(self.work.steps(len(self._pairs(t))) for t in range(first, self.t + 1))

    def _tuned(self, arm: str, pairs: Sequence[Record], steps: int) -> Weights:
        """The starting model fine-tuned on `pairs`; trained only when something is to be measured with it."""
        examples = [self.session.example(r.question, r.answer) for r in pairs]
        made: list[LM] = []

        def lm() -> LM:
            if not made:
                made.append(self.work.tune(0, examples, steps, arm, self.t).lm)
                self.work.checkpoints.clear_unfinished()  # of an iteration it goes when the parameters are saved; these are not
            return made[0]

        return Weights(self.work.tuned_identity(self.session.resolved["model"], examples, steps), lm)

    def _off_domain(self) -> list[Record]:
        pairs = evalset.seeds_of(self.session.config, self._settings.off_domain)
        pairs, left_out = splits.without_leaks(pairs, self._set.guarded)
        if left_out:
            self.session.console.note(f"{left_out} off-domain pair(s) are near evaluation rows and are left out")
        return [record(s) for s in pairs.pairs]


# ---------------------------------------------------------------------------------------------------------------------------------
def primer(session: Session) -> Form:
    """TruthfulQA's six published examples before the question, as they were published: in the plain form."""
    return forms.primer(session.room)


def chat(session: Session) -> Any:
    """The model's own chat template."""
    return dataclasses.replace(session.template, form="chat", render_chat=session.blueprint.tokenizer.render_chat)


def shuffle(pairs: Sequence[Record], seed: int) -> list[Record]:
    """The pairs with each answer given to another question: around one circle through all of them in a random order."""
    words = np.random.Philox(key=address("shuffled answers", seed)).random_raw(len(pairs))
    order = np.argsort(words, kind="stable")
    answers = dict(zip(order.tolist(), np.roll(order, 1).tolist()))
    return [dataclasses.replace(r, answer=pairs[answers[i]].answer) for i, r in enumerate(pairs)]
