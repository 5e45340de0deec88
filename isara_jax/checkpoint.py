"""Parameters of finished iterations and the state of an unfinished fine-tuning, on disk through Orbax.

    checkpoints/
      1/ 2/ …            parameters after each iteration
      held_out.json      their held-out losses
      unfinished/        at most one state: parameters, moments, losses so far
      trash/             what Orbax renames before deleting it, so that no half-deleted iteration is taken for a whole one

A checkpoint is restored to any mesh and dtype: `like` says which. Writing is synchronous: a run that is interrupted and started again
in one process, as in a notebook, would otherwise meet the writer of the first.
"""
from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from isara_jax.common import UserError, atomic_write

TRASH = "trash"


class Checkpoints:
    """The checkpoint folder of a run. `keep` is "all", or "best_last": the newest iteration and the one with the lowest held-out loss."""

    def __init__(self, folder: str | Path, keep: str = "all"):
        self._root, self._keep = Path(folder).absolute(), keep
        self._root.mkdir(parents=True, exist_ok=True)
        self._finished = self._manager(self._root, None)
        self._unfinished = self._manager(self._root / "unfinished", 1)
        for folder in (self._root, self._root / "unfinished"):
            shutil.rmtree(folder / TRASH, ignore_errors=True)

    @staticmethod
    def _manager(folder: Path, max_to_keep: int | None) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(max_to_keep=max_to_keep, cleanup_tmp_directories=True, todelete_subdir=TRASH, create=True,
                                                 enable_async_checkpointing=False)
        return ocp.CheckpointManager(folder, options=options)

    # ----------------------------------------------------------------------------------------------------- finished iterations
    def save(self, iteration: int, params: Any) -> None:
        """Write the parameters after an iteration, replacing what is there; return when they are on disk. Clears the unfinished state."""
        if iteration in self._finished.all_steps():
            self._finished.delete(iteration)
        self._finished.save(iteration, args=ocp.args.Composite(params=ocp.args.StandardSave(params)), force=True)
        self.clear_unfinished()

    def restore(self, iteration: int, like: Any) -> Any:
        """The parameters after an iteration, shaped, typed and placed as `like` (a tree of `jax.ShapeDtypeStruct` with shardings).

        Raises `UserError` when the iteration is not there or damaged.
        """
        if iteration not in self.iterations():
            raise UserError(f"{self._root} holds no whole checkpoint of iteration {iteration}; it has {self.iterations() or 'none'}. "
                            f"{self._way_out(iteration)}")
        try:
            return self._finished.restore(iteration, args=ocp.args.Composite(params=ocp.args.StandardRestore(like)))["params"]
        except Exception as e:  # Orbax and TensorStore raise many types for damaged files
            raise UserError(f"{self._root / str(iteration)} cannot be restored ({_first_line(e)}). {self._way_out(iteration)}") from e

    def iterations(self) -> list[int]:
        """The iterations whose parameters are here, in order; folders that lost their parts are left out."""
        return sorted(i for i in self._finished.all_steps() if (self._root / str(i) / "params" / "_METADATA").exists())

    def measured(self, iteration: int, held_out: float | None) -> None:
        """Note the held-out loss of a saved iteration; with keep="best_last", delete what is now neither the newest nor the best."""
        atomic_write(self._losses_path, json.dumps({**self._losses(), str(iteration): held_out}) + "\n")
        if self._keep == "best_last":
            kept = {self.best(), max(self.iterations(), default=None)}
            for i in set(self.iterations()) - kept:
                self._finished.delete(i)

    def best(self) -> int | None:
        """The iteration with the lowest held-out loss among those here; the earliest of equals; None when none was measured."""
        losses = {i: self._losses().get(str(i)) for i in self.iterations()}
        return min((i for i, loss in losses.items() if loss is not None), key=lambda i: (losses[i], i), default=None)

    @property
    def _losses_path(self) -> Path:
        return self._root / "held_out.json"

    def _losses(self) -> dict[str, float | None]:
        return json.loads(self._losses_path.read_text()) if self._losses_path.exists() else {}

    def _way_out(self, iteration: int) -> str:
        return (f"Put the folder back from a copy; or delete {self._root / str(iteration)} and iterations/{iteration:02d}/DONE, and that "
                "iteration is fine-tuned anew from its pairs.")

    # ------------------------------------------------------------------------------------------------- unfinished fine-tuning
    def save_unfinished(self, tag: str, state: Any, notes: dict[str, Any]) -> None:
        """Write the state of an unfinished fine-tuning and JSON-able notes; an earlier state goes when this one is whole."""
        number = max(self._unfinished.all_steps(), default=0) + 1
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), notes=ocp.args.JsonSave({"tag": tag, **notes}))
        self._unfinished.save(number, args=args, force=True)

    def restore_unfinished(self, tag: str, like: Any) -> tuple[Any, dict[str, Any]] | None:
        """(state, notes) of the newest whole state that was saved under `tag`, or None. Damaged states are as good as none."""
        for number in sorted(self._unfinished.all_steps(), reverse=True):
            try:
                notes = self._unfinished.restore(number, args=ocp.args.Composite(notes=ocp.args.JsonRestore()))["notes"]
                if notes["tag"] == tag:
                    state = self._unfinished.restore(number, args=ocp.args.Composite(state=ocp.args.StandardRestore(like)))["state"]
                    return state, notes
            except Exception:  # damaged: the fine-tuning starts again and ends with the same bits
                continue
        return None

    def clear_unfinished(self) -> None:
        """Delete the unfinished state."""
        for number in self._unfinished.all_steps():
            self._unfinished.delete(number)


def _first_line(e: Exception) -> str:
    return str(e).strip().split("\n")[0][:200] or type(e).__name__
