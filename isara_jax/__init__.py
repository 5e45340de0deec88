"""isara_jax: align a language model to a domain from fewer than 100 question-answer pairs (ISARA, arXiv 2401.06785).

    lm = isara_jax.load("smollm2-135m-instruct")
    run = isara_jax.align(lm, "seeds.jsonl", {"stop": {"iterations": 2}}, "runs/mine")
    run.lm.generate(["Q: Why is the sky blue?\\nA:"], max_new_tokens=40, stop=["\\nQ:"])

Names are loaded when first used, so that light commands import no jax.
"""
from __future__ import annotations

import importlib
from typing import Any

_HOME = {"load": "isara_jax.lm", "LM": "isara_jax.lm", "Sample": "isara_jax.lm", "align": "isara_jax.train", "Run": "isara_jax.train",
         "evaluate": "isara_jax.evals.evaluate", "icl_knn": "isara_jax.icl", "InContext": "isara_jax.icl",
         "load_scorer": "isara_jax.scorer", "Scorer": "isara_jax.scorer",
         "UserError": "isara_jax.common", "Config": "isara_jax.config"}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'isara_jax' has no attribute {name!r}; it offers {', '.join(__all__)}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
