"""Rows of a data set of the Hugging Face hub, through the optional package `datasets`, and of the parquet files it is kept in."""
from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any, Iterator

from isara_jax import common
from isara_jax.common import UserError
from isara_jax.data.tables import Row, Table

INSTALL = "pip install 'isara_jax[hub]'"


def hub_table(repo: str, split: str, config: str = "", file: str = "") -> Table:
    """The rows of one split, numbered from 1, from the hub or, without a network, from the cache of `datasets`.

    Args:
        repo: hub id, or a local folder laid out as the repository is.
        config: the configuration, where the repository has several.
        file: take this JSON file of the repository, where the rest of it is no data set.

    Raises `UserError` where the package is missing, the hub does not answer or does not have the rows; within seconds, offline too.
    """
    try:
        import datasets
    except ImportError:
        raise UserError(f"Reading {repo} needs the package datasets, which is not installed: {INSTALL}.") from None
    local = Path(repo).is_dir()
    with contextlib.nullcontext("") if local else _network() as missing:
        try:
            if file:
                rows = datasets.load_dataset("json", data_files=f"{repo if local else f'hf://datasets/{repo}'}/{file}", split="train")
            else:
                rows = datasets.load_dataset(repo, config or None, split=split)
        except Exception as e:  # whatever it is (network, access, layout, a name), people need one line and another way
            first = (str(e).strip().splitlines() or [type(e).__name__])[0][:300]
            raise UserError(f"{repo} cannot be had from the hub: {missing or first}") from None
        return _table(Path(repo), rows.column_names, rows.to_list())


def parquet_table(path: Path) -> Table:
    """The rows of a parquet file, numbered from 1. Raises `UserError` where pyarrow is missing or the file is damaged."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError(f"{path} is a parquet file, and pyarrow, which reads it, is not installed: {INSTALL}.") from None
    try:
        table = parquet.ParquetFile(path).read()
    except (OSError, pyarrow.ArrowException) as e:
        raise UserError(f"{path} cannot be read as parquet ({str(e).splitlines()[0][:100]}). Get it again.") from None
    return _table(path, table.column_names, table.to_pylist())


def _table(path: Path, columns: list[str], rows: list[dict[str, Any]]) -> Table:
    return Table(path, "row", tuple(columns), tuple(Row(number, values) for number, values in enumerate(rows, 1)))


@contextlib.contextmanager
def _network() -> Iterator[str]:
    """"" where the hub answers; else why it is not asked, and `datasets` looks into its cache alone."""
    import datasets
    from huggingface_hub import constants

    if datasets.config.HF_HUB_OFFLINE:
        missing = "HF_HUB_OFFLINE is set, so the hub was not asked, and the cache does not have it."
    elif not common.reachable(constants.ENDPOINT):
        missing = f"The hub ({constants.ENDPOINT}) does not answer from this machine, and the cache does not have it."
    else:
        yield ""
        return
    before = datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        yield missing
    finally:
        datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before
