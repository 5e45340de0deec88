"""The only schema: every field a run can be given, its default, its range, and whether it is part of the run's identity.

A config file is Python: `get_config()` calls `defaults()`, changes what it wants and returns it. The command line overrides single
fields (`--config.sft.lr=1e-4`). `from_dict` turns the result into frozen dataclasses with every range checked.

*identity* fields decide what a run produces: changed on a used workdir they are refused with a diff. *runtime* fields (paths, mesh,
more iterations, logging) may change between starts. Data and models are identified by their content, so a path or name is runtime.
Imports no jax, so that light commands stay light.
"""
from __future__ import annotations

import dataclasses
import difflib
import re
from dataclasses import dataclass, field
from typing import Any, get_type_hints

import ml_collections

from isara_jax.common import UserError

IDENTITY, RUNTIME = "identity", "runtime"


class ConfigError(UserError):
    """A config that cannot be run: unknown key, wrong type or value out of range. One line, with the next step."""


def _check(name: str, value: Any, ok: bool, rule: str) -> None:
    if not ok:
        raise ConfigError(f"config.{name}={value!r} is out of range: {rule}. Change it in the config file or with --config.{name}=VALUE.")


def _one_of(name: str, value: str, *choices: str) -> None:
    if value not in choices:
        near = difflib.get_close_matches(str(value), choices, 1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"config.{name}={value!r} is not one of {', '.join(choices)}.{hint}")


def runtime(default: Any) -> Any:
    """A field that may change between two starts of one run."""
    return field(default=default, metadata={"kind": RUNTIME})


@dataclass(frozen=True)
class Model:
    name: str = runtime("smollm2-135m-instruct")  # embedded name, hub id, HF folder or .gguf file; identified by the hash of its content
    dtype: str = runtime("auto")         # compute and sampling: auto, float32 or bfloat16; what auto becomes at the first start is identity
    form: str = "plain"                  # plain ("Q: … A: …") or chat (the model's template): governs prompts, training, scoring and chat
    context: int = 0                     # longest sequence in tokens; 0 takes the model's own

    def __post_init__(self):
        _one_of("model.dtype", self.dtype, "auto", "float32", "bfloat16")
        _one_of("model.form", self.form, "plain", "chat")
        _check("model.context", self.context, self.context == 0 or self.context >= 32, "0 (the model's own) or at least 32 tokens")


@dataclass(frozen=True)
class Data:
    seeds: str = runtime("misconceptions")  # a .jsonl, .json or .csv file, a built-in set, or a benchmark (then from its pool); identified by content
    path: str = runtime("")                 # folder or file with the benchmarks' local files; "" takes them from the hub
    question: str = runtime("")             # column that holds the question; "" recognises the usual names
    answer: str = runtime("")               # column that holds the answer; "" recognises the usual names
    limit: int = runtime(0)                 # use only the first so many pairs; 0 uses all (64 of a benchmark)
    author: str = ""                        # who wrote the pairs (human, or a model's name), where the file does not say
    source: str = ""                        # where the pairs come from, where the file does not say
    licence: str = ""                       # their licence, where the file does not say
    holdout: float = 0.125                  # share of the seeds kept aside for the held-out loss (at least 4; none under 8 seeds)
    test: str = runtime("")                 # a file of further pairs to judge on, with the columns of the seeds
    test_share: float = 0.0                 # where data.test is empty: share of the seeds to judge on instead of training on them
    folds: int = 0                          # so many runs, each judged on another part of the seeds, so that every pair is judged on; 0: one

    def __post_init__(self):
        _check("data.limit", self.limit, self.limit >= 0, "0 (all) or a positive number of pairs")
        _check("data.holdout", self.holdout, 0 <= self.holdout <= 0.5, "between 0 and 0.5")
        _check("data.test_share", self.test_share, 0 <= self.test_share <= 0.5, "between 0 and 0.5")
        _check("data.folds", self.folds, self.folds == 0 or 2 <= self.folds <= 10, "0 (one run) or 2 to 10")
        _check("data.folds", self.folds, not (self.folds and self.test), "0 where data.test names a file: that file judges every seed")


