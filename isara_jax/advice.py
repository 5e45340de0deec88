"""What to do next, by what came out of a run. Reads the workdir's files alone and imports no jax: the end of a run and its page say the same."""
from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FEW_SEEDS = 24        # under so many, more seeds are worth more than anything else here
LOW_YIELD = 0.25      # a last iteration that kept a smaller share of its requests has little more to give
FALLING = 0.01        # nats per token by which the last iteration must have lowered the held-out loss for one more to be worth trying


@dataclass(frozen=True)
class Advice:
    """One step: a sentence with its reason, and the command that does it ("" where there is none)."""

    text: str
    command: str


def advise(workdir: Path) -> list[Advice]:
    """The steps worth taking after a run, the most worthwhile first; of an unfinished run, the one that continues it."""
    root = Path(workdir)
    config = _json(root / "config.json").get("config")
    if config is None:
        return [Advice("nothing was started here yet", "")]
    if (root / "review.csv").exists():
        return [Advice(f"read {root / 'review.csv'}: write no beside the pairs that you do not want, mend what can be mended, save it as CSV, "
                       "and run the same command", _command(root))]
    results = _results(root)
    history = _history(root)
    if not results and len(history) < 2:
        return [Advice("the run is not finished: the same command continues it", _command(root))]
    steps = _after_verdict(root, config, results) if results else _unjudged(root, config)
    return steps + _more(root, config, history)


# --------------------------------------------------------------------------------------------------------------------- by outcome
def _after_verdict(root: Path, config: dict[str, Any], results: dict[str, Any]) -> list[Advice]:
    against = {c["baseline"]: c for c in results["verdict"]["comparisons"]}
    better = results["verdict"]["better"]
    gain = lambda name: better * against[name]["difference"] > 0
    told = lambda name: name in against and not against[name]["said"].startswith("not distinguishable")
    shown, model = _shown(root), config["model"]["name"]
    chat = f"python -m isara_jax.chat --model={shown}" + ("/all" if config["data"].get("folds") else "")
    pool = shlex.quote(config["data"]["seeds"]) if config["data"].get("folds") else shown  # no fold has every pair
    icl = f"python -m isara_jax.chat --model={shlex.quote(model)} --icl_knn={pool}"
    steps: list[Advice] = []
    if told("base") and not gain("base"):
        steps.append(Advice("the tuned model is worse than the starting one: do not use it", f"python -m isara_jax.chat --model={shlex.quote(model)}"))
    if "icl_knn" in against and not (told("icl_knn") and gain("icl_knn")):
        how = "better and" if told("icl_knn") else "as good, as far as these rows show, and"
        steps.append(Advice(f"ICL-kNN, the nearest seeds in the prompt of the untrained model, is {how} needs no training: use it instead of the tuned one", icl))
    if told("base") and gain("base"):
        said = against["base"]["said"]
        if _has_judged_pairs(config) and not (root / "all").exists():
            steps.append(Advice("before serving, train on every pair, those it was judged on too", _command(root, more="--refit_all")))
        if said == "better" and results["verdict"].get("control") is None:
            steps.append(Advice("the tuned model is better than the starting one, but no shuffled-answers control ran, so it may be better in form "
                                "alone. Read answers before you serve it", chat))
        elif said == "better":
            steps.append(Advice("the tuned model is better than the starting one: serve it", chat))
            steps.append(_export(shown + ("/all" if config["data"].get("folds") else "")))
        else:
            steps.append(Advice(f"against the starting model the verdict is: {said}. Read answers before you serve it", chat))
        if "sft_steps" in against and not (told("sft_steps") and gain("sft_steps")):
            steps.append(Advice("fine-tuning on the seeds alone does as well in as many steps: the generated pairs have not shown their worth", ""))
    elif "base" in against and not told("base"):
        least = against["base"].get("detectable")
        size = f": {against['base']['rows']} rows show a difference of {_scaled(least, results)} or more" if least else ""
        steps.append(Advice(f"nothing was shown against the starting model{size}. More pairs to judge on would tell", ""))
    if (root / "all" / "report.html").exists():
        steps.insert(0, Advice("the model trained on every pair is in all/; the verdict is on its siblings that were not",
                               f"python -m isara_jax.chat --model={shown}/all"))
    if not (root / "blind" / "results.json").exists():
        steps.append(Advice("let a person judge blindly: a sheet of questions with two answers each, and one of pairs",
                            f"python -m isara_jax.eval --model={shown} --blind=20"))
    return steps


