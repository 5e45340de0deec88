"""Ask a model: a conversation in the terminal, or a file of questions, in the form the model was trained in.

    python -m isara_jax.chat --model=runs/first                                  # a run's last iteration, in its form
    python -m isara_jax.chat --model=smollm2-135m-instruct --icl_knn=runs/first  # the starting model behind the run's nearest seeds
    python -m isara_jax.chat --model=runs/first --file=questions.csv --out=answers.csv

A model by name is asked in its chat form where it ships a template, else plainly. Exit status: 0, or 2 with one message.
"""
from __future__ import annotations

import argparse
import contextlib
import dataclasses
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterator, Sequence, TextIO

from isara_jax import icl, preflight, trained
from isara_jax import lm as lm_lib
from isara_jax.common import UserError, write_jsonl
from isara_jax.config import Config, from_dict
from isara_jax.console import Console, inert
from isara_jax.data import sheets
from isara_jax.data.prompts import tidy
from isara_jax.data.questions import Questions, read_questions
from isara_jax.data.tables import complaint
from isara_jax.evals import forms
from isara_jax.icl import InContext
from isara_jax.session import make_template

ANSWER_TOKENS = 256         # of an answer where no run says; half of the context where that is less
ROOM = 8192  # tokens of a conversation that can be remembered; a longer one starts anew with a larger memory
# The engine of one conversation: no idle slots, and short blocks, so that a turn computes little of the turns before it again. Its answers may
# differ in rounding from those of the same model in a run.
LATENCY = {"slots": 2, "chunk": 64, "lanes": 4, "key_block": 64, "steps": 4}
NOT_CHECKED = "Generated answers are not fact-checked."
HELP = """/reset  forget the conversation      /cost   tokens and seconds after each answer, on or off
/quit   end, as Ctrl-D does          /pairs  those that stood before the last question (--icl_knn)
/help   this text
Ctrl-C stops an answer. A line that ends in a backslash goes on in the next line."""


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, talk or work through the file, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m isara_jax.chat", description="Ask a model, in a conversation or from a file.",
                                     allow_abbrev=False)
    parser.add_argument("--model", metavar="MODEL", help="name, hub id, folder, .gguf file, or workdir of a run (its last iteration); "
                        "left out, the starting model of the run that --icl_knn names")
    parser.add_argument("--icl_knn", metavar="WORKDIR", help="show the nearest pairs before each question: the seeds of this run, or of "
                        "a file")
    parser.add_argument("--k", type=int, help="so many pairs (with --icl_knn; else as the run, or 5)")
    parser.add_argument("--file", metavar="IN", help="questions to answer: .jsonl, .json or .csv with the columns of seeds, or .txt with "
                        "one a line")
    parser.add_argument("--question", metavar="COLUMN", help="the column of --file with the questions, where its name is not a usual one")
    parser.add_argument("--out", metavar="OUT", help="where the answers to --file go: a new .jsonl or .csv file")
    parser.add_argument("--max_new_tokens", type=int, metavar="N", help="most tokens of an answer (else as the run)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0, the default, takes the likeliest token each time")
    parser.add_argument("--top_p", type=float, default=1.0, metavar="P", help="nucleus of the draw (1: everything)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the draws, where the temperature is above 0")
    parser.add_argument("--form", choices=("plain", "chat"), help="how questions are spelled, where it is not to be the run's own")
    parser.add_argument("--cost", action="store_true", help="say after each answer what it cost (always with --icl_knn)")
    args = parser.parse_args(argv)
    try:
        _check(args)
        _batch(args) if args.file else _interactive(args)
    except UserError as e:
        print(f"isara_jax.chat: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted" + (f": {args.out} was not written" if args.file else ""), file=sys.stderr)
        return 130
    return 0


