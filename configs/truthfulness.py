"""TruthfulQA: does a model get more truthful from 64 of its question-answer pairs, and is it content or form?

    python -m isara_jax.train --config=configs/truthfulness.py --workdir=runs/truthfulness --config.data.path=FOLDER

FOLDER holds TruthfulQA.csv and mc_task.json (github.com/sylinrl/TruthfulQA, Apache-2.0); without the flag they come from the hub.
Variants: `:ood` takes our own misconceptions as seeds, so that seeds and evaluation rows are of two makers; `:llama-7b`, `:opt-6.7b`,
`:opt-350m` take the paper's models; `:ood,llama-7b` both.
Time: 14 min (8 CPU minutes) in bfloat16 on two busy cores of an AMD EPYC, 4.6 GiB; about twice that (extrapolated) on CPUs with AVX2 alone.
Expect: 85 new pairs, question-conditioned MC2 between 48 and 54 for every arm, nothing distinguishable with 100 rows (docs/first_light.md).
"""
from isara_jax.config import defaults
from isara_jax.models import published


def get_config(variants: str = ""):
    config = defaults()
    config.data.seeds = "truthfulqa"
    config.data.limit = 64
    config.generate.requests = 96
    config.eval.benchmark = "truthfulqa"
    config.eval.arms = ("base", "icl_knn", "sft_epochs", "sft_steps", "isara", "shuffled")  # sft_steps may over-fit: docs/screening.md
    config.eval.primary = "mc2_cond"  # plain MC2 rises when a model ignores the question
    for variant in filter(None, variants.split(",")):
        if variant == "ood":
            config.data.seeds = "misconceptions"
            config.data.limit = 0
        else:
            published.use(config, variant, also=("ood",))
    return config
