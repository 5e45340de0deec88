"""Chat: what is sent, what is shown while it grows, commands, Ctrl-C, files of questions, and what is refused before a model is read."""
import csv
import io
import json
import re
import signal
from types import SimpleNamespace

import jax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import isara_jax
from isara_jax import chat, cli, icl
from isara_jax.common import read_jsonl
from isara_jax.config import from_dict
from isara_jax.data.prompts import Template, tidy
from isara_jax.evals import forms
from isara_jax.session import make_template
from isara_jax.workdir import Workdir

TINY = "--model=tiny-random"
PAIRS = [(f"What is {word}?", f"It is {word[::-1]}.") for word in ("a kettle", "the moon", "an owl", "salt", "glass", "bread")]


@pytest.fixture(scope="module")
def lm():
    """The tiny random model with larger weights, which does not say the same to everything, as chat loads it."""
    small = isara_jax.load("tiny-random", "float32").with_engine(**chat.LATENCY)
    return small.with_params(jax.tree.map(lambda x: x * 6 if x.ndim > 1 else x, small.params))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of one iteration with markers and an answer limit of its own."""
    folder = tmp_path_factory.mktemp("chat")
    config = cli.load("configs/tiny.py")
    config.prompt.question_marker, config.stop.iterations, config.generate.requests = "Ask:", 1, 8
    isara_jax.align(isara_jax.load("tiny-random", "float32"), PAIRS, from_dict(config), folder / "run")
    return folder / "run"


class Heard:
    """A model that keeps the requests it got and goes on."""

    def __init__(self, lm, on_text=None):
        self.lm, self.requests, self.on_text = lm, [], on_text

    def __getattr__(self, name):
        return getattr(self.lm, name)

    def run(self, requests, *, on_text, **more):
        self.requests += requests
        both = lambda i, text: (on_text(i, text), self.on_text(i, text))
        return self.lm.run(requests, on_text=both if self.on_text else on_text, **more)


def asked(lm, room=400, tokens=24, template=Template("plain")):
    return icl.InContext(lm, forms.bare(template, room), tokens)


def talk(monkeypatch, capsys, lines, *flags):
    """(exit status, what is printed, what is complained of) of a conversation through a pipe."""
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    status = chat.main(list(flags))
    return status, *capsys.readouterr()


# ---------------------------------------------------------------------------------------------------------------------- what is sent
def test_the_first_question_is_asked_as_it_was_trained(run):
    plan = chat._plan(_args(f"--model={run}"))
    heard = Heard(chat._load(plan, chat.LATENCY).lm)
    answer, room = icl.limits(heard.lm, plan.config)
    talker = chat.Chat(icl.InContext(heard, forms.bare(make_template(plan.config, plan.blueprint), room), answer))
    talker.take("Why?")
    resolved = Workdir(run).stored()["identity"]["resolved"]
    assert bytes(heard.requests[0].tokens) == b"Ask: Why?\nA:" and heard.requests[0].stop == ("\nAsk:",)
    assert heard.requests[0].max_new_tokens == plan.answer_tokens == resolved["answer_tokens"] == 24
    weights = jax.tree.leaves(heard.lm.params)
    assert any((a != b).any() for a, b in zip(weights, jax.tree.leaves(isara_jax.load("tiny-random", "float32").params), strict=True))


def test_earlier_turns_come_before_the_question(lm, capsys):
    heard = Heard(lm)
    talker = chat.Chat(asked(heard), temperature=1.0)
    for question in ("Who?", "Where?", "When?"):
        talker.take(question)
    turns = talker.turns
    expected = Template("plain", order="nearest_first").answer_segments(turns[:2], "When?")
    assert [t.question for t in turns] == ["Who?", "Where?", "When?"] and all(t.answer for t in turns)
    assert list(heard.requests[2].tokens) == lm.tokenizer.encode_segments(expected)
    talker.take("/reset")
    talker.take("Why?")
    assert bytes(heard.requests[3].tokens) == b"Q: Why?\nA:" and len(talker.turns) == 1


def test_turns_share_what_stands_before_them(lm, capsys):
    """The second prompt begins with the first; its whole blocks of 64 tokens are not computed again, and the answer is the one without them."""
    first = "Who is it that asks? " * 8
    talker = chat.Chat(asked(lm, tokens=20), seed=3, temperature=1.0)
    talker.take(first)
    talker.take("Why?")
    assert talker._sampler.counts.shared == (len(b"Q: ") + len(first.strip()) + len(b"\nA:")) // 64 * 64 > 0
    alone = chat.Chat(asked(lm, tokens=20), seed=3, temperature=1.0)
    alone.take(first)
    alone._sampler = lm.sampler(lm.context)
    alone.take("Why?")
    assert alone.turns == talker.turns and alone._sampler.counts.shared == 0


def test_turns_that_no_longer_fit_are_dropped_and_a_question_that_never_fits_is_told(lm, capsys):
    talker = chat.Chat(asked(lm, room=60), temperature=1.0)
    talker.take("Who is it that asks?")
    talker.take("Who is it that answers?")
    assert "oldest turn(s) no longer fit the context of 512 tokens" in capsys.readouterr().out and len(talker.turns) == 1
    assert talker.take("x" * 100) and "Its prompt has 106 tokens, and of this model's context 60 are left" in capsys.readouterr().out
    assert len(talker.turns) == 1 and talker.take("Why?")


def _args(*flags):
    """Parsed flags."""
    names = dict(model=None, icl_knn=None, k=None, file=None, out=None, question=None, max_new_tokens=None, temperature=0.0, top_p=1.0, seed=0,
                 form=None, cost=False)
    given = dict(flag.removeprefix("--").split("=", 1) for flag in flags)
    return SimpleNamespace(**names | {name: int(value) if name == "max_new_tokens" else value for name, value in given.items()})


# --------------------------------------------------------------------------------------------------------------------- what is shown
@pytest.mark.parametrize("seed", range(8))
def test_what_is_shown_piece_by_piece_is_the_answer(lm, capsys, seed):
    one = asked(lm, tokens=60)
    chat.Chat(one, temperature=1.0, seed=seed).take("Why?")
    (alone,) = lm.run([one.request(tuple(b"Q: Why?\nA:"), 0, None, 1.0, 1.0)], seed=seed)
    assert capsys.readouterr().out.startswith(chat.inert(tidy(alone.text), keep="\n\t") + "\n") and tidy(alone.text)


@settings(max_examples=200, deadline=None)
@given(st.text("ab \n\t\x1b\u202e", max_size=20))
def test_growing_text_is_tidy_and_inert_and_written_once(text):
    written = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chat.sys.stdout, "write", written.append)
        growing = chat._Growing()
        for end in range(len(text) + 1):
            growing.show(text[:end])
        assert growing.end(text) == tidy(text)
    assert "".join(written) == chat.inert(tidy(text), keep="\n\t") + "\n" and not set("".join(written)) & set("\x1b\u202e")


def test_ctrl_c_ends_the_answer_and_not_the_conversation(lm, capsys):
    heard = Heard(lm, on_text=lambda i, text: signal.raise_signal(signal.SIGINT) if text.strip() else None)
    before, talker = signal.getsignal(signal.SIGINT), chat.Chat(asked(heard, tokens=100), temperature=1.0)
    assert talker.take("Why?") and "[stopped]" in capsys.readouterr().out
    heard.on_text = None
    assert signal.getsignal(signal.SIGINT) is before and talker.take("How?")
    assert [t.question for t in talker.turns] == ["Why?", "How?"] and 0 < len(talker.turns[0].answer.encode()) < 100


# ------------------------------------------------------------------------------------------------------------------ through a pipe
def test_a_conversation_through_a_pipe(monkeypatch, capsys):
    lines = "Why?\n\n/cost\nWhat\\\nis it?\n/nothing\n/help\n/pairs\n/quit\nNever asked\n"
    status, out, _ = talk(monkeypatch, capsys, lines, TINY, "--max_new_tokens=8", "--temperature=1")
    assert status == 0 and out.count("not fact-checked") == 1 and "> Why?\n" in out and "> What\\\n… is it?\n" in out
    assert out.count("tokens in the prompt") == 1 and "There is no /nothing" in out and "No pair stood" in out and "Never asked" not in out


def test_the_end_of_the_pipe_ends_the_conversation(monkeypatch, capsys):
    status, out, _ = talk(monkeypatch, capsys, "Why?\\", TINY, "--max_new_tokens=4")
    assert status == 0 and "> Why?\\" in out and "cut off at 4 tokens" in out


def test_icl_knn_shows_pairs_and_says_what_they_cost(run, monkeypatch, capsys):
    status, out, _ = talk(monkeypatch, capsys, "Why?\n/pairs\n", f"--icl_knn={run}", "--k=3")
    asked = isara_jax.icl_knn(isara_jax.load("tiny-random"), run, 3)
    (prompt,) = asked.ask(["Why?"])
    assert status == 0 and f"behind the 3 nearest of 6 pairs of {run}" in out
    assert f"{len(prompt.tokens)} tokens in the prompt (12 without its 3 pairs)" in out
    assert [line.split()[0] for line in out.splitlines() if line.count("  What is ")] == [p.id for p in prompt.pairs]


# ---------------------------------------------------------------------------------------------------------------------------- files
def test_a_file_of_questions_becomes_a_file_of_answers(run, tmp_path, capsys):
    (tmp_path / "in.csv").write_text("id;Question;answer\n1;Why?;\n2;=1+1?;x\n3;Why?;\n", encoding="utf-8")
    flags = [f"--file={tmp_path / 'in.csv'}", f"--icl_knn={run}", "--k=2"]
    assert chat.main([*flags, f"--out={tmp_path / 'out.jsonl'}"]) == chat.main([*flags, f"--out={tmp_path / 'out.csv'}"]) == 0
    rows = read_jsonl(tmp_path / "out.jsonl")
    served = isara_jax.icl_knn(isara_jax.load("tiny-random"), run, 2).answer(["Why?", "=1+1?", "Why?"])
    assert rows == [{"question": q, "answer": a.text, "finish": a.finish, "exemplars": list(a.exemplars)}
                    for q, a in zip(("Why?", "=1+1?", "Why?"), served)]
    with open(tmp_path / "out.csv", encoding="utf-8-sig", newline="") as f:
        sheet = list(csv.DictReader(f))
    assert [row["question"] for row in sheet] == ["Why?", "'=1+1?", "Why?"] and sheet[0]["exemplars"] == " ".join(served[0].exemplars)
    said = capsys.readouterr().out
    assert "cost of a question:" in said and "without pairs" in said and "not fact-checked" in said


def test_other_files_of_questions(tmp_path):
    (tmp_path / "in.txt").write_text("Why?\r\n\r\n How? \r\n", encoding="utf-8-sig")
    (tmp_path / "in.jsonl").write_text(json.dumps({"instruction": "Add", "input": "1, 2"}) + "\n", encoding="utf-8")
    (tmp_path / "in.json").write_text(json.dumps([{"Frage": "Warum?"}]), encoding="utf-8")
    read = lambda name, column=None: chat.read_questions(tmp_path / name, column)
    assert read("in.txt").texts == ("Why?", "How?") and read("in.txt").rows == (1, 3)
    assert read("in.jsonl").texts == ("Add\n1, 2",) and read("in.json", "frage").texts == ("Warum?",)


# ------------------------------------------------------------------------------------------------------------------ what is refused
@pytest.mark.parametrize("flags, said", [
    ([], "--model is missing"), ([TINY, "--k=3"], "there is no --icl_knn"), ([TINY, "--file=in.txt"], "belong together"),
    ([TINY, "--max_new_tokens=0"], "at least 1"), ([TINY, "--max_new_tokens=600"], "leaves no room for a question in the 512 tokens"),
    ([TINY, "--top_p=0"], "top_p above 0"), ([TINY, "--temperature=nan"], "the temperature is 0 to 10"), ([TINY, "--form=chat"], "Use --form=plain"),
    ([TINY, "--question=Q"], "there is no --file"), (["--icl_knn={run}", "--k=65"], "1 to 64 pairs"),
    (["--model={here}"], "is neither a model's folder .* nor the workdir of a run that has begun. It holds "),
    ([TINY, "--icl_knn={here}"], "is not the workdir of a run"), (["--model={unfinished}"], "no iteration of this run was finished"),
    (["--model={crossed}"], "train one on every pair: the same command with --refit_all makes"),
    ([TINY, "--file={here}/in.txt", "--out=x.doc"], "must end in .jsonl or .csv"),
    ([TINY, "--file={here}/in.txt", "--out={here}/in.csv"], "exists already and is not overwritten"),
    ([TINY, "--file={here}/nothing.txt", "--out={here}/x.csv"], "nothing.txt cannot be read: No such file"),
    ([TINY, "--file={here}/in.csv", "--out={here}/x.csv"], "in.csv: no column for questions .*'a', 'b'.* --question=COLUMN"),
    ([TINY, "--file={here}/in.txt", "--out={here}/x.csv"], "in.txt, line 2: its prompt has 606 tokens, and of this model's context 256 are left"),
    ([TINY, "--file={here}/in.json", "--out={here}/x.csv"], "in.json, item 2: the question .column 'question'. is empty"),
    ([TINY, "--file={here}/in.xlsx", "--out={here}/x.csv"], "save it as 'CSV UTF-8'")])
def test_what_cannot_be_done_is_said_before_a_model_is_read(run, tmp_path, capsys, monkeypatch, flags, said):
    (tmp_path / "in.txt").write_text("Why?\n" + "x" * 600, encoding="utf-8")
    (tmp_path / "in.csv").write_text("a,b\n1,2\n", encoding="utf-8")
    (tmp_path / "in.json").write_text('[{"question": "Why?"}, {"question": " "}]', encoding="utf-8")
    (tmp_path / "in.xlsx").write_bytes(b"PK\x03\x04")
    (tmp_path / "crossed" / "folds" / "1").mkdir(parents=True)
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "config.json").write_bytes((run / "config.json").read_bytes())
    monkeypatch.setattr(chat.lm_lib, "load", lambda *_, **__: pytest.fail("a model was read"))
    places = {"run": run, "here": tmp_path, "unfinished": tmp_path / "unfinished", "crossed": tmp_path / "crossed"}
    assert chat.main([flag.format(**places) for flag in flags]) == 2
    error = capsys.readouterr().err
    assert re.search(said, error) and "Traceback" not in error and not (tmp_path / "x.csv").exists()


# --------------------------------------------------------------------------------------------------------------------- the real model
def test_a_real_model_is_asked_in_its_chat_form_and_streams(smollm2_gguf, capsys):
    plan = chat._plan(_args("--model=smollm2-135m-instruct", "--max_new_tokens=24"))
    assert plan.config.model.form == "chat" and chat._plan(_args("--model=smollm2-135m-instruct", "--form=plain")).config.model.form == "plain"
    heard = Heard(chat._load(plan, chat.LATENCY).lm)
    talker = chat.Chat(asked(heard, tokens=24, template=make_template(plan.config, plan.blueprint)))
    for question in ("Was ist ein Emoji? Zeige 🙂.", "Again?"):
        talker.take(question)
    shown = capsys.readouterr().out
    assert all(turn.answer in shown for turn in talker.turns) and len(talker.turns) == 2
    rendered = plan.blueprint.tokenizer.render_chat([
        {"role": "system", "content": ""}, {"role": "user", "content": talker.turns[0].question},
        {"role": "assistant", "content": talker.turns[0].answer}, {"role": "user", "content": "Again?"}], add_generation_prompt=True)
    assert plan.blueprint.tokenizer.decode(heard.requests[1].tokens) in rendered.replace("<|im_start|>", "").replace("<|im_end|>", "")