def _check(args: argparse.Namespace) -> None:
    """What can be wrong with a command before any file is read."""
    if not (args.model or args.icl_knn):
        raise UserError("--model is missing: name a model, or the workdir of a run. --help lists all flags.")
    if bool(args.file) != bool(args.out):
        raise UserError("--file=IN and --out=OUT belong together: questions from the one, answers to the other.")
    if args.question and not args.file:
        raise UserError("--question names a column of --file, and there is no --file.")
    if args.k is not None and not args.icl_knn:
        raise UserError(f"--k={args.k} is the number of pairs that --icl_knn shows, and there is no --icl_knn.")
    if args.k is not None and not 1 <= args.k <= 64:
        raise UserError(f"--k={args.k} is out of range: 1 to 64 pairs.")
    if args.max_new_tokens is not None and args.max_new_tokens < 1:
        raise UserError(f"--max_new_tokens={args.max_new_tokens} is out of range: at least 1.")
    if not 0 <= args.temperature <= 10 or not 0 < args.top_p <= 1 or not 0 <= args.seed < 2**63:
        raise UserError(f"--temperature={args.temperature} --top_p={args.top_p} --seed={args.seed}: the temperature is 0 to 10, top_p "
                        "above 0 and at most 1, the seed 0 to 2**63 - 1.")
    if args.out:
        _check_out(Path(args.out))


def _check_out(out: Path) -> None:
    if out.suffix.casefold() not in (".jsonl", ".csv"):
        raise UserError(f"--out={out}: the name must end in .jsonl or .csv, which says how answers are written.")
    if out.exists():
        raise UserError(f"--out={out} exists already and is not overwritten. Name another file, or move this one away.")
    preflight.writable(out.parent)


# ------------------------------------------------------------------------------------------------------------------------ what is asked
@dataclass(frozen=True)
class Plan:
    """What a command asks, before weights are read.

    Attributes:
        config: of the run, or made for a named model: model, form, markers, engine, and what retrieval needs.
        workdir: the run whose last iteration is asked, or None.
        pairs: what is retrieved from; None where nothing is.
    """

    config: Config
    blueprint: lm_lib.Blueprint
    workdir: Any
    pairs: list[Any] | None
    answer_tokens: int


