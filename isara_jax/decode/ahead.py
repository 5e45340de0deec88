"""Programs that are compiled in the background, before the arrays they work on are there, and found when they are called.

`jax.jit` alone compiles at the first call; while weights are being read, the cores that compile would stand idle.
"""
from __future__ import annotations

import functools
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Callable, Hashable

import jax

_programs: dict[Hashable, Future] = {}


@functools.cache
def _workers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=2, thread_name_prefix="compile")


def compile(function: Callable, static: Hashable, *args: Any) -> None:
    """Start to compile `function(static, *args)`, a jitted function whose first argument is static.

    args: pytrees of `jax.ShapeDtypeStruct`s with the shardings that the arrays will have. A program that is compiled already, or being
    compiled, is left alone.
    """
    key = _key(function, static, args)
    if key not in _programs:
        _programs[key] = _workers().submit(lambda: function.lower(static, *args).compile())


def call(function: Callable, static: Hashable, *args: Any) -> Any:
    """function(static, *args), by the program that was compiled for it, waiting for that if need be; else as `jax.jit` does it."""
    program = _programs.get(_key(function, static, args)) if _programs else None
    return program.result()(*args) if program else function(static, *args)


def _key(function: Callable, static: Hashable, args: Any) -> Hashable:
    leaves, structure = jax.tree.flatten(args)
    return function, static, structure, tuple((x.shape, x.dtype) for x in leaves)
