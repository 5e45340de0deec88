"""Everything about a run that is known before weights are read: seeds checked and split, limits, prompts, identity, plan."""
from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import statistics
from dataclasses import dataclass
from typing import Any, Callable, ContextManager, Sequence

from jax.sharding import Mesh

from isara_jax import preflight
from isara_jax.common import UserError, content_hash, write_jsonl
from isara_jax.config import Config
from isara_jax.console import Console
from isara_jax.data import filters, prompts, seeds, survey
from isara_jax.data.batching import Example
from isara_jax.data.pool import Pool, Record, pair_id
from isara_jax.data.prompts import Template
from isara_jax.evals import evaluate, forms
from isara_jax.evalset import EvalSet, parts
from isara_jax.ledger import Cost
from isara_jax.lm import Blueprint
from isara_jax.methods import isara
from isara_jax.methods.setting import Limits, Setting
from isara_jax.models import decoder, lora
from isara_jax.models.config import ModelConfig
from isara_jax.retrieval.embed import OWN, TINY, Embedder
from isara_jax.retrieval.store import VectorStore
from isara_jax.workdir import Workdir

METHODS = {"isara": isara}
EXEMPLARS = 5  # most exemplars in a prompt where config.retrieval.k is derived: the default's number


@dataclass(frozen=True)
class Session:
    """A checked run, ready for its weights."""

    config: Config
    blueprint: Blueprint
    dtype: str
    mesh: Mesh
    workdir: Workdir
    console: Console
    seed_set: seeds.SeedSet
    eval_set: EvalSet | None
    train_seeds: tuple[Record, ...]
    held_out: tuple[seeds.Seed, ...]
    template: Template
    limits: Limits
    embedder: Embedder

    @property
    def method(self) -> Any:
        """The module that holds the method's own steps."""
        return METHODS[self.config.method]

    @property
    def cfg(self) -> ModelConfig:
        return self.blueprint.cfg

    @property
    def eval_tokens(self) -> int:
        """Most tokens of an answer that is generated for evaluation."""
        return self.config.eval.answer_tokens or self.limits.answer

    @property
    def room(self) -> int:
        """Most tokens of a prompt that such an answer is to follow."""
        return self.blueprint.context - max(self.eval_tokens, self.limits.answer)

    @functools.cached_property
    def longest_pair(self) -> int:
        """Tokens of the longest seed pair, as it is trained on."""
        return max(len(self.example(s.question, s.answer).tokens) for s in self.seed_set.pairs)

    @property
    def slot_tokens(self) -> int:
        """Tokens that a row in decoding may hold: a prompt of k of the longest pairs and an answer."""
        return min(self.blueprint.context, (self.config.retrieval.k + 1) * self.longest_pair + self.limits.answer)

    @property
    def form(self) -> forms.Form:
        """How this run asks where it trains and scores: without exemplars."""
        return forms.bare(self.template, self.room)

    def icl_form(self, pool: Sequence[Record], vectors: VectorStore, strategy: str) -> forms.Form:
        """How this run asks in context: behind pairs of `pool`, as ISARA's own prompts hold them. `strategy` is knn or random."""
        return forms.icl(self.template, self.room, pool, vectors, strategy=strategy, k=self.config.retrieval.k, seed=self.config.seed,
                         index=self.config.retrieval.index, budget=self.config.prompt.budget)

    @property
    def resolved(self) -> dict[str, Any]:
        """What the config alone does not say and the result depends on: part of the run's identity."""
        found = {"model": self.blueprint.source.content_hash(), "encoder": self.embedder.hash, "seeds": self.seed_set.hash,
                 "template": self.template.hash, "tokenizer": self.blueprint.tokenizer.hash, "dtype": self.dtype,
                 "context": self.blueprint.context, "question_tokens": self.limits.question, "answer_tokens": self.limits.answer}
        if self.eval_set:  # what generated pairs must stay away from, and what chooses learning rates
            found["guarded_rows"] = self.eval_set.guard_hash
            if self.config.sft.rates:
                found["validation_rows"] = self.eval_set.validation_hash
        return found

    def setting(self, account: Callable[[str, int], ContextManager[Any]] | None = None) -> Setting:
        """The run as its method sees it; costs go to `account`. Without it, for a preview, nothing is accounted for or kept on disk."""
        embedder = self.embedder if self.embedder.ready else Embedder.from_source(TINY)  # a preview without weights shows any exemplars
        vectors = VectorStore(self.workdir.root / "vectors" if account else None, embedder)
        return Setting(self.config, self.blueprint.tokenizer, self.template, self.blueprint.context, self.limits, Pool(self.workdir.pool),
                       tuple(s.question for s in self.held_out), self.eval_set and self.eval_set.leaks, vectors, self.workdir.iteration,
                       self.console.note,
                       account or (lambda stage, iteration: contextlib.nullcontext(Cost(iteration, stage))))

    def example(self, question: str, answer: str) -> Example:
        """A pair as the model is trained and scored on it: the answer and its EOS are supervised, the prompt is not."""
        tokenizer = self.blueprint.tokenizer
        prompt, continuation = tokenizer.encode_pair(self.template.training_segments(question), self.template.continuation(answer))
        return Example((*prompt, *continuation, tokenizer.eos_id), len(prompt))

    def too_long(self, question: str, answer: str) -> str | None:
        """What is wrong with a pair that the model cannot hold; None where it can."""
        n, context = len(self.example(question, answer).tokens), self.blueprint.context
        return f"the pair has {n} tokens, and this model takes {context}" if n > context else None


