"""What can be said of a generated answer without a judge: its likeness to the references, and signs of ill health."""
from __future__ import annotations

import functools
from typing import Any, Sequence

from isara_jax import config
from isara_jax.data.filters import Candidate, ngram_loop
from isara_jax.data.items import Item
from isara_jax.data.rouge import tokens
from isara_jax.evals.refusal import is_refusal

ROUGE = ("rouge1", "rouge2", "rougeL")
DIGITS = 6  # of scores in the rows


class Words:
    """Our tokens as rouge-score asks for them: its own tokenizer drops every letter outside ASCII."""

    def tokenize(self, text: str) -> list[str]:
        """Words, and Han, kana and Thai characters one by one."""
        return tokens(text)


@functools.lru_cache(maxsize=1)
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer  # brings nltk, 1.5 s, so only where answers are judged

    return RougeScorer(list(ROUGE), tokenizer=Words())


def rouge(text: str, references: Sequence[str]) -> dict[str, float]:
    """ROUGE-1, -2 and -L F of a text: of each the largest over the references, of which there is at least one (rouge-score)."""
    scores = [_scorer().score(reference, text) for reference in references]
    return {name: round(max(score[name].fmeasure for score in scores), DIGITS) for name in ROUGE}


def judge_answer(text: str, finish: str, item: Item) -> dict[str, Any]:
    """What an evaluation row says of an answer.

    Args:
        text: the answer, stripped.
        finish: why it ended: stop, eos, length or nan.
        item: the row that was asked.

    Returns:
        words; rouge1, rouge2, rougeL where the item has right references and rougeL_wrong where it has wrong ones; and as 0 or 1: empty (no
        word), looping (the loop filter's rule with its default settings), truncated (ended at the limit), refusal.
    """
    right = rouge(text, item.right) if item.right else {}
    wrong = {"rougeL_wrong": rouge(text, item.wrong)["rougeL"]} if item.wrong else {}
    words = len(tokens(text))
    looping = not ngram_loop(Candidate(item.question, text, finish, None, ()), config.Filters(), None).passed
    return {"words": words, **right, **wrong, "empty": int(words == 0), "looping": int(looping), "truncated": int(finish in ("length", "nan")),
            "refusal": int(is_refusal(text))}
