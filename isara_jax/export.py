"""Write a model as a Hugging Face folder, verified: what a run trained, or any model that can be loaded.

    python -m isara_jax.export --workdir=runs/first --out=runs/first/export           # a run's last iteration, in the form it trained
    python -m isara_jax.export --model=smollm2-135m-instruct --out=smollm2            # a GGUF file, or a folder, converted
    python -m isara_jax.export --model=downloads/opt-350m --from_bin --out=opt-350m   # a folder that ships pytorch_model.bin alone

The folder is written beside OUT under a hidden name and renamed once it is whole and verified: every byte of every tensor is compared, the
folder is loaded again, and its logits are those of the model it was made from. Exit status: 0, or 2 with one message.
"""
from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Iterator, Sequence

import jax
import numpy as np

from isara_jax import cards, new_folder, preflight, publish, trained
from isara_jax import lm as lm_lib
from isara_jax.checkpoint import Checkpoints
from isara_jax.common import UserError, atomic_write
from isara_jax.config import Config
from isara_jax.data import chat_templates, tokenizer_files
from isara_jax.data.prompts import Template
from isara_jax.data.tokenizer import NoTokenizer
from isara_jax.decode.engine import EngineConfig
from isara_jax.lm import LM, Blueprint
from isara_jax.models import decoder, from_bin, save
from isara_jax.models.resolve import Source
from isara_jax.session import make_template
from isara_jax.sharding import make_mesh, param_shardings
from isara_jax.workdir import Workdir

SHARD = "5GB"
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
LEGAL = ("license", "licence", "notice", "use_policy")   # how files begin that go with a model
# What is compared: logits at every position of these texts, or of as many token ids where there is no tokenizer.
TEXTS = ("The three largest oceans of the world are", "Q: Why do cats purr?\nA: Nobody knows for sure.",
         "1, 2, 3, 5, 8, 13, 21,  34\n\n\t(ü, 大きさ, 😀)")
LONGEST = 64             # tokens of such a text
ROUNDING = 16            # logits may move by so many units of roundoff times the root of the depth, relative to their spread


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, export, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m isara_jax.export", description="Write a model as a verified Hugging Face folder.",
                                     allow_abbrev=False)
    parser.add_argument("--workdir", metavar="DIR", help="the workdir of a run: what it trained")
    parser.add_argument("--iteration", metavar="T", help="of --workdir: last (default), best (lowest held-out loss) or a number")
    parser.add_argument("--model", metavar="MODEL", help="a folder, a .gguf file, a name or a hub id, to be converted")
    parser.add_argument("--from_bin", action="store_true", help="--model is a folder that ships pytorch_model.bin alone (needs torch)")
    parser.add_argument("--adapter", metavar="FOLDER", help="a LoRA adapter in PEFT's format, merged into --model")
    parser.add_argument("--out", metavar="FOLDER", help="the folder to be written: new, or empty")
    parser.add_argument("--dtype", choices=tuple(save.STORED), help="of all tensors; left out, each keeps the dtype it is stored in")
    parser.add_argument("--shard_size", metavar="SIZE", default=SHARD, help=f"most bytes of a weight file, as in 500MB (default {SHARD})")
    parser.add_argument("--push", metavar="OWNER/NAME", help="upload the folder to this repository of the hub (private, where it is new)")
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what is half written is removed
    command = "python -m isara_jax.export " + shlex.join(sys.argv[1:] if argv is None else argv)
    try:
        made = export(args.out, workdir=args.workdir, iteration=args.iteration, model=args.model, bins=args.from_bin,
                      adapter=args.adapter,
                      dtype=args.dtype or "", shard_size=args.shard_size, repository=args.push, command=command)
        for line in made.next:
            print(line)
    except UserError as e:
        print(f"isara_jax.export: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\ninterrupted: {args.out} was not written", file=sys.stderr)
        return 130
    return 0


@dataclass(frozen=True)
class Made:
    """What an export wrote: the folder, numbers of tensors and bytes, how far logits moved by rounding, and lines on what to do with it."""

    folder: Path
    tensors: int
    nbytes: int
    rounding: float
    next: tuple[str, ...]