def open_session(blueprint: Blueprint, seed_set: seeds.SeedSet, eval_set: EvalSet | None, config: Config, workdir: Workdir,
                 console: Console, dtype: str, mesh: Mesh) -> Session:
    """Check the seeds against the model, split them, derive the limits. Nothing is written."""
    tokenizer = blueprint.tokenizer
    filters.check_names(config.filters)
    if config.sft.lora.rank:
        lora.products(blueprint.cfg, config.sft.lora)
    tokenizer.encode("")  # a folder without a tokenizer ends here
    if tokenizer.eos_id is None:
        raise UserError(f"the tokenizer of {blueprint.source.name} has no end-of-sequence token, so answers could not learn to end. "
                        "Name it as eos_token in its tokenizer_config.json.")
    template = make_template(config, blueprint)
    train, held_out = seeds.split_holdout(seed_set.pairs, config.data.holdout)
    limits = _limits(config, seed_set.pairs, tokenizer)
    session = Session(config, blueprint, dtype, mesh, workdir, console, seed_set, eval_set, tuple(map(record, train)), tuple(held_out),
                      template, limits, make_embedder(config, blueprint, mesh))
    _check_lengths(session)
    if config.retrieval.k < 0:
        retrieval = dataclasses.replace(config.retrieval, k=_exemplars(session))
        session = dataclasses.replace(session, config=dataclasses.replace(config, retrieval=retrieval))
        console.note(f"retrieval.k is {retrieval.k}, derived from the lengths of the pairs (at most {EXEMPLARS}) and the context of "
                     f"{blueprint.context:,} tokens")
    return _with_slots_that_fit(session)


def make_embedder(config: Config, blueprint: Blueprint, mesh: Mesh) -> Embedder:
    """What gives texts their vectors. The model's own states ("own") want its weights later, by `Embedder.bind`."""
    if config.retrieval.encoder != OWN:
        return Embedder.from_source(config.retrieval.encoder)
    tokenizer = blueprint.tokenizer
    first = tokenizer.bos_id if tokenizer.adds_bos else None
    return Embedder.from_model(blueprint.cfg, functools.partial(tokenizer.encode, bos=True), first, blueprint.context,
                               content_hash(blueprint.source.content_hash(), tokenizer.hash), mesh)


def make_template(config: Config, blueprint: Blueprint) -> Template:
    """How pairs become prompts of this model."""
    chat = config.model.form == "chat"
    if chat and blueprint.tokenizer.chat_template is None:
        raise UserError(f"config.model.form='chat', but {blueprint.source.name} ships no chat template. Set --config.model.form=plain.")
    return Template(config.model.form, config.prompt.question_marker, config.prompt.answer_marker, config.prompt.order,
                    blueprint.tokenizer.render_chat if chat else None)


def report_pairs(session: Session) -> None:
    """Say what the pairs look like, those that are judged on too where they are of one file: once a command, before anything is generated."""
    console, config, path = session.console, session.config, session.seed_set.path
    judged = [i for i in session.eval_set.guarded if i.file == path] if session.eval_set else []
    found = survey.survey(sorted([*session.seed_set.pairs, *judged], key=lambda p: p.row), config.filters)
    for warning in (*session.seed_set.warnings, *prompts.marker_warnings(session.seed_set.pairs, session.template), *survey.warnings(found),
                    *survey.language_warnings(found, config.model.name, config.retrieval.encoder)):
        console.warn(warning)
    console.note(f"{found.pairs} pairs in {path}")
    for line in survey.lines(found):
        console.note(line)


