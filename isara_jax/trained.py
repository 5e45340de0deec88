"""The model that a run left: found by the run's folder, in the form it was trained in."""
from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from isara_jax.checkpoint import Checkpoints
from isara_jax.common import UserError
from isara_jax.config import Config, from_dict
from isara_jax.lm import LM
from isara_jax.workdir import Workdir


def run_folder(name: str) -> Workdir | None:
    """The run whose folder `name` is, or None where it is a model's name, folder or file."""
    path = Path(name) / "config.json"
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return Workdir(name) if isinstance(stored, dict) and "identity" in stored else None


def run_at(name: str | Path) -> Workdir | None:
    """The run whose workdir `name` is; None where it is none, but a model's name, folder or file.

    Raises `UserError` for the workdir of a cross-fitted run, which has no model of its own, and for one whose config.json is damaged.
    """
    folder = Path(name).expanduser()
    if (folder / "folds").is_dir() and not (folder / "checkpoints").is_dir():
        whole, part = folder / "all", next(iter(sorted((folder / "folds").iterdir())), folder / "folds" / "1")
        raise UserError(f"{folder} is a cross-fitted run (config.data.folds), which has a model for each part. " + (
            f"Name {whole}, trained on every pair, or {part}." if whole.is_dir() else
            f"Name {part}, or train one on every pair: the same command with --refit_all makes {whole}."))
    workdir = run_folder(str(folder))
    if workdir is None and (folder / "pool").is_dir():
        Workdir(folder).stored()  # says what is wrong with its config.json
    return workdir


def config_of(workdir: Workdir, config: Config | None = None) -> Config:
    """The run's own config, or `config` with what the run says of its model, its form and its answers.

    The dtype and the limit of answers are those that the run resolved at its start.
    """
    stored = workdir.stored()
    run = from_dict(stored["config"])
    config = run if config is None else config
    resolved = stored["identity"]["resolved"]
    answer = dataclasses.replace(config.generate.answer, max_new_tokens=resolved["answer_tokens"])
    return dataclasses.replace(
        config, model=dataclasses.replace(run.model, dtype=resolved["dtype"]), prompt=run.prompt, sensitive=config.sensitive or run.sensitive,
        generate=dataclasses.replace(run.generate, answer=answer, slots=config.generate.slots))


def last(workdir: Workdir, lm: LM) -> tuple[LM, int]:
    """(`lm` with the parameters of the run's last iteration, that iteration)."""
    checkpoints = Checkpoints(workdir.checkpoints)
    iterations = checkpoints.iterations()
    if not iterations:
        raise UserError(f"{workdir.root} holds no parameters: no iteration of this run was finished. Continue it first.")
    return lm.with_params(checkpoints.restore(iterations[-1], lm.abstract_params())), iterations[-1]
