"""The pool: segments written once, marked, verified."""
from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isara_jax.common import UserError
from isara_jax.data.pool import Pool, Record, pair_id


def record(question: str, iteration: int = 0, answer: str = "Because.", **fields) -> Record:
    return Record(id=pair_id(question, answer), question=question, answer=answer, iteration=iteration,
                  origin="generated" if iteration else "seed", author="human", source="a book", licence="CC0-1.0", **fields)


FULL = record("Why?", 1, question_exemplars=("a", "b"), answer_exemplars=("b",), template="t", sampling={"temperature": 0.7},
              address={"seed": 2**63 - 1, "anchor": "a"},
              filters={"novelty": {"verdict": "pass", "score": 0.25}, "parse": {"verdict": "pass", "score": None}})


def test_what_was_appended_comes_back_in_order(tmp_path):
    pool = Pool(tmp_path / "pool")
    assert pool.last() == -1
    pool.append(0, [record("One?"), record("Two?")])
    pool.append(1, [FULL])
    assert pool.last() == 1
    assert pool.snapshot(0) == [record("One?"), record("Two?")]
    assert Pool(tmp_path / "pool").snapshot(1) == [record("One?"), record("Two?"), FULL]
    assert sorted(p.name for p in pool.folder.iterdir()) == ["000-seeds.done", "000-seeds.jsonl", "001.done", "001.jsonl"]
    mark = json.loads((pool.folder / "001.done").read_text())
    assert mark["rows"] == 1 and mark["format"] == 1 and len(mark["sha256"]) == 64


def test_an_iteration_may_keep_nothing(tmp_path):
    pool = Pool(tmp_path)
    pool.append(0, [record("One?")])
    pool.append(1, [])
    assert pool.last() == 1 and len(pool.snapshot(1)) == 1


def test_scores_have_six_digits(tmp_path):
    Pool(tmp_path).append(0, [record("One?", filters={"novelty": {"verdict": "pass", "score": 2 / 3}})])
    assert '"score": 0.666667}' in (tmp_path / "000-seeds.jsonl").read_text()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), min_size=1, unique=True))
def test_any_text_survives(tmp_path_factory, questions):
    records = [record(q) for q in questions]
    pool = Pool(tmp_path_factory.mktemp("pool"))
    pool.append(0, records)
    assert pool.snapshot(0) == records


def test_an_unfinished_segment_is_written_anew(tmp_path):
    pool = Pool(tmp_path)
    pool.append(0, [record("One?")])
    (tmp_path / "001.jsonl").write_text('{"id": "torn')  # killed between the segment and its marker
    assert pool.last() == 0 and len(pool.snapshot(0)) == 1
    pool.append(1, [FULL])
    assert pool.snapshot(1)[1] == FULL


def test_a_finished_segment_is_immutable(tmp_path):
    pool = Pool(tmp_path)
    pool.append(0, [record("One?")])
    before = (tmp_path / "000-seeds.jsonl").stat()
    pool.append(0, [record("One?")])
    assert (tmp_path / "000-seeds.jsonl").stat() == before
    with pytest.raises(UserError, match="000-seeds.jsonl is finished and holds other pairs"):
        pool.append(0, [record("Two?")])
    assert pool.snapshot(0) == [record("One?")]


@pytest.mark.parametrize("name, text, message", [
    ("001.jsonl", "", "001.jsonl was changed or damaged after it was written .0 rows, 1 expected"),
    ("001.done", "", "001.done is damaged"),
    ("001.done", "[]", "001.done is damaged"),
    ("001.done", '{"rows": 1, "sha256": "", "format": 99}', "001.done has format 99; this version of isara_jax reads format 1"),
])
def test_damage_is_named(tmp_path, name, text, message):
    pool = Pool(tmp_path)
    pool.append(0, [record("One?")])
    pool.append(1, [FULL])
    (tmp_path / name).write_text(text)
    assert pool.snapshot(0) == [record("One?")]
    with pytest.raises(UserError, match=message):
        pool.snapshot(1)


@pytest.mark.parametrize("name, message", [
    ("000-seeds.done", "000-seeds.done is missing, but later"),
    ("001.jsonl", "001.jsonl cannot be read"),
])
def test_missing_files_are_named(tmp_path, name, message):
    pool = Pool(tmp_path)
    pool.append(0, [record("One?")])
    pool.append(1, [FULL])
    (tmp_path / name).unlink()
    with pytest.raises(UserError, match=message):
        pool.snapshot(1)


def test_mistakes_of_the_caller_are_value_errors(tmp_path):
    pool = Pool(tmp_path)
    with pytest.raises(ValueError, match="segment 1 cannot follow segment -1"):
        pool.append(1, [FULL])
    pool.append(0, [record("One?")])
    with pytest.raises(ValueError, match="not written yet"):
        pool.snapshot(1)
    for wrong in ([FULL, FULL], [record("Two?")], [record("One?", 1)]):  # an id twice, another iteration, an id that is a seed's
        with pytest.raises(ValueError, match="another iteration, or an id that the pool has"):
            pool.append(1, wrong)
    with pytest.raises(ValueError, match="neither seed nor generated"):
        dataclasses.replace(FULL, origin="human")


def test_ids_follow_the_content():
    assert pair_id("a", "b") == pair_id("a", "b") != pair_id("a", "c")
    assert pair_id("ab", "c") != pair_id("a", "bc")
