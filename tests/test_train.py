"""The whole loop on the tiny config: what it leaves, that it resumes, what it refuses."""
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

import isara_jax
from isara_jax import train
from isara_jax.checkpoint import Checkpoints
from isara_jax.common import UserError, read_jsonl
from isara_jax.data.pool import Pool
from isara_jax.methods import isara
from isara_jax.sft import loop as sft_loop
from isara_jax.work import Work

TINY = "--config=configs/tiny.py"


def command(workdir, *extra):
    return [TINY, f"--workdir={workdir}", *extra]


def texts(workdir):
    """The bytes of everything that must not differ between two runs."""
    return {str(p.relative_to(workdir)): p.read_bytes() for folder in ("pool", "iterations") for p in sorted((workdir / folder).rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    train.main(command(workdir))
    return workdir


def test_the_workdir_explains_itself(whole):
    names = {p.name for p in whole.iterdir()}
    assert names >= {"config.json", "command.txt", "versions.json", "log.txt", "metrics.jsonl", "pool", "iterations", "checkpoints", "model_card.md",
                     "dataset_card.md"}
    for t in (1, 2):
        assert {p.name for p in (whole / "iterations" / f"{t:02d}").iterdir()} >= {
            "questions.jsonl", "answers.jsonl", "kept.jsonl", "rejected.jsonl", "samples.jsonl", "loss.jsonl", "DONE"}
    assert len((whole / "command.txt").read_text().splitlines()) == 1
    log = (whole / "log.txt").read_text()
    assert "stopped: stop.iterations=2 reached" in log and "not fact-checked" in log and "0 human-written words" in log


def test_every_request_is_accounted_for(whole):
    for t in (1, 2):
        folder = whole / "iterations" / f"{t:02d}"
        questions, answers = read_jsonl(folder / "questions.jsonl"), read_jsonl(folder / "answers.jsonl")
        kept, rejected = read_jsonl(folder / "kept.jsonl"), read_jsonl(folder / "rejected.jsonl")
        done = json.loads((folder / "DONE").read_text())
        assert len(questions) == done["requests"] == len(kept) + len(rejected)
        assert len(answers) == sum(q["accepted"] for q in questions)
        assert done["kept"] == len(kept) > 0
        assert sum(done["funnel"]["rejected"].values()) == len(rejected)
        assert all(r["reason"] for r in rejected)


def test_provenance_is_in_every_record(whole):
    pool = Pool(whole / "pool").snapshot(2)
    by_id = {r.id: r for r in pool}
    seeds = [r for r in pool if r.origin == "seed"]
    held_out = {r["question"] for r in read_jsonl(whole / "iterations" / "00" / "samples.jsonl")}
    assert seeds and all(r.author == "language model" and r.licence == "Apache-2.0" for r in pool)
    for record in pool[len(seeds):]:
        assert record.origin == "generated" and record.iteration in (1, 2)
        assert record.address["anchor"] in by_id and record.address["anchor"] in record.question_exemplars
        for parent in record.question_exemplars + record.answer_exemplars:
            assert by_id[parent].iteration < record.iteration and by_id[parent].question not in held_out
        assert record.filters["question/novelty"]["score"] <= 0.7
        assert record.sampling["question"]["temperature"] == 0.7


def test_the_metrics_hold_costs_and_losses_and_the_texts_hold_no_times(whole):
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    kinds = {r["kind"] for r in rows}
    assert {"cost", "iteration", "stop"} <= kinds
    stages = {(r["iteration"], r["stage"]) for r in rows if r["kind"] == "cost"}
    assert {(t, s) for t in (1, 2) for s in ("questions", "answers", "fine-tuning", "checkpoint", "held-out loss")} <= stages
    generated = [r for r in rows if r["kind"] == "cost" and r["stage"] == "questions"]
    assert all(r["prefilled"] > 0 and r["generated"] > 0 and r["seconds"] > 0 and r["peak_gib"] > 0 for r in generated)
    keys = {key for path in (whole / "iterations").rglob("*.jsonl") for row in read_jsonl(path) for key in row}
    assert keys and not [key for key in keys if "second" in key or "time" in key or "date" in key]


def test_parameters_of_every_iteration_are_kept_and_nothing_of_the_optimizer(whole):
    assert Checkpoints(whole / "checkpoints").iterations() == [1, 2]
    assert not list((whole / "checkpoints").rglob("*unfinished*/*"))


def test_two_runs_are_the_same_byte_for_byte(whole, tmp_path):
    train.main(command(tmp_path / "again"))
    assert texts(tmp_path / "again") == texts(whole)


class Killed(BaseException):
    """Stands for a process that ends here."""


@pytest.mark.parametrize("place", ["answers", "append", "fit", "save", "measure", "second iteration"])
def test_a_killed_run_continues_to_the_same_result(whole, tmp_path, monkeypatch, place):
    """Ended before the answers, before the pool grows, inside fine-tuning, before the checkpoint, after it, and one iteration later."""
    owner, name, skip = {"answers": (isara, "answer", 0), "append": (Pool, "append", 1), "fit": (sft_loop, "fit", 0), "save": (Checkpoints, "save", 0),
                         "measure": (Work, "measure", 1), "second iteration": (isara, "answer", 1)}[place]
    original, calls = getattr(owner, name), []

    def dies(*args, **kwargs):
        calls.append(1)
        if len(calls) > skip:
            raise Killed
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, dies)
    with pytest.raises(Killed):
        train.main(command(tmp_path / "run"))
    monkeypatch.undo()
    asked = []
    monkeypatch.setattr(isara, "ask", lambda *args, _original=isara.ask: asked.append(args[1]) or _original(*args))
    train.main(command(tmp_path / "run"))
    assert texts(tmp_path / "run") == texts(whole)
    assert asked == ([2] if place != "second iteration" else []), "a finished question stage was done again"


def test_a_finished_run_does_nothing_and_more_iterations_may_follow(whole, tmp_path, monkeypatch):
    workdir = tmp_path / "run"
    train.main(command(workdir, "--config.stop.iterations=1"))
    monkeypatch.setattr(Work, "_generate", None)  # nothing may be generated
    train.main(command(workdir, "--config.stop.iterations=1"))
    monkeypatch.undo()
    train.main(command(workdir))
    assert texts(workdir) == texts(whole)


def test_a_changed_identity_is_refused(whole, capsys):
    before = texts(whole)
    with pytest.raises(SystemExit) as e:
        train.main(command(whole, "--config.sft.lr=0.5"))
    assert e.value.code == 2
    message = capsys.readouterr().err
    assert "sft.lr" in message and "0.5" in message and "another --workdir" in message
    assert texts(whole) == before


def test_eight_devices_keep_the_same_pairs(whole, tmp_path):
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-m", "isara_jax.train", *command(tmp_path / "run")], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for t in (1, 2):
        name = f"iterations/{t:02d}/kept.jsonl"
        assert (tmp_path / "run" / name).read_bytes() == (whole / name).read_bytes()


def test_a_round_that_accepts_nothing_ends_cleanly(tmp_path, capsys):
    train.main(command(tmp_path / "run", "--config.filters.min_words=100"))
    assert "stopped: iteration 1 kept none of" in (tmp_path / "run" / "log.txt").read_text()
    assert Checkpoints(tmp_path / "run" / "checkpoints").iterations() == []


def test_dry_run_shows_three_prompts_and_writes_nothing(tmp_path, capsys):
    train.main(command(tmp_path / "run", "--dry_run"))
    out = capsys.readouterr().out
    assert out.count("--- prompt") == 3 and "Q:" in out and "tokens prefilled" in out and "estimated" in out
    assert not (tmp_path / "run").exists()


def test_one_seed_works_and_says_what_it_cannot_do(tmp_path, capsys):
    seeds = tmp_path / "one.jsonl"
    seeds.write_text(json.dumps({"question": "Why is the sky blue?", "answer": "Air scatters blue light more than red."}) + "\n")
    train.main(command(tmp_path / "run", f"--config.data.seeds={seeds}", "--config.stop.iterations=1"))
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "nothing is held out" in log and "is more than the 1 seeds" in log and "unknown" in log


def test_sensitive_runs_show_no_text(tmp_path, capsys):
    train.main(command(tmp_path / "run", "--config.sensitive=True", "--config.stop.iterations=1"))
    shown = capsys.readouterr().out + (tmp_path / "run" / "log.txt").read_text()
    kept = read_jsonl(tmp_path / "run" / "iterations" / "01" / "kept.jsonl")
    seeds = [r.question for r in Pool(tmp_path / "run" / "pool").snapshot(0)]
    assert kept and not any(r["question"] in shown for r in kept if len(r["question"]) > 8)
    assert not any(q in shown for q in seeds)


# ----------------------------------------------------------------------------------------------------------------- python API
def test_align_takes_pairs_and_does_not_change_the_model(tmp_path):
    lm = isara_jax.load("tiny-random", dtype="float32")
    before = jax.tree.map(np.asarray, lm.params)
    pairs = [(f"What is number {w} good for in counting?", f"It counts {w} things at a time.") for w in ("one", "two", "three", "four")]
    config = {"generate": {"requests": 4, "question": {"max_new_tokens": 16}, "answer": {"max_new_tokens": 16}}, "retrieval": {
        "encoder": "tiny-random-encoder", "k": 1}, "filters": {"question": ("min_words",), "answer": ("min_words",), "min_words": 1}, "stop": {"iterations": 1},
        "sft": {"epochs": 1, "lr": 1e-2}}
    run = isara_jax.align(lm, pairs, config, tmp_path / "run")
    assert [m["iteration"] for m in run.metrics] == [0, 1] and run.workdir == tmp_path / "run"
    assert len(run.pool) == 4 + run.metrics[1]["kept"] > 4
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(lm.params), strict=True))
    assert not np.array_equal(run.lm.params["norm"]["scale"], lm.params["norm"]["scale"])
    assert run.lm.generate(["Q: What is number two good for?\nA:"], max_new_tokens=4)[0][0].ids


