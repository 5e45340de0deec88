"""Before work starts: arithmetic, memory, time, writable folders, the compilation cache. Everything here is cheap."""
from __future__ import annotations

import functools
import glob
import os
import shutil
import statistics
import time
import uuid
from pathlib import Path
from typing import Any, Sequence

from isara_jax.common import UserError, content_hash
from isara_jax.models.assets import cache_folder
from isara_jax.models.config import ModelConfig

SHARE_OF_PEAK = 0.5  # of the measured speed of a large product that a whole run reaches (measured on 2 cores with SmolLM2-135M)
GIB = 2**30


# ----------------------------------------------------------------------------------------------------------------------- dtype
def choose_dtype(asked: str, devices: Sequence[Any]) -> tuple[str, str]:
    """(dtype, why). "auto" is bfloat16 where the device multiplies it natively: GPU, TPU, CPUs with avx512_bf16 or AMX."""
    if asked != "auto":
        if asked not in ("float32", "bfloat16"):
            raise UserError(f"dtype {asked!r} is not one of auto, float32, bfloat16.")
        return asked, "as asked for"
    if (platform := devices[0].platform) != "cpu":
        return "bfloat16", f"{platform.upper()} devices multiply it natively"
    native = sorted(cpu_flags() & {"avx512_bf16", "amx_bf16"})
    if native:
        return "bfloat16", f"this CPU multiplies it natively ({', '.join(native)})"
    return "float32", "this CPU has neither avx512_bf16 nor AMX, so bfloat16 would be slower"


@functools.cache
def cpu_flags() -> frozenset[str]:
    """The feature flags of this CPU; empty where /proc/cpuinfo does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.split(":", 1)[1].split() for line in lines if line.startswith(("flags", "Features"))), ()))


# ---------------------------------------------------------------------------------------------------------------------- memory
def memory_there(devices: Sequence[Any]) -> int:
    """Bytes that this process may use: of one accelerator, or of this machine (its control group's limit counts)."""
    if devices[0].platform != "cpu":
        return int((devices[0].memory_stats() or {}).get("bytes_limit", 0))
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            total = min(total, int(Path(limit).read_text()))
        except (OSError, ValueError):  # no control group, or "max"
            pass
    return total


def memory_needed(cfg: ModelConfig, dtype: str, *, slots: int, tokens_per_slot: int, batch: int, train_tokens: int) -> dict[str, int]:
    """Estimated peak bytes on one device while sampling and while training, from shapes (float32 parameters, gradients and two moments)."""
    item = 2 if dtype == "bfloat16" else 4
    weights = 4 * cfg.n_params
    kv = slots * tokens_per_slot * cfg.n_layers * 2 * cfg.n_kv_heads * cfg.head_dim * item
    logits = 4 * 4 * slots * cfg.vocab_size
    copies = item * cfg.n_params if dtype == "bfloat16" else 0
    blocks = 4 * batch * train_tokens * (cfg.n_layers * cfg.d_model + 4 * cfg.d_ff + 4 * cfg.d_model + cfg.n_heads * train_tokens)
    imports = GIB // 2  # Python, jaxlib and what else is loaded
    return {"sampling": imports + 2 * weights + copies + kv + logits, "training": imports + 5 * weights + copies + blocks + 4 * batch * 64 * cfg.vocab_size}


def check_memory(cfg: ModelConfig, dtype: str, devices: Sequence[Any], **shape: int) -> str:
    """A line with the memory needed and there. Raises `UserError` where it cannot suffice, naming what to lower."""
    needed, there = memory_needed(cfg, dtype, **shape), memory_there(devices)
    said = f"memory: about {needed['sampling'] / GIB:.1f} GiB for sampling and {needed['training'] / GIB:.1f} GiB for training of {there / GIB:.1f} GiB"
    if there and max(needed.values()) > there:
        lower = "--config.generate.slots" if needed["sampling"] > needed["training"] else "--config.sft.batch, or take a smaller model"
        raise UserError(f"{said}: it will not suffice. Lower {lower}, or use more devices (--config.mesh.fsdp=-1).")
    return said


# ------------------------------------------------------------------------------------------------------------------------ time
def measure_speed(dtype: str) -> float:
    """GFLOP/s of a [512, 1024] x [1024, 1024] product here and now: the median of some tries, in under half a second."""
    import jax
    import jax.numpy as jnp

    a, b = jnp.ones((512, 1024), dtype), jnp.ones((1024, 1024), dtype)
    product = jax.jit(lambda a, b: jax.lax.dot_general(a, b, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32))
    product(a, b).block_until_ready()
    seconds, end = [], time.perf_counter() + 0.3
    while len(seconds) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        product(a, b).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * 512 * 1024 * 1024 / statistics.median(seconds) / 1e9


def accelerator_hint() -> str | None:
    """The line that mends it when a GPU or TPU is there and jax runs on the CPU; None when all is well."""
    import jax

    if jax.default_backend() != "cpu" or os.environ.get("JAX_PLATFORMS", "").startswith("cpu"):
        return None
    if shutil.which("nvidia-smi") and glob.glob("/dev/nvidia[0-9]*"):
        return "there is an NVIDIA GPU here, but jax runs on the CPU: pip install 'isara_jax[cuda]'"
    if glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*") and "TPU_WORKER_ID" in os.environ:
        return "there is a TPU here, but jax runs on the CPU: pip install 'isara_jax[tpu]'"
    return None


# ----------------------------------------------------------------------------------------------------------------------- disk
def writable(workdir: Path, needed: int = 0) -> None:
    """Raise `UserError` unless files can be written in `workdir` (made if need be, and removed again) with `needed` bytes free."""
    existing = workdir
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    try:
        if not existing.is_dir():
            raise NotADirectoryError(20, "it is a file", str(existing))
        probe = existing / f".isara-{uuid.uuid4().hex}"
        probe.mkdir()
        probe.rmdir()
        free = shutil.disk_usage(existing).free
    except OSError as e:
        raise UserError(f"--workdir={workdir} cannot be written ({existing}: {e.strerror}). Name another folder.") from None
    if free < needed:
        raise UserError(f"--workdir={workdir} has {free / GIB:.1f} GiB free, the run needs about {needed / GIB:.1f} GiB. Make room, name another folder, "
                        "or set --config.keep=best_last.")


# -------------------------------------------------------------------------------------------------------------------- compiling
def compilation_cache() -> Path | None:
    """Keep compiled programs between runs, apart for each jaxlib, CPU and XLA_FLAGS; ISARA_NO_COMPILATION_CACHE=1 does not.

    An own JAX_COMPILATION_CACHE_DIR is left as it is. Returns the folder in use.
    """
    import jax
    import jaxlib

    if os.environ.get("ISARA_NO_COMPILATION_CACHE") == "1":
        return None
    if not (folder := jax.config.jax_compilation_cache_dir):
        machine = content_hash(" ".join(sorted(cpu_flags())), os.environ.get("XLA_FLAGS", ""))
        folder = cache_folder() / "xla" / f"{jaxlib.__version__}-{machine}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            return None  # a cache that cannot be written only costs time
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
    return Path(folder)
