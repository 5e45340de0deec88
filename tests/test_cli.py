"""The command line: what it accepts, and the one message for each mistake."""
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from isara_jax import cli
from isara_jax.common import UserError

ROOT = Path(__file__).parent.parent
TINY = "--config=configs/tiny.py"


@pytest.fixture
def write(tmp_path):
    """A config file with the given body of get_config(c): returns its path."""
    def write(body, head="from isara_jax.config import defaults\n"):
        path = tmp_path / "mine.py"
        path.write_text(f"{head}def get_config(argument='none'):\n    c = defaults()\n    {body}\n    return c\n")
        return path
    return write


@pytest.mark.parametrize("argv, epochs", [
    ([TINY, "--workdir=w"], 1),
    (["--config", "configs/tiny.py", "--workdir", "w", "--config.sft.epochs", "7"], 7),
    (["--config.sft.epochs=7", "--workdir=w", TINY], 7),
    ([TINY, "--workdir=w", "--config.sft.epochs=7", "--config.sft.epochs=8"], 8),
    (["--config=configs/quickstart.py", TINY, "--workdir=w"], 1),
    (["-config=tiny", "-workdir=w"], 1),
    (["--config=tiny.py", "--workdir=w"], 1),
])
def test_flags_may_come_in_any_order_and_form(argv, epochs):
    args = cli.parse(argv)
    assert (args.config.sft.epochs, args.workdir, args.dry_run) == (epochs, "w", False)


def test_every_kind_of_field_can_be_overridden():
    args = cli.parse([TINY, "--workdir=w", "--dry_run", "--config.seed=9007199254740993", "--config.sft.lr=1",
                      "--config.data.seeds=a=b.csv", "--config.sensitive", "--config.filters.question=parse,novelty",
                      "--config.sft.betas=(0.8, 0.9)", "--config.data.question=7"])
    config = args.config
    assert args.dry_run and config.sensitive and config.seed == 9007199254740993
    assert (config.sft.lr, config.data.seeds, config.data.question) == (1.0, "a=b.csv", "7")
    assert config.filters.question == ("parse", "novelty") and config.sft.betas == (0.8, 0.9)
    assert not cli.parse([TINY, "--workdir=w", "--config.sensitive", "--noconfig.sensitive"]).config.sensitive


def test_parsing_twice_starts_afresh():
    assert cli.parse([TINY, "--workdir=a", "--config.seed=5"]).config.seed == 5
    assert cli.parse([TINY, "--workdir=b"]).config.seed == 0


