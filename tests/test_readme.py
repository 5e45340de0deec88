"""The README is read by people, so what it says is checked against what is there."""
import ast
import inspect
import re
import shlex
from pathlib import Path

import isara_jax
from isara_jax import cli, config as config_lib

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
CELLS = [[c.strip() for c in line.strip("|").split(" | ")] for line in TEXT.splitlines() if line.startswith("| `")]
ROWS = {row[0]: row[1:] for row in CELLS}


def fields(config, path=""):
    """{"sft.lr": ("2e-05", "identity")} for every field of the schema."""
    found, ids = {}, config_lib.identity(config)
    for key, value in config_lib.to_dict(config).items():
        if isinstance(value, dict):
            found |= fields(getattr(config, key), f"{path}{key}.")
        else:
            shown = ",".join(map(str, value)) if isinstance(value, list) else str(value)
            found[path + key] = (shown, "identity" if key in ids else "runtime")
    return found


def test_two_commands_are_at_the_top():
    assert re.match(r"# isara_jax\n\n    make quickstart .*\n    make test .*\n\n", TEXT)
    targets = re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(re.findall(r"\bmake (quickstart|test-slow|test)\b", TEXT)) <= set(targets)


def test_the_field_table_is_the_schema():
    rows = {key.strip("`"): row for key, row in ROWS.items() if row[1:2] in (["identity"], ["runtime"])}
    shown = {key: (default.strip("`").replace("empty", ""), kind) for key, (default, kind, _) in rows.items()}
    assert shown == fields(config_lib.Config())


def test_the_file_table_is_the_repository():
    shown = {key.strip("`") for key in ROWS if re.match(r"`(isara_jax|configs)/.*\.\w+`$", key)}
    there = {p.relative_to(ROOT).as_posix() for folder in ("isara_jax", "configs") for p in (ROOT / folder).rglob("*")
             if p.is_file() and p.suffix in (".py", ".jsonl", ".json", ".csv", ".css", ".js", ".j2", ".html")}
    assert shown == {p for p in there if not p.endswith("/__init__.py") or p == "isara_jax/__init__.py"}


def test_commands_parse():
    commands = [shlex.split(line, comments=True) for line in TEXT.splitlines() if line.startswith("    python -m isara_jax.train ")]
    assert len(commands) >= 2
    for command in commands:
        cli.parse(command[3:])


def test_overrides_in_the_text_name_real_fields():
    for key in re.findall(r"--config\.([\w.]*\w)(?==)", TEXT):
        assert key in fields(config_lib.Config()) or key == "FIELD", key


def test_the_python_example_fits_the_interface():
    """Every call of the example binds to the signature of what it calls."""
    tree = ast.parse(re.search(r"```python\n(.*?)```", TEXT, re.DOTALL)[1])
    called = 0
    for call in (n for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute)):
        owner = {"isara_jax": isara_jax, "lm": isara_jax.LM, "judge": isara_jax.Scorer}[ast.unparse(call.func.value).split(".")[-1]]
        bound = inspect.signature(getattr(owner, call.func.attr))
        bound.bind(*([None] if owner is not isara_jax else []), *call.args, **{k.arg: k.value for k in call.keywords})
        called += 1
    assert called == 10


def test_extras_are_those_of_the_package():
    import configparser

    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    extras = set(setup["options.extras_require"])
    section = TEXT[TEXT.index("| extra |"):TEXT.index("`make test` takes")]
    assert set(re.findall(r"`(\w+)`", section.replace("`make test`", ""))) == extras
