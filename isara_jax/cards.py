"""model_card.md and dataset_card.md of a run, and README.md of an exported folder: where model and pairs come from, for a hub page."""
from __future__ import annotations

import collections
import html
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Sequence

from isara_jax import judge
from isara_jax.common import atomic_write
from isara_jax.config import Config, to_dict
from isara_jax.data.pool import Pool, Record
from isara_jax.models import published
from isara_jax.models.resolve import Source
from isara_jax.session import Session
from isara_jax.workdir import Workdir

NOT_CHECKED = "The generated answers are not fact-checked. Read them before you rely on them."


def write(session: Session, pool: Sequence[Record], before: dict[str, Any], history: Sequence[dict[str, Any]], reason: str,
          evaluation: dict[str, Any] | None) -> None:
    """Write both cards into the workdir; `evaluation` is what `judge` made."""
    root = session.workdir.root
    atomic_write(root / "dataset_card.md", dataset_card(session, pool, history))
    atomic_write(root / "model_card.md", model_card(session, before, history, reason, evaluation))


def dataset_card(session: Session, pool: Sequence[Record], history: Sequence[dict[str, Any]]) -> str:
    """The pool: counts, origin, funnel, licences."""
    counts = collections.Counter(r.origin for r in pool)
    lines = ["# Question-answer pairs", "",
             f"{counts['seed']} seed pairs and {counts['generated']} pairs that {_inert(session.blueprint.source.name)} wrote in context "
             f"from them (ISARA, arXiv 2401.06785). {NOT_CHECKED}", "", *_provenance(pool), "",
             "| iteration | requests | questions | pairs kept | yield |", "|---|---|---|---|---|"]
    for h in history:
        f = h["funnel"]
        lines.append(f"| {h['iteration']} | {f['requests']} | {f['questions']} | {h['kept']} | {h['kept'] / h['requests']:.0%} |")
    rejected = collections.Counter()
    for h in history:
        rejected.update(h["funnel"]["rejected"])
    lines += ["", "Rejected: " + (", ".join(f"{name} {n}" for name, n in rejected.most_common()) or "none") + ".", "",
              f"Files: `pool/` (JSON lines; every pair with its exemplars, prompt template {session.template.hash}, sampling parameters, "
              "the address of its randomness and each filter's verdict).", ""]
    return "\n".join(lines)


def model_card(session: Session, before: dict[str, Any], history: Sequence[dict[str, Any]], reason: str,
               evaluation: dict[str, Any] | None) -> str:
    """The tuned model: base, data, settings, held-out loss, the table of all arms and the verdict."""
    config = session.config
    seeds = "its seeds" if config.sensitive else session.seed_set.path
    lines = [f"# {_inert(session.blueprint.source.name)}, aligned with ISARA", "",
             f"Fine-tuned on {_inert(seeds)} and on pairs that the model itself generated from them. {NOT_CHECKED}", "",
             f"- starting model: {_inert(session.blueprint.source.name)} (content hash {session.resolved['model']}), "
             + ("already instruction-tuned" if session.blueprint.tokenizer.chat_template else "not instruction-tuned"),
             f"- form: {config.model.form}; dtype of compute: {session.dtype}; seed {config.seed}",
             f"- fine-tuning: {_fine_tuning(config)}", f"- stopped: {reason}", "",
             *_provenance(session.train_seeds), "",
             "| iteration | pairs in the pool | held-out loss (nats per answer token) |", "|---|---|---|",
             f"| 0 (starting model) | {len(session.train_seeds)} | {_loss(before)} |",
             *(f"| {h['iteration']} | {h['pool']} | {_loss(h)} |" for h in history), "",
             f"Held-out loss is measured on {len(session.held_out)} seeds that were never retrieved or trained on. It says how closely "
             "they are imitated, not whether answers are right.", "", *([judge.markdown(evaluation)] if evaluation else []),
             "The command is in `command.txt`, the whole config in `config.json`, versions in `versions.json`.", ""]
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------------- an exported model
# Of the models that have another name here: their id on the hub. The hub's own words for licences are those it lists.
HUB_IDS = {"smollm2-135m-instruct": "HuggingFaceTB/SmolLM2-135M-Instruct"}
HUB_LICENCES = ("apache-2.0", "mit", "bsd-3-clause", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc0-1.0", "openrail", "llama2", "llama3",
                "llama3.1", "llama3.2", "llama3.3", "gemma")


@dataclass(frozen=True)
class Exported:
    """What the card of an exported folder tells.

    Attributes:
        name: of the folder.
        source: the starting model, or the one that was converted.
        licence: its licence, "" where its files do not say.
        workdir, iteration: the run and which of its iterations; None for a conversion.
        form: how it is asked: the lines of the section on prompts.
        stored: tensors, bytes and dtypes, in words.
        command: the line that exported it.
    """

    name: str
    source: Source
    licence: str
    workdir: Workdir | None
    iteration: int | None
    form: Sequence[str]
    stored: str
    command: str


