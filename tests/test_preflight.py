"""What is checked before work starts."""
import os
import re
import types

import jax
import pytest

from isara_jax import preflight
from isara_jax.common import UserError
from isara_jax.models import decoder
from isara_jax.models.config import ModelConfig

SMOLLM2 = ModelConfig(vocab_size=49152, d_model=576, n_layers=30, n_heads=9, n_kv_heads=3, head_dim=64, d_ff=1536, tie_embeddings=True)
SHAPE = {"slots": 64, "tokens_per_slot": 512, "batch": 16, "train_tokens": 64}
GIB = 2**30


def device(platform="cpu", **fields):
    return types.SimpleNamespace(platform=platform, device_kind=fields.pop("kind", platform), **fields)


# ---------------------------------------------------------------------------------------------------------------------- dtype
@pytest.mark.parametrize("flags, xla_flags, dtype, why", [
    ({"avx2", "fma"}, "", "float32", "neither avx512_bf16 nor AMX"),
    (set(), "", "float32", "neither"),
    ({"avx512f", "avx512_bf16"}, "", "bfloat16", "avx512_bf16"),
    ({"amx_bf16", "amx_tile"}, "", "bfloat16", "amx_bf16"),
    ({"avx512_bf16"}, "--xla_cpu_max_isa=AVX2 --xla_other=1", "float32", "allows only AVX2"),
    ({"avx512_bf16"}, "--xla_cpu_max_isa=AVX512_BF16", "bfloat16", "avx512_bf16"),
])
def test_auto_follows_what_the_cpu_multiplies(monkeypatch, flags, xla_flags, dtype, why):
    monkeypatch.setattr(preflight, "cpu_flags", lambda: frozenset(flags))
    monkeypatch.setenv("XLA_FLAGS", xla_flags)
    chosen, said = preflight.choose_dtype("auto", [device()])
    assert chosen == dtype and why in said


@pytest.mark.parametrize("made, dtype", [
    (device("tpu", kind="TPU v5 lite"), "bfloat16"),
    (device("gpu", kind="NVIDIA H200", compute_capability="9.0"), "bfloat16"),
    (device("gpu", kind="NVIDIA B200", compute_capability="10.0"), "bfloat16"),
    (device("gpu", kind="Tesla T4", compute_capability="7.5"), "float32"),
    (device("gpu", kind="AMD Instinct", compute_capability="gfx942"), "bfloat16"),
])
def test_auto_follows_what_the_accelerator_multiplies(made, dtype):
    chosen, said = preflight.choose_dtype("auto", [made])
    assert chosen == dtype and made.device_kind in said


def test_a_dtype_asked_for_is_taken():
    assert preflight.choose_dtype("bfloat16", [device()]) == ("bfloat16", "as asked for")
    with pytest.raises(UserError, match="float16.*not one of"):
        preflight.choose_dtype("float16", [device()])


# ---------------------------------------------------------------------------------------------------------- speed, accelerators
def test_the_speed_is_a_plausible_number():
    assert 0.1 < preflight.measure_speed("float32") < 1e6


@pytest.mark.parametrize("files, installed, said", [
    ([], [], None),
    (["/dev/nvidia[0-9]*"], [], "pip install 'jax\\[cuda13\\]==" + jax.__version__),
    (["/dev/nvidia[0-9]*"], ["jax-cuda12-plugin"], "although jax-cuda12-plugin 1.2 is installed.*JAX_PLATFORMS=cuda"),
    (["/dev/accel[0-9]*"], [], "pip install 'jax\\[tpu\\]=="),
    (["/dev/vfio/[0-9]*"], [], None),
])
def test_a_missed_accelerator_earns_the_line_that_mends_it(monkeypatch, files, installed, said):
    def version(project):
        if project in installed:
            return "1.2"
        raise preflight.importlib.metadata.PackageNotFoundError

    monkeypatch.setattr(preflight.glob, "glob", lambda pattern: [pattern] if pattern in files else [])
    monkeypatch.setattr(preflight.importlib.metadata, "version", version)
    monkeypatch.setattr(preflight.shutil, "which", lambda name: None)
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    monkeypatch.setattr(preflight.os, "environ", {})
    monkeypatch.setattr(type(jax.config), "jax_platforms", None)
    hint = preflight.accelerator_hint()
    assert (hint is None) == (said is None) and re.search(said or "", hint or "")


def test_a_cpu_that_was_asked_for_earns_no_hint(monkeypatch):
    monkeypatch.setattr(preflight.glob, "glob", lambda pattern: [pattern])
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    monkeypatch.setattr(type(jax.config), "jax_platforms", "cpu")
    assert preflight.accelerator_hint() is None


