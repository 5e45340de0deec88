"""Prompts made of question-answer pairs and nothing else: no instruction, no principle, no rule (arXiv 2401.06785, abstract).

A prompt before tokenisation is a tuple of segments (text, is_template). In template segments special tokens are live (chat markers);
the others hold what people or models wrote, where special tokens are plain text.

    plain   Q: {question}\\nA: {answer}\\n\\n … Q:            the question stage; the answer stage ends with "Q: {question}\\nA:"
    chat    the model's own template: a user turn for each question, an assistant turn for each answer, an empty system turn
"""
from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Callable, Protocol, Sequence

from isara_jax.common import UserError, content_hash

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

    @property
    def hash(self) -> str:
        """Identifies the template in records and in a run's identity."""
        chat = str(self._chat([("\x00q", "\x00a")], None, open_answer=False)) if self.form == "chat" else ""
        return content_hash(self.form, self.question_marker, self.answer_marker, self.order, chat)

    def question_segments(self, exemplars: Sequence[Pair]) -> Segments:
        """A prompt after which the model writes a new question. `exemplars` come nearest first."""
        pairs = self._ordered(exemplars)
        if self.form == "chat":
            return self._chat(pairs, None, open_answer=False)
        return ((self._blocks(pairs) + self.question_marker, False),)

    def answer_segments(self, exemplars: Sequence[Pair], question: str) -> Segments:
        """A prompt after which the model answers `question`."""
        pairs = self._ordered(exemplars)
        if self.form == "chat":
            return self._chat(pairs, question, open_answer=True)
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

    def human_words(self) -> int:
        """Words of instruction in the prompts beside the pairs, written by people: markers are no words, so the plain form has none."""
        if self.form != "chat":
            return 0
        rendered = "".join(text for text, is_template in self._chat([], None, open_answer=False) if is_template)
        return len(re.findall(r"\w+", re.sub(r"<[^>]*>\w*|\[/?\w+\]", " ", rendered)))

    # ------------------------------------------------------------------------------------------------------------------------
    def _ordered(self, exemplars: Sequence[Pair]) -> list[tuple[str, str]]:
        ordered = {"nearest_first": list, "nearest_last": lambda e: list(e)[::-1], "id": lambda e: sorted(e, key=lambda p: p.id)}[self.order](exemplars)
        return [(tidy(p.question), tidy(p.answer)) for p in ordered]

    def _blocks(self, pairs: Sequence[tuple[str, str]]) -> str:
        return "".join(f"{self.question_marker} {q}\n{self.answer_marker} {a}\n\n" for q, a in pairs)

    def _chat(self, pairs: Sequence[tuple[str, str]], question: str | None, *, open_answer: bool) -> Segments:
        """The rendered chat, cut at stand-ins so that contents stay apart from the template.

        Without `question` the chat ends where the content of a new user turn would begin.
        """
        contents = [text for pair in pairs for text in pair] + ([question] if question is not None else [])
        names = [f"\x02{i}\x03" for i in range(len(contents) + (question is None))]
        messages = [{"role": ("user", "assistant")[i % 2], "content": name} for i, name in enumerate(names)]
        rendered = self._render([{"role": "system", "content": ""}, *messages], messages, open_answer)
        pieces = re.split("(\x02\\d+\x03)", rendered)
        segments = [(contents[int(p[1:-1])], False) if p.startswith("\x02") and int(p[1:-1]) < len(contents) else (p, True) for p in pieces if p]
        if question is None:  # what follows the last stand-in is written by the model
            segments = segments[:next(i for i, (text, _) in enumerate(segments) if text == names[-1])]
        return tuple(segments)

    def _render(self, with_system: list[dict], without: list[dict], open_answer: bool) -> str:
        """With an empty system turn, or with none where the template refuses one."""
        try:
            return self.render_chat(with_system, add_generation_prompt=open_answer)
        except UserError:
            return self.render_chat(without, add_generation_prompt=open_answer)


def tidy(text: str) -> str:
    """Inner blank lines become one newline, so that a blank line always ends a pair."""
    return re.sub(r"\n\s*\n", "\n", text.strip())


def fit(exemplars: Sequence[Any], build: Callable[[Sequence[Any]], Segments], count: Callable[[Segments], int], budget: int) -> tuple[Segments, list[Any]]:
    """The prompt of as many of the nearest exemplars as `budget` tokens hold, and those exemplars; the farthest are dropped first.

    Raises `UserError` when not even the prompt without exemplars fits.
    """
    used = list(exemplars)
    while (size := count(segments := build(used))) > budget:
        if not used:
            raise UserError(f"a prompt without exemplars already has {size} tokens, but only {budget} are allowed (prompt.budget, or the context "
                            "less the new tokens). Shorten the pairs, or take a model with a longer context.")
        used.pop()
    return segments, used


def show(segments: Segments) -> str:
    """The prompt as one text."""
    return "".join(text for text, _ in segments)


def marker_warnings(pairs: Sequence[Any], template: Template) -> list[str]:
    """A warning for seeds that contain the question marker at the start of a line: generated answers stop there."""
    if template.form == "chat":
        return []
    marker = "\n" + template.question_marker
    rows = [str(p.row) for p in pairs if marker in p.answer or marker in p.question]
    return [f"{len(rows)} seed(s) contain {template.question_marker!r} at the start of a line (rows {', '.join(rows[:10])}): generated text stops there; "
            "set --config.prompt.question_marker to something they do not contain"] if rows else []
