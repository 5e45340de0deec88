"""The whole loop of configs/tiny.py on tiny models of other families, as folders that people download: the same command, nothing else."""
from __future__ import annotations

import json
import math

import pytest
import tokenizers
import transformers
from hf_models import make
from tokenizers import decoders, models, pre_tokenizers

from isara_jax import train
from isara_jax.data.pool import Pool


def save_tokenizer(folder) -> None:
    """Every byte a token, and an end."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE(vocab={t: i for i, t in enumerate([*letters, "</s>"])}, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_special_tokens(["</s>"])
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>").save_pretrained(folder)


@pytest.mark.parametrize("family", [pytest.param("opt_post", id="opt"), pytest.param("gemma2", id="gemma"), pytest.param("qwen3", id="qwen")])
def test_the_same_command_runs_other_families(tmp_path, family):
    folder, workdir = tmp_path / family, tmp_path / "run"
    make(family, folder, vocab_size=264, eos_token_id=256, bos_token_id=None, max_position_embeddings=512)
    save_tokenizer(folder)
    train.main(["--config=configs/tiny.py", f"--config.model.name={folder}", f"--workdir={workdir}", "--config.stop.iterations=1",
                "--config.retrieval.encoder=own", "--config.filters.question=exemplar_copy", "--config.filters.answer=exemplar_copy"])
    assert {r.iteration for r in Pool(workdir / "pool").snapshot(1)} == {0, 1}
    losses = [json.loads(line) for line in (workdir / "iterations" / "01" / "loss.jsonl").read_text().splitlines()]
    assert losses and all(math.isfinite(row["loss_sum"]) and row["tokens"] > 0 for row in losses)
    assert (workdir / "iterations" / "01" / "DONE").exists() and (workdir / "report.html").exists()
