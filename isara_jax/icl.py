"""A model that answers behind the pairs nearest to each question (ICL-kNN): the arm `icl_knn` of a run, to be used without training.

    lm = isara_jax.load("smollm2-135m-instruct")
    asked = isara_jax.icl_knn(lm, "runs/first")
    asked.answer(["Why is the sky blue?"])[0].text

Prompts, and greedy answers with the engine of the run, are those of its evaluation. A form without pairs is served in the same way.
"""
from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Sequence

from isara_jax import trained
from isara_jax.common import UserError, address
from isara_jax.config import Config, Data, Retrieval, from_dict
from isara_jax.data import seeds
from isara_jax.data.pool import Pool
from isara_jax.data.prompts import Pair, Segments, Template, tidy
from isara_jax.decode.requests import Request
from isara_jax.evals import forms
from isara_jax.evals.forms import Form
from isara_jax.lm import LM
from isara_jax.retrieval.store import VectorStore
from isara_jax.session import derived_limit, make_embedder, make_template, record


@dataclass(frozen=True)
class Prompt:
    """What is asked for a question: the prompt, the pairs in it (nearest first), its tokens, and how many it had without pairs."""

    segments: Segments
    pairs: tuple[Pair, ...]
    tokens: tuple[int, ...]
    bare_tokens: int


@dataclass(frozen=True)
class Answer:
    """An answer and its cost.

    Attributes:
        text: stripped, inner blank lines closed, as in evaluation.
        finish: stop, eos or length (cut off at the limit).
        exemplars: ids of the pairs in the prompt, nearest first.
        prompt_tokens: tokens of the prompt; `bare_tokens` of the same without pairs.
        new_tokens: tokens drawn, without the end of the text.
    """

    text: str
    finish: str
    exemplars: tuple[str, ...]
    prompt_tokens: int
    bare_tokens: int
    new_tokens: int


