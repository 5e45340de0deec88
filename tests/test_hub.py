"""Rows of the hub: through local folders laid out as the repositories are, and what is said where there is no hub."""
from __future__ import annotations

import dataclasses
import json
import sys

import pytest

from isara_jax.common import UserError
from isara_jax.data import hub, sources
from isara_jax.data.benchmarks import open_benchmark
from isara_jax.data.tables import read_table

COLOURS = ("amber", "blue", "copper", "denim", "ebony", "fawn", "green", "hazel", "ivory", "jade", "khaki", "lilac")
GENERATION = [{"type": "Adversarial", "category": "Colour", "question": f"Describe {c}.", "best_answer": f"It is {c}",
               "correct_answers": [f"It is {c}", "A colour"], "incorrect_answers": ["A sound", "A smell."], "source": "us"}
              for c in COLOURS]
MC = [{"question": f"Describe {c}.", "mc1_targets": {"choices": [f"It is {c}.", "A sound."], "labels": [1, 0]},
       "mc2_targets": {"choices": [f"It is {c}.", "A colour.", "A sound.", "A smell."], "labels": [1, 1, 0, 0]}} for c in COLOURS]
CARD = """---
configs:
- config_name: generation
  data_files:
  - {split: validation, path: generation/validation-*}
- config_name: multiple_choice
  data_files:
  - {split: validation, path: multiple_choice/validation-*}
---
"""


@pytest.fixture
def snapshot(tmp_path, monkeypatch):
    """A folder laid out as truthfulqa/truthful_qa is, with a cache of its own."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "truthful_qa"
    for name, rows in (("generation", GENERATION), ("multiple_choice", MC)):
        (folder / name).mkdir(parents=True)
        datasets.Dataset.from_list(rows).to_parquet(folder / name / "validation-00000-of-00001.parquet")
    (folder / "README.md").write_text(CARD)
    return folder


def hub_at(monkeypatch, name, folders):
    """Let the repositories of a benchmark be these local folders."""
    moved = [dataclasses.replace(s, repo=str(folders[s.key])) if s.key in folders else dataclasses.replace(s, repo="") for s in
             sources.SOURCES[name]]
    monkeypatch.setitem(sources.SOURCES, name, tuple(moved))


def sides(benchmark):
    """The rows without their places, which differ."""
    return [[dataclasses.replace(i, file="", row=0) for i in side] for side in (benchmark.pool, benchmark.validation, benchmark.test)]


def test_truthfulqa_is_the_same_from_the_hub_its_snapshot_and_its_files(snapshot, tmp_path, monkeypatch):
    (tmp_path / "files").mkdir()
    (tmp_path / "files/mc_task.json").write_text(json.dumps([
        {"question": r["question"]} | {k: dict(zip(r[k]["choices"], r[k]["labels"])) for k in ("mc1_targets", "mc2_targets")} for r in MC]))
    (tmp_path / "files/TruthfulQA.csv").write_text("Question,Best Answer,Correct Answers,Incorrect Answers\n" + "".join(
        f'{r["question"]},{r["best_answer"]},{"; ".join(r["correct_answers"])},{"; ".join(r["incorrect_answers"])}\n' for r in GENERATION))
    local, files = open_benchmark("truthfulqa", str(snapshot)), open_benchmark("truthfulqa", str(tmp_path / "files"))
    hub_at(monkeypatch, "truthfulqa", {"generation": snapshot, "mc": snapshot})
    remote = open_benchmark("truthfulqa")
    assert sum(map(len, sides(local))) == len(COLOURS)
    assert sides(local) == sides(files) == sides(remote) and local.hash == files.hash == remote.hash
    assert remote.pool[0].file == str(snapshot) and local.pool[0].file == "validation-00000-of-00001.parquet"


def test_alpaca_is_the_same_from_parquet_and_from_the_hub_with_its_test_file(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [{"instruction": f"Describe {c}.", "input": "", "output": f"It is {c}.", "text": "x"} for c in COLOURS]
    (tmp_path / "alpaca/data").mkdir(parents=True)
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "alpaca/data/train-00000-of-00001-a09b.parquet")
    (tmp_path / "alpaca_eval").mkdir()
    (tmp_path / "alpaca_eval/alpaca_eval.json").write_text(json.dumps([
        {"dataset": "koala", "instruction": "Name a bird.", "output": "A heron.", "generator": "some_model"}]))
    (tmp_path / "alpaca_eval/alpaca_eval.py").write_text("raise SystemExit('nothing of a repository is run')")
    local = open_benchmark("alpaca", str(tmp_path / "alpaca"))
    hub_at(monkeypatch, "alpaca", {"train": tmp_path / "alpaca", "alpaca_eval": tmp_path / "alpaca_eval"})
    remote = open_benchmark("alpaca")
    assert sides(local) == sides(remote) and [i.question for i in remote.test] == ["Name a bird."]


def test_beavertails_is_the_same_from_jsonl_and_from_the_hub(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "hub"
    (folder / "round0/30k").mkdir(parents=True)
    for split, verb in (("train", "Describe"), ("test", "Explain to me")):
        rows = [{"prompt": f"{verb} {c}", "response": "Fine.", "category": {"a": False}, "is_safe": n % 2 == 0}
                for n, c in enumerate(COLOURS)]
        datasets.Dataset.from_list(rows).to_json(folder / f"round0/30k/{split}.jsonl.gz", compression="gzip")
    (folder / "README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files:\n"
                                      "  - {split: 30k_train, path: round0/30k/train.jsonl.gz}\n"
                                      "  - {split: 30k_test, path: round0/30k/test.jsonl.gz}\n---\n")
    assert read_table(folder / "round0/30k/train.jsonl.gz").rows[1].values["is_safe"] is False
    local = open_benchmark("beavertails", str(folder))
    hub_at(monkeypatch, "beavertails", {"train": folder, "test": folder})
    assert sides(local) == sides(open_benchmark("beavertails"))
    assert {i.question.split()[0] for i in local.test} == {"Explain"} and len(local.test) == len(COLOURS)


def test_a_damaged_parquet_file_is_one_message(tmp_path):
    pytest.importorskip("pyarrow")
    (tmp_path / "train.parquet").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(UserError, match="train.parquet cannot be read as parquet"):
        open_benchmark("alpaca", str(tmp_path))


def test_without_the_package_one_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"pip install 'isara_jax\[hub\]'.*--config.data.path=FOLDER"):
        open_benchmark("truthfulqa")
    with pytest.raises(UserError, match=r"a.parquet is a parquet file.*pip install 'isara_jax\[hub\]'"):
        hub.parquet_table(tmp_path / "a.parquet")


def test_without_a_network_the_message_names_the_flag_and_the_download(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    constants = pytest.importorskip("huggingface_hub.constants")
    before = datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(hub.common, "reachable", lambda endpoint: False)
    for name in sources.SOURCES:
        with pytest.raises(UserError, match="does not answer.* Download .* into a folder and start again with --config.data.path=FOLDER"):
            open_benchmark(name)
    assert (datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE) == before, "the setting is given back"


def test_offline_the_hub_is_not_asked(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub.common, "reachable", lambda endpoint: pytest.fail("the hub was asked"))
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set, so the hub was not asked"):
        open_benchmark("truthfulqa")


def test_a_port_where_nobody_listens_is_not_reachable():
    assert not hub.common.reachable("http://127.0.0.1:9")
