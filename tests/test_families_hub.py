"""config.json files as the hub has them, with the fields that they leave out and those that say nothing: the published sizes come out.

benchmarks/shapes.json holds for each its parameters (tied ones counted once) and the longest text for which its frequencies stay as they are.
"""
from __future__ import annotations

import json
from pathlib import Path

import pytest

from isara_jax.models import decoder, families

HERE = Path("config.json")
HUB = json.loads((Path(__file__).parent.parent / "benchmarks" / "shapes.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", HUB)
def test_a_config_of_the_hub_gives_the_published_size(name):
    family, raw = families.find(HUB[name]["config"], HERE), HUB[name]["config"]
    assert decoder.n_params(family.read(raw, HERE)) == HUB[name]["parameters"]
    assert family.context_length(raw, HERE) == HUB[name]["context"]