def test_align_refuses_an_unknown_key_before_any_work(tmp_path):
    with pytest.raises(UserError, match="Did you mean sft.epochs"):
        isara_jax.align(None, [("a", "b")], {"sft": {"epoch": 1}}, tmp_path / "run")
    with pytest.raises(UserError, match="Did you mean configs/tiny.py"):
        isara_jax.align(None, [("a", "b")], "configs/tinny.py", tmp_path / "run")
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------------------------------ bad input
BAD = {
    "no seeds file": (lambda p: ["--config.data.seeds=nowhere.jsonl"], "nowhere.jsonl"),
    "empty file": (lambda p: [f"--config.data.seeds={write(p, 'e.jsonl', '')}"], "empty"),
    "broken line": (lambda p: [f"--config.data.seeds={write(p, 'b.jsonl', GOOD * 2 + '{oops')}"], "line 3|row 3"),
    "wrong columns": (lambda p: [f"--config.data.seeds={write(p, 'c.csv', 'thema,notiz' + chr(10) + 'a,b' + chr(10))}"], "thema"),
    "unknown key": (lambda p: ["--config.sft.lrr=1"], "lr"),
    "wrong type": (lambda p: ["--config.sft.epochs=many"], "epochs"),
    "out of range": (lambda p: ["--config.generate.question.top_p=2.0"], "top_p"),
    "no such model": (lambda p: ["--config.model.name=./no/such/model"], "no/such/model"),
    "context too short": (lambda p: ["--config.model.context=48"], "48 tokens"),
    "mesh": (lambda p: ["--config.mesh.fsdp=7"], "mesh"),
}
GOOD = '{"question": "Why is the sky blue today?", "answer": "Air scatters blue light."}\n'


def write(folder, name, text):
    (folder / name).write_text(text)
    return folder / name


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_message_and_leaves_nothing(tmp_path, capsys, case):
    extra, message = BAD[case]
    with pytest.raises(SystemExit) as e:
        train.main(command(tmp_path / "run", *extra(tmp_path)))
    assert e.value.code == 2
    err = capsys.readouterr().err
    import re

    assert re.search(message, err) and "Traceback" not in err, err
    assert not (tmp_path / "run" / "pool").exists() and not (tmp_path / "run" / "config.json").exists()


def test_an_unwritable_workdir_is_found_first(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as e:
        train.main(command(tmp_path / "file" / "run"))
    assert e.value.code == 2 and "file" in capsys.readouterr().err
