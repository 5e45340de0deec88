"""The comparison at the end of a run, on the tiny model: which arms, on which rows, trained on what, evaluated how often."""
import json

import pytest

from isara_jax import evalset, judge, train
from isara_jax import eval as eval_entry
from isara_jax.arms import shuffle
from isara_jax.common import UserError, read_jsonl
from isara_jax.config import from_dict
from isara_jax.data.pool import Record
from isara_jax.evals import evaluate
from isara_jax.sft import loop as sft_loop

TOPICS = ("kettle", "ladder", "violin", "anchor", "pillow", "rocket", "garden", "mirror", "basket", "candle", "bridge", "hammer", "carpet", "window",
          "pencil", "saddle", "turnip", "walnut", "zipper", "yoghurt", "quarry", "icicle", "oyster", "umbrella")


def rows():
    """Twenty-four questions that share few words, each with two right and two wrong answers."""
    return [{"question": f"{t} {t[::-1]} what {t[1:]}{t} is {t[:3]} for?", "answer": f"A {t} helps.", "right": [f"A {t} helps.", f"It helps as {t}."],
             "wrong": [f"A {t} hurts.", f"It hurts as {t}."]} for t in TOPICS]


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return write(tmp_path_factory.mktemp("data") / "rows.jsonl", rows())


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch, request):
    """No test finds what another, or an earlier start, evaluated."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr("isara_jax.kept.cache_folder", lambda: folder)
    return folder


def command(workdir, file, *extra):
    return ["--config=configs/tiny.py", f"--workdir={workdir}", f"--config.eval.benchmark={file}", "--config.eval.rows=12", "--config.eval.validation_rows=4",
            "--config.eval.answer_rows=4", "--config.eval.answer_tokens=8", "--config.stop.iterations=2", *extra]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, file):
    """A run with every arm in every form."""
    workdir = tmp_path_factory.mktemp("arms") / "run"
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setattr("isara_jax.kept.cache_folder", lambda: folder)
        train.main(command(workdir, file, "--config.eval.arms=all", "--config.eval.forms=all"))
    return workdir


def results(workdir, split="dev"):
    return json.loads((workdir / "evaluation" / split / "results.json").read_text())


def test_every_arm_is_in_the_table_in_its_forms(whole):
    found = [(a["arm"], a["judged"]) for a in results(whole)["arms"]]
    assert [arm for arm, judged in found if judged] == ["base", "icl_random", "icl_knn", "sft_epochs", "sft_steps", "isara", "isara_1", "isara_icl_knn",
                                                       "shuffled", "off_domain"]
    forms = {(a["arm"], a["form"]) for a in results(whole)["arms"]}
    assert {("base", "plain"), ("base", "primer"), ("isara", "plain"), ("isara", "primer"), ("icl_knn", "knn-2"), ("icl_knn", "knn-for-primer"), ("shuffled", "primer")} <= forms


def test_all_arms_are_measured_on_the_same_rows_and_every_row_is_kept(whole):
    folder = whole / "evaluation" / "dev"
    files = sorted(set(folder.glob("*.jsonl")) - {folder / "items.jsonl"})
    ids = [[row["id"] for row in read_jsonl(f)] for f in files]
    assert {f.name for f in files} == {a["file"] for a in results(whole)["arms"]} and [i["id"] for i in read_jsonl(folder / "items.jsonl")] == ids[0]
    assert len(files) == len(results(whole)["arms"]) and len(ids[0]) == 12 and all(i == ids[0] for i in ids)
    validation = {row["id"] for f in (whole / "evaluation" / "validation").glob("*.jsonl") for row in read_jsonl(f)}
    assert len(validation) == 4 and not validation & set(ids[0])


def test_the_verdict_is_against_each_baseline_and_the_control_is_none(whole):
    made = results(whole)
    assert {c["baseline"] for c in made["verdict"]["comparisons"]} == set(judge.BASELINES)
    assert made["primary"] == "mc2_cond" and made["split"] == "dev" and made["sentences"]
    table = (whole / "evaluation" / "dev" / "table.md").read_text()
    assert "12 dev rows" in table and all(line in table for line in made["sentences"]) and table in (whole / "model_card.md").read_text()
    assert "to be judged" in (whole / "log.txt").read_text()


def test_the_probe_of_each_iteration_is_kept(whole):
    for t in (1, 2):
        kept = read_jsonl(whole / "iterations" / f"{t:02d}" / "probe.jsonl")
        assert len(kept) == 4 and all("rougeL_diff" in row and "cosine_diff" in row for row in kept)
        assert json.loads((whole / "iterations" / f"{t:02d}" / "DONE").read_text())["probe"]["cosine"]


def test_costs_of_arms_are_on_the_ledger(whole):
    costs = {r["stage"] for r in read_jsonl(whole / "metrics.jsonl") if r["kind"] == "cost"}
    assert {"fine-tuning sft_steps", "fine-tuning shuffled", "evaluate isara (plain)"} <= costs


# ------------------------------------------------------------------------------------------------------------ evaluated once
@pytest.fixture
def measured(monkeypatch):
    """Counts what is measured and what is fine-tuned."""
    calls = {"measure": [], "fit": []}
    measure, fit = evaluate.measure, sft_loop.fit
    monkeypatch.setattr(evaluate, "measure", lambda *a, **k: calls["measure"].append(a[2].name) or measure(*a, **k))
    monkeypatch.setattr(sft_loop, "fit", lambda *a, **k: calls["fit"].append(k["name"]) or fit(*a, **k))
    return calls


def test_a_second_start_measures_nothing_and_another_run_only_what_its_knob_changes(tmp_path, file, measured):
    arms = "--config.eval.arms=base,sft_epochs,isara,shuffled"
    train.main(command(tmp_path / "a", file, arms))
    assert sorted(measured["fit"]) == ["1", "2", "sft_epochs", "shuffled"]
    assert sorted(measured["measure"]) == ["plain"] * 5 + ["primer"] * 2  # base in both forms on validation rows and then on dev rows
    before = (tmp_path / "a" / "evaluation" / "dev" / "results.json").read_bytes()
    train.main(command(tmp_path / "a", file, arms))
    assert len(measured["measure"]) == 7 and len(measured["fit"]) == 4
    assert (tmp_path / "a" / "evaluation" / "dev" / "results.json").read_bytes() == before
    train.main(command(tmp_path / "b", file, arms, "--config.generate.question.temperature=0.5"))
    assert len(measured["measure"]) == 9 and sorted(measured["fit"][4:]) == ["1", "2", "shuffled"]  # base and the seeds' model are known


def test_a_longer_run_measures_the_new_last_iteration_alone(tmp_path, file, measured):
    arms = "--config.eval.arms=base,isara_each,isara"
    train.main(command(tmp_path / "a", file, arms))
    n = len(measured["measure"])
    train.main([*command(tmp_path / "a", file, arms), "--config.stop.iterations=3"])
    assert len(measured["measure"]) == n + 1


def test_without_reuse_the_cache_stays_empty(tmp_path, file, own_cache):
    train.main(command(tmp_path / "a", file, "--config.eval.arms=base,isara", "--config.eval.reuse=False", "--config.stop.iterations=1"))
    assert not list(own_cache.rglob("*.jsonl"))


# ------------------------------------------------------------------------------------------------------------ what arms are trained on
def test_controls_and_the_seed_model_take_as_many_steps_as_isara(whole, measured, tmp_path, file, monkeypatch):
    steps = {}
    fit = sft_loop.fit
    monkeypatch.setattr(sft_loop, "fit", lambda *a, **k: steps.update({k["name"]: k["n_steps"]}) or fit(*a, **k))
    train.main(command(tmp_path / "a", file, "--config.eval.arms=all"))
    assert steps["sft_steps"] == steps["shuffled"] == steps["off_domain"] == steps["2"] > steps["sft_epochs"]


def test_shuffled_answers_are_the_same_answers_and_none_stays():
    pairs = [Record(id=str(i), question=f"q{i}", answer=f"a{i}", iteration=0, origin="seed", author="a", source="s", licence="l") for i in range(9)]
    made = shuffle(pairs, seed=0)
    assert [p.question for p in made] == [p.question for p in pairs] and sorted(p.answer for p in made) == sorted(p.answer for p in pairs)
    assert all(p.answer != q.answer for p, q in zip(made, pairs)) and shuffle(pairs, 0) == made != shuffle(pairs, 1)


def test_rates_are_tried_in_every_fine_tuning_and_validation_rows_choose(tmp_path, file, measured):
    train.main(command(tmp_path / "a", file, "--config.eval.arms=base,sft_steps,isara", "--config.sft.rates=1e-3,1e-1", "--config.stop.iterations=1"))
    assert measured["fit"] == ["1", "1", "sft_steps", "sft_steps"]
    log = (tmp_path / "a" / "log.txt").read_text()
    assert log.count("does best on the validation rows") == 2 and "rate 0.1" in log
    rates = {row["rate"] for row in read_jsonl(tmp_path / "a" / "iterations" / "01" / "loss.jsonl")}
    assert len(rates) == 1 and rates <= {1e-3, 1e-1}


def test_rates_without_validation_rows_are_refused(tmp_path):
    with pytest.raises(UserError, match="sft.rates"):
        evalset.load_data(from_dict({"sft": {"rates": (1e-3, 1e-4)}}))


# ------------------------------------------------------------------------------------------------------------------------- leakage
def settings(file, **data):
    return from_dict({"data": data, "eval": {"benchmark": str(file), "rows": 12, "validation_rows": 4}})


def test_a_seed_that_is_an_evaluation_row_is_an_error_naming_both(tmp_path, file):
    seeds = write(tmp_path / "seeds.jsonl", [{"question": "What is new here today?", "answer": "Nothing is."}, rows()[3]])
    with pytest.raises(UserError, match="seeds.jsonl, row 2.*rows.jsonl, row 4"):
        evalset.load_data(settings(file, seeds=str(seeds)))


def test_a_seed_near_an_evaluation_row_is_left_out_and_counted(tmp_path, file):
    near = rows()[3] | {"question": rows()[3]["question"].replace("what", "so what")}
    seeds = write(tmp_path / "seeds.jsonl", [{"question": "What is new here today?", "answer": "Nothing is."}, near])
    kept, chosen = evalset.load_data(settings(file, seeds=str(seeds)))
    assert [s.row for s in kept.pairs] == [1] and chosen.left_out == 1


def test_generated_questions_near_an_evaluation_row_are_rejected_as_leaks(tmp_path, file, monkeypatch):
    """The model writes an evaluation row's question word by word; the filter says so and nothing of it is kept."""
    question = rows()[5]["question"]
    from isara_jax.data import parse

    original = parse.parse
    monkeypatch.setattr(parse, "parse", lambda text, template: parse.Parsed(question, None) if text else original(text, template))
    train.main(command(tmp_path / "a", file, "--config.eval.arms=base,isara", "--config.stop.iterations=1"))
    rejected = read_jsonl(tmp_path / "a" / "iterations" / "01" / "rejected.jsonl")
    assert {r["reason"] for r in rejected if r["stage"] == "question"} == {"leak"} and rejected[0]["score"] == 1.0
    assert "nothing to judge" in (tmp_path / "a" / "log.txt").read_text()