@dataclass(frozen=True)
class Retrieval:
    encoder: str = runtime("minilm-l6")  # embedded name, hub id or folder of a sentence encoder, or own: the starting model's pooled states
    strategy: str = "knn"          # knn, random or mmr (maximal marginal relevance)
    k: int = 5                     # exemplars in a prompt; -1 derives it: 5, or as many as fit
    mmr_lambda: float = 0.7        # mmr: weight of relevance against diversity (1 is knn); Carbonell and Goldstein 1998
    index: str = runtime("auto")   # auto (scann where it has a wheel), scann or numpy: all give the same neighbours

    def __post_init__(self):
        _one_of("retrieval.strategy", self.strategy, "knn", "random", "mmr")
        _one_of("retrieval.index", self.index, "auto", "scann", "numpy")
        _check("retrieval.k", self.k, -1 <= self.k <= 64, "0 to 64 exemplars, or -1 to derive their number")
        _check("retrieval.mmr_lambda", self.mmr_lambda, 0 <= self.mmr_lambda <= 1, "between 0 and 1")


@dataclass(frozen=True)
class Prompt:
    question_marker: str = "Q:"    # opens a question in the plain form, and is what an answer stops at
    answer_marker: str = "A:"      # opens an answer in the plain form
    order: str = "nearest_last"    # nearest_last, nearest_first or by id
    budget: int = 0                # most tokens in a prompt; 0 takes the context less the tokens to be generated

    def __post_init__(self):
        _one_of("prompt.order", self.order, "nearest_last", "nearest_first", "id")
        for name in ("question_marker", "answer_marker"):
            value = getattr(self, name)
            _check(f"prompt.{name}", value, bool(value.strip()) and "\n" not in value, "one non-empty line")
        _check("prompt.question_marker", self.question_marker, self.question_marker != self.answer_marker,
               "different from prompt.answer_marker")
        _check("prompt.budget", self.budget, self.budget >= 0, "0 (as much as fits) or a number of tokens")


@dataclass(frozen=True)
class Sampling:
    temperature: float = 0.7       # 0 is greedy
    top_p: float = 0.95            # nucleus, applied after the temperature as Hugging Face does
    max_new_tokens: int = 0        # 0 derives the limit from the lengths of the seeds

    def __post_init__(self):
        _check("generate.*.temperature", self.temperature, 0 <= self.temperature <= 10, "between 0 and 10")
        _check("generate.*.top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1")
        _check("generate.*.max_new_tokens", self.max_new_tokens, 0 <= self.max_new_tokens <= 32768, "0 (derived) to 32768")


@dataclass(frozen=True)
class Generate:
    requests: int = 192            # N of the paper: question prompts issued in an iteration
    question: Sampling = Sampling()
    answer: Sampling = Sampling()
    slots: int = runtime(64)       # rows decoded at a time on each device; another number may change rounding, never the random numbers
    prefill_chunk: int = 64        # tokens of one prompt prefilled at a time
    key_block: int = 128           # keys attended at a time, at absolute positions; prompts share what they have in common in whole blocks
    attention: str = runtime("auto")  # auto (what fits the device), blocks (CPU), xla or cudnn (GPU, bfloat16)

    def __post_init__(self):
        _check("generate.requests", self.requests, 1 <= self.requests <= 10_000_000, "at least 1")
        _one_of("generate.attention", self.attention, "auto", "blocks", "xla", "cudnn")
        _check("generate.slots", self.slots, 2 <= self.slots <= 4096, "2 to 4096")
        for name in ("prefill_chunk", "key_block"):
            value = getattr(self, name)
            _check(f"generate.{name}", value, value in (16, 32, 64, 128, 256, 512), "a power of two from 16 to 512")
        _check("generate.key_block", self.key_block, self.key_block % self.prefill_chunk == 0, "a multiple of generate.prefill_chunk")