def export(out: str | Path | None, *, workdir: str | Path | None = None, iteration: str | None = None, model: str | None = None,
           bins: bool = False, adapter: str | Path | None = None, dtype: str = "", shard_size: str = SHARD, repository: str | None = None, command: str = "",
           say: Callable[[str], None] = print) -> Made:
    """Write an iteration of `workdir`, or `model`, into the folder `out`, and push it where a repository is named.

    The arguments are the flags of the command line; `bins` is --from_bin, `repository` --push, and `command` is what the card quotes.

    Raises `UserError`, before weights are read where it can be known then, and leaves no folder that looks whole.
    """
    if bool(workdir) == bool(model):
        raise UserError("name what to export: either --workdir=DIR, the folder of a run, or --model=MODEL, a folder, file, name or hub id.")
    if not out:
        raise UserError("--out is missing: name the folder to be written, for example --out=exported.")
    if iteration and not workdir:
        raise UserError(f"--iteration={iteration} is one of a run, and no --workdir is named.")
    if adapter and not model:
        raise UserError(f"--adapter={adapter} is merged into a model, and no --model is named. What a run trained is merged already.")
    if bins and not model:
        raise UserError("--from_bin converts the folder that --model names, and none is named.")
    most, out = _bytes(shard_size), Path(os.path.abspath(Path(out).expanduser()))
    new_folder.check(out)
    if repository:
        say(f"to be pushed to {repository} as {publish.check(repository)}")
    with contextlib.ExitStack() as stack:
        if bins:
            held = stack.enter_context(_converted(Path(model).expanduser(), out, say))
            job = _of_model(str(held), model, adapter)
        else:
            job = _of_run(str(workdir), iteration) if workdir else _of_model(model, model, adapter)
        made = _write(job, out, dtype, most, command, say)
    if repository:
        say(f"pushed: {publish.push(out, repository)}")
    return made


# ------------------------------------------------------------------------------------------------------------------ what is exported
@dataclass(frozen=True)
class Job:
    """A model to be exported, before its weights are read.

    Attributes:
        source: whose files it is made of, under the name people know.
        config, workdir, iteration: of a run; None where a model is converted.
        template: the form that a run trained; None where a model is converted.
        adapter: the folder of a LoRA adapter to be merged; None where there is none.
    """

    source: Source
    blueprint: Blueprint
    config: Config | None = None
    workdir: Workdir | None = None
    iteration: int | None = None
    template: Template | None = None
    adapter: str | Path | None = None

    @property
    def said(self) -> str:
        """The model in words."""
        if self.workdir:
            return f"iteration {self.iteration} of {self.workdir.root}"
        return f"{self.source.name} with the adapter {self.adapter}" if self.adapter else self.source.name


def _of_model(name: str, shown: str, adapter: str | Path | None = None) -> Job:
    if trained.run_folder(str(Path(name).expanduser())):
        raise UserError(f"--model={name} is the workdir of a run: name it as --workdir={name}.")
    blueprint = lm_lib.describe(name)
    return Job(Source(blueprint.source.kind, blueprint.source.path, shown), blueprint, adapter=adapter)


def _of_run(name: str, asked: str | None) -> Job:
    workdir = trained.run_at(name)
    if workdir is None:
        raise UserError(f"--workdir={name} is not the workdir of a run: it has no config.json that a run wrote. A model's own folder is "
                        "named as --model.")
    if not workdir.checkpoints.is_dir():
        raise UserError(f"{workdir.root} holds no parameters: no iteration of this run was finished. Continue it first.")
    iteration = _iteration(workdir, asked or "last")
    config = trained.config_of(workdir)
    blueprint = lm_lib.describe(config.model.name, context=config.model.context)
    started, now = workdir.stored()["identity"]["resolved"]["model"], blueprint.source.content_hash()
    if started != now:
        raise UserError(f"{config.model.name} is not what {workdir.root} started from: its content hash is {now}, and was {started}. Put "
                        "the files of then in their place.")
    return Job(blueprint.source, blueprint, config, workdir, iteration, make_template(config, blueprint))


