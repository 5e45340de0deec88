"""Before work starts: arithmetic, speed, a missed accelerator, disk, the compilation cache, memory. Everything here is cheap."""
from __future__ import annotations

import contextlib
import functools
import glob
import importlib.metadata
import os
import platform
import re
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, Sequence

from isara_jax.common import UserError, content_hash
from isara_jax.models import decoder
from isara_jax.models.assets import cache_folder
from isara_jax.models.config import ModelConfig

SHARE_OF_PEAK = 0.5  # of the measured speed of a large product that a whole run reaches (measured on 2 cores with SmolLM2-135M)
SLOT_SHARE = 0.6     # of the memory there is that sampling may take before slots are given up: others use the machine too
GIB = 2**30
CONTROL_GROUPS = Path("/sys/fs/cgroup")


# ----------------------------------------------------------------------------------------------------------------------- dtype
def choose_dtype(asked: str, devices: Sequence[Any]) -> tuple[str, str]:
    """(dtype, why). "auto" is bfloat16 where the device multiplies it natively: TPUs, GPUs since Ampere, CPUs with avx512_bf16 or AMX."""
    if asked != "auto":
        if asked not in ("float32", "bfloat16"):
            raise UserError(f"dtype {asked!r} is not one of auto, float32, bfloat16.")
        return asked, "as asked for"
    device = devices[0]
    if device.platform != "cpu":
        capability = getattr(device, "compute_capability", None)  # of NVIDIA devices, for example "9.0"
        if capability and re.match(r"\d", str(capability)) and float(capability) < 8:
            return "float32", f"{device.device_kind} (compute capability {capability}) does not multiply bfloat16 natively"
        return "bfloat16", f"{device.device_kind} multiplies it natively"
    native = sorted(cpu_flags() & {"avx512_bf16", "amx_bf16"})
    isa = re.search(r"--xla_cpu_max_isa=(\w+)", os.environ.get("XLA_FLAGS", ""))
    if native and isa and not re.match("AVX512_BF16|AMX", isa[1], re.IGNORECASE):
        return "float32", f"this CPU multiplies bfloat16 natively, but XLA_FLAGS allows only {isa[1]}"
    if native:
        return "bfloat16", f"this CPU multiplies it natively ({', '.join(native)})"
    return "float32", "this CPU has neither avx512_bf16 nor AMX, so bfloat16 would be slower"


