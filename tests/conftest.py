"""Fixtures shared by the tests: the benchmark folder, the embedded models."""
from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")  # to keep thousands of small programs would take minutes


@pytest.fixture(scope="module", autouse=True)
def programs_of_a_file_end_with_it():
    """Compiled programs are let go after each file of tests: thousands of them took 8 GB by the end."""
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of real benchmark data named by ISARA_TEST_DATA: unset skips, set but missing fails."""
    folder = os.environ.get("ISARA_TEST_DATA")
    if not folder:
        pytest.skip("ISARA_TEST_DATA is not set: it names the folder with the benchmark data")
    assert Path(folder).is_dir(), f"ISARA_TEST_DATA={folder} is not a folder"
    return Path(folder)


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The embedded SmolLM2-135M-Instruct, fetched when it is not there yet."""
    from isara_jax.models import assets

    return next(Path(assets.ensure("smollm2-135m-instruct")).glob("*.gguf"))


@pytest.fixture(scope="session")
def minilm_folder() -> Path:
    """The embedded all-MiniLM-L6-v2, fetched when it is not there yet."""
    from isara_jax.models import assets

    return Path(assets.ensure("minilm-l6"))
