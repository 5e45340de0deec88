"""Checkpoints: round trips over meshes and dtypes, damage, the unfinished state, what is kept."""
import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isara_jax.checkpoint import Checkpoints
from isara_jax.common import UserError

TREE = {"embed": {"embedding": jnp.arange(12.0).reshape(4, 3)}, "layers": {"0": {"scale": jnp.array([1.5, 2.5])}}}


def like(tree, dtype=None):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype or x.dtype, sharding=x.sharding), tree)


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def test_round_trip_in_a_new_process_and_another_dtype(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved = Checkpoints("checkpoints")  # relative paths work
    assert saved.iterations() == []
    saved.save(1, TREE)
    saved.save(2, jax.tree.map(lambda x: x + 1, TREE))
    again = Checkpoints(tmp_path / "checkpoints")
    assert again.iterations() == [1, 2]
    assert same(again.restore(1, like(TREE)), TREE)
    half = again.restore(2, like(TREE, jnp.bfloat16))
    assert half["embed"]["embedding"].dtype == jnp.bfloat16 and float(half["embed"]["embedding"][1, 0]) == 4.0


def test_saving_again_replaces(tmp_path):
    saved = Checkpoints(tmp_path)
    saved.save(1, TREE)
    other = jax.tree.map(lambda x: x * 2, TREE)
    saved.save(1, other)
    assert same(Checkpoints(tmp_path).restore(1, like(TREE)), other)


def test_missing_and_damaged_iterations_are_named(tmp_path):
    saved = Checkpoints(tmp_path)
    saved.save(1, TREE)
    saved.save(2, TREE)
    with pytest.raises(UserError, match=r"no whole checkpoint of iteration 3; it has \[1, 2\]"):
        saved.restore(3, like(TREE))
    shutil.rmtree(tmp_path / "2" / "params")  # half deleted
    assert Checkpoints(tmp_path).iterations() == [1]
    for part in (tmp_path / "1" / "params").rglob("*"):  # data gone, the folder looks whole
        if part.is_file() and part.parent.name == "d":
            part.unlink()
    again = Checkpoints(tmp_path)
    with pytest.raises(UserError, match="cannot be restored") as caught:
        again.restore(1, like(TREE))
    assert str(tmp_path / "1") in str(caught.value) and "\n" not in str(caught.value)


def test_debris_of_a_killed_save_is_cleared(tmp_path):
    Checkpoints(tmp_path).save(1, TREE)
    debris = tmp_path / "2.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "1", debris)
    again = Checkpoints(tmp_path)
    assert again.iterations() == [1]
    again.save(2, TREE)
    assert again.iterations() == [1, 2] and not debris.exists()


def test_the_unfinished_state_comes_back_under_its_own_tag_only(tmp_path):
    saved = Checkpoints(tmp_path)
    state = {"params": TREE, "opt": (jnp.float32(3), [jnp.arange(2)])}
    saved.save_unfinished("a", state, {"losses": [[1.5, 2]]})
    saved.save_unfinished("a", jax.tree.map(lambda x: x + 1, state), {"losses": [[1.5, 2], [1.25, 3]]})
    again = Checkpoints(tmp_path)
    assert again.iterations() == []
    found, notes = again.restore_unfinished("a", like(state))
    assert same(found, jax.tree.map(lambda x: x + 1, state)) and isinstance(found["opt"], tuple)
    assert notes["losses"] == [[1.5, 2], [1.25, 3]]
    assert again.restore_unfinished("b", like(state)) is None
    again.save(1, TREE)  # a finished iteration leaves no unfinished state
    assert Checkpoints(tmp_path).restore_unfinished("a", like(state)) is None


def test_a_damaged_unfinished_state_is_none(tmp_path):
    saved = Checkpoints(tmp_path)
    saved.save_unfinished("a", TREE, {})
    shutil.rmtree(tmp_path / "unfinished" / "1" / "state")
    assert Checkpoints(tmp_path).restore_unfinished("a", like(TREE)) is None


def test_best_last_keeps_the_lowest_loss_and_the_newest(tmp_path):
    saved = Checkpoints(tmp_path, keep="best_last")
    for iteration, loss in ((1, 2.0), (2, 1.0), (3, 1.0), (4, 3.0)):
        saved.save(iteration, TREE)
        saved.measured(iteration, loss)
    assert saved.iterations() == [2, 4] and saved.best() == 2
    assert Checkpoints(tmp_path).iterations() == [2, 4] and same(saved.restore(2, like(TREE)), TREE)


def test_all_keeps_all_and_unmeasured_iterations_have_no_best(tmp_path):
    saved = Checkpoints(tmp_path)
    for iteration in (1, 2):
        saved.save(iteration, TREE)
        saved.measured(iteration, None)
    assert saved.iterations() == [1, 2] and saved.best() is None


MESHES = """
import sys, jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from isara_jax.checkpoint import Checkpoints
from isara_jax.sharding import make_mesh
x = np.arange(64.0, dtype=np.float32).reshape(8, 8)
place = lambda mesh, *spec: NamedSharding(mesh, P(*spec))
saved = Checkpoints(sys.argv[1])
saved.save(1, {"w": jax.device_put(x, place(make_mesh(fsdp=8, data=1), "fsdp", None))})
other = place(make_mesh(data=1, fsdp=2, tensor=4), "tensor", "fsdp")
back = saved.restore(1, {"w": jax.ShapeDtypeStruct((8, 8), jnp.bfloat16, sharding=other)})["w"]
assert back.sharding == other and back.dtype == jnp.bfloat16 and np.array_equal(np.asarray(back, np.float32), x)
"""


def test_another_mesh(tmp_path):
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", MESHES, str(tmp_path)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