def _iteration(workdir: Workdir, asked: str) -> int:
    """The iteration that --iteration names. Looks at files alone: Orbax, once opened, does not let a command end at once."""
    root = workdir.checkpoints
    there = sorted(int(f.name) for f in root.iterdir() if f.name.isdecimal() and (f / "params" / "_METADATA").exists())
    if not there:
        raise UserError(f"{workdir.root} holds no parameters: no iteration of this run was finished. Continue it first.")
    if asked == "last":
        return there[-1]
    if asked == "best":
        losses = json.loads((root / "held_out.json").read_text(encoding="utf-8")) if (root / "held_out.json").exists() else {}
        measured = [(losses[str(i)], i) for i in there if losses.get(str(i)) is not None]
        if not measured:
            raise UserError(f"--iteration=best: {workdir.root} measured no held-out loss. Take last, or a number ({_listed(there)}).")
        return min(measured)[1]
    if not asked.isdecimal() or int(asked) not in there:
        hint = " The starting model is exported with --model." if asked == "0" else ""
        raise UserError(f"--iteration={asked} is not here: take last, best, or one of {_listed(there)}.{hint}")
    return int(asked)


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


@contextlib.contextmanager
def _converted(folder: Path, out: Path, say: Callable[[str], None]) -> Iterator[Path]:
    """The folder with its pickled weights as safetensors, for as long as the block lasts."""
    files = from_bin.bin_files(folder)
    new_folder.check_room(out, sum(file.stat().st_size for file in files) * 2)
    with new_folder.hidden(out, "bin") as held:
        say(f"{from_bin.convert(folder, held)} tensors read from {', '.join(f.name for f in files)} by torch, in a process of its own")
        yield held


# ----------------------------------------------------------------------------------------------------------------------- the folder
def _write(job: Job, out: Path, dtype: str, shard_size: int, command: str, say: Callable[[str], None]) -> Made:
    blueprint = job.blueprint
    plan = save.layout(blueprint.source, blueprint.cfg, blueprint.context, dtype)
    new_folder.check_room(out, plan.nbytes)
    say(f"{job.said}: {len(plan.dtypes)} tensors, {plan.nbytes:,} bytes in {_dtypes(plan)}")
    for note in (*plan.notes, *_dtype_notes(job, plan, dtype)):
        say(f"note: {note}")
    lm = _load(job, plan)
    rows = _rows(blueprint)
    exact = jax.tree.leaves(lm.params)[0].dtype == save.widest(plan)
    before = None if exact else lm.logits(rows)
    lm = lm.with_params(save.cast(lm.params, plan))
    wanted = lm.logits(rows)
    rounding = _moved(before, wanted, plan) if before else 0.0
    with new_folder.hidden(out, "tmp") as folder:
        template, differs = _template(job)
        for line in differs:
            say(f"note: as transformers encodes it, the chat template renders {line}")
        files = save.write_tensors(folder, lm.params, plan, shard_size)
        tokenizer_files.write(folder, blueprint.tokenizer, _folder(blueprint.source), template, blueprint.context)
        _legal(folder, blueprint.source)
        ends = save.generation_config(blueprint.source, plan.raw, sorted(blueprint.tokenizer.stop_ids), blueprint.tokenizer.eos_id)
        atomic_write(folder / "generation_config.json", json.dumps(ends, indent=2) + "\n")
        atomic_write(folder / "README.md", _card(job, out, plan, template, command))
        atomic_write(folder / "config.json", json.dumps(plan.raw, indent=2) + "\n")  # last: without it the folder is no model
        save.check_tensors(folder, lm.params, plan)
        values = sum(x.size for x in wanted)
        compute, lm = lm.dtype, None  # its memory, before the copy is loaded
        _check_again(folder, job, template, plan, rows, wanted, compute)
        new_folder.appear(folder, out)
    moved = f"; they moved by {rounding:.1%} of their spread when the weights were rounded to {_dtypes(plan)}" if rounding else ""
    say(f"verified: all bytes of all tensors as they were to be written, and {values:,} logits of the folder loaded again equal bit for "
        f"bit to those of the model{moved}")
    say(f"written: {out} ({', '.join(files) if len(files) < 4 else f'{len(files)} weight files'})")
    return Made(out, len(plan.dtypes), plan.nbytes, rounding, _next(out, plan, job))


