"""Pairs of one's own: what is judged on and what is trained on, folds, the run on all pairs, models side by side, review inside the loop."""
import csv
import json

import pytest

import isara_jax
from isara_jax import folds, train
from isara_jax.common import UserError, read_jsonl
from isara_jax.config import ConfigError, from_dict
from isara_jax.data import seeds, splits
from isara_jax.data.pool import Pool
from isara_jax.evalset import load_data
from isara_jax.workdir import Workdir

QUESTIONS = ["Where do owls sleep by day?", "How is glass made from sand?", "Why does bread rise?", "When were clocks first built?",
             "Who drew the oldest known map?", "What makes rain fall sideways?", "Can bees count up to four?", "Which river is the longest of all?",
             "Does salt melt ice on roads?", "Is paper younger than ink?", "Should soap float in water?", "Are trains safer than cars?"]
PAIRS = [(question, f"The short answer to it is number {n}.") for n, question in enumerate(QUESTIONS, 1)]


@pytest.fixture
def file(tmp_path):
    return write(tmp_path / "mine.csv", PAIRS)


def write(path, pairs):
    with open(path, "w", encoding="utf-8", newline="") as f:
        csv.writer(f).writerows([("question", "answer"), *pairs])
    return path


def config(file, **data):
    return from_dict({"data": {"seeds": str(file), **data}})


def questions(pairs):
    return {p.question for p in pairs}


# ------------------------------------------------------------------------------------------------------------------- who is where
def test_a_share_of_the_pairs_is_judged_on_and_trained_on_by_nobody(file):
    seed_set, chosen = load_data(config(file, test_share=0.34))
    assert len(seed_set.pairs) == 7 and len(chosen.rows) == 5
    assert questions(seed_set.pairs) | questions(chosen.rows) == {q for q, _ in PAIRS} and not questions(seed_set.pairs) & questions(chosen.rows)
    assert questions(chosen.unseen) == questions(seed_set.pairs) and questions(chosen.validation) < questions(seed_set.pairs) or not chosen.validation
    assert all(i.right == (i.answer,) and i.row and not i.mc1 for i in chosen.rows) and chosen.primary.name == "rougeL"
    assert chosen.leaks.near(chosen.rows[0].question) and not chosen.leaks.near(seed_set.pairs[0].question)


def test_validation_rows_are_the_seeds_that_are_held_out_for_the_loss(file):
    seed_set, chosen = load_data(config(file, test_share=0.25))
    assert questions(chosen.validation) == questions(seeds.split_holdout(seed_set.pairs, 0.125)[1]) and len(chosen.validation) == 4


def test_in_folds_every_pair_is_judged_on_once(file):
    parts = [load_data(config(file, folds=3), fold=n) for n in (1, 2, 3)]
    judged = [question for _, chosen in parts for question in questions(chosen.rows)]
    assert sorted(judged) == sorted(q for q, _ in PAIRS)
    for seed_set, chosen in parts:
        assert len(chosen.rows) == 4 and len(seed_set.pairs) == 8 and not questions(seed_set.pairs) & questions(chosen.rows)


def test_folds_keep_near_questions_together_whatever_the_order(tmp_path):
    near = [(f"How many legs does a healthy grown {animal} have in winter?", "Four.") for animal in ("horse", "cow", "cat")]
    pairs = seeds.from_pairs([*PAIRS, *near], config("x").data).pairs
    parts = splits.folds(pairs, 3)
    assert [sum(p.answer == "Four." for p in part) for part in parts].count(3) == 1 and sorted(map(len, parts)) == [5, 5, 5]
    assert {frozenset(questions(part)) for part in splits.folds(pairs[::-1], 3)} == {frozenset(questions(part)) for part in parts}


def test_a_test_file_judges_and_near_seeds_leave(file, tmp_path):
    rows = write(tmp_path / "test.csv", [("Who washes the windows of the town hall?", "The mayor."),
                                         ("Where do owls sleep by day and night?", "In trees."), ("Why is the sea not sweet?", "Salt.")])
    seed_set, chosen = load_data(config(file, test=str(rows), test_share=0.25))
    assert len(chosen.rows) == 3 and chosen.left_out == 1 and len(seed_set.pairs) == 11 and chosen.name == "test.csv"