def _plan(args: argparse.Namespace) -> Plan:
    pairs, pool_config = icl.read_pool(args.icl_knn) if args.icl_knn else (None, None)
    if not args.model and pool_config is None:
        raise UserError(f"--model is missing: {args.icl_knn} is a file of pairs, which names no model.")
    workdir = trained.run_at(args.model) if args.model else None
    if workdir:
        config = trained.config_of(workdir)
    elif pool_config:
        named = args.model or pool_config.model.name
        own = pool_config.model if named == pool_config.model.name else dataclasses.replace(pool_config.model, name=named, context=0)
        config = dataclasses.replace(pool_config, model=own)
    else:
        config = from_dict({"model": {"name": args.model}})
    if not workdir and args.model:
        _refuse_folder(args.model)
    blueprint = lm_lib.describe(config.model.name, context=config.model.context)
    form = args.form or (config.model.form if workdir or pool_config else "chat" if blueprint.tokenizer.chat_template else "plain")
    if form == "chat" and blueprint.tokenizer.chat_template is None:
        raise UserError(f"{config.model.name} ships no chat template, so it cannot be asked in the chat form. Use --form=plain.")
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, form=form))
    if pairs is not None:
        retrieval = (pool_config or Config()).retrieval
        retrieval = dataclasses.replace(retrieval, k=icl.pairs_shown(args.k, retrieval.k))
        config = dataclasses.replace(config, retrieval=retrieval)
    tokens = args.max_new_tokens or icl.limits(blueprint, config, pairs or ())[0] or min(ANSWER_TOKENS, blueprint.context // 2)
    if tokens >= blueprint.context:
        raise UserError(f"--max_new_tokens={tokens} leaves no room for a question in the {blueprint.context} tokens this model takes.")
    if args.max_new_tokens:  # a run's own limits stay as its evaluation had them
        config = dataclasses.replace(config, eval=dataclasses.replace(config.eval, answer_tokens=0))
    answer = dataclasses.replace(config.generate.answer, max_new_tokens=tokens)
    config = dataclasses.replace(config, generate=dataclasses.replace(config.generate, answer=answer))
    return Plan(config, blueprint, workdir, pairs, tokens)


def _refuse_folder(name: str) -> None:
    """A folder that is neither a model's nor a run's, said with both in mind."""
    folder = Path(name).expanduser()
    if folder.is_dir() and not (folder / "config.json").is_file() and not list(folder.glob("*.gguf")):
        there = ", ".join(sorted(f.name for f in folder.iterdir())[:8])
        raise UserError(f"{name} is neither a model's folder (config.json and *.safetensors) nor the workdir of a run that has begun. "
                        + (f"It holds {there}." if there else "It is empty."))


def _load(plan: Plan, engine: dict[str, int] | None = None) -> InContext:
    """The model with its weights, ready to be asked; sampled as the config says, or with another engine."""
    config = plan.config
    if plan.workdir and not plan.workdir.checkpoints.is_dir():  # before a base model is read for nothing
        raise UserError(f"{plan.workdir.root} holds no parameters: no iteration of this run was finished. Continue it first.")
    lm = lm_lib.load(config.model.name, config.model.dtype, blueprint=plan.blueprint)
    lm = lm.with_engine(**engine) if engine else lm.with_settings(config.generate)
    if plan.workdir:
        lm, _ = trained.last(plan.workdir, lm)
    if plan.pairs is not None:
        return icl.in_context(lm, plan.pairs, config)
    answer, room = icl.limits(lm, config)
    return InContext(lm.prepared(), forms.bare(make_template(config, plan.blueprint), room), answer)


def _said(plan: Plan, args: argparse.Namespace) -> str:
    """One line: which model, in which form, behind what."""
    model = f"{args.model}, its last iteration" if plan.workdir else plan.config.model.name
    pairs = f", behind the {plan.config.retrieval.k} nearest of {len(plan.pairs)} pairs of {args.icl_knn}" if plan.pairs is not None else ""
    how = "greedy" if not args.temperature else f"temperature {args.temperature}, seed {args.seed}"
    return f"{model}; {plan.config.model.form} form{pairs}; {how}, at most {plan.answer_tokens} tokens an answer"


# ---------------------------------------------------------------------------------------------------------------------- a conversation
@dataclass(frozen=True)
class Turn:
    """A question and its answer, as later prompts hold them."""

    question: str
    answer: str
    id: str = ""


class _Stopped(Exception):
    """Ctrl-C while an answer is drawn."""


def _interactive(args: argparse.Namespace) -> None:
    for stream, errors in ((sys.stdin, "replace"), (sys.stdout, "backslashreplace")):
        if hasattr(stream, "reconfigure"):  # bytes that are no text, and letters that a screen lacks, end no conversation
            stream.reconfigure(errors=errors)
    plan = _plan(args)
    _show(_said(plan, args) + "\n")
    if plan.config.sensitive:
        _show("This run is marked as sensitive: what it answers, and /pairs, may be harmful.\n")
    chat = Chat(_load(plan, LATENCY), temperature=args.temperature, top_p=args.top_p, seed=args.seed,
                cost=args.cost or plan.pairs is not None)
    _show(f"{NOT_CHECKED} /help lists what else there is. The first answer may take longer: programs are compiled for it.\n")
    for line in _lines(sys.stdin):
        if not chat.take(line):
            return


class Chat:
    """A conversation: its turns so far, and how answers are drawn. Text goes to the standard output as it grows."""

    def __init__(self, asked: InContext, *, temperature: float = 0.0, top_p: float = 1.0, seed: int = 0, cost: bool = False):
        self.turns: list[Turn] = []
        self._asked, self._temperature, self._top_p, self._seed, self._cost = asked, temperature, top_p, seed, cost
        self._count, self._pairs, self._sampler = 0, (), asked.lm.sampler(min(ROOM, asked.lm.context))

    def take(self, line: str) -> bool:
        """Answer a question, or do what a command says; False where the conversation is to end."""
        command = line.strip()
        if command in ("/quit", "/exit"):
            return False
        if command == "/reset":
            self.turns.clear()
            _show("The conversation is forgotten.\n")
        elif command == "/cost":
            self._cost = not self._cost
            _show(f"The cost of answers is {'shown' if self._cost else 'not shown'}.\n")
        elif command == "/pairs":
            shown = "".join(f"{p.id}  {tidy(p.question)}\n    {tidy(p.answer)}\n" for p in self._pairs)
            _show(shown or "No pair stood before a question.\n")
        elif command == "/help":
            _show(HELP + "\n")
        elif command.startswith("/") and command[1:].isalpha():
            _show(f"There is no {command}. These are there:\n{HELP}\n")
        elif command:
            try:
                self._answer(command)
            except UserError as e:
                _show(f"{e}\n")
        return True

    def _answer(self, question: str) -> None:
        start = time.perf_counter()
        try:
            prompt, held = self._asked.converse(question, self.turns)
        except UserError as e:
            text = str(e).removeprefix("question 0: ")
            raise UserError(text[:1].upper() + text[1:]) from None
        if held < len(self.turns):
            _show(f"[The {len(self.turns) - held} oldest turn(s) no longer fit the context of {self._asked.lm.context} tokens and are "
                  "forgotten.]\n")
            del self.turns[:len(self.turns) - held]
        request = self._asked.request(prompt.tokens, self._count, None, self._temperature, self._top_p)
        self._count, self._pairs = self._count + 1, prompt.pairs
        growing, drawn = _Growing(), 0
        try:
            with _interruptible() as check:

                def on_progress(done: int, total: int, prefilled: int, generated: int) -> None:
                    nonlocal drawn
                    drawn = generated
                    check()

                (made,) = self._asked.lm.run([request], seed=self._seed, on_progress=on_progress,
                                             on_text=lambda _, text: growing.show(text), sampler=self._sampler)
            text, finish, drawn = growing.end(made.text), made.finish, len(made.ids)
        except (_Stopped, KeyboardInterrupt):
            text, finish = growing.end(growing.shown), "interrupted"
        seconds = time.perf_counter() - start
        if text:
            self.turns.append(Turn(question, text))
        said = {"nan": "the model's logits are no numbers", "interrupted": "stopped",
                "length": f"cut off at {self._asked.answer_tokens} tokens; --max_new_tokens=N allows more"}
        notes = [said[finish]] if finish in said else [] if text else ["the model ended the answer before its first word"]
        if self._cost:
            notes.append(self._costs(prompt, drawn, seconds))
        if notes:
            _show(f"[{'; '.join(notes)}]\n")

    def _costs(self, prompt: icl.Prompt, drawn: int, seconds: float) -> str:
        without = f" ({prompt.bare_tokens} without its {len(prompt.pairs)} pairs)" if prompt.pairs else ""
        return f"{len(prompt.tokens)} tokens in the prompt{without}, {drawn} drawn, {seconds:.1f} s"


class _Growing:
    """A text on the screen that grows: what stands there already is not written again."""

    def __init__(self) -> None:
        self.shown = ""

    def show(self, text: str) -> None:
        """Write what is new in the beginning of an answer."""
        text = tidy(text)
        if text.startswith(self.shown):
            _show(text[len(self.shown):])
            self.shown = text

    def end(self, text: str) -> str:
        """Write the rest of the whole answer and end its line; return it as later turns hold it."""
        text = tidy(text)
        if not text.startswith(self.shown):  # possible only where a tokenizer takes back what its earlier tokens spelled
            _show("\n")
            self.shown = ""
        self.show(text)
        _show("\n")
        return text


@contextlib.contextmanager
def _interruptible() -> Iterator[Any]:
    """A function that raises `_Stopped` once Ctrl-C was pressed: an answer ends between two steps. A second Ctrl-C does not wait."""
    pressed: list[int] = []

    def press(*_: Any) -> None:
        pressed.append(1)
        if len(pressed) > 1:
            raise KeyboardInterrupt

    def check() -> None:
        if pressed:
            raise _Stopped

    try:
        before = signal.signal(signal.SIGINT, press)
    except ValueError:  # not the main thread: nobody presses keys here
        yield check
        return
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, before)