@dataclass(frozen=True)
class Filters:
    question: tuple[str, ...] = ("parse", "truncated", "min_words", "ngram_loop", "exemplar_copy", "novelty")
    answer: tuple[str, ...] = ("parse", "truncated", "min_words", "echo", "ngram_loop", "exemplar_copy")
    min_words: int = 5             # shortest question and answer in words (the paper's rule; reviews of arXiv 2401.06785)
    rouge: float = 0.7             # a question with ROUGE-L F strictly above this to any accepted one is not new (the paper's rule)
    loop_ngram: int = 4            # n of the n-gram loop filter
    loop_repeats: int = 3          # so many occurrences of one n-gram make a loop

    def __post_init__(self):
        _check("filters.min_words", self.min_words, 0 <= self.min_words <= 100, "0 to 100 words")
        _check("filters.rouge", self.rouge, 0 < self.rouge <= 1, "above 0 and at most 1")
        _check("filters.loop_ngram", self.loop_ngram, 1 <= self.loop_ngram <= 50, "1 to 50 words")
        _check("filters.loop_repeats", self.loop_repeats, 2 <= self.loop_repeats <= 100, "2 to 100")


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters (Hu et al. 2021). alpha and all products as targets are QLoRA's (Dettmers et al. 2023), no dropout is PEFT's default."""

    rank: int = 0                    # of the adapters that are trained in place of the weights, which are frozen; 0 trains the weights
    alpha: float = 16.0              # what an adapter adds is multiplied by alpha / rank
    dropout: float = 0.0             # share of an adapter's inputs that are dropped while it is trained
    targets: str = ".*"              # regular expression: which products of a layer have an adapter, of q k v o gate up down

    def __post_init__(self):
        _check("sft.lora.rank", self.rank, 0 <= self.rank <= 4096, "0 (off) to 4096")
        _check("sft.lora.alpha", self.alpha, 0 < self.alpha <= 1e6, "above 0 and at most 1e6")
        _check("sft.lora.dropout", self.dropout, 0 <= self.dropout < 1, "from 0 to below 1")
        try:
            re.compile(self.targets)
        except re.error as e:
            raise ConfigError(f"config.sft.lora.targets={self.targets!r} is no regular expression: {e}. An example is "
                              "--config.sft.lora.targets='q|k|v|o'.") from None


@dataclass(frozen=True)
class Sft:
    data: str = "seeds_accumulated"  # seeds_accumulated, seeds_latest or latest: which pairs an iteration trains on
    init: str = "base"               # base or last: the parameters an iteration starts from
    epochs: int = 3                  # with lr, betas, decay, clip and warm-up: safe-rlhf's SFT defaults, as the paper's library
    lr: float = 2e-5
    rates: tuple[float, ...] = ()    # learning rates to try in every fine-tuning, ISARA's and each arm's; validation rows choose. Empty: lr
    batch: int = 16                  # pairs in an optimizer step
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    clip: float = 1.0                # largest global gradient norm
    warmup: float = 0.03             # share of the steps with a rising rate; cosine after it
    save_every: int = runtime(200)   # optimizer steps between two resumable states of an unfinished fine-tuning
    lora: Lora = Lora()

    def __post_init__(self):
        _one_of("sft.data", self.data, "seeds_accumulated", "seeds_latest", "latest")
        _one_of("sft.init", self.init, "base", "last")
        _check("sft.epochs", self.epochs, 1 <= self.epochs <= 1000, "1 to 1000")
        _check("sft.lr", self.lr, 0 < self.lr <= 1, "above 0 and at most 1")
        _check("sft.rates", self.rates, all(0 < r <= 1 for r in self.rates) and len(set(self.rates)) == len(self.rates),
               "different rates, each above 0 and at most 1")
        _check("sft.batch", self.batch, 1 <= self.batch <= 65536, "at least 1")
        _check("sft.betas", self.betas, len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas), "two numbers from 0 to below 1")
        _check("sft.weight_decay", self.weight_decay, self.weight_decay >= 0, "0 or more")
        _check("sft.clip", self.clip, self.clip > 0, "above 0")
        _check("sft.warmup", self.warmup, 0 <= self.warmup < 1, "from 0 to below 1")
        _check("sft.save_every", self.save_every, self.save_every >= 1, "at least 1")


@dataclass(frozen=True)
class Stop:
    iterations: int = runtime(2)   # T: most iterations; more may be asked for later with the same workdir
    min_yield: float = runtime(0.05)  # stop after an iteration that kept a smaller share of its requests
    patience: int = runtime(0)     # stop after so many iterations without a lower held-out loss; 0 never does

    def __post_init__(self):
        _check("stop.iterations", self.iterations, 1 <= self.iterations <= 1000, "1 to 1000")
        _check("stop.min_yield", self.min_yield, 0 <= self.min_yield <= 1, "between 0 and 1")
        _check("stop.patience", self.patience, self.patience >= 0, "0 (off) or a number of iterations")


ARMS = ("base", "icl_random", "icl_knn", "sft_epochs", "sft_steps", "isara", "isara_each", "isara_icl_knn", "shuffled", "off_domain")


@dataclass(frozen=True)
class Eval:
    """What a run is judged on and against. `primary` and `model` are identity: they are named before the run and stay."""

    benchmark: str = runtime("")   # truthfulqa, beavertails, self_instruct, alpaca, misconceptions or a file; "" judges nothing
    primary: str = ""              # the quantity that gets the verdict; "" takes mc2_cond where rows have choices, else rougeL
    model: str = "last"            # the iteration that gets the verdict: last (it is also what is exported) or best (lowest held-out loss)
    split: str = runtime("dev")    # dev (unused pool rows) or test
    rows: int = runtime(100)       # rows to evaluate on, the same for all arms
    validation_rows: int = runtime(100)  # rows on which the base model's form and learning rates are chosen; the first 32 are probed
    answer_rows: int = runtime(64)  # rows whose answers are generated; 0 generates none
    answer_tokens: int = runtime(0)  # most tokens of such an answer; 0 takes the limit of generated answers
    arms: tuple[str, ...] = runtime(("base", "icl_knn", "sft_steps", "isara", "shuffled"))  # what is compared, or all
    forms: str = runtime("own")    # own (the form a model was trained in) or all (the published six-example primer form too)
    off_domain: str = runtime("off_domain")  # pairs of another domain for the arm off_domain: a built-in set or a file
    label: str = runtime("")       # a word over the table, for example smoke
    reuse: bool = runtime(True)    # take evaluations of equal identity from the cache, whichever run made them

    def __post_init__(self):
        _one_of("eval.model", self.model, "last", "best")
        _one_of("eval.split", self.split, "dev", "test")
        _one_of("eval.forms", self.forms, "own", "all")
        _check("eval.rows", self.rows, self.rows >= 2, "at least 2 rows")
        _check("eval.validation_rows", self.validation_rows, self.validation_rows >= 2, "at least 2 rows")
        _check("eval.answer_rows", self.answer_rows, self.answer_rows >= 0, "0 (none) or a number of rows")
        _check("eval.answer_tokens", self.answer_tokens, 0 <= self.answer_tokens <= 32768, "0 (the limit of generated answers) to 32768")
        for arm in self.arms:
            _one_of("eval.arms", arm, "all", *ARMS)
        _check("eval.arms", self.arms, bool({"isara", "all"} & set(self.arms)), "isara is among them: it is what the others are compared with")

    @property
    def chosen_arms(self) -> tuple[str, ...]:
        """The arms in the order of the table, each once."""
        return tuple(a for a in ARMS if a in self.arms or "all" in self.arms)


@dataclass(frozen=True)
class Mesh:
    data: int = runtime(-1)        # devices that share out rows; -1 takes all that are left
    fsdp: int = runtime(1)         # devices that share out rows and parameters
    tensor: int = runtime(1)       # devices that share out heads and hidden units

    def __post_init__(self):
        sizes = (self.data, self.fsdp, self.tensor)
        _check("mesh", sizes, all(s == -1 or s >= 1 for s in sizes), "each axis is -1 or at least 1")
        _check("mesh", sizes, sizes.count(-1) <= 1, "at most one axis is -1")


@dataclass(frozen=True)
class Config:
    """A whole run. `method` names a module of `isara_jax.methods`; `keep` says which iterations' parameters stay on disk."""

    method: str = "isara"
    seed: int = 0                  # every draw descends from it
    sensitive: bool = runtime(False)  # console and log show ids, lengths and verdicts; text stays in the iteration files
    keep: str = runtime("all")     # all or best_last
    review: bool = runtime(False)  # stop after each generation until its pairs were read, edited and decided on in review.csv
    model: Model = Model()
    data: Data = Data()
    retrieval: Retrieval = Retrieval()
    prompt: Prompt = Prompt()
    generate: Generate = Generate()
    filters: Filters = Filters()
    sft: Sft = Sft()
    stop: Stop = Stop()
    eval: Eval = Eval()
    mesh: Mesh = Mesh()

    def __post_init__(self):
        _one_of("method", self.method, "isara")
        _one_of("keep", self.keep, "all", "best_last")
        _check("seed", self.seed, 0 <= self.seed < 2**63, "0 to 2**63 - 1")
        if self.eval.benchmark and (self.data.test or self.data.test_share or self.data.folds):
            raise ConfigError(f"config.eval.benchmark={self.eval.benchmark!r} says what to judge on, and so does config.data.test, test_share or "
                              "folds. Set --config.eval.benchmark= or drop the others.")
        _check("keep", self.keep, self.keep == "all" or not self.eval.benchmark or "isara_each" not in self.eval.chosen_arms,
               "all where every iteration is evaluated (the arm isara_each)")


