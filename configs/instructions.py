"""Following instructions, from 48 of Self-Instruct's human-written seed tasks.

    python -m isara_jax.train --config=configs/instructions.py --workdir=runs/instructions --config.data.path=FOLDER

FOLDER holds seed_tasks.jsonl (github.com/yizhongw/self-instruct, data/, Apache-2.0) and, for the test split alone, alpaca_eval.json and
IFEval's input_data.jsonl; without the flag they come from the hub. AlpacaEval and IFEval rows are never trained on.
Variants: `:alpaca` takes Alpaca's pairs (CC-BY-NC-4.0, written by text-davinci-003) as seeds and rows; `:llama-7b`, `:opt-6.7b`,
`:opt-350m` take the paper's models; `:alpaca,llama-7b` both.
Time: 20 CPU minutes in bfloat16 on two cores of an AMD EPYC, 7.4 GiB; about twice that (extrapolated) on CPUs with AVX2 alone. Expect:
about 75 new pairs; ROUGE-L 15 for ISARA and the starting model's chat form, 18 for fine- tuning on the seeds, nothing distinguishable,
the shuffled answers beaten (docs/first_light.md).
"""
from isara_jax.config import defaults
from isara_jax.models import published


def get_config(variants: str = ""):
    config = defaults()
    config.data.seeds = config.eval.benchmark = "self_instruct"
    config.data.limit = 48  # of 175 tasks; 100 others are evaluated on
    config.prompt.budget = 384  # some tasks are long
    config.generate.requests = 96
    config.generate.question.max_new_tokens = 48
    config.generate.answer.max_new_tokens = 64
    config.filters.answer = ("parse", "truncated", "echo", "ngram_loop", "exemplar_copy")  # no min_words: many answers are one word
    config.sft.epochs = 2
    config.sft.lr = 1e-4  # as measured in docs/first_light.md; on TruthfulQA 2e-5 does as well and damages nothing (docs/screening.md)
    config.eval.primary = "rougeL"
    config.eval.answer_rows = config.eval.rows  # the verdict is on generated answers
    for variant in filter(None, variants.split(",")):
        if variant == "alpaca":
            config.data.seeds = config.eval.benchmark = "alpaca"
            config.data.limit = 64
        else:
            published.use(config, variant, also=("alpaca",))
    return config