def test_a_seed_that_is_also_judged_on_is_refused(file, tmp_path):
    rows = write(tmp_path / "test.csv", [PAIRS[4], ("Why is the sea not sweet?", "Salt.")])
    with pytest.raises(UserError, match=r"mine\.csv, row 6: this seed is also an evaluation row \(.*test\.csv, row 2\)"):
        load_data(config(file, test=str(rows)))


@pytest.mark.parametrize("data, said", [
    ({"folds": 7}, "would leave 1 of 12 pairs to judge on"), ({"test": "nowhere.csv"}, "nowhere.csv does not exist"),
    ({"folds": 1}, "0 .one run. or 2 to 10"), ({"test_share": 0.9}, "between 0 and 0.5"), ({"folds": 2, "test": "x.csv"}, "that file judges every seed")])
def test_what_cannot_be_judged_on_is_refused(file, data, said):
    with pytest.raises(UserError, match=said):
        made = config(file, **data)
        load_data(made, fold=1 if made.data.folds else 0)


def test_only_one_thing_says_what_to_judge_on():
    with pytest.raises(ConfigError, match="says what to judge on, and so does"):
        from_dict({"data": {"test_share": 0.25}, "eval": {"benchmark": "misconceptions"}})


def test_three_pairs_are_enough_to_run_and_too_few_to_judge_on(tmp_path):
    seed_set, chosen = load_data(config(write(tmp_path / "three.csv", PAIRS[:3]), test_share=0.25))
    assert len(seed_set.pairs) == 3 and chosen is None


# --------------------------------------------------------------------------------------------------------------------------- runs
def command(file, workdir, *extra):
    return ["--config=configs/tiny.py", f"--workdir={workdir}", f"--config.data.seeds={file}", "--config.data.limit=0", "--config.stop.iterations=1",
            "--config.eval.answer_tokens=8", "--config.eval.arms=base,icl_knn,isara,shuffled", *extra]


@pytest.fixture(scope="module")
def folded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("folds")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("isara_jax.kept.cache_folder", lambda: folder / "cache")
        train.main(command(write(folder / "mine.csv", PAIRS), folder / "run", "--config.data.folds=2", "--refit_all"))
        yield folder


def results(workdir):
    return json.loads((workdir / "evaluation" / "dev" / "results.json").read_text())


def test_the_joint_verdict_is_over_every_pair_once(folded):
    run = folded / "run"
    made, parts = results(run), [results(run / "folds" / n) for n in "12"]
    assert made["rows"] == 12 and [p["rows"] for p in parts] == [6, 6] and made["folds"] == 2
    assert {i["question"] for i in read_jsonl(run / "evaluation" / "dev" / "items.jsonl")} == {q for q, _ in PAIRS}
    assert [a["arm"] for a in made["arms"]] == ["base", "icl_knn", "isara", "shuffled"]
    for arm in made["arms"]:
        rows = read_jsonl(run / "evaluation" / "dev" / arm["file"])
        apart = [row for n, p in zip("12", parts) for a in p["arms"] if a["arm"] == arm["arm"] and a["judged"]
                 for row in read_jsonl(run / "folds" / n / "evaluation" / "dev" / a["file"])]
        assert rows == apart and len({row["id"] for row in rows}) == 12
    assert all(c["rows"] == 12 for c in made["verdict"]["comparisons"]) and "had not seen it" in made["sentences"][-1]


def test_each_fold_trains_on_what_it_is_not_judged_on(folded):
    for n in "12":
        run = folded / "run" / "folds" / n
        trained = {r.question for r in Pool(run / "pool").snapshot(1)} | {r["question"] for r in read_jsonl(run / "held_out.jsonl")}
        judged = {i["question"] for i in read_jsonl(run / "evaluation" / "dev" / "items.jsonl")}
        assert not trained & judged and len(judged) == 6


