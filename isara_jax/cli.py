"""The command line of every entry point that takes a config: `--config=FILE[:ARG] --config.section.field=VALUE --workdir=DIR`.

Built on absl flags and ml_collections. Config files are run here instead of by ml_collections, so that every mistake, in the file or on
the command line, is one message with its place, and exit status 2. Imports no jax.
"""
from __future__ import annotations

import difflib
import re
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Iterator, Sequence

from absl import flags
from ml_collections import ConfigDict, config_flags

from isara_jax import config as config_lib
from isara_jax.common import UserError
from isara_jax.models import published


@dataclass(frozen=True)
class Flag:
    """A flag of a command beside --config. `example` is shown where a required one is missing; switches take no value."""

    name: str
    help: str
    example: str = ""              # not empty: required
    switch: bool = False
    unless: str = ""               # a flag that makes this one superfluous


@dataclass(frozen=True)
class Command:
    """A command line: the module that `python -m` starts, its own flags, and whether it can do without --config."""

    module: str
    flags: tuple[Flag, ...]
    config_optional: bool = False

    @property
    def usage(self) -> str:
        """One line, optional flags in brackets."""
        shown = [f"--{f.name}" if f.switch else f"--{f.name}={f.name.upper()}" for f in self.flags]
        own = " ".join(text if f.example else f"[{text}]" for f, text in zip(self.flags, shown))
        if self.config_optional:
            return f"python -m {self.module} {own} [--config=FILE[:ARG] [--config.section.field=VALUE …]]"
        return f"python -m {self.module} --config=FILE[:ARG] {own} [--config.section.field=VALUE …]"


@dataclass(frozen=True)
class Args:
    """A parsed command line: the config (None where it is optional and was not given), and the value of each flag of the command (None or
    False where it was not given)."""

    config: config_lib.Config | None
    flags: dict[str, Any]

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["flags"][name]
        except KeyError:
            raise AttributeError(name) from None


TRAIN = Command("isara_jax.train", (
    Flag("workdir", "Folder of the run.", "runs/first", unless="plan_models"),
    Flag("dry_run", "Show three prompts and the plan; generate nothing.", switch=True),
    Flag("refit_all", "After the judged run, or the folds, train on every pair into WORKDIR/all.", switch=True),
    Flag("plan_models", "Names of models, with commas: print time and memory for each on this machine with these seeds, and end.")))


def _leaves(tree: dict[str, Any], path: str = "") -> list[tuple[str, Any]]:
    found = []
    for key, value in tree.items():
        found += _leaves(value, f"{path}{key}.") if isinstance(value, dict) else [(path + key, value)]
    return found


_DEFAULTS = dict(_leaves(config_lib.to_dict(config_lib.Config())))  # "sft.lr" -> 2e-05, for every field


def main(run: Callable[[Args], None], argv: Sequence[str] | None = None, command: Command = TRAIN) -> None:
    """Parse `argv` (without the program's name; default `sys.argv`), run, and turn what people can mend into one message and status 2."""
    try:
        run(parse(sys.argv[1:] if argv is None else argv, command))
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("\ninterrupted: the same command continues at the first unfinished stage", file=sys.stderr)
        raise SystemExit(130) from None


def parse(argv: Sequence[str], command: Command = TRAIN) -> Args:
    """The checked config and the command's own flags. Raises `UserError`; exits after `--help`."""
    if any(a.lstrip("-") in ("help", "h") and a.startswith("-") for a in argv):
        print(usage(command))
        raise SystemExit(0)
    name, rest = _split_config(argv)
    for key in _overrides(rest):
        _check_key(key)
        if not name and command.config_optional:
            raise UserError(f"--config.{key} changes a field of a config, and no config is named. Add --config=FILE.")
    if not name and not command.config_optional:
        raise UserError(no_config())
    given = ["isara_jax", *rest]
    values = flags.FlagValues()
    try:
        if name:
            config_flags.DEFINE_config_dict("config", load(name), flag_values=values, sys_argv=given)
        for flag in command.flags:
            define, default = (flags.DEFINE_bool, False) if flag.switch else (flags.DEFINE_string, None)
            define(flag.name, default, flag.help, flag_values=values)
        surplus = values(given)[1:]
    except (flags.Error, TypeError, ValueError) as e:
        raise UserError(_said(e)) from None
    if surplus:
        raise UserError(f"{surplus[0]!r} is not a flag; flags have the form --name=VALUE.")
    config = config_lib.from_dict(values.config) if name else None
    given = {flag.name: values[flag.name].value for flag in command.flags}
    for flag in command.flags:
        if flag.example and not given[flag.name] and not given.get(flag.unless):
            raise UserError(f"--{flag.name} is missing. {flag.help} For example --{flag.name}={flag.example}.")
    return Args(config, given)


