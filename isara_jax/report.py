"""The page of a run: one self-contained HTML file, made from the workdir alone at any time, also while the run goes on.

    python -m isara_jax.report --workdir=runs/first

It is written to WORKDIR/report.html. What an unfinished or damaged run lacks is told on the page. Imports no jax.
"""
from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from isara_jax import advice
from isara_jax.common import UserError, atomic_write
from isara_jax.page import gather, render


def write(workdir: str | Path) -> Path:
    """Write the page of a run into its folder and return its path.

    Two pages of the same files are the same bytes. Raises `UserError` where the folder is no run's, or cannot be written to.
    """
    root = Path(os.path.abspath(workdir))
    page = gather.gather(root)
    try:
        steps = advice.advise(root)
    except (UserError, OSError, KeyError, TypeError, ValueError, AttributeError, IndexError) as e:
        steps = []
        why = str(e) if isinstance(e, UserError) else f"a file is missing or damaged ({type(e).__name__})"
        page["problems"].append(f"What to do next cannot be told: {why}.")
    path = root / "report.html"
    try:
        atomic_write(path, render.render(page, steps))
    except OSError as e:
        raise UserError(f"{path} cannot be written: {e.strerror}. Make room or change the permissions of the folder.") from None
    return path


def main(argv: list[str] | None = None) -> int:
    """Write the page and say where it is; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m isara_jax.report", description="Make the page of a run: WORKDIR/report.html.")
    parser.add_argument("--workdir", type=Path, required=True, metavar="DIR", help="the folder of the run")
    args = parser.parse_args(argv)
    try:
        path = write(args.workdir)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    print(f"{path} ({path.stat().st_size / 1e6:.1f} MB): open it in a browser. Generated answers are not fact-checked.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
