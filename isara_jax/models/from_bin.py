"""pytorch_model.bin to safetensors: the one place where a pickle is opened, in a process of its own, and by torch's weights_only reader.

That reader builds tensors and nothing else; torch before 2.6 had a hole in it (CVE-2025-32434) and is refused. Tensors are mapped, so a
checkpoint is never in memory as a whole. Keys stay as they are; tensors that share memory (tied embeddings) are kept once, under the first
of their names.

    python -m isara_jax.models.from_bin FOLDER OUT     what `convert` starts; prints one JSON object
"""
from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Iterator

from isara_jax.common import UserError
from isara_jax.models import tensors
from isara_jax.models.resolve import read_json

SINGLE, INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
INSTALL = "pip install torch --index-url https://download.pytorch.org/whl/cpu"
OLDEST = (2, 6)
BESIDE = (".json", ".txt", ".jinja", ".model")  # endings of the other files of a model folder, and LICENSE


def convert(folder: Path, out: Path) -> int:
    """Write the tensors of FOLDER's pytorch_model.bin as safetensors into `out`, an empty folder, with the other files of the model.

    Returns the number of tensors. Raises `UserError` without torch, and for files that are damaged or hold something else than tensors.
    """
    files = bin_files(folder)
    for file in folder.iterdir():
        if file.is_file() and file.name != INDEX and (file.suffix in BESIDE or file.name.startswith("LICENSE")):
            shutil.copyfile(file, out / file.name)
    done = subprocess.run([sys.executable, "-m", __name__, str(folder), str(out)], capture_output=True, text=True)
    try:
        said = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        last = (done.stderr.strip().splitlines() or ["nothing"])[-1][:300]
        raise UserError(f"{folder / files[0].name} could not be converted: the process ended with status {done.returncode} "
                        f"(-9: the system stopped it, mostly for want of memory) and said: {last}") from None
    if "error" in said:
        raise UserError(said["error"])
    return said["tensors"]


def bin_files(folder: Path) -> list[Path]:
    """pytorch_model.bin, or the shards that its index names. Raises `UserError` where there are none, or one is missing or elsewhere."""
    if not folder.is_dir():
        raise UserError(f"--from_bin converts a folder, and {folder} is none: name the folder with config.json and {SINGLE} (of a model of "
                        "the hub: `hf download OWNER/NAME` prints it).")
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if not (folder / INDEX).is_file():
        raise UserError(f"{folder} holds neither {SINGLE} nor {INDEX}: there is nothing to convert.")
    named = read_json(folder / INDEX).get("weight_map")
    names = sorted(set(map(str, named.values()))) if isinstance(named, dict) else []
    if not names:
        raise UserError(f"{folder / INDEX} names no files. The folder is damaged; get it again.")
    for name in names:
        if Path(name).name != name or not name.endswith(".bin"):
            raise UserError(f"{folder / INDEX} names {name!r}, which is not a .bin file of this folder; it is not read.")
        if not (folder / name).is_file():
            raise UserError(f"{folder / INDEX} names {name}, which is not in {folder}. The download is unfinished; get it again.")
    return [folder / name for name in names]


# ----------------------------------------------------------------------------------------------------------- in the other process
def main(folder: Path, out: Path) -> dict[str, Any]:
    """Convert; returns what `convert` reads: {"tensors": number} or {"error": message}."""
    try:
        import torch
    except ImportError:
        return {"error": f"--from_bin needs torch, which is not installed in this Python: {INSTALL}. It is used for this conversion alone."}
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < OLDEST:
        return {"error": f"--from_bin needs torch {'.'.join(map(str, OLDEST))} or later, whose reader of weights is safe; this is "
                         f"{torch.__version__}: {INSTALL}"}
    names = {getattr(torch, attribute): name for attribute, name in (
        ("float64", "F64"), ("float32", "F32"), ("float16", "F16"), ("bfloat16", "BF16"), ("int64", "I64"), ("int32", "I32"),
        ("int16", "I16"), ("int8", "I8"), ("uint8", "U8"), ("bool", "BOOL"))}
    untied = _says_untied(folder)
    files, kept, weight_map, seen = bin_files(folder), 0, {}, {}
    for number, file in enumerate(files, 1):
        state = _read(torch, file)
        if "error" in state:
            return state
        tensors_here = []
        for key, value in state["tensors"].items():
            if value.dtype not in names or value.is_quantized or value.layout != torch.strided:
                return {"error": f"{file}: {key} is of a kind that is no plain tensor of numbers ({value.dtype}, {value.layout})."}
            place = (number, value.untyped_storage().data_ptr(), value.storage_offset(), tuple(value.shape), value.stride(), value.dtype)
            if value.numel() and not untied and seen.setdefault(place, key) != key:
                continue  # shares its memory with a tensor that is kept
            tensors_here.append((key, names[value.dtype], tuple(value.shape), _rows(torch, value)))
        name = tensors.SINGLE if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        tensors.write_file(out / name, tensors_here)
        weight_map |= {key: name for key, *_ in tensors_here}
        kept += len(tensors_here)
        del state, tensors_here
    if len(files) > 1:
        (out / tensors.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}, indent=1) + "\n", encoding="utf-8")
    return {"tensors": kept}


def _read(torch: Any, file: Path) -> dict[str, Any]:
    """{"tensors": name -> tensor} of one file, mapped where its format allows it (torch's since 1.6), or {"error": message}."""
    try:
        try:
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as e:
            if "mmap can only be used" not in str(e):
                raise
            state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as e:  # torch raises many types for what it cannot or will not read
        first = (str(e).strip().splitlines() or [type(e).__name__])[0][:300]
        return {"error": f"{file} ({file.stat().st_size:,} bytes) cannot be read by torch's weights_only reader: {first} It may be "
                         "cut short, or hold something else than weights, which is never loaded."}
    table = isinstance(state, dict) and bool(state)
    others = [str(k)[:60] for k, v in state.items() if not isinstance(v, torch.Tensor) or not isinstance(k, str)] if table else []
    if not table or others:
        return {"error": f"{file} is no table of tensors by name (it holds {', '.join(others[:3]) or type(state).__name__}): it is a "
                         "checkpoint of another kind than a model's weights."}
    return {"tensors": {k: v.detach() for k, v in state.items()}}


def _rows(torch: Any, value: Any) -> Iterator[Any]:
    """A tensor's values, some rows at a time, as numpy arrays of its dtype."""
    dtype = {torch.bfloat16: tensors.DTYPES["BF16"]}.get(value.dtype)
    flat = value.reshape(1) if value.ndim == 0 else value
    step = max(1, tensors.BLOCK // max(1, flat[:1].numel() * flat.element_size()))
    for row in range(0, len(flat), step):
        part = flat[row:row + step].contiguous()
        yield part.view(torch.int16).numpy().view(dtype) if dtype is not None else part.numpy()


def _says_untied(folder: Path) -> bool:
    """Whether config.json says that the vocabulary head is not the embedding; then both are kept, though they share memory."""
    return (folder / "config.json").is_file() and read_json(folder / "config.json").get("tie_word_embeddings") is False


if __name__ == "__main__":
    try:
        made = main(Path(sys.argv[1]), Path(sys.argv[2]))
    except UserError as error:
        made = {"error": str(error)}
    except OSError as error:
        made = {"error": f"the converted weights could not be written in {sys.argv[2]}: {error.strerror or error}"}
    print(json.dumps(made))