# ---------------------------------------------------------------------------------------------------------------------------------
def to_dict(config: Any) -> dict[str, Any]:
    """The nested plain dict of a config dataclass; tuples become lists, as JSON has them."""
    out = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        out[f.name] = to_dict(value) if dataclasses.is_dataclass(value) else list(value) if isinstance(value, tuple) else value
    return out


def defaults() -> ml_collections.ConfigDict:
    """Every field at its default, as the ConfigDict that config files start from. Unknown keys are refused from here on."""

    def build(config: Any) -> ml_collections.ConfigDict:
        values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
        made = ml_collections.ConfigDict({k: build(v) if dataclasses.is_dataclass(v) else v for k, v in values.items()})
        return made.lock()

    return build(Config())


def from_dict(values: Any) -> Config:
    """The checked `Config` of a (possibly partial) mapping. Raises `ConfigError` for unknown keys, wrong types and bad ranges."""
    return _build(Config, values.to_dict() if isinstance(values, ml_collections.ConfigDict) else values, "")


def _build(cls: type, values: Any, path: str) -> Any:
    if not isinstance(values, dict):
        raise ConfigError(f"config{'.' + path.rstrip('.') if path else ''} is {values!r}, but it is a section: give its fields one by one.")
    hints = get_type_hints(cls)
    made = {}
    for key, value in values.items():
        if key not in hints:
            near = difflib.get_close_matches(key, hints, 1)
            hint = f"Did you mean {path}{near[0]}?" if near else f"This section has {', '.join(hints)}."
            raise ConfigError(f"config.{path}{key} does not exist. {hint}")
        if dataclasses.is_dataclass(hints[key]):
            made[key] = _build(hints[key], value, f"{path}{key}.")
        else:
            made[key] = _typed(f"{path}{key}", value, hints[key])
    try:
        return cls(**made)
    except ConfigError as e:  # a section that is used twice does not know where it stands
        raise ConfigError(str(e).replace("generate.*.", path)) from None


