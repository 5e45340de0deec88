"""What may import what: the floors of the house, read from the syntax trees, so that imports inside functions count too."""
import ast
import configparser
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "isara_jax"
FILES = sorted(PACKAGE.rglob("*.py"))
ROOMS = {"data", "models", "sft", "decode", "retrieval", "methods", "evals", "page"}
GROUND = {"common", "config", "metrics"}                    # under every room
SHELL = {"train", "eval", "lm", "session", "preview", "cards", "cli", "checkpoint", "work", "summary", "arms", "judge", "evalset",
         "kept", "trained", "scorer", "export", "publish", "new_folder", "advice", "review", "blind", "icl", "chat", "report", "folds"}  # entry points and what only they use
MAY = {
    "data": {"data"} | GROUND,
    "models": {"models", "sharding"} | GROUND,
    "sft": {"sft", "data", "models", "sharding"} | GROUND,
    "decode": {"decode", "data", "models", "sharding"} | GROUND,
    "retrieval": {"retrieval", "data", "models", "sharding"} | GROUND,
    "methods": {"methods", "sft", "decode", "retrieval", "data", "models", "sharding", "workdir"} | GROUND,
    "page": {"page", "evals", "data", "console"} | GROUND,   # and no jax, as a test below sees
    "evals": {"evals", "sft", "decode", "retrieval", "data", "models", "sharding"} | GROUND,
}


def imports(path):
    """Every module that a file imports, with the names of `from` imports added, absolute: {"jax", "isara_jax.data.pool", ...}."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}, line {node.lineno}: imports are absolute here"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def ours(path):
    """The rooms and top-level modules of isara_jax that a file imports."""
    return {name.split(".")[1] for name in imports(path) if name.startswith("isara_jax.")}


def room(path):
    parts = path.relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 else path.stem


def name(path):
    return path.relative_to(ROOT).as_posix()


def test_every_room_is_known_and_installed():
    """A new folder must take its place among the floors, and in setup.cfg, or it would be missing from the installed package."""
    folders = {f.parent.relative_to(PACKAGE).as_posix().replace("/", ".") for f in FILES} - {"."}
    assert {f.split(".")[0] for f in folders} <= ROOMS
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    packages = set(setup["options"]["packages"].split())
    assert packages == {"isara_jax", "isara_jax.configs"} | {f"isara_jax.{f}" for f in folders}


@pytest.mark.parametrize("path", [f for f in FILES if room(f) in ROOMS], ids=name)
def test_rooms_import_only_what_is_below_them(path):
    allowed = MAY[room(path)] | ({"checkpoint"} if name(path) == "isara_jax/sft/loop.py" else set())
    assert ours(path) <= allowed, f"{name(path)} imports {sorted(ours(path) - allowed)}"


@pytest.mark.parametrize("path", [f for f in FILES if room(f) not in ROOMS | {"__init__"} | SHELL], ids=name)
def test_what_lies_low_knows_no_entry_point(path):
    assert not ours(path) & (SHELL | {"methods", "evals"})


def test_the_ground_stands_on_itself():
    assert ours(PACKAGE / "common.py") == set()
    assert ours(PACKAGE / "config.py") <= {"common"} and ours(PACKAGE / "metrics.py") <= {"common"}


def test_checkpoint_is_imported_by_entry_points_and_the_training_loop_only():
    importers = {name(f) for f in FILES if "checkpoint" in ours(f)}
    assert importers <= {"isara_jax/work.py", "isara_jax/trained.py", "isara_jax/export.py", "isara_jax/sft/loop.py"}


def test_data_and_the_light_modules_know_no_jax():
    heavy = {"jax", "jaxlib", "flax", "optax", "orbax"}
    light = [f for f in FILES if room(f) in {"data", "common", "config", "cli", "fetch", "metrics", "workdir", "stop"} or
             name(f) in ("isara_jax/models/assets.py", "isara_jax/models/resolve.py", "isara_jax/models/config.py")]
    assert {name(f): {i.split(".")[0] for i in imports(f)} & heavy for f in light} == {name(f): set() for f in light}


def test_nothing_at_run_time_needs_torch_or_tensorflow():
    """The torch and tensorflow families are references in tests and extras; scann looks for tensorflow and must not find it.

    Two files are for those who have them: one converts pickled checkpoints in a process of its own, one reads tokenizer.model.
    """
    found = {name(f): {i.split(".")[0] for i in imports(f)} & {"torch", "tensorflow", "tensorflow_text", "pickle"} for f in FILES}
    allowed = {"isara_jax/models/from_bin.py": {"torch"}, "isara_jax/data/sentencepiece.py": {"tensorflow", "tensorflow_text"}}
    assert {k: v - allowed.get(k, set()) for k, v in found.items() if v - allowed.get(k, set())} == {}


def test_light_commands_import_no_jax():
    """What is listed here, and all it imports in turn, starts without jax: seen from a fresh interpreter."""
    modules = ["isara_jax", "isara_jax.cli", "isara_jax.config", "isara_jax.fetch", "isara_jax.metrics", "isara_jax.workdir",
               *(f"isara_jax.data.{f.stem}" for f in FILES if room(f) == "data" and f.stem != "__init__"), "isara_jax.models.resolve", "isara_jax.report", "isara_jax.advice", "isara_jax.review", "isara_jax.blind"]
    code = f"import sys, importlib\nfor m in {modules!r}:\n    importlib.import_module(m)\n    assert 'jax' not in sys.modules, m\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_files_stay_small():
    """One job a file: nobody should have to hold more than this in the head."""
    lengths = {name(f): len(f.read_text(encoding="utf-8").splitlines()) for f in FILES}
    assert {n: c for n, c in lengths.items() if c > 450} == {}