# ---------------------------------------------------------------------------------------------------------------------- bad input
def test_rows_without_a_test_side_cannot_be_tested_on(file):
    config = from_dict({"eval": {"benchmark": str(file), "split": "test"}})
    with pytest.raises(UserError, match="test split.*eval.split=dev"):
        evalset.load_data(config)


@pytest.mark.parametrize("primary, message", [("mc2_blind", "not a quantity"), ("refusal", "not a quantity"), ("mc2", "no choices")])
def test_a_primary_that_cannot_be_judged_by_is_refused(tmp_path, primary, message):
    plain = write(tmp_path / "plain.jsonl", [{"question": r["question"], "answer": r["answer"]} for r in rows()])
    with pytest.raises(UserError, match=message):
        evalset.load_data(from_dict({"eval": {"benchmark": str(plain), "primary": primary}}))


def test_the_named_quantity_stays(whole, capsys, file):
    with pytest.raises(SystemExit):
        train.main(command(whole, file, "--config.eval.primary=mc1"))
    assert "eval.primary" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------------------------- eval entry
def test_the_entry_evaluates_a_workdir_and_a_model_as_the_run_did(whole, tmp_path, file, capsys):
    options = [f"--config.eval.benchmark={file}", "--config.eval.rows=12", "--config.eval.answer_rows=4", "--config.eval.answer_tokens=8"]
    eval_entry.main(["--config=configs/tiny.py", f"--model={whole}", f"--out={tmp_path / 'run'}", *options])
    eval_entry.main(["--config=configs/tiny.py", "--model=tiny-random", f"--out={tmp_path / 'base'}", *options])
    value = lambda arms, arm, name: next(q["value"] for a in arms if (a["arm"], a["form"]) == arm for q in a["quantities"] if q["name"] == name)
    of = lambda name: json.loads((tmp_path / name / "dev" / "model.json").read_text())["arms"]
    for name in ("mc2_cond", "nll", "mc1"):
        assert value(of("run"), ("model", "plain"), name) == value(results(whole)["arms"], ("isara", "plain"), name)
    assert value(of("base"), ("model", "plain"), "nll") != value(of("run"), ("model", "plain"), "nll")
    assert "model (plain)" in capsys.readouterr().out


def test_the_entry_says_what_is_missing(tmp_path, capsys):
    for argv, message in ((["--config=configs/tiny.py"], "--model is missing"), (["--config=configs/tiny.py", "--model=tiny-random"], "eval.benchmark is empty")):
        with pytest.raises(SystemExit) as e:
            eval_entry.main(argv)
        assert e.value.code == 2 and message in capsys.readouterr().err