@dataclass(frozen=True)
class InContext:
    """A model that is asked in one form.

    Attributes:
        form: how a question becomes a prompt, with the pairs before it if there are any.
        answer_tokens: most tokens of an answer where nothing else is asked for.
    """

    lm: LM
    form: Form
    answer_tokens: int

    def prompts(self, questions: Sequence[str], *, max_new_tokens: int | None = None) -> list[tuple[int, ...]]:
        """The token ids of each question's prompt."""
        return [prompt.tokens for prompt in self.ask(questions, max_new_tokens=max_new_tokens)]

    def ask(self, questions: Sequence[str], *, max_new_tokens: int | None = None) -> list[Prompt]:
        """The prompt of each question; the farthest pairs are left out where the context is too short for all.

        Raises `UserError` for a question that is empty or does not fit the context with an answer of `max_new_tokens`.
        """
        if isinstance(questions, str):
            raise UserError("questions are a list, not one string: write [question].")
        room = self._room(max_new_tokens)
        for i, question in enumerate(questions):
            if not isinstance(question, str) or not question.strip():
                raise UserError(f"question {i} is {'empty' if isinstance(question, str) else f'a {type(question).__name__}'}: give a text.")
            if problem := too_long(self.form.template, self.lm.tokenizer, question, room):
                raise UserError(f"question {i}: {problem}")
        template, count = self.form.template, lambda segments: len(self.lm.tokenizer.encode_segments(segments))
        made = []
        for question, shots, segments in zip(questions, self.form.exemplars(questions, self.form.k),
                                             self.form.segments(self.lm.tokenizer, questions, [room] * len(questions)), strict=True):
            used = next(n for n in range(len(shots), -1, -1) if template.answer_segments(shots[:n], question) == segments)
            made.append(Prompt(segments, tuple(shots[:used]), tuple(self.lm.tokenizer.encode_segments(segments)),
                               count(template.answer_segments((), question))))
        return made

    def answer(self, questions: Sequence[str], *, max_new_tokens: int | None = None, temperature: float = 0.0, top_p: float = 1.0,
               seed: int = 0, on_progress: Callable[[int, int, int, int], None] | None = None) -> list[Answer]:
        """Answer each question, in order. Greedy by default.

        A draw depends on (seed, prompt, how often this prompt occurred before it in this call, position) and on nothing else.

        Args:
            max_new_tokens: most tokens of an answer; None for `answer_tokens`.
            on_progress: as for `decode.generate.generate`.

        Raises `UserError` as `ask` does.
        """
        asked = self.ask(questions, max_new_tokens=max_new_tokens)
        seen: Counter[tuple[int, ...]] = Counter()
        requests = []
        for prompt in asked:
            requests.append(self.request(prompt.tokens, seen[prompt.tokens], max_new_tokens, temperature, top_p))
            seen[prompt.tokens] += 1
        made = self.lm.run(requests, seed=seed, on_progress=on_progress)
        return [Answer(tidy(c.text), c.finish, tuple(pair.id for pair in p.pairs), len(p.tokens), p.bare_tokens, len(c.ids))
                for p, c in zip(asked, made, strict=True)]

    def request(self, tokens: tuple[int, ...], occurrence: int, max_new_tokens: int | None, temperature: float, top_p: float) -> Request:
        """A prompt to be continued to its answer; `occurrence` tells apart the draws of one prompt."""
        drawn = address("answer", ",".join(map(str, tokens)), occurrence)
        return Request(tokens, drawn, max_new_tokens or self.answer_tokens, temperature, top_p, self.form.template.stops("answer"))

    def converse(self, question: str, turns: Sequence[Pair], *, max_new_tokens: int | None = None) -> tuple[Prompt, int]:
        """(the prompt of a question that follows earlier turns, how many of these it holds).

        Pairs that were retrieved come first, then the turns, oldest first; where they do not all fit the context, the newest stay.
        """
        (alone,), encode = self.ask([question], max_new_tokens=max_new_tokens), self.lm.tokenizer.encode_segments
        straight = dataclasses.replace(self.form.template, order="nearest_first")  # pairs stand in the order given
        shots = self.form.template.ordered(alone.pairs)
        for held in range(len(turns), 0, -1):
            segments = straight.answer_segments([*shots, *turns[len(turns) - held:]], question)
            if len(tokens := tuple(encode(segments))) <= self._room(max_new_tokens):
                bare = straight.answer_segments(turns[len(turns) - held:], question)
                return Prompt(segments, alone.pairs, tokens, len(encode(bare))), held
        return alone, 0

    def _room(self, max_new_tokens: int | None) -> int:
        """Most tokens of a prompt."""
        if max_new_tokens is not None and not 1 <= max_new_tokens < self.lm.context:
            raise UserError(f"max_new_tokens={max_new_tokens} is out of range: 1 to {self.lm.context - 1}, one less than the context.")
        return self.form.room if max_new_tokens is None else min(self.form.room, self.lm.context - max_new_tokens)


# ------------------------------------------------------------------------------------------------------------------------ to make one
def icl_knn(lm: LM, pool: Any, k: int | None = None, *, encoder: str | None = None, form: str | None = None, index: str = "auto",
            budget: int | None = None) -> InContext:
    """`lm`, answering behind the k pairs of a pool that are nearest to each question. Nothing is trained.

    Args:
        pool: the workdir of a run (the seeds it retrieves from), a seeds file or built-in set, or pairs: records of a pool,
            (question, answer) tuples, or dicts.
        k: pairs before a question; None takes the run's, else 5.
        encoder: whose vectors say what is near; None takes the run's, else "minilm-l6".
        form: "plain" or "chat"; None takes the run's, with its markers and order, else "plain".
        index: auto, scann or numpy; all find the same.
        budget: most tokens of a prompt with pairs, 0 for as many as fit the context; None takes the run's, else 0.

    Raises `UserError` where there are no pairs, and for a folder that is no run or holds no pool.
    """
    pairs, config = read_pool(pool)
    config = config or Config()
    k = pairs_shown(k, config.retrieval.k)
    given = {"model": {"form": form}, "retrieval": {"encoder": encoder, "k": k, "index": index}, "prompt": {"budget": budget}}
    changes = {section: {name: value for name, value in values.items() if value is not None} for section, values in given.items()}
    from_dict(changes)  # checks the other ranges
    changed = {name: dataclasses.replace(getattr(config, name), **values) for name, values in changes.items()}
    return in_context(lm, pairs, dataclasses.replace(config, **changed))


