"""Prompts made of question-answer pairs and nothing else: no instruction, no principle, no rule (arXiv 2401.06785, abstract).

A prompt before tokenisation is a tuple of segments (text, is_template). In template segments special tokens are live (chat markers);
the others hold what people or models wrote, where special tokens are plain text.

    plain   Q: {question}\\nA: {answer}\\n\\n … Q:            the question stage; the answer stage ends with "Q: {question}\\nA:"
    chat    the model's own template: a user turn for each question, an assistant turn for each answer, an empty system turn
"""
from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import Any, Callable, Protocol, Sequence

from isara_jax.common import UserError, content_hash
from isara_jax.data.rouge import tokens

Segments = tuple[tuple[str, bool], ...]


class Pair(Protocol):
    """What an exemplar must have."""

    id: str
    question: str
    answer: str


@dataclass(frozen=True)
class Template:
    """How pairs become prompts; one template governs generation, training, scoring and chat.

    Attributes:
        form: "plain" or "chat".
        order: "nearest_last", "nearest_first" or "id": where the nearest exemplar stands.
        render_chat: `Tokenizer.render_chat`, for the chat form.
    """

    form: str
    question_marker: str = "Q:"
    answer_marker: str = "A:"
    order: str = "nearest_last"
    render_chat: Callable[..., str] | None = None

    @functools.cached_property
    def hash(self) -> str:
        """Identifies the template in records and in a run's identity; of a chat template, by what it makes of two small chats."""
        chat = repr([self._chat([("q", "a")], question) for question in (None, "q")]) if self.form == "chat" else ""
        return content_hash(self.form, self.question_marker, self.answer_marker, self.order, chat)

    def question_segments(self, exemplars: Sequence[Pair]) -> Segments:
        """A prompt after which the model writes a new question. `exemplars` come nearest first."""
        pairs = self._ordered(exemplars)
        if self.form == "chat":
            return self._chat(pairs, None)
        return ((self._blocks(pairs) + self.question_marker, False),)

    def answer_segments(self, exemplars: Sequence[Pair], question: str) -> Segments:
        """A prompt after which the model answers `question`."""
        pairs = self._ordered(exemplars)
        if self.form == "chat":
            return self._chat(pairs, tidy(question))
        return ((f"{self._blocks(pairs)}{self.question_marker} {tidy(question)}\n{self.answer_marker}", False),)

    def training_segments(self, question: str) -> Segments:
        """The prompt of one pair, without exemplars, as it is trained and scored."""
        return self.answer_segments((), question)

    def continuation(self, answer: str) -> str:
        """The answer as it follows its prompt."""
        return answer if self.form == "chat" else " " + answer

    def stops(self, stage: str) -> tuple[str, ...]:
        """Strings that end a generated question or answer. In chat the end-of-turn token does."""
        if self.form == "chat":
            return ()
        next_question, next_answer = "\n" + self.question_marker, "\n" + self.answer_marker
        return (next_answer, next_question) if stage == "question" else (next_question,)

    def ordered(self, exemplars: Sequence[Pair]) -> list[Pair]:
        """Pairs, given nearest first, as prompts hold them from first to last."""
        if self.order == "nearest_last":
            return list(exemplars)[::-1]
        return sorted(exemplars, key=lambda p: p.id) if self.order == "id" else list(exemplars)

    def human_words(self) -> int:
        """Words of instruction in the prompts beside the pairs, written by people.

        A marker ("Q:", "ASSISTANT:", "<|im_start|>user", "[INST]") is none, so the plain form has none unless a marker is a phrase.
        """
        if self.form == "plain":
            return sum(n for n in map(len, map(tokens, (self.question_marker, self.answer_marker))) if n > 1)
        template = " ".join(text for text, is_template in self._chat([("q", "a")], "q") if is_template)
        return len(tokens(re.sub(r"<[^>]*>\w*|\[/?\w+\]|\w+:", " ", template)))

    # ------------------------------------------------------------------------------------------------------------------------
    def _ordered(self, exemplars: Sequence[Pair]) -> list[tuple[str, str]]:
        return [(tidy(p.question), tidy(p.answer)) for p in self.ordered(exemplars)]

    def _blocks(self, pairs: Sequence[tuple[str, str]]) -> str:
        return "".join(f"{self.question_marker} {q}\n{self.answer_marker} {a}\n\n" for q, a in pairs)

    def _chat(self, pairs: Sequence[tuple[str, str]], question: str | None) -> Segments:
        """The rendered chat, cut at stand-ins so that contents stay apart from the template.

        With `question` it ends where the answer begins; with None, where the content of a new user turn would begin.
        """
        contents = [*(text for pair in pairs for text in pair), question]
        messages = [{"role": ("user", "assistant")[i % 2], "content": f"\x02{i}\x03"} for i in range(len(contents))]
        pieces = re.split("\x02(\\d+)\x03", self._render(messages, question is not None))
        if pieces[1::2] != [str(i) for i in range(len(contents))]:
            raise UserError("the model's chat template does not show every message once and in order, so prompts cannot be built with it. "
                            "Set --config.model.form=plain.")
        segments = [(piece, True) if i % 2 == 0 else (contents[int(piece)], False) for i, piece in enumerate(pieces)]
        if question is None:  # the model writes what stands here, and the template what comes after
            segments = segments[:-2]
        return tuple((text, is_template) for text, is_template in segments if text)

    def _render(self, messages: list[dict[str, str]], open_answer: bool) -> str:
        """With an empty system turn, since some templates have an instruction of their own for its absence; without where it is refused."""
        try:
            return self.render_chat([{"role": "system", "content": ""}, *messages], add_generation_prompt=open_answer)
        except UserError:
            return self.render_chat(messages, add_generation_prompt=open_answer)


def tidy(text: str) -> str:
    """Inner blank lines become one newline, so that a blank line always ends a pair."""
    return re.sub(r"\n\s*\n", "\n", text.strip())


def fit(exemplars: Sequence[Any], build: Callable[[Sequence[Any]], Segments], count: Callable[[Segments], int],
        budget: int) -> tuple[Segments, list[Any]]:
    """The prompt of as many of the nearest exemplars as `budget` tokens hold, and those exemplars; the farthest are dropped first.

    Raises `UserError` when not even the prompt without exemplars fits.
    """
    used = list(exemplars)
    while (size := count(segments := build(used))) > budget:
        if not used:
            raise UserError(f"a prompt without exemplars already has {size} tokens, of {budget} allowed (config.prompt.budget, or "
                            "the context less the new tokens). Raise the budget, shorten the questions, or take a model with more context.")
        used.pop()
    return segments, used


def show(segments: Segments) -> str:
    """The prompt as one text, as the model sees it."""
    return "".join(text for text, _ in segments)


def marker_warnings(pairs: Sequence[Any], template: Template) -> list[str]:
    """A warning for seeds that hold a marker at the start of a line (with their `row`): generated text like theirs would end there."""
    if template.form == "chat":
        return []
    opens = tuple(stop.strip("\n") for stop in template.stops("question"))
    rows = [str(p.row) for p in pairs if any(line.startswith(opens) for text in (p.question, p.answer) for line in text.split("\n"))]
    if not rows:
        return []
    return [f"{len(rows)} seed(s) hold {' or '.join(map(repr, opens))} at the start of a line (rows {', '.join(rows[:10])}"
            f"{', …' if len(rows) > 10 else ''}): generated text ends there or is rejected. Set --config.prompt.question_marker and "
            "--config.prompt.answer_marker to something the seeds do not hold."]
