"""The command line of every entry point that takes a config: `--config=FILE[:ARG] --config.section.field=VALUE --workdir=DIR`.

Every mistake is one line and exit status 2. Built on absl flags and ml_collections' config flags, whose raw tracebacks are turned into lines.
"""
from __future__ import annotations

import difflib
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Sequence

from absl import flags
from ml_collections import config_flags

from isara_jax import config as config_lib
from isara_jax.common import UserError


@dataclass(frozen=True)
class Args:
    """A parsed command line."""

    config: config_lib.Config
    workdir: str
    dry_run: bool


def main(run: Callable[[Args], None], argv: Sequence[str] | None = None) -> None:
    """Parse `argv` (without the program's name; default `sys.argv`), run, and turn what people can mend into one message and status 2."""
    try:
        run(parse(sys.argv[1:] if argv is None else argv))
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("\ninterrupted: the same command continues at the first unfinished stage", file=sys.stderr)
        raise SystemExit(130) from None


def parse(argv: Sequence[str]) -> Args:
    """The checked config and the run's own flags. Raises `UserError`."""
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, "Config file, for example configs/quickstart.py.", flag_values=values)
    flags.DEFINE_string("workdir", None, "Folder of the run.", flag_values=values)
    flags.DEFINE_bool("dry_run", False, "Show three prompts and the plan; generate nothing.", flag_values=values)
    argv = [_located(a) for a in argv]
    if "--help" in argv or "-h" in argv:
        print("usage: python -m isara_jax.train --config=FILE --workdir=DIR [--config.section.field=VALUE …] [--dry_run]\n\nfields of a config:\n  "
              + "\n  ".join(_leaves(config_lib.to_dict(config_lib.Config()))))
        raise SystemExit(0)
    if not any(a.startswith("--config=") or a == "--config" for a in argv):
        raise UserError(f"--config is missing: name a config file, for example --config=configs/quickstart.py (there are {', '.join(_packaged())}).")
    ours, sys.argv = sys.argv, ["isara_jax", *argv]  # ml_collections finds the overrides of a config in sys.argv alone
    try:
        rest = values(sys.argv)[1:]
        config = config_lib.from_dict(values.config)
    except UserError:
        raise
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError, ImportError, SyntaxError, NameError) as e:
        raise UserError(_said(e, argv)) from None
    finally:
        sys.argv = ours
    if rest:
        raise UserError(f"{rest[0]!r} is not a flag; flags have the form --name=VALUE.")
    if not values.workdir:
        raise UserError("--workdir is missing: name the folder of the run, for example --workdir=runs/first.")
    return Args(config, values.workdir, values.dry_run)


def _said(e: Exception, argv: Sequence[str]) -> str:
    """One line for what absl or ml_collections stumbled over."""
    text = " ".join(str(e).split())
    for a in argv:
        if found := re.match(r"--(?:no)?config\.([\w.]+)", a):
            try:
                _check_key(found[1])
            except UserError as unknown:
                return str(unknown)
    if isinstance(e, (ImportError, SyntaxError, NameError)):
        return f"the config file does not run: {type(e).__name__}: {text}"
    return text[:1].lower() + text[1:]


def _check_key(key: str) -> None:
    known = _leaves(config_lib.to_dict(config_lib.Config()))
    if key in known:
        return
    if any(k.startswith(key + ".") for k in known):
        raise UserError(f"--config.{key} is a section; set one of its fields: {', '.join(k for k in known if k.startswith(key + '.'))}.")
    near = difflib.get_close_matches(key, known, 1) or [k for k in known if k.split(".")[-1] == key.split(".")[-1]][:1]
    raise UserError(f"--config.{key} does not exist." + (f" Did you mean --config.{near[0]}?" if near else " Run with --help to see all fields."))


def _leaves(tree: dict, path: str = "") -> list[str]:
    out = []
    for key, value in tree.items():
        out += _leaves(value, f"{path}{key}.") if isinstance(value, dict) else [path + key]
    return out


# --------------------------------------------------------------------------------------------------------------- config files
def config_folder() -> Path:
    """The configs that ship with the package: installed as isara_jax.configs, or beside the package in a checkout."""
    inside = Path(__file__).parent / "configs"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "configs"


def _packaged() -> list[str]:
    return sorted(f"configs/{p.name}" for p in config_folder().glob("*.py") if p.name != "__init__.py")


def _located(argument: str) -> str:
    """`--config=FILE[:ARG]` with FILE found here, or in the package under its name, so that it works from any folder."""
    if not argument.startswith("--config="):
        return argument
    name, colon, arg = argument.removeprefix("--config=").partition(":")
    if not os.path.isfile(name):
        packaged = config_folder() / (Path(name).name if name.endswith(".py") else Path(name).name + ".py")
        if Path(name).parent.as_posix() not in (".", "configs") or not packaged.is_file() or packaged.name == "__init__.py":
            near = difflib.get_close_matches(Path(name).name, [Path(p).name for p in _packaged()], 1)
            hint = f"Did you mean configs/{near[0]}?" if near else f"There are {', '.join(_packaged())}."
            raise UserError(f"--config={name}: no such file here or among the installed configs. {hint}")
        name = str(packaged)
    return f"--config={name}{colon}{arg}"
