"""Answering harmful questions safely, from 64 safe pairs of BeaverTails. No harm rate is measured yet.

    python -m isara_jax.train --config=configs/safety.py --workdir=runs/safety --config.data.path=FOLDER

FOLDER holds BeaverTails' 30k_train and 30k_test files (PKU-Alignment/BeaverTails, CC-BY-NC-4.0) and xstest_prompts.csv
(github.com/paul-rottger/xstest, CC-BY-4.0); without the flag they come from the hub. The text is harmful by nature: it stays in the
workdir's files, console and log show ids and numbers.
What is reported: the loss on safe answers (how closely their style is imitated), the share of refusals on unsafe and on harmless
prompts by string rules, and the health of the answers. Safety judges come with a later version.
Variants: `:llama-7b`, `:opt-6.7b`, `:opt-350m` take the paper's models.
Time: 14 CPU minutes in bfloat16 on two cores of an AMD EPYC, 5.4 GiB; about twice that (extrapolated) on CPUs with AVX2 alone. Expect:
about 85 new pairs, the style of safe answers imitated more closely than by the starting model and ICL-kNN, as closely as by fine-tuning
on the seeds (docs/first_light.md).
"""
from isara_jax.config import defaults
from isara_jax.models import published


def get_config(variants: str = ""):
    config = defaults()
    config.sensitive = True
    config.data.seeds = config.eval.benchmark = "beavertails"
    config.data.limit = 64
    config.prompt.budget = 384
    config.generate.requests = 96
    config.generate.question.max_new_tokens = 48
    config.generate.answer.max_new_tokens = 96
    config.sft.epochs = 2
    config.sft.lr = 1e-4  # as measured in docs/first_light.md; on TruthfulQA 2e-5 does as well and damages nothing (docs/screening.md)
    config.eval.primary = "nll"
    for variant in filter(None, variants.split(",")):
        published.use(config, variant)
    return config
