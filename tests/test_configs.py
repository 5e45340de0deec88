"""The configs that ship with the package, and the way they are installed."""
import ast
import configparser
import json
import re
from pathlib import Path

import pytest

from isara_jax import cli, config as config_lib
from isara_jax.common import UserError

ROOT = Path(__file__).parent.parent
CONFIGS = sorted(p for p in (ROOT / "configs").glob("*.py") if p.name != "__init__.py")


def setup_cfg():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    return setup


def pins(lock):
    """{"numpy": "2.4.6"} of a lock file; of two versions for two Pythons the last."""
    return dict(re.findall(r"^([\w.-]+)==(\S+)", (ROOT / lock).read_text(), re.MULTILINE))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_every_config_is_complete_and_in_range(path):
    checked = config_lib.from_dict(cli.load(str(path)))
    assert isinstance(checked, config_lib.Config)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_every_config_has_its_command_on_top(path):
    top = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert f"python -m isara_jax.train --config=configs/{path.name} --workdir=runs/{path.stem}" in top


def test_quickstart_runs_the_real_models_with_the_default_filters():
    config = config_lib.from_dict(cli.load("configs/quickstart.py"))
    assert (config.model.name, config.retrieval.encoder, config.data.limit) == ("smollm2-135m-instruct", "minilm-l6", 16)
    assert config.filters == config_lib.Filters() and config.stop.iterations == 2


def test_tiny_needs_no_model_files():
    config = config_lib.from_dict(cli.load("configs/tiny.py"))
    assert (config.model.name, config.retrieval.encoder) == ("tiny-random", "tiny-random-encoder")
    assert config.stop.iterations == 2


def test_the_config_folder_is_installed_as_a_package_with_its_data():
    setup = setup_cfg()
    assert "isara_jax.configs = configs" in setup["options"]["package_dir"]
    patterns = setup["options.package_data"]["isara_jax.configs"].split()
    for file in (p for p in (ROOT / "configs").rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc")):
        assert any(file.relative_to(ROOT / "configs").match(pattern) for pattern in patterns), f"{file.name} would not be installed"


def test_every_pinned_requirement_has_hashes_and_no_index():
    for lock in ("requirements.lock", "requirements-test.lock"):
        text = (ROOT / lock).read_text()
        entries = re.split(r"^(?=[a-zA-Z0-9])", text, flags=re.MULTILINE)[1:]
        assert entries and all(re.match(r"[\w.-]+==[\w.+]+", e) and "--hash=sha256:" in e for e in entries)
        assert "://" not in text and not re.search(r"^(torch|-)", text, re.MULTILINE)


def test_the_lock_holds_every_requirement_of_the_package():
    lines = setup_cfg()["options"]["install_requires"].strip().splitlines()
    asked = {re.match(r"[\w.-]+", line)[0].lower().replace("_", "-") for line in lines}
    assert asked <= pins("requirements.lock").keys()
    assert {"pytest", "hypothesis"} <= pins("requirements-test.lock").keys()


def test_locks_agree_on_what_they_share():
    run, test = pins("requirements.lock"), pins("requirements-test.lock")
    shared = run.keys() & test.keys()
    assert shared and all(run[name] == test[name] for name in shared)


def test_the_built_in_seeds_say_where_they_come_from():
    for line in (ROOT / "configs" / "data" / "misconceptions.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        assert row["question"] and row["answer"] and row["author"] == "language model" and row["licence"] == "Apache-2.0" and row["source"]


def test_a_lacking_config_names_the_ones_there_are():
    with pytest.raises(UserError, match="configs/instructions.py, .*configs/quickstart.py, .*configs/tiny.py"):
        cli.load("zzz.py")
