"""ISARA on a real 135M model, from 16 question-answer pairs on common misconceptions.

    make quickstart
    python -m isara_jax.train --config=configs/quickstart.py --workdir=runs/quickstart

Time: on two cores of an AMD EPYC 5 min 51 s in float32 from an empty compilation cache, another job running (6 CPU minutes, 4.4 GiB);
less in bfloat16, more on CPUs with AVX2 alone. Both models are fetched when they are not there yet (182 MB).
Expect: two iterations, 75 (bfloat16) or 84 (float32) new pairs, held-out loss about where it was, and a smoke test on thirty questions
that can tell nothing apart. Most pairs have the form of the seeds and little of their sense: docs/first_light.md reads thirty of them.
Afterwards read runs/quickstart/iterations/*/kept.jsonl (the new pairs), rejected.jsonl (what was turned down, and why) and samples.jsonl
(answers to held-out questions before and after).
"""
from isara_jax.config import defaults


def get_config():
    config = defaults()
    config.model.name = "smollm2-135m-instruct"
    config.retrieval.encoder = "minilm-l6"
    config.retrieval.k = 4
    config.data.seeds = "misconceptions"
    config.data.limit = 16
    config.generate.requests = 56
    config.generate.answer.temperature = 0.3  # at 0.7, the default, this small model's answers wander off more often
    config.sft.epochs = 2  # one fewer than the default: it keeps the run short on slow machines
    config.stop.iterations = 2
    config.eval.benchmark = "misconceptions"
    config.eval.primary = "mc2_cond"
    config.eval.rows = 30
    config.eval.validation_rows = 16
    config.eval.answer_rows = 0  # choices alone: generating answers would take as long again
    config.eval.arms = ("base", "icl_knn", "sft_epochs", "isara")
    config.eval.label = "smoke"  # thirty rows can show a gain of twenty points, no smaller one
    return config
