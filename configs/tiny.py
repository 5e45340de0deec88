"""Every stage on a tiny random model with a byte tokenizer: shows that the loop works, aligns nothing.

    python -m isara_jax.train --config=configs/tiny.py --workdir=runs/tiny

Time: 8 s with a warm compilation cache, 19 s without (2 cores of an AMD EPYC, no downloads); 20 s and 45 s are the most it may take.
Expect: two iterations of 16 requests, most of them kept. The model writes random bytes, so a text may be cut short and one word is enough.
"""
from isara_jax.config import defaults


def get_config():
    config = defaults()
    config.model.name = "tiny-random"
    config.model.dtype = "float32"
    config.retrieval.encoder = "tiny-random-encoder"
    config.retrieval.k = 2
    config.data.limit = 12
    config.generate.requests = 16
    config.generate.question.max_new_tokens = 24
    config.generate.answer.max_new_tokens = 24
    config.filters.question = ("min_words", "ngram_loop", "exemplar_copy", "novelty")
    config.filters.answer = ("min_words", "echo", "ngram_loop", "exemplar_copy")
    config.filters.min_words = 1
    config.sft.epochs = 1
    config.sft.lr = 1e-3
    return config