def in_context(lm: LM, pairs: Sequence[Pair], config: Config) -> InContext:
    """`lm`, asked as a run with this config asks in context: its form, markers, order, encoder, k and budget.

    The limit of answers is the config's, or a quarter more than the longest of the pairs where that is 0. Raises `UserError` for no pairs.
    """
    answer, room = limits(lm, config, pairs)
    embedder = make_embedder(config, lm.blueprint, lm.mesh)
    embedder.bind(lm.params)
    form = forms.icl(make_template(config, lm.blueprint), room, pairs, VectorStore(None, embedder),
                     strategy="knn", k=config.retrieval.k, seed=config.seed, index=config.retrieval.index, budget=config.prompt.budget)
    return InContext(lm.prepared(), form, answer)


def pairs_shown(asked: int | None, run: int) -> int:
    """How many pairs stand before a question: as asked for, else as in the run, else (where that shows none) 5. Checks the range."""
    k = asked if asked is not None else run if run > 0 else Retrieval.k
    if not 1 <= k <= 64:
        raise UserError(f"k={k} is out of range: 1 to 64 pairs before a question.")
    return k


def limits(lm: Any, config: Config, pairs: Sequence[Pair] = ()) -> tuple[int, int]:
    """(most tokens of an answer, most tokens of a prompt): as the run says, else a quarter more than the longest answer of `pairs`.

    `lm` has a tokenizer and a context: an `LM` or its blueprint.
    """
    answer = config.generate.answer.max_new_tokens
    if pairs and not answer:
        answer = min(derived_limit([pair.answer for pair in pairs], lm.tokenizer), lm.context // 2)
    return answer, lm.context - max(config.eval.answer_tokens, answer)


def read_pool(pool: Any) -> tuple[list[Pair], Config | None]:
    """(the pairs of what `icl_knn` calls a pool, the config of the run they are from). Raises `UserError` where there are none."""
    if isinstance(pool, (str, Path)):
        if not Path(pool).expanduser().is_dir():
            return [record(pair) for pair in seeds.load_seeds(Data(seeds=str(pool))).pairs], None
        workdir = trained.run_at(pool)
        if workdir is None:
            raise UserError(f"{pool} is not the workdir of a run: it has no config.json that a run wrote. Name the --workdir of a run, or "
                            "a file of pairs.")
        if Pool(workdir.pool).last() < 0:
            raise UserError(f"{workdir.root} holds no pool: the run has not begun. Start it first, with the command in "
                            f"{workdir.root / 'command.txt'}.")
        return list(Pool(workdir.pool).snapshot(0)), trained.config_of(workdir)
    pairs = list(pool)
    if all(hasattr(pair, name) for pair in pairs for name in ("id", "question", "answer")):
        return pairs, None
    return [record(pair) for pair in seeds.from_pairs(pairs, Data()).pairs], None


def too_long(template: Template, tokenizer: Any, question: str, room: int) -> str:
    """What is wrong with a question whose prompt has more than `room` tokens even without pairs; "" where nothing is."""
    size = len(tokenizer.encode_segments(template.answer_segments((), question)))
    return "" if size <= room else (f"its prompt has {size} tokens, and of this model's context {room} are left beside the answer. "
                                    "Shorten it, or lower max_new_tokens.")