def hub_card(exported: Exported, config: Config | None) -> str:
    """README.md of an exported folder: YAML that the hub reads, and the same facts for people. `config` is the run's."""
    from huggingface_hub import ModelCardData

    named, licence = exported.source.name, exported.licence.casefold()
    hub, short = _hub_id(named), licence if licence in HUB_LICENCES else None
    data = ModelCardData(base_model=hub, license=short or ("other" if licence else None),
                         license_name=None if short or not licence else re.sub(r"[^a-z0-9.]+", "-", licence).strip("-"),
                         library_name="transformers", pipeline_tag="text-generation", tags=["isara_jax"] + (["isara"] if config else []),
                         **({"base_model_relation": "finetune"} if hub and config else {}))
    body = _of_run(exported, config) if config else [
        f"The weights of {_inert(named)} as a Hugging Face folder, written by isara_jax. Nothing was trained.", ""]
    licences = [f"- model: {_inert(exported.licence) or 'not stated in its files; see where it comes from'}"]
    if config:
        pool = Pool(exported.workdir.pool).snapshot(exported.iteration)
        for origin, what in (("seed", "seed pairs"), ("generated", "generated pairs")):
            found = sorted({_inert(r.licence) or "not stated" for r in pool if r.origin == origin})
            licences += [f"- {what}: {', '.join(found)}"] if found else []
    lines = ["---", data.to_yaml().rstrip(), "---", "", f"# {_inert(exported.name)}", "", *body, "## How to ask it", "", *exported.form, "",
             "## Licences", "", *licences, "", "## Files", "", f"- {exported.stored}",
             f"- starting model: {_inert(named)} (content hash {exported.source.content_hash()})" if config else
             f"- converted from {_inert(named)} (content hash {exported.source.content_hash()})", "", "## Commands", "", "```",
             *_commands(exported, quiet=bool(config and config.sensitive)), "```", ""]
    return "\n".join(lines)


def _hub_id(name: str) -> str | None:
    """The id on the hub of a model, None for one that may not be there."""
    known = published.find(name)
    there = re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not Path(name).exists()
    return HUB_IDS.get(name) or (known.hub if known else name if there else None)


def _of_run(exported: Exported, config: Config) -> list[str]:
    """The sections on data, training and evaluation, from the workdir's files."""
    last = exported.iteration
    pool = Pool(exported.workdir.pool).snapshot(last)
    seeds = "its seeds" if config.sensitive else config.data.seeds
    history = [found for t in range(last + 1) if (found := _object(exported.workdir.iteration(t) / "DONE"))]
    lines = [f"{_inert(exported.source.name)}, fine-tuned with ISARA (arXiv 2401.06785): on {_inert(seeds)} and on pairs that the model "
             f"itself generated from them. This is iteration {last} of the run. {NOT_CHECKED}", "", "## Data", "",
             "| iteration | origin | pairs | requests |", "|---|---|---|---|"]
    for t in range(last + 1):
        counts = collections.Counter(r.origin for r in pool if r.iteration == t)
        requests = next((h["requests"] for h in history if h["iteration"] == t and t), "-")
        lines += [f"| {t} | {origin} | {n} | {requests} |" for origin, n in sorted(counts.items())]
    lines += [f"| all | | {len(pool)} | |", "", *_provenance(pool), "", "## Training", "",
              f"- form: {config.model.form}; dtype of compute: {config.model.dtype}; seed {config.seed}", f"- fine-tuning: {_fine_tuning(config)}",
              *(f"- held-out loss, iteration {h['iteration']}{'' if h['iteration'] else ' (starting model)'}: {_loss(h)} nats per answer "
                "token" for h in history), "", "## Evaluation", ""]
    found = [made for split in ("test", "dev") if (made := _object(exported.workdir.evaluation / split / "results.json"))]
    for made in found[:1]:
        judged = made.get("iteration")
        other = "" if judged == last else f"The judged model is iteration {judged}; this is iteration {last}. "
        lines += [f"{other}Every value with its 95 % interval over rows.", "", judge.markdown(made)]
    return lines if found else [*lines, "Nothing judged this run.", ""]


def _commands(exported: Exported, quiet: bool) -> list[str]:
    """The last line that started the run (not of a `quiet` one, whose seeds stay unnamed), and the one that exported it."""
    started = exported.workdir.root / "command.txt" if exported.workdir and not quiet else None
    lines = started.read_text(encoding="utf-8").strip().splitlines()[-1:] if started and started.is_file() else []
    return [" ".join(line.replace("`", "'").split("\n")) for line in (*lines, exported.command)]


def _object(path: Path) -> dict[str, Any]:
    """The JSON object of a file, {} where there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


# ---------------------------------------------------------------------------------------------------------------------- pieces
def _fine_tuning(config: Config) -> str:
    """The settings of the fine-tuning in words; those that are switched off are left out."""
    settings = {k: v for k, v in to_dict(config.sft).items() if k not in ("rates", "lora") or k == "rates" and v}
    adapters = f", adapters ({', '.join(f'{k} {v}' for k, v in to_dict(config.sft.lora).items())})" if config.sft.lora.rank else ""
    return ", ".join(f"{k} {v}" for k, v in settings.items()) + adapters


def _provenance(records: Sequence[Record]) -> list[str]:
    return [f"- {field} of the seeds: " + ", ".join(sorted({_inert(getattr(r, field)) for r in records if r.origin == "seed"}))
            for field in ("author", "source", "licence")]


def _loss(summary: dict[str, Any]) -> str:
    return "-" if summary["held_out"] is None else f"{summary['held_out']:.4f}"


def _inert(text: str) -> str:
    """Text from outside as one line of Markdown that is neither markup nor table."""
    return html.escape(" ".join(text.split())).replace("|", "\\|").replace("[", "\\[").replace("`", "\\`").replace("*", "\\*")