def test_the_run_on_all_pairs_holds_nothing_out(folded):
    run = folded / "run" / "all"
    assert {r.question for r in Pool(run / "pool").snapshot(0)} == {q for q, _ in PAIRS} and not read_jsonl(run / "held_out.jsonl")
    assert not (run / "evaluation").exists() and (run / "checkpoints").exists() and (run / "report.html").exists()
    assert (folded / "run" / "report.html").exists() and "what next" in (folded / "run" / "log.txt").read_text()


def test_the_same_command_makes_nothing_again(folded, monkeypatch):
    run = folded / "run"
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and p.parent.name in ("pool", "dev", "01")}
    monkeypatch.setattr("isara_jax.work.Work.fit", lambda *_: pytest.fail("trained again"))
    monkeypatch.setattr("isara_jax.work.Work._generate", lambda *_: pytest.fail("generated again"))
    train.main(command(folded / "mine.csv", run, "--config.data.folds=2", "--refit_all"))
    assert {p: p.read_bytes() for p in before} == before


def test_another_number_of_folds_is_refused(folded):
    with pytest.raises(SystemExit):
        train.main(command(folded / "mine.csv", folded / "run", "--config.data.folds=3"))


def test_a_used_workdir_is_not_cross_fitted(file, tmp_path, capsys):
    train.main(command(file, tmp_path / "run"))
    with pytest.raises(SystemExit):
        train.main(command(file, tmp_path / "run", "--config.data.folds=2"))
    assert "data.folds: 0 -> 2" in capsys.readouterr().err and not (tmp_path / "run" / "folds").exists()


def test_python_wants_the_run_on_all_pairs_with_folds(tmp_path):
    lm = isara_jax.load("tiny-random", "float32")
    with pytest.raises(UserError, match="none of which has seen every pair"):
        isara_jax.align(lm, PAIRS, {"data": {"folds": 2}}, tmp_path / "run")


def test_the_number_of_iterations_of_the_run_on_all_pairs_is_that_of_the_judged(file, tmp_path):
    made = folds.on_all(config(file, folds=3), Workdir(tmp_path), None, [{"iteration": 1}, {"iteration": 2}, {"iteration": 2}])
    assert made.config.stop.iterations == 2 and made.config.data.holdout == 0 and len(made.seed_set.pairs) == 12 and made.eval_set is None


def test_models_side_by_side_before_choosing(file, capsys):
    train.main(["--config=configs/tiny.py", f"--config.data.seeds={file}", "--plan_models=tiny-random,llama-7b,no-such-model"])
    said = capsys.readouterr().out
    assert "tiny-random" in said and "6,738 M" in said and "is not on this machine" in said and "no-such-model:" in said
    rows = {line.split()[0]: line.split()[-1] for line in said.splitlines() if line.startswith("  ") and len(line.split()) > 6}
    assert rows["tiny-random"] == "yes"


# ------------------------------------------------------------------------------------------------------------------------- review
def test_a_run_waits_for_its_review_and_goes_on_with_what_was_decided(file, tmp_path, capsys):
    run, args = tmp_path / "run", command(file, tmp_path / "run", "--config.review=True")
    train.main(args)
    assert "review.csv" in capsys.readouterr().out and not (run / "iterations" / "01" / "DONE").exists()
    with open(run / "review.csv", encoding="utf-8-sig", newline="") as f:
        header, *rows = csv.reader(f)
    keep, answer = header.index("keep?"), header.index("answer")
    rows[0][keep], rows[1][answer] = "no", "An answer that a person wrote."
    with open(run / "review.csv", "w", encoding="utf-8-sig", newline="") as f:
        csv.writer(f).writerows([header, *rows[:-1]])
    train.main(args)
    new = [r for r in Pool(run / "pool").snapshot(1) if r.iteration == 1]
    assert len(new) == len(rows) - 2 and sum(r.answer == "An answer that a person wrote." for r in new) == 1
    done = json.loads((run / "iterations" / "01" / "DONE").read_text())
    assert done["funnel"]["rejected"]["review human"] == 2 and done["kept"] == done["funnel"]["pairs"] == len(new)
    assert not (run / "review.csv").exists()
