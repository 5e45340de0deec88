"""The mesh and the placement of parameters, on eight fake devices in a process of its own."""
import os
import subprocess
import sys

import jax
import pytest

from isara_jax.common import UserError
from isara_jax.sharding import make_mesh

EIGHT = """
import jax, numpy as np
from isara_jax.models import decoder
from isara_jax.models.config import ModelConfig
from isara_jax.sharding import ShardingConfig, make_mesh, param_shardings, put_rows, row_devices
mesh = make_mesh(data=2, fsdp=-1, tensor=2)
assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2} and row_devices(mesh) == 4
cfg = ModelConfig(vocab_size=96, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=48)
params = decoder.init_params(cfg, 0)
spec = lambda tree, *path: tuple((tree[path[0]] if len(path) == 1 else tree[path[0]][path[1]]["attn"]["q"]["kernel"]).spec)
train = param_shardings(params, mesh)
assert spec(train, "layers", "0") == ("fsdp", "tensor")
assert tuple(train["layers"]["0"]["mlp"]["down"]["kernel"].spec) == ("tensor", "fsdp")
sample = param_shardings(params, mesh, ShardingConfig().for_sampling())
assert spec(sample, "layers", "0") == (None, "tensor")
stacked = param_shardings(decoder.stack_layers(params), mesh)
assert tuple(stacked["layers"]["attn"]["q"]["kernel"].spec) == (None, "fsdp", "tensor")
placed = jax.device_put(params, train)
assert placed["embed"]["embedding"].addressable_shards[0].data.shape == (48, 16)
rows = put_rows(mesh, np.arange(8).reshape(8, 1))
assert [s.data.shape for s in rows.addressable_shards] == [(2, 1)] * 8
odd = param_shardings(decoder.init_params(ModelConfig(97, 31, 1, 4, 2, 8, 48), 0), mesh)
assert tuple(odd["embed"]["embedding"].spec) == (None, None)  # 97 and 31 do not divide: whole everywhere
"""


def test_eight_devices():
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", EIGHT], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_sizes_that_do_not_fill_the_devices_are_an_error_that_names_them():
    have = len(jax.devices())
    with pytest.raises(UserError, match=f"data=-1 fsdp={have + 1} tensor=1 does not fill {have} device"):
        make_mesh(fsdp=have + 1)
    with pytest.raises(UserError, match="their product must be"):
        make_mesh(data=have + 1)
