"""Your own question-answer pairs: a spreadsheet, one evening, two cores.

    python -m isara_jax.train --config=configs/own.py --workdir=runs/own --config.data.seeds=mine.csv --dry_run
    python -m isara_jax.train --config=configs/own.py --workdir=runs/own --config.data.seeds=mine.csv

mine.csv: columns question and answer, saved as "CSV UTF-8" (.jsonl and .json work too). A quarter of the pairs is kept to judge on.
    --config.data.test=FILE      judge on the pairs of another file, and train on all of mine.csv
    --config.data.folds=3        three runs that are each judged on another third, so that every pair is judged on once (three times the time)
    --refit_all                  then train on every pair, in runs/own/all
    --config.review=True         stop after generation until you have read the new pairs in runs/own/review.csv
    --plan_models=A,B            what models would take of this machine's time and memory, and nothing else
Time: configs/data/own/faq_en.csv, 50 pairs with answers of 110 words, 20 min and 5.5 GiB on two busy cores of an AMD EPYC in bfloat16.
Expect: 83 new pairs that have the form of the file and little of its content, and no difference that 13 rows could show; docs/own_data.md.
"""
from isara_jax.config import defaults


def get_config():
    config = defaults()
    config.data.seeds = ""  # yours: --config.data.seeds=FILE
    config.data.test_share = 0.25
    config.retrieval.k = -1  # 5, or as many as fit
    config.generate.requests = 96
    config.eval.answer_rows = 100
    config.eval.arms = ("base", "icl_knn", "sft_epochs", "sft_steps", "isara", "shuffled")  # sft_steps may over-fit: docs/screening.md
    return config
