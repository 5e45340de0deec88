"""What a method is given to work with, and the one thing it must offer. A method is a module with `expand` and `training_pairs`."""
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, ContextManager, Sequence

from isara_jax import config
from isara_jax.data.pool import Pool
from isara_jax.data.prompts import Template
from isara_jax.data.splits import LeakIndex
from isara_jax.data.tokenizer import ByteTokenizer, Tokenizer
from isara_jax.decode.requests import Completion, Request
from isara_jax.retrieval.store import VectorStore

# sample(stage name, requests) -> completions in the order of the requests, drawn from the current model
Sampler = Callable[[str, Sequence[Request]], list[Completion]]


@dataclass(frozen=True)
class Limits:
    """Most new tokens of a question and of an answer."""

    question: int
    answer: int


@dataclass(frozen=True)
class Setting:
    """One run as a method sees it: its config, its pool so far, its tools. Nothing in it changes but the files it names."""

    config: config.Config
    tokenizer: Tokenizer | ByteTokenizer
    template: Template
    context: int                             # longest sequence in tokens
    limits: Limits
    pool: Pool
    held_out: tuple[str, ...]                # questions that are kept aside: never retrieved, and new questions must differ from them
    leaks: LeakIndex | None                  # finds the evaluation row that a question is near: such a pair is never kept
    vectors: VectorStore
    iteration_folder: Callable[[int], Path]
    say: Callable[[str], None]               # one line to console and log
    account: Callable[[str, int], ContextManager[Any]]  # account(stage, iteration): its cost goes on the ledger


def budget(setting: Setting, new_tokens: int) -> int:
    """Most tokens of a prompt that is to be continued by `new_tokens`."""
    room = setting.context - new_tokens
    return min(setting.config.prompt.budget or room, room)