def _export(shown: str) -> Advice:
    return Advice("to serve it elsewhere (transformers, vLLM, llama.cpp), write it as a Hugging Face folder",
                  f"python -m isara_jax.export --workdir={shown} --out={shown}/export")


def _unjudged(root: Path, config: dict[str, Any]) -> list[Advice]:
    chat = Advice("ask the tuned model", f"python -m isara_jax.chat --model={_shown(root)}")
    if root.name == "all":
        return [chat]
    return [chat, Advice("nothing judged this run. Keep a part of the pairs for that, or name a file of others, in another workdir",
                         _command(root, drop="workdir", more=f"--workdir={_shown(root)}-judged --config.data.test_share=0.25"))]


def _more(root: Path, config: dict[str, Any], history: list[dict[str, Any]]) -> list[Advice]:
    steps, last = [], history[-1] if len(history) > 1 else None
    seeds = sum(1 for _ in open(root / "pool" / "000-seeds.jsonl", "rb")) if (root / "pool" / "000-seeds.jsonl").exists() else 0
    if last and last["held_out"] is not None and history[-2]["held_out"] - last["held_out"] > FALLING and last["kept"] >= LOW_YIELD * last["requests"]:
        steps.append(Advice(f"the held-out loss still falls ({history[-2]['held_out']:.3f} to {last['held_out']:.3f}): one more iteration",
                            _command(root, drop="config.stop.iterations", more=f"--config.stop.iterations={config['stop']['iterations'] + 1}")))
    if last and last["kept"] < LOW_YIELD * last["requests"]:
        reasons = last["funnel"]["rejected"]
        most = f"; most were rejected by {max(reasons, key=reasons.get)}" if reasons else ""
        steps.append(Advice(f"the last iteration kept {last['kept']} of {last['requests']}{most}: more seeds bring more than more requests", ""))
    elif 0 < seeds < FEW_SEEDS:
        steps.append(Advice(f"there are {seeds} seeds: more of them bring more than anything else here", ""))
    return steps


# -------------------------------------------------------------------------------------------------------------------------- reading
def _results(root: Path) -> dict[str, Any]:
    """The evaluation of the split that was looked at last: test rows where there are any."""
    for split in ("test", "dev"):
        if found := _json(root / "evaluation" / split / "results.json"):
            return found
    return {}


def _history(root: Path) -> list[dict[str, Any]]:
    """The summaries of the finished iterations in a row, the starting model's first."""
    found = []
    while made := _json(root / "iterations" / f"{len(found):02d}" / "DONE"):
        found.append(made)
    return found


def _json(path: Path) -> dict[str, Any]:
    """The object in a file; empty where there is none that can be read."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _command(root: Path, drop: str = "", more: str = "") -> str:
    """The command that started the run last, without the flag `drop` and with `more` behind it; "" where Python code started it."""
    words = shlex.split(_last_line(root))
    if "isara_jax.train" not in words:
        return ""
    kept = [w for w in words if not (drop and w.startswith(f"--{drop}=")) and w != "--refit_all"]
    return f"{shlex.join(kept)} {more}".strip()


def _last_line(root: Path) -> str:
    try:
        return (root / "command.txt").read_text(encoding="utf-8").strip().splitlines()[-1]
    except (OSError, IndexError):
        return ""


def _has_judged_pairs(config: dict[str, Any]) -> bool:
    return bool(config["data"].get("folds") or config["data"].get("test_share"))


def _scaled(value: float, results: dict[str, Any]) -> str:
    quantity = results["verdict"]
    return f"{value:.3f}" if quantity["primary"] == "nll" else f"{100 * value:.1f} points of {quantity['label']}"


def _shown(root: Path) -> str:
    """The workdir as the person named it, for a command line; folds and the run on all pairs lie inside it."""
    given = next((w.partition("=")[2] for w in reversed(shlex.split(_last_line(root))) if w.startswith("--workdir=")), "")
    inside = {"folds": f"/folds/{root.name}"}.get(root.parent.name, "/all" if root.name == "all" and Path(given).name != "all" else "")
    named = given and (inside or Path(given).name == root.name)
    return shlex.quote(given.rstrip("/") + inside if named else str(root))