# ----------------------------------------------------------------------------------------------------------------------- disk
def test_a_good_folder_is_left_as_it_was(tmp_path):
    preflight.writable(tmp_path)
    preflight.writable(tmp_path / "to" / "be" / "made")
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_folder_is_named_with_the_reason(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for bad in (tmp_path / "file", tmp_path / "file" / "run", tmp_path / "dangling", tmp_path / ("x" * 300), tmp_path / "nul\0"):
        with pytest.raises(UserError, match="cannot be written.*Name another folder"):
            preflight.writable(bad)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="Permission denied"):
        preflight.writable(tmp_path / "run")


def test_a_full_disk_is_found_before_it_is_filled(tmp_path):
    with pytest.raises(UserError, match="GiB free, the run needs about 1048576.0 GiB.*keep=best_last"):
        preflight.writable(tmp_path, needed=2**50)


def test_disk_needed_counts_kept_parameters_and_one_unfinished_state():
    weights = 4 * decoder.n_params(SMOLLM2)
    assert preflight.disk_needed(SMOLLM2, iterations=10, keep="all") // weights == 13
    assert preflight.disk_needed(SMOLLM2, iterations=10, keep="best_last") // weights == 6
    assert preflight.disk_needed(SMOLLM2, iterations=1, keep="best_last") // weights == 4
    with_adapters = preflight.disk_needed(SMOLLM2, iterations=10, keep="all", adapters=1_000_000)
    assert with_adapters - preflight.disk_needed(SMOLLM2, iterations=10, keep="all") == 4 * 13_000_000 - 3 * weights


# ------------------------------------------------------------------------------------------------------------------ compiling
@pytest.fixture
def settings(tmp_path, monkeypatch):
    """A jax without a cache folder yet, a home for it, and what is set."""
    made = {}
    monkeypatch.setattr(type(jax.config), "jax_compilation_cache_dir", None)
    monkeypatch.setattr(type(jax.config), "update", lambda self, name, value: made.update({name: value}))
    monkeypatch.setenv("ISARA_CACHE", str(tmp_path))
    monkeypatch.delenv("ISARA_NO_COMPILATION_CACHE", raising=False)
    return made


def test_the_cache_is_apart_for_cpus_and_flags(tmp_path, settings, monkeypatch):
    folders = set()
    for flags, xla_flags in (({"avx2"}, ""), ({"avx2", "avx512f"}, ""), ({"avx2"}, "--xla_cpu_max_isa=AVX2")):
        monkeypatch.setattr(preflight, "cpu_flags", lambda flags=flags: frozenset(flags))
        monkeypatch.setenv("XLA_FLAGS", xla_flags)
        folder = preflight.compilation_cache()
        assert folder.is_dir() and settings["jax_compilation_cache_dir"] == str(folder) and folder == preflight.compilation_cache()
        folders.add(folder)
    assert len(folders) == 3 and {f.parent for f in folders} == {tmp_path / "xla"}