MISTAKES = {
    "unknown key": (["--config.sft.epoch=3"], r"--config.sft.epoch does not exist. Did you mean --config.sft.epochs\?"),
    "key without its section": (["--config.lr=3"], r"Did you mean --config.sft.lr\?"),
    "key like nothing": (["--config.zzz=3"], "--help lists all fields"),
    "a section": (["--config.model=x"], "--config.model is a section; set one of its fields: model.name"),
    "no number": (["--config.sft.epochs=many"], "--config.sft.epochs=many has the wrong type: int is needed, like its default 3"),
    "not whole": (["--config.sft.epochs=1.5"], "--config.sft.epochs=1.5 has the wrong type: int"),
    "no truth": (["--config.sensitive=perhaps"], "--config.sensitive=perhaps has the wrong type: bool"),
    "a value is lacking": (["--config.sft.epochs"], "config.sft.epochs"),
    "out of range": (["--config.sft.lr=7"], "config.sft.lr=7.0 is out of range: above 0 and at most 1"),
    "not a choice": (["--config.model.form=chatt"], "config.model.form='chatt' is not one of plain, chat. Did you mean 'chat'"),
    "unknown flag": (["--wrkdir=x"], r"'wrkdir'. Did you mean: workdir\?"),
    "no flag": (["something"], "'something' is not a flag; flags have the form --name=VALUE"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_with_the_next_step(mistake):
    argv, message = MISTAKES[mistake]
    with pytest.raises(UserError) as e:
        cli.parse([TINY, "--workdir=w", *argv])
    assert re.search(message, str(e.value)), e.value
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("argv, message", [
    ([], "--config is missing: name a config file, .*configs/quickstart.py, .*configs/tiny.py"),
    (["--config="], "--config is missing"),
    (["--config"], "--config is missing"),
    ([TINY], "--workdir is missing"),
    (["--config=configs/tinny.py", "--workdir=w"], r"--config=configs/tinny.py: no such file .* Did you mean configs/tiny.py\?"),
    (["--config=configs", "--workdir=w"], "--config=configs: is a folder"),
    (["--config=/no/where/x.py", "--workdir=w"], "--config=/no/where/x.py: no such file"),
    (["--config=__init__", "--workdir=w"], "no such file"),
    (["--config=configs/tiny.py:opt", "--workdir=w"], r"get_config\(\) takes 0 positional arguments but 1 was given"),
])
def test_what_is_missing_is_named(argv, message):
    with pytest.raises(UserError, match=message):
        cli.parse(argv)


@pytest.mark.parametrize("body, message", [
    ("c.sft.lrr = 3", "line 4: there is no field 'lrr' in this section. Did you mean 'lr'"),
    ("c.sft.lr = 'fast'", "line 4: .*TypeError"),
    ("c.sft.lr = 5.0", "config.sft.lr=5.0 is out of range"),
    ("c = 1 / 0", "line 4: the config file does not run: ZeroDivisionError: division by zero"),
    ("c.sft.lr = rate", "line 4: .*NameError"),
    ("c = 3", "returned 3. It must return the config"),
    ("c = {'sft': {'lrr': 3}}", "config.sft.lrr does not exist. Did you mean sft.lr"),
    ("c = c c", "line 4: .*SyntaxError"),
    ("import nothing_like_it", "line 4: .*ModuleNotFoundError"),
])
def test_a_mistake_in_a_config_file_is_placed(write, body, message):
    with pytest.raises(UserError, match=message) as e:
        cli.parse([f"--config={write(body)}", "--workdir=w"])
    assert "\n" not in str(e.value)


def test_a_file_without_get_config(tmp_path):
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(UserError, match=r"empty.py: it has no get_config\(\)"):
        cli.load(str(tmp_path / "empty.py"))


def test_a_config_near_by_is_suggested(write):
    path = write("pass")
    with pytest.raises(UserError, match=r"Did you mean .*mine.py\?"):
        cli.load(str(path.with_name("mime.py")))


def test_config_files_take_an_argument_and_may_be_partial(write):
    path = write("c = {'data': {'seeds': argument}, 'sft': {'lr': 1, 'betas': [0.5, 0.6]}}")
    args = cli.parse([f"--config={path}:mine.csv", "--workdir=w", "--config.sft.epochs=4"])
    assert (args.config.data.seeds, args.config.sft.lr, args.config.sft.betas, args.config.sft.epochs) == ("mine.csv", 1.0, (0.5, 0.6), 4)
    assert args.config.generate.requests == 192


def test_references_inside_a_config_follow_an_override(write):
    path = write("c.generate.answer.max_new_tokens = c.generate.question.get_ref('max_new_tokens')")
    args = cli.parse([f"--config={path}", "--workdir=w", "--config.generate.question.max_new_tokens=48"])
    assert args.config.generate.answer.max_new_tokens == 48


def test_a_config_file_leaves_nothing_beside_it(write):
    path = write("pass")
    cli.load(str(path))
    assert [p.name for p in path.parent.iterdir()] == ["mine.py"]


def test_a_config_here_comes_before_the_packaged_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.locate("configs/tiny.py") == cli.config_folder() / "tiny.py"
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "tiny.py").write_text("")
    assert cli.locate("configs/tiny.py") == Path("configs/tiny.py")


# ------------------------------------------------------------------------------------------------------------------------ main
def test_main_runs_with_the_parsed_arguments():
    seen = []
    cli.main(seen.append, [TINY, "--workdir=w"])
    assert [a.workdir for a in seen] == ["w"]


@pytest.mark.parametrize("error, status, said", [(UserError("no room in /x; free some"), 2, "error: no room in /x; free some\n"),
                                                 (KeyboardInterrupt(), 130, "the same command continues")])
def test_main_turns_what_people_can_mend_into_a_line_and_a_status(capsys, error, status, said):
    def run(args):
        raise error

    with pytest.raises(SystemExit) as e:
        cli.main(run, [TINY, "--workdir=w"])
    assert e.value.code == status and said in capsys.readouterr().err


def test_main_lets_bugs_through():
    def run(args):
        raise ValueError("[4, 3] is not [4, 2]")

    with pytest.raises(ValueError):
        cli.main(run, [TINY, "--workdir=w"])


def test_help_lists_configs_and_every_field(capsys):
    with pytest.raises(SystemExit) as e:
        cli.main(None, ["--help"])
    out = capsys.readouterr().out
    assert e.value.code == 0 and "configs/quickstart.py" in out and "--config.sft.lr=2e-05" in out and "--config.seed=0" in out


def test_a_packaged_config_works_from_any_folder(tmp_path):
    """From a fresh interpreter in an empty folder, with the package on the path and nothing else of the repository near."""
    code = ("from isara_jax import cli; import json; a = cli.parse(['--config=configs/quickstart.py', '--workdir=w']); "
            "print(json.dumps([a.config.data.limit, a.workdir]))")
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert json.loads(done.stdout) == [16, "w"], done.stderr
    assert list(tmp_path.iterdir()) == []
