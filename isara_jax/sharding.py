"""The device mesh and where every array lies on it.

Axes: `data` shares out rows; `fsdp` shares out rows and, in training, parameters; `tensor` shares out heads and hidden units.
On one device all of this is trivial and the code path is the same.
"""
from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from isara_jax.common import UserError

ROWS = ("data", "fsdp")  # the mesh axes over which the rows of a batch are shared out


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices: list[jax.Device] | None = None) -> Mesh:
    """A (data, fsdp, tensor) mesh over `devices` (all by default); one axis may be -1 and takes what is left.

    Raises `UserError` when the sizes do not fill the devices exactly.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [data, fsdp, tensor]
    fixed = int(np.prod([s for s in sizes if s != -1]))
    if -1 in sizes and len(devices) % fixed == 0:
        sizes[sizes.index(-1)] = len(devices) // fixed
    if int(np.prod(sizes)) != len(devices) or -1 in sizes:
        raise UserError(f"mesh data={data} fsdp={fsdp} tensor={tensor} does not fill {len(devices)} device(s); their product must be "
                        f"{len(devices)}. Set --config.mesh.data, .fsdp and .tensor (one of them may be -1).")
    return Mesh(np.array(devices).reshape(sizes), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


@dataclass(frozen=True)
class ShardingConfig:
    """The mesh axes of each kind of array; fields are named by its dimensions (see models/layers.py for the letters)."""

    embedding_vd: P = P("tensor", "fsdp")
    positions_pd: P = P(None, "fsdp")
    project_de: P = P("fsdp", None)
    head_dv: P = P("fsdp", "tensor")
    q_dn: P = P("fsdp", "tensor")
    kv_dk: P = P("fsdp", "tensor")
    o_nd: P = P("tensor", "fsdp")
    up_df: P = P("fsdp", "tensor")
    down_fd: P = P("tensor", "fsdp")
    norm_d: P = P(None)
    tokens_bt: P = P(ROWS, None)
    rows_b: P = P(ROWS)

    def for_sampling(self) -> ShardingConfig:
        """The same, with parameters whole on every fsdp device: decoding would gather them at each step."""
        drop = lambda spec: P(*(None if axis == "fsdp" else axis for axis in spec))
        return ShardingConfig(**{f.name: getattr(self, f.name) if f.name in ("tokens_bt", "rows_b") else drop(getattr(self, f.name))
                                 for f in dataclasses.fields(self)})


_KERNELS = {"q": "q_dn", "k": "kv_dk", "v": "kv_dk", "o": "o_nd", "gate": "up_df", "up": "up_df", "down": "down_fd", "head": "head_dv",
            "project_in": "project_de", "project_out": "project_de"}


def param_spec(path: tuple[str, ...], rules: ShardingConfig, stacked: bool) -> P:
    """The spec of the parameter at `path` (for example ('layers', '0', 'attn', 'q', 'kernel')); `stacked` layers lead with [L].

    A bias and the second half of an adapter lie as the columns of their kernel, the first half of an adapter as its rows.
    """
    *_, owner, leaf = path
    if leaf == "embedding":
        spec = rules.positions_pd if owner == "positions" else rules.embedding_vd
    elif owner.endswith("norm"):
        spec = rules.norm_d
    else:
        rows, columns = getattr(rules, _KERNELS[owner])
        spec = {"kernel": P(rows, columns), "bias": P(columns), "lora_a": P(rows, None), "lora_b": P(None, columns)}[leaf]
    return P(None, *spec) if stacked and path[0] == "layers" else spec


def param_shardings(params: Any, mesh: Mesh, rules: ShardingConfig = ShardingConfig()) -> Any:
    """A tree of `NamedSharding`s shaped like `params` (arrays or ShapeDtypeStructs).

    Tensor parallelism over more devices than there are key-value heads, or uneven sizes, falls back to replication of that axis.
    """
    stacked = "0" not in params["layers"]

    def one(key_path, leaf):
        spec = param_spec(tuple(k.key for k in key_path), rules, stacked)
        fits = (axis if axis is None or size % mesh.shape[axis] == 0 else None for axis, size in zip(spec, leaf.shape))
        return NamedSharding(mesh, P(*fits))

    return jax.tree_util.tree_map_with_path(one, params)


def put_rows(mesh: Mesh, tree: Any) -> Any:
    """Host arrays with a leading row axis, onto the mesh with rows shared out. The row count must divide by the row devices."""
    return jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, P(ROWS, *(None,) * (np.ndim(x) - 1)))), tree)


def row_devices(mesh: Mesh) -> int:
    """How many ways the rows of a batch are shared out."""
    return mesh.shape["data"] * mesh.shape["fsdp"]