def _lines(stream: TextIO) -> Iterator[str]:
    """What a person enters, until the end of the stream; lines that end in a backslash are joined with the next."""
    terminal = stream.isatty()
    if terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (arrow keys and earlier lines, for input)
    held: list[str] = []
    while True:
        try:
            line = _line(stream, terminal, "… " if held else "> ")
        except KeyboardInterrupt:
            if not terminal:
                raise
            held.clear()
            _show("\n(Ctrl-D or /quit ends)\n")
            continue
        if line is None:
            if held:
                yield "\n".join(held)
            _show("\n" if terminal else "")
            return
        held.append(line.removesuffix("\\"))
        if not line.endswith("\\"):
            yield "\n".join(held)
            held.clear()


def _line(stream: TextIO, terminal: bool, prompt: str) -> str | None:
    """The next line, None at the end. Where no one types, it is shown after its prompt, so that the output reads as a conversation."""
    if terminal:
        try:
            return input(prompt)
        except EOFError:
            return None
    line = stream.readline()
    if not line:
        return None
    line = line.rstrip("\r\n")
    if line.strip():
        _show(f"{prompt}{line}\n")
    return line


def _show(text: str) -> None:
    """Write inert text at once."""
    sys.stdout.write(inert(text, keep="\n\t"))
    sys.stdout.flush()


