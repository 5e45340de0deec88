"""model_card.md and dataset_card.md: where the model and the pairs come from, in the words a hub page needs."""
from __future__ import annotations

import collections
import html
from typing import Any, Sequence

from isara_jax import judge
from isara_jax.common import atomic_write
from isara_jax.config import to_dict
from isara_jax.data.pool import Record
from isara_jax.session import Session

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
    config, sft = session.config, to_dict(session.config.sft)
    seeds = "its seeds" if config.sensitive else session.seed_set.path
    lines = [f"# {_inert(session.blueprint.source.name)}, aligned with ISARA", "",
             f"Fine-tuned on {_inert(seeds)} and on pairs that the model itself generated from them. {NOT_CHECKED}", "",
             f"- starting model: {_inert(session.blueprint.source.name)} (content hash {session.resolved['model']}), "
             + ("already instruction-tuned" if session.blueprint.tokenizer.chat_template else "not instruction-tuned"),
             f"- form: {config.model.form}; dtype of compute: {session.dtype}; seed {config.seed}",
             f"- fine-tuning: {', '.join(f'{k} {v}' for k, v in sft.items())}", f"- stopped: {reason}", "",
             *_provenance(session.train_seeds), "",
             "| iteration | pairs in the pool | held-out loss (nats per answer token) |", "|---|---|---|",
             f"| 0 (starting model) | {len(session.train_seeds)} | {_loss(before)} |",
             *(f"| {h['iteration']} | {h['pool']} | {_loss(h)} |" for h in history), "",
             f"Held-out loss is measured on {len(session.held_out)} seeds that were never retrieved or trained on. It says how closely they "
             "are imitated, not whether answers are right.", "", *([judge.markdown(evaluation)] if evaluation else []),
             "The command is in `command.txt`, the whole config in `config.json`, versions in `versions.json`.", ""]
    return "\n".join(lines)


def _provenance(records: Sequence[Record]) -> list[str]:
    return [f"- {field} of the seeds: " + ", ".join(sorted({_inert(getattr(r, field)) for r in records if r.origin == "seed"}))
            for field in ("author", "source", "licence")]


def _loss(summary: dict[str, Any]) -> str:
    return "-" if summary["held_out"] is None else f"{summary['held_out']:.4f}"


def _inert(text: str) -> str:
    """Text from outside as one line of Markdown that is neither markup nor table."""
    return html.escape(" ".join(text.split())).replace("|", "\\|").replace("[", "\\[").replace("`", "\\`").replace("*", "\\*")