def _typed(name: str, value: Any, hint: Any) -> Any:
    """`value` as the field's type: whole floats do not become ints, ints become floats, lists become tuples."""
    if hint in (tuple[str, ...], tuple[float, ...], tuple[float, float]):
        item = str if hint == tuple[str, ...] else float
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"config.{name}={value!r} must be a tuple, for example ('{'a' if item is str else '0.9'}', …).")
        return tuple(_typed(name, v, item) for v in value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or isinstance(value, bool) and hint is not bool:
        raise ConfigError(f"config.{name}={value!r} is a {type(value).__name__}; it must be a {hint.__name__}.")
    return value


def identity(config: Any) -> dict[str, Any]:
    """The identity fields of a config as a nested dict; sections without any are left out."""
    out = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            if inner := identity(value):
                out[f.name] = inner
        elif f.metadata.get("kind", IDENTITY) == IDENTITY:
            out[f.name] = list(value) if isinstance(value, tuple) else value
    return out


def completed(stored: dict[str, Any]) -> dict[str, Any]:
    """A stored identity with the defaults of identity fields that it lacks: those that came after the version which wrote it."""

    def fill(known: dict[str, Any], default: dict[str, Any]) -> dict[str, Any]:
        return {key: fill(known.get(key, {}), value) if isinstance(value, dict) else known.get(key, value) for key, value in default.items()}

    return stored | fill(stored, identity(Config()))


def diff(old: dict[str, Any], new: dict[str, Any], path: str = "") -> list[str]:
    """Readable lines for every leaf that differs between two nested dicts: `sft.lr: 2e-05 -> 0.0001`."""
    lines = []
    for key in sorted(set(old) | set(new)):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            lines += diff(a, b, f"{path}{key}.")
        elif a != b:
            lines.append(f"{path}{key}: {a!r} -> {b!r}")
    return lines