# ------------------------------------------------------------------------------------------------------------------------------- a file
def _batch(args: argparse.Namespace) -> None:
    questions, out = read_questions(args.file, args.question), Path(args.out)
    plan = _plan(args)
    _check_rows(questions, plan, sheet=out.suffix.casefold() == ".csv")
    with Console(None, sensitive=plan.config.sensitive) as console:
        console.note(f"{len(questions.texts)} questions of {args.file}, asked of {_said(plan, args)}")
        asked = _load(plan)
        asked = _with_slots_that_fit(asked, plan.answer_tokens + max(map(len, asked.prompts(questions.texts))))
        with console.progress("answers", len(questions.texts)) as progress:
            made = asked.answer(questions.texts, temperature=args.temperature, top_p=args.top_p, seed=args.seed,
                                on_progress=lambda done, total, read, drawn: progress.update(done, tokens=read + drawn))
        _write(out, questions.texts, made, plan.pairs is not None)
        console.note(f"{len(made)} answers: {out}. {NOT_CHECKED}")
        if cut := sum(answer.finish == "length" for answer in made):
            console.warn(f"{cut} of them were cut off at {plan.answer_tokens} tokens (finish is length); --max_new_tokens=N allows more")
        mean = lambda name: sum(getattr(answer, name) for answer in made) / len(made)
        without = f" ({mean('bare_tokens'):.0f} without pairs)" if plan.pairs is not None else ""
        console.note(f"cost of a question: {mean('prompt_tokens'):.0f} tokens in the prompt{without}, {mean('new_tokens'):.0f} drawn, "
                     f"{progress.seconds / len(made):.2f} s")


def _with_slots_that_fit(asked: InContext, longest: int) -> InContext:
    """As many rows at a time as the memory holds, for rows of up to `longest` tokens."""
    lm = asked.lm
    slots = preflight.slots_that_fit(lm.cfg, lm.dtype, lm.mesh.devices.flatten().tolist(), slots=lm.engine.slots, tokens_per_slot=longest)
    return dataclasses.replace(asked, lm=lm.with_engine(slots=slots))


def _check_rows(questions: Questions, plan: Plan, sheet: bool) -> None:
    """Raise `UserError` for the questions that do not fit the context, or the sheet to be written, before the model is loaded."""
    _, room = icl.limits(plan.blueprint, plan.config, plan.pairs or ())
    template = make_template(plan.config, plan.blueprint)
    problems = {}
    for number, question in zip(questions.rows, questions.texts, strict=True):
        if found := icl.too_long(template, plan.blueprint.tokenizer, question, room):
            problems[number] = found
        elif sheet and len(question) >= sheets.MOST:
            problems[number] = f"the question has {len(question):,} characters, more than a cell holds: let --out end in .jsonl"
    if problems:
        raise UserError(complaint(questions.table, problems))


def _write(out: Path, questions: Sequence[str], answers: Sequence[icl.Answer], with_exemplars: bool) -> None:
    columns = ("question", "answer", "finish", *(["exemplars"] if with_exemplars else []))
    rows = [(q, a.text, a.finish, *([a.exemplars] if with_exemplars else [])) for q, a in zip(questions, answers, strict=True)]
    if out.suffix.casefold() == ".jsonl":
        write_jsonl(out, [dict(zip(columns, row)) for row in rows])
    else:
        sheets.write_sheet(out, columns, [(*row[:3], *map(" ".join, row[3:])) for row in rows])


if __name__ == "__main__":
    sys.exit(main())
