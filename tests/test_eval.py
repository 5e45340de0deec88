"""The entry that evaluates: its command line, and blind sheets of a real (tiny) run, from kept answers and from new ones."""
from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from isara_jax import blind, cli, train, trained
from isara_jax import eval as eval_entry
from isara_jax.console import Console

WORDS = ("kettle", "ladder", "violin", "anchor", "pillow", "rocket", "garden", "mirror", "basket", "candle", "bridge", "hammer")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of one iteration, judged on four questions whose answers it kept; trained hard, so that answers change."""
    folder = tmp_path_factory.mktemp("eval")
    rows = [{"question": f"{w} {w[::-1]} what {w[1:]}{w} is {w[:3]} for?", "answer": f"A {w} helps."} for w in WORDS * 2]
    rows = [row | {"question": row["question"] + (" now" if i < len(WORDS) else "")} for i, row in enumerate(rows)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("isara_jax.kept.cache_folder", lambda: folder / "cache")
        train.main(["--config=configs/tiny.py", f"--workdir={folder / 'run'}", f"--config.eval.benchmark={folder / 'rows.jsonl'}",
                    "--config.eval.arms=base,isara", "--config.eval.rows=4", "--config.eval.answer_tokens=12", "--config.stop.iterations=1",
                    "--config.sft.lr=0.02", "--config.sft.epochs=6"])
    return folder / "run"


def copy(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "run"))


def asked(questions=4):
    return blind.Asked(questions, "base", "dev", 0)


def test_answers_made_anew_are_those_that_the_run_kept(whole, tmp_path):
    run = copy(whole, tmp_path)
    kept = blind.kept_answers(run, asked())
    workdir = trained.run_folder(str(run))
    with Console(None) as console:
        made = eval_entry._both(workdir, trained.config_of(workdir), asked(), console)
    assert (made.iteration, made.tuned_form, made.other_form) == (kept.iteration, kept.tuned_form, kept.other_form)
    assert made.rows == tuple(blind.pick(kept.rows, asked())) and len(made.rows) >= 2
    assert any(row.tuned != row.other for row in made.rows)


def test_a_sheet_is_written_filled_in_and_read_without_a_config(whole, tmp_path, capsys, monkeypatch):
    run = copy(whole, tmp_path)
    monkeypatch.setattr(eval_entry, "_both", None)  # what was kept is enough
    command = [f"--model={run}", "--blind=4"]
    eval_entry.main(command)
    said = capsys.readouterr().out
    assert "isara and base in random order" in said and "not fact-checked" in said and "report.html" in said
    sheet = run / "blind" / "answers.csv"
    sheet.write_text(sheet.read_text(encoding="utf-8-sig").replace('"",""\n', '"A",""\n'), encoding="utf-8-sig")
    eval_entry.main(command)
    assert "win rate" in capsys.readouterr().out
    found = json.loads((run / "blind" / "results.json").read_text())["answers"]
    questions = len(blind.pick(blind.kept_answers(run, asked()).rows, asked()))
    assert found["undecided"] == 0 and found["wins"] + found["losses"] + found["ties"] == questions


def test_a_sensitive_run_shows_counts_and_no_text(whole, tmp_path, capsys):
    run = copy(whole, tmp_path)
    stored = json.loads((run / "config.json").read_text())
    stored["config"]["sensitive"] = True
    (run / "config.json").write_text(json.dumps(stored))
    eval_entry.main([f"--model={run}", "--blind=4"])
    said = capsys.readouterr().out
    assert not any(word in said for word in WORDS) and "answers.csv" in said


MISTAKES = [
    (["--blind=0"], "--blind=0: give the number of questions that are compared, a whole number of at least 1"),
    (["--blind=-3"], "--blind=-3: give the number"),
    (["--blind=many"], "--blind=many: give the number"),
    (["--blind=2.5"], "--blind=2.5: give the number"),
    (["--blind=2", "--against=isara"], "would compare the aligned model with itself"),
    (["--blind=2", "--against=icl_knn"], "the run kept no answers of this arm on dev rows"),
    (["--blind=2", "--out=x"], "--out does not go with --blind"),
    (["--against=base"], "Add --blind=N"),
    (["--config.seed=3"], "--config.seed changes a field of a config, and no config is named. Add --config=FILE."),
]


@pytest.mark.parametrize("argv, message", MISTAKES, ids=[" ".join(argv) for argv, _ in MISTAKES])
def test_a_mistake_is_one_message(whole, argv, message, capsys):
    with pytest.raises(SystemExit) as e:
        eval_entry.main([f"--model={whole}", *argv])
    assert e.value.code == 2 and message in capsys.readouterr().err and not (whole / "blind" / "answers.csv").exists()


@pytest.mark.parametrize("argv, message", [
    (["--model=tiny-random", "--blind=3"], "tiny-random is no folder of a run (it has no config.json of one)"),
    (["--model=tiny-random"], "tiny-random is no folder of a run, so its config cannot be taken. --config is missing: name a config file"),
    (["--blind=3"], "--model is missing"),
])
def test_what_is_no_run_is_told(argv, message, capsys):
    with pytest.raises(SystemExit) as e:
        eval_entry.main(argv)
    assert e.value.code == 2 and message in capsys.readouterr().err


def test_a_run_that_was_judged_on_nothing_has_no_questions(whole, tmp_path, capsys):
    run = copy(whole, tmp_path)
    stored = json.loads((run / "config.json").read_text())
    stored["config"]["eval"]["benchmark"] = ""
    (run / "config.json").write_text(json.dumps(stored))
    shutil.rmtree(run / "evaluation")
    with pytest.raises(SystemExit):
        eval_entry.main([f"--model={run}", "--blind=3"])
    assert "was judged on nothing, so there are no held-out questions to compare answers on" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------------------- optional configs
def test_an_optional_config_may_be_left_out_or_given():
    assert cli.parse(["--model=m"], eval_entry.COMMAND).config is None
    args = cli.parse(["--model=m", "--config=configs/tiny.py", "--config.seed=3"], eval_entry.COMMAND)
    assert (args.model, args.config.seed, args.config.model.name) == ("m", 3, "tiny-random")
    assert "[--config=FILE[:ARG]" in cli.usage(eval_entry.COMMAND) and "--config=FILE[:ARG] --workdir" in cli.usage()