def _load(job: Job, plan: save.Layout) -> LM:
    """The model with its weights as exactly as they are stored: a run's in float32, as it trained them."""
    preflight.compilation_cache()
    blueprint = job.blueprint
    if job.workdir is None:
        held = save.held(blueprint.source)
        compute = held if held == save.widest(plan) == "bfloat16" else "float32"
        return lm_lib.load(blueprint.source.name, compute, blueprint=blueprint, weights=held, adapter=job.adapter or "")
    mesh, abstract = make_mesh(), decoder.abstract_params(blueprint.cfg)
    like = jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, "float32", sharding=place), abstract,
                        param_shardings(abstract, mesh))
    params = Checkpoints(job.workdir.checkpoints).restore(job.iteration, like)
    return LM(params, blueprint, "float32", mesh, EngineConfig(dtype="float32"))


def _rows(blueprint: Blueprint) -> list[list[int]]:
    """Token ids whose logits are compared."""
    most = min(LONGEST, blueprint.context)
    if isinstance(blueprint.tokenizer, NoTokenizer):
        return [[(i * i * 31 + 7 * i + k) % blueprint.cfg.vocab_size for i in range(most)] for k in range(len(TEXTS))]
    return [blueprint.tokenizer.encode(text, bos=True)[:most] for text in TEXTS]


def _moved(before: Sequence[np.ndarray], after: Sequence[np.ndarray], plan: save.Layout) -> float:
    """How far logits moved by rounding the weights, relative to their spread. Raises `UserError` where it is more than rounding does."""
    a, b = (np.concatenate(rows).astype(np.float64) for rows in (before, after))
    moved = float(np.sqrt(np.mean((a - b) ** 2)) / max(float(a.std()), 1e-30))
    most = ROUNDING * save.roundoff(plan) * (plan.cfg.n_layers + 1) ** 0.5
    if not moved <= most:
        raise UserError(f"rounded to {_dtypes(plan)}, the weights give logits that differ by {moved:.0%} of their spread from the model's, "
                        f"more than rounding should make of it ({most:.0%}). Keep them exact with --dtype=float32.")
    return moved


def _check_again(folder: Path, job: Job, template: str | None, plan: save.Layout, rows: list[list[int]], wanted: list[np.ndarray],
                 compute: str) -> None:
    """Load what was written as anybody would, and compare config, tokenizer, template and logits with the model that was exported."""
    blueprint, again = job.blueprint, lm_lib.describe(str(folder))
    ours, theirs = blueprint.tokenizer, again.tokenizer
    unlike = [what for what, same in (
        ("the mathematics in config.json", again.cfg == blueprint.cfg), ("the ids that end a text", theirs.stop_ids == ours.stop_ids),
        ("the chat template", theirs.chat_template == template)) if not same]
    if not isinstance(ours, NoTokenizer) and any(theirs.encode(text, bos=True) != ours.encode(text, bos=True) for text in TEXTS):
        unlike.append("the token ids of a text")
    if not unlike:
        made = lm_lib.load(str(folder), compute, blueprint=again, weights=save.widest(plan)).logits(rows)
        if any(a.tobytes() != b.tobytes() for a, b in zip(made, wanted, strict=True)):
            largest = max(float(np.abs(a - b).max()) for a, b in zip(made, wanted))
            unlike.append(f"logits, by up to {largest:g}")
    if unlike:
        raise UserError(f"the folder, loaded again, is not the model that was exported: other are {' and '.join(unlike)}. Nothing was "
                        "written; please report this with the model's config.json.")


def _dtypes(plan: save.Layout) -> str:
    return " and ".join(sorted({save.NAMES[kind] for kind in plan.dtypes.values()}))


