"""The paper's models by name, and their published shapes, so that a run can be planned where their weights are not. Imports no jax.

arXiv 2401.06785 aligns LLaMA-7B and OPT-6.7B, and goes down to OPT-350M. configs/models/NAME.json says of each under which id the hub has
it, its context in tokens, its licence, its number of parameters, and those fields of the hub's config.json that decide the mathematics.
"""
from __future__ import annotations

import difflib
import functools
import importlib.resources
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Sequence

from ml_collections import ConfigDict

from isara_jax.common import UserError
from isara_jax.config import Sft
from isara_jax.models import families
from isara_jax.models.config import ModelConfig

SMALL = 1_000_000_000   # parameters below which a config keeps its own learning rate


@dataclass(frozen=True)
class Published:
    """A model that has a name of its own here."""

    name: str
    path: Path                 # of its JSON
    hub: str
    context: int               # longest sequence in tokens
    licence: str
    parameters: int            # tied ones counted once
    config: dict[str, Any]     # fields of the hub's config.json, as they are named there

    def model_config(self) -> ModelConfig:
        """Its mathematics, as `hf.model_config` reads it from the hub's folder."""
        return families.find(self.config, self.path).read(self.config, self.path)


def names() -> list[str]:
    """The names there are."""
    return list(_all())


def find(name: str) -> Published | None:
    """The model of this name or hub id, None when it is another."""
    return next((p for p in _all().values() if name in (p.name, p.hub)), None)


def use(config: ConfigDict, variant: str, *, also: Sequence[str] = ()) -> None:
    """Let `config` run on the model that `--config=FILE:VARIANT` names; `also` are the other variants of that file, for the message.

    Models of 1e9 parameters and more get the default learning rate (2e-5, safe-rlhf's for 7B models) in place of the config's own, which
    was chosen for the small embedded model. Raises `UserError` for other names, before any data is looked for.
    """
    known = _all()
    if variant not in known:
        near = difflib.get_close_matches(variant, [*also, *known], 1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise UserError(f"--config=FILE:ARG: {variant!r} is no variant of this config; its variants are "
                        f"{', '.join([*also, *known])}.{hint}")
    config.model.name = variant
    if known[variant].parameters >= SMALL:
        config.sft.lr = Sft().lr


@functools.cache
def _all() -> dict[str, Published]:
    files = sorted(_folder().glob("*.json"))
    return {file.stem: Published(file.stem, file, **json.loads(file.read_text(encoding="utf-8"))) for file in files}


def _folder() -> Path:
    try:
        return Path(str(importlib.resources.files("isara_jax.configs").joinpath("models")))
    except ModuleNotFoundError:  # a checkout that is not installed: configs/ lies beside the package
        return Path(__file__).resolve().parents[2] / "configs" / "models"
