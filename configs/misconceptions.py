"""Our own domain, everything at hand: 64 seeds on common misconceptions, 150 questions with right and wrong choices, all arms.

    python -m isara_jax.train --config=configs/misconceptions.py --workdir=runs/misconceptions

Right and wrong choices are alike in length and opening, so that a model that ignores the question scores near chance.
Time: 22 CPU minutes in bfloat16 on two cores of an AMD EPYC, 5 GiB; about twice that (extrapolated) on CPUs with AVX2 alone. Expect:
about 150 new pairs, question-conditioned MC2 between 52 and 62, ISARA at 56, nothing distinguishable with 118 rows (docs/first_light.md).
"""
from isara_jax.config import defaults


def get_config():
    config = defaults()
    config.data.seeds = "misconceptions"
    config.generate.requests = 96
    config.sft.lr = 1e-4  # as measured in docs/first_light.md; on TruthfulQA 2e-5 does as well and damages nothing (docs/screening.md)
    config.eval.benchmark = "misconceptions"
    config.eval.primary = "mc2_cond"
    config.eval.rows = 150  # all dev rows
    config.eval.arms = ("all",)
    return config