def report_seeds(session: Session) -> None:
    """Say what the seeds are, what of them is held out, and which limits follow from them."""
    console, pairs, config = session.console, session.seed_set.pairs, session.config
    origin = lambda field: ", ".join(sorted({getattr(s, field) for s in pairs}))
    said = "; ".join(f"{field} {origin(field)}" for field in ("author", "source", "licence"))
    console.note(f"{len(pairs)} seed pairs ({session.seed_set.path}): {said}")
    if session.held_out:
        console.note(f"{len(session.held_out)} of them are held out: never retrieved, never trained on; they measure the held-out loss")
    else:
        console.note("nothing is held out (fewer than 8 seeds, seeds too alike to split, or data.holdout=0): no held-out loss, and the "
                     "number of iterations is fixed")
    if config.retrieval.k > len(session.train_seeds):
        console.warn(f"retrieval.k={config.retrieval.k} is more than the {len(session.train_seeds)} seeds to retrieve from: prompts hold "
                     "all of them")
    derived = lambda kind: "" if getattr(config.generate, kind).max_new_tokens else ", a quarter more than the longest seed's"
    console.note(f"a new question may take {session.limits.question} tokens{derived('question')}; an answer {session.limits.answer}"
                 f"{derived('answer')}")


def start_pool(session: Session) -> None:
    """Write the seeds as the pool's first segment (an existing one must be the same), and those held out beside the pool."""
    write_jsonl(session.workdir.root / "held_out.jsonl", map(dataclasses.asdict, session.held_out))
    Pool(session.workdir.pool).append(0, list(session.train_seeds))


# ----------------------------------------------------------------------------------------------------------------------- plan
@dataclass(frozen=True)
class Plan:
    """An estimate, before anything is generated, of one iteration and of the whole run."""

    requests: int
    prompt_tokens: float           # mean tokens of a question prompt
    prefilled: int                 # tokens, in one iteration
    generated: int
    trained: int                   # in the last iteration
    evaluated: int                 # tokens scored and generated for all arms
    minutes: float                 # of all iterations and arms


def make_plan(session: Session, rows: Sequence[dict[str, Any]], gflops: float) -> Plan:
    """The plan from a sample of question prompts `rows` and the measured speed of the machine in GFLOP/s.

    Assumes that a generated pair is as long as a seed and that two thirds of the requests are kept (both measured on small models).
    """
    config, tokenizer = session.config, session.blueprint.tokenizer
    n, iterations = config.generate.requests, config.stop.iterations
    prompt = statistics.mean(len(tokenizer.encode_segments(r["segments"])) for r in rows)
    examples = [session.example(s.question, s.answer) for s in session.seed_set.pairs]
    question = statistics.mean(e.prompt_length for e in examples)
    answer = statistics.mean(len(e.tokens) - e.prompt_length for e in examples)
    kept = 2 / 3 * n
    prefilled, generated = int(n * prompt + kept * (prompt + question)), int(n * question + kept * answer)
    pairs = [len(session.train_seeds) + (t * kept if config.sft.data == "seeds_accumulated" else kept) for t in range(1, iterations + 1)]
    trained = [int(p * (question + answer) * config.sft.epochs) for p in pairs]
    evaluated, arms = _evaluation(session, prompt, answer)
    backward = 2 if config.sft.lora.rank else 3  # without the gradients of frozen weights
    flops = 2 * decoder.n_params(session.cfg) * (iterations * (prefilled + generated) + evaluated + backward * (sum(trained) + arms * trained[-1]))
    return Plan(n, prompt, prefilled, generated, trained[-1], evaluated, flops / (gflops * 1e9) / 60 / preflight.SHARE_OF_PEAK)


