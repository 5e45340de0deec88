"""Our own domain, everything at hand: 64 seeds on common misconceptions, 150 questions with right and wrong choices, all arms.

    python -m isara_jax.train --config=configs/misconceptions.py --workdir=runs/misconceptions

Right and wrong choices are alike in length and opening, so that a model that ignores the question scores near chance.
Time and expected result: docs/first_light.md.
"""
from isara_jax.config import defaults


def get_config():
    config = defaults()
    config.data.seeds = "misconceptions"
    config.generate.requests = 96
    config.sft.lr = 1e-4  # 2e-5, the rate of 7B models, hardly moves 135M parameters in so few steps
    config.eval.benchmark = "misconceptions"
    config.eval.primary = "mc2_cond"
    config.eval.rows = 150  # all dev rows
    config.eval.arms = ("all",)
    return config
