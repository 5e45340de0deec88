"""Putting weights where they belong as they are read: each process reads the parts of its own devices, each part once."""
from __future__ import annotations

import functools
from typing import Any, Callable

import jax
import numpy as np

from isara_jax.models.families.table import ParamPath, Shape

# read(index of our array) -> that part of it, in the dtype asked for; memory from tensors.empty is taken without a copy on a CPU
Read = Callable[[tuple[slice, ...]], np.ndarray]
# place(path, shape of the whole, dtype, read) -> the array on its devices
Place = Callable[[ParamPath, Shape, np.dtype, Read], jax.Array]


def placer(shardings: Any) -> Place:
    """A `Place` for parameters that lie as the tree `shardings` of `jax.sharding.Sharding`s says.

    At most one part is in host memory on its way to a device; on a CPU that memory is the array's own, and devices that hold the same
    part share it.
    """

    def place(path: ParamPath, shape: Shape, dtype: np.dtype, read: Read) -> jax.Array:
        sharding = functools.reduce(lambda tree, key: tree[key], path, shardings)
        parts: dict[tuple, tuple[tuple[slice, ...], list[jax.Device]]] = {}
        for device, index in sharding.addressable_devices_indices_map(shape).items():
            parts.setdefault(tuple((s.start, s.stop) for s in index), (index, []))[1].append(device)
        arrays = []
        for index, devices in parts.values():
            part = read(index)
            if part.dtype != dtype:
                raise ValueError(f"{'/'.join(path)} was read as {part.dtype}, not {dtype}")
            arrays += jax.block_until_ready([jax.device_put(part, device) for device in devices])
        return jax.make_array_from_single_device_arrays(shape, sharding, arrays)

    return place