def _dtype_notes(job: Job, plan: save.Layout, dtype: str) -> list[str]:
    """What is to be said where a dtype could not be kept."""
    source = job.blueprint.source
    if dtype or source.kind == "hf" and "F64" not in save.stored_kinds(source):
        return []
    stored = {"gguf": "a GGUF file stores blocks", "tiny": "the tiny model has no files", "hf": "float64 is read as float32"}[source.kind]
    return [f"{stored}: written as {_dtypes(plan)}; --dtype=bfloat16 takes half the room"]


# ------------------------------------------------------------------------------------------------------------------ the other files
def _template(job: Job) -> tuple[str | None, list[str]]:
    """(the chat template to be written, what it renders otherwise than the run's form). A converted model keeps its own."""
    if job.template is None:
        return job.blueprint.tokenizer.chat_template, []
    return chat_templates.of_form(job.template, job.blueprint.tokenizer)


def _folder(source: Source) -> Path | None:
    return source.path if source.kind == "hf" else None


def _legal(folder: Path, source: Source) -> None:
    """Copy the licence that lies beside the model; beside a .gguf file only where it has its folder for itself."""
    beside = source.path if source.kind == "hf" else source.path.parent if source.kind == "gguf" else None
    if beside is None or source.kind == "gguf" and len(list(beside.glob("*.gguf"))) > 1:
        return
    for file in sorted(beside.iterdir()):
        if file.is_file() and file.name.casefold().startswith(LEGAL):
            shutil.copyfile(file, folder / file.name)


def _card(job: Job, out: Path, plan: save.Layout, template: str | None, command: str) -> str:
    stored = f"{len(plan.dtypes)} tensors, {plan.nbytes:,} bytes, {_dtypes(plan)}"
    return cards.hub_card(cards.Exported(out.name, job.source, save.licence(job.blueprint.source), job.workdir, job.iteration,
                                         _how_to_ask(job, out, template), stored, command), job.config)


def _how_to_ask(job: Job, out: Path, template: str | None) -> list[str]:
    """The section on prompts of the card."""
    if isinstance(job.blueprint.tokenizer, NoTokenizer):
        return ["The model has no tokenizer: it takes and gives token ids."]
    if template is None:
        return ["It has no chat template: a text is continued as it stands."]
    lines = ["With the chat template of the folder (`tokenizer.apply_chat_template`, vLLM, `llama-server --jinja`)"]
    if job.template is None:
        return [lines[0] + ", which is the model's own."]
    shown = "".join(text for text, _ in job.template.training_segments("Why do cats purr?"))
    lines[0] += ", which renders exactly the form that was trained. A prompt, as raw text:"
    lines += ["", "````", shown, "````", ""]
    stops = job.template.stops("answer")
    lines.append("The answer ends with the EOS token. " + (
        f"Some end where a next question would begin: stop at `{json.dumps(stops[0], ensure_ascii=False)}` too. A system message is "
        "refused: nothing was trained with one." if stops else
        "Where a chat has no system message, an empty one stands there, as in training."))
    return lines


def _next(out: Path, plan: save.Layout, job: Job) -> tuple[str, ...]:
    """Command lines for other programs."""
    if isinstance(job.blueprint.tokenizer, NoTokenizer):
        return ("without a tokenizer it is for programs that take token ids: transformers, or vLLM with --skip-tokenizer-init",)
    folder, kind = shlex.quote(str(out)), plan.raw["dtype"]
    short = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}[kind]
    return (f"vLLM:      vllm serve {folder} --dtype {kind} --max-model-len {job.blueprint.context}",
            f"llama.cpp: python convert_hf_to_gguf.py {folder} --outtype {short} --outfile {shlex.quote(f'{out}.gguf')}")


def _bytes(size: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]B)", size.strip().upper())
    if not found or float(found[1]) <= 0:
        raise UserError(f"--shard_size={size}: give a number with KB, MB, GB or TB (powers of 1000), for example --shard_size=2GB.")
    return max(1, int(float(found[1]) * UNITS[found[2]]))


if __name__ == "__main__":
    sys.exit(main())