def no_config() -> str:
    """What to say where a config is needed and none was named."""
    return f"--config is missing: name a config file, for example --config=configs/quickstart.py (there are {', '.join(_packaged())})."


def usage(command: Command = TRAIN) -> str:
    """What `--help` prints: the flags, the configs that are installed, every field with its default."""
    return "\n".join([f"usage: {command.usage}", "", *(f"  --{f.name}: {f.help}" for f in command.flags),
                      "  FILE:ARG takes a variant of a config (each config names its own): --config=configs/safety.py:llama-7b.",
                      f"  Models with published shapes: {', '.join(published.names())}; --config.model.name takes these names too.", "",
                      f"configs that ship with the package: {', '.join(_packaged())}", "",
                      "fields and defaults (their meaning: isara_jax/config.py):",
                      *(f"  --config.{key}={value}" for key, value in _DEFAULTS.items())])


# ------------------------------------------------------------------------------------------------------------------- overrides
def _split_config(argv: Sequence[str]) -> tuple[str | None, list[str]]:
    """The value of --config (`--config=X` or `--config X`; the last one counts; None where it is not there) and the other arguments."""
    name, rest, arguments = None, [], iter(argv)
    for a in arguments:
        if re.fullmatch(r"--?config(=.*)?", a, re.DOTALL):
            name = a.partition("=")[2] if "=" in a else next(arguments, "")
        else:
            rest.append(_tuple(a))
    return name, rest


def _tuple(argument: str) -> str:
    """`--config.filters.answer=parse,echo` with the quotes and brackets that ml_collections needs to see two texts in it.

    Numbers (`--config.sft.rates=1e-4`) get the brackets that make one of them a tuple.
    """
    key, equals, value = argument.partition("=")
    if not isinstance(_DEFAULTS.get(key.lstrip("-").removeprefix("config.")), list):
        return argument
    items = [v.strip() for v in value.split(",") if v.strip()]
    if all(re.fullmatch(r"[-+.\d]+(e[-+]?\d+)?", v, re.IGNORECASE) for v in items):
        return f"{key}=({', '.join(items)},)" if items else f"{key}=()"
    return f"{key}={tuple(items)}" if all(re.fullmatch(r"\w+", v) for v in items) else argument


def _overrides(argv: Sequence[str]) -> Iterator[str]:
    for a in argv:
        if found := re.match(r"--?(?:no)?config\.([^=]*)", a):
            yield found[1]


def _check_key(key: str) -> None:
    known = list(_DEFAULTS)
    if key in known:
        return
    if inside := [k for k in known if k.startswith(key + ".")]:
        raise UserError(f"--config.{key} is a section; set one of its fields: {', '.join(inside)}.")
    near = [k for k in known if k.split(".")[-1] == key.split(".")[-1]] or difflib.get_close_matches(key, known, 1)
    raise UserError(f"--config.{key} does not exist. " + (f"Did you mean --config.{near[0]}?" if near else "--help lists all fields."))


def _said(e: Exception) -> str:
    """One line for what absl or ml_collections stumbled over."""
    text = " ".join(str(e).split())
    if found := re.match(r"flag --config\.([\w.]+)=(.*?): ", text):
        default = _DEFAULTS.get(found[1])
        return f"--config.{found[1]}={found[2]} has the wrong type: {type(default).__name__} is needed, like its default {default!r}."
    return text[:1].lower() + text[1:].replace(" ?", "?")


