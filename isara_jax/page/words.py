"""A run's settings in words, for people who do not know the config."""
from __future__ import annotations

from typing import Any

from isara_jax.page.read import Row, table

FILTERS = {
    "parse": "the text is a question (or an answer) in the prompt's form",
    "truncated": "it ended by itself, not at the limit of tokens",
    "min_words": "it has enough words",
    "ngram_loop": "it does not repeat itself",
    "exemplar_copy": "it is no copy of a pair in its prompt",
    "novelty": "the question is not too near an accepted one (ROUGE-L)",
    "echo": "the answer is not the question again",
    "leak": "the question is not near a row that may be evaluated",
    "duplicate": "the pair is not in the pool yet",
    "human": "a person kept it",
}
_STRATEGIES = {"knn": "the {k} nearest pairs", "random": "{k} random pairs", "mmr": "{k} near but different pairs (MMR)"}
_ORDERS = {"nearest_last": "the nearest one last", "nearest_first": "the nearest one first", "id": "in a fixed order"}
_DATA = {"seeds_accumulated": "the seeds and every pair kept so far", "seeds_latest": "the seeds and the iteration's own pairs",
         "latest": "the iteration's own pairs"}
_INIT = {"base": "from the starting model each time", "last": "from the iteration before"}


def method(config: Row, resolved: Row) -> list[tuple[str, str]]:
    """(what, how) for each part of a run; parts whose settings are missing are left out."""
    made = []
    for name, words in (("Form", _form), ("Retrieval", _retrieval), ("Generation", _generation), ("Filters", _filters),
                        ("Fine-tuning", _tuning), ("Stops", _stops), ("Judged on", _judged), ("Randomness", _seed)):
        try:
            made.append((name, words(config, resolved)))
        except (KeyError, TypeError, ValueError, AttributeError):
            continue
    return made


def _form(c: Row, _: Row) -> str:
    if c["model"]["form"] == "chat":
        return "chat: the model's own template, in generation, training and scoring alike"
    return f"plain: “{c['prompt']['question_marker']} … {c['prompt']['answer_marker']} …”, in generation, training and scoring alike"


def _retrieval(c: Row, _: Row) -> str:
    r = c["retrieval"]
    if not r["k"]:
        return "prompts hold no pairs"
    which = _STRATEGIES.get(r["strategy"], "{k} pairs by " + str(r["strategy"])).format(k=r["k"])
    return (f"{which} are put into each prompt, {_ORDERS.get(c['prompt']['order'], c['prompt']['order'])}; nearness by the encoder "
            f"{r['encoder']} over questions")


def _generation(c: Row, resolved: Row) -> str:
    said = []
    for kind in ("question", "answer"):
        s = c["generate"][kind]
        drawn = "greedy" if s["temperature"] == 0 else f"temperature {s['temperature']:g}, top-p {s['top_p']:g}"
        limit = resolved.get(f"{kind}_tokens") or s["max_new_tokens"]
        said.append(f"{kind}s: {drawn}" + (f", at most {limit} tokens" if limit else ""))
    return f"{c['generate']['requests']} requests an iteration; {'; '.join(said)}"


def _filters(c: Row, _: Row) -> str:
    f = c["filters"]
    named = "; ".join(f"{kind}s: {', '.join(f[kind]) or 'none'}" for kind in ("question", "answer"))
    return (f"{named}; at least {f['min_words']} words; a question with ROUGE-L above {f['rouge']:g} to an accepted one is not new")


def _tuning(c: Row, _: Row) -> str:
    s = c["sft"]
    rates = ", ".join(f"{r:g}" for r in s["rates"])
    rate = f"the best of the learning rates {rates} on validation rows" if rates else f"learning rate {s['lr']:g}"
    return (f"on {_DATA.get(s['data'], s['data'])}, {_INIT.get(s['init'], s['init'])}; {s['epochs']} epochs, {rate}, "
            f"{s['batch']} pairs a step, weight decay {s['weight_decay']:g}, gradient norm at most {s['clip']:g}")


def _stops(c: Row, _: Row) -> str:
    s = c["stop"]
    patience = f", or after {s['patience']} iteration(s) without a lower held-out loss" if s["patience"] else ""
    return f"after {s['iterations']} iteration(s), or when fewer than {s['min_yield']:.0%} of the requests are kept{patience}"


def _judged(c: Row, _: Row) -> str:
    e, data = c["eval"], c["data"]
    which = "the last iteration" if e["model"] == "last" else "the iteration with the lowest held-out loss"
    if e["benchmark"]:
        return f"{e['benchmark']}, {e['split']} rows; {which}"
    if data.get("folds"):
        return f"every pair once, in {data['folds']} folds; {which}"
    if data.get("test"):
        return f"{data['test']}; {which}"
    if data.get("test_share"):
        return f"{data['test_share']:.0%} of the pairs, which are not trained on; {which}"
    return "nothing: no benchmark and no test file was named, so there is no verdict"


def _seed(c: Row, resolved: Row) -> str:
    return f"every draw descends from the seed {c['seed']}; computed in {resolved.get('dtype') or c['model']['dtype']}"


def flat(tree: Any, path: str = "") -> list[tuple[str, str]]:
    """Every field of a nested config with its value: ("sft.lr", "0.0001")."""
    found = []
    for name, value in table(tree).items():
        found += flat(value, f"{path}{name}.") if isinstance(value, dict) else [(path + str(name), _shown(value))]
    return found


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "(none)"
    return '""' if value == "" else str(value)


# ------------------------------------------------------------------------------------------------------------------------ arms
_ARMS = {
    "base": "the starting model",
    "icl_random": "the starting model with random seeds in its prompt",
    "icl_knn": "the starting model with the nearest seeds in its prompt",
    "sft_epochs": "fine-tuned on the seeds, as many epochs",
    "sft_steps": "fine-tuned on the seeds, as many steps",
    "isara": "the aligned model",
    "isara_icl_knn": "the aligned model with the nearest seeds in its prompt",
    "shuffled": "control: the same pairs with the answers shuffled",
    "off_domain": "control: pairs of another domain",
}


def arm(name: str) -> str:
    """What an arm of the table is, "" for an unknown one."""
    stem, _, iteration = name.rpartition("_")
    if stem == "isara" and iteration.isdecimal():
        return f"the aligned model after iteration {iteration}"
    return _ARMS.get(name, "")
