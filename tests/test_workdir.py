"""A run's folder: identity, refusal with a diff, stages that are made once."""
import json

import pytest

from isara_jax.common import UserError
from isara_jax.config import from_dict
from isara_jax.workdir import Workdir, stage


def test_a_changed_identity_field_is_refused_with_a_diff_and_nothing_is_written(tmp_path):
    Workdir(tmp_path).open(from_dict({}), {"dtype": "float32"})
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(UserError, match=r"sft\.lr: 2e-05 -> 0\.0001"):
        Workdir(tmp_path).open(from_dict({"sft": {"lr": 1e-4}}), {"dtype": "float32"})
    with pytest.raises(UserError, match=r"resolved\.dtype: 'float32' -> 'bfloat16'"):
        Workdir(tmp_path).open(from_dict({}), {"dtype": "bfloat16"})
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_runtime_fields_may_change(tmp_path):
    Workdir(tmp_path).open(from_dict({}), {})
    changed = {"stop": {"iterations": 7}, "mesh": {"fsdp": 2}, "generate": {"slots": 128}, "data": {"seeds": "elsewhere.csv"}, "keep": "best_last"}
    assert Workdir(tmp_path).open(from_dict(changed), {}) == []
    assert len((tmp_path / "command.txt").read_text().splitlines()) == 2


def test_other_versions_are_a_warning(tmp_path):
    Workdir(tmp_path).open(from_dict({}), {})
    versions = json.loads((tmp_path / "versions.json").read_text())
    (tmp_path / "versions.json").write_text(json.dumps({**versions, "jaxlib": "0.0.1"}))
    (warning,) = Workdir(tmp_path).open(from_dict({}), {})
    assert "jaxlib: '0.0.1' ->" in warning


@pytest.mark.parametrize("content, message", [
    ("{", "not a run's config.json"), ("[]", "not a run's config.json"), ('{"format": 99}', "format 99"),
])
def test_a_foreign_or_newer_folder_is_refused(tmp_path, content, message):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=message):
        Workdir(tmp_path).stored()


def test_a_pool_without_its_config_is_refused(tmp_path):
    (tmp_path / "pool").mkdir()
    with pytest.raises(UserError, match="no config.json"):
        Workdir(tmp_path).stored()


def test_a_stage_is_made_once(tmp_path):
    made = []

    def make():
        made.append(1)
        return [{"a": 1, "b": "é\u2028"}]

    path = tmp_path / "questions.jsonl"
    assert stage(path, make) == [{"a": 1, "b": "é\u2028"}] == stage(path, make)
    assert made == [1]


def test_a_stage_without_its_marker_is_made_again(tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text('{"half": 1}\n{"to')
    assert stage(path, lambda: [{"whole": 1}]) == [{"whole": 1}]


def test_a_finished_stage_that_was_edited_is_an_error(tmp_path):
    path = tmp_path / "kept.jsonl"
    stage(path, lambda: [{"a": 1}])
    path.write_text('{"a": 2}\n')
    with pytest.raises(UserError, match="changed or removed since"):
        stage(path, lambda: [])


def test_a_run_from_before_a_field_was_there_goes_on(tmp_path):
    """A new identity field must not shut out the runs that its default describes."""
    run = Workdir(tmp_path / "run")
    run.open(from_dict({"data": {"holdout": 0.2}}), {"seeds": "abc"})
    path = run.root / "config.json"
    stored = json.loads(path.read_text())
    del stored["identity"]["data"]["folds"], stored["identity"]["data"]["test_share"]
    path.write_text(json.dumps(stored))
    assert run.open(from_dict({"data": {"holdout": 0.2}}), {"seeds": "abc"}) == []
    path.write_text(json.dumps(stored))
    with pytest.raises(UserError, match=r"data.folds: 0 -> 3\n"):
        run.open(from_dict({"data": {"holdout": 0.2, "folds": 3}}), {"seeds": "abc"})