def test_the_cache_may_be_off_or_elsewhere(tmp_path, settings, monkeypatch):
    monkeypatch.setattr(type(jax.config), "jax_compilation_cache_dir", "/own")
    assert str(preflight.compilation_cache()) == "/own"
    monkeypatch.setenv("ISARA_NO_COMPILATION_CACHE", "1")
    assert preflight.compilation_cache() is None
    assert settings == {} and list(tmp_path.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, settings, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ISARA_CACHE", str(tmp_path / "file"))
    assert preflight.compilation_cache() is None and settings == {}


# --------------------------------------------------------------------------------------------------------------------- memory
def test_memory_needed_by_hand():
    cfg = ModelConfig(vocab_size=100, d_model=8, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=4, d_ff=16)
    n, shape = decoder.n_params(cfg), {"slots": 3, "tokens_per_slot": 10, "batch": 4, "train_tokens": 6}
    kv, logits = 3 * 10 * 2 * 2 * 4, 4 * 4 * 3 * 100
    blocks, losses = 4 * 4 * 6 * (2 * 8 + 4 * 16 + 4 * 8 + 2 * 6), 4 * 4 * 64 * 100
    assert preflight.memory_needed(cfg, "float32", **shape) == {"sampling": 8 * n + 4 * kv + logits, "training": 20 * n + blocks + losses}
    assert preflight.memory_needed(cfg, "bfloat16", **shape) == {"sampling": 10 * n + 2 * kv + logits, "training": 22 * n + blocks + losses}
    lora = preflight.memory_needed(cfg, "bfloat16", **shape, adapters=50)  # no gradients and moments but theirs
    assert lora == {"sampling": 10 * n + 2 * kv + logits, "training": 8 * n + 4 * 4 * 50 + blocks + losses}
    split = preflight.memory_needed(cfg, "float32", **shape, devices=4, fsdp=4)  # weights in four parts, but whole for sampling
    assert split == {"sampling": 2 * n + 4 * n + 4 * kv + logits, "training": 5 * n + (blocks + losses) // 4}


def test_memory_that_suffices_is_a_line(monkeypatch):
    monkeypatch.setattr(preflight, "memory_there", lambda device: (16 * GIB, 12 * GIB))
    said = preflight.check_memory(SMOLLM2, "float32", [device()], **SHAPE)
    assert "sampling" in said and "training of 16.0 GiB on this machine" in said and "free" not in said


def test_memory_taken_by_others_is_said(monkeypatch):
    monkeypatch.setattr(preflight, "memory_there", lambda device: (16 * GIB, 1 * GIB))
    assert "only 1.0 GiB are free now" in preflight.check_memory(SMOLLM2, "float32", [device()], **SHAPE)


@pytest.mark.parametrize("change, lower", [({"slots": 4096}, "generate.slots"), ({"batch": 4096}, "sft.batch")])
def test_memory_that_cannot_suffice_names_what_to_lower(monkeypatch, change, lower):
    monkeypatch.setattr(preflight, "memory_there", lambda device: (6 * GIB, 6 * GIB))
    with pytest.raises(UserError, match=f"6.0 GiB on this machine: that cannot suffice. Lower --config.{lower}"):
        preflight.check_memory(SMOLLM2, "float32", [device()], **{**SHAPE, **change})


def test_devices_of_one_cpu_share_its_memory_and_accelerators_have_their_own(monkeypatch):
    monkeypatch.setattr(preflight, "memory_there", lambda device: (8 * GIB, 8 * GIB))
    with pytest.raises(UserError, match="cannot suffice"):
        preflight.check_memory(SMOLLM2, "float32", [device()] * 8, **SHAPE)
    assert "on a device" in preflight.check_memory(SMOLLM2, "float32", [device("gpu")] * 8, **SHAPE)


def test_the_advice_to_share_out_parameters_helps(monkeypatch):
    monkeypatch.setattr(preflight, "memory_there", lambda device: (3 * GIB, 3 * GIB))
    wide, gpus = {**SHAPE, "slots": 16, "batch": 8}, [device("gpu")] * 8
    big = ModelConfig(vocab_size=49152, d_model=960, n_layers=32, n_heads=15, n_kv_heads=5, head_dim=64, d_ff=2560, tie_embeddings=True)
    with pytest.raises(UserError, match="mesh.data=1 --config.mesh.fsdp=-1"):
        preflight.check_memory(big, "bfloat16", gpus, **wide)
    assert preflight.check_memory(big, "bfloat16", gpus, **wide, fsdp=8)


def test_where_training_is_too_much_adapters_are_named_if_they_fit(monkeypatch):
    tight = {**SHAPE, "batch": 1, "slots": 2}
    monkeypatch.setattr(preflight, "memory_there", lambda device: (2 * GIB, 2 * GIB))
    with pytest.raises(UserError, match=r"train adapters in place of the weights \(--config.sft.lora.rank=16\)"):
        preflight.check_memory(SMOLLM2, "float32", [device()], **tight)
    assert preflight.check_memory(SMOLLM2, "float32", [device()], **tight, adapters=5_000_000)
    monkeypatch.setattr(preflight, "memory_there", lambda device: (GIB, GIB))
    with pytest.raises(UserError) as e:
        preflight.check_memory(SMOLLM2, "float32", [device()], **tight)
    assert "adapters" not in str(e.value)


def test_an_accelerator_tells_its_memory():
    stats = {"bytes_limit": 10 * GIB, "bytes_in_use": 4 * GIB}
    assert preflight.memory_there(device("gpu", memory_stats=lambda: stats)) == (10 * GIB, 6 * GIB)
    silent = device("tpu", memory_stats=lambda: None)
    assert preflight.memory_there(silent) == (0, 0)
    assert "could not be found out" in preflight.check_memory(SMOLLM2, "bfloat16", [silent], **SHAPE)


@pytest.mark.parametrize("line, limit", [
    ("0::/jobs/7", "jobs/memory.max"),                             # version 2: a group outside ours
    ("0::/", "memory.max"),                                        # version 2 inside a container
    ("4:memory:/jobs/7", "memory/jobs/7/memory.limit_in_bytes"),   # version 1
])
def test_the_limit_of_the_control_group_counts(tmp_path, monkeypatch, line, limit):
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / limit).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / limit).write_text("3000000\n")
    monkeypatch.setattr(preflight, "CONTROL_GROUPS", tmp_path)
    read = preflight.Path.read_text
    monkeypatch.setattr(preflight.Path, "read_text", lambda self, **kw: line if str(self) == "/proc/self/cgroup" else read(self, **kw))
    total, free = preflight.memory_there(device())
    assert total == 3_000_000 and free <= total