def _evaluation(session: Session, prompt: float, answer: float) -> tuple[int, int]:
    """(tokens evaluated for all arms, arms that are fine-tuned as long as the last iteration), for the plan.

    `prompt` and `answer` are mean tokens of a prompt with exemplars and of an answer. Every row is scored after its own question and
    after another's. An answer is drawn with all slots at work, filled or not.
    """
    chosen, settings = session.eval_set, session.config.eval
    if chosen is None:
        return 0, 0
    count, sample = session.blueprint.tokenizer.encode, chosen.rows[:32]
    texts = lambda item: {*item.mc1.texts, *item.mc2.texts} if item.mc1 and item.mc2 else set()
    choices = statistics.mean(sum(len(count(" " + text)) for text in texts(i)) for i in sample)
    question, reference = (statistics.mean(len(count(getattr(i, name))) for i in sample) for name in ("question", "answer"))
    names, rows = settings.chosen_arms, len(chosen.rows)
    models = len(names) + ("isara_each" in names) * (session.config.stop.iterations - 2)
    with_exemplars = sum("icl" in name for name in names)
    turns = -(-min(settings.answer_rows, rows) // session.config.generate.slots)
    asked = 2 if choices else 1
    scored = models * (asked * (question + choices) + reference) + with_exemplars * asked * prompt
    drawn = turns * session.config.generate.slots * answer + min(settings.answer_rows, rows) * question
    return int(rows * scored + models * drawn), sum(name in ("sft_steps", "shuffled", "off_domain") for name in names)


# ---------------------------------------------------------------------------------------------------------------------- pieces
def record(seed: seeds.Seed) -> Record:
    """A seed as a record of the pool."""
    return Record(id=pair_id(seed.question, seed.answer), question=seed.question, answer=seed.answer, iteration=0, origin="seed",
                  author=seed.author, source=seed.source, licence=seed.licence)


def _limits(config: Config, pairs: Sequence[seeds.Seed], tokenizer: Any) -> Limits:
    """Most new tokens: as configured, else derived from the seeds."""
    return Limits(config.generate.question.max_new_tokens or derived_limit([s.question for s in pairs], tokenizer),
                  config.generate.answer.max_new_tokens or derived_limit([s.answer for s in pairs], tokenizer))


def derived_limit(texts: Sequence[str], tokenizer: Any) -> int:
    """Most new tokens of a text like these: a quarter more than the longest has, in steps of 8."""
    longest = max(len(tokenizer.encode(" " + t)) for t in texts) + 1  # and the end of the text
    return 8 * math.ceil(1.25 * longest / 8)


def _exemplars(session: Session) -> int:
    """The derived k: as many pairs of usual length as stand before the longest question, at most `EXEMPLARS` and no more than there are."""
    lengths = [len(session.example(s.question, s.answer).tokens) for s in session.seed_set.pairs]
    room = session.blueprint.context - max(session.limits.question, session.limits.answer)
    room = min(session.config.prompt.budget or room, room)
    return max(1, min(EXEMPLARS, len(session.train_seeds), int((room - max(lengths)) / statistics.mean(lengths))))


def _with_slots_that_fit(session: Session) -> Session:
    """Long pairs take long rows: fewer of them are decoded at a time where the memory asks for it."""
    config, mesh = session.config, session.mesh
    slots = preflight.slots_that_fit(session.cfg, session.dtype, mesh.devices.flatten().tolist(), fsdp=mesh.shape["fsdp"],
                                     tensor=mesh.shape["tensor"], slots=config.generate.slots, tokens_per_slot=session.slot_tokens)
    if slots == config.generate.slots:
        return session
    session.console.note(f"generate.slots={slots} instead of {config.generate.slots}: rows of up to {session.slot_tokens} tokens would not "
                         "leave enough memory")
    return dataclasses.replace(session, config=dataclasses.replace(config, generate=dataclasses.replace(config.generate, slots=slots)))


def _check_lengths(session: Session) -> None:
    context = session.blueprint.context
    long = [(s, n) for s in session.seed_set.pairs if (n := len(session.example(s.question, s.answer).tokens)) > context]
    if long:
        shown = "; ".join(f"row {s.row} has {n} tokens" for s, n in long[:10])
        raise UserError(f"{session.seed_set.path}: {len(long)} pair(s) are longer than the {context} tokens this model takes: {shown}. "
                        "Shorten or remove them.")
    for name in ("question", "answer"):
        if getattr(session.limits, name) >= context:
            raise UserError(f"config.generate.{name}.max_new_tokens is {getattr(session.limits, name)} (0 derives it from the longest "
                            f"seed), which leaves no room for a prompt in the {context} tokens this model takes. Set a smaller one.")
    if chosen := session.eval_set:
        items = [*chosen.rows, *chosen.validation]
        evaluate.check_lengths(session.blueprint.tokenizer, context, items, session.form,
                               parts(items, session.config.eval.answer_rows), session.eval_tokens)
