"""What is asked of the sampler and what it answers; requests are checked before any work starts."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Callable, Sequence

from isara_jax.common import UserError


@dataclass(frozen=True)
class Request:
    """A prompt to be continued.

    Attributes:
        tokens: the prompt; at least one token.
        address: 64-bit address of its random numbers (`isara_jax.common.address`).
        max_new_tokens: most tokens to draw; fewer where the context ends.
        temperature: 0 is greedy.
        top_p: nucleus, applied after the temperature and top_k; 1 keeps everything.
        stop: strings that end the text and are not part of it.
        ignore_eos: draw on after an end-of-text token, as if it were any other.
        top_k: draw from so many of the likeliest tokens, after the temperature; 0 keeps everything.
        repetition_penalty: divides positive and multiplies negative logits of tokens that stand in the prompt or the text; 1 is none.
        min_new_tokens: stop ids cannot be drawn before so many tokens. A stop string may still end the text.
        stop_ids: token ids that end the text, besides those of the model.
        seed: in place of the seed of the call.
        log_p: whether `Completion.log_p` is wanted.
    """

    tokens: tuple[int, ...]
    address: int
    max_new_tokens: int
    temperature: float
    top_p: float
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    top_k: int = 0
    repetition_penalty: float = 1.0
    min_new_tokens: int = 0
    stop_ids: tuple[int, ...] = ()
    seed: int | None = None
    log_p: bool = False


@dataclass(frozen=True)
class Completion:
    """What a request became.

    Attributes:
        ids: the tokens drawn, without the end-of-text token and without those that only spell a stop string.
        text: `ids` as text, up to the stop string; None when no decoder was given.
        finish: "stop" (a stop string), "eos" (a stop id), "length" (max_new_tokens or the context) or "nan" (the model's logits were no
            numbers; `ids` is what it drew before).
        log_p: of each of `ids` its log-probability (natural log) under the model itself: at temperature 1, before any filter or penalty.
            None where it was not asked for.
    """

    ids: list[int]
    text: str | None
    finish: str
    log_p: list[float] | None = None


def check(requests: Sequence[Request], *, vocab_size: int, context: int, decode: Callable | None) -> None:
    """Raise `UserError` for the first request that cannot be run, with its number and what to change."""
    for i, r in enumerate(requests):
        if not r.tokens:
            raise UserError(f"request {i}: the prompt is empty; a model needs at least one token to continue.")
        if len(r.tokens) + bool(r.max_new_tokens) > context:
            raise UserError(f"request {i}: a prompt of {len(r.tokens)} tokens leaves no room in a context of {context}; shorten it.")
        for name, ids in (("token", r.tokens), ("stop", r.stop_ids)):
            if bad := [t for t in ids if not 0 <= t < vocab_size]:
                raise UserError(f"request {i}: {name} id {bad[0]} is not in the vocabulary, whose ids go from 0 to {vocab_size - 1}.")
        check_sampling(f"request {i}", max_new_tokens=r.max_new_tokens, min_new_tokens=r.min_new_tokens, temperature=r.temperature, top_p=r.top_p,
                       top_k=r.top_k, repetition_penalty=r.repetition_penalty, stop=r.stop, seed=r.seed)
        if r.stop and decode is None:
            raise ValueError(f"request {i} has stop strings {r.stop} but no decode function was given")


def check_sampling(who: str, *, max_new_tokens: int, min_new_tokens: int, temperature: float, top_p: float, top_k: int,
                   repetition_penalty: float, stop: Sequence[str], seed: int | None) -> None:
    """Raise `UserError` for a parameter out of range, or for two that contradict each other."""
    rules = [("max_new_tokens", max_new_tokens, max_new_tokens >= 0, "0 or more"),
             ("min_new_tokens", min_new_tokens, 0 <= min_new_tokens <= max_new_tokens, f"from 0 to max_new_tokens={max_new_tokens}"),
             ("temperature", temperature, 0 <= temperature < float("inf"), "0 (greedy) or a positive number"),
             ("top_p", top_p, 0 < top_p <= 1, "above 0 and at most 1"),
             ("top_k", top_k, 0 <= top_k < 2**31, "0 (all) or a number of tokens"),
             ("repetition_penalty", repetition_penalty, 0 < repetition_penalty < float("inf"), "above 0; 1 is none"),
             ("stop", list(stop), all(stop), "strings that are not empty"),
             ("seed", seed, seed is None or 0 <= seed < 2**63, "0 to 2**63 - 1")]
    for name, value, holds, rule in rules:
        if not holds:
            raise UserError(f"{who}: {name}={value} is out of range: {rule}.")