# --------------------------------------------------------------------------------------------------------------- config files
def load(name: str) -> ConfigDict:
    """The complete config of `FILE[:ARG]`: what `get_config(ARG)` returns, with defaults for the fields it leaves out.

    FILE is a path, or the name of a config of the package when no such file is here. Raises `UserError` naming file and line.
    """
    file, colon, argument = name.partition(":")
    path = locate(file)
    namespace: dict[str, Any] = {"__name__": path.stem, "__file__": str(path)}
    try:
        exec(compile(path.read_bytes(), str(path), "exec", dont_inherit=True), namespace)  # leaves no __pycache__ beside the file
        if not callable(namespace.get("get_config")):
            raise UserError(f"{path}: it has no get_config(). A config file starts from isara_jax.config.defaults(); see configs/tiny.py.")
        returned = namespace["get_config"](*[argument] if colon else [])
    except UserError:
        raise
    except OSError as e:
        raise UserError(f"{path}: cannot be read: {e.strerror or e}.") from None
    except Exception as e:  # a config file is a person's program: whatever it raises is theirs to mend
        raise UserError(_place(path, e)) from None
    return _complete(path, returned)


def _complete(path: Path, returned: Any) -> ConfigDict:
    """`returned` itself when it was made from `defaults()` (its references live on), else its fields set in the defaults."""
    if not isinstance(returned, (dict, ConfigDict)):
        raise UserError(f"{path}: get_config() returned {returned!r}. It must return the config that it made from "
                        "isara_jax.config.defaults().")
    checked = config_lib.to_dict(config_lib.from_dict(returned))
    full = config_lib.defaults()
    if isinstance(returned, ConfigDict) and {key for key, _ in _leaves(returned.to_dict())} == set(_DEFAULTS):
        return returned
    for key, value in _leaves(checked):
        full.update_from_flattened_dict({key: tuple(value) if isinstance(value, list) else value})
    return full


def _place(path: Path, e: Exception) -> str:
    """FILE, line N: what a config file raised."""
    lines = [f.lineno for f in traceback.extract_tb(e.__traceback__) if f.filename == str(path)]
    line = e.lineno if isinstance(e, SyntaxError) and e.filename == str(path) else lines[-1] if lines else None
    where = f"{path}, line {line}" if line else str(path)
    if isinstance(e, AttributeError) and (unknown := re.search(r'Key \\?"(\w+)\\?" does not exist', str(e))):
        known = {part for key in _DEFAULTS for part in key.split(".")}
        near = difflib.get_close_matches(unknown[1], known, 1)
        hint = f"Did you mean {near[0]!r}?" if near else "--help lists all fields."
        return f"{where}: there is no field {unknown[1]!r} in this section. {hint}"
    if isinstance(e, TypeError) and not lines:
        return (f"{path}: get_config() cannot be called like this: {e}. "
                "--config=FILE calls get_config(), --config=FILE:ARG calls get_config('ARG').")
    said = e.msg if isinstance(e, SyntaxError) else " ".join(str(e).split())
    return f"{where}: the config file does not run: {type(e).__name__}: {said}"


def config_folder() -> Path:
    """The configs that ship with the package: installed as isara_jax.configs, or beside the package in a checkout."""
    inside = Path(__file__).parent / "configs"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "configs"


def _packaged() -> list[str]:
    return sorted(f"configs/{p.name}" for p in config_folder().glob("*.py") if p.name != "__init__.py")


def locate(file: str) -> Path:
    """The config file `file`: a path, else a config of the package (configs/x.py, x.py or x), so that commands work from any folder."""
    path = Path(file)
    if path.is_file():
        return path
    name = path.name.removesuffix(".py") + ".py"
    if path.parent.as_posix() in (".", "configs") and f"configs/{name}" in _packaged():
        return config_folder() / name
    beside = sorted(str(p) for p in path.parent.glob("*.py") if p.name != "__init__.py") if path.parent.is_dir() else []
    there = {Path(p).name: p for p in (*_packaged(), *beside)}
    near = [there[n] for n in difflib.get_close_matches(name, there, 1)]
    hint = f"Did you mean {near[0]}?" if near else f"There are {', '.join(_packaged())}."
    raise UserError(f"--config={file}: {'is a folder' if path.is_dir() else 'no such file here or among the installed configs'}. {hint}")