@functools.cache
def cpu_flags() -> frozenset[str]:
    """The feature flags of this CPU; empty where /proc/cpuinfo does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.split(":", 1)[1].split() for line in lines if line.startswith(("flags", "Features"))), ()))


# ----------------------------------------------------------------------------------------------------------------------- speed
def measure_speed(dtype: str) -> float:
    """GFLOP/s of all devices together here and now: the median of some large products, in about half a second."""
    import jax
    import jax.numpy as jnp

    devices = 1 if jax.default_backend() == "cpu" else jax.device_count()  # several CPU devices share the cores
    rows, width = (512, 1024) if jax.default_backend() == "cpu" else (8192, 8192)
    a, b = jnp.ones((rows, width), dtype), jnp.ones((width, width), dtype)
    product = jax.jit(lambda a, b: jax.lax.dot_general(a, b, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32))
    product(a, b).block_until_ready()
    seconds, end = [], time.perf_counter() + 0.3
    while len(seconds) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        product(a, b).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return devices * 2 * rows * width * width / statistics.median(seconds) / 1e9


def accelerator_hint() -> str | None:
    """The line that mends it when a GPU or TPU is there and jax runs on the CPU; None when all is well or the CPU was asked for."""
    import jax

    if jax.default_backend() != "cpu" or (jax.config.jax_platforms or "").startswith("cpu"):
        return None
    if glob.glob("/dev/nvidia[0-9]*") or shutil.which("nvidia-smi") and os.path.exists("/dev/dxg"):  # the second on Windows' Linux
        here, name, extra, plugins = "an NVIDIA GPU", "cuda", "cuda13", ("jax-cuda13-plugin", "jax-cuda12-plugin")
    elif glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*") and any(v.startswith("TPU_") for v in os.environ):
        here, name, extra, plugins = "a TPU", "tpu", "tpu", ("libtpu",)
    else:
        return None
    said = f"there is {here} here, but jax runs on the CPU"
    for plugin in plugins:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return f"{said} although {plugin} {importlib.metadata.version(plugin)} is installed: start with JAX_PLATFORMS={name} to see why"
    older = " (with a driver older than 580, cuda12 in place of cuda13)" if name == "cuda" else ""
    return f"{said}: pip install 'jax[{extra}]=={jax.__version__}'{older}"


# ------------------------------------------------------------------------------------------------------------------------ disk
def writable(workdir: str | Path, needed: int = 0) -> None:
    """Raise `UserError` unless files can be written in `workdir`, or where it would be made, with `needed` bytes free. Leaves no trace."""
    existing = workdir = Path(os.path.abspath(workdir))
    while not os.path.lexists(existing) and existing != existing.parent:
        existing = existing.parent
    try:
        with contextlib.suppress(FileNotFoundError):
            os.lstat(workdir)  # finds names that are too long and parents that are files
        with tempfile.TemporaryFile(dir=existing) as probe:
            probe.write(b"isara")
        free = shutil.disk_usage(existing).free
    except (OSError, ValueError) as e:
        why = getattr(e, "strerror", None) or e
        raise UserError(f"--workdir={workdir} cannot be written ({existing}: {why}). Name another folder.") from None
    if free < needed:
        raise UserError(f"--workdir={workdir} has {free / GIB:.1f} GiB free, the run needs about {needed / GIB:.1f} GiB. Make room, "
                        "name another folder, or set --config.keep=best_last.")


def disk_needed(cfg: ModelConfig, *, iterations: int, keep: str, adapters: int = 0) -> int:
    """Bytes that checkpoints will take: float32 parameters of the iterations kept, and one unfinished state with its two moments.

    `adapters` is the number of parameters of adapters where they are trained in place of the model's; each iteration's stay.
    """
    kept = iterations if keep == "all" else min(iterations, 3)  # the best, the last, and the one being written
    return 4 * (decoder.n_params(cfg) * kept + 3 * (adapters or decoder.n_params(cfg)) + iterations * adapters) + 2**26


# -------------------------------------------------------------------------------------------------------------------- compiling
def compilation_cache() -> Path | None:
    """Keep compiled programs between runs, apart for each jaxlib, CPU and XLA_FLAGS; ISARA_NO_COMPILATION_CACHE=1 does not.

    jax's own keys hold the program, jaxlib, flags and the kind of device, which for a CPU is only "cpu": programs compiled for wider
    registers would be loaded on a machine that shares the folder and lacks them. A JAX_COMPILATION_CACHE_DIR of your own is left as it
    is. Returns the folder in use.
    """
    import jax
    import jaxlib

    if os.environ.get("ISARA_NO_COMPILATION_CACHE") == "1":
        return None
    if jax.config.jax_compilation_cache_dir:
        return Path(jax.config.jax_compilation_cache_dir)
    machine = content_hash(platform.machine(), " ".join(sorted(cpu_flags())), os.environ.get("XLA_FLAGS", ""))
    folder = cache_folder() / "xla" / f"{jaxlib.__version__}-{machine}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None  # a cache that cannot be written only costs time
    jax.config.update("jax_compilation_cache_dir", str(folder))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)  # the small ones too: a second start compiles nothing
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
    return folder


# ---------------------------------------------------------------------------------------------------------------------- memory
def check_memory(cfg: ModelConfig, dtype: str, devices: Sequence[Any], *, fsdp: int = 1, tensor: int = 1, **shape: int) -> str:
    """A line with the memory needed and there. Raises `UserError` where it cannot suffice, naming what to lower.

    Args:
        devices: of the mesh; its axes `fsdp` and `tensor` share out parameters, the rest of it rows alone.
        shape: `slots`, `tokens_per_slot`, `batch`, `train_tokens` and `adapters` of `memory_needed`.
    """
    sizes = {"devices": devices, "fsdp": fsdp, "tensor": tensor}
    needed = memory_in_all(cfg, dtype, **sizes, **shape)
    cpu, (there, free) = devices[0].platform == "cpu", memory_there(devices[0])
    said = f"memory: about {needed['sampling'] / GIB:.1f} GiB for sampling and {needed['training'] / GIB:.1f} GiB for training"
    if not there:
        return f"{said}; how much there is could not be found out"
    said += f" of {there / GIB:.1f} GiB" + (" on this machine" if cpu else " on a device")
    most = max(needed.values())
    if most > there:
        ways = ["take a smaller model"] + ([] if cpu else [
            "share out the parameters over more devices (--config.mesh.data=1 --config.mesh.fsdp=-1)"])
        if max(memory_in_all(cfg, dtype, **sizes, **shape | {"batch": 1, "slots": 2}).values()) <= there:
            ways.insert(0, f"lower {'--config.generate.slots' if needed['sampling'] > needed['training'] else '--config.sft.batch'}")
        frozen = memory_in_all(cfg, dtype, **sizes, **shape | {"adapters": 1})
        if not shape.get("adapters") and needed["training"] > there >= max(frozen.values()):
            ways.append("train adapters in place of the weights (--config.sft.lora.rank=16)")
        raise UserError(f"{said}: that cannot suffice. {', or '.join(ways).capitalize()}.")
    return said + (f"; but only {free / GIB:.1f} GiB are free now: close other programs" if most > free else "")


def slots_that_fit(cfg: ModelConfig, dtype: str, devices: Sequence[Any], *, slots: int, **sizes: int) -> int:
    """`slots`, halved until sampling takes at most `SLOT_SHARE` of the memory there is; as they are where 2 would not help either."""
    there, _ = memory_there(devices[0])
    fits = lambda n: not there or memory_in_all(cfg, dtype, devices, slots=n, batch=1, train_tokens=1, **sizes)["sampling"] <= SLOT_SHARE * there
    if not fits(2):
        return slots
    while not fits(slots):
        slots = max(slots // 2, 2)
    return slots


def memory_in_all(cfg: ModelConfig, dtype: str, devices: Sequence[Any], **sizes: int) -> dict[str, int]:
    """`memory_needed` of a device; on CPUs of this whole process, where all devices live: half a GiB is Python, jaxlib and the rest."""
    needed = memory_needed(cfg, dtype, devices=len(devices), **sizes)
    if devices[0].platform != "cpu":
        return needed
    return {stage: n * len(devices) + GIB // 2 for stage, n in needed.items()}


def memory_needed(cfg: ModelConfig, dtype: str, *, slots: int, tokens_per_slot: int, batch: int, train_tokens: int, devices: int = 1,
                  fsdp: int = 1, tensor: int = 1, adapters: int = 0) -> dict[str, int]:
    """Estimated peak bytes on one device while sampling and while training, from shapes alone.

    Sampling holds the starting and the tuned weights in float32, a copy in the sampling dtype or layout where that differs, keys and
    values of `slots` rows of `tokens_per_slot`, and logits. Training holds the starting weights, and those being trained with
    gradients and two moments, all float32; one [T, D] tensor a layer for each of its rows (blocks are rematerialised), one block at
    work with its scores [N, T, T], and logits of 64 positions. With `adapters`, so many parameters are trained in place of the model's:
    beside the starting weights there are only a copy of them (frozen, then merged) and what belongs to the adapters. `slots` counts rows
    of a device, `batch` those of all.
    """
    item, weights = (2 if dtype == "bfloat16" else 4), 4 * decoder.n_params(cfg) // (fsdp * tensor)
    copy = item * decoder.n_params(cfg) // tensor if dtype == "bfloat16" or fsdp > 1 else 0
    kv = slots * tokens_per_slot * cfg.n_layers * 2 * cfg.n_kv_heads * cfg.head_dim * item // tensor
    logits = 4 * 4 * slots * cfg.vocab_size
    rows = -(-batch * tensor // devices)
    blocks = 4 * rows * train_tokens * (cfg.n_layers * cfg.d_model + 4 * cfg.d_ff + 4 * cfg.d_model + cfg.n_heads * train_tokens)
    half = item * decoder.n_params(cfg) // (fsdp * tensor) if dtype == "bfloat16" else 0
    trained = 2 * weights + 4 * 4 * adapters if adapters else 5 * weights + half
    return {"sampling": 2 * weights + copy + kv + logits, "training": trained + blocks + 4 * rows * 64 * cfg.vocab_size}


def memory_there(device: Any) -> tuple[int, int]:
    """Bytes that this process may use, and those free now: of an accelerator, or of this machine within its control group. 0 is unknown."""
    if device.platform != "cpu":
        stats = device.memory_stats() or {}
        limit = int(stats.get("bytes_limit", 0))
        return limit, limit - int(stats.get("bytes_in_use", 0))
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free = total
    with contextlib.suppress(OSError):
        if found := re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(encoding="ascii"), re.MULTILINE):
            free = int(found[1]) * 1024
    total = min([total, *_group_limits()])
    return total, min(total, free)


def _group_limits() -> list[int]:
    """The memory limits of the control groups this process is in, innermost to outermost, versions 1 and 2."""
    limits = []
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers in ("", "memory"):  # "" is version 2
                group = Path(path.lstrip("/"))
                limits += [_limit(CONTROL_GROUPS / controllers / g) for g in (group, *group.parents)]
    return [n for n in limits if n]


def _limit(folder: Path) -> int:
    for name in ("memory.max", "memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # no such group here, or "max"
            return int((folder / name).read_text(encoding="ascii"))
    return 0
